"""The child Job: its semantics are promises to users (docs/architecture.md), so each is held here."""

import json
from typing import Any

import pytest

from finetune_api import Recipe, names
from finetune_api.failures import BY_EXIT_CODE
from finetune_api.manifest import parse_job
from finetune_operator.domain.child import build_child, gpus_per_pod
from finetune_operator.domain.types import Settings

SETTINGS = Settings(trainer_image="trainer:1", progress_url="https://progress:8443/", progress_ca="PEM", model_mirror="s3://m/x")


def child(labels: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    job = parse_job(
        {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": "ft", "namespace": "ns", "uid": "u0", "labels": labels or {}},
            "spec": {
                "task": "SequenceClassification",
                "model": {"uri": "hf://a/b"},
                "dataset": {"uri": "s3://data/x", "labels": ["a", "b"]},
                "output": {"storageUri": "s3://out/x"},
                **spec,
            },
        }
    )
    return build_child(job, 3, SETTINGS)


def container(job: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = job["spec"]["template"]["spec"]["containers"][0]
    return found


def env(job: dict[str, Any]) -> dict[str, Any]:
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in container(job)["env"]}


def test_one_attempt_is_one_pod_and_its_cause_is_kept() -> None:
    spec = child()["spec"]
    assert (spec["backoffLimit"], spec["completions"], spec["podReplacementPolicy"]) == (0, 1, "Failed")
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert [rule["action"] for rule in spec["podFailurePolicy"]["rules"]] == ["FailJob", "FailJob"]
    assert spec["podFailurePolicy"]["rules"][0]["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert spec["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"] == sorted(BY_EXIT_CODE.keys() - {20})
    assert container(child())["terminationMessagePolicy"] == "FallbackToLogsOnError"
    assert not {"ttlSecondsAfterFinished", "activeDeadlineSeconds", "suspend"} & spec.keys()


def test_the_pod_has_as_long_to_save_as_the_recipe_says() -> None:
    for policy, seconds in (({}, 60), ({"saveDeadlineSeconds": 300}, 300)):
        assert child(checkpoint=policy)["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == seconds


def test_it_belongs_to_the_resource() -> None:
    meta = child()["metadata"]
    assert meta["name"] == "ft-3"
    assert meta["ownerReferences"][0] == {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "name": "ft",
        "uid": "u0",
        "controller": True,
        "blockOwnerDeletion": True,
    }


def test_the_trainer_gets_the_recipe_and_nothing_of_the_placement() -> None:
    job = child(dataset={"uri": "s3://data/x", "labels": ["a", "$(HOME)"]}, suspend=False)
    text = env(job)[names.ENV_JOB]
    assert "$$(HOME)" in text  # the kubelet turns it back
    recipe = Recipe.model_validate(json.loads(text.replace("$$(", "$(")))
    assert recipe.dataset.labels == ["a", "$(HOME)"]
    assert "suspend" not in text


def test_progress_is_reported_with_kubeflows_three_variables_and_a_token_for_it_alone() -> None:
    job = child()
    assert env(job)["KUBEFLOW_TRAINER_SERVER_URL"] == (
        "https://progress:8443/v1/namespaces/ns/finetunejobs/ft/attempts/3/progress"
    )
    volume = next(v for v in job["spec"]["template"]["spec"]["volumes"] if v["name"] == "finetune-progress")
    assert volume["projected"]["sources"][0]["serviceAccountToken"]["audience"] == names.PROGRESS_AUDIENCE
    assert job["spec"]["template"]["metadata"]["annotations"][names.ANNOTATION_PROGRESS_CA] == "PEM"
    assert job["spec"]["template"]["spec"]["automountServiceAccountToken"] is False


def test_the_users_additions_arrive_and_ours_win() -> None:
    job = child(
        labels={"kueue.x-k8s.io/queue-name": "q"},
        trainer={
            "image": "mine:2",
            "env": [{"name": "AWS_ENDPOINT_URL", "value": "http://s3"}],
            "envFrom": [{"secretRef": {"name": "s3-credentials"}}],
            "resourcesPerNode": {"limits": {"nvidia.com/gpu": 2, "memory": "16Gi"}},
            "podTemplate": {
                "metadata": {"labels": {"team": "a", names.LABEL_JOB: "forged"}},
                "spec": {"nodeSelector": {"pool": "gpu"}, "volumes": [{"name": "d", "emptyDir": {}}]},
            },
        },
    )
    template = job["spec"]["template"]
    assert container(job)["image"] == "mine:2"
    assert env(job)["AWS_ENDPOINT_URL"] == "http://s3"
    assert container(job)["envFrom"] == [{"secretRef": {"name": "s3-credentials"}}]
    assert container(job)["resources"]["limits"] == {"nvidia.com/gpu": 2, "memory": "16Gi"}
    assert template["metadata"]["labels"]["team"] == "a"
    assert template["metadata"]["labels"][names.LABEL_JOB] == "ft"
    assert template["spec"]["nodeSelector"] == {"pool": "gpu"}
    assert {"name": "d", "emptyDir": {}} in template["spec"]["volumes"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "q"
    assert "kueue.x-k8s.io/queue-name" not in template["metadata"]["labels"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_variable_of_the_users_is_there_once_and_theirs(processes: int) -> None:
    ours = env(child(trainer={"numProcPerNode": processes}))
    theirs = [n for n in ours if not n.startswith(names.RESERVED_ENV_PREFIXES)]
    assert {"HOME", "USER", "HF_HOME", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "PYTHONUNBUFFERED"} <= {*theirs}
    job = child(trainer={"numProcPerNode": processes, "env": [{"name": n, "value": "mine"} for n in theirs]})
    assert {env(job)[n] for n in theirs} == {"mine"}
    listed = [e["name"] for e in container(job)["env"]]
    assert sorted(listed) == sorted(ours), "each once, and none is lost"


def test_a_command_of_the_users_runs_in_place_of_our_trainer() -> None:
    own = {"command": ["python", "train.py"], "args": ["--epochs", "3"]}
    recipe = dict.fromkeys(("task", "model", "dataset", "output"))
    job = child(trainer=own, **recipe)
    assert (container(job)["command"], container(job)["args"]) == (own["command"], own["args"])
    assert names.ENV_JOB not in env(job)
    assert names.ENV_PROGRESS_URL in env(job)
    assert names.ENV_JOB in env(child(trainer=own)), "a recipe that is there is handed on"
    assert "args" not in container(child())


def test_gpus_of_any_vendor_are_counted_once() -> None:
    def job(resources: dict[str, Any]) -> int:
        manifest = {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": "ft"},
            "spec": {
                "task": "SequenceClassification",
                "model": {"uri": "hf://a/b"},
                "dataset": {"uri": "s3://data/x", "labels": ["a", "b"]},
                "output": {"storageUri": "s3://out/x"},
                "trainer": {"resourcesPerNode": resources},
            },
        }
        return gpus_per_pod(parse_job(manifest))

    assert job({"requests": {"nvidia.com/gpu": 2}, "limits": {"nvidia.com/gpu": "2"}}) == 2
    assert job({"limits": {"amd.com/gpu": 1, "cpu": 4}}) == 1


def test_several_pods_train_together() -> None:
    job = child(trainer={"numNodes": 3, "resourcesPerNode": {"limits": {"nvidia.com/gpu": 2}}})
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"], spec["backoffLimit"]) == ("Indexed", 3, 3, 0)
    assert pod["subdomain"] == "ft-nodes"
    assert container(job)["command"][:3] == ["python", "-m", "torch.distributed.run"]
    told = env(job)
    assert (told["PET_NNODES"], told["PET_NPROC_PER_NODE"], told["PET_MAX_RESTARTS"]) == ("3", "2", "0")
    assert told["PET_MASTER_ADDR"] == "ft-3-0.ft-nodes"
    assert "job-completion-index" in told["PET_NODE_RANK"]["fieldRef"]["fieldPath"]
    assert not {n for n in env(child()) if n.startswith("PET_")}, "one process needs no torchrun"


def test_several_processes_in_one_pod_need_no_service() -> None:
    job = child(trainer={"numProcPerNode": 2})
    assert "subdomain" not in job["spec"]["template"]["spec"]
    assert env(job)["PET_MASTER_ADDR"] == "127.0.0.1"
