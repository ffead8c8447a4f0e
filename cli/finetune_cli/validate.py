"""`finetune validate`: reads manifest and data exactly as the trainer will, and counts what is there."""

import tempfile
from collections import Counter
from pathlib import Path

from finetune_api import Recipe
from finetune_cli import inputs, show
from finetune_cli.errors import UserError
from finetune_trainer.config import Runtime
from finetune_trainer.data import Examples
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.run import read_splits


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
    labels = recipe.dataset.labels
    rows = []
    for name, split in splits.items():
        counts = Counter(split.labels.tolist())
        double = len(split) - len(set(split.texts))
        longest = max(len(text) for text in split.texts)
        rows.append((name, str(len(split)), *(str(counts[i]) for i in range(len(labels))), str(double), str(longest)))
    header = ("split", "examples", *labels, "duplicates", "longest")
    show.table(f"data of {recipe.dataset.uri} (longest: characters)", header, rows, words=("split",))
    seen = set(splits["train"].texts)
    for name, split in splits.items():
        shared = sum(text in seen for text in split.texts)
        if name != "train" and shared:
            show.note(f"warning: {shared} texts of {name} are also in train: scores on {name} will look better than they are")
