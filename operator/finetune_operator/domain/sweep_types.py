"""What the decision about a sweep takes and gives: the observed world, the actions, the decision. As types.py for a job."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from finetune_operator.domain.types import CreateJob, Event, Object


@dataclass(frozen=True)
class SweepObserved:
    """One HyperparameterSweep and all that belongs to it."""

    sweep: Object
    trials: Mapping[int, Object] = field(default_factory=dict)
    """FineTuneJobs of the trials that this sweep owns, by number."""
    repeats: Mapping[str, Object] = field(default_factory=dict)
    """FineTuneJobs that repeat the best, by name."""
    warm: Object | None = None
    """The sweep that warmStartFrom names."""
    warm_trials: Sequence[Object] = ()
    """Its trials."""
    closing: Object | None = None
    """The Job that writes history and promotes."""
    closing_pods: Sequence[Object] = ()
    refused: str | None = None
    """What the API server said when it refused what the last decision wanted."""


@dataclass(frozen=True)
class CreateTrial:
    """Create this FineTuneJob. One that exists and is the sweep's own ends this round: its parameters win."""

    manifest: Object


@dataclass(frozen=True)
class PatchTrial:
    """Merge this into a FineTuneJob, only if it still has this uid; NotFound is success."""

    name: str
    uid: str
    patch: Object


@dataclass(frozen=True)
class DeleteSweep:
    """The sweep has outlived ttlSecondsAfterFinished."""

    name: str
    uid: str


SweepAction = CreateTrial | PatchTrial | CreateJob | DeleteSweep | Event


@dataclass(frozen=True)
class SweepDecision:
    """What to do, in this order; then the status is written when it differs."""

    status: Object
    actions: tuple[SweepAction, ...] = ()
    requeue_after: float | None = None
    finished: bool = False
