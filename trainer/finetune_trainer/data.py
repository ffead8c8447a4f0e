"""Reads the examples and plans the batches. Pure but for reading files.

Errors name the file and the row, never a row's text: texts are customers' words and errors end up in statuses and logs.
"""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from finetune_trainer.errors import TrainingFailure
from finetune_trainer.tasks import IGNORED, BadRowError, Encoded, Examples, TaskKind

if TYPE_CHECKING:
    import torch

BUCKET_BATCHES = 50
"""Batches whose rows are sorted by length together: little padding, and still a random mix."""
MAX_REPORTED = 5


def read_split(path: Path, kind: TaskKind, *, name: str, training: bool = False) -> Examples:
    """One file's examples. Raises TrainingFailure(DataInvalid) that lists the first few bad rows."""
    texts: list[Any] = []
    targets: list[Any] = []
    bad: list[str] = []
    for line, row in _rows(path, name, kind.columns):
        try:
            text, target = kind.input(row), kind.target(row)
        except BadRowError as error:
            bad.append(f"line {line}: {error}")
        else:
            texts.append(text)
            targets.append(target)
    if bad:
        more = f" and {len(bad) - MAX_REPORTED} more rows" if len(bad) > MAX_REPORTED else ""
        raise TrainingFailure("DataInvalid", f"{name}: {'; '.join(bad[:MAX_REPORTED])}{more}")
    if not texts:
        raise TrainingFailure("DataInvalid", f"{name}: the file holds no examples")
    labels = kind.collect(targets)
    if training and (absent := kind.absent(labels)):
        raise TrainingFailure(
            "DataInvalid",
            f"{name}: no row has the label {', '.join(map(repr, absent))} of dataset.labels: correct dataset.labels or the data",
        )
    return Examples(name, texts, labels)


def read_table(path: Path, columns: tuple[str, ...], name: str | None = None) -> list[dict[str, Any]]:
    """Rows of a csv or jsonl file that must have these columns (for `finetune evaluate` and `predict`)."""
    return [row for _, row in _rows(path, name or path.name, columns)]


def _rows(path: Path, name: str, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        # Not line by line: a quoted csv field may hold line breaks. The BOM that spreadsheets write is no text.
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise TrainingFailure("DataInvalid", f"{name}: line {line} is not UTF-8: save the file as UTF-8") from error
    if not text.strip():
        raise TrainingFailure("DataInvalid", f"{name}: the file is empty")
    if "\0" in text:
        raise TrainingFailure("DataInvalid", f"{name}: line {text[: text.index(chr(0))].count(chr(10)) + 1} holds a NUL byte")
    yield from _csv_rows(text, name, columns) if path.suffix == ".csv" else _json_rows(text, name, columns)


def _csv_rows(text: str, name: str, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        header = next(reader)
        _need(columns, header, name)
        line = reader.line_num + 1
        for row in reader:
            if row and len(row) != len(header):
                raise TrainingFailure(
                    "DataInvalid",
                    f"{name}: line {line} has {len(row)} fields, the header has {len(header)}: quote texts that hold a comma",
                )
            if row:
                yield line, dict(zip(header, row, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise TrainingFailure("DataInvalid", f"{name}: line {line} is not valid csv: {error}") from error


def _json_rows(text: str, name: str, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, raw in enumerate(text.split("\n"), start=1):
        if not raw.strip():
            continue
        try:
            row = json.loads(raw)
        except json.JSONDecodeError as error:
            raise TrainingFailure("DataInvalid", f"{name}: line {line} is not valid JSON: {error.msg}") from error
        if not isinstance(row, dict):
            raise TrainingFailure("DataInvalid", f"{name}: line {line} is not a JSON object")
        _need(columns, list(row), f"{name}: line {line}")
        yield line, row


def _need(columns: tuple[str, ...], present: list[str], where: str) -> None:
    missing = [c for c in columns if c not in present]
    if missing:
        raise TrainingFailure(
            "DataInvalid",
            f"{where}: there is no column {', '.join(map(repr, missing))}; the columns are {', '.join(map(repr, present[:20]))}: "
            "correct the columns in dataset",
        )


def plan(seed: int, epoch: int, batch_size: int, lengths: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """The global batches of one epoch: row numbers, every row once. A pure function of its arguments.

    Rows are shuffled, sorted by length within windows of BUCKET_BATCHES batches, cut into batches, and the batches shuffled.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    order = rng.permutation(len(lengths))
    window = BUCKET_BATCHES * batch_size
    batches: list[npt.NDArray[np.int64]] = []
    for start in range(0, len(order), window):
        rows = order[start : start + window]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches.extend(rows[i : i + batch_size] for i in range(0, len(rows), batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]


def collate(encoded: Encoded, rows: npt.NDArray[np.int64], pad: int, device: "torch.device") -> "dict[str, torch.Tensor]":
    """Tensors of one batch: input_ids, attention_mask and, of pairs, token_type_ids (rows, longest); or features (rows, width); and
    labels (rows, ...)."""
    import torch

    arrays: dict[str, npt.NDArray[Any]] = {}
    if encoded.features is not None:
        arrays["features"] = encoded.features[rows]
    else:
        ids = [encoded.ids[r] for r in rows]
        arrays |= {"input_ids": _padded(ids, pad), "attention_mask": _padded([[1] * len(row) for row in ids], 0)}
        if encoded.types is not None:
            arrays["token_type_ids"] = _padded([encoded.types[r] for r in rows], 0)
    by_token = isinstance(encoded.labels, list)
    arrays["labels"] = _padded([encoded.labels[r] for r in rows], IGNORED) if by_token else encoded.labels[rows]
    return {name: torch.from_numpy(a).to(device, non_blocking=True) for name, a in arrays.items()}


def _padded(rows: list[list[int]], value: int) -> npt.NDArray[np.int64]:
    """On the right: (rows, longest)."""
    out = np.full((len(rows), max(len(row) for row in rows)), value, dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
