"""What the pure part of the operator takes and gives: the observed world, the decision, the actions.

`control` fills an Observed with live reads, calls `decide`, applies the actions in order and writes the status once.
Objects of the API server are plain dicts, as JSON has them.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from finetune_api import JobDefaults
from finetune_api.report import ProgressReport, Saving

Object = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What the operator's command line decides about every job."""

    trainer_image: str
    progress_url: str
    """https://host:port under which pods reach the progress server, without a path."""
    progress_ca: str
    """PEM of the CA that signed the progress server's certificate."""
    model_mirror: str | None = None
    """Value of FINETUNE_MODEL_MIRROR in every pod."""
    dataset_mirror: str | None = None
    """Value of FINETUNE_DATASET_MIRROR in every pod."""
    defaults: JobDefaults = field(default_factory=JobDefaults)
    """What a job that says nothing gets; the next attempt of a job that runs gets new ones."""
    restart_backoff_seconds: float = 10.0
    """Wait before the first counted restart; doubles with each, up to MAX_BACKOFF_SECONDS."""


@dataclass(frozen=True)
class Progress:
    """The newest report of one attempt, already authenticated as coming from a pod of it."""

    report: ProgressReport
    received: datetime
    attempt: int
    job_uid: str
    """Of the resource that the attempt is of: another may have its name by now."""
    arrival: int = 0
    """Counts the posts as they begin: an answer about an older one's token may come later."""


@dataclass(frozen=True)
class Observed:
    """One FineTuneJob and all that belongs to it, read live."""

    job: Object
    child: Object | None = None
    """The Job of the attempt in status.attempt."""
    next_child: Object | None = None
    """The Job of the attempt after it; read where `child` is absent or finished. It exists when the operator died between
    creating it and writing the status."""
    pods: tuple[Object, ...] = ()
    """All pods labelled with this job, of any attempt; who made them is for `decide` to look at."""
    progress: Progress | None = None
    create_error: str | None = None
    """What the API server said when it refused the child Job that the last decision wanted."""


@dataclass(frozen=True)
class CreateJob:
    """Create this child Job; AlreadyExists is success if our resource owns it, else a name conflict."""

    manifest: Object
    service: Object | None = None
    """The headless Service under which several pods find each other; made first, once for all attempts."""


@dataclass(frozen=True)
class DeleteJob:
    """Delete this child Job with background propagation, only if it still has this uid; NotFound is success."""

    name: str
    uid: str


@dataclass(frozen=True)
class EndPod:
    """End this pod within KILL_SECONDS, whatever it is doing, only if it still has this uid; NotFound is success."""

    name: str
    uid: str


@dataclass(frozen=True)
class Event:
    """Tell the user (`kubectl describe`)."""

    type: str
    reason: str
    message: str


Action = CreateJob | DeleteJob | EndPod | Event


@dataclass(frozen=True)
class Decision:
    """What to do. `status` is whole; it is written when it differs from the stored one."""

    status: Object
    actions: tuple[Action, ...] = ()
    requeue_after: float | None = None
    """Seconds until the next look without an event."""
    finished: bool = False
    """The resource is Complete or Failed: nothing is left to do, now or later."""
    saving: Saving | None = None
    """What checkpoints have cost the current attempt so far, as far as it is known; for the metrics."""
