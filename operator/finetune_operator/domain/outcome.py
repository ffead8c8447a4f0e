"""How an attempt ended: reads the child Job's conditions and its pod, and names the root cause.

The best witness comes first: the trainer's own termination message, then what the kubelet says about the container and the pod,
then the Job's condition, which is all that is left when the pod is gone.
"""

import json
import re
from dataclasses import dataclass
from datetime import datetime

from finetune_api.failures import BY_EXIT_CODE, BY_REASON, FailureClass
from finetune_api.names import CONTAINER
from finetune_api.report import EndReport, Outcome
from finetune_operator.domain.types import Object

_EXIT_CODE = re.compile(r"exit code (\d+)")
# Reasons of the pod condition DisruptionTarget (KEP-3329) and what they mean to us.
_DISRUPTIONS = {"TerminationByKubelet": "Evicted", "DeletionByPodGC": "NodeLost", "DeletionByTaintManager": "NodeLost"}


@dataclass(frozen=True)
class Ended:
    """An attempt that is over. `failure` is None when it ended well."""

    failure: FailureClass | None
    message: str
    report: EndReport | None = None
    started: datetime | None = None
    finished: datetime | None = None
    admitted: datetime | None = None
    """When its Job began, pods or not: what is left to count from when a pod is gone that nobody saw running."""


def parse_time(text: str | None) -> datetime | None:
    """A metav1.Time."""
    return datetime.fromisoformat(text) if text else None


def true_condition(obj: Object, kind: str) -> Object | None:
    """The condition of this type if it is True."""
    for condition in obj.get("status", {}).get("conditions") or []:
        if condition.get("type") == kind and condition.get("status") == "True":
            found: Object = condition
            return found
    return None


def terminated(pod: Object) -> Object | None:
    """`state.terminated` of the trainer's container."""
    for status in pod.get("status", {}).get("containerStatuses") or []:
        if status.get("name") == CONTAINER:
            state: Object | None = status.get("state", {}).get("terminated")
            return state
    return None


def started_at(pod: Object) -> datetime | None:
    """When the trainer's container began to run."""
    for status in pod.get("status", {}).get("containerStatuses") or []:
        if status.get("name") == CONTAINER:
            state = status.get("state", {})
            running = state.get("running") or state.get("terminated") or {}
            return parse_time(running.get("startedAt"))
    return None


def end_report(pod: Object) -> EndReport | None:
    """The trainer's termination message, or None: another program's words, a log tail, or cut-off JSON are no report."""
    message = (terminated(pod) or {}).get("message") or ""
    try:
        return EndReport.model_validate(json.loads(message))
    except (ValueError, RecursionError):  # json recurses with the nesting of what it reads
        return None


def ended(child: Object, pods: tuple[Object, ...]) -> Ended | None:
    """How this Job ended, or None while it has not. `pods` are those of this Job."""
    pod = max(pods, key=_tells, default=None)
    report = end_report(pod) if pod else None
    begun = started_at(pod) if pod else None
    admitted = parse_time(child.get("status", {}).get("startTime"))
    if complete := true_condition(child, "Complete"):
        over = _finished_at(pod) or parse_time(complete.get("lastTransitionTime"))
        return Ended(None, report.message if report else "", report, begun, over, admitted)
    failed = true_condition(child, "Failed")
    if failed is None:
        return None
    if done := done_before(pods):
        return done
    failure, message = _root_cause(child, failed, pod, report)
    over = _finished_at(pod) or parse_time(failed.get("lastTransitionTime"))
    return Ended(failure, message, report, begun, over, admitted)


def done_before(pods: tuple[Object, ...]) -> Ended | None:
    """What the trainer that publishes has said, where it was done before its process, or its Job, was ended: the result is durable."""
    return _leader_said(pods, None, Outcome.COMPLETE, Outcome.ALREADY_COMPLETED)


def saved_before(pods: tuple[Object, ...]) -> Ended | None:
    """The same where it was asked to end, and ended once the step that it was at was saved."""
    return _leader_said(pods, BY_REASON["Interrupted"], Outcome.INTERRUPTED)


def _leader_said(pods: tuple[Object, ...], failure: FailureClass | None, *outcomes: Outcome) -> Ended | None:
    for pod in pods:
        report = end_report(pod)
        if _index(pod) == "0" and report and report.outcome in outcomes:
            return Ended(failure, report.message, report, started_at(pod), _finished_at(pod))
    return None


def _index(pod: Object) -> str:
    index: str = (pod["metadata"].get("annotations") or {}).get("batch.kubernetes.io/job-completion-index", "0")
    return index


def _tells(pod: Object) -> tuple[int, int, float]:
    """How much this pod knows about the end, for several pods: one that says why comes before those that only lost their peer, then
    rank 0, then the one that ended first."""
    report, state = end_report(pod), terminated(pod) or {}
    told = report is not None and report.reason not in ("", "Interrupted", "UserCodeError")
    cause = told or state.get("reason") == "OOMKilled" or true_condition(pod, "DisruptionTarget") is not None
    over = parse_time(state.get("finishedAt"))
    return 1 if cause else 0, 1 if _index(pod) == "0" else 0, -over.timestamp() if over else 0.0


def _finished_at(pod: Object | None) -> datetime | None:
    return parse_time((terminated(pod) or {}).get("finishedAt")) if pod else None


def _root_cause(child: Object, failed: Object, pod: Object | None, report: EndReport | None) -> tuple[FailureClass, str]:
    name = child["metadata"]["name"]
    if pod is None:
        return _from_condition(failed, name)
    disruption = true_condition(pod, "DisruptionTarget")
    interrupted = report is not None and report.reason == "Interrupted"
    if report and report.reason in BY_REASON and not (interrupted and disruption):
        return BY_REASON[report.reason], report.message
    state = terminated(pod) or {}
    if state.get("reason") == "OOMKilled":
        return BY_REASON["OOMKilled"], (
            "The container used more memory than its limit: raise trainer.resourcesPerNode.limits.memory or lower "
            "hyperparameters.batchSize."
        )
    if disruption or pod.get("status", {}).get("reason") == "Evicted":
        reason = (disruption or {}).get("reason", "TerminationByKubelet")
        failure = BY_REASON[_DISRUPTIONS.get(reason, "Disrupted")]
        return failure, f"The pod was ended by the cluster ({reason})."
    code = state.get("exitCode")
    if code in BY_EXIT_CODE:
        return BY_EXIT_CODE[code], f"The trainer ended with exit code {code}: {BY_EXIT_CODE[code].meaning}."
    if code is None and pod["metadata"].get("deletionTimestamp"):
        return BY_REASON["ChildDeleted"], "The pod was deleted."
    return BY_REASON["UserCodeError"], f"The trainer ended with exit code {code}; its log: kubectl logs job/{name}"


def _from_condition(failed: Object, name: str) -> tuple[FailureClass, str]:
    said = failed.get("message") or ""
    if "DisruptionTarget" in said:
        return BY_REASON["Disrupted"], "The pod was ended by the cluster."
    if match := _EXIT_CODE.search(said):
        code = int(match.group(1))
        failure = BY_EXIT_CODE.get(code, BY_REASON["UserCodeError"])
        return failure, f"The trainer ended with exit code {code}: {failure.meaning}."
    return BY_REASON["ChildDeleted"], f"The pod of Job {name} is gone ({failed.get('reason')})."
