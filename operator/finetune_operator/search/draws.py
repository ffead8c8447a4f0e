"""Draws that need no model: each depends on nothing but the sweep's seed and the number of the trial."""

# Optuna and SciPy cost a second to import: only what is used loads, when it is used.

import hashlib
import random
from collections.abc import Mapping, Sequence

from finetune_api.sweep_rules import is_active
from finetune_api.sweep_space import Parameter, Scalar
from finetune_operator.search import space


def seed_of(sweep_seed: int, index: int, attempt: int = 0) -> int:
    """32 bits for everything random about one trial; the same on every machine, which Python's hash() is not."""
    text = f"{sweep_seed}/{index}/{attempt}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def random_units(sweep_seed: int, index: int, count: int, attempt: int = 0) -> list[float]:
    """A place of the cube, independent of that of every other trial."""
    generator = random.Random(seed_of(sweep_seed, index, attempt))
    return [generator.random() for _ in range(count)]


def sobol_units(sweep_seed: int, index: int, count: int) -> list[float]:
    """The point number `index` of a scrambled Sobol sequence."""
    from scipy.stats import qmc

    sequence = qmc.Sobol(count, scramble=True, rng=sweep_seed)
    if index:  # SciPy cannot go forward by nothing.
        sequence.fast_forward(index)
    return [float(unit) for unit in sequence.random(1)[0]]


def complete(parameters: Sequence[Parameter], given: Mapping[str, Scalar], units: Sequence[float]) -> dict[str, Scalar]:
    """What a point leaves out, from a place of the cube. Where it names a parameter without the one that this depends on, the latter
    gets a value with which the former is in use."""
    wanted = dict(given)
    drawn = {p.name: space.from_unit(p, unit) for p, unit in zip(parameters, units, strict=True)}
    for parameter in reversed(parameters):
        when = parameter.when
        if when is not None and parameter.name in wanted and when.parameter not in wanted:
            suits = is_active(parameter, drawn)
            wanted[when.parameter] = drawn[when.parameter] if suits else when.values[0]
    chosen: dict[str, Scalar] = {}
    for parameter in parameters:
        if is_active(parameter, chosen):
            value = wanted.get(parameter.name, drawn[parameter.name])
            chosen[parameter.name] = space.exact(parameter, value)
    return chosen
