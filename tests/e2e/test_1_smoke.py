"""The least that must work on a real node: install, train the example, lose the pod, the memory, the operator and the node, go on.

This part runs in continuous integration.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e.world import DATA, MODELS, RELEASE, ROOT, SYSTEM, World
from integration.jobs import Jobs, Object, manifest, wait

LABELS = ["negative", "neutral", "positive"]
ONE_THREAD = [{"name": "OMP_NUM_THREADS", "value": "1"}]
"""Threads that wait for each other take processors from other trainings."""
NEVER = 1_000_000
"""Steps; more than any of these runs has."""
EXAMPLE = ROOT / "examples/customer-feedback/finetunejob.yaml"


def job(jobs: Jobs, name: str, *, epochs: int = 20, **spec: Any) -> Object:
    """A tiny model in small steps, so that there is a middle to disturb and a checkpoint is soon there."""
    return manifest(
        name,
        model={"uri": f"s3://{MODELS}/tiny"},
        dataset={"uri": f"s3://{DATA}/tiny", "labels": LABELS, "maxLength": 16},
        hyperparameters={"epochs": epochs, "batchSize": 8, "learningRate": 1e-3},
        checkpoint={"everySteps": 100},
        output={"storageUri": f"s3://{DATA}/{jobs.namespace}/{name}"},
        **{"trainer": trainer(), **spec},
    )


def trainer(**more: Any) -> Object:
    return {"envFrom": [{"secretRef": {"name": "s3-credentials"}}], "env": ONE_THREAD, **more}


def wait_checkpoint(jobs: Jobs, name: str, beyond: int = 0) -> int:
    def step() -> int | None:
        found: int = (jobs.status(name).get("checkpoint") or {}).get("step") or 0
        return found if found > beyond else None

    found: int = wait(step, f"a checkpoint of {name} beyond step {beyond}", 300)
    return found


def wait_saved(world: World, jobs: Jobs, name: str) -> int:
    """The step of the first checkpoint in the object store: seconds before the status tells of it."""

    def step() -> int | None:
        prefix = f"{jobs.namespace}/{name}/checkpoints/"
        keys = [item["Key"] for item in world.s3().list_objects_v2(Bucket=DATA, Prefix=prefix).get("Contents", [])]
        return max((int(key.split("/step-")[1].split("-")[0]) for key in keys if key.endswith("/MANIFEST.json")), default=None)

    found: int = wait(step, f"a checkpoint of {name}", 300)
    return found


def test_the_example_as_it_is_in_the_readme(installed: World, jobs: Jobs, tmp_path: Path) -> None:
    example = yaml.safe_load(EXAMPLE.read_text())
    example["spec"]["hyperparameters"] |= {"epochs": 1}  # a machine of two cores, and not alone on it
    example["spec"]["trainer"] |= {"env": ONE_THREAD}
    example["spec"]["output"]["storageUri"] = f"s3://{DATA}/{jobs.namespace}/model"
    jobs.apply(example)
    name = example["metadata"]["name"]
    seen = wait(lambda: (jobs.status(name).get("trainerStatus") or {}).get("progressPercentage"), "progress", 300)
    assert 0 < seen <= 100
    wait(lambda: "step " in installed.kubectl("-n", jobs.namespace, "logs", f"job/{name}-1").stdout, "progress in the log", 60)
    status = jobs.wait_state(name, "Complete")
    assert status["attempt"] == 1
    uri = f"s3://{DATA}/{jobs.namespace}/model"
    assert status["result"]["modelUri"] == f"{uri}/model"
    events = json.loads(installed.kubectl("-n", jobs.namespace, "get", "events", "-o", "json").stdout)["items"]
    assert {e["reason"] for e in events if e["involvedObject"]["kind"] == "FineTuneJob"} >= {"AttemptCreated", "Trained"}
    assert [c["restartCount"] for pod in installed.operators() for c in pod["status"]["containerStatuses"]] == [0]
    assert "Traceback" not in installed.operator_logs()
    client = installed.s3()
    keys = [o["Key"] for o in client.list_objects_v2(Bucket=DATA, Prefix=f"{jobs.namespace}/model/")["Contents"]]
    assert any(key.endswith("/MANIFEST.json") for key in keys), "no checkpoint in the object store"
    for key in (key for key in keys if "/model/model/" in key):
        client.download_file(DATA, key, str(tmp_path / key.rpartition("/")[2]))
    asked = [sys.executable, "-m", "finetune_cli", "predict", "--model", str(tmp_path), "Nobody answers my emails.", "-o", "json"]
    answered = json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
    assert answered[0]["label"] in LABELS


def test_suspended_in_the_middle_it_saves_and_goes_on_from_there(jobs: Jobs) -> None:
    made = job(jobs, "paused", epochs=20)
    # Nothing but SIGTERM makes a checkpoint in the middle of this run.
    made["spec"] |= {"checkpoint": {"everySteps": NEVER}, "evaluation": {"everySteps": NEVER}}
    jobs.apply(made)
    wait(lambda: jobs.status("paused").get("trainerStatus"), "progress", 300)
    assert "checkpoint" not in jobs.status("paused")
    jobs.patch("paused", {"suspend": True})
    saved = jobs.wait_state("paused", "Suspended")["checkpoint"]["step"]
    assert 0 < saved < 20 * 75
    wait(lambda: not jobs.list("pods"), "no pods while it is suspended", 60)
    jobs.patch("paused", {"suspend": False})
    status = jobs.wait_state("paused", "Complete")
    assert status["resumedFrom"]["step"] == saved, "what SIGTERM saved is where it goes on"
    assert status["restarts"] == 0


def test_a_deleted_pod_is_a_restart_from_the_checkpoint(installed: World, jobs: Jobs) -> None:
    jobs.apply(job(jobs, "deleted", epochs=12))
    saved = wait_saved(installed, jobs, "deleted")
    installed.kubectl("-n", jobs.namespace, "delete", "pod", jobs.wait_pod("deleted-1"), "--wait=false")
    status = jobs.wait_state("deleted", "Complete")
    assert (status["attempt"], status["restarts"]) == (2, 1)
    assert status["resumedFrom"]["step"] >= saved


def test_out_of_memory_is_told(jobs: Jobs) -> None:
    limits = {"requests": {"memory": "150Mi"}, "limits": {"memory": "150Mi"}}  # importing torch takes more
    jobs.apply(job(jobs, "small", failurePolicy={"maxRestarts": 1}, trainer=trainer(resourcesPerNode=limits)))
    status = jobs.wait_state("small", "Failed")
    failed = jobs.condition("small", "Failed")
    assert failed["reason"] == "OOMKilled", failed
    assert status["restartsCountTowardsMax"] == 1


def leader(world: World) -> str | None:
    """The pod that holds the Lease, if it is there and runs."""
    lease = json.loads(world.kubectl("-n", SYSTEM, "get", "lease", RELEASE, "-o", "json").stdout)
    name, _, _ = (lease["spec"].get("holderIdentity") or "").partition("_")
    pods = json.loads(world.kubectl("-n", SYSTEM, "get", "pods", "-o", "json").stdout)["items"]
    return next((name for p in pods if p["metadata"]["name"] == name and "deletionTimestamp" not in p["metadata"]), None)


@pytest.mark.alone
def test_training_survives_the_operators_pod_and_an_upgrade_of_the_chart(installed: World, jobs: Jobs) -> None:
    jobs.apply(job(jobs, "calm", epochs=2000))
    saved = wait_checkpoint(jobs, "calm")
    first = wait(lambda: leader(installed), "a leader")
    installed.kubectl("-n", SYSTEM, "delete", "pod", first, "--grace-period=0", "--force")
    changed = [*installed.values(), "--set=log.format=json", "--set=replicas=2", "--wait", "--timeout=150s"]
    installed.helm("upgrade", RELEASE, str(ROOT / "charts/finetune-operator"), *changed)
    wait(lambda: installed.operator_logs().startswith("{"), "the new operator's log, in JSON")

    # The Service sends some posts to the one that stands by, and then the leader is gone.
    saved = wait_checkpoint(jobs, "calm", beyond=saved)
    first = wait(lambda: leader(installed), "a leader")
    installed.kubectl("-n", SYSTEM, "delete", "pod", first, "--grace-period=0", "--force")
    assert wait(lambda: leader(installed), "another leader", 60) != first
    saved = wait_checkpoint(jobs, "calm", beyond=saved)

    installed.helm("rollback", RELEASE, "1", "--wait", "--timeout=150s")
    wait_checkpoint(jobs, "calm", beyond=saved)
    assert [j["metadata"]["name"] for j in jobs.list("jobs")] == ["calm-1"]
    jobs.cluster.kubectl("-n", jobs.namespace, "patch", "ftj", "calm", "--type=merge", "-p", '{"spec":{"stop":true}}')
    status = jobs.wait_state("calm", "Complete")
    assert (status["attempt"], status["restarts"]) == (1, 0)
    operators = json.loads(installed.kubectl("-n", SYSTEM, "get", "deployment", RELEASE, "-o", "json").stdout)
    assert operators["spec"]["replicas"] == 1


@pytest.mark.alone
def test_a_drained_node_is_a_disruption(installed: World, jobs: Jobs) -> None:
    jobs.apply(job(jobs, "moved", epochs=12))
    saved = wait_saved(installed, jobs, "moved")
    node = jobs.get(jobs.wait_pod("moved-1"), "pod")["spec"]["nodeName"]
    try:
        installed.kubectl(
            "drain", node, "--delete-emptydir-data", "--force", "--ignore-daemonsets", "--timeout=120s", timeout=150
        )
    finally:
        installed.kubectl("uncordon", node)
    status = jobs.wait_state("moved", "Complete")
    assert (status["restarts"], status.get("restartsCountTowardsMax", 0)) == (1, 0)
    assert status["resumedFrom"]["step"] >= saved


HOSTILE = r"""
import json, os, ssl, urllib.error, urllib.request
def ask(url, token=None, body=None, ca=None):
    context = ssl.create_default_context(cafile=ca) if ca else ssl._create_unverified_context()
    request = urllib.request.Request(url, json.dumps(body).encode() if body is not None else None)
    if token:
        request.add_header("Authorization", "Bearer " + token)
    try:
        with urllib.request.urlopen(request, timeout=10, context=context) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError as error:
        return type(error).__name__
