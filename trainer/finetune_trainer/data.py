"""Reads the examples, turns them into tokens, and plans the batches. Pure but for reading files.

Errors name the file and the row, never a row's text: texts are customers' words and errors end up in statuses and logs.
"""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from finetune_api.recipe import Dataset
from finetune_trainer.errors import TrainingFailure

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

BUCKET_BATCHES = 50
"""Batches whose rows are sorted by length together: little padding, and still a random mix."""
MAX_REPORTED = 5


@dataclass(frozen=True)
class Examples:
    """One split: texts and label ids, in file order."""

    name: str
    texts: list[str]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Encoded:
    """One split as token ids; row i has ids[i] and labels[i]. `truncated` rows were longer than maxLength."""

    ids: list[list[int]]
    labels: npt.NDArray[np.int64]
    truncated: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.array([len(row) for row in self.ids], dtype=np.int64)


def read_split(path: Path, dataset: Dataset, *, name: str, training: bool = False) -> Examples:
    """One file's examples. Raises TrainingFailure(DataInvalid) that lists the first few bad rows."""
    ids = {label: i for i, label in enumerate(dataset.labels)}
    texts: list[str] = []
    labels: list[int] = []
    bad: list[str] = []
    for line, row in _rows(path, name, (dataset.text_column, dataset.label_column)):
        text, label = row[dataset.text_column], str(row[dataset.label_column])
        if isinstance(text, str) and any("\ud800" <= c <= "\udfff" for c in text):
            bad.append(
                f"line {line}: {dataset.text_column} holds half a surrogate pair (\\ud800 to \\udfff): it is no valid text"
            )
        elif not isinstance(text, str) or not text.strip():
            bad.append(f"line {line}: {dataset.text_column} is empty or no text")
        elif label not in ids:
            bad.append(f"line {line}: its {dataset.label_column} is not one of dataset.labels ({', '.join(dataset.labels)})")
        else:
            texts.append(text)
            labels.append(ids[label])
    if bad:
        more = f" and {len(bad) - MAX_REPORTED} more rows" if len(bad) > MAX_REPORTED else ""
        raise TrainingFailure("DataInvalid", f"{name}: {'; '.join(bad[:MAX_REPORTED])}{more}")
    if not texts:
        raise TrainingFailure("DataInvalid", f"{name}: the file holds no examples")
    missing = [label for label, i in ids.items() if i not in set(labels)]
    if training and missing:
        raise TrainingFailure(
            "DataInvalid",
            f"{name}: no row has the label {', '.join(map(repr, missing))} of dataset.labels: correct dataset.labels or the data",
        )
    return Examples(name, texts, np.array(labels, dtype=np.int64))


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
            "correct dataset.textColumn or dataset.labelColumn",
        )


def encode(examples: Examples, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> Encoded:
    """Token ids of every row, at most max_length each."""
    ids: list[list[int]] = tokenizer(examples.texts, truncation=True, max_length=max_length)["input_ids"]
    # A row of exactly max_length was most likely cut; counting exactly would mean tokenising twice.
    return Encoded(ids, examples.labels, sum(len(row) >= max_length for row in ids))


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
    """Tensors of one batch: input_ids and attention_mask (rows, longest), labels (rows,)."""
    import torch

    longest = max(len(encoded.ids[r]) for r in rows)
    ids = np.full((len(rows), longest), pad, dtype=np.int64)
    mask = np.zeros((len(rows), longest), dtype=np.int64)
    for i, row in enumerate(rows):
        tokens = encoded.ids[row]
        ids[i, : len(tokens)] = tokens
        mask[i, : len(tokens)] = 1
    arrays = {"input_ids": ids, "attention_mask": mask, "labels": encoded.labels[rows]}
    return {name: torch.from_numpy(a).to(device, non_blocking=True) for name, a in arrays.items()}
