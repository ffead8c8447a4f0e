"""A FineTuneJob's life on a real control plane with scripted pods: every way in which it can go."""

import json
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from finetune_api import crd
from integration.jobs import Jobs, manifest, wait
from testcluster import (
    Cluster,
    PodRunner,
    PodScript,
    disrupted,
    evicted,
    fail,
    hang,
    image_pull_backoff,
    oom_killed,
    succeed,
    unschedulable,
)
from testcluster.operator import Operator

RESULT = {"modelUri": "s3://models/x/model", "metrics": [{"name": "validation/macro_f1", "value": "0.9"}], "bestStep": 7}
SCRIPTS = {
    "succeeds": succeed(0.5, json.dumps({"outcome": "Complete", "result": RESULT})),
    "already": succeed(0.2, json.dumps({"outcome": "AlreadyCompleted", "result": RESULT})),
    "bad-data": fail(11, json.dumps({"outcome": "Failed", "reason": "DataInvalid", "message": "train.csv: line 3 has 2 fields"})),
    "denied": fail(14, json.dumps({"outcome": "Failed", "reason": "StorageDenied", "message": "s3://data: refused"})),
    "oom": oom_killed(),
    "evicted": evicted(),
    "crashes": fail(1, "Traceback: of the user's own"),
    "hangs": hang(20),
    "saves-slowly": PodScript(None, exit_code_on_term=20, seconds_on_term=3600),
    "no-image": image_pull_backoff(),
    "no-node": unschedulable(),
}


def script(pod: dict[str, Any]) -> PodScript:
    """By the job's name; `disrupted` only hits the first attempt."""
    labels = pod["metadata"]["labels"]
    if "finetune.dev/job" not in labels:
        return succeed()  # a Job that is not ours
    name = labels["finetune.dev/job"]
    attempt = labels["finetune.dev/attempt"]
    if name == "disrupted":
        return disrupted() if attempt == "1" else succeed()
    if name == "pair-with-bad-data":  # one tells why, and the other only that its peer is gone
        index = pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"]
        return SCRIPTS["bad-data"] if index == "1" else fail(1, "RuntimeError: connection closed by peer", seconds=0.2)
    return SCRIPTS.get(name, succeed(0.5))


@pytest.fixture(scope="module")
def runner(cluster: Cluster) -> Iterator[PodRunner]:
    with PodRunner(cluster.kubeconfig, script) as running:
        yield running


@pytest.fixture
def jobs(cluster: Cluster, operator: Operator, runner: PodRunner, namespace: str) -> Jobs:
    return Jobs(cluster, namespace)


def test_from_apply_to_complete(jobs: Jobs) -> None:
    jobs.apply(manifest("succeeds"))
    status = jobs.wait_state("succeeds", "Complete")
    assert status["result"] == RESULT
    assert status["observedGeneration"] == jobs.get("succeeds")["metadata"]["generation"]
    kinds = {c["type"]: c["status"] for c in status["conditions"]}
    assert kinds == {
        "Running": "False",
        "Progressing": "False",
        "Checkpointed": "False",
        "Suspended": "False",
        "Complete": "True",
        "Failed": "False",
    }
    assert status["startTime"] <= status["completionTime"]
    uid = jobs.get("succeeds-1", "job")["metadata"]["uid"]
    counts = {"ready": 0, "active": 0, "succeeded": 1, "failed": 0, "suspended": 0}
    assert status["jobsStatus"] == [{"name": "succeeds-1", "uid": uid, **counts}]
    jobs.cluster.kubectl("-n", jobs.namespace, "wait", "--for=condition=Complete", "ftj/succeeds", "--timeout=1s")
    columns = jobs.cluster.kubectl("-n", jobs.namespace, "get", "ftj", "succeeds").stdout
    assert "Complete" in columns
    assert "Created Job succeeds-1" in jobs.cluster.kubectl("-n", jobs.namespace, "describe", "ftj", "succeeds").stdout


def test_kopf_leaves_no_mark_on_the_object(jobs: Jobs) -> None:
    jobs.apply(manifest("marks"))
    jobs.wait_state("marks", "Complete")
    meta = jobs.get("marks")["metadata"]
    assert "finalizers" not in meta
    assert list(meta["annotations"]) == ["kubectl.kubernetes.io/last-applied-configuration"]


