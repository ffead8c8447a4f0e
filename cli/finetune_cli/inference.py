"""`finetune predict` and `finetune evaluate`: a trained model at work on texts from the command line, a pipe or a file."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api.names import MODEL_CARD_FILE
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
    with _model_folder(model, s3_root) as folder:
        # Before the model is loaded, which takes seconds: a wrong file is told at once.
        card = _card(folder)
        texts = texts or _texts_to_label(file, text_column or card.get("textColumn", "text"))
        predictor = _load(folder)
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
    with _model_folder(model, s3_root) as folder:
        card = _card(folder)
        text, label = text_column or card.get("textColumn", "text"), label_column or card.get("labelColumn", "label")
        rows = _table(data, (text, label))
        texts = _column(rows, text, data)
        predictor = _load(folder)
        scored = predictor.evaluate(texts, [str(row[label]) for row in rows])
        per_class = scored.per_class(predictor.labels)
    if as_json:
        show.as_json({"model": model, "data": str(data), "examples": len(rows), "metrics": scored.values, "perClass": per_class})
        return 0
    values = [f"{value:.4f}" for value in scored.values.values()]
    show.table(f"{data}: {len(rows)} examples", list(scored.values), [values])
    show.scores("by label", per_class)
    return 0


@contextmanager
def _model_folder(model: str, s3_root: Path | None) -> Iterator[Path]:
    """A folder with the model's files. What fails in the trainer's code meanwhile becomes a UserError with that failure's exit code."""
    try:
        with inputs.model_folder(model, inputs.s3_root(s3_root)) as folder:
            yield folder
    except TrainingFailure as failure:
        raise UserError(failure.message, failure.failure.exit_code or 1) from failure


def _card(folder: Path) -> dict[str, Any]:
    """What the training wrote down beside the model."""
    file = folder / MODEL_CARD_FILE
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TrainingFailure(
            "ModelNotFound", f"{folder}: there is no {file.name}; it is not a model of `finetune run`"
        ) from error
    except ValueError as error:
        raise TrainingFailure("ModelNotFound", f"{file}: is not JSON: train again, or restore it") from error
    if not isinstance(card, dict) or not isinstance(card.get("maxLength"), int):
        raise TrainingFailure("ModelNotFound", f"{file}: has no maxLength: train again, or restore it")
    return card


def _load(folder: Path) -> "Predictor":
    # Before transformers is imported: its progress bars would mix with our output.
    quiet = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    from finetune_trainer.inference import load

    return load(folder)


def _texts_to_label(file: Path | None, column: str) -> list[str]:
    if file is not None:
        texts = _texts_of(file, column)
    else:
        if sys.stdin.isatty():
            show.note("reading texts from the terminal, one per line; Ctrl-D ends")
        texts = [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not texts:
        raise UserError(f"there is nothing to label: {file or 'standard input'} is empty")
    return texts


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
