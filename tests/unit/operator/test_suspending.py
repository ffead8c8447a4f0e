"""The reconcile decision when a job is suspended or stopped, and what becomes of its checkpoints and its time."""

import json
from datetime import timedelta
from typing import Any

import pytest
from decide_kit import T0, World, running, stamp

from finetune_api.report import ProgressReport
from finetune_operator.domain.types import Decision, DeleteJob, EndPod, Event, Progress


def test_suspend_waits_for_the_pods_then_resume_is_the_next_attempt_and_no_restart() -> None:
    world = running()
    world.wait(30)
    world.job["spec"]["suspend"] = True
    world.reconcile()
    assert world.status["state"] == "Suspending"
    assert world.condition("Running")["status"] == "True"
    world.reconcile()
    assert world.condition("Suspended")["status"] == "False"
    world.pods.clear()
    world.reconcile()
    assert world.status["state"] == "Suspended"
    assert world.condition("Suspended")["status"] == "True"
    assert world.status["activeSeconds"] == 30
    world.wait(500)
    world.job["spec"]["suspend"] = False
    world.reconcile()
    assert world.created == ["ft-1", "ft-2"]
    assert world.status["restarts"] == 0
    assert world.condition("Suspended")["reason"] == "Resumed"
    assert world.status["activeSeconds"] == 30


def test_a_suspension_that_has_begun_is_finished_although_the_flag_flips_back() -> None:
    world = running()
    world.job["spec"]["suspend"] = True
    world.reconcile()
    world.job["spec"]["suspend"] = False
    world.reconcile()
    assert world.created == ["ft-1"]
    world.pods.clear()
    world.reconcile()
    world.reconcile()
    assert world.created == ["ft-1", "ft-2"]
    assert world.status["restarts"] == 0


def test_created_suspended_makes_no_job() -> None:
    world = World(suspend=True)
    world.reconcile()
    assert world.created == []
    assert world.status["state"] == "Suspended"


def test_stop_ends_as_complete_and_names_the_checkpoint() -> None:
    world = running()
    checkpoint = {"step": 5, "uri": "s3://c/5", "time": stamp(T0), "sizeBytes": 1}
    world.progress = Progress(ProgressReport.model_validate({"checkpoint": checkpoint}), T0, 1, "u0")
    world.reconcile()
    world.job["spec"]["stop"] = True
    world.reconcile()
    world.pods.clear()
    world.reconcile()
    assert world.condition("Complete")["reason"] == "Stopped"
    assert "s3://c/5" in world.condition("Complete")["message"]


@pytest.mark.parametrize("how", ["suspend", "stop"])
@pytest.mark.parametrize("told", ["report", "post"])
def test_what_the_pod_saves_while_it_is_wound_down_is_the_newest_checkpoint(how: str, told: str) -> None:
    world = running()
    world.wait(3600)
    world.job["spec"][how] = True
    world.reconcile()
    assert world.children == {}
    world.wait(20)
    checkpoint = {"step": 9, "uri": "s3://c/9", "time": stamp(world.now), "sizeBytes": 1}
    if told == "report":
        report = {"outcome": "Interrupted", "reason": "Interrupted", "message": "m", "checkpoint": checkpoint}
        world.end("ft-1", 20, json.dumps(report))
    else:
        world.progress = Progress(ProgressReport.model_validate({"checkpoint": checkpoint}), T0, 1, "u0")
        world.gone()
    stranger = world.pod("stranger", "s", {"kind": "Job", "name": "ft-1", "uid": "of an earlier ft", "controller": True})
    world.pods["stranger"] = stranger
    later = {**checkpoint, "step": 10, "time": stamp(world.now + timedelta(seconds=1))}
    world.end("stranger", 20, json.dumps({"outcome": "Interrupted", "checkpoint": later}))
    world.reconcile()
    assert world.status["state"] == {"suspend": "Suspended", "stop": "Complete"}[how]
    assert world.status["checkpoint"]["step"] == 9
    assert (world.status["activeSeconds"], world.status["lostWorkSeconds"]) == (3620, 0)
    if how == "stop":
        assert world.condition("Complete")["message"] == "Stopped by spec.stop. The newest checkpoint is s3://c/9."


