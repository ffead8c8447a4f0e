"""The reconcile decision when Jobs, pods or nodes are not what they should be."""

from datetime import timedelta
from typing import Any

import pytest
from decide_kit import T0, World, running, stamp

from finetune_api.report import ProgressReport
from finetune_operator.domain.status import merge_evaluations, only_progress_differs
from finetune_operator.domain.types import CreateJob, Decision, DeleteJob, Event, Progress


def test_progress_of_an_older_attempt_is_ignored() -> None:
    world = running()
    report = ProgressReport.model_validate({"trainerStatus": {"progressPercentage": 50}})
    world.progress = Progress(report, T0, 7, "u0")
    assert "trainerStatus" not in world.reconcile().status
    world.progress = Progress(report, T0, 1, "of an earlier ft")
    assert "trainerStatus" not in world.reconcile().status
    assert world.condition("Progressing")["status"] == "Unknown"
    world.progress = Progress(report, T0, 1, "u0")
    old = world.status
    new = world.reconcile().status
    assert new["trainerStatus"]["progressPercentage"] == 50
    assert world.condition("Progressing")["status"] == "True"
    assert not only_progress_differs(old, new)  # the condition changed
    later = ProgressReport.model_validate({"trainerStatus": {"progressPercentage": 60}})
    world.progress = Progress(later, T0 + timedelta(seconds=5), 1, "u0")
    assert only_progress_differs(new, world.look().status)


def test_deleted_child_is_replaced_while_running_but_never_after_the_end() -> None:
    world = running()
    world.delete("ft-1")
    world.reconcile()
    assert world.created == ["ft-1"]  # its pod still runs
    world.pods.clear()
    world.reconcile()
    assert world.created == ["ft-1", "ft-2"]
    assert (world.status["restarts"], world.status["restartsCountTowardsMax"]) == (1, 0)
    world.end("ft-2", 0)
    world.reconcile()
    world.children.clear()
    world.pods.clear()
    assert world.reconcile() == Decision(status=world.status, finished=True)
    assert world.created == ["ft-1", "ft-2"]


def test_jobs_that_somebody_deletes_again_and_again_are_made_ever_more_seldom() -> None:
    world = World(failurePolicy={"maxRestarts": 1000})
    events = 0
    for _ in range(3600):
        decision = world.reconcile()
        events += sum(isinstance(a, Event) and a.reason == "ChildDeleted" for a in decision.actions)
        world.delete(world.created[-1])
        world.gone()
        world.wait(1)
    assert 10 < len(world.created) < 20
    assert events in (len(world.created), len(world.created) - 1)
    assert world.status["restarts"] == len(world.created) - 1


@pytest.mark.parametrize("crash", [False, True])
def test_a_restart_is_counted_once_also_when_the_operator_dies_before_it_can_say_so(crash: bool) -> None:
    world = running()
    world.delete("ft-1")
    world.gone()
    world.wait(7200)
    world.reconcile(die_before_status=crash)
    world.reconcile()
    assert world.created == ["ft-1", "ft-2"]
    assert (world.status["attempt"], world.status["restarts"], world.status["activeSeconds"]) == (2, 1, 7200)


@pytest.mark.parametrize("cause", ["deleted", "disrupted", "oom"])
def test_the_time_of_an_attempt_counts_once_while_the_next_one_is_refused(cause: str) -> None:
    world = running(trainer={"resourcesPerNode": {"limits": {"nvidia.com/gpu": 2}}})
    world.wait(7200)
    if cause == "deleted":
        world.delete("ft-1")
        world.gone()
    elif cause == "disrupted":
        world.end("ft-1", 143, conditions=[{"type": "DisruptionTarget", "status": "True", "reason": "x"}])
    else:
        world.end("ft-1", 137, "", "OOMKilled")
    world.create_error = "exceeded quota: gpus"
    for _ in range(5):
        world.reconcile()
        world.wait(60)
    assert world.condition("Running")["reason"] == "CreateRefused"
    assert (world.status["state"], world.status["attempt"], world.status["restarts"]) == ("Restarting", 1, 0)
    world.create_error = None
    world.reconcile()
    assert (world.status["state"], world.status["attempt"], world.status["restarts"]) == ("Pending", 2, 1)
    assert (world.status["activeSeconds"], world.status["gpuSeconds"]) == (7200, 14400)
    assert "restartTime" not in world.status


