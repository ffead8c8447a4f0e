"""The CRD on a real API server: it takes every example, refuses every bad manifest in words, and agrees with the models."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bad_finetunejobs import BAD, BAD_EDITS, GOOD, GOOD_EDITS, Bad, BadEdit, GoodEdit, edited
from finetune_api import FineTuneJob, FineTuneJobStatus
from finetune_api.manifest import load_job, load_sweep, load_yaml
from integration.jobs import wait
from scalars import SCALARS
from testcluster import Cluster

ROOT = Path(__file__).parents[2]
LOADERS: dict[str, Callable[[str], object]] = {"FineTuneJob": load_job, "HyperparameterSweep": load_sweep}
EXAMPLES = sorted(
    (path, kind)
    for path in (ROOT / "examples").rglob("*.yaml")
    for kind in LOADERS
    if f"\nkind: {kind}\n" in f"\n{path.read_text(encoding='utf-8')}"
)

Run = Callable[..., subprocess.CompletedProcess[str]]

EVERYTHING: dict[str, Any] = edited(
    GOOD,
    {
        "metadata": {"name": "everything", "labels": {"kueue.x-k8s.io/queue-name": "team"}},
        "spec.dataset.test": "test.jsonl",
        "spec.dataset.textColumn": "body",
        "spec.hyperparameters": {
            "learningRate": 5e-5,
            "batchSize": 16,
            "maxGradNorm": 1,
            "weightDecay": 0,
            "dropout": {"hidden": 0.2, "attention": 0},
            "schedule": {"type": "Constant", "warmup": 100},
            "earlyStopping": {"minDelta": 0.001},
        },
        "spec.evaluation": {"everySteps": 50, "bestMetric": "loss"},
        "spec.checkpoint": {"storageUri": "s3://checkpoints/feedback", "everySteps": 25},
        "spec.trainer": {
            "image": "registry.example:5000/trainer@sha256:" + "0" * 64,
            "env": [
                {"name": "AWS_ENDPOINT_URL", "value": "http://minio:9000"},
                {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}},
            ],
            "envFrom": [{"secretRef": {"name": "s3"}}, {"configMapRef": {"name": "settings"}}],
            "resourcesPerNode": {"requests": {"cpu": 4, "memory": "16Gi"}, "limits": {"nvidia.com/gpu": 1, "cpu": "500m"}},
            "serviceAccountName": "trainer",
            "podTemplate": {
                "metadata": {"labels": {"team": "support"}, "annotations": {"example.com/a": "any text, any: sign"}},
                "spec": {
                    "nodeSelector": {"gpu": "a100"},
                    "tolerations": [{"key": "gpu", "operator": "Exists"}],
                    "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
                    "priorityClassName": "batch.low",
                    "imagePullSecrets": [{"name": "pull"}],
                    "volumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}],
                    "volumeMounts": [{"name": "models", "mountPath": "/models", "readOnly": True}],
                },
            },
        },
        "spec.failurePolicy": {"maxRestarts": 0},
    },
)
NULLS = edited(
    GOOD,
    {
        "metadata.name": "nulls",
        "spec.hyperparameters": {"epochs": None, "learningRate": None, "earlyStopping": None, "schedule": None},
        "spec.trainer": None,
        "spec.dataset.test": None,
    },
)
GOOD_MANIFESTS = {"shortest": GOOD, "everything": EVERYTHING, "nulls": NULLS}


@pytest.fixture(scope="module", autouse=True)
def crd(cluster: Cluster) -> None:
    for name in ("finetunejobs", "hyperparametersweeps"):
        cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / f"crds/{name}.finetune.dev.yaml"))
        cluster.wait_for_crd(f"{name}.finetune.dev")


@pytest.fixture
def kube(cluster: Cluster, namespace: str) -> Run:
    """kube(verb, ..., manifest=dict or text, check=False): kubectl in the test's namespace."""

    def run(
        verb: str, *args: str, manifest: dict[str, Any] | str | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        if manifest is None:
            return cluster.kubectl(verb, "-n", namespace, *args, check=check)
        text = manifest if isinstance(manifest, str) else json.dumps(manifest)
        return cluster.kubectl(verb, "-n", namespace, *args, "-f", "-", check=check, stdin=text)

    return run


def stored(kube: Run, name: str) -> dict[str, Any]:
    out: dict[str, Any] = json.loads(kube("get", "finetunejob", name, "-o", "json").stdout)
    return out


# ------------------------------------------------------------------------------------------------------- manifests --
def test_examples_exist() -> None:
    assert {kind for _, kind in EXAMPLES} == LOADERS.keys()


@pytest.mark.parametrize(("path", "kind"), EXAMPLES, ids=[str(path.relative_to(ROOT)) for path, _ in EXAMPLES])
def test_examples_are_taken_by_the_api_server_and_by_the_loader(kube: Run, path: Path, kind: str) -> None:
    text = path.read_text(encoding="utf-8")
    kube("create", "--dry-run=server", "--validate=strict", manifest=text)
    LOADERS[kind](text)


@pytest.mark.parametrize("bad", BAD, ids=lambda b: b.name)
def test_bad_manifests_are_refused_with_the_field_named(cluster: Cluster, bad: Bad) -> None:
    text = json.dumps(bad.manifest())
    done = cluster.kubectl("create", "--dry-run=server", "--validate=strict", "-f", "-", stdin=text, check=False)
    assert done.returncode != 0
    assert bad.named in done.stderr


@pytest.mark.parametrize("manifest", GOOD_MANIFESTS.values(), ids=GOOD_MANIFESTS.keys())
def test_what_is_stored_means_what_the_loader_reads(kube: Run, manifest: dict[str, Any]) -> None:
    """The defaults that the API server writes are those of the models, and nothing is pruned."""
    kube("create", "--validate=strict", manifest=manifest)
    there = FineTuneJob.model_validate(stored(kube, manifest["metadata"]["name"]))
    here = load_job(json.dumps(manifest))
    assert there.spec == here.spec
    assert there.spec.recipe().digest() == here.spec.recipe().digest()


@pytest.mark.parametrize(
    ("manifest", "how"),
    [
        pytest.param(manifest, how, id=f"{name}-{' '.join(how) or 'client-side'}")
        for name, manifest in GOOD_MANIFESTS.items()
        for how in ([], ["--server-side"])
        if not (how and manifest is NULLS)  # server-side apply takes null for a value, and a value of the wrong type
    ],
)
def test_applying_again_changes_nothing(kube: Run, manifest: dict[str, Any], how: list[str]) -> None:
    name = manifest["metadata"]["name"]
    kube("apply", *how, manifest=manifest)
    first = stored(kube, name)["metadata"]
    kube("apply", *how, manifest=manifest)
    again = stored(kube, name)["metadata"]
    assert first["generation"] == again["generation"] == 1
    assert first["resourceVersion"] == again["resourceVersion"]


def test_words_mean_the_same_to_kubectl_and_to_the_loader(kube: Run) -> None:
    lines = "".join(f"          w{i}: {word}\n" for i, word in enumerate(SCALARS))
    text = yaml.safe_dump(GOOD) + "  trainer:\n    podTemplate:\n      spec:\n        affinity:\n" + lines
    sent = json.loads(kube("create", "--dry-run=server", "-o", "json", manifest=text).stdout)
    theirs = sent["spec"]["trainer"]["podTemplate"]["spec"]["affinity"]
    ours = load_yaml(text)[0]["spec"]["trainer"]["podTemplate"]["spec"]["affinity"]
    for i, (word, value) in enumerate(SCALARS.items()):
        assert repr(theirs[f"w{i}"]) == repr(ours[f"w{i}"]) == repr(value), word


# ----------------------------------------------------------------------------------------------------------- edits --
@pytest.mark.parametrize("edit", BAD_EDITS, ids=lambda e: e.name)
def test_bad_edits_are_refused_in_a_sentence(kube: Run, edit: BadEdit) -> None:
    before = edited(GOOD, edit.before)
    kube("create", manifest=before)
    done = kube("replace", manifest=edited(before, edit.after), check=False)
    assert done.returncode != 0
    assert edit.named in done.stderr
    assert stored(kube, "good")["metadata"]["generation"] == 1


@pytest.mark.parametrize("edit", GOOD_EDITS, ids=lambda e: e.name)
def test_good_edits_are_possible(kube: Run, edit: GoodEdit) -> None:
    before = edited(GOOD, edit.before)
    kube("create", manifest=before)
    after = edited(before, edit.after)
    kube("replace", manifest=after)
    assert FineTuneJob.model_validate(stored(kube, "good")).spec == load_job(json.dumps(after)).spec


def test_suspend_change_resume_is_three_edits(kube: Run) -> None:
    kube("create", manifest=GOOD)
    for change in ({"suspend": True}, {"trainer": {"image": "new:2"}}, {"suspend": False}):
        kube("patch", "finetunejob", "good", "--type=merge", "-p", json.dumps({"spec": change}))
    assert stored(kube, "good")["spec"]["trainer"]["image"] == "new:2"


# ------------------------------------------------------------------------------------------------------- for people --
@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("spec", ["hyperparameters", "What to train, where it runs."]),
        ("spec.model", ["Required, unless trainer.command runs a script of yours.", "-required-"]),
        ("spec.hyperparameters", ["How to train.", "Examples per optimizer step", "learningRate", "<number>"]),
        ("spec.dataset.labels", ["their order gives their ids"]),
        (
            "spec.checkpoint",
            ["onSuspend", "A drain and a preemption always save.", "whenBusy", "everySeconds", "enum: Wait, Skip"],
        ),
        ("spec.trainer.env", ["<[]Object>", "Environment variables"]),
        ("status.conditions", ["Running, Progressing, Checkpointed, Suspended, Complete and Failed"]),
    ],
)
def test_kubectl_explain_reads_well(kube: Run, field: str, words: list[str]) -> None:
    wait(lambda: kube("explain", "finetunejob", check=False).returncode == 0, "the schema of a CRD that is new")
    text = " ".join(kube("explain", f"finetunejob.{field}").stdout.split())
    assert [w for w in words if w not in text] == []


