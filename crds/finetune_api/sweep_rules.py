"""What a sweep must keep that CEL cannot say: paths that exist, values that the recipe takes, a grid that fits, conditions that can hold.

Each rule raises a ValueError whose sentence says what to change. sweep.py calls `check`; the sweep engine uses `cells`.
"""

import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from finetune_api.finetunejob import FineTuneJobSpec
from finetune_api.sentences import explain
from finetune_api.tasks import METRICS

if TYPE_CHECKING:
    from finetune_api.sweep import HyperparameterSweepSpec
    from finetune_api.sweep_space import Parameter, Scalar

SEARCHABLE = ("hyperparameters", "dataset", "model")
"""Parts of the recipe that may be searched. The rest says where a trial runs and writes, and that is the same for all."""
NOT_SEARCHABLE = {
    "hyperparameters.seed": "the seed is the same for all trials; promote.seeds repeats the best with others",
    "dataset.uri": "trials on different data cannot be compared",
    "dataset.train": "trials on different data cannot be compared",
    "dataset.validation": "trials that are scored on different data cannot be compared",
    "dataset.validationFraction": "trials that are scored on different data cannot be compared",
    "dataset.test": "the test split is read once, by the winner",
}


def check(spec: "HyperparameterSweepSpec") -> None:
    """Raises ValueError at the first rule that does not hold."""
    _metrics(spec)
    _parameters(spec)
    _conditions(spec.parameters)
    for index, point in enumerate(spec.initial_points):
        _initial_point(spec, index, point)
    job = spec.trial_template.spec
    if spec.promote is not None and (job.task is None or job.trainer.command):
        raise ValueError("promote: needs our own trainer: a script's model is where the script puts it")
    if spec.search_algorithm.grid is not None and spec.initial_points:
        raise ValueError("initialPoints: a grid tries every combination: leave initialPoints out")


def check_start(spec: "HyperparameterSweepSpec") -> None:
    """The same for what must hold when a sweep begins. Not later: numTrials may be lowered while trials run."""
    if len(spec.initial_points) > spec.num_trials:
        raise ValueError(
            f"initialPoints: there are {len(spec.initial_points)} and numTrials is {spec.num_trials}: raise numTrials"
        )
    grid = spec.search_algorithm.grid
    if grid is not None:
        size = sum(1 for _ in islice(cells(spec.parameters, grid.points), spec.num_trials + 1))
        if size > spec.num_trials:
            whole = sum(1 for _ in islice(cells(spec.parameters, grid.points), 1_000_000))
            many = f"{whole}" if whole < 1_000_000 else "a million or more"
            raise ValueError(
                f"numTrials: the grid has {many} cells and numTrials is {spec.num_trials}: "
                "raise numTrials, lower searchAlgorithm.grid.points, or use another algorithm"
            )
        for cell in cells(spec.parameters, grid.points):
            if problem := conflict(spec, cell):
                shown = ", ".join(f"{name}={value}" for name, value in cell.items())
                raise ValueError(f"parameters: the grid has the cell {shown}: {problem}. Use `when`, or other values")


# -------------------------------------------------------------------------------------------------------- objective ----
def _metrics(spec: "HyperparameterSweepSpec") -> None:
    job = spec.trial_template.spec
    pruning = spec.prune_algorithm.none is None
    if job.task is None or job.trainer.command:
        if pruning:
            raise ValueError("pruneAlgorithm: only our own trainer evaluates at the rungs: with trainer.command use none")
        return
    known = [f"validation/{metric}" for metric in METRICS[job.task]]
    for field, metric in (
        ("objective.metric", spec.objective.metric),
        *((f"constraints[{c.metric}]", c.metric) for c in spec.constraints),
    ):
        if metric not in known:
            raise ValueError(f"{field}: {metric} is not a metric of {job.task}: it has {', '.join(known)}")


