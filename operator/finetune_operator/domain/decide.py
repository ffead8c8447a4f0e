"""The reconcile decision for one FineTuneJob. Pure: (observed, now, settings) in, status and actions out.

Level-triggered: it looks at what is, never at what happened, so that it may run at any time, any number of times, after a
crash at any line, and come to the same end. Three invariants:

- A job that is Complete or Failed is never touched again.
- A new attempt is created only when no pod of an older one can still be running.
- `status.attempt` never falls; attempt N+1 that exists without being in the status (the operator died in between) is taken over.
"""

import math
from dataclasses import replace
from datetime import datetime, timedelta

from finetune_api import FineTuneJob, names
from finetune_api.defaults import with_defaults
from finetune_api.failures import BY_REASON, DISRUPTIONS_IN_A_ROW, FailureClass
from finetune_api.manifest import ManifestError, parse_job
from finetune_api.names import Condition, Reason, State
from finetune_api.recipe import OnSuspend
from finetune_api.report import EndReport, Outcome, ProgressReport
from finetune_operator.domain.child import build_child, build_service, child_name, gpus_per_pod, is_trainers, owned_by
from finetune_operator.domain.outcome import Ended, done_before, end_report, ended, parse_time, saved_before
from finetune_operator.domain.status import StatusDraft, find_condition, is_finished, is_true, recorded_uid, stamp
from finetune_operator.domain.types import (
    Action,
    CreateJob,
    Decision,
    DeleteJob,
    EndPod,
    Event,
    Object,
    Observed,
    Progress,
    Settings,
)

MAX_BACKOFF_SECONDS = 300.0
WAIT_FOR_PODS_SECONDS = 5.0
WAIT_FOR_CONFLICT_SECONDS = 30.0
KILL_SECONDS = 1
"""What a pod gets that is to end without a save (onSuspend: Discard). Not 0: then it would be forgotten while it may still run."""
LOST_NODE_SECONDS = 60.0
"""A pod that is still there so long after its grace period is on a node that does not answer."""

_RESTARTING = "Restarting from the newest checkpoint."
_NODE_LOST = Ended(BY_REASON["NodeLost"], "The pod's node does not answer.")
_CHILD_DELETED = Ended(BY_REASON["ChildDeleted"], "The attempt's Job was deleted.")


def decide(observed: Observed, now: datetime, settings: Settings) -> Decision:
    """What to do about one FineTuneJob now."""
    raw = observed.job
    old = raw.get("status") or {}
    if is_finished(old):
        return Decision(status=old, finished=True)
    if raw["metadata"].get("deletionTimestamp"):
        return Decision(status=old)  # The garbage collector removes what the resource owns.
    draft = StatusDraft(old, raw["metadata"].get("generation", 1), now)
    try:
        job = parse_job({k: raw[k] for k in ("apiVersion", "kind", "metadata", "spec")})
    except ManifestError as error:
        said = "; ".join(error.problems)
        if old.get("attempt"):
            # It was understood when it started: this operator is older than the one that did. What trains goes on.
            return Decision(
                status=old, actions=(Event("Warning", "NotUnderstood", f"Upgrade the operator. It knows no: {said}"),)
            )
        # The CRD refuses this; a CRD of another version may not.
        return _fail(draft, "RecipeInvalid", said, [])
    decision = _Reconcile(with_defaults(job, settings.defaults), observed, now, settings, draft).decide()
    return replace(decision, saving=draft.saving)


def _fail(draft: StatusDraft, reason: str, message: str, actions: list[Action]) -> Decision:
    draft.state(State.FAILED)
    draft.new["completionTime"] = stamp(draft.now)
    draft.set(Condition.FAILED, True, reason, message)
    draft.set(Condition.RUNNING, False, Reason.FINISHED)
    return Decision(draft.done(), (*actions, Event("Warning", reason, message)), finished=True)