progress, ca = os.environ["KUBEFLOW_TRAINER_SERVER_URL"], os.environ["KUBEFLOW_TRAINER_SERVER_CA_CERT"]
token = open(os.environ["KUBEFLOW_TRAINER_SERVER_TOKEN"]).read()
body = {"trainerStatus": {"progressPercentage": 1, "metrics": []}}
api = "https://kubernetes.default.svc/api/v1/namespaces/" + os.environ["FINETUNE_NAMESPACE"]
head, _, tail = progress.partition("/finetunejobs/")
print(json.dumps({
    "account token": os.path.exists("/var/run/secrets/kubernetes.io/serviceaccount/token"),
    "secrets": ask(api + "/secrets"), "pods": ask(api + "/pods"), "secrets with the token": ask(api + "/secrets", token),
    "jobs with the token": ask("https://kubernetes.default.svc/apis/finetune.dev/v1alpha1/finetunejobs", token),
    "own": ask(progress, token, body, ca), "without a token": ask(progress, None, body, ca),
    "another job": ask(head + "/finetunejobs/other/attempts/1/progress", token, body, ca),
    "a later attempt": ask(progress.replace("/attempts/2/", "/attempts/7/"), token, body, ca),
    "an older attempt": ask(progress.replace("/attempts/2/", "/attempts/1/"), token, body, ca),
    "another namespace": ask(progress.replace("/namespaces/" + os.environ["FINETUNE_NAMESPACE"], "/namespaces/default"), token, body, ca),
    "kubelet": ask("https://" + os.environ["NODE"] + ":10250/pods"),
    "uid": os.getuid(), "root is writable": os.access("/", os.W_OK) or os.access("/opt/finetune", os.W_OK),
}))
"""


def test_what_a_hostile_trainer_pod_reaches(installed: World, jobs: Jobs) -> None:
    jobs.apply(job(jobs, "other", epochs=500), job(jobs, "hostile", epochs=500))
    # Its second attempt: there is an older one to speak for.
    installed.kubectl("-n", jobs.namespace, "delete", "pod", jobs.wait_pod("hostile-1"), "--wait=false")
    pod = jobs.wait_pod("hostile-2")
    jobs.wait_pod("other-1")
    wait(lambda: jobs.status("hostile").get("attempt") == 2, "its second attempt")
    jobs.wait_state("hostile", "Running")
    jobs.wait_state("other", "Running")
    assert jobs.get("hostile-1", "job"), "the Job of the older attempt is still there"
    node = f"NODE={jobs.get(pod, 'pod')['status']['hostIP']}"
    said = installed.kubectl("-n", jobs.namespace, "exec", "-i", pod, "--", "env", node, "python", "-", stdin=HOSTILE).stdout
    reached = json.loads(said)
    assert reached.pop("own") == 200
    assert reached.pop("uid") != 0
    assert reached == {
        "account token": False,
        "secrets": 403,  # as system:anonymous
        "pods": 403,
        "secrets with the token": 401,  # its audience is the operator's, not the API server's
        "jobs with the token": 401,
        "without a token": 401,
        "another job": 403,
        "a later attempt": 403,
        "an older attempt": 403,
        "another namespace": 403,
        "kubelet": 401,
        "root is writable": False,
    }


@pytest.mark.parametrize(("field", "value", "says"), [("learningRate", -1, "learningRate"), ("batchSize", 0, "batchSize")])
def test_a_mistake_is_refused_by_the_api_server(installed: World, jobs: Jobs, field: str, value: float, says: str) -> None:
    wrong = job(jobs, "wrong")
    wrong["spec"]["hyperparameters"][field] = value
    done = installed.kubectl("-n", jobs.namespace, "apply", "-f", "-", stdin=yaml.safe_dump(wrong), check=False)
    assert done.returncode != 0
    assert says in done.stderr
