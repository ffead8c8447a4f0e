"""The reconcile decision, driven by a small world: a resource, its Jobs and pods, an operator that may die between actions."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api import FineTuneJobStatus
from finetune_api.failures import BY_REASON
from finetune_api.report import ProgressReport
from finetune_operator.domain.decide import decide
from finetune_operator.domain.status import find_condition, is_finished, merge_evaluations, only_progress_differs
from finetune_operator.domain.types import CreateJob, Decision, DeleteJob, EndPod, Event, Observed, Progress, Settings

SETTINGS = Settings(
    trainer_image="trainer:1", progress_url="https://progress:8443", progress_ca="PEM", restart_backoff_seconds=10
)
T0 = datetime(2026, 1, 1, tzinfo=UTC)


def stamp(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


class World:
    """What the API server would hold, and one reconcile at a time."""

    def __init__(self, **spec: Any) -> None:
        self.now = T0
        self.uid = 0
        self.created: list[str] = []
        self.children: dict[str, dict[str, Any]] = {}
        self.pods: dict[str, dict[str, Any]] = {}
        self.progress: Progress | None = None
        self.create_error: str | None = None
        self.job: dict[str, Any] = {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": "ft", "namespace": "ns", "uid": "u0", "generation": 1, "labels": {}},
            "spec": {
                "task": "SequenceClassification",
                "model": {"uri": "hf://a/b"},
                "dataset": {"uri": "s3://data/x", "labels": ["a", "b"]},
                "output": {"storageUri": "s3://out/x"},
                **spec,
            },
        }

    @property
    def status(self) -> dict[str, Any]:
        return self.job.get("status") or {}

    def condition(self, kind: str) -> dict[str, Any]:
        found = find_condition(self.status, kind)
        assert found is not None
        return found

    def look(self) -> Decision:
        attempt = self.status.get("attempt") or 0
        child = self.children.get(f"ft-{attempt}")
        finished = child is None or bool(child["status"].get("conditions"))
        return decide(
            Observed(
                job=self.job,
                child=child,
                next_child=self.children.get(f"ft-{attempt + 1}") if finished else None,
                pods=tuple(self.pods.values()),
                progress=self.progress,
                create_error=self.create_error,
            ),
            self.now,
            SETTINGS,
        )

    def reconcile(self, *, die_before_status: bool = False) -> Decision:
        decision = self.look()
        for action in decision.actions:
            if isinstance(action, CreateJob):
                self.create(action.manifest)
            if isinstance(action, DeleteJob):
                self.delete(action.name)
            if isinstance(action, EndPod):
                self.end_pod(action.uid)
        if not die_before_status:
            FineTuneJobStatus.model_validate(decision.status)
            self.job["status"] = json.loads(json.dumps(decision.status))
        return decision

    def create(self, manifest: dict[str, Any]) -> None:
        name = manifest["metadata"]["name"]
        if name in self.children:
            return
        assert not [p for p in self.pods.values() if self.alive(p)], "an older pod still runs"
        self.created.append(name)
        self.uid += 1
        self.children[name] = {**manifest, "metadata": {**manifest["metadata"], "uid": f"j{self.uid}"}, "status": {}}
        for index in range(manifest["spec"]["completions"]):
            key = f"{name}/{index}" if index else name
            self.pods[key] = self.pod(
                key, f"p{self.uid}", {"kind": "Job", "name": name, "uid": f"j{self.uid}", "controller": True}
            )

    def pod(self, name: str, uid: str, *owners: dict[str, Any]) -> dict[str, Any]:
        meta = {"name": f"{name}-x", "uid": uid, "creationTimestamp": stamp(self.now), "ownerReferences": [*owners]}
        return {"metadata": meta, "status": {"phase": "Pending"}}

    def alive(self, pod: dict[str, Any]) -> bool:
        """Its process may be running, and nobody has given its node up."""
        ends = pod["metadata"].get("deletionTimestamp")
        lost = ends is not None and self.now > datetime.fromisoformat(ends) + timedelta(seconds=60)
        return pod["status"]["phase"] in ("Pending", "Running") and not lost

    def delete(self, name: str) -> None:
        if self.children.pop(name, None):
            for key, pod in self.pods.items():
                if key.partition("/")[0] == name:
                    pod["metadata"].setdefault("deletionTimestamp", stamp(self.now + timedelta(seconds=60)))
                    pod["metadata"].setdefault("deletionGracePeriodSeconds", 60)

    def end_pod(self, uid: str) -> None:
        for pod in self.pods.values():
            if pod["metadata"]["uid"] == uid:
                end = stamp(self.now + timedelta(seconds=1))
                pod["metadata"] |= {"deletionTimestamp": end, "deletionGracePeriodSeconds": 1}

    def lose(self, name: str) -> None:
        """The pod's node dies; its deletion was asked for, and nobody is left to carry it out."""
        self.pods[name]["metadata"].setdefault("deletionTimestamp", stamp(self.now))

    def gone(self) -> None:
        """What was asked to end has ended; a Job that loses a pod so has failed."""
        for key in [key for key, pod in self.pods.items() if "deletionTimestamp" in pod["metadata"]]:
            del self.pods[key]
            if child := self.children.get(key.partition("/")[0]):
                child["status"].setdefault("conditions", [self.now_true("Failed")])

    def now_true(self, kind: str) -> dict[str, Any]:
        return {"type": kind, "status": "True", "lastTransitionTime": stamp(self.now)}

    def run(self, name: str) -> None:
        self.pods[name]["status"] = {
            "phase": "Running",
            "containerStatuses": [{"name": "trainer", "state": {"running": {"startedAt": stamp(self.now)}}}],
        }

    def end(self, name: str, code: int, message: str = "", reason: str = "Error", **pod_status: Any) -> None:
        begun = self.pods[name]["status"].get("containerStatuses", [{}])[0].get("state", {}).get("running", {}).get("startedAt")
        state = {"exitCode": code, "reason": reason, "message": message, "startedAt": begun, "finishedAt": stamp(self.now)}
        self.pods[name]["status"] = {
            "phase": "Failed" if code else "Succeeded",
            "containerStatuses": [{"name": "trainer", "state": {"terminated": state}}],
            **pod_status,
        }
        if name in self.children:
            self.children[name]["status"] = {"conditions": [self.now_true("Failed" if code else "Complete")]}

    def fail(self, name: str, reason: str, message: str = "because") -> None:
        report = {"outcome": "Failed", "reason": reason, "message": message}
        self.end(name, BY_REASON[reason].exit_code or 1, json.dumps(report))

    def wait(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def running(**spec: Any) -> World:
    world = World(**spec)
    world.reconcile()
    world.run("ft-1")
    world.reconcile()
    return world


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


def test_a_disruption_restarts_at_once_and_is_not_counted() -> None:
    world = running(failurePolicy={"maxRestarts": 0})
    disrupted = {"conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}]}
    world.end("ft-1", 20, json.dumps({"outcome": "Interrupted", "reason": "Interrupted", "message": "m"}), **disrupted)
    world.reconcile()
    assert world.created == ["ft-1", "ft-2"]
    assert (world.status["restarts"], world.status["restartsCountTowardsMax"]) == (1, 0)


def disrupt(world: World, step: int | None = None) -> None:
    """The newest attempt runs and is preempted, after it has saved this step; then all is done that follows."""
    name = world.created[-1]
    world.run(name)
    world.reconcile()
    world.wait(600)
    saved = {"step": step, "uri": f"s3://c/{step}", "time": stamp(world.now), "sizeBytes": 1}
    report = {"outcome": "Interrupted", "reason": "Interrupted", "message": "m"} | ({"checkpoint": saved} if step else {})
    preempted = {"conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}]}
    world.end(name, 20, json.dumps(report), **preempted)
    world.reconcile()
    world.wait(300)
    world.reconcile()


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
    assert isinstance(decision.actions[0], DeleteJob), "first: a Job that loses a pod fails"
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


LIFE = ["run", "ok", "oom", "disrupt", "data", "suspend", "resume"]
FAULTS = ["delete-child", "lose", "gone", "refuse", "allow", "wait", "crash"]
EVENTS = st.lists(st.sampled_from(LIFE + FAULTS), max_size=25)


@settings(max_examples=300, deadline=None)
@given(EVENTS)
def test_any_story_keeps_the_invariants(events: list[str]) -> None:
    """At most one attempt alive (asserted in create), attempts never fall, terminal is terminal, no attempt is skipped; and the job goes
    on, whatever has happened."""
    world = World(failurePolicy={"maxRestarts": 2})
    last_attempt = 0
    terminal: dict[str, Any] | None = None
    for event in events:
        name = world.created[-1] if world.created else ""
        pod = world.pods.get(name)
        phase = pod["status"]["phase"] if pod else None
        if event == "run" and phase == "Pending":
            world.run(name)
        elif event in ("ok", "oom", "data", "disrupt") and phase == "Running":
            if event == "ok":
                world.end(name, 0)
            elif event == "oom":
                world.end(name, 137, "", "OOMKilled")
            elif event == "data":
                world.fail(name, "DataInvalid")
            else:
                world.end(name, 143, "", conditions=[{"type": "DisruptionTarget", "status": "True", "reason": "x"}])
        elif event in ("suspend", "resume"):
            world.job["spec"]["suspend"] = event == "suspend"
        elif event == "delete-child":
            world.delete(name)
        elif event == "lose" and phase in ("Pending", "Running"):
            world.lose(name)
        elif event == "gone":
            world.gone()
        elif event in ("refuse", "allow"):
            world.create_error = "exceeded quota" if event == "refuse" else None
        elif event == "wait":
            world.wait(20)
        world.reconcile(die_before_status=event == "crash")
        status = world.status
        if terminal is not None:
            assert status == terminal
        elif is_finished(status):
            terminal = status
        assert (status.get("attempt") or 0) >= last_attempt
        assert status.get("activeSeconds", 0) <= (world.now - T0).total_seconds(), "time was counted twice"
        last_attempt = status.get("attempt") or 0
    # A child that is deleted before its attempt was recorded is created again under its name; none is skipped.
    distinct = list(dict.fromkeys(world.created))
    assert distinct == [f"ft-{n}" for n in range(1, len(distinct) + 1)]
    world.job["spec"]["suspend"], world.create_error = False, None
    for _ in range(20):
        world.wait(60)
        world.reconcile()
    newest = world.pods.get(world.created[-1]) if world.created else None
    assert is_finished(world.status) or (newest is not None and world.alive(newest)), "nothing happens any more"
