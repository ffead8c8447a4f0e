"""What SECURITY.md says and no other test shows: what the right to write FineTuneJobs is worth, what limits it, and hostile models."""

import io
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.jobs import Jobs, Object, manifest, wait
from support.models import tiny_classifier
from testcluster import Cluster, PodRunner, hang
from testcluster.operator import Operator

POLICY = Path(__file__).parents[2] / "examples" / "security" / "finetunejob-policy.yaml"
RESTRICTED = "pod-security.kubernetes.io/enforce=restricted"
OWN = dict.fromkeys(("task", "model", "dataset", "output"))
"""A job without a recipe: with trainer.command."""

Create = Callable[..., "subprocess.CompletedProcess[str]"]


def volume(**source: Any) -> Object:
    return {"podTemplate": {"spec": {"volumes": [{"name": "v", **source}], "volumeMounts": [{"name": "v", "mountPath": "/v"}]}}}


TOKEN = {"projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}}
"""Without an audience it is one for the API server."""


@pytest.fixture(scope="module")
def runner(cluster: Cluster) -> Iterator[PodRunner]:
    with PodRunner(cluster.kubeconfig, lambda _pod: hang(20)) as running:
        yield running


@pytest.fixture
def jobs(cluster: Cluster, operator: Operator, runner: PodRunner, namespace: str) -> Jobs:
    return Jobs(cluster, namespace)


# ------------------------------------------------------------------------------------ what the right to write is worth --
def test_who_may_only_write_jobs_runs_any_pod_of_the_namespace(jobs: Jobs, cluster: Cluster) -> None:
    kubectl, namespace, user = cluster.kubectl, jobs.namespace, f"writer-of-{jobs.namespace}"
    kubectl("-n", namespace, "create", "role", "writer", "--verb=create", "--resource=finetunejobs.finetune.dev")
    kubectl("-n", namespace, "create", "rolebinding", "writer", "--role=writer", f"--user={user}")
    kubectl("-n", namespace, "create", "serviceaccount", "powerful")
    kubectl("-n", namespace, "create", "secret", "generic", "passwords", "--from-literal=PASSWORD=x")
    writer = ["--kubeconfig", str(cluster.kubeconfig_for(user)), "-n", namespace]
    for right in (["create", "pods"], ["create", "jobs.batch"], ["get", "secrets"], ["create", "serviceaccounts/token"]):
        assert kubectl("auth", "can-i", *right, *writer, check=False).stdout.strip() == "no", right

    trainer = {
        "image": "somebody/anything",
        "command": ["sh", "-c", "env"],
        "serviceAccountName": "powerful",
        "envFrom": [{"secretRef": {"name": "passwords"}}],
        **volume(**TOKEN),
    }
    kubectl("create", *writer, "-f", "-", stdin=json.dumps(manifest("deputy", **OWN, trainer=trainer)))
    spec = jobs.get(jobs.wait_pod("deputy-1"), "pod")["spec"]
    [container] = spec["containers"]
    assert (container["image"], container["command"]) == ("somebody/anything", ["sh", "-c", "env"])
    assert container["envFrom"] == [{"secretRef": {"name": "passwords"}}]
    assert (spec["serviceAccountName"], spec["automountServiceAccountToken"]) == ("powerful", False)
    # automountServiceAccountToken holds off nobody who asks for a token by name.
    [mounted] = [v for v in spec["volumes"] if v["name"] == "v"]
    assert "audience" not in mounted["projected"]["sources"][0]["serviceAccountToken"]


def test_pod_security_refuses_what_the_job_may_ask_for(jobs: Jobs, cluster: Cluster) -> None:
    cluster.kubectl("label", "namespace", jobs.namespace, RESTRICTED)
    jobs.apply(manifest("host", trainer=volume(hostPath={"path": "/"})), manifest("plain"))
    jobs.wait_pod("plain-1")  # the pod as the operator makes it is admitted

    def said() -> list[str]:
        return [e["message"] for e in jobs.list("events") if e["involvedObject"]["name"] == "host-1"]

    wait(lambda: any("violates PodSecurity" in text and "hostPath" in text for text in said()), "the refusal of host-1's pod")
    assert [p["metadata"]["name"] for p in jobs.list("pods") if p["metadata"]["name"].startswith("host-")] == []


# ------------------------------------------------------------------------------------------------- the example's policy --
@pytest.fixture
def create(jobs: Jobs, cluster: Cluster) -> Iterator[Create]:
    """create(manifest): in a restricted namespace, beside the policy."""
    cluster.kubectl("label", "namespace", jobs.namespace, RESTRICTED)
    cluster.kubectl("apply", "-f", str(POLICY))

    def ask(job: Object, *arguments: str) -> "subprocess.CompletedProcess[str]":
        words = ("-n", jobs.namespace, "create", *arguments, "-f", "-")
        return cluster.kubectl(*words, stdin=json.dumps(job), check=False)

    bad = manifest("bad", trainer={"image": "elsewhere/x"})
    wait(lambda: ask(bad, "--dry-run=server").returncode, "the policy")
    yield ask
    cluster.kubectl("delete", "-f", str(POLICY))


ALLOWED: tuple[Object, ...] = (
    {},
    {"image": "registry.example.com/team/trainer:1"},
    {"serviceAccountName": "training"},
    {"envFrom": [{"secretRef": {"name": "s3-credentials"}}, {"configMapRef": {"name": "settings"}}]},
    {"env": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}, {"name": "A", "value": "b"}]},
    volume(persistentVolumeClaim={"claimName": "models"}),
)
REFUSED: tuple[tuple[Object, str], ...] = (
    ({"image": "elsewhere/x"}, "trainer.image must begin with"),
    ({"image": "registry.example.com.elsewhere.com/x"}, "trainer.image must begin with"),
    ({"serviceAccountName": "default"}, "may only be training"),
    ({"envFrom": [{"secretRef": {"name": "passwords"}}]}, "may only use the Secrets"),
    ({"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "passwords", "key": "k"}}}]}, "may only use the Secrets"),
    (volume(hostPath={"path": "/"}), "volumes of a job may only be"),
    (volume(**TOKEN), "volumes of a job may only be"),
    (volume(secret={"secretName": "passwords"}), "volumes of a job may only be"),
)


def test_the_policy_lets_through_what_it_says_and_nothing_else(create: Create) -> None:
    for trainer in ALLOWED:
        done = create(manifest("job", trainer=trainer), "--dry-run=server")
        assert done.returncode == 0, (trainer, done.stderr)
    for trainer, says in REFUSED:
        done = create(manifest("job", trainer=trainer), "--dry-run=server")
        assert done.returncode != 0, trainer
        assert says in done.stderr, (trainer, done.stderr)


def test_the_policy_holds_for_edits_and_not_for_the_operator(create: Create, jobs: Jobs, cluster: Cluster) -> None:
    assert create(manifest("job", suspend=True)).returncode == 0
    jobs.wait_state("job", "Suspended")
    edit = json.dumps({"spec": {"trainer": {"image": "elsewhere/x"}}})
    done = cluster.kubectl("-n", jobs.namespace, "patch", "ftj", "job", "--type=merge", "-p", edit, check=False)
    assert "trainer.image must begin with" in done.stderr
    jobs.patch("job", {"suspend": False})
    jobs.wait_state("job", "Running")


def test_other_namespaces_are_not_bound(create: Create, jobs: Jobs, cluster: Cluster) -> None:
    cluster.kubectl("label", "namespace", jobs.namespace, RESTRICTED.split("=", maxsplit=1)[0] + "-")
    elsewhere = manifest("job", trainer={"image": "elsewhere/x"})
    wait(lambda: create(elsewhere, "--dry-run=server").returncode == 0, "a namespace without the label")


# ------------------------------------------------------------------------------------------------------ hostile models --
class Pickled:
    """Unpickled it makes a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


def load(folder: Path) -> None:
    from finetune_api import Recipe
    from finetune_trainer import model
    from finetune_trainer.tasks import kind_of

    spec = manifest("x", dataset={"uri": "s3://data/x", "labels": ["a", "b"], "maxLength": 16})["spec"]
    recipe = Recipe.model_validate(spec)
    model.build(folder, recipe, kind_of(recipe.task, recipe.dataset), model.load_tokenizer(folder, recipe))


def test_a_pickle_in_place_of_weights_is_not_read(tmp_path: Path) -> None:
    import torch

    from finetune_trainer.errors import TrainingFailure

    folder, proof = tiny_classifier(tmp_path / "model"), tmp_path / "proof"
    load(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"weights": Pickled(proof)}, folder / "pytorch_model.bin")
    with pytest.raises(TrainingFailure, match="safetensors") as told:
        load(folder)
    assert told.value.failure.reason == "ModelNotFound"
    assert not proof.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert proof.exists()  # it would have


def test_code_beside_a_model_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune_trainer.errors import TrainingFailure

    folder, proof = tiny_classifier(tmp_path / "model"), tmp_path / "proof"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForSequenceClassification": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(proof)!r})\n")
    monkeypatch.setattr("sys.stdin", io.StringIO())  # as in a pod and under `finetune run`: there is nobody to ask
    with pytest.raises(TrainingFailure, match="custom code") as told:
        load(folder)
    assert told.value.failure.reason == "ModelNotFound"
    assert not proof.exists()