def saved(world: World, step: int, **report: Any) -> None:
    """The trainer of the current attempt has just saved, and posts that."""
    checkpoint = {"step": step, "uri": f"s3://c/step-{step:08d}-0001", "time": stamp(world.now), "sizeBytes": 1}
    world.progress = Progress(
        ProgressReport.model_validate({"checkpoint": checkpoint, **report}), world.now, world.status["attempt"], "u0"
    )
    world.reconcile()


def ended_pods(decision: Decision) -> list[str]:
    return [action.uid for action in decision.actions if isinstance(action, EndPod)]


def test_a_suspension_that_discards_ends_the_pods_at_once() -> None:
    world = running(checkpoint={"onSuspend": "Discard"}, trainer={"numNodes": 2})
    world.run("ft-1/1")
    world.reconcile()
    stranger = world.pod("stranger", "s", {"kind": "Job", "name": "ft-1", "uid": "of an earlier ft", "controller": True})
    world.pods["stranger"] = stranger
    world.wait(100)
    saved(world, 9)
    world.wait(40)
    world.job["spec"]["suspend"] = True
    decision = world.reconcile()
    kinds = [type(action) for action in decision.actions]
    assert kinds == [EndPod, EndPod, DeleteJob], (
        "pods that their Job's deletion asks to end first may take all the time for a save"
    )
    assert ended_pods(decision) == ["p1", "p1"]
    assert ended_pods(world.reconcile()) == [], "asked once is enough"
    del world.pods["stranger"]
    world.wait(2)
    world.gone()
    world.reconcile()
    assert world.status["state"] == "Suspended"
    assert world.status["lostWorkSeconds"] == 42, "since the checkpoint"
    assert world.status["checkpoint"]["step"] == 9


def test_a_stop_that_discards_ends_the_pods_at_once() -> None:
    world = running(checkpoint={"onStop": "Discard"})
    world.job["spec"]["stop"] = True
    assert ended_pods(world.reconcile()) == ["p1"]


def test_an_operator_that_died_in_between_shortens_what_the_garbage_collector_grants() -> None:
    world = running(checkpoint={"onSuspend": "Discard"})
    world.delete("ft-1")
    world.job["spec"]["suspend"] = True
    assert ended_pods(world.reconcile()) == ["p1"]


@pytest.mark.parametrize(
    "spec",
    [
        {"suspend": True},
        {"stop": True, "checkpoint": {"onSuspend": "Discard"}},
        {"suspend": True, "checkpoint": {"onStop": "Discard"}},
    ],
)
def test_whoever_may_save_is_not_cut_short(spec: dict[str, Any]) -> None:
    world = running()
    world.job["spec"] |= spec
    assert ended_pods(world.reconcile()) == []


@pytest.mark.parametrize("how", ["killed", "killed and gone", "evicted", "suspended", "discarded"])
def test_lost_work_is_what_was_done_since_the_checkpoint(how: str) -> None:
    world = running(checkpoint={"onSuspend": "Discard" if how == "discarded" else "Save"})
    world.wait(100)
    saved(world, 9)
    world.wait(40)
    if how.startswith("killed"):
        world.end("ft-1", 137)
        if how == "killed and gone":
            world.pods.clear()
    elif how == "evicted":  # the kubelet gives little time: the trainer saved nothing more
        conditions = [{"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet"}]
        world.end("ft-1", 137, conditions=conditions)
    else:
        world.job["spec"]["suspend"] = True
        world.reconcile()
        if how == "suspended":
            saved(world, 13)
        world.gone()
    world.reconcile()
    assert world.status["lostWorkSeconds"] == (0 if how == "suspended" else 40)
    world.job["spec"]["suspend"] = False
    world.wait(600)
    world.reconcile()
    world.reconcile()
    assert world.created == ["ft-1", "ft-2"]
    world.run("ft-2")
    world.reconcile()
    world.wait(30)
    world.end("ft-2", 137)
    world.reconcile()
    assert world.status["lostWorkSeconds"] == (30 if how == "suspended" else 70), "not the time in which nothing ran"


