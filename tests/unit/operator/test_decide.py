"""The reconcile decision: an attempt from its Job to the end of the resource, and what a failure leads to."""

import json
from datetime import timedelta
from typing import Any

import pytest
from decide_kit import T0, World, disrupt, running, stamp

from finetune_api.failures import BY_REASON
from finetune_operator.domain.types import Event


def test_first_sight_creates_attempt_1_and_sets_every_condition() -> None:
    world = World()
    world.reconcile()
    assert world.created == ["ft-1"]
    assert world.status["state"] == "Pending"
    kinds = {c["type"]: (c["status"], c["observedGeneration"]) for c in world.status["conditions"]}
    assert kinds == dict.fromkeys(["Running", "Progressing", "Checkpointed", "Suspended", "Complete", "Failed"], ("False", 1))


def test_an_unchanged_world_gives_an_equal_status_and_no_action() -> None:
    world = running()
    before = json.dumps(world.status)
    world.wait(1000)
    decision = world.look()
    assert json.dumps(decision.status) == before
    assert decision.actions == ()


def test_success_takes_result_from_the_termination_message_and_counts_time() -> None:
    world = running(trainer={"resourcesPerNode": {"limits": {"nvidia.com/gpu": 2}}})
    world.wait(100)
    result = {"modelUri": "s3://out/x/model", "metrics": [{"name": "test/macro_f1", "value": "0.9"}], "bestStep": 7}
    world.end("ft-1", 0, json.dumps({"outcome": "Complete", "result": result}), "Completed")
    decision = world.reconcile()
    assert decision.finished
    assert world.status["result"] == result
    assert world.status["state"] == "Complete"
    assert world.condition("Complete")["reason"] == "Trained"
    assert (world.status["activeSeconds"], world.status["gpuSeconds"], world.status["lostWorkSeconds"]) == (100, 200, 0)


def test_a_job_that_ran_while_the_operator_was_down_ends_right() -> None:
    world = World()
    world.reconcile()
    world.run("ft-1")
    world.wait(50)
    world.end("ft-1", 0, "", "Completed")
    world.reconcile()
    assert world.status["state"] == "Complete"
    assert world.status["startTime"] == stamp(T0)
    assert world.status["activeSeconds"] == 50
    assert world.status["result"] == {"modelUri": "s3://out/x/model"}


def test_already_completed() -> None:
    world = running()
    world.end("ft-1", 0, json.dumps({"outcome": "AlreadyCompleted", "result": {"modelUri": "s3://out/x/model"}}))
    world.reconcile()
    assert world.condition("Complete")["reason"] == "AlreadyCompleted"


@pytest.mark.parametrize("reason", ["DataInvalid", "ModelNotFound", "StorageDenied", "StorageNotFound", "OutputExists"])
def test_what_a_restart_cannot_cure_fails_at_once_with_the_trainers_sentence(reason: str) -> None:
    world = running()
    world.fail("ft-1", reason, "column label is missing in train.csv")
    world.reconcile()
    assert world.condition("Failed")["reason"] == reason
    assert world.condition("Failed")["message"] == "column label is missing in train.csv"
    assert world.condition("Complete")["status"] == "False"
    assert world.created == ["ft-1"]


def test_the_sentence_counts_and_not_the_exit_code_which_is_torchruns() -> None:
    world = running()
    world.end("ft-1", 1, json.dumps({"outcome": "Failed", "reason": "OutputExists", "message": "because"}))
    world.reconcile()
    assert world.condition("Failed")["reason"] == "OutputExists"
    assert world.created == ["ft-1"]


def test_two_jobs_that_take_one_output_from_each_other_come_to_an_end() -> None:
    world = running(failurePolicy={"maxRestarts": 0})
    world.fail("ft-1", "Superseded")
    world.reconcile()
    assert world.condition("Failed")["reason"] == "Superseded"


def test_a_job_that_a_newer_operator_began_is_left_alone() -> None:
    world = running()
    before = world.status
    world.job["spec"]["fromTheFuture"] = 1
    decision = world.look()
    assert (decision.status, decision.finished) == (before, False)
    [event] = decision.actions
    assert isinstance(event, Event)
    assert "fromTheFuture: unknown field" in event.message
    # One that nobody has begun is told at once.
    del world.job["status"]
    assert world.reconcile().finished
    assert world.condition("Failed")["reason"] == "RecipeInvalid"


def test_max_restarts_with_backoff_then_failed_with_the_root_cause() -> None:
    world = running(failurePolicy={"maxRestarts": 1})
    world.end("ft-1", 137, "", "OOMKilled")
    decision = world.reconcile()
    assert world.status["state"] == "Restarting"
    assert (world.condition("Running")["reason"], world.status["restartTime"]) == (
        "OOMKilled",
        stamp(world.now + timedelta(seconds=10)),
    )
    assert decision.requeue_after == 10
    world.wait(10)
    world.reconcile()
    assert world.created == ["ft-1", "ft-2"]
    assert (world.status["attempt"], world.status["restarts"], world.status["restartsCountTowardsMax"]) == (2, 1, 1)
    world.run("ft-2")
    world.reconcile()
    world.end("ft-2", 137, "", "OOMKilled")
    world.reconcile()
    assert world.condition("Failed")["reason"] == "OOMKilled"
    assert "maxRestarts is 1" in world.condition("Failed")["message"]


def two_pods() -> World:
    world = World(trainer={"numNodes": 2})
    world.reconcile()
    for name in ("ft-1", "ft-1/1"):
        world.run(name)
    world.reconcile()
    return world


