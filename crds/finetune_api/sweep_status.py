"""The status of a HyperparameterSweep. Bounded: no list grows with the number of trials (below 64 KiB at 3,000 of them)."""

from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, StringConstraints

from finetune_api.base import EachOnce, Model
from finetune_api.finetunejob import Count, MetricValue, Result, StatusCondition

TOP = 10
Short = Annotated[str, StringConstraints(max_length=256)]
Number = Annotated[str, StringConstraints(max_length=64)]


class SweepPlan(Model):
    """What will be done, known before the first trial; the costs after the first trials."""

    trials: Count
    """Trials at most."""
    cells: Count | None = None
    """Cells of the grid."""
    algorithm: Short
    """The search algorithm in use: what `auto` came to."""
    rungs: Annotated[list[Count], Field(max_length=32)] = []
    """Training examples seen at which a trial is judged."""
    expected_active_seconds: Count | None = None
    """What the trials will have run at the end if they go on as so far."""
    expected_gpu_seconds: Count | None = None
    """The same times their GPUs."""


class TrialCounts(Model):
    """Trials by what has become of them; they add up to `created`."""

    created: Count = 0
    """Trials so far. Their numbers are 0 to created - 1."""
    pending: Count = 0
    """Not running yet, waiting in a queue, or suspended."""
    running: Count = 0
    """Running, restarting or saving."""
    complete: Count = 0
    """Ran to their end."""
    pruned: Count = 0
    """Stopped early by pruneAlgorithm."""
    stopped: Count = 0
    """Stopped by the end of the sweep, or by hand."""
    failed: Count = 0
    """Failed in a way that their parameters can have caused: out of memory, a loss that is not finite."""
    lost: Count = 0
    """Failed for another reason; the search does not learn from it."""
    deleted: Count = 0
    """Deleted by somebody. They are not made again."""


class ParameterValue(Model):
    """A parameter of a trial."""

    name: Short
    """Name of the parameter."""
    value: Short
    """Its value."""


class TrialSummary(Model):
    """One of the best trials."""

    trial: Short
    """Name of its FineTuneJob."""
    value: Number
    """Its objective."""
    parameters: Annotated[list[ParameterValue], Field(max_length=64)] = []
    """Its parameters."""
    model_uri: Annotated[str, StringConstraints(max_length=2048)] | None = None
    """Where its model is."""


class RungStatus(Model):
    """How trials fared at one rung."""

    examples: Count
    """Training examples seen."""
    reached: Count
    """Trials that were judged here."""
    stopped: Count
    """Of them those that were stopped."""
    best: Number | None = None
    """The best value here."""


class Importance(Model):
    """How much a parameter decides, estimated from the trials so far."""

    name: Short
    """Name of the parameter."""
    share: Number
    """Its share; all shares add up to 1."""


class Repetition(Model):
    """One of the best trials, with the seeds that it was repeated with."""

    trial: Short
    """Name of the trial."""
    mean: Number | None = None
    """Mean of the objective over its seeds, once all have ended."""
    values: Annotated[list[Number], Field(max_length=21)] = []
    """The objective of each seed, the trial's own first."""


class HyperparameterSweepStatus(Model):
    """What happens now, the best trials, and what the search has cost."""

    observed_generation: int | None = None
    """Generation of the spec that this was written for."""
    state: str | None = None
    """One word for people: Pending, Running, Suspended, Promoting, Stopping, Complete or Failed. Programs read the conditions."""
    conditions: Annotated[list[StatusCondition], Field(max_length=16), EachOnce("type")] = []
    """Running, Suspended, Complete and Failed; set on first sight."""
    start_time: AwareDatetime | None = None
    """When the first trial was created."""
    completion_time: AwareDatetime | None = None
    """When the sweep became Complete or Failed."""
    plan: SweepPlan | None = None
    """What will be done."""
    trials: TrialCounts | None = None
    """Trials by what has become of them."""
    best: TrialSummary | None = None
    """The best trial that keeps all constraints."""
    top: Annotated[list[TrialSummary], Field(max_length=TOP)] = []
    """The ten best; where a space is wide, some without their parameters."""
    rungs: Annotated[list[RungStatus], Field(max_length=32), EachOnce("examples")] = []
    """How trials fared at each rung."""
    importance: Annotated[list[Importance], Field(max_length=64), EachOnce("name")] = []
    """What decides, once ten trials have run to their end."""
    progress: Short | None = None
    """Trials that ended, of all that there will be."""
    estimated_remaining_seconds: Count | None = None
    """Time left at the present pace."""
    active_seconds: Count | None = None
    """Seconds that pods of trials ran."""
    gpu_seconds: Count | None = None
    """The same times their GPUs."""
    gpu_seconds_saved: Count | None = None
    """GPU-seconds that stopped trials would have taken to their end, by the pace of each."""
    finished: Literal["GoalReached", "TrialsDone", "BudgetSpent", "NoImprovement", "TooManyFailed"] | None = None
    """Why no further trial is begun, once that is decided."""
    finished_message: Annotated[str, StringConstraints(max_length=1024)] | None = None
    """The same in a sentence."""
    repetitions: Annotated[list[Repetition], Field(max_length=20), EachOnce("trial")] = []
    """The best trials with other seeds (promote.seeds)."""
    result: Result | None = None
    """The model that was promoted, with its metrics."""
    history_uri: Annotated[str, StringConstraints(max_length=2048)] | None = None
    """The file with all trials."""
    metrics: Annotated[list[MetricValue], Field(max_length=64)] = []
    """Metrics of the best trial."""