def test_the_time_in_which_a_pod_waited_is_no_lost_work_although_the_pod_is_gone() -> None:
    world = World()
    world.reconcile()
    world.children["ft-1"]["status"]["startTime"] = stamp(world.now)
    world.wait(900)  # its image is pulled
    world.run("ft-1")
    world.reconcile()
    world.wait(20)
    world.end("ft-1", 137)
    world.children["ft-1"]["status"]["startTime"] = stamp(T0)
    world.pods.clear()
    world.reconcile()
    assert (world.status["lostWorkSeconds"], world.status["activeSeconds"]) == (20, 20)


REFUSED = {"checkpoint": "step-00000009-0001", "message": "model/model.safetensors differs from its manifest"}


@pytest.mark.parametrize("heard", ["while it runs", "at its end"])
def test_a_refused_checkpoint_is_told_once_and_is_the_newest_no_more(heard: str) -> None:
    world = running()
    saved(world, 9)
    world.wait(10)
    world.end("ft-1", 137)
    world.reconcile()
    world.wait(60)
    world.reconcile()
    world.run("ft-2")
    world.reconcile()
    older = {"step": 5, "uri": "s3://c/step-00000005-0001", "time": stamp(T0 - timedelta(seconds=60)), "sizeBytes": 1}
    report = {"checkpoint": older, "resumedFrom": older, "corrupt": [REFUSED]}
    told: list[Event] = []
    if heard == "while it runs":
        world.progress = Progress(ProgressReport.model_validate(report), world.now, 2, "u0")
        told += [a for a in world.reconcile().actions if isinstance(a, Event)]
        told += [a for a in world.reconcile().actions if isinstance(a, Event)]
    world.end("ft-2", 20, json.dumps({"outcome": "Interrupted", "reason": "Interrupted", "message": "m", **report}))
    told += [a for a in world.reconcile().actions if isinstance(a, Event)]
    told += [a for a in world.reconcile().actions if isinstance(a, Event)]
    corrupt = [event for event in told if event.reason == "CheckpointCorrupt"]
    assert [(e.type, REFUSED["checkpoint"] in e.message, REFUSED["message"] in e.message) for e in corrupt] == [
        ("Warning", True, True)
    ]
    assert world.status["checkpoint"]["step"] == 5


def test_what_saving_cost_is_the_newest_word_of_the_pod_that_saves() -> None:
    world = running(trainer={"numNodes": 2})
    saved(world, 9, saving={"saves": 3, "blockingSeconds": 1.5})
    world.end("ft-1/1", 20, json.dumps({"outcome": "Interrupted", "reason": "Interrupted", "saving": {}}))
    found = world.look().saving
    assert found is not None
    assert (found.saves, found.blocking_seconds) == (3, 1.5)


@pytest.mark.parametrize("how", ["stop", "suspend"])
def test_who_is_asked_to_end_while_it_publishes_has_a_result(how: str) -> None:
    # The model was there, and the status said nothing of it.
    world = running()
    world.job["spec"][how] = True
    world.reconcile()
    world.end("ft-1", 0, json.dumps({"outcome": "Complete", "result": {"modelUri": "s3://b/k/model", "metrics": []}}))
    world.reconcile()
    assert (world.status["state"], world.condition("Complete")["reason"]) == ("Complete", "Trained")
    assert world.status["result"]["modelUri"] == "s3://b/k/model"


@pytest.mark.parametrize("how", ["drained", "suspended", "stopped"])
def test_the_time_that_the_last_save_takes_is_no_lost_work(how: str) -> None:
    """The state is that of the last step; what follows is its way to the storage."""
    world = running()
    world.wait(100)
    if how != "drained":
        world.job["spec"]["suspend" if how == "suspended" else "stop"] = True
        world.reconcile()
    saved(world, 9)
    world.wait(40)
    world.end(
        "ft-1", 20, json.dumps({"outcome": "Interrupted", "reason": "Interrupted", "message": "asked to end; step 9 is saved"})
    )
    world.reconcile()
    assert (world.status["lostWorkSeconds"], world.status["activeSeconds"]) == (0, 140)