def test_of_two_pods_the_one_that_says_why_is_heard() -> None:
    world = two_pods()
    world.end("ft-1/1", 137, "", "OOMKilled")
    world.end("ft-1", 1, "a log that ends with its peer")
    world.reconcile()
    assert world.condition("Running")["reason"] == "OOMKilled"


def test_the_next_attempt_waits_for_every_pod_of_this_one() -> None:
    world = two_pods()
    world.end("ft-1", 137, "", "OOMKilled")
    world.reconcile()
    world.wait(1000)
    world.reconcile()
    assert world.created == ["ft-1"], "the other pod still runs"
    world.end("ft-1/1", 1)
    world.reconcile()
    assert world.created == ["ft-1", "ft-2"]


def test_a_disruption_restarts_at_once_and_is_not_counted() -> None:
    world = running(failurePolicy={"maxRestarts": 0})
    disrupted = {"conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}]}
    world.end("ft-1", 20, json.dumps({"outcome": "Interrupted", "reason": "Interrupted", "message": "m"}), **disrupted)
    world.reconcile()
    assert world.created == ["ft-1", "ft-2"]
    assert (world.status["restarts"], world.status["restartsCountTowardsMax"]) == (1, 0)


def counters(world: World) -> tuple[int, int, int]:
    return tuple(world.status[name] for name in ("restarts", "restartsCountTowardsMax", "disruptionsInARow"))  # type: ignore[return-value]


def test_the_third_disruption_in_a_row_without_a_new_step_counts() -> None:
    world = World(failurePolicy={"maxRestarts": 1})
    world.reconcile()
    disrupt(world, 5)
    disrupt(world, 5)  # saved again, but nothing new
    assert counters(world) == (2, 0, 2)
    disrupt(world, 6)
    assert counters(world) == (3, 0, 1)
    disrupt(world)
    disrupt(world)
    assert counters(world) == (5, 1, 3)
    disrupt(world, 7)
    assert counters(world) == (6, 1, 1), "it gets on again"
    disrupt(world)
    disrupt(world)
    assert world.condition("Failed")["reason"] == "Disrupted"
    assert "disruption 3 in a row without a checkpoint of a new step" in world.condition("Failed")["message"]


def test_another_failure_ends_the_row() -> None:
    world = World()
    world.reconcile()
    disrupt(world)
    disrupt(world)
    world.run(world.created[-1])
    world.end(world.created[-1], 137, "", "OOMKilled")
    world.reconcile()
    world.wait(300)
    world.reconcile()
    disrupt(world)
    assert counters(world) == (4, 1, 1)


def test_a_script_that_reports_no_checkpoint_may_be_disrupted_as_often_as_it_likes() -> None:
    world = World(trainer={"command": ["python", "train.py"]}, failurePolicy={"maxRestarts": 0})
    world.reconcile()
    for _ in range(5):
        disrupt(world)
    assert counters(world) == (5, 0, 5)
    disrupt(world, 5)
    disrupt(world)
    disrupt(world)
    assert world.condition("Failed")["reason"] == "Disrupted"


@pytest.mark.parametrize(
    ("pod", "job_message", "expected"),
    [
        ({"reason": "Evicted"}, "", "Evicted"),
        ({"conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet"}]}, "", "Evicted"),
        ({"conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "DeletionByPodGC"}]}, "", "NodeLost"),
        (None, "Container trainer for pod ns/p failed with exit code 11 matching FailJob rule at index 1", "DataInvalid"),
        (None, "Pod ns/p has condition DisruptionTarget matching FailJob rule at index 0", "Disrupted"),
        (None, "Job has reached the specified backoff limit", "ChildDeleted"),
    ],
)
def test_the_root_cause_survives_the_pod(pod: dict[str, Any] | None, job_message: str, expected: str) -> None:
    world = running(failurePolicy={"maxRestarts": 0})
    world.end("ft-1", 1)
    world.pods["ft-1"]["status"].update(pod or {})
    world.children["ft-1"]["status"]["conditions"][0]["message"] = job_message
    if pod is None:
        world.pods.clear()
    world.reconcile()
    seen = json.dumps(world.status["conditions"])
    if BY_REASON[expected].retriable and not BY_REASON[expected].counted:
        assert world.status["restartsCountTowardsMax"] == 0
        assert len(world.created) == 2
    else:
        assert expected in seen


DONE = json.dumps({"outcome": "Complete", "step": 9, "result": {"modelUri": "s3://b/k/model", "metrics": []}})


@pytest.mark.parametrize("reason", ["OOMKilled", "Error"])
def test_a_result_that_is_there_counts_however_its_process_ended(reason: str) -> None:
    # Killed while the interpreter was taken down; a second attempt, or a failed job, for nothing.
    world = running(failurePolicy={"maxRestarts": 0})
    world.end("ft-1", 137, DONE, reason)
    world.reconcile()
    assert (world.status["state"], world.condition("Complete")["reason"]) == ("Complete", "Trained")
    assert world.status["result"]["modelUri"] == "s3://b/k/model"
    assert world.status["restarts"] == 0


def test_only_the_trainer_that_publishes_says_so() -> None:
    world = running(trainer={"numNodes": 2})
    for index in (0, 1):
        pod = world.pods[f"ft-1/{index}"] if index else world.pods.setdefault("ft-1/0", world.pods.pop("ft-1"))
        pod["metadata"]["annotations"] = {"batch.kubernetes.io/job-completion-index": str(index)}
        world.run(f"ft-1/{index}")
    world.end("ft-1/1", 0, DONE)
    world.end("ft-1/0", 1)
    world.children["ft-1"]["status"] = {"conditions": [world.now_true("Failed")]}
    world.reconcile()
    assert world.status["state"] == "Restarting"
