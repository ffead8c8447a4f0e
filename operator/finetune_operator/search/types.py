"""What the sweep engine takes and gives: the space, the records of the trials, its decisions. No objects of Kubernetes.

Who calls it makes a `Trial` of each trial object (domain/trials.py), always in the order of their numbers, and keeps what it decides.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from finetune_api.sweep import Direction, HyperparameterSweepSpec
from finetune_api.sweep_space import Parameter, Scalar


class Outcome(StrEnum):
    """What has become of a trial, as far as the search may know."""

    OPEN = "Open"
    """It runs, waits or is suspended."""
    COMPLETE = "Complete"
    """It ran to its end, and has a value."""
    PRUNED = "Pruned"
    """It was judged to stop; its readings are all that is known of it."""
    FAILED = "Failed"
    """It failed in a way that its parameters can have caused."""
    IGNORED = "Ignored"
    """Nothing is learned from it: it failed for another reason, was stopped without a verdict, or is gone. Its number stays taken."""


@dataclass(frozen=True)
class Reading:
    """The objective of a trial at a rung."""

    examples: int
    """The rung: training examples seen."""
    value: float


@dataclass(frozen=True)
class Trial:
    """One trial, as far as it was known at some moment."""

    index: int
    parameters: Mapping[str, Scalar]
    """Of those that are in use, by name. Empty for one that is gone."""
    outcome: Outcome = Outcome.OPEN
    readings: tuple[Reading, ...] = ()
    """One for each rung that was reached, rising. Of a complete trial for all rungs: those behind its end have its best value."""
    value: float | None = None
    """The objective of its best model, of a complete trial."""
    violations: tuple[float, ...] = ()
    """Of a complete trial one number for each constraint; above 0 it is broken, by so much."""

    @property
    def feasible(self) -> bool:
        return all(v <= 0 for v in self.violations)


@dataclass(frozen=True)
class Study:
    """What does not change during a sweep."""

    spec: HyperparameterSweepSpec
    prior: tuple[Trial, ...] = ()
    """Complete trials of the sweep that this one starts warm from; their numbers mean nothing here."""

    @property
    def parameters(self) -> list[Parameter]:
        return list(self.spec.parameters)

    @property
    def sign(self) -> float:
        """Times the objective gives what is to be minimised."""
        return -1.0 if self.spec.objective.direction is Direction.MAXIMIZE else 1.0


@dataclass(frozen=True)
class Suggestion:
    """Parameters for one trial."""

    parameters: Mapping[str, Scalar]
    algorithm: str
    """Who made it: initialPoint, grid, random, sobol, tpe or gp."""


@dataclass(frozen=True)
class Verdict:
    """On one trial at one rung."""

    stop: bool
    rank: int
    """From 1, the best, among those that were judged here so far, this one included; equals share one."""
    of: int


class Finish(StrEnum):
    """Why no further trial is begun."""

    GOAL_REACHED = "GoalReached"
    TRIALS_DONE = "TrialsDone"
    BUDGET_SPENT = "BudgetSpent"
    NO_IMPROVEMENT = "NoImprovement"
    TOO_MANY_FAILED = "TooManyFailed"


@dataclass(frozen=True)
class Spent:
    """What all trials have cost so far, and how many ended badly."""

    active_seconds: int = 0
    gpu_seconds: int = 0
    failed: int = 0
    """Trials that failed, for whatever reason."""


@dataclass(frozen=True)
class Finished:
    """The search is over."""

    why: Finish
    message: str
    """A sentence."""


@dataclass(frozen=True)
class View:
    """A trial as a sampler is shown it: smaller is better."""

    parameters: Mapping[str, Scalar] = field(default_factory=dict)
    value: float | None = None
    """None: it runs, and should be kept away from."""
    violations: tuple[float, ...] = ()
