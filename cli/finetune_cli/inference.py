"""`finetune predict` and `finetune evaluate`: a trained model at work on texts from the command line, a pipe or a file."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_cli import inputs, show
from finetune_cli.errors import UserError
from finetune_trainer import tables
from finetune_trainer.errors import TrainingFailure

if TYPE_CHECKING:
    from finetune_trainer.inference import Card, Predictor

SHOWN_CHARACTERS = 60


def predict(
    model: str, texts: list[str], *, file: Path | None, text_column: str | None, as_json: bool, s3_root: Path | None
) -> int:
    """Prints what the model says of each text, in order; 0. Raises UserError."""
    if texts and file is not None:
        raise UserError("give texts or --file, not both")
    with _model_folder(model, s3_root) as folder:
        # Before the model is loaded, which takes seconds: a wrong file is told at once.
        card = _with_columns(_card(folder), text_column, None)
        inputs_: list[Any] = list(texts) or _texts_to_label(file, card)
        if isinstance(inputs_[0], str) and len(card.kind.inputs) > 1:
            raise UserError(f"the model reads {', '.join(card.kind.inputs)} of a row: give a .csv or .jsonl file with --file")
        _check(inputs_)
        predictor = _load(folder, card)
        answers = predictor.predict(inputs_)
    if as_json:
        show.as_json([{"text": t, **answer} for t, answer in zip(inputs_, answers, strict=True)])
        return 0
    header, rows = _as_table(predictor.kind.labels, inputs_, answers)
    show.table("predictions", header, rows, words=tuple(h for h in header if h not in predictor.kind.labels))
    return 0


def _as_table(
    labels: list[str], texts: list[Any], answers: list[dict[str, Any]]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows: what was said, and where there are probabilities those of all labels."""
    if "tags" in answers[0]:
        tagged = (zip(a["words"], a["tags"], strict=True) for a in answers)
        return ("words with tags",), [(" ".join(f"{w}/{t}" if t else w for w, t in words),) for words in tagged]
    said = next(key for key in ("label", "labels", "value", "completion") if key in answers[0])
    shown = [", ".join(a[said]) if said == "labels" else f"{a[said]:.4g}" if said == "value" else a[said] for a in answers]
    odds = labels if "probabilities" in answers[0] else []
    rows = [
        (_short(_flat(text)), words, *(f"{a['probabilities'][label]:.3f}" for label in odds))
        for text, words, a in zip(texts, shown, answers, strict=True)
    ]
    return ("text", said, *odds), rows


def evaluate(
    model: str, data: Path, *, text_column: str | None, label_column: str | None, as_json: bool, s3_root: Path | None
) -> int:
    """Prints the scores on a labelled file; 0. Raises UserError."""
    if data.suffix not in tables.SUFFIXES:
        raise UserError(f"--data {data}: must be a .csv, .jsonl or .parquet file")
    with _model_folder(model, s3_root) as folder:
        card = _with_columns(_card(folder), text_column, label_column)
        rows = _table(data, card.kind.columns)
        _inputs(card, rows, data)
        predictor = _load(folder, card)
        scored = predictor.evaluate(rows)
    if as_json:
        values = {"metrics": scored.values, "perClass": scored.per_class}
        show.as_json({"model": model, "data": str(data), "examples": len(rows), **values})
        return 0
    shown = [f"{value:.4f}" for value in scored.values.values()]
    show.table(f"{data}: {len(rows)} examples", list(scored.values), [shown])
    if scored.per_class:
        show.scores("by label", scored.per_class)
    return 0


@contextmanager
def _model_folder(model: str, s3_root: Path | None) -> Iterator[Path]:
    """A folder with the model's files. What fails in the trainer's code meanwhile becomes a UserError with that failure's exit code."""
    try:
        with inputs.model_folder(model, inputs.s3_root(s3_root)) as folder:
            yield folder
    except TrainingFailure as failure:
        raise UserError(failure.message, failure.failure.exit_code or 1) from failure


def _card(folder: Path) -> "Card":
    """What the training wrote down beside the model."""
    from finetune_trainer.inference import Card

    return Card.read(folder)


def _with_columns(card: "Card", text: str | None, label: str | None) -> "Card":
    """Read from other columns than the training data's."""
    if text and card.dataset.prompt is not None:
        raise UserError(f"--text-column {text}: the model's template reads {', '.join(card.dataset.prompt.columns)}")
    text_field, label_field = "text_column", "label_column"
    if card.dataset.messages_column is not None:
        text_field = "messages_column"
    elif card.dataset.prompt_column is not None:
        text_field, label_field = "prompt_column", "completion_column"
    columns = {field: name for field, name in ((text_field, text), (label_field, label)) if name}
    return replace(card, dataset=card.dataset.model_copy(update=columns))


def _load(folder: Path, card: "Card") -> "Predictor":
    # Before transformers is imported: its progress bars would mix with our output.
    quiet = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    from finetune_trainer.inference import load

    return load(folder, card)


def _texts_to_label(file: Path | None, card: "Card") -> list[Any]:
    if file is not None:
        texts = _texts_of(file, card)
    else:
        if sys.stdin.isatty():
            show.note("reading texts from the terminal, one per line; Ctrl-D ends")
        texts = _lines(sys.stdin.buffer.read(), "standard input")
    if not texts:
        raise UserError(f"there is nothing to label: {file or 'standard input'} is empty")
    return texts


def _texts_of(file: Path, card: "Card") -> list[Any]:
    if file.suffix in tables.SUFFIXES:
        return _inputs(card, _table(file, card.kind.inputs), file)
    if file.suffix != ".txt":
        raise UserError(f"--file {file}: must be a .csv, .jsonl, .parquet or .txt file")
    return _lines(file.read_bytes(), str(file))


def _lines(data: bytes, source: str) -> list[Any]:
    try:
        return [line for line in data.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: is not UTF-8: save the file as UTF-8") from error


def _check(texts: list[Any]) -> None:
    """Of texts that are in no table what is asked of those that are."""
    from finetune_trainer.tasks.base import BadRowError, text_of

    for number, text in enumerate(texts, start=1):
        name = f"text {number}"
        try:
            if isinstance(text, str):
                text_of({name: text}, name)
        except BadRowError as error:
            raise UserError(str(error)) from error


def _table(file: Path, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    try:
        return tables.read_all(file, columns, str(file))
    except TrainingFailure as failure:
        # The trainer's sentences name the manifest's fields; here the columns are named by flags.
        message = failure.message.replace("correct the columns in dataset", "say others with --text-column, --label-column")
        raise UserError(message, failure.failure.exit_code or 1) from failure


def _inputs(card: "Card", rows: list[dict[str, Any]], file: Path) -> list[Any]:
    from finetune_trainer.inference import read_inputs

    try:
        return read_inputs(card.kind, rows)
    except TrainingFailure as failure:
        raise UserError(f"{file}: {failure.message}", failure.failure.exit_code or 1) from failure


def _flat(text: Any) -> str:
    """Of a pair of texts, or of a chat, whose last message counts."""
    if isinstance(text, str):
        return text
    return str(text[-1]["content"]) if isinstance(text, list) else " / ".join(text)


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= SHOWN_CHARACTERS else f"{flat[: SHOWN_CHARACTERS - 1]}…"
