"""The HyperparameterSweep resource: search this space with that template. One child FineTuneJob is one trial.

Spec only says what to search and how much to spend; what was found is in the status (sweep_status.py) and in the trials.
"""

import math
import re
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from finetune_api.base import Cel, EachOnce, Model, Shape
from finetune_api.finetunejob import FineTuneJobSpec
from finetune_api.names import API_VERSION, KIND_SWEEP, MAX_SWEEP_NAME_LENGTH
from finetune_api.placement import DnsName, LabelValue
from finetune_api.recipe import StorageUri
from finetune_api.sweep_rules import check
from finetune_api.sweep_space import MAX_WHOLE, Parameter, Point, exactly_one
from finetune_api.sweep_status import HyperparameterSweepStatus

MAX_TRIALS = 10_000
MUTABLE = (
    "numTrials", "parallelTrials", "maxFailedTrials", "budget", "stopWhen", "suspend", "onComplete", "ttlSecondsAfterFinished",
)  # fmt: skip
"""May change at any time; all else never does."""

MetricName = Annotated[
    str,
    StringConstraints(min_length=1, max_length=64),
    Shape(r"^[A-Za-z_][A-Za-z0-9_./-]*$", "must be a metric as an evaluation reports it, such as validation/macro_f1"),
]


class Direction(StrEnum):
    """Which values are better."""

    MAXIMIZE = "Maximize"
    MINIMIZE = "Minimize"


_NOT_TEST = "a sweep selects on validation data; the test split is read once, by the winner: use a validation/ metric"


class Objective(Model):
    """What the search is for."""

    metric: MetricName
    """Metric of the validation data that decides, such as validation/macro_f1. For a script of yours any metric that it reports."""
    direction: Direction
    """Which values are better."""
    goal: float | None = None
    """A value that is good enough: the sweep ends when a trial reaches it."""

    cel: ClassVar[tuple[Cel, ...]] = (Cel("!self.metric.startsWith('test/')", _NOT_TEST, ".metric"),)

    @field_validator("metric")
    @classmethod
    def _validation_only(cls, metric: str) -> str:
        if metric.startswith("test/"):
            raise ValueError(_NOT_TEST)
        return metric


class Constraint(Model):
    """A bound on another metric of the finished trial; a trial that breaks it cannot be the best."""

    metric: MetricName
    """Metric of the validation data."""
    min: float | None = None
    """Lowest value that is allowed."""
    max: float | None = None
    """Highest value that is allowed."""

    cel: ClassVar[tuple[Cel, ...]] = (
        Cel("!self.metric.startsWith('test/')", _NOT_TEST, ".metric"),
        Cel("has(self.min) || has(self.max)", "set min, max or both"),
        Cel(
            "!has(self.min) || !has(self.max) || self.min <= self.max",
            "min must not be greater than max: no value is allowed",
            ".min",
        ),
    )

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.metric.startswith("test/"):
            raise ValueError(f"metric: {_NOT_TEST}")
        if self.min is None and self.max is None:
            raise ValueError("set min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min: {self.min:g} is greater than max ({self.max:g}): no value is allowed")
        return self


# ------------------------------------------------------------------------------------------------------ algorithms ----
class Auto(Model):
    """GP for up to ten parameters, as long as trials are few enough for it; else TPE."""


class Grid(Model):
    """Every combination, in order. Ranges of numbers with decimals need `points`."""

    points: Annotated[int, Field(ge=2, le=1000)] = 5
    """How many values of a range are tried, ends included; a range of whole numbers has no more than it holds."""


class Random(Model):
    """Independent draws."""


class Sobol(Model):
    """Draws that cover the space evenly (a scrambled Sobol sequence)."""


class Tpe(Model):
    """Tree-structured Parzen estimator: draws where good trials are dense and bad ones are not. For any space."""

    startup_trials: Annotated[int, Field(ge=1, le=1000)] = 10
    """Trials that are drawn at random first."""


class Gp(Model):
    """Gaussian process: a model of the objective, and where it may still improve. For up to a few hundred trials."""

    startup_trials: Annotated[int, Field(ge=1, le=1000)] = 10
    """Trials that are drawn from a Sobol sequence first."""