def test_applying_again_changes_nothing(jobs: Jobs) -> None:
    jobs.apply(manifest("again"))
    jobs.wait_state("again", "Complete")
    before = jobs.get("again")
    jobs.apply(manifest("again"))
    time.sleep(1.0)
    assert jobs.get("again") == before
    assert [j["metadata"]["name"] for j in jobs.list("jobs")] == ["again-1"]


def test_a_finished_job_whose_child_is_deleted_does_not_run_again(jobs: Jobs) -> None:
    jobs.apply(manifest("once"))
    jobs.wait_state("once", "Complete")
    before = jobs.get("once")
    jobs.cluster.kubectl("-n", jobs.namespace, "delete", "job", "once-1")
    time.sleep(1.5)
    assert jobs.list("jobs") == []
    assert jobs.get("once") == before


def test_already_completed(jobs: Jobs) -> None:
    jobs.apply(manifest("already"))
    jobs.wait_state("already", "Complete")
    assert jobs.condition("already", "Complete")["reason"] == "AlreadyCompleted"


@pytest.mark.parametrize(
    ("name", "reason", "says"), [("bad-data", "DataInvalid", "line 3"), ("denied", "StorageDenied", "s3://data")]
)
def test_what_no_restart_can_cure_fails_at_once_in_the_trainers_words(jobs: Jobs, name: str, reason: str, says: str) -> None:
    jobs.apply(manifest(name))
    status = jobs.wait_state(name, "Failed")
    failed = jobs.condition(name, "Failed")
    assert failed["reason"] == reason
    assert says in failed["message"]
    assert status["restarts"] == 0
    assert [j["metadata"]["name"] for j in jobs.list("jobs")] == [f"{name}-1"]


@pytest.mark.parametrize(("name", "reason"), [("oom", "OOMKilled"), ("crashes", "UserCodeError"), ("evicted", "Evicted")])
def test_restarts_up_to_max_restarts_then_the_root_cause(jobs: Jobs, name: str, reason: str) -> None:
    jobs.apply(manifest(name, failurePolicy={"maxRestarts": 2}))
    status = jobs.wait_state(name, "Failed")
    assert (status["restarts"], status["restartsCountTowardsMax"], status["attempt"]) == (2, 2, 3)
    failed = jobs.condition(name, "Failed")
    assert failed["reason"] == reason
    assert "maxRestarts is 2" in failed["message"]
    assert "of the user's own" not in json.dumps(status), "log text must not reach the status"


def test_a_disruption_is_not_counted(jobs: Jobs) -> None:
    jobs.apply(manifest("disrupted", failurePolicy={"maxRestarts": 0}))
    status = jobs.wait_state("disrupted", "Complete")
    assert (status["restarts"], status["restartsCountTowardsMax"], status["attempt"]) == (1, 0, 2)


@pytest.mark.parametrize(("name", "reason"), [("no-image", "ImagePullBackOff"), ("no-node", "Unschedulable")])
def test_why_a_pod_does_not_start_is_said(jobs: Jobs, name: str, reason: str) -> None:
    jobs.apply(manifest(name))
    wait(lambda: jobs.condition(name, "Running").get("reason") == reason, reason)
    assert jobs.status(name)["state"] == "Pending"


def test_suspend_and_resume(jobs: Jobs) -> None:
    jobs.apply(manifest("hangs"))
    jobs.wait_state("hangs", "Running")
    jobs.patch("hangs", {"suspend": True})
    status = jobs.wait_state("hangs", "Suspended")
    assert jobs.condition("hangs", "Suspended")["status"] == "True"
    assert jobs.list("pods") == []
    assert status["restarts"] == 0
    jobs.patch("hangs", {"suspend": False})
    status = jobs.wait_state("hangs", "Running")
    assert (status["attempt"], status["restarts"]) == (2, 0)
    assert jobs.condition("hangs", "Suspended")["reason"] == "Resumed"