class _Reconcile:
    """One decision in the making; the methods read in the order in which a job lives."""

    def __init__(self, job: FineTuneJob, observed: Observed, now: datetime, settings: Settings, draft: StatusDraft) -> None:
        self.job = job
        self.observed = observed
        self.now = now
        self.settings = settings
        self.draft = draft
        self.restart_at = parse_time(draft.new.pop("restartTime", None))
        """When the current attempt is followed by the next one; None where it is not over, or its time has not been counted yet."""
        self.in_the_way: Object | None = None
        """Somebody else's Job that has the name of the next attempt's."""
        self.actions: list[Action] = []

    def decide(self) -> Decision:
        uid, following = self.job.metadata["uid"], self.observed.next_child
        if self.observed.child is not None and not owned_by(self.observed.child, uid):
            return self._name_conflict(self.observed.child)
        if following is not None and not owned_by(following, uid):
            # It is in the way of a next attempt only, and there may be none.
            self.observed, self.in_the_way = replace(self.observed, next_child=None), following
        self._hear(self.observed.child)
        child = self._take_over()
        pods = self._hear(child)
        over = self._ended(child)
        if over and over.failure is None:
            return self._complete(over)
        # A suspension that has begun is finished even if the flag flips back: its pods are being ended already.
        if self.job.spec.stop or self.job.spec.suspend or self.draft.old.get("state") == State.SUSPENDING:
            return self._wind_down(child, over)
        if over:
            return self._after_failure(over)
        if child is None:
            return self._start()
        return self._follow(child, pods)

    def _hear(self, child: Object | None) -> tuple[Object, ...]:
        """Takes over what the trainers of the current attempt report, the ended ones too; its pods."""
        self.draft.merge_progress(self._progress())
        pods = self._pods_of(child)
        for pod in pods:
            if report := end_report(pod):
                self.draft.merge_facts(report)
        return pods

    def _progress(self) -> Progress | None:
        """The newest report, if it is of the current attempt."""
        mine, found = (self.job.metadata["uid"], self.draft.new["attempt"]), self.observed.progress
        return found if found and (found.job_uid, found.attempt) == mine else None

    # ------------------------------------------------------------------------------------------------------ start ------
    def _take_over(self) -> Object | None:
        """The current attempt's Job; the one after it if that exists already."""
        child, after = self.observed.child, self.observed.next_child
        if after is None:
            return child
        if self.draft.new["attempt"]:
            over = self._ended(child)
            if self.restart_at is None:
                self._leave(over)
            if over and over.failure:
                self._count_restart(over.failure)
        self.restart_at = None
        self.draft.count("attempt")
        return after

    def _start(self) -> Decision:
        """Begin, or resume."""
        if self._alive():
            older = "Waiting until the pods of an older job or attempt of this name are gone."
            return self._wait_for_pods(State.PENDING, Reason.WAITING_FOR_PODS, older)
        return self._create()

    def _create(self, failure: FailureClass | None = None) -> Decision:
        """The next attempt; it is a restart after this failure."""
        if self.in_the_way is not None:
            return self._name_conflict(self.in_the_way)
        attempt = self.draft.new["attempt"] + 1
        manifest = build_child(self.job, attempt, self.settings)
        name = manifest["metadata"]["name"]
        if refused := self.observed.create_error:
            return self._refused(name, refused)
        if failure:
            self._count_restart(failure)
        self.draft.new["attempt"] = attempt
        self.draft.state(State.PENDING)
        self.draft.set(Condition.RUNNING, False, Reason.ATTEMPT_CREATED, f"Job {name} is created.")
        if is_true(self.draft.old, Condition.SUSPENDED):
            self.draft.set(Condition.SUSPENDED, False, Reason.RESUMED)
        self.draft.new["jobsStatus"] = [{"name": name, "ready": 0, "active": 0, "succeeded": 0, "failed": 0, "suspended": 0}]
        self.actions.append(CreateJob(manifest, build_service(self.job)))
        self.actions.append(Event("Normal", str(Reason.ATTEMPT_CREATED), f"Created Job {name}."))
        return Decision(self.draft.done(), tuple(self.actions))

    def _refused(self, name: str, said: str) -> Decision:
        # Not final: a quota may be raised, a namespace's policy changed. A restart is counted when its Job is created.
        message = f"The API server refused Job {name}: {said}"
        self._blocked(Reason.CREATE_REFUSED, message)
        event = Event("Warning", str(Reason.CREATE_REFUSED), message)
        return Decision(self.draft.done(), (event,), WAIT_FOR_CONFLICT_SECONDS)

    def _blocked(self, reason: str, message: str) -> None:
        """The next attempt cannot begin; when it was due is kept, with what was counted."""
        if self.restart_at:
            self.draft.new["restartTime"] = stamp(self.restart_at)
        self.draft.state(State.RESTARTING if self.restart_at else State.PENDING)
        self.draft.set(Condition.RUNNING, False, reason, message)
        if is_true(self.draft.old, Condition.SUSPENDED):
            self.draft.set(Condition.SUSPENDED, True, Reason.SUSPENDED)

    def _name_conflict(self, child: Object) -> Decision:
        name = child["metadata"]["name"]
        message = f"A Job named {name} exists that this resource does not own: delete that Job or use another name."
        self._blocked(Reason.NAME_CONFLICT, message)
        event = Event("Warning", str(Reason.NAME_CONFLICT), message)
        return Decision(self.draft.done(), (event,), WAIT_FOR_CONFLICT_SECONDS)

    # ------------------------------------------------------------------------------------------------------- run -------
    def _follow(self, child: Object, pods: tuple[Object, ...]) -> Decision:
        """The child runs or waits: say what happens."""
        if any(self._lost(pod) for pod in pods):
            return self._replace_lost(child)
        self._count_pods(child, pods)
        phases = [p.get("status", {}).get("phase") for p in pods]
        running = phases.count("Running") > 0 and len(pods) >= self.job.spec.trainer.num_nodes and "Pending" not in phases
        if "Running" not in phases and child.get("spec", {}).get("suspend"):
            if is_true(self.draft.old, Condition.RUNNING):
                self._leave(None)  # The queue took the node back.
            self.draft.state(State.QUEUED)
            self.draft.set(Condition.RUNNING, False, Reason.WAITING_FOR_QUEUE, "The queue has not admitted the Job.")
        elif running or is_true(self.draft.old, Condition.RUNNING):
            self.draft.state(State.RUNNING)
            self.draft.set(Condition.RUNNING, True, Reason.PODS_RUNNING, "All pods of the trainer are running.")
            self.draft.new.setdefault("startTime", stamp(self.now))
            progress = self._progress()
            if progress or is_true(self.draft.old, Condition.PROGRESSING):
                self.draft.set(Condition.PROGRESSING, True, Reason.PROGRESS_REPORTED, "The trainer reports progress.")
                self._tell_corrupt(progress.report if progress else None)
            else:
                self.draft.set(Condition.PROGRESSING, None, Reason.NO_PROGRESS_YET)
        else:
            self.draft.state(State.PENDING)
            reason, message = _why_pending(pods)
            self.draft.set(Condition.RUNNING, False, reason, message)
        if is_true(self.draft.old, Condition.SUSPENDED):
            self.draft.set(Condition.SUSPENDED, False, Reason.RESUMED)
        # That a pod is still there on a node that does not answer is no event.
        ends = [(end - self.now).total_seconds() + 1 for pod in pods if not _over(pod) and (end := _lost_after(pod))]
        return Decision(self.draft.done(), tuple(self.actions), min(ends, default=None))

    def _tell_corrupt(self, report: ProgressReport | EndReport | None) -> None:
        """Once per attempt: with its first report, or at its end where nothing was heard before."""
        if report is not None and not is_true(self.draft.old, Condition.PROGRESSING):
            said = (f"Checkpoint {r.checkpoint} was not used: {r.message}" for r in report.corrupt)
            self.actions.extend(Event("Warning", "CheckpointCorrupt", text) for text in said)

    def _count_pods(self, child: Object, pods: tuple[Object, ...]) -> None:
        phases = [p.get("status", {}).get("phase") for p in pods]
        counted = {
            "name": child["metadata"]["name"],
            "uid": child["metadata"]["uid"],
            "ready": phases.count("Running"),
            "active": phases.count("Running") + phases.count("Pending"),
            "succeeded": phases.count("Succeeded"),
            "failed": phases.count("Failed"),
            "suspended": 1 if child.get("spec", {}).get("suspend") else 0,
        }
        self.draft.new["jobsStatus"] = [counted]

    # ------------------------------------------------------------------------------------------------------- end -------
    def _complete(self, over: Ended) -> Decision:
        report = over.report
        if not is_true(self.draft.old, Condition.SUSPENDED):
            self._leave(over)
        again = report is not None and report.outcome is Outcome.ALREADY_COMPLETED
        result = report.result.model_dump(mode="json", by_alias=True, exclude_none=True) if report and report.result else {}
        if self.job.spec.output and not self.job.spec.trainer.command:
            result = {"modelUri": f"{self.job.spec.output.storage_uri.rstrip('/')}/{names.MODEL_DIR}", **result}
        if result:  # where a script of the user's puts its model is its own business
            self.draft.new["result"] = result
        if not again:
            self.draft.new["trainerStatus"] = {
                **(self.draft.new.get("trainerStatus") or {}),
                "progressPercentage": 100,
                "estimatedRemainingSeconds": 0,
            }
        reason = Reason.ALREADY_COMPLETED if again else Reason.TRAINED
        message = "The output already held the result of this recipe; nothing was trained." if again else "The model is trained."
        if child := self.observed.next_child or self.observed.child:
            self._count_pods(child, self._pods_of(child))
        return self._finish_complete(reason, message)

    def _finish_complete(self, reason: Reason, message: str) -> Decision:
        self.draft.state(State.COMPLETE)
        self.draft.new["completionTime"] = stamp(self.now)
        self.draft.new.setdefault("startTime", self.draft.new["completionTime"])
        self.draft.set(Condition.COMPLETE, True, reason, message)
        self.draft.set(Condition.RUNNING, False, Reason.FINISHED)
        self.actions.append(Event("Normal", str(reason), message))
        return Decision(self.draft.done(), tuple(self.actions), finished=True)

    def _after_failure(self, over: Ended) -> Decision:
        failure = over.failure
        if failure is None:
            raise ValueError("an attempt that ended well is no failure")
        if not over.finished and self._alive():
            return self._wait_for_pods(State.RESTARTING, failure.reason, f"{failure.reason}: {over.message}")
        if self.restart_at is None:
            self._leave(over)
        limit = self.job.spec.failure_policy.max_restarts
        used = int(self.draft.new["restartsCountTowardsMax"])
        if child := self.observed.next_child or self.observed.child:
            self._count_pods(child, self._pods_of(child))
        if not failure.retriable:
            return _fail(self.draft, failure.reason, over.message, self.actions)
        if self._counts(failure) and used >= limit:
            row = "" if failure.counted else f", disruption {self._in_a_row(failure)} in a row without a checkpoint of a new step"
            spent = f"{over.message.rstrip('.')}{row}. No restart is left (failurePolicy.maxRestarts is {limit})."
            return _fail(self.draft, failure.reason, spent, self.actions)
        if self.restart_at is None:
            # By the node's clock, which may be ahead of ours.
            self.restart_at = min(over.finished or self.now, self.now) + timedelta(seconds=self._backoff(failure))
            self.actions.append(Event("Warning", failure.reason, over.message))
        wait = (self.restart_at - self.now).total_seconds()
        if wait > 0 or self._alive():
            self._blocked(failure.reason, f"{failure.reason}: {over.message} {_RESTARTING}")
            return Decision(self.draft.done(), tuple(self.actions), max(wait, 1.0))
        return self._create(failure)

    def _backoff(self, failure: FailureClass) -> float:
        """Seconds between the end of an attempt and the next one; disruptions restart at once the first time."""
        done = int(self.draft.new["restarts"])
        if not self._counts(failure) and done == 0:
            return 0.0
        exponent = done if self._counts(failure) else done - 1
        return min(self.settings.restart_backoff_seconds * 2.0 ** min(exponent, 16), MAX_BACKOFF_SECONDS)

    def _count_restart(self, failure: FailureClass) -> None:
        self.draft.count("restarts")
        if self._counts(failure):
            self.draft.count("restartsCountTowardsMax")
        self.draft.new["disruptionsInARow"] = self._in_a_row(failure)

    def _counts(self, failure: FailureClass) -> bool:
        """Whether a restart after this uses up maxRestarts. Of a script that reports no checkpoint nobody knows whether it gets on."""
        silent = self.job.spec.trainer.command and "checkpoint" not in self.draft.new
        return failure.counted or (self._in_a_row(failure) >= DISRUPTIONS_IN_A_ROW and not silent)

    def _in_a_row(self, failure: FailureClass) -> int:
        """Disruptions since the last checkpoint of a new step, with this one."""
        return 0 if failure.counted else int(self.draft.new["disruptionsInARow"]) + 1

    # ---------------------------------------------------------------------------------------------- suspend and stop ---
    def _wind_down(self, child: Object | None, over: Ended | None) -> Decision:
        """Suspend or stop: the trainer saves on SIGTERM, so deleting the Job is all it takes; then wait for the pods."""
        stop = self.job.spec.stop
        if over and over.failure and not over.failure.retriable:
            self._leave(over)
            return _fail(self.draft, over.failure.reason, over.message, self.actions)
        policy = self.job.spec.checkpoint
        if (policy.on_stop if stop else policy.on_suspend) is OnSuspend.DISCARD:
            # Before the Job goes, and with it its pods: a kubelet that has begun to wait as long as a save may take does not always
            # hear that it may wait less.
            self._discard(child)
        if child is not None:
            self._count_pods(child, self._pods_of(child))
            # Also when it ended already: what is wound down leaves nothing that the next attempt could stumble over.
            self.actions.append(DeleteJob(child["metadata"]["name"], child["metadata"]["uid"]))
        if child is not None or self._alive():
            state, reason = (State.STOPPING, Reason.STOPPING) if stop else (State.SUSPENDING, Reason.SUSPENDING)
            return self._wait_for_pods(state, reason, "Waiting until the pods are gone.")
        if not is_true(self.draft.old, Condition.SUSPENDED) and self.draft.new["attempt"]:
            self._leave(saved_before(self._pods_of(None)))
        self.draft.new["jobsStatus"] = []
        if stop:
            saved = self.draft.new.get("checkpoint")
            where = f" The newest checkpoint is {saved['uri']}." if saved else ""
            return self._finish_complete(Reason.STOPPED, f"Stopped by spec.stop.{where}")
        self.draft.state(State.SUSPENDED)
        self.draft.set(Condition.SUSPENDED, True, Reason.SUSPENDED, "Suspended by spec.suspend; no pods are running.")
        self.draft.set(Condition.RUNNING, False, Reason.SUSPENDED)
        return Decision(self.draft.done(), tuple(self.actions), None if self.job.spec.suspend else 0.1)

    def _discard(self, child: Object | None) -> None:
        """Ends the pods before they can save: SIGTERM alone would not tell a suspension from a drain."""
        for pod in self._pods_of(child):
            if not _over(pod) and pod["metadata"].get("deletionGracePeriodSeconds", math.inf) > KILL_SECONDS:
                self.actions.append(EndPod(pod["metadata"]["name"], pod["metadata"]["uid"]))

    def _wait_for_pods(self, state: State, reason: str, message: str) -> Decision:
        self.draft.state(state)
        was_running = is_true(self.draft.old, Condition.RUNNING)
        # Running stays True until the pods are gone: they still hold their GPUs, and the time counts.
        self.draft.set(Condition.RUNNING, was_running, reason, message)
        if is_true(self.draft.old, Condition.SUSPENDED):
            self.draft.set(Condition.SUSPENDED, True, Reason.SUSPENDED)
        elif state is State.SUSPENDING:
            self.draft.set(Condition.SUSPENDED, False, Reason.SUSPENDING)
        return Decision(self.draft.done(), tuple(self.actions), WAIT_FOR_PODS_SECONDS)

    # ------------------------------------------------------------------------------------------------------ helpers ----
    def _leave(self, over: Ended | None) -> None:
        """The attempt is over: count its time."""
        self._tell_corrupt(over.report if over else None)
        self.draft.account(over, gpus_per_pod(self.job) * self.job.spec.trainer.num_nodes)
        if over and (begun := over.started or over.admitted):
            self.draft.new.setdefault("startTime", stamp(begun))

    def _ended(self, child: Object | None) -> Ended | None:
        """How the current attempt ended. One whose Job is gone ended too, unless that is how it was suspended."""
        if child is not None:
            return ended(child, self._pods_of(child))
        if not self.draft.new["attempt"] or is_true(self.draft.old, Condition.SUSPENDED):
            return None
        if done := done_before(self._pods_of(None)):
            return done
        before = find_condition(self.draft.old, Condition.RUNNING) or {}
        told = BY_REASON.get(before.get("reason", ""))
        if told and self.draft.old.get("state") == State.RESTARTING:
            return Ended(told, before["message"].removeprefix(f"{told.reason}: ").removesuffix(f" {_RESTARTING}"))
        return _NODE_LOST if any(self._lost(pod) for pod in self._pods_of(None)) else _CHILD_DELETED

    def _pods_of(self, child: Object | None) -> tuple[Object, ...]:
        """The pods of the current attempt. Those of a Job that is deleted may still save: they go by the uid that was noted."""
        current = child_name(self.job.metadata["name"], self.draft.new["attempt"])
        uid = child["metadata"]["uid"] if child is not None else recorded_uid(self.draft.old, current)
        return tuple(p for p in self.observed.pods if uid and owned_by(p, uid))

    def _alive(self) -> bool:
        """Whether a pod of any attempt may still be running. A pod on a lost node is not waited for: storage fences it."""
        trainers = (pod for pod in self.observed.pods if is_trainers(pod, self.job.metadata["name"]))
        return any(not _over(pod) and not self._lost(pod) for pod in trainers)

    def _lost(self, pod: Object) -> bool:
        """Whether the pod should have ended long ago, and nobody tells that it did."""
        after = _lost_after(pod)
        return after is not None and self.now > after and not _over(pod)

    def _replace_lost(self, child: Object) -> Decision:
        self.actions.append(DeleteJob(child["metadata"]["name"], child["metadata"]["uid"]))
        self.actions.append(Event("Warning", "NodeLost", _NODE_LOST.message))
        waiting = self._wait_for_pods(State.RESTARTING, "NodeLost", f"NodeLost: {_NODE_LOST.message}")
        return replace(waiting, requeue_after=1.0)


def _over(pod: Object) -> bool:
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def _lost_after(pod: Object) -> datetime | None:
    """When a pod that was asked to end is taken for lost."""
    grace_ends = parse_time(pod["metadata"].get("deletionTimestamp"))
    return grace_ends + timedelta(seconds=LOST_NODE_SECONDS) if grace_ends else None


def _why_pending(pods: tuple[Object, ...]) -> tuple[str, str]:
    """What the scheduler or the kubelet says about a pod that does not run."""
    for pod in pods:
        for status in pod.get("status", {}).get("containerStatuses") or []:
            waiting = status.get("state", {}).get("waiting") or {}
            if waiting.get("reason") and waiting["reason"] != "ContainerCreating":
                return waiting["reason"], waiting.get("message") or "The container cannot start yet."
        for condition in pod.get("status", {}).get("conditions") or []:
            if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
                return condition.get("reason") or "Unschedulable", condition.get("message") or ""
    return Reason.WAITING_FOR_PODS, "Waiting for the pod to start."