ALGORITHMS = ("auto", "grid", "random", "sobol", "tpe", "gp")
_ONE_ALGORITHM = f"set exactly one of {', '.join(ALGORITHMS)}"


class SearchAlgorithm(Model):
    """How parameters are chosen; exactly one."""

    auto: Auto | None = None
    """GP or TPE, whichever suits the space."""
    grid: Grid | None = None
    """Every combination."""
    random: Random | None = None
    """Independent draws."""
    sobol: Sobol | None = None
    """Even coverage."""
    tpe: Tpe | None = None
    """Learns from the trials so far; any space, any number of trials."""
    gp: Gp | None = None
    """Learns from the trials so far; numbers, few trials."""

    cel: ClassVar[tuple[Cel, ...]] = (Cel(exactly_one(ALGORITHMS), _ONE_ALGORITHM),)

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if sum(getattr(self, name) is not None for name in ALGORITHMS) != 1:
            raise ValueError(_ONE_ALGORITHM)
        return self


class Asha(Model):
    """Asynchronous successive halving: at each rung only the best go on (Li et al., MLSys 2020; the stopping variant)."""

    min_examples: Annotated[int, Field(ge=1, le=MAX_WHOLE)]
    """The first rung: training examples that every trial sees before it may be stopped. It should take much longer than the start of a
    trial; about a tenth of epochs times the training examples is usual."""
    reduction_factor: Annotated[int, Field(ge=2, le=16)] = 3
    """Of the trials at a rung the best one in so many goes on; the next rung is so many times as far."""
    max_rungs: Annotated[int, Field(ge=1, le=10)] = 4
    """How many rungs there are."""


class Median(Model):
    """Stops a trial that is worse than the median of the others at the same number of examples."""

    min_examples: Annotated[int, Field(ge=1, le=MAX_WHOLE)]
    """The first time of judgement: training examples that every trial sees before it may be stopped."""
    every_examples: Annotated[int, Field(ge=1, le=MAX_WHOLE)] | None = None
    """Distance to the next. Default: minExamples."""
    max_rungs: Annotated[int, Field(ge=1, le=32)] = 8
    """How many times a trial is judged at most."""
    min_trials: Annotated[int, Field(ge=2, le=1000)] = 5
    """So many trials must have come so far before any is stopped."""


class NoPruning(Model):
    """Every trial runs to its end."""


PRUNERS = ("asha", "median", "none")
_ONE_PRUNER = f"set exactly one of {', '.join(PRUNERS)}"


class PruneAlgorithm(Model):
    """Which trials are stopped early; exactly one."""

    asha: Asha | None = None
    """At each rung only the best go on."""
    median: Median | None = None
    """Who is worse than the median is stopped."""
    none: NoPruning | None = None
    """Nobody is stopped."""

    cel: ClassVar[tuple[Cel, ...]] = (Cel(exactly_one(PRUNERS), _ONE_PRUNER),)

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if sum(getattr(self, name) is not None for name in PRUNERS) != 1:
            raise ValueError(_ONE_PRUNER)
        return self

    @property
    def rungs(self) -> tuple[int, ...]:
        """Numbers of training examples seen at which a trial is judged, rising."""
        if self.asha is not None:
            asha = self.asha
            return tuple(asha.min_examples * asha.reduction_factor**k for k in range(asha.max_rungs))
        if self.median is not None:
            median = self.median
            return tuple(
                median.min_examples + k * (median.every_examples or median.min_examples) for k in range(median.max_rungs)
            )
        return ()


class Budget(Model):
    """What the sweep may cost. When it is spent, no trial is begun; whether running ones end, says onComplete."""

    gpu_seconds: Annotated[int, Field(ge=1)] | None = None
    """GPU-seconds of all trials together: what their pods ran, restarts included, times their GPUs."""
    active_seconds: Annotated[int, Field(ge=1)] | None = None
    """Seconds that pods ran, of all trials together."""


class StopWhen(Model):
    """When it is not worth to go on."""

    no_improvement_trials: Annotated[int, Field(ge=1, le=MAX_TRIALS)] | None = None
    """So many trials in a row, in the order in which they were begun, that ended without a new best."""