def test_a_foreign_job_of_the_same_name_is_reported_and_left_alone() -> None:
    world = World()
    world.children["ft-1"] = {"metadata": {"name": "ft-1", "uid": "z"}, "status": {}}
    decision = world.reconcile()
    assert not [a for a in decision.actions if isinstance(a, CreateJob | DeleteJob)]
    assert world.condition("Running")["reason"] == "NameConflict"
    assert "ft-1" in world.condition("Running")["message"]


FOREIGN = {"metadata": {"name": "ft-2", "uid": "z"}, "status": {}}


def test_a_foreign_job_of_a_later_attempts_name_is_in_nobodys_way_until_then() -> None:
    for end, state in (("Complete", "Complete"), ("stop", "Complete"), ("suspend", "Suspended")):
        world = running()
        world.children["ft-2"] = FOREIGN
        if end == "Complete":
            world.end("ft-1", 0)
        else:
            world.job["spec"][end] = True
            world.reconcile()
            world.gone()
        world.reconcile()
        assert world.status["state"] == state, end
    world.job["spec"]["suspend"] = False
    world.reconcile()
    assert world.condition("Running")["reason"] == "NameConflict"
    assert world.condition("Suspended")["status"] == "True"
    assert world.status["restarts"] == 0
    del world.children["ft-2"]
    world.reconcile()
    assert world.created == ["ft-1", "ft-2"]


def test_a_foreign_job_stands_in_the_way_of_a_restart() -> None:
    world = running()
    world.children["ft-2"] = FOREIGN
    world.end("ft-1", 1)
    world.reconcile()
    world.wait(60)
    world.reconcile()
    assert world.condition("Running")["reason"] == "NameConflict"
    assert (world.status["state"], world.status["restarts"]) == ("Restarting", 0)


def test_a_node_whose_clock_is_ahead_delays_no_restart() -> None:
    world = running()
    world.wait(1800)
    world.end("ft-1", 1)
    world.wait(-1800)
    world.reconcile()
    world.wait(60)
    world.reconcile()
    assert world.created == ["ft-1", "ft-2"]


def test_a_checkpoint_of_a_later_step_is_newer_whatever_the_clocks_say() -> None:
    """The first attempt ran on a node whose clock was half an hour ahead."""
    world = running()
    for step, ahead in ((400, 1800), (480, 0)):
        saved = {"step": step, "uri": f"s3://c/{step}", "time": stamp(T0 + timedelta(seconds=ahead)), "sizeBytes": 1}
        world.progress = Progress(ProgressReport.model_validate({"checkpoint": saved}), T0, 1, "u0")
        world.reconcile()
    assert world.status["checkpoint"]["step"] == 480


def test_a_refused_create_is_told_and_tried_again() -> None:
    world = World()
    world.create_error = "exceeded quota: gpus"
    decision = world.reconcile()
    assert "exceeded quota: gpus" in world.condition("Running")["message"]
    assert decision.requeue_after is not None
    world.create_error = None
    world.reconcile()
    assert world.created == ["ft-1"]
    assert world.status["attempt"] == 1


