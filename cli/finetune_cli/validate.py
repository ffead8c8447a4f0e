"""`finetune validate`: reads manifest and data exactly as the trainer will, and counts what is there."""

import tempfile
from pathlib import Path

from finetune_api import Recipe
from finetune_api.sweep import HyperparameterSweep
from finetune_api.sweep_rules import cells, check_start
from finetune_cli import inputs, show
from finetune_cli.errors import UserError
from finetune_operator.search.suggest import algorithm_of
from finetune_trainer.config import Runtime
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.splits import Splits, read_splits
from finetune_trainer.tasks import kind_of


def validate(file: Path, overrides: list[str], *, s3_root: Path | None, dataset_mirror: str | None) -> int:
    """Prints the counts of every split, and of a sweep what it will do; 0. Raises UserError where manifest or data must be changed."""
    sweep = inputs.sweep(file, overrides) if inputs.is_sweep(file) else None
    if sweep is not None:
        _show_plan(sweep)
        spec, name = sweep.spec.trial_template.spec, sweep.metadata["name"]
    else:
        job = inputs.job(file, overrides)
        spec, name = job.spec, job.metadata["name"]
    if not spec.has_recipe:
        show.line(f"{file}: the manifest is fine; trainer.command has no data that we could check")
        return 0
    recipe = spec.recipe()
    splits = _read(recipe, name, s3_root, dataset_mirror)
    _show(recipe, splits)
    if sweep is not None:
        _show_rungs(sweep, len(splits["train"]))
    show.line(f"{file}: the manifest and its data are fine")
    return 0


def _read(recipe: Recipe, name: str, s3_root: Path | None, dataset_mirror: str | None) -> Splits:
    with tempfile.TemporaryDirectory(prefix="finetune-validate-") as scratch:
        runtime = Runtime(
            job_name=name,
            workdir=Path(scratch),
            s3_root=inputs.s3_root(s3_root),
            dataset_mirror=inputs.mirror("--dataset-mirror", dataset_mirror),
        )
        try:
            return read_splits(recipe, runtime, show.line)[0]
        except TrainingFailure as failure:
            raise UserError(f"{failure.failure.reason}: {failure.message}") from failure


def _show_plan(sweep: HyperparameterSweep) -> None:
    """What the search will do. Raises UserError where it cannot begin."""
    spec = sweep.spec
    try:
        check_start(spec)
    except ValueError as error:
        raise UserError(f"spec.{error}") from error
    grid = spec.search_algorithm.grid
    names = [f"{p.name} ({p.path or p.env})" for p in spec.parameters]
    show.line(f"{sweep.metadata['name']}: {spec.objective.direction} {spec.objective.metric} over {', '.join(names)}")
    count = sum(1 for _ in cells(spec.parameters, grid.points)) if grid is not None else spec.num_trials
    trials = f"{count} trials, {spec.parallel_trials} at a time"
    chooses = f"grid of {count} cells" if grid is not None else algorithm_of(spec)
    given = f", the first {len(spec.initial_points)} as given" if spec.initial_points else ""
    show.line(f"{trials}, chosen by {chooses}{given}")
    rungs = spec.prune_algorithm.rungs
    judged = f"judged at {', '.join(map(str, rungs))} training examples seen" if rungs else "no trial is stopped early"
    show.line(judged)


def _show_rungs(sweep: HyperparameterSweep, rows: int) -> None:
    """Where the rungs lie in the training."""
    given = sweep.spec.trial_template.spec.hyperparameters
    seen, why = rows * given.epochs, f"{given.epochs} epochs of {rows}"
    if given.max_steps is not None and given.max_steps * given.batch_size < seen:
        seen, why = given.max_steps * given.batch_size, f"{given.max_steps} steps of {given.batch_size}"
    show.line(f"a trial sees {seen} examples ({why}); a tenth of that, a usual minExamples, is {max(1, seen // 10)}")
    if late := [rung for rung in sweep.spec.prune_algorithm.rungs if rung >= seen]:
        show.line(f"no trial is stopped at {', '.join(map(str, late))}: it has ended by then")


def _show(recipe: Recipe, splits: Splits) -> None:
    """The same counts as a table, with what no training stumbles over: texts that are there twice, and long ones."""
    kind = kind_of(recipe.task, recipe.dataset)
    counts = {name: kind.counts(split.labels) for name, split in splits.items()}
    rows = []
    for name, split in splits.items():
        keys = [kind.key(text, target) for text, target in zip(split.texts, split.labels, strict=True)]
        cells = (len(split), *counts[name].values(), len(keys) - len(set(keys)), max(len(key) for key in keys))
        rows.append((name, *map(str, cells)))
    header = ("split", "examples", *counts["train"], "duplicates", "longest")
    show.table(f"data of {recipe.dataset.uri} (longest: characters)", header, rows, words=("split",))