class OnComplete(StrEnum):
    """What becomes of trials that still run when the sweep has what it wants."""

    STOP_TRIALS = "StopTrials"
    LET_FINISH = "LetFinish"


class SweepReference(Model):
    """Another sweep of the same namespace."""

    name: DnsName
    """Its name."""


class Promote(Model):
    """The best trials are repeated with other seeds, and the best mean wins: another seed alone moves a score."""

    storage_uri: StorageUri
    """Receives the winner: model/ and result.json with its metrics, those of the test split too."""
    top_k: Annotated[int, Field(ge=1, le=20)] = 1
    """How many of the best trials are repeated."""
    seeds: Annotated[int, Field(ge=0, le=20)] = 0
    """How many further seeds each of them is trained with; 0 takes the best trial as it is."""


class TrialMetadata(Model):
    """Labels and annotations of every trial."""

    labels: Annotated[dict[str, LabelValue], Field(max_length=64)] = {}
    """Labels. A label kueue.x-k8s.io/queue-name sends each trial through that queue."""
    annotations: Annotated[dict[str, Annotated[str, StringConstraints(max_length=65536)]], Field(max_length=64)] = {}
    """Annotations."""


class TrialTemplate(Model):
    """The FineTuneJob that every trial is, before its parameters are set."""

    metadata: TrialMetadata = TrialMetadata()
    """Labels and annotations."""
    spec: FineTuneJobSpec
    """The job. Each trial writes to a folder of its own below output.storageUri. dataset.test is read by the winner alone."""

    cel: ClassVar[tuple[Cel, ...]] = (
        Cel("!self.spec.suspend && !self.spec.stop", "suspend and stop are the sweep's: set spec.suspend of the sweep", ".spec"),
        Cel(
            "!has(self.spec.checkpoint) || !has(self.spec.checkpoint.storageUri)",
            "checkpoint.storageUri would be shared by all trials: leave it out, each keeps its checkpoints below its own output",
            ".spec",
        ),
        Cel(
            "!has(self.spec.evaluation) || !has(self.spec.evaluation.atExamples)",
            "evaluation.atExamples is set from pruneAlgorithm: leave it out",
            ".spec",
        ),
    )

    @model_validator(mode="after")
    def _is_a_template(self) -> Self:
        if self.spec.suspend or self.spec.stop:
            raise ValueError("spec: suspend and stop are the sweep's: set spec.suspend of the sweep")
        if self.spec.checkpoint.storage_uri is not None:
            raise ValueError(
                "spec: checkpoint.storageUri would be shared by all trials: leave it out, each keeps its checkpoints below its own output"
            )
        if self.spec.evaluation.at_examples is not None:
            raise ValueError("spec: evaluation.atExamples is set from pruneAlgorithm: leave it out")
        return self


# ------------------------------------------------------------------------------------------------------------ spec ----
_PRUNES = "has(self.pruneAlgorithm) && !has(self.pruneAlgorithm.none)"


