"""`finetune predict` and `finetune evaluate`: a trained model at work on texts from the command line, a pipe or a file."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_cli import inputs, show
from finetune_cli.errors import UserError
from finetune_trainer.data import read_table
from finetune_trainer.errors import TrainingFailure

if TYPE_CHECKING:
    from finetune_trainer.inference import Predictor

SHOWN_CHARACTERS = 60
TABLES = (".csv", ".jsonl")


def predict(
    model: str, texts: list[str], *, file: Path | None, text_column: str | None, as_json: bool, s3_root: Path | None
) -> int:
    """Prints label and probabilities of each text, in order; 0. Raises UserError."""
    if texts and file is not None:
        raise UserError("give texts or --file, not both")
    with _model(model, s3_root) as predictor:
        if file is not None:
            texts = _texts_of(file, text_column or predictor.card.get("textColumn", "text"))
        elif not texts:
            if sys.stdin.isatty():
                show.note("reading texts from the terminal, one per line; Ctrl-D ends")
            texts = [line for line in sys.stdin.read().splitlines() if line.strip()]
        if not texts:
            raise UserError(f"there is nothing to label: {file or 'standard input'} is empty")
        predictions = predictor.predict(texts)
        labels = predictor.labels
    if as_json:
        both = zip(texts, predictions, strict=True)
        show.as_json([{"text": t, "label": p.label, "probabilities": p.probabilities} for t, p in both])
        return 0
    rows = [
        (_short(text), p.label, *(f"{p.probabilities[label]:.3f}" for label in labels))
        for text, p in zip(texts, predictions, strict=True)
    ]
    show.table("predictions", ("text", "label", *labels), rows, words=("text", "label"))
    return 0


def evaluate(
    model: str, data: Path, *, text_column: str | None, label_column: str | None, as_json: bool, s3_root: Path | None
) -> int:
    """Prints the scores on a labelled file; 0. Raises UserError."""
    if data.suffix not in TABLES:
        raise UserError(f"--data {data}: must be a .csv or .jsonl file")
    with _model(model, s3_root) as predictor:
        text = text_column or predictor.card.get("textColumn", "text")
        label = label_column or predictor.card.get("labelColumn", "label")
        rows = _table(data, (text, label))
        scored = predictor.evaluate(_column(rows, text, data), [str(row[label]) for row in rows])
        per_class = scored.per_class(predictor.labels)
    if as_json:
        show.as_json({"model": model, "data": str(data), "examples": len(rows), "metrics": scored.values, "perClass": per_class})
        return 0
    values = [f"{value:.4f}" for value in scored.values.values()]
    show.table(f"{data}: {len(rows)} examples", list(scored.values), [values])
    show.scores("by label", per_class)
    return 0


@contextmanager
def _model(model: str, s3_root: Path | None) -> "Iterator[Predictor]":
    """The model, ready; failures of the trainer's code become UserErrors with their own exit code."""
    # Before transformers is imported: its progress bars would mix with our output.
    for name, value in (
        ("TOKENIZERS_PARALLELISM", "false"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
    ):
        os.environ.setdefault(name, value)
    from finetune_trainer.inference import load

    try:
        with inputs.model_folder(model, inputs.s3_root(s3_root)) as folder:
            yield load(folder)
    except TrainingFailure as failure:
        raise UserError(failure.message, failure.failure.exit_code or 1) from failure


def _texts_of(file: Path, column: str) -> list[str]:
    if file.suffix in TABLES:
        return _column(_table(file, (column,)), column, file)
    if file.suffix != ".txt":
        raise UserError(f"--file {file}: must be a .csv, .jsonl or .txt file")
    try:
        return [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8: save the file as UTF-8") from error


def _table(file: Path, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    try:
        return read_table(file, columns, str(file))
    except TrainingFailure as failure:
        # The trainer's sentences name the manifest's fields; here the columns are named by flags.
        message = failure.message.replace("dataset.textColumn", "--text-column").replace("dataset.labelColumn", "--label-column")
        raise UserError(message, failure.failure.exit_code or 1) from failure


def _column(rows: list[dict[str, Any]], column: str, file: Path) -> list[str]:
    wrong = [n for n, row in enumerate(rows, start=1) if not isinstance(row[column], str)]
    if wrong:
        raise UserError(f"{file}: the {column} of row {wrong[0]} is not a text")
    return [row[column] for row in rows]


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= SHOWN_CHARACTERS else f"{flat[: SHOWN_CHARACTERS - 1]}…"