# ------------------------------------------------------------------------------------------------------- parameters ----
def _parameters(spec: "HyperparameterSweepSpec") -> None:
    seen: dict[str, str] = {}
    names = [parameter.name for parameter in spec.parameters]
    if doubles := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"parameters[{doubles[0]}]: parameters must have different names")
    for parameter in spec.parameters:
        where = f"parameters[{parameter.name}]"
        target = parameter.path or f"env {parameter.env}"
        if target in seen:
            raise ValueError(f"{where}: {seen[target]} sets {target} already")
        seen[target] = parameter.name
        if parameter.env is not None:
            if not spec.trial_template.spec.trainer.command:
                raise ValueError(
                    f"{where}.env: needs trialTemplate.spec.trainer.command: our own trainer reads the recipe, use path"
                )
            continue
        _path(where, str(parameter.path))
        if spec.prune_algorithm.none is None and parameter.path in ("hyperparameters.epochs", "hyperparameters.maxSteps"):
            raise ValueError(
                f"{where}.path: hyperparameters.epochs and maxSteps cannot be searched with pruning: "
                "trials would be judged at unequal parts of their schedule"
            )
        for value in _extremes(parameter):
            _fits_the_recipe(spec, parameter, where, value)


def _path(where: str, path: str) -> None:
    root = path.partition(".")[0]
    if path in NOT_SEARCHABLE:
        raise ValueError(f"{where}.path: {path} cannot be searched: {NOT_SEARCHABLE[path]}")
    if root not in SEARCHABLE:
        raise ValueError(f"{where}.path: {path} cannot be searched: only fields of {', '.join(SEARCHABLE)} can")
    model: type[BaseModel] | None = FineTuneJobSpec
    for depth, key in enumerate(path.split(".")):
        fields = {field.alias or name: field.annotation for name, field in model.model_fields.items()} if model else {}
        if key not in fields:
            before = ".".join(path.split(".")[:depth])
            exist = f": it has {', '.join(sorted(fields))}" if fields else ": it has no fields"
            raise ValueError(f"{where}.path: {path} does not exist; {before or 'the recipe'} has no field {key!r}{exist}")
        model = _model_in(fields[key])
    if model is not None:
        raise ValueError(f"{where}.path: {path} is not a value: name one of its fields, such as {path}.{_first_field(model)}")


def _first_field(model: type[BaseModel]) -> str:
    name, field = next(iter(model.model_fields.items()))
    return field.alias or name


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a field holds, if it holds one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return next((found for part in typing.get_args(annotation) if (found := _model_in(part))), None)
    return None


def _extremes(parameter: "Parameter") -> list["Scalar"]:
    space = parameter.search_space
    bounds = space.uniform or space.log_uniform or space.int_uniform or space.int_log_uniform
    return [bounds.min, bounds.max] if bounds else list(space.categorical.values)  # type: ignore[union-attr]


def _fits_the_recipe(spec: "HyperparameterSweepSpec", parameter: "Parameter", where: str, value: "Scalar") -> None:
    """Whether the template with this value is one that the trainer takes. What depends on other parameters: `conflict`."""
    document = spec.trial_template.spec.model_dump(mode="json", by_alias=True, exclude_unset=True)
    put(document, str(parameter.path), value)
    try:
        FineTuneJobSpec.model_validate(document)
    except ValidationError as error:
        mine = [e for e in explain(error) if e.startswith(str(parameter.path))]
        if mine:
            raise ValueError(f"{where}.searchSpace: {mine[0]}") from error


def conflict(spec: "HyperparameterSweepSpec", chosen: Mapping[str, "Scalar"]) -> str | None:
    """Why the template does not take these values together, each of which it takes alone; None where it does."""
    paths = {parameter.name: parameter.path for parameter in spec.parameters}
    if not any(paths[name] for name in chosen):
        return None
    document = spec.trial_template.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    for name, value in chosen.items():
        if path := paths[name]:
            put(document, path, value)
    try:
        FineTuneJobSpec.model_validate(document)
    except ValidationError as error:
        return explain(error)[0]
    return None


def put(document: dict[str, Any], path: str, value: Any) -> None:
    """Sets the field at this path below a spec."""
    *parents, last = path.split(".")
    node = document
    for key in parents:
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
    node[last] = value


