"""Where the e2e tests run: the node in this sandbox (`make e2e`), or a cluster of yours (`make e2e KUBECONFIG=...`).

What a cluster of yours needs is told by OF_YOURS.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import boto3
from botocore.config import Config

from support.models import tiny_classifier, tiny_decoder, write_split, write_tasks
from testcluster import S3Server, binaries, images, sandbox
from testcluster.cluster import Cluster
from testcluster.node import ADDRESS, Node

ROOT = Path(__file__).parents[2]
SYSTEM = "finetune-system"
RELEASE = "finetune-operator"
MODELS, DATA = "finetune-e2e-models", "customer-feedback"
OF_YOURS = {
    "OPERATOR_IMAGE": "the operator's image with its tag, where the cluster pulls it",
    "TRAINER_IMAGE": "the trainer's",
    "AWS_ENDPOINT_URL": "an object store that this machine and the cluster's pods reach",
    "AWS_ACCESS_KEY_ID": "its credentials; they may create buckets",
    "AWS_SECRET_ACCESS_KEY": "the same",
    "AWS_REGION": "its region",
}
"""Environment variables that a run with KUBECONFIG needs besides."""
WORLD = "E2E_WORLD"
RESTRICTED = "pod-security.kubernetes.io/enforce=restricted"


@dataclass
class World:
    """One cluster with an object store, and the names of the images to test."""

    kubeconfig: Path
    aws: dict[str, str]
    operator_image: str
    trainer_image: str
    audit_log: Path | None = None
    """The API server's; None in a cluster of yours."""
    rights_end: dict[str, datetime] = field(default_factory=dict)
    """Pods of the operator that were running when a test took rights away, and when that was."""
    programs: dict[str, Path] = field(default_factory=lambda: binaries.ensure(["kubectl", "helm"]))

    def to_environment(self) -> None:
        """For the test processes that this one starts."""
        os.environ[WORLD] = json.dumps(
            {
                "kubeconfig": str(self.kubeconfig),
                "aws": self.aws,
                "operator_image": self.operator_image,
                "trainer_image": self.trainer_image,
                "audit_log": self.audit_log and str(self.audit_log),
            }
        )

    @classmethod
    def from_environment(cls) -> Self:
        """The one that `python -m e2e` made."""
        if WORLD not in os.environ:
            raise RuntimeError("these tests run in a cluster that `python -m e2e` prepares: run `make e2e`")
        told = json.loads(os.environ[WORLD])
        log = told.pop("audit_log")
        return cls(Path(told.pop("kubeconfig")), **told, audit_log=Path(log) if log else None)

    @property
    def ours(self) -> bool:
        """Whether it is the node in this sandbox, whose processes and images are at hand."""
        return self.audit_log is not None

    @property
    def cluster(self) -> Cluster:
        """For helpers that only call its kubectl."""
        return self  # type: ignore[return-value]

    def kubectl(
        self, *words: str, stdin: str | None = None, check: bool = True, timeout: float = 120
    ) -> "subprocess.CompletedProcess[str]":
        """As admin; a failure raises with kubectl's words."""
        return self._run("kubectl", *words, stdin=stdin, check=check, timeout=timeout)

    def helm(self, *words: str, check: bool = True, timeout: float = 240) -> "subprocess.CompletedProcess[str]":
        """Real Helm, in the operator's namespace."""
        return self._run("helm", f"--namespace={SYSTEM}", *words, check=check, timeout=timeout)

    def _run(
        self, program: str, *words: str, stdin: str | None = None, check: bool = True, timeout: float = 120
    ) -> "subprocess.CompletedProcess[str]":
        command = [str(self.programs[program]), f"--kubeconfig={self.kubeconfig}", *words]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout, check=False)
        if check and done.returncode != 0:
            raise AssertionError(f"{program} {' '.join(words)} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done

    def s3(self) -> Any:
        """A boto3 client of the object store."""
        keys = {
            "aws_access_key_id": "AWS_ACCESS_KEY_ID",
            "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY",
            "region_name": "AWS_REGION",
        }
        known = {argument: self.aws[name] for argument, name in keys.items()}
        return boto3.client(
            "s3", endpoint_url=self.aws["AWS_ENDPOINT_URL"], config=Config(s3={"addressing_style": "path"}), **known
        )

    def values(self) -> list[str]:
        """The chart's values for these images."""
        repository, _, tag = self.operator_image.rpartition(":")
        return [
            f"--set=image.repository={repository}",
            f"--set=image.tag={tag}",
            f"--set=jobDefaults.image={self.trainer_image}",
            f"--set=jobDefaults.modelMirror=s3://{MODELS}",
        ]

    def operators(self) -> list[dict[str, Any]]:
        """The operator's pods, also those that are ending."""
        selector = f"app.kubernetes.io/instance={RELEASE}"
        found: list[dict[str, Any]] = json.loads(self.kubectl("-n", SYSTEM, "get", "pods", "-l", selector, "-o", "json").stdout)[
            "items"
        ]
        return found

    def operator_pods(self) -> list[str]:
        """Their names."""
        return [pod["metadata"]["name"] for pod in self.operators()]

    def rights_change(self) -> None:
        """Before Helm changes roles: what the pods that run now are refused from here on is not a right that the chart forgot."""
        for name in self.operator_pods():
            self.rights_end.setdefault(name, datetime.now(UTC))

    def operator_logs(self) -> str:
        """Of the pods that run now."""
        return self.kubectl("-n", SYSTEM, "logs", f"deployment/{RELEASE}", "--tail=-1", check=False).stdout

    def fill(self) -> None:
        """Buckets with the pretrained model as a mirror and the example's data."""
        fetched = subprocess.run([sys.executable, ROOT / "hack/minilm.py"], stdout=subprocess.PIPE, text=True, check=True)
        mirror, client = Path(fetched.stdout.strip()), self.s3()
        for bucket in (MODELS, DATA):
            with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
                client.create_bucket(Bucket=bucket)
        for file in (path for path in mirror.rglob("*") if path.is_file()):
            client.upload_file(str(file), MODELS, str(file.relative_to(mirror)))
        with tempfile.TemporaryDirectory() as folder:
            for file in tiny_classifier(Path(folder) / "model").iterdir():
                client.upload_file(str(file), MODELS, f"tiny/{file.name}")
            for file in tiny_decoder(Path(folder) / "decoder").iterdir():
                client.upload_file(str(file), MODELS, f"decoder/{file.name}")
            for split, rows in (("train", 600), ("validation", 60), ("test", 61)):
                client.upload_file(str(write_split(Path(folder) / f"{split}.csv", rows, seed=rows)), DATA, f"tiny/{split}.csv")
                client.upload_file(str(write_tasks(Path(folder) / f"{split}.jsonl", rows, rows)), DATA, f"tiny/{split}.jsonl")
        for file in (ROOT / "examples/customer-feedback/data").glob("*.csv"):
            client.upload_file(str(file), DATA, f"data/{file.name}")

    def install(self) -> None:
        """The chart, as a platform engineer installs it."""
        self.kubectl("create", "namespace", SYSTEM)
        self.kubectl("label", "namespace", SYSTEM, RESTRICTED)
        self.helm("install", RELEASE, str(ROOT / "charts/finetune-operator"), *self.values(), "--wait", "--timeout=150s")

    def namespace(self, name: str) -> str:
        """A namespace for jobs that enforces the restricted Pod Security Standard, with the credentials' Secret."""
        self.kubectl("create", "namespace", name)
        self.kubectl("label", "namespace", name, RESTRICTED)
        literals = [f"--from-literal={key}={value}" for key, value in self.aws.items()]
        self.kubectl("-n", name, "create", "secret", "generic", "s3-credentials", *literals)
        return name


def _of_yours() -> dict[str, str]:
    if missing := [name for name in OF_YOURS if not os.environ.get(name)]:
        wanted = "; ".join(f"{name} ({OF_YOURS[name]})" for name in missing)
        raise RuntimeError(f"KUBECONFIG is set, so the tests run in that cluster; these variables are not set: {wanted}")
    return {name: os.environ[name] for name in OF_YOURS}


@contextlib.contextmanager
def world() -> Iterator[World]:
    """The cluster that the environment asks for."""
    if kubeconfig := os.environ.get("KUBECONFIG"):
        given = _of_yours()
        aws = {name: value for name, value in given.items() if name.startswith("AWS_")}
        yield World(Path(kubeconfig), aws, given["OPERATOR_IMAGE"], given["TRAINER_IMAGE"])
        return
    if not sandbox.inside():
        raise RuntimeError("run `make e2e`: it starts these tests in a sandbox with a node of their own")
    with Node(audit=True) as node, S3Server(host=ADDRESS) as s3:
        images.load()
        names = images.name_of("operator"), images.name_of("trainer")
        made = World(node.cluster.kubeconfig, s3.environment(), *names, node.cluster.audit_log)
        try:
            yield made
        finally:
            print(f"--- operator\n{made.operator_logs()[-4000:]}")
