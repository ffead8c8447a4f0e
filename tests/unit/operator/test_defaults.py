"""The operator's defaults: they fill what a job leaves out, and never overrule it."""

import json
from typing import Any

import pytest

from finetune_api import JobDefaults
from finetune_api.defaults import with_defaults
from finetune_api.manifest import parse_job
from finetune_operator.__main__ import build_parser
from finetune_operator.domain.child import build_child
from finetune_operator.domain.types import Settings

SETTINGS = Settings(trainer_image="trainer:1", progress_url="https://progress:8443/", progress_ca="PEM")
DEFAULTS = {
    "queueName": "gpus",
    "env": [{"name": "AWS_ENDPOINT_URL", "value": "https://s3.example.com"}, {"name": "AWS_REGION", "value": "eu"}],
    "envFrom": [{"secretRef": {"name": "s3-credentials"}}],
    "serviceAccountName": "trainer",
    "podTemplate": {
        "metadata": {"labels": {"team": "ml", "cost": "1"}, "annotations": {"a": "default"}},
        "spec": {
            "nodeSelector": {"gpu": "a100", "zone": "1"},
            "tolerations": [{"key": "gpu", "operator": "Exists"}],
            "affinity": {"nodeAffinity": {}},
            "priorityClassName": "batch",
            "imagePullSecrets": [{"name": "pull"}],
            "volumes": [{"name": "cache", "emptyDir": {}}, {"name": "ca", "configMap": {"name": "ca"}}],
            "volumeMounts": [{"name": "cache", "mountPath": "/models"}, {"name": "ca", "mountPath": "/ca"}],
        },
    },
}
OWN = {
    "env": [{"name": "AWS_REGION", "value": "us"}],
    "envFrom": [{"secretRef": {"name": "mine"}}],
    "podTemplate": {
        "metadata": {"labels": {"cost": "2"}, "annotations": {"b": "own"}},
        "spec": {
            "nodeSelector": {"zone": "2"},
            "tolerations": [{"key": "spot", "operator": "Exists"}],
            "imagePullSecrets": [{"name": "pull"}, {"name": "mine"}],
            "volumes": [{"name": "cache", "persistentVolumeClaim": {"claimName": "c"}}],
            "volumeMounts": [{"name": "cache", "mountPath": "/models", "readOnly": True}],
        },
    },
}


def pod(trainer: dict[str, Any], labels: dict[str, str] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The child Job and its pod's spec."""
    job = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "ft", "namespace": "ns", "uid": "u0", "labels": labels or {}},
        "spec": {"trainer": {"command": ["x"], **trainer}},
    }
    defaults = JobDefaults.model_validate_json(json.dumps(DEFAULTS), strict=True)
    child = build_child(with_defaults(parse_job(job), defaults), 1, SETTINGS)
    return child, child["spec"]["template"]["spec"]


def test_a_job_that_says_nothing_gets_all_of_them() -> None:
    child, spec = pod({})
    assert child["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    [container] = spec["containers"]
    assert container["env"][:2] == DEFAULTS["env"]
    assert container["envFrom"] == DEFAULTS["envFrom"]
    given = DEFAULTS["podTemplate"]["spec"]  # type: ignore[index,call-overload]
    for field in ("nodeSelector", "tolerations", "affinity", "priorityClassName", "imagePullSecrets"):
        assert spec[field] == given[field]
    assert spec["serviceAccountName"] == "trainer"
    assert given["volumes"] == [v for v in spec["volumes"] if not v["name"].startswith("finetune-")]
    metadata = child["spec"]["template"]["metadata"]
    assert {"team": "ml", "cost": "1"}.items() <= metadata["labels"].items()
    assert metadata["annotations"]["a"] == "default"


def test_what_the_job_says_wins() -> None:
    child, spec = pod({**OWN, "serviceAccountName": "me"}, {"kueue.x-k8s.io/queue-name": "mine"})
    assert child["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "mine"
    [container] = spec["containers"]
    assert container["env"][:2] == [DEFAULTS["env"][0], OWN["env"][0]]  # type: ignore[index]
    assert [s["secretRef"]["name"] for s in container["envFrom"]] == ["s3-credentials", "mine"]  # the later one counts
    assert spec["serviceAccountName"] == "me"
    assert spec["nodeSelector"] == {"gpu": "a100", "zone": "2"}
    assert [t["key"] for t in spec["tolerations"]] == ["gpu", "spot"]
    assert [s["name"] for s in spec["imagePullSecrets"]] == ["pull", "mine"]
    ours = {v["name"]: v for v in spec["volumes"] if not v["name"].startswith("finetune-")}
    assert ours == {"ca": {"name": "ca", "configMap": {"name": "ca"}}, "cache": OWN["podTemplate"]["spec"]["volumes"][0]}  # type: ignore[index]
    mounts = {m["mountPath"]: m for m in container["volumeMounts"]}
    assert mounts["/models"]["readOnly"] is True
    assert "/ca" in mounts
    metadata = child["spec"]["template"]["metadata"]
    assert {"team": "ml", "cost": "2"}.items() <= metadata["labels"].items()
    assert {"a": "default", "b": "own"}.items() <= metadata["annotations"].items()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"queue": "x"}', "queue: unknown field"),
        ('{"env": [{"name": "FINETUNE_X", "value": "1"}]}', "are set by the operator"),
        ('{"podTemplate": {"spec": {"hostNetwork": true}}}', "podTemplate.spec.hostNetwork: unknown field"),
        ("{", "--job-defaults"),
    ],
)
def test_a_mistake_is_named_at_the_start(capsys: pytest.CaptureFixture[str], text: str, says: str) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--trainer-image=t", "--progress-url=https://p", f"--job-defaults={text}"])
    assert says in capsys.readouterr().err
