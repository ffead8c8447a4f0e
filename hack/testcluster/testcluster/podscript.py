"""What a scripted pod does: the vocabulary of the tests.

Why it exists: a failure is told by many fields at once (phase, reason, exit code, conditions), and tests should name the
failure and not spell the fields. The shapes are those that kubelet and scheduler write.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SIGTERM_EXIT, SIGKILL_EXIT = 143, 137


@dataclass(frozen=True)
class PodScript:
    """The life of one pod: waits `pending_seconds`, is bound, runs `seconds` and ends with `exit_code`.

    When the pod is deleted while it runs, it takes `term_seconds` and ends with `term_exit_code` (with 137 if its grace
    period is shorter). `seconds=math.inf` runs until deleted or until `PodRunner.finish`.
    """

    pending_seconds: float = 0.0
    unschedulable: str = ""  # the scheduler's message; the pod is never bound
    waiting: str = ""  # the container's waiting reason; the pod never runs
    waiting_message: str = ""
    seconds: float = 0.0
    exit_code: int = 0
    reason: str = ""  # of the terminated container; empty: Completed or Error
    message: str = ""  # what the container left in its termination log
    pod_reason: str = ""  # status.reason, for example Evicted
    pod_message: str = ""
    disruption: str = ""  # reason of a DisruptionTarget condition
    term_seconds: float = 0.0
    term_exit_code: int = SIGTERM_EXIT
    term_message: str = ""


@dataclass(frozen=True)
class RunProcess:
    """The pod's own command as a local process; see `podprocess`."""

    pending_seconds: float = 0.0


type Script = Callable[[dict[str, Any]], PodScript | RunProcess]


def run_process(_pod: dict[str, Any]) -> RunProcess:
    """A callback that runs every pod as a process."""
    return RunProcess()


def succeed(seconds: float = 0.0, message: str = "") -> PodScript:
    """Runs and ends with 0."""
    return PodScript(seconds=seconds, message=message)


def fail(exit_code: int = 1, message: str = "", seconds: float = 0.0) -> PodScript:
    """Runs and ends with an error of its own."""
    return PodScript(seconds=seconds, exit_code=exit_code, message=message)


def oom_killed(seconds: float = 0.0) -> PodScript:
    """The container reached its memory limit."""
    return PodScript(seconds=seconds, exit_code=SIGKILL_EXIT, reason="OOMKilled")


def evicted(seconds: float = 0.0) -> PodScript:
    """The kubelet removed it because the node ran out of something."""
    return PodScript(
        seconds=seconds,
        exit_code=SIGKILL_EXIT,
        pod_reason="Evicted",
        pod_message="The node was low on resource: memory.",
        disruption="TerminationByKubelet",
    )


def disrupted(seconds: float = 0.0, reason: str = "PreemptionByScheduler") -> PodScript:
    """The cluster took it away (preemption, drain, lost node): a DisruptionTarget condition, then SIGTERM's exit code."""
    return PodScript(seconds=seconds, exit_code=SIGTERM_EXIT, disruption=reason)


def image_pull_backoff(message: str = 'Back-off pulling image: rpc error: code = NotFound desc = "not found"') -> PodScript:
    """The image cannot be pulled; stays Pending."""
    return PodScript(waiting="ImagePullBackOff", waiting_message=message)


def unschedulable(message: str = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu.") -> PodScript:
    """No node fits; stays Pending without a node."""
    return PodScript(unschedulable=message)


def hang(exit_code_on_term: int = SIGTERM_EXIT, term_seconds: float = 0.0, message_on_term: str = "") -> PodScript:
    """Runs until it is deleted (or until `PodRunner.finish`)."""
    return PodScript(
        seconds=math.inf, term_exit_code=exit_code_on_term, term_seconds=term_seconds, term_message=message_on_term
    )
