"""What a sampler is shown: every trial compared at the same number of examples.

Pruning leaves few complete trials, and those that survived first are not the best. A sampler that is told "complete" and "pruned" learns
from that accident; TPE with successive halving is then worse than random search with it. So trials are compared at one rung, the highest
that enough of them have reached (the rule of BOHB: Falkner et al., ICML 2018), and the view is made anew for each suggestion.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import NormalDist

from finetune_operator.search import space
from finetune_operator.search.types import Outcome, Study, Trial, View

ENOUGH = 10
"""Trials at a rung, at least, before it is the one to compare at; and twice the number of parameters."""
_BEHIND = 0.1
"""How far behind the worst that was compared those are that did not come so far, as a share of what lies between best and worst."""


def view(study: Study, trials: Sequence[Trial]) -> list[View]:
    """The trials of which something can be learned, in their order, those of an earlier sweep first. Smaller values are better.

    Those that came to the rung have their value there. Those that run below it have none. Those that were stopped below it are behind
    all others, by how far they came and their value there; those that failed are as bad as the worst. Trials that are Ignored, and those
    whose parameters are not in the space (somebody edited them), are left out.
    """
    shown = [t for t in trials if t.outcome is not Outcome.IGNORED and space.fits(study.parameters, t.parameters)]
    own = _with_failed(shown, _compared(study, shown))
    if not study.prior:
        return own
    earlier = [_prior(study, t) for t in study.prior if t.value is not None and space.fits(study.parameters, t.parameters)]
    return [*_normal_scores(earlier), *_normal_scores(own)]


def _compared(study: Study, trials: Sequence[Trial]) -> list[View]:
    """Each trial at the rung at which they are compared; failed ones without a value."""
    target = _target(study, trials)
    values = [_value_at(study, trial, target) for trial in trials]
    known = [value for value in values if value is not None]
    behind = sorted(
        (i for i, trial in enumerate(trials) if values[i] is None and trial.outcome is Outcome.PRUNED),
        key=lambda i: _how_far(study, trials[i]),
    )
    if behind:
        worst, spread = (max(known), (max(known) - min(known)) or 1.0) if known else (0.0, 1.0)
        for place, i in enumerate(behind, start=1):
            values[i] = worst + _BEHIND * spread * place / len(behind)
    return [View(trial.parameters, value, trial.violations) for trial, value in zip(trials, values, strict=True)]


def _target(study: Study, trials: Sequence[Trial]) -> int | None:
    """The rung to compare at; None is the end of training, where there are no rungs. (With rungs the end is none: few come there, and
    which ones says more about their luck at the rungs; measured, it is worse.)"""
    rungs = study.spec.prune_algorithm.rungs
    if not rungs:
        return None
    enough = max(ENOUGH, 2 * len(study.parameters))
    for rung in reversed(rungs):
        if sum(any(reading.examples == rung for reading in trial.readings) for trial in trials) >= enough:
            return rung
    return rungs[0]


def _value_at(study: Study, trial: Trial, target: int | None) -> float | None:
    """None: not there, or not a number."""
    if trial.outcome is Outcome.FAILED:
        return None
    if target is None:
        found = trial.value if trial.outcome is Outcome.COMPLETE else None
    else:
        found = next((reading.value for reading in trial.readings if reading.examples == target), None)
    return study.sign * float(found) if found is not None and math.isfinite(found) else None


def _how_far(study: Study, trial: Trial) -> tuple[float, float]:
    """Orders trials that were stopped: who came farther is better, then who had the better value there."""
    if not trial.readings:
        return 0.0, math.inf
    last = trial.readings[-1]
    return -float(last.examples), study.sign * last.value if math.isfinite(last.value) else math.inf


def _with_failed(trials: Sequence[Trial], views: Sequence[View]) -> list[View]:
    """Failed trials, and complete ones whose value is not a number, get the worst value. While there is none they count as running: a
    sampler keeps away from those too."""
    worst = max((v.value for v in views if v.value is not None), default=None)
    failed = (
        trial.outcome in (Outcome.FAILED, Outcome.COMPLETE) and v.value is None for trial, v in zip(trials, views, strict=True)
    )
    return [replace(v, value=worst) if bad else v for v, bad in zip(views, failed, strict=True)]


def _prior(study: Study, trial: Trial) -> View:
    same = len(trial.violations) == len(study.spec.constraints)
    assert trial.value is not None
    return View(trial.parameters, study.sign * float(trial.value), trial.violations if same else ())


def _normal_scores(views: Iterable[View]) -> list[View]:
    """Values by their rank, as quantiles of a normal distribution: what two sweeps over different data have in common is the order."""
    views = list(views)
    values = sorted(v.value for v in views if v.value is not None)
    first = {value: place for place, value in reversed(list(enumerate(values)))}
    last = {value: place for place, value in enumerate(values)}

    def score(value: float) -> float:
        return NormalDist().inv_cdf(((first[value] + last[value]) / 2 + 0.5) / len(values))

    return [v if v.value is None else replace(v, value=score(v.value)) for v in views]