def test_a_queue_label_goes_to_the_child_and_its_suspension_is_shown_as_queued() -> None:
    world = World()
    world.job["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "q", "other": "x"}
    world.reconcile()
    labels = world.children["ft-1"]["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == "q"
    assert "other" not in labels
    assert "suspend" not in world.children["ft-1"]["spec"]
    world.children["ft-1"]["spec"]["suspend"] = True
    world.pods.clear()
    world.reconcile()
    assert world.status["state"] == "Queued"


def test_a_pod_on_a_lost_node_is_replaced() -> None:
    world = running()
    world.lose("ft-1")
    assert world.reconcile().requeue_after == 61, "no event tells that a pod is still there"
    world.wait(61)
    world.reconcile()
    assert "NodeLost" in world.condition("Running")["message"]
    world.pods["lost"] = world.pods.pop("ft-1")  # Its object stays until the node is back; storage fences it.
    world.pods["lost"]["status"]["phase"] = "Unknown"
    world.reconcile()
    assert world.created == ["ft-1", "ft-2"]
    assert (world.status["restarts"], world.status["restartsCountTowardsMax"]) == (1, 0)


@pytest.mark.parametrize("peer", ["waits for its peer", "failed"])
def test_one_of_two_pods_on_a_lost_node_is_enough(peer: str) -> None:
    world = World(trainer={"numNodes": 2})
    world.reconcile()
    world.run("ft-1")
    world.run("ft-1/1")
    world.reconcile()
    world.lose("ft-1/1")
    if peer == "failed":
        world.pods["ft-1"]["status"]["phase"] = "Failed"  # The Job is not: it waits for the other pod to end.
    world.wait(61)
    world.reconcile()
    assert "NodeLost" in world.condition("Running")["message"]
    told = world.reconcile()
    assert world.created == (["ft-1", "ft-2"] if peer == "failed" else ["ft-1"]), "the peer is asked to end, and may be saving"
    if peer != "failed":
        world.pods.clear()  # also the lost one: its Node was deleted meanwhile
        told = world.reconcile()
    assert world.created == ["ft-1", "ft-2"]
    assert "NodeLost" in {a.reason for a in told.actions if isinstance(a, Event)}


def test_a_pod_whose_node_dies_before_it_ran_is_replaced() -> None:
    world = World()
    world.reconcile()
    world.lose("ft-1")
    world.wait(61)
    world.reconcile()
    world.reconcile()
    assert world.created == ["ft-1", "ft-2"]


@pytest.mark.parametrize("end", ["gone", "lost"])
def test_a_job_made_anew_waits_for_the_pods_of_the_one_before(end: str) -> None:
    world = World()
    old = world.pod("ft-3-x", "p0", {"kind": "Job", "name": "ft-3", "uid": "j0", "controller": True})
    old["status"]["phase"] = "Running"
    world.pods["ft-3"] = old
    assert world.reconcile().requeue_after is not None
    assert (world.created, world.status["state"], world.status["restarts"]) == ([], "Pending", 0)
    assert "of an older job" in world.condition("Running")["message"]
    world.lose("ft-3")
    if end == "gone":
        world.gone()
    world.wait(61)
    world.reconcile()
    assert (world.created, world.status["restarts"]) == (["ft-1"], 0)


OWNERS = {
    "none": [],
    "another job's": [{"kind": "Job", "name": "ft-1-1", "uid": "x", "controller": True}],
    "no attempt": [{"kind": "Job", "name": "ft-x", "uid": "x", "controller": True}],
    "another kind": [{"kind": "ReplicaSet", "name": "ft-1", "uid": "x", "controller": True}],
    "no controller": [{"kind": "Job", "name": "ft-1", "uid": "x"}],
}


@pytest.mark.parametrize("owners", OWNERS.values(), ids=OWNERS)
def test_a_pod_that_only_wears_the_label_holds_nothing_up(owners: list[dict[str, Any]]) -> None:
    world = running()
    stranger = world.pod("stranger", "s", *owners)
    stranger["status"]["phase"] = "Running"
    world.end("ft-1", 137, "", "OOMKilled")
    world.pods["stranger"] = stranger
    world.reconcile()
    world.wait(10)
    assert [a for a in world.look().actions if isinstance(a, CreateJob)]
    world.job["spec"]["suspend"] = True
    world.reconcile()
    world.reconcile()
    assert world.status["state"] == "Suspended"


def test_why_a_pod_does_not_start_is_in_the_condition() -> None:
    world = World()
    world.reconcile()
    waiting = {"reason": "ImagePullBackOff", "message": "not found"}
    world.pods["ft-1"]["status"] = {
        "phase": "Pending",
        "containerStatuses": [{"name": "trainer", "state": {"waiting": waiting}}],
    }
    world.reconcile()
    assert world.condition("Running")["reason"] == "ImagePullBackOff"


def test_evaluations_are_write_once_and_bounded() -> None:
    old: list[dict[str, Any]] = [{"examples": n, "step": n, "metrics": []} for n in range(64)]
    merged = merge_evaluations(old, [{"examples": 3, "step": 99, "metrics": []}, {"examples": 64, "step": 64, "metrics": []}])
    assert len(merged) <= 64
    assert merged[0]["examples"] == 0
    assert merged[-1]["examples"] == 64
    assert merge_evaluations(old, [{"examples": 3, "step": 99, "metrics": []}])[3]["step"] == 3