def test_a_suspension_that_discards_gives_the_pod_no_time_to_save(jobs: Jobs) -> None:
    jobs.apply(manifest("saves-slowly", checkpoint={"onSuspend": "Discard", "saveDeadlineSeconds": 3600}))
    jobs.wait_state("saves-slowly", "Running")
    time.sleep(2.0)  # work to lose
    pod = jobs.list("pods")[0]
    assert pod["spec"]["terminationGracePeriodSeconds"] == 3600
    jobs.patch("saves-slowly", {"suspend": True})
    status = jobs.wait_state("saves-slowly", "Suspended", 60)
    assert jobs.list("pods") == []
    assert (status["restarts"], status["lostWorkSeconds"] >= 2) == (0, True)
    jobs.patch("saves-slowly", {"suspend": False})
    assert jobs.wait_state("saves-slowly", "Running")["attempt"] == 2
    # A stop saves all the same: the pod keeps its hour, until somebody cuts that short.
    name = jobs.list("pods")[0]["metadata"]["name"]
    jobs.patch("saves-slowly", {"stop": True})
    grace = wait(lambda: jobs.get(name, "pod")["metadata"].get("deletionGracePeriodSeconds"), "the pod asked to end")
    assert grace == 3600
    assert jobs.status("saves-slowly")["state"] in ("Running", "Stopping")
    jobs.cluster.kubectl("-n", jobs.namespace, "delete", "pod", name, "--grace-period=1", "--wait=false")
    jobs.wait_state("saves-slowly", "Complete")


def test_a_change_made_while_suspended_is_used_by_the_next_attempt(jobs: Jobs) -> None:
    jobs.apply(manifest("hangs", suspend=True))
    jobs.wait_state("hangs", "Suspended")
    assert jobs.list("jobs") == []
    jobs.patch("hangs", {"trainer": {"image": "other:1"}})
    jobs.patch("hangs", {"suspend": False})
    jobs.wait_state("hangs", "Running")
    assert jobs.list("pods")[0]["spec"]["containers"][0]["image"] == "other:1"


def test_stop_ends_as_complete(jobs: Jobs) -> None:
    jobs.apply(manifest("hangs"))
    jobs.wait_state("hangs", "Running")
    jobs.patch("hangs", {"stop": True})
    jobs.wait_state("hangs", "Complete")
    assert jobs.condition("hangs", "Complete")["reason"] == "Stopped"
    assert jobs.list("pods") == []


def test_deleting_the_resource_deletes_everything(jobs: Jobs) -> None:
    jobs.apply(manifest("hangs"))
    jobs.wait_state("hangs", "Running")
    jobs.cluster.kubectl("-n", jobs.namespace, "delete", "ftj", "hangs")
    wait(lambda: not jobs.list("jobs") and not jobs.list("pods"), "children gone")


def test_a_foreign_job_in_the_way_is_named_and_left_alone(jobs: Jobs) -> None:
    jobs.cluster.kubectl("-n", jobs.namespace, "create", "job", "taken-1", "--image=x")
    uid = jobs.get("taken-1", "job")["metadata"]["uid"]
    jobs.apply(manifest("taken"))
    wait(lambda: jobs.condition("taken", "Running").get("reason") == "NameConflict", "NameConflict")
    assert "taken-1" in jobs.condition("taken", "Running")["message"]
    assert jobs.get("taken-1", "job")["metadata"]["uid"] == uid


def test_several_pods_are_one_attempt_under_one_service(jobs: Jobs) -> None:
    jobs.apply(manifest("succeeds", trainer={"numNodes": 3}))
    status = jobs.wait_state("succeeds", "Complete")
    assert status["jobsStatus"][0]["succeeded"] == 3
    assert status["result"]["bestStep"] == RESULT["bestStep"]
    service = jobs.get("succeeds-nodes", "service")
    assert (service["spec"]["clusterIP"], service["spec"]["publishNotReadyAddresses"]) == ("None", True)
    pods = [p for p in jobs.list("pods") if p["spec"].get("subdomain") == "succeeds-nodes"]
    assert sorted(p["spec"]["hostname"] for p in pods) == ["succeeds-1-0", "succeeds-1-1", "succeeds-1-2"]
    jobs.cluster.kubectl("-n", jobs.namespace, "delete", "ftj", "succeeds")
    wait(
        lambda: "succeeds-nodes" not in {s["metadata"]["name"] for s in jobs.list("services")}, "the Service gone", 90
    )  # a new CRD


def test_of_several_pods_the_one_that_knows_the_cause_is_heard(jobs: Jobs) -> None:
    jobs.apply(manifest("pair-with-bad-data", trainer={"numNodes": 2}))
    jobs.wait_state("pair-with-bad-data", "Failed")
    assert jobs.condition("pair-with-bad-data", "Failed")["message"] == "train.csv: line 3 has 2 fields"


