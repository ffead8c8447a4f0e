"""Which parameters a trial gets. A pure function of the spec's immutable part, the number of the trial and the trials before it.

The same call gives the same answer in the cluster, on a laptop and in a replay; nothing is kept between two calls.
"""

from collections.abc import Mapping, Sequence
from itertools import islice

from finetune_api import sweep_rules
from finetune_api.sweep import HyperparameterSweepSpec
from finetune_api.sweep_space import Scalar
from finetune_operator.search import draws, space
from finetune_operator.search.gp import gp
from finetune_operator.search.tpe import tpe
from finetune_operator.search.types import Outcome, Study, Suggestion, Trial, View
from finetune_operator.search.view import view

GP_TRIALS = 300
"""A Gaussian process costs the third power of the trials that it is shown: with more, TPE takes over."""
GP_PARAMETERS = 10
"""`auto` takes no process for more parameters."""
ATTEMPTS = 100
"""Draws among which one is looked for that has not been tried, or that the recipe takes."""
STARTUP = 10
"""Trials with values before `auto` learns from them."""


def suggest(study: Study, trials: Sequence[Trial], index: int) -> Suggestion | None:
    """Parameters for the trial with this number; None where a grid has no more cells.

    `trials` are those with smaller numbers that are known, whatever has become of them; samplers weigh by age, so they are put in the
    order of their numbers here. What is mutable in the spec (numTrials, parallelTrials, ...) has no say: it may change meanwhile.
    """
    found = _suggest(study, trials, index)
    if found is None or found.algorithm == "grid" or not sweep_rules.conflict(study.spec, found.parameters):
        return found
    # Values that the recipe takes alone and not together: others are drawn. Where none are found, the caller learns it from the recipe.
    point = study.spec.initial_points[index] if index < len(study.spec.initial_points) else {}
    for attempt in range(1, ATTEMPTS):
        units = draws.random_units(study.spec.seed, index, len(study.parameters), attempt)
        other = draws.complete(study.parameters, point, units)
        if not sweep_rules.conflict(study.spec, other):
            return Suggestion(other, "initialPoint" if point else "random")
    return found


def _suggest(study: Study, trials: Sequence[Trial], index: int) -> Suggestion | None:
    """The algorithm's own."""
    spec, parameters = study.spec, study.parameters
    if index < len(spec.initial_points):
        units = draws.random_units(spec.seed, index, len(parameters))
        return Suggestion(draws.complete(parameters, spec.initial_points[index], units), "initialPoint")
    algorithm = algorithm_of(spec)
    if algorithm == "grid":
        assert spec.search_algorithm.grid is not None
        cell = next(islice(sweep_rules.cells(parameters, spec.search_algorithm.grid.points), index, None), None)
        return None if cell is None else Suggestion(cell, "grid")
    if algorithm in ("tpe", "gp"):
        earlier = sorted((trial for trial in trials if trial.index < index), key=lambda trial: trial.index)
        return _new(study, earlier, index, _learned(study, view(study, earlier), index, algorithm))
    return _drawn(study, index, algorithm)


def algorithm_of(spec: HyperparameterSweepSpec) -> str:
    """grid, random, sobol, tpe or gp: what `auto` comes to in this space."""
    named = next(
        name for name in ("auto", "grid", "random", "sobol", "tpe", "gp") if getattr(spec.search_algorithm, name) is not None
    )
    if named != "auto":
        return named
    # Categories and conditions are no reason against a process: in the benchmark's spaces with either it is far ahead of TPE.
    return "gp" if len(spec.parameters) <= GP_PARAMETERS else "tpe"


def _learned(study: Study, views: Sequence[View], index: int, algorithm: str) -> Suggestion:
    spec = study.spec
    options = spec.search_algorithm.tpe or spec.search_algorithm.gp
    if sum(v.value is not None for v in views) < (options.startup_trials if options else STARTUP):
        return _drawn(study, index, "sobol" if algorithm == "gp" else "random")
    if algorithm == "gp" and len(views) <= GP_TRIALS:
        return Suggestion(gp(study.parameters, views, draws.seed_of(spec.seed, index)), "gp")
    return Suggestion(tpe(study.parameters, views, draws.seed_of(spec.seed, index)), "tpe")


def _new(study: Study, trials: Sequence[Trial], index: int, found: Suggestion) -> Suggestion:
    """The suggestion, or, where a small space makes it one that has been tried, a random draw that has not: the result of a trial that
    is repeated with the same seed is known. Where all that is drawn has been tried, the space is, and the suggestion stays."""
    if any(p.search_space.uniform or p.search_space.log_uniform for p in study.parameters if p.when is None):
        return found
    tried = {
        _place(study, t.parameters)
        for t in trials
        if t.outcome is not Outcome.IGNORED and space.fits(study.parameters, t.parameters)
    }
    if _place(study, found.parameters) not in tried:
        return found
    for attempt in range(1, ATTEMPTS):
        units = draws.random_units(study.spec.seed, index, len(study.parameters), attempt)
        other = space.point(study.parameters, units)
        if _place(study, other) not in tried:
            return Suggestion(other, "random")
    return found


def _place(study: Study, parameters: Mapping[str, Scalar]) -> tuple[float, ...]:
    return tuple(space.units(study.parameters, parameters))


def _drawn(study: Study, index: int, algorithm: str) -> Suggestion:
    place = draws.sobol_units if algorithm == "sobol" else draws.random_units
    return Suggestion(space.point(study.parameters, place(study.spec.seed, index, len(study.parameters))), algorithm)
