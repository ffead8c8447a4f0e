"""`finetune validate`: reads manifest and data exactly as the trainer will, and counts what is there."""

import tempfile
from pathlib import Path

import numpy as np

from finetune_api import Recipe
from finetune_cli import inputs, show
from finetune_cli.errors import UserError
from finetune_trainer.config import Runtime
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.run import read_splits
from finetune_trainer.tasks import Examples


def validate(file: Path, overrides: list[str], *, s3_root: Path | None) -> int:
    """Prints the counts of every split; 0. Raises UserError where manifest or data must be changed."""
    job = inputs.job(file, overrides)
    if not job.spec.has_recipe:
        show.line(f"{file}: the manifest is fine; trainer.command has no data that we could check")
        return 0
    recipe = job.spec.recipe()
    with tempfile.TemporaryDirectory(prefix="finetune-validate-") as scratch:
        runtime = Runtime(job_name=job.metadata["name"], workdir=Path(scratch), s3_root=inputs.s3_root(s3_root))
        try:
            splits = read_splits(recipe, runtime)
        except TrainingFailure as failure:
            raise UserError(f"{failure.failure.reason}: {failure.message}") from failure
    _show(recipe, splits)
    show.line(f"{file}: the manifest and its data are fine")
    return 0


def _show(recipe: Recipe, splits: dict[str, Examples]) -> None:
    keys = {name: [str(text) for text in split.texts] for name, split in splits.items()}
    labels = recipe.labels if isinstance(next(iter(splits.values())).labels, np.ndarray) else []
    rows = []
    for name, split in splits.items():
        double = len(split) - len(set(keys[name]))
        longest = max(len(text) for text in keys[name])
        rows.append((name, str(len(split)), *_counts(split, len(labels)), str(double), str(longest)))
    header = ("split", "examples", *labels, "duplicates", "longest")
    show.table(f"data of {recipe.dataset.uri} (longest: characters)", header, rows, words=("split",))
    seen = set(keys["train"])
    for name, texts in keys.items():
        shared = sum(text in seen for text in texts)
        if name != "train" and shared:
            show.note(f"warning: {shared} texts of {name} are also in train: scores on {name} will look better than they are")


def _counts(split: Examples, labels: int) -> list[str]:
    """How many examples each label has: ids, or a 0/1 for each label."""
    if not labels:
        return []
    counts = split.labels.sum(axis=0) if split.labels.ndim == 2 else np.bincount(split.labels, minlength=labels)
    return [str(int(count)) for count in counts]