def test_a_foreign_service_in_the_way_is_named(jobs: Jobs) -> None:
    jobs.cluster.kubectl("-n", jobs.namespace, "create", "service", "clusterip", "pair-nodes", "--tcp=80")
    jobs.apply(manifest("pair", trainer={"numNodes": 2}))
    wait(lambda: jobs.condition("pair", "Running").get("reason") == "CreateRefused", "CreateRefused")
    assert "pair-nodes" in jobs.condition("pair", "Running")["message"]
    assert jobs.list("jobs") == []


def test_a_script_of_the_users_needs_no_recipe(jobs: Jobs) -> None:
    own = dict.fromkeys(("task", "model", "dataset", "output"))
    jobs.apply(manifest("succeeds", **own, trainer={"command": ["python", "train.py"]}))
    jobs.wait_state("succeeds", "Complete")
    assert jobs.list("pods")[0]["spec"]["containers"][0]["command"] == ["python", "train.py"]


def test_a_refused_pod_template_is_told_in_the_api_servers_words(jobs: Jobs) -> None:
    volumes = [{"name": "x", "emptyDir": {"medium": "Paper"}, "hostPath": {"path": "/"}}]
    jobs.apply(manifest("refused", trainer={"podTemplate": {"spec": {"volumes": volumes}}}))
    wait(lambda: jobs.condition("refused", "Running").get("reason") == "CreateRefused", "CreateRefused")
    assert "may not specify more than 1 volume type" in jobs.condition("refused", "Running")["message"]


def test_what_happened_while_the_operator_was_dead_is_seen(jobs: Jobs, operator: Operator, runner: PodRunner) -> None:
    jobs.apply(manifest("hangs"))
    pod = jobs.wait_pod("hangs-1")
    runner.wait_running(pod)
    operator.kill()
    try:
        runner.finish(pod, 0, json.dumps({"outcome": "Complete", "result": RESULT}))
        wait(lambda: jobs.get("hangs-1", "job").get("status", {}).get("succeeded"), "the child Job's end")
    finally:
        operator.start()
    assert jobs.wait_state("hangs", "Complete")["result"] == RESULT
    assert [j["metadata"]["name"] for j in jobs.list("jobs")] == ["hangs-1"]


def test_sigterm_ends_the_operator_within_five_seconds(operator: Operator) -> None:
    assert operator.http("healthz")[0] == 200
    try:
        assert operator.stop() < 5.0
    finally:
        operator.start()


def test_two_hundred_at_once(jobs: Jobs, operator: Operator) -> None:
    jobs.apply(*(manifest(f"many-{n:03d}") for n in range(200)))
    wait(lambda: all(j.get("status", {}).get("state") == "Complete" for j in jobs.list("ftj")), "200 Complete", 180)
    children = sorted(j["metadata"]["name"] for j in jobs.list("jobs"))
    assert children == [f"many-{n:03d}-1" for n in range(200)]
    assert {j["status"]["restarts"] for j in jobs.list("ftj")} == {0}
    assert operator.tracebacks() == []


def test_the_preflight_says_what_is_missing(cluster: Cluster, operator: Operator, tmp_path: Any) -> None:
    stranger = cluster.kubeconfig_for("stranger")
    command = [*operator.command(), "--metrics-bind=127.0.0.1:0", "--progress-bind=127.0.0.1:0"]
    command[command.index(f"--kubeconfig={operator.kubeconfig}")] = f"--kubeconfig={stranger}"
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "lacks rights: get finetunejobs.finetune.dev" in done.stderr
    assert "Traceback" not in done.stderr
    with Cluster() as empty:
        command[command.index(f"--kubeconfig={stranger}")] = f"--kubeconfig={empty.kubeconfig}"
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        old = crd.crd()
        trainer = old["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["trainer"][
            "properties"
        ]
        del trainer["serviceAccountName"], trainer["podTemplate"]["properties"]["spec"]["properties"]["affinity"]
        for definition in (old, crd.sweep_crd()):
            empty.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(definition))
            empty.wait_for_crd(definition["metadata"]["name"])
        outdated = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "The CRD finetunejobs.finetune.dev is not installed" in done.stderr
    assert outdated.returncode == 1
    said = "does not know spec.trainer.podTemplate.spec.affinity, spec.trainer.serviceAccountName, and would drop them"
    assert said in outdated.stderr
    assert "Traceback" not in outdated.stderr