class HyperparameterSweepSpec(Model):
    """What to search, how, and at what cost."""

    objective: Objective
    """What the search is for."""
    constraints: Annotated[list[Constraint], Field(max_length=16), EachOnce("metric")] = []
    """Bounds on further metrics."""
    parameters: Annotated[list[Parameter], Field(min_length=1, max_length=64)]
    """The search space. The order means something: a grid goes through the last parameter first, and conditions look back."""
    search_algorithm: SearchAlgorithm = SearchAlgorithm(auto=Auto())
    """How parameters are chosen."""
    prune_algorithm: PruneAlgorithm = PruneAlgorithm(none=NoPruning())
    """Which trials are stopped early."""
    initial_points: Annotated[list[Point], Field(max_length=256)] = []
    """Parameters by name of the first trials, for example those that are in use now. What a point leaves out is chosen for it."""
    warm_start_from: SweepReference | None = None
    """Another sweep over the same parameters, whose finished trials the search learns from first. Their values count by rank."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 42
    """Of the search. The trials' own seed is trialTemplate.spec.hyperparameters.seed, the same for all."""
    num_trials: Annotated[int, Field(ge=1, le=MAX_TRIALS)]
    """How many trials there are at most."""
    parallel_trials: Annotated[int, Field(ge=1, le=1000)] = 2
    """How many run at a time. Searches that learn do best with a tenth of numTrials or less."""
    max_failed_trials: Annotated[int, Field(ge=0, le=MAX_TRIALS)] | None = None
    """More failed trials than so many end the sweep as Failed. Default: a fifth of numTrials, at least 3."""
    budget: Budget = Budget()
    """What the sweep may cost."""
    stop_when: StopWhen = StopWhen()
    """When it is not worth to go on."""
    suspend: bool = False
    """True suspends all trials (each saves a checkpoint) and begins no more; false goes on."""
    on_complete: OnComplete = OnComplete.STOP_TRIALS
    """What becomes of trials that still run when the goal or the budget is reached, or nothing improves."""
    promote: Promote | None = None
    """What becomes of the best model. Without it, it stays where its trial wrote it."""
    trial_template: TrialTemplate
    """The FineTuneJob of a trial."""
    managed_by: Annotated[str, StringConstraints(min_length=1, max_length=253)] | None = None
    """Another controller that runs this sweep; this operator then leaves it alone."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """The sweep and its trials are deleted so many seconds after its end (what is in storage stays). Leave it unset under GitOps."""

    cel: ClassVar[tuple[Cel, ...]] = (
        Cel(
            "self.parameters.all(p, self.parameters.exists_one(q, q.name == p.name))",
            "parameters must have different names",
            ".parameters",
        ),
        Cel(
            f"!({_PRUNES}) || self.parameters.all(p, !has(p.path) || !(p.path in ['hyperparameters.epochs', 'hyperparameters.maxSteps']))",
            "hyperparameters.epochs and maxSteps cannot be searched with pruning: trials would be judged at unequal parts of their schedule",
            ".parameters",
        ),
        Cel(
            "self.parameters.all(p, !has(p.env)) || (has(self.trialTemplate.spec.trainer) && has(self.trialTemplate.spec.trainer.command))",
            "parameters with env need trialTemplate.spec.trainer.command",
            ".parameters",
        ),
        Cel(
            "!has(self.promote) || (has(self.trialTemplate.spec.task) && "
            "(!has(self.trialTemplate.spec.trainer) || !has(self.trialTemplate.spec.trainer.command) || "
            "size(self.trialTemplate.spec.trainer.command) == 0))",
            "promote needs our own trainer: a script's model is where the script puts it",
            ".promote",
        ),
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        check(self)
        return self

    @property
    def failures_allowed(self) -> int:
        """maxFailedTrials, or what it is by default."""
        return self.max_failed_trials if self.max_failed_trials is not None else max(3, math.ceil(self.num_trials / 5))


class HyperparameterSweep(Model):
    """Searches hyperparameters: trains one FineTuneJob for each trial, stops bad ones early, and keeps the best model."""

    api_version: Literal["finetune.dev/v1alpha1"] = API_VERSION  # type: ignore[assignment]
    """Group and version of this schema."""
    kind: Literal["HyperparameterSweep"] = KIND_SWEEP  # type: ignore[assignment]
    """HyperparameterSweep."""
    metadata: dict[str, Any]
    """Name, namespace, labels and annotations."""
    spec: HyperparameterSweepSpec
    """What to search, how, and at what cost."""
    status: HyperparameterSweepStatus | None = None
    """How far the search is, the best trials, what it has cost."""

    cel: ClassVar[tuple[Cel, ...]] = (
        Cel(
            f"self.metadata.name.size() <= {MAX_SWEEP_NAME_LENGTH} && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
            f"metadata.name must be at most {MAX_SWEEP_NAME_LENGTH} characters: lower-case letters, digits and '-', "
            "beginning with a letter",
        ),
    )

    @field_validator("metadata")
    @classmethod
    def _name(cls, metadata: dict[str, Any]) -> dict[str, Any]:
        name = metadata.get("name")
        if not isinstance(name, str) or not re.fullmatch(rf"[a-z]([-a-z0-9]{{0,{MAX_SWEEP_NAME_LENGTH - 2}}}[a-z0-9])?", name):
            raise ValueError(
                f"name: {name!r} is not allowed: at most {MAX_SWEEP_NAME_LENGTH} characters: lower-case letters, digits and '-', "
                "beginning with a letter"
            )
        return metadata