def full_status() -> FineTuneJobStatus:
    """A status with every field set."""
    now = "2026-01-02T03:04:05Z"
    metrics = [{"name": "validation/macro_f1", "value": "0.91"}]
    checkpoint = {"step": 1200, "uri": "s3://models/feedback/checkpoints/step-00001200", "time": now, "sizeBytes": 91_000_000}
    return FineTuneJobStatus.model_validate(
        {
            "observedGeneration": 1,
            "state": "Complete",
            "conditions": [
                {
                    "type": t,
                    "status": s,
                    "reason": "Because",
                    "message": "It is so.",
                    "observedGeneration": 1,
                    "lastTransitionTime": now,
                }
                for t, s in (("Failed", "False"), ("Complete", "True"))
            ],
            "startTime": now,
            "completionTime": now,
            "activeSeconds": 100,
            "gpuSeconds": 200,
            "attempt": 2,
            "restarts": 1,
            "restartsCountTowardsMax": 1,
            "disruptionsInARow": 1,
            "restartTime": now,
            "trainerStatus": {
                "progressPercentage": 100,
                "estimatedRemainingSeconds": 0,
                "metrics": metrics,
                "lastUpdatedTime": now,
            },
            "evaluations": [{"examples": e, "step": e // 32, "metrics": metrics} for e in (3200, 6400)],
            "checkpoint": checkpoint,
            "resumedFrom": checkpoint,
            "lostWorkSeconds": 12,
            "jobsStatus": [{"name": "good-2", "ready": 0, "active": 0, "succeeded": 1, "failed": 0, "suspended": 0}],
            "result": {"modelUri": "s3://models/feedback/model", "metrics": metrics, "bestStep": 1200},
        }
    )


def test_a_full_status_is_stored_whole_and_shown_in_columns(kube: Run) -> None:
    kube("create", manifest=GOOD)
    status = full_status()
    assert None not in status.model_dump().values()
    patch = json.dumps({"status": status.model_dump(mode="json", by_alias=True, exclude_none=True)})
    kube("patch", "finetunejob", "good", "--type=merge", "--subresource=status", "-p", patch)
    assert FineTuneJobStatus.model_validate(stored(kube, "good")["status"]) == status
    assert stored(kube, "good")["metadata"]["generation"] == 1

    narrow = kube("get", "ftj").stdout.split("\n")
    assert narrow[0].split() == ["NAME", "STATE", "PROGRESS%", "CHECKPOINT", "RESTARTS", "AGE"]
    assert narrow[1].split()[:5] == ["good", "Complete", "100", "1200", "1"]
    wide = kube("get", "ftj", "-o", "wide").stdout.split("\n")
    assert wide[0].split()[5:9] == ["COMPLETE", "FAILED", "WHY", "MODEL"]
    assert wide[1].split()[5:9] == ["True", "False", "Because", "s3://models/feedback/model"]
    assert kube("get", "finetune", "-o", "name").stdout.strip() == "finetunejob.finetune.dev/good"
    kube("wait", "--for=condition=Complete", "--timeout=5s", "finetunejob/good")


def test_status_is_written_through_its_subresource_only(kube: Run) -> None:
    kube("create", manifest={**GOOD, "status": {"state": "Complete"}})
    assert "status" not in stored(kube, "good")


@pytest.mark.parametrize(
    ("selector", "found"),
    [
        ("status.state=Running", ["good"]),
        ("status.state=Failed", []),
        (f"spec.model.uri={GOOD['spec']['model']['uri']}", ["good"]),
    ],
)
def test_jobs_are_selected_by_state_and_model(kube: Run, selector: str, found: list[str]) -> None:
    kube("create", manifest=GOOD)
    kube("patch", "finetunejob", "good", "--type=merge", "--subresource=status", "-p", '{"status": {"state": "Running"}}')
    names = kube("get", "ftj", "--field-selector", selector, "-o", "jsonpath={.items[*].metadata.name}").stdout
    assert names.split() == found
