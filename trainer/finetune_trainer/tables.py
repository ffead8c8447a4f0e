"""Reads rows from files: csv, jsonl, parquet. What is no row is yielded as a BadRow in its place: who reads counts them and may go on.

What spoils a whole file (it is empty, has no such column, is no parquet) raises TrainingFailure(DataInvalid). Errors name the file and
the line, never a row's text: texts are customers' words and errors end up in statuses and logs.
"""

import csv
import io
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_trainer.errors import TrainingFailure

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".csv", ".jsonl", ".parquet")
MAX_REPORTED = 5

Row = dict[str, Any]


@dataclass(frozen=True)
class BadRow:
    """Something that cannot be used."""

    said: str
    """A sentence that begins with where it is: `line 3 is not valid JSON`."""
    rows: int = 1
    """How many rows are lost: with a quote that is not closed, all lines that it swallowed."""


def read(path: Path, name: str, columns: Sequence[str]) -> Iterator[tuple[str, Row] | BadRow]:
    """Rows that have all these columns, each with where it is (`line 3`, in parquet `row 3`), in file order."""
    if path.suffix == ".parquet":
        return _parquet(path, name, columns)
    # Not line by line: a quoted csv field may hold line breaks. The BOM that spreadsheets write is no text. Bytes that are not UTF-8
    # become half surrogates, which nothing else does, and spoil the row that they are in.
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    if not text.strip():
        raise TrainingFailure("DataInvalid", f"{name}: the file is empty")
    return _csv(text, name, columns) if path.suffix == ".csv" else _jsonl(text, name, columns)


def read_all(path: Path, columns: Sequence[str], name: str | None = None) -> list[Row]:
    """All rows (for `finetune evaluate` and `predict`). Raises TrainingFailure(DataInvalid) where there is a bad one."""
    name = name or path.name
    items = list(read(path, name, columns))
    if bad := [item for item in items if isinstance(item, BadRow)]:
        raise TrainingFailure("DataInvalid", listed({name: bad}))
    return [item[1] for item in items if not isinstance(item, BadRow)]


def listed(bad: Mapping[str, Sequence[BadRow]]) -> str:
    """The first few, by file, and how many more there are."""
    left, parts, more = MAX_REPORTED, [], 0
    for name, rows in bad.items():
        if shown := rows[:left]:
            parts.append(f"{name}: {'; '.join(row.said for row in shown)}")
        more += sum(row.rows for row in rows) - len(shown)
        left -= len(shown)
    return "; ".join(parts) + (f" and {more} more rows" if more else "")


def count(bad: Mapping[str, Sequence[BadRow]]) -> int:
    """Rows that cannot be used, of all files."""
    return sum(row.rows for rows in bad.values() for row in rows)


def check(bad: Mapping[str, Sequence[BadRow]], allowed: int) -> None:
    """Raises TrainingFailure(DataInvalid) where there are more of them, by file, than dataset.maxBadRows allows."""
    if (found := count(bad)) > allowed:
        more = f"; {found} bad rows are more than dataset.maxBadRows ({allowed})" if allowed else ""
        raise TrainingFailure("DataInvalid", f"{listed(bad)}{more}")


def _csv(text: str, name: str, columns: Sequence[str]) -> Iterator[tuple[str, Row] | BadRow]:
    csv.field_size_limit(sys.maxsize)  # after a field that is too long it would go on in the middle of it
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            said = f"line {line} is not valid csv: {error}"
            if header is None:
                raise TrainingFailure("DataInvalid", f"{name}: {said}") from error
            yield BadRow(said, reader.line_num + 1 - line)
            continue
        broken = _broken("".join(row))
        if header is None:
            if broken:
                raise TrainingFailure("DataInvalid", f"{name}: line {line} {broken}")
            if row:
                header = row
                _need(columns, header, name, f"line {line}")
        elif row and len(row) != len(header):
            said = f"line {line} has {len(row)} fields, the header has {len(header)}: quote texts that hold a comma"
            yield BadRow(said, reader.line_num + 1 - line)
        elif broken:
            yield BadRow(f"line {line} {broken}")
        elif row:
            yield f"line {line}", dict(zip(header, row, strict=True))


def _jsonl(text: str, name: str, columns: Sequence[str]) -> Iterator[tuple[str, Row] | BadRow]:
    lacked = set(columns)
    first: tuple[str, list[str]] | None = None
    for number, raw in enumerate(text.split("\n"), start=1):
        where = f"line {number}"
        if not raw.strip():
            continue
        if broken := _broken(raw):
            yield BadRow(f"{where} {broken}")
            continue
        try:
            row = json.loads(raw)
        except (ValueError, RecursionError) as error:
            yield BadRow(f"{where} is not valid JSON: {getattr(error, 'msg', 'too deep, or too long a number')}")
            continue
        if not isinstance(row, dict):
            yield BadRow(f"{where} is not a JSON object")
            continue
        first = first or (where, list(row))
        lacked -= row.keys()
        if missing := [c for c in columns if c not in row]:
            yield BadRow(f"{where}: there is no column {', '.join(map(repr, missing))}")
        else:
            yield where, row
    if first and lacked:  # by no row: it is the recipe that is wrong
        _need(columns, first[1], f"{name}: {first[0]}")


def _parquet(path: Path, name: str, columns: Sequence[str]) -> Iterator[tuple[str, Row] | BadRow]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    with path.open("rb") as raw:
        try:
            file = ParquetFile(raw)
            _need(columns, file.schema_arrow.names, name)
            for batch in file.iter_batches(columns=list(columns)):
                for values in zip(*(_values(batch.column(c)) for c in columns), strict=True):
                    number += 1
                    if any(value is _NOT_UTF8 for value in values):
                        yield BadRow(f"row {number} {_UTF8}")
                    else:
                        yield f"row {number}", dict(zip(columns, values, strict=True))
        except (ArrowException, OSError) as error:
            where = f" after row {number}" if number else ""
            raise TrainingFailure("DataInvalid", f"{name}: cannot be read as parquet{where}") from error


_NOT_UTF8 = object()
_UTF8 = "is not UTF-8: save the file as UTF-8"
_UNREADABLE = re.compile("[\0\udc80-\udcff]")


def _values(column: "pa.Array") -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]
    return values


def _value(scalar: "pa.Scalar") -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return _NOT_UTF8


def _broken(text: str) -> str | None:
    found = _UNREADABLE.search(text)
    return found and ("holds a NUL byte" if found[0] == "\0" else _UTF8)


_NAME = re.compile(r"([A-Za-z_][A-Za-z0-9_.-]{0,39})?")
"""What surely is a column's name (or none, as of a spreadsheet's row numbers): without a header a row's text stands there. In Latin letters:
not every script has spaces between words."""


def _need(columns: Sequence[str], present: Sequence[str], where: str, header: str = "what is there") -> None:
    if missing := [c for c in columns if c not in present]:
        if all(map(_NAME.fullmatch, present)):
            said = f"the columns are {', '.join(map(repr, present[:20]))}: correct the columns in dataset"
        else:
            said = (
                f"{header} does not look like a header (it has {len(present)} fields): add one, or correct the columns in dataset"
            )
        raise TrainingFailure("DataInvalid", f"{where}: there is no column {', '.join(map(repr, missing))}; {said}")
    if double := next((c for c in columns if present.count(c) > 1), None):
        raise TrainingFailure("DataInvalid", f"{where}: the column {double!r} is there twice")
