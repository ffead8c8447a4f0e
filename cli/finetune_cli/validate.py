"""`finetune validate`: reads manifest and data exactly as the trainer will, and counts what is there."""

import tempfile
from pathlib import Path

from finetune_api import Recipe
from finetune_cli import inputs, show
from finetune_cli.errors import UserError
from finetune_trainer.config import Runtime
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.splits import Splits, read_splits
from finetune_trainer.tasks import kind_of


def validate(file: Path, overrides: list[str], *, s3_root: Path | None, dataset_mirror: str | None) -> int:
    """Prints the counts of every split; 0. Raises UserError where manifest or data must be changed."""
    job = inputs.job(file, overrides)
    if not job.spec.has_recipe:
        show.line(f"{file}: the manifest is fine; trainer.command has no data that we could check")
        return 0
    recipe = job.spec.recipe()
    with tempfile.TemporaryDirectory(prefix="finetune-validate-") as scratch:
        runtime = Runtime(
            job_name=job.metadata["name"],
            workdir=Path(scratch),
            s3_root=inputs.s3_root(s3_root),
            dataset_mirror=inputs.mirror("--dataset-mirror", dataset_mirror),
        )
        try:
            splits, _ = read_splits(recipe, runtime, show.line)
        except TrainingFailure as failure:
            raise UserError(f"{failure.failure.reason}: {failure.message}") from failure
    _show(recipe, splits)
    show.line(f"{file}: the manifest and its data are fine")
    return 0


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
