"""A search space as a cube: every parameter is a number between 0 and 1 on its own scale, and back.

All draws (random, Sobol) and the Gaussian process work on the cube; what is between 0 and 1 is always a value of the space.
"""

import math
from collections.abc import Mapping, Sequence

from finetune_api.sweep_rules import holds, is_active
from finetune_api.sweep_space import Parameter, Scalar


def from_unit(parameter: Parameter, unit: float) -> Scalar:
    """The value at this place, from 0 to 1, of the parameter's scale. Values of a list have equal parts of it."""
    space = parameter.search_space
    if space.categorical is not None:
        return _part(space.categorical.values, unit)
    if space.int_uniform is not None:
        return _part(space.int_uniform.values, unit)
    if space.int_log_uniform is not None:
        whole = space.int_log_uniform
        return min(max(round(_between_logs(whole.min - 0.5, whole.max + 0.5, unit)), whole.min), whole.max)
    if space.log_uniform is not None:
        return min(
            max(_between_logs(space.log_uniform.min, space.log_uniform.max, unit), space.log_uniform.min), space.log_uniform.max
        )
    assert space.uniform is not None
    ends = space.uniform
    return min(max(ends.min + (ends.max - ends.min) * unit, ends.min), ends.max)


def to_unit(parameter: Parameter, value: Scalar) -> float:
    """The place of a value that the space holds: of one that has a part of the scale, the middle of it."""
    space = parameter.search_space
    if space.categorical is not None:
        return (place_of(parameter, value) + 0.5) / len(space.categorical.values)
    number = float(value)
    if space.int_uniform is not None:
        values = space.int_uniform.values
        return (values.index(int(number)) + 0.5) / len(values)
    if space.int_log_uniform is not None:
        return _log_place(space.int_log_uniform.min - 0.5, space.int_log_uniform.max + 0.5, number)
    if space.log_uniform is not None:
        return _log_place(space.log_uniform.min, space.log_uniform.max, number)
    assert space.uniform is not None
    return (number - space.uniform.min) / (space.uniform.max - space.uniform.min)


def place_of(parameter: Parameter, value: Scalar) -> int:
    """Which of the values of a categorical parameter this is, from 0. True is not 1, and "8" is not 8. Raises ValueError."""
    choices = parameter.search_space.categorical
    assert choices is not None
    for place, other in enumerate(choices.values):
        if value == other and isinstance(value, bool) == isinstance(other, bool):
            return place
    raise ValueError(f"{parameter.name} is never {value!r}")


def exact(parameter: Parameter, value: Scalar) -> Scalar:
    """A value that the space holds, as the space has it: JSON makes 1 of 1.0, and people write 8.0 for 8."""
    space = parameter.search_space
    if space.categorical is not None:
        found: Scalar = space.categorical.values[place_of(parameter, value)]
        return found
    return int(value) if space.int_uniform or space.int_log_uniform else float(value)


def point(parameters: Sequence[Parameter], units: Sequence[float]) -> dict[str, Scalar]:
    """The parameters at a place of the cube (one number for each). Those that are not in use there are left out."""
    chosen: dict[str, Scalar] = {}
    for parameter, unit in zip(parameters, units, strict=True):
        if is_active(parameter, chosen):
            chosen[parameter.name] = from_unit(parameter, unit)
    return chosen


def units(parameters: Sequence[Parameter], chosen: Mapping[str, Scalar]) -> list[float]:
    """The place of a point in the cube (one number for each parameter); a half where one is not in use."""
    return [to_unit(p, chosen[p.name]) if p.name in chosen else 0.5 for p in parameters]


def fits(parameters: Sequence[Parameter], chosen: Mapping[str, Scalar]) -> bool:
    """Whether these are all parameters that are in use, and nothing else, each inside its space."""
    used = [parameter for parameter in parameters if is_active(parameter, chosen)]
    return {p.name for p in used} == set(chosen) and all(holds(p, chosen[p.name]) for p in used)


def _part(values: Sequence[Scalar], unit: float) -> Scalar:
    return values[min(int(unit * len(values)), len(values) - 1)]


def _between_logs(low: float, high: float, unit: float) -> float:
    return math.exp(math.log(low) + (math.log(high) - math.log(low)) * unit)


def _log_place(low: float, high: float, value: float) -> float:
    return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
