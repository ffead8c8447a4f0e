"""The tree-structured Parzen estimator: Optuna's, on a study that is made anew for each suggestion.

Of Optuna only what adds trials and asks is used: no storage, no `tell`, no pruners. What it is given is complete (typed values, in the
order of the trials, constraints as full vectors), so that a study made anew is as good as one that was kept: bit for bit.
"""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune_api.sweep_rules import is_active
from finetune_api.sweep_space import Parameter, Scalar
from finetune_operator.search import space
from finetune_operator.search.types import View

if TYPE_CHECKING:
    import optuna


MOST = 1000
"""Trials that it is shown at most."""
_BEST = 25
"""Of the best ones TPE looks at no more (Optuna's default_gamma); all others tell where it is not good."""


def tpe(parameters: Sequence[Parameter], views: Sequence[View], seed: int) -> dict[str, Scalar]:
    """A point where good trials are dense and bad ones are not."""
    study = study_of(parameters, shown(views))
    study.sampler = sampler_of(parameters, seed)
    return ask(study, parameters)


def shown(views: Sequence[View]) -> list[View]:
    """Those that count, in their order: what runs, the best, and the newest of the rest. It bounds what a suggestion costs."""
    if len(views) <= MOST:
        return list(views)
    known = [(sum(b for b in v.violations if b > 0), v.value, i) for i, v in enumerate(views) if v.value is not None]
    best = {i for _, _, i in sorted(known)[:_BEST]}
    newest = len(views) - MOST
    return [v for i, v in enumerate(views) if v.value is None or i in best or i >= newest]


def sampler_of(parameters: Sequence[Parameter], seed: int) -> "optuna.samplers.TPESampler":
    """Optuna's defaults (multivariate, constant liar). Parameters that are not always in use are modelled in groups: with those that are
    in use together."""
    import optuna

    warnings.filterwarnings("ignore", "Argument ``group``", optuna.exceptions.ExperimentalWarning)
    conditional = any(parameter.when is not None for parameter in parameters)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=0, group=conditional)


def study_of(parameters: Sequence[Parameter], views: Sequence[View]) -> "optuna.Study":
    """A study with these trials."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize")
    distributions = {parameter.name: distribution(parameter) for parameter in parameters}
    names = range(max((len(v.violations) for v in views), default=0))
    known = {parameter.name: parameter for parameter in parameters}
    for v in views:
        running = v.value is None
        violations = v.violations or (0.0,) * len(names)
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.RUNNING if running else optuna.trial.TrialState.COMPLETE,
                value=v.value,
                params={name: internal(known[name], value) for name, value in v.parameters.items()},
                distributions={name: distributions[name] for name in v.parameters},
                constraints={} if running else {f"{k}": float(violations[k]) for k in names},
            )
        )
    return study


def ask(study: "optuna.Study", parameters: Sequence[Parameter]) -> dict[str, Scalar]:
    """One more trial of the study: its parameters, those that are in use."""
    return suggested(study.ask(), parameters)


def suggested(trial: "optuna.Trial", parameters: Sequence[Parameter]) -> dict[str, Scalar]:
    """The parameters of a trial that was asked for."""
    import optuna

    chosen: dict[str, Scalar] = {}
    for parameter in parameters:
        if not is_active(parameter, chosen):
            continue
        match distribution(parameter):
            case optuna.distributions.FloatDistribution() as d:
                chosen[parameter.name] = trial.suggest_float(parameter.name, d.low, d.high, log=d.log)
            case optuna.distributions.IntDistribution() as d:
                chosen[parameter.name] = trial.suggest_int(parameter.name, d.low, d.high, step=d.step, log=d.log)
            case optuna.distributions.CategoricalDistribution() as d:
                place = trial.suggest_categorical(parameter.name, d.choices)
                chosen[parameter.name] = parameter.search_space.categorical.values[place]  # type: ignore[union-attr, index]
    return chosen


def distribution(parameter: Parameter) -> "optuna.distributions.BaseDistribution":
    """The parameter's space as Optuna has it. A categorical parameter is the place in its list: Optuna takes 1 for true."""
    import optuna

    values = parameter.search_space
    if values.categorical is not None:
        return optuna.distributions.CategoricalDistribution(range(len(values.categorical.values)))
    if values.int_uniform is not None:
        return optuna.distributions.IntDistribution(
            values.int_uniform.min, values.int_uniform.values[-1], step=values.int_uniform.step
        )
    if values.int_log_uniform is not None:
        return optuna.distributions.IntDistribution(values.int_log_uniform.min, values.int_log_uniform.max, log=True)
    if values.log_uniform is not None:
        return optuna.distributions.FloatDistribution(values.log_uniform.min, values.log_uniform.max, log=True)
    assert values.uniform is not None
    return optuna.distributions.FloatDistribution(values.uniform.min, values.uniform.max)


def internal(parameter: Parameter, value: Scalar) -> int | float:
    """A value that the space holds, as Optuna is told it."""
    if parameter.search_space.categorical is not None:
        return space.place_of(parameter, value)
    number = space.exact(parameter, value)
    assert isinstance(number, int | float)
    return number
