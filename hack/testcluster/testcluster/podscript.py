"""What a scripted pod does, as data: how long it runs and how it ends."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class PodScript:
    """One pod's life. `seconds` None runs until `PodRunner.finish` or deletion."""

    seconds: float | None = 0.2
    exit_code: int = 0
    message: str = ""
    reason: str = ""
    """Of the terminated container: Completed, Error or OOMKilled; empty: by the exit code."""
    pod_reason: str = ""
    """`status.reason`, for example Evicted."""
    conditions: tuple[dict[str, Any], ...] = field(default=())
    waiting: dict[str, str] | None = None
    """A waiting state instead of a run: {"reason": "ImagePullBackOff", "message": ...}."""
    schedulable: bool = True
    exit_code_on_term: int = 143
    seconds_on_term: float = 0.0
    """How long it takes to end when it is asked to; past its grace period, which may be cut short, it is killed (137)."""


@dataclass(frozen=True)
class RunProcess:
    """Run the pod's own command as a local process."""


def succeed(seconds: float = 0.2, message: str = "") -> PodScript:
    """Runs and ends with 0."""
    return PodScript(seconds, 0, message)


def fail(exit_code: int = 1, message: str = "", seconds: float = 0.2) -> PodScript:
    """Runs and ends with this code."""
    return PodScript(seconds, exit_code, message)


def oom_killed(seconds: float = 0.2) -> PodScript:
    """Killed by the kernel for its memory limit."""
    return PodScript(seconds, 137, reason="OOMKilled")


def evicted(seconds: float = 0.2) -> PodScript:
    """Evicted by the kubelet."""
    return PodScript(seconds, 137, pod_reason="Evicted", conditions=(_disruption("TerminationByKubelet"),))


def disrupted(seconds: float = 0.2, reason: str = "EvictionByEvictionAPI") -> PodScript:
    """Ended by the cluster, as a drain or a preemption does."""
    return PodScript(seconds, 143, conditions=(_disruption(reason),))


def image_pull_backoff() -> PodScript:
    """Never starts: the image cannot be pulled."""
    return PodScript(None, waiting={"reason": "ImagePullBackOff", "message": "Back-off pulling image"})


def unschedulable() -> PodScript:
    """Never gets a node."""
    return PodScript(None, schedulable=False)


def hang(exit_code_on_term: int = 143) -> PodScript:
    """Runs until it is told to end."""
    return PodScript(None, exit_code_on_term=exit_code_on_term)


def run_process(_pod: dict[str, Any]) -> RunProcess:
    """A script callback: every pod is a process."""
    return RunProcess()


def _disruption(reason: str) -> dict[str, Any]:
    return {"type": "DisruptionTarget", "status": "True", "reason": reason, "message": "by the test"}
