"""Runs the operator against a test cluster with nothing but the rights that the chart gives: real Helm renders the chart, its objects are
applied, and the operator process gets a token of the chart's ServiceAccount.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Self

import yaml

from testcluster import binaries
from testcluster.cluster import Cluster
from testcluster.processes import Child, free_port, wait_until

CHART = Path(__file__).parents[3] / "charts" / "finetune-operator"
RELEASE = "finetune-operator"
TOKEN_HOURS = 12
_READY_SECONDS = 120.0


def render(values: list[str] | None = None, *, namespace: str = "finetune-system") -> list[dict[str, object]]:
    """The chart's objects; `values` are --set arguments. Raises RuntimeError with Helm's words."""
    helm = binaries.ensure(["helm"])["helm"]
    settings = [word for value in values or [] for word in ("--set", value)]
    command = [str(helm), "template", RELEASE, str(CHART), "--namespace", namespace, "--kube-version", "1.34.4", *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return [doc for doc in yaml.safe_load_all(done.stdout) if doc]


class Operator:
    """The operator as a process. `kill` and `start` as often as a test likes; `stop` is SIGTERM."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        namespace: str = "finetune-system",
        trainer_image: str = "finetune-trainer",
        arguments: list[str] | None = None,
        env: dict[str, str] | None = None,
        values: list[str] | None = None,
    ) -> None:
        """With `values` (`--set` arguments) the command line is the one of the chart's Deployment; `arguments` come last and win."""
        self.cluster = cluster
        self.values = values
        self.namespace = namespace
        self.folder = Path(tempfile.mkdtemp(prefix="finetune-operator-"))
        self.log = self.folder / "operator.log"
        # Fixed for the life of the object: pods that run across a restart keep posting to the same place.
        self.progress_port, self.metrics_port = free_port(), free_port()
        self.trainer_image = trainer_image
        self.arguments = arguments or []
        self.env = env or {}
        self.process: Child | None = None
        self.secret = ""
        self.chart_arguments: list[str] = []

    def __enter__(self) -> Self:
        self.install()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def install(self) -> None:
        """The chart's objects, without the Deployment: the process stands in for its pod. Nor is there a cert-manager."""
        self.cluster.kubectl("create", "namespace", self.namespace, check=False)
        rendered = render(self.values, namespace=self.namespace)
        pod: Any = next(o for o in rendered if o["kind"] == "Deployment")["spec"]
        self.chart_arguments = pod["template"]["spec"]["containers"][0]["args"]
        objects = [o for o in rendered if o["kind"] not in ("Deployment", "Certificate")]
        crds = [o for o in objects if o["kind"] == "CustomResourceDefinition"]
        rest = [o for o in objects if o["kind"] != "CustomResourceDefinition"]
        self.cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=yaml.safe_dump_all(crds))
        for crd in crds:
            self.cluster.wait_for_crd(str(crd["metadata"]["name"]))  # type: ignore[index]
        self.cluster.kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all(rest))
        account = next(str(o["metadata"]["name"]) for o in objects if o["kind"] == "ServiceAccount")  # type: ignore[index]
        self.secret = next((str(o["metadata"]["name"]) for o in objects if o["kind"] == "Secret"), "")  # type: ignore[index]
        token = self.cluster.kubectl(
            "-n", self.namespace, "create", "token", account, f"--duration={TOKEN_HOURS}h"
        ).stdout.strip()
        config = yaml.safe_load(self.cluster.kubeconfig.read_text())
        config["users"][0]["user"] = {"token": token}
        self.kubeconfig = self.folder / "kubeconfig"
        self.kubeconfig.write_text(yaml.safe_dump(config))

    def command(self) -> list[str]:
        """The operator's command line."""
        here = {
            "--kubeconfig": str(self.kubeconfig),
            "--trainer-image": self.trainer_image,
            "--progress-url": f"https://127.0.0.1:{self.progress_port}",
            "--progress-bind": f"127.0.0.1:{self.progress_port}",
            "--metrics-bind": f"127.0.0.1:{self.metrics_port}",
            "--own-namespace": self.namespace,
        }
        if self.values is None:
            here["--tls-secret"] = self.secret
            rest = []
        else:
            here["--pod-ip"] = "127.0.0.1"
            # What the kubelet does with "$$(".
            rest = [word.replace("$$(", "$(") for word in self.chart_arguments if word.partition("=")[0] not in here]
        flags = [f"{flag}={value}" for flag, value in here.items()]
        return [sys.executable, "-m", "finetune_operator", *flags, *rest, *self.arguments]

    def start(self) -> None:
        """Started and ready."""
        self.process = Child.start("operator", self.command(), log=self.log, environment={**os.environ, **self.env})
        wait_until(lambda: self.http("readyz")[0] == 200, [self.process], _READY_SECONDS, "the operator")

    def kill(self) -> None:
        """SIGKILL: the operator gets no chance to tidy up."""
        if self.process is None:
            raise RuntimeError("the operator is not running")
        self.process.stop(0.0)
        self.process = None

    def stop(self) -> float:
        """SIGTERM; the seconds that it took to end."""
        started = time.monotonic()
        if self.process is not None:
            self.process.stop(20)
            self.process = None
        return time.monotonic() - started

    def http(self, path: str) -> tuple[int, str]:
        """Status and text of /metrics, /healthz or /readyz; status 0 without an answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/{path}", timeout=2) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except (urllib.error.URLError, OSError):
            return 0, ""

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a series over its unnamed labels; 0 where there is none."""
        total = 0.0
        for line in self.http("metrics")[1].splitlines():
            if re.match(rf"{name}(\{{|\s)", line) and all(f'{k}="{v}"' in line for k, v in labels.items()):
                total += float(line.rpartition(" ")[2])
        return total

    def tracebacks(self) -> list[str]:
        """Each with the line before it, which says who wrote it."""
        return re.findall(r"^.*\nTraceback \(most recent call last\):\n(?:[ +|].*\n|\n)*.*", self.log.read_text(), re.MULTILINE)