# ------------------------------------------------------------------------------------------------------- conditions ----
def _conditions(parameters: Sequence["Parameter"]) -> None:
    earlier: dict[str, Parameter] = {}
    for parameter in parameters:
        when = parameter.when
        if when is not None:
            where = f"parameters[{parameter.name}].when"
            parent = earlier.get(when.parameter)
            if parent is None:
                raise ValueError(f"{where}: {when.parameter} is not a parameter that stands before {parameter.name}")
            if parent.search_space.categorical is None:
                raise ValueError(f"{where}: {when.parameter} is not categorical: a condition needs one of several values")
            if missing := [v for v in when.values if not _in(v, parent.search_space.categorical.values)]:
                choices = ", ".join(map(repr, parent.search_space.categorical.values))
                raise ValueError(f"{where}: {when.parameter} is never {missing[0]!r}: it is one of {choices}")
        earlier[parameter.name] = parameter


def _in(value: "Scalar", values: Sequence["Scalar"]) -> bool:
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values)


def is_active(parameter: "Parameter", chosen: Mapping[str, "Scalar"]) -> bool:
    """Whether the parameter is used, given those that stand before it."""
    when = parameter.when
    return when is None or (when.parameter in chosen and _in(chosen[when.parameter], when.values))


# ------------------------------------------------------------------------------------------------------------ points ----
def _initial_point(spec: "HyperparameterSweepSpec", index: int, point: Mapping[str, "Scalar"]) -> None:
    where = f"initialPoints[{index}]"
    known = {parameter.name: parameter for parameter in spec.parameters}
    for name, value in point.items():
        if name not in known:
            raise ValueError(f"{where}: {name} is not a parameter: there are {', '.join(known)}")
        if not holds(known[name], value):
            raise ValueError(f"{where}: {name}: {value!r} is not in its search space")
    for name in point:
        when = known[name].when
        if when is not None and when.parameter in point and not _in(point[when.parameter], when.values):
            raise ValueError(f"{where}: {name} is not used where {when.parameter} is {point[when.parameter]!r}: leave it out")
    whole = all(parameter.name in point or not is_active(parameter, point) for parameter in spec.parameters)
    if whole and (problem := conflict(spec, point)):
        raise ValueError(f"{where}: {problem}")


def holds(parameter: "Parameter", value: "Scalar") -> bool:
    """Whether the value is in the parameter's space."""
    space = parameter.search_space
    if space.categorical is not None:
        return _in(value, space.categorical.values)
    if isinstance(value, bool | str):
        return False
    if space.int_uniform is not None:
        return int(value) == value and int(value) in space.int_uniform.values
    bounds = space.uniform or space.log_uniform or space.int_log_uniform
    whole = space.int_log_uniform is None or int(value) == value
    return bounds is not None and whole and bounds.min <= value <= bounds.max


# -------------------------------------------------------------------------------------------------------------- grid ----
def cells(parameters: Sequence["Parameter"], points: int) -> Iterator[dict[str, "Scalar"]]:
    """Every combination, the last parameter fastest. A parameter that is not used in a combination is not in it."""
    yield from _cells(parameters, points, {})


def _cells(parameters: Sequence["Parameter"], points: int, chosen: dict[str, "Scalar"]) -> Iterator[dict[str, "Scalar"]]:
    if not parameters:
        yield dict(chosen)
        return
    first, *rest = parameters
    if not is_active(first, chosen):
        yield from _cells(rest, points, chosen)
        return
    for value in axis(first, points):
        yield from _cells(rest, points, {**chosen, first.name: value})


def axis(parameter: "Parameter", points: int) -> list["Scalar"]:
    """The values of a parameter on a grid: evenly from end to end on its scale, all of them where there are no more."""
    space = parameter.search_space
    if space.categorical is not None:
        return list(space.categorical.values)
    if space.int_uniform is not None:
        values = space.int_uniform.values
        last = len(values) - 1
        return list(values) if last < points else [values[round(last * k / (points - 1))] for k in range(points)]
    if space.int_log_uniform is not None:
        low, high = space.int_log_uniform.min, space.int_log_uniform.max
        return list(dict.fromkeys(round(low * (high / low) ** (k / (points - 1))) for k in range(points)))
    if space.log_uniform is not None:
        ends = space.log_uniform
        between = [ends.min * (ends.max / ends.min) ** (k / (points - 1)) for k in range(1, points - 1)]
        return [ends.min, *between, ends.max]
    linear = space.uniform
    if linear is None:
        raise ValueError(f"parameters[{parameter.name}].searchSpace: is empty")
    between = [linear.min + (linear.max - linear.min) * k / (points - 1) for k in range(1, points - 1)]
    return [linear.min, *between, linear.max]
