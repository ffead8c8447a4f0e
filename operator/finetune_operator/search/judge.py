"""Whether a trial that has come to a rung goes on. A trial is judged at each rung once, so later ones cannot end what has passed.

The stopping variant of asynchronous successive halving (Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020)
and the median rule (Golovin et al., "Google Vizier", KDD 2017), both on the value *at* the rung: a trial is compared with what the others
were at the same number of examples, whether these run, were stopped, or are complete.
"""

import math
import statistics
from collections.abc import Iterable, Sequence

from finetune_api.sweep import Direction
from finetune_operator.search.types import Outcome, Reading, Study, Trial, Verdict


def judge(study: Study, trials: Sequence[Trial], index: int, examples: int, value: float) -> Verdict:
    """On trial `index`, whose objective at the rung `examples` is `value`, as reported. A value that is not finite stops it.

    Equals share a rank: where all trials still say the same, none is stopped for it. `trials` are all that are known; what they say of trial
    `index` itself is not looked at.
    """
    rungs = study.spec.prune_algorithm.rungs
    mine = badness(study, value)
    others = [bad for trial in trials if trial.index != index for bad in _at(study, trial, rungs, examples)]
    rank, of = 1 + sum(bad < mine for bad in others), 1 + len(others)
    return Verdict(not math.isfinite(mine) or _falls(study, mine, others, rank), rank, of)


def _falls(study: Study, mine: float, others: Sequence[float], rank: int) -> bool:
    rule = study.spec.prune_algorithm
    if rule.asha is not None:
        return rank > max((len(others) + 1) // rule.asha.reduction_factor, 1)
    if rule.median is not None:
        return len(others) >= rule.median.min_trials and mine > statistics.median(others)
    return False


def _at(study: Study, trial: Trial, rungs: Sequence[int], examples: int) -> Iterable[float]:
    """What the trial was at this rung, if it came so far. One that failed on the way there was as bad as can be."""
    values = {reading.examples: reading.value for reading in trial.readings}
    if examples in values:
        yield badness(study, values[examples])
    elif trial.outcome is Outcome.FAILED and next((r for r in rungs if r not in values), None) == examples:
        yield math.inf


def badness(study: Study, value: float) -> float:
    """The objective with its sign such that smaller is better; what is not a number is worse than all that are."""
    return study.sign * value if math.isfinite(value) else math.inf


def rungs_of(
    evaluations: Sequence[tuple[int, float]], rungs: Sequence[int], direction: Direction, *, complete: bool
) -> tuple[Reading, ...]:
    """The reading at each rung: the first evaluation at or behind it. Evaluations are (examples seen, objective), rising.

    A complete trial has come to its end: the rungs behind it get its best value (that of the model it keeps).
    """
    found = []
    finite = [value for _, value in evaluations if math.isfinite(value)]
    best = (max if direction is Direction.MAXIMIZE else min)(finite, default=None)
    for rung in rungs:
        value = next((value for examples, value in evaluations if examples >= rung), best if complete else None)
        if value is not None:
            found.append(Reading(rung, value))
    return tuple(found)
