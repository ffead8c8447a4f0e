"""Searches in simulated time: workers that take trials from a searcher, with durations of their own; and the searchers.

A searcher is ours (stateless: it is given the records and nothing else), or Optuna as its documentation has it: one live study in one
process, told as trials end.
"""

import heapq
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from sweep_problems import Curves, Problem

from finetune_api.sweep import Asha, PruneAlgorithm
from finetune_api.sweep_space import Scalar
from finetune_operator.search import tpe
from finetune_operator.search.judge import judge
from finetune_operator.search.suggest import suggest
from finetune_operator.search.types import Outcome, Reading, Study, Trial


class Searcher(Protocol):
    """Who says what to try."""

    def propose(self, trials: Sequence[Trial], index: int) -> Mapping[str, Scalar]: ...

    def ended(self, index: int, value: float | None) -> None:
        """With its value, or failed."""


class Ours:
    """The engine. Failed trials may be hidden from it, to see what that costs."""

    def __init__(self, study: Study) -> None:
        self.study = study

    def propose(self, trials: Sequence[Trial], index: int) -> Mapping[str, Scalar]:
        found = suggest(self.study, trials, index)
        assert found is not None
        return found.parameters

    def ended(self, index: int, value: float | None) -> None:
        pass


class Live:
    """A study of Optuna that is kept, with one of its samplers, and its own pruner."""

    def __init__(self, problem: Problem, sampler: Any, pruner: Any = None) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.parameters = problem.spec(0).parameters
        self.study = optuna.create_study(sampler=sampler, pruner=pruner or optuna.pruners.NopPruner())
        self.running: dict[int, Any] = {}

    def propose(self, trials: Sequence[Trial], index: int) -> Mapping[str, Scalar]:  # noqa: ARG002
        trial = self.study.ask()
        self.running[index] = trial
        return tpe.suggested(trial, self.parameters)

    def report(self, index: int, examples: int, value: float) -> bool:
        """The objective at a rung; whether Optuna's pruner stops the trial there."""
        self.running[index].report(value, examples)
        stop: bool = self.running[index].should_prune()
        if stop:
            self._tell(index, None, "PRUNED")
        return stop

    def ended(self, index: int, value: float | None) -> None:
        self._tell(index, value, "COMPLETE" if value is not None else "FAIL")

    def _tell(self, index: int, value: float | None, state: str) -> None:
        import optuna

        self.study.tell(self.running.pop(index), value, optuna.trial.TrialState[state])


def search(problem: Problem, searcher: Searcher, workers: int, count: int, seed: int, *, hidden: bool = False) -> list[Trial]:
    """All trials of a search in which each takes a lognormal time. With `hidden`, failed ones are never shown."""
    clock, trials, running = random.Random(f"durations {seed}"), [], []

    def begin(now: float) -> None:
        index = len(trials)
        trials.append(Trial(index, searcher.propose(trials, index)))
        heapq.heappush(running, (now + clock.lognormvariate(0, 0.5), index))

    for _ in range(min(workers, count)):
        begin(0.0)
    while running:
        now, index = heapq.heappop(running)
        trial = trials[index]
        if problem.fails(trial.parameters):
            trials[index] = replace(trial, outcome=Outcome.IGNORED if hidden else Outcome.FAILED)
            searcher.ended(index, None)
        else:
            value = problem.regret(trial.parameters)
            trials[index] = replace(trial, outcome=Outcome.COMPLETE, value=value)
            searcher.ended(index, value)
        if len(trials) < count:
            begin(now)
    return trials


def least(trials: Sequence[Trial]) -> float:
    """The regret of a search: that of its best complete trial."""
    return min((t.value for t in trials if t.outcome is Outcome.COMPLETE and t.value is not None), default=math.inf)


# ---------------------------------------------------------------------------------------------------------- pruning ----
def asha(study: Study, first: int, factor: int, rungs: int) -> Study:
    """The study with pruning. (The contract has pruning for our own trainer alone; here nothing is trained.)"""
    rule = PruneAlgorithm(asha=Asha(min_examples=first, reduction_factor=factor, max_rungs=rungs))
    return replace(study, spec=study.spec.model_copy(update={"prune_algorithm": rule}))


def search_curves(
    curves: Curves, searcher: Searcher, study: Study | None, rungs: Sequence[int], workers: int, wall: float
) -> list[Trial]:
    """All trials of a search that ends at a time. One unit of a curve takes one unit of time, a little more or less in each trial.

    With a study our own rule judges at the rungs, without one the pruner of Optuna's own.
    """
    clock, trials, order = random.Random(f"pace {curves.seed}"), [], itertools.count()
    running: list[tuple[float, int, int, int, float]] = []
    stops = [*rungs, curves.end]

    def begin(now: float) -> None:
        index, pace = len(trials), clock.lognormvariate(0, 0.1)
        trials.append(Trial(index, searcher.propose(trials, index)))
        heapq.heappush(running, (now + pace * stops[0], next(order), index, 0, pace))

    for _ in range(workers):
        begin(0.0)
    while running and running[0][0] <= wall:
        now, _, index, k, pace = heapq.heappop(running)
        trial, examples = trials[index], stops[k]
        value = curves.value(trial.parameters, index, examples)
        if examples == curves.end:
            trials[index] = replace(trial, outcome=Outcome.COMPLETE, value=value)
            searcher.ended(index, value)
            begin(now)
            continue
        if study is not None:
            stop = judge(study, trials, index, examples, value).stop
        else:
            assert isinstance(searcher, Live)
            stop = searcher.report(index, examples, value)
        read = replace(trial, readings=(*trial.readings, Reading(examples, value)))
        trials[index] = replace(read, outcome=Outcome.PRUNED) if stop else read
        if stop:
            begin(now)
        else:
            heapq.heappush(running, (now + pace * (stops[k + 1] - examples), next(order), index, k + 1, pace))
    return trials
