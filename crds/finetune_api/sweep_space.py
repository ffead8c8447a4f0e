"""The search space of a HyperparameterSweep: parameters, what values they may have, and when they are used."""

import math
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, PlainValidator, StringConstraints, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from finetune_api.base import Cel, Model, Shape
from finetune_api.placement import EnvName

MAX_WHOLE = 2**53
"""Whole numbers beyond it are not whole as a double, which is what JSON has."""

Scalar = bool | int | float | str


def _scalar(value: Any) -> Scalar:
    if isinstance(value, bool | int | float | str) and not (isinstance(value, float) and not math.isfinite(value)):
        return value
    raise PydanticCustomError("scalar", "must be a word, a number, true or false")


# The API server has no type for "one of several": it keeps the value as it is, and the operator looks at it.
ScalarValue = Annotated[Any, PlainValidator(_scalar), WithJsonSchema({"x-kubernetes-preserve-unknown-fields": True})]

Point = Annotated[
    dict[str, ScalarValue],
    WithJsonSchema({"type": "object", "x-kubernetes-preserve-unknown-fields": True, "description": "A point."}),
]
"""Values by the names of parameters."""

Whole = Annotated[int, Field(ge=-MAX_WHOLE, le=MAX_WHOLE)]
ParameterName = Annotated[
    str,
    StringConstraints(max_length=63),
    Shape(r"^[A-Za-z][A-Za-z0-9_-]*$", "must be letters, digits, '_' and '-', beginning with a letter"),
]
RecipePath = Annotated[
    str,
    StringConstraints(max_length=253),
    Shape(
        r"^[a-z][A-Za-z0-9]*(\.[a-z][A-Za-z0-9]*)*$",
        "must be a field below trialTemplate.spec, such as hyperparameters.learningRate",
    ),
]

_ORDERED = (Cel("self.min < self.max", "min must be less than max", ".min"),)
_POSITIVE = Cel("self.min > 0", "min must be greater than 0 on a logarithmic scale", ".min")


class Range(Model):
    """Any number between two."""

    min: float
    """Lowest value."""
    max: float
    """Highest value."""

    cel: ClassVar[tuple[Cel, ...]] = _ORDERED

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.min < self.max:
            raise ValueError(f"min: {self.min:g} is not less than max ({self.max:g})")
        return self


class LogRange(Range):
    """Any number between two, each order of magnitude as often as the others."""

    cel: ClassVar[tuple[Cel, ...]] = (*_ORDERED, Cel("self.min > 0.0", _POSITIVE.message, ".min"))

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if self.min <= 0:
            raise ValueError(f"min: {self.min:g} is not greater than 0: a logarithmic scale has no zero")
        return self


class IntRange(Model):
    """Whole numbers from min to max, in steps."""

    min: Whole
    """Lowest value."""
    max: Whole
    """Highest value."""
    step: Annotated[int, Field(ge=1, le=MAX_WHOLE)] = 1
    """Distance between two values."""

    cel: ClassVar[tuple[Cel, ...]] = _ORDERED

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.min < self.max:
            raise ValueError(f"min: {self.min} is not less than max ({self.max})")
        return self

    @property
    def values(self) -> range:
        return range(self.min, self.max + 1, self.step)


class IntLogRange(Model):
    """Whole numbers between two, each order of magnitude as often as the others."""

    min: Whole
    """Lowest value."""
    max: Whole
    """Highest value."""

    cel: ClassVar[tuple[Cel, ...]] = (*_ORDERED, _POSITIVE)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.min < self.max:
            raise ValueError(f"min: {self.min} is not less than max ({self.max})")
        if self.min <= 0:
            raise ValueError(f"min: {self.min} is not greater than 0: a logarithmic scale has no zero")
        return self


class Choices(Model):
    """One of several values without an order."""

    values: Annotated[list[ScalarValue], Field(min_length=2, max_length=256)]
    """The values: words, numbers, true or false; no two the same."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        seen: list[Scalar] = []
        for value in self.values:
            # 1 and true are equal in Python; here they are two values, and 1 and 1.0 are one.
            if any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in seen):
                raise ValueError(f"values: {value!r} is there twice")
            seen.append(value)
        return self


SPACES = ("uniform", "logUniform", "intUniform", "intLogUniform", "categorical")
_ONE_SPACE = f"set exactly one of {', '.join(SPACES)}"


def exactly_one(names: tuple[str, ...]) -> str:
    return " + ".join(f"(has(self.{name}) ? 1 : 0)" for name in names) + " == 1"


class SearchSpace(Model):
    """What values a parameter may have; exactly one."""

    uniform: Range | None = None
    """Any number between min and max."""
    log_uniform: LogRange | None = None
    """Any number between min and max on a logarithmic scale; right for learning rates."""
    int_uniform: IntRange | None = None
    """Whole numbers."""
    int_log_uniform: IntLogRange | None = None
    """Whole numbers on a logarithmic scale."""
    categorical: Choices | None = None
    """One of several values without an order."""

    cel: ClassVar[tuple[Cel, ...]] = (Cel(exactly_one(SPACES), _ONE_SPACE),)

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (
            sum(v is not None for v in (self.uniform, self.log_uniform, self.int_uniform, self.int_log_uniform, self.categorical))
            != 1
        ):
            raise ValueError(_ONE_SPACE)
        return self


class When(Model):
    """The parameter is used only where another one has one of these values."""

    parameter: ParameterName
    """Name of a categorical parameter that stands before this one in the list."""
    values: Annotated[list[ScalarValue], Field(min_length=1, max_length=256)]
    """Some of its values."""


class Parameter(Model):
    """One dimension of the search."""

    name: ParameterName
    """Name, as status and reports show it."""
    path: RecipePath | None = None
    """Field of the recipe below trialTemplate.spec that it sets, such as hyperparameters.learningRate."""
    env: EnvName | None = None
    """Environment variable that it sets, for a script of yours (trialTemplate.spec.trainer.command)."""
    search_space: SearchSpace
    """Its values."""
    when: When | None = None
    """Only where another parameter has certain values; elsewhere the template's own value stays."""

    cel: ClassVar[tuple[Cel, ...]] = (Cel("has(self.path) != has(self.env)", "set exactly one of path and env"),)

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.path is None) == (self.env is None):
            raise ValueError("set exactly one of path and env")
        return self
