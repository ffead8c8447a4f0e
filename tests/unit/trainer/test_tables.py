"""Reading rows: csv, jsonl and parquet give the same ones; every bad row is told by file and line and never by its text."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from finetune_api.recipe import Dataset
from finetune_api.tasks import Task
from finetune_trainer import tables
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.splits import Read, read_file
from finetune_trainer.tables import BadRow
from finetune_trainer.tasks import TaskKind, kind_of

SECRET = "confidential-words-of-a-customer"


def kind(task: str = "SequenceClassification", **changes: Any) -> TaskKind:
    return kind_of(Task(task), Dataset.model_validate({"uri": "file:///data", "labels": ["bad", "good"]} | changes))


def read(tmp_path: Path, content: str | bytes, *, name: str = "train.csv", **changes: Any) -> Read:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_file(path, kind(**changes), name=name)


def write_parquet(path: Path, **columns: Any) -> Path:
    parquet.write_table(pa.table(columns), path)
    return path


# ------------------------------------------------------------------------------------------------------------ good rows --
def test_csv_with_quotes_line_breaks_and_a_byte_order_mark(tmp_path: Path) -> None:
    content = '\ufefftext,label,extra\n"a, quoted\ntwo lines",good,1\n\nplain "inside",bad,2\n'
    examples = read(tmp_path, content).examples
    assert examples.texts == ["a, quoted\ntwo lines", 'plain "inside"']
    assert examples.labels.tolist() == [1, 0]


def test_lines_may_end_as_on_windows(tmp_path: Path) -> None:
    made = read(tmp_path, '\n\ntext,label\r\n"two\r\nlines",good\r\nx,ugly\r\n')
    assert made.examples.texts == ["two\nlines"]
    assert [row.said.split(":")[0] for row in made.bad] == ["line 6"]
    made = read(tmp_path, '\ufeff{"text": "x", "label": "good"}\r\n\r\n{"text": "y"}\r\n', name="train.jsonl")
    assert made.examples.texts == ["x"]
    assert made.bad == [BadRow("line 3: there is no column 'label'")]


def test_jsonl_with_numbers_as_labels_and_line_separators_in_texts(tmp_path: Path) -> None:
    rows = [{"text": "one\u2028line", "label": 1}, {"text": "é", "label": "0"}]
    content = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    examples = read(tmp_path, content, name="train.jsonl", labels=["0", "1"]).examples
    assert examples.texts == ["one\u2028line", "é"]
    assert examples.labels.tolist() == [1, 0]


def test_a_long_text_in_csv(tmp_path: Path) -> None:
    assert len(read(tmp_path, f"text,label\n{'long ' * 50_000},good\n").examples.texts[0]) == 250_000


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r")).filter(lambda t: t.strip())


@given(st.lists(st.tuples(TEXTS, st.sampled_from(["bad", "good"])), min_size=1, max_size=8))
def test_all_formats_give_the_same_rows(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    folder = tmp_path_factory.mktemp("formats")
    written = io.StringIO(newline="")
    csv.writer(written).writerows([("text", "label"), *rows])
    (folder / "x.csv").write_bytes(written.getvalue().encode())
    (folder / "x.jsonl").write_bytes("\n".join(json.dumps({"text": t, "label": n}) for t, n in rows).encode())
    write_parquet(folder / "x.parquet", text=[t for t, _ in rows], label=[n for _, n in rows])
    for suffix in tables.SUFFIXES:
        found = tables.read_all(folder / f"x{suffix}", ("text", "label"))
        assert [(row["text"], row["label"]) for row in found] == rows, suffix


# ------------------------------------------------------------------------------------------------------------- bad rows --
BAD: dict[str, tuple[str | bytes, str, str]] = {
    "unknown-label": (f"text,label\nx,good\n{SECRET},terrible\n", "train.csv", r"line 3: its label is not one of .*bad, good"),
    "empty-text": ("text,label\nx,good\n  ,good\n", "train.csv", "line 3: text is empty"),
    "null-text": ('{"text": "x", "label": "good"}\n{"text": null, "label": "good"}\n', "train.jsonl", "line 2: text is empty"),
    "half-an-emoji": (
        '{"text": "x", "label": "good"}\n{"text": "\\ud83d", "label": "good"}\n',
        "train.jsonl",
        "line 2: .*surrog",
    ),
    "line-after-line-break": (f'text,label\n"a\nb",good\n{SECRET},ugly\n', "train.csv", "line 4: its label"),
    "ragged": (f"text,label\nx,good\n{SECRET}, and more,good\n", "train.csv", r"line 3 has 3 fields, the header has 2: quote"),
    "short-row": (f"text,label\nx,good\n{SECRET}\n", "train.csv", "line 3 has 1 fields, the header has 2"),
    "words-after-a-quote": (f'text,label\nx,good\n"{SECRET}" x,good\n', "train.csv", "line 3 is not valid csv"),
    "latin-1": (b"text,label\nok,good\ncaf\xe9,good\n", "train.csv", "line 3 is not UTF-8: save the file as UTF-8"),
    "latin-1-json": (
        b'{"text": "x", "label": "good"}\n{"text": "caf\xe9", "label": "bad"}',
        "train.jsonl",
        "line 2 is not UTF-8",
    ),
    "nul": (b"text,label\na,good\n\0,good\n", "train.csv", "line 3 holds a NUL byte"),
    "not-json": (f'{{"text": "x", "label": "good"}}\n{{"text": "{SECRET}", \n', "train.jsonl", "line 2 is not valid JSON"),
    "long-number": (
        f'{{"text": "x", "label": "good"}}\n{{"text": {"1" * 5000}}}\n',
        "train.jsonl",
        "line 2 is not valid JSON: too",
    ),
    "deep": (f'{{"text": "x", "label": "good"}}\n{"[" * 100_000}\n', "train.jsonl", "line 2 is not valid JSON"),
    "not-an-object": (f'{{"text": "x", "label": "good"}}\n["{SECRET}"]\n', "train.jsonl", "line 2 is not a JSON object"),
    "no-label": (
        f'{{"text": "x", "label": "good"}}\n{{"text": "{SECRET}"}}\n',
        "train.jsonl",
        r"line 2: there is no column 'label'$",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_told_and_the_others_are_read(tmp_path: Path, case: str) -> None:
    content, name, said = BAD[case]
    more = {"train.csv": b"y,bad\n", "train.jsonl": b'\n{"text": "y", "label": "bad"}\n'}[name]
    made = read(tmp_path, (content.encode() if isinstance(content, str) else content) + more, name=name)
    assert len(made.examples) == 2
    assert len(made.bad) == 1
    assert re.search(f"^{said}", made.bad[0].said)
    assert SECRET not in made.bad[0].said
    assert "terrible" not in made.bad[0].said, "a label that is not listed is text as well"


SPOILT: dict[str, tuple[str | bytes, str, str]] = {
    "empty-file": ("", "train.csv", "the file is empty"),
    "blank-file": (" \n\n", "train.csv", "the file is empty"),
    "no-text-column": (f"message,label\n{SECRET},good\n", "train.csv", r"no column 'text'; the columns are 'message', 'label'"),
    "no-label-column": (
        f'{{"text": "{SECRET}"}}\n{{"text": "x"}}\n',
        "train.jsonl",
        r"line 1: there is no column 'label'; the columns are 'text': correct the columns in dataset",
    ),
    "no-header": (
        f"{SECRET} Anna Berg,good\nx,bad\n",
        "train.csv",
        r"no column 'text', 'label'; line 1 does not look like a header \(it has 2 fields\): add one, or correct the columns in",
    ),
    "no-header-in-a-script-without-spaces": (f"我叫安娜,{SECRET}\n", "train.csv", r"line 1 does not look like a header"),
    "keys-that-are-texts": (
        f'{{"My name is Anna: {SECRET}": 1}}\n',
        "train.jsonl",
        r"line 1: .* not look like a header \(it has 1 ",
    ),
    "an-index-without-a-name": (
        f",message,label\n0,{SECRET},good\n",
        "train.csv",
        "the columns are '', 'message', 'label': correct",
    ),
    "a-column-twice": ("text,label,text\nx,good,y\n", "train.csv", "the column 'text' is there twice"),
    "utf-16": ("text,label\n".encode("utf-16"), "train.csv", "line 1 is not UTF-8"),
    "utf-16-without-a-mark": ("text,label\n".encode("utf-16-le"), "train.csv", "line 1 holds a NUL byte"),
    "header-with-an-open-quote": ('text,"label\nx,good\n', "train.csv", "line 1 is not valid csv"),
    "empty-parquet": (b"", "train.parquet", "cannot be read as parquet"),
    "csv-named-parquet": (f"text,label\n{SECRET},good\n", "train.parquet", "cannot be read as parquet"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_file_is_told_and_never_by_text(tmp_path: Path, case: str) -> None:
    content, name, said = SPOILT[case]
    with pytest.raises(TrainingFailure, match=said) as failed:
        read(tmp_path, content, name=name)
    assert failed.value.failure.reason == "DataInvalid"
    assert failed.value.message.startswith(f"{name}: ")
    assert SECRET not in failed.value.message


def test_a_quote_that_is_not_closed_counts_for_every_line_that_it_swallows(tmp_path: Path) -> None:
    made = read(tmp_path, 'text,label\nx,good\n"open,good\n' + "y,bad\n" * 7)
    assert made.examples.texts == ["x"]
    assert made.bad == [BadRow("line 3 is not valid csv: unexpected end of data", 8)]
    # One that another quote closes by chance: what follows is read again, what was swallowed is counted.
    made = read(tmp_path, 'text,label\n"open,good\ny,bad\n"quoted",bad\nz,bad\n')
    assert made.examples.texts == ["z"]
    assert [row.rows for row in made.bad] == [3]


def test_the_first_bad_rows_are_listed_by_file_and_the_others_counted() -> None:
    def bad(*lines: int) -> list[BadRow]:
        return [BadRow(f"line {line} is bad") for line in lines]

    assert tables.listed({"a": bad(1, 2), "b": bad(4)}) == "a: line 1 is bad; line 2 is bad; b: line 4 is bad"
    many = tables.listed({"a": [*bad(1, 2, 3), BadRow("line 4 is open", 10)], "b": [], "c": bad(*range(1, 9))})
    assert many == "a: line 1 is bad; line 2 is bad; line 3 is bad; line 4 is open; c: line 1 is bad and 16 more rows"


def test_a_file_with_bad_rows_is_refused_where_all_rows_are_needed(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text\nx,y\nz\n")
    with pytest.raises(TrainingFailure, match=r"x\.csv: line 2 has 2 fields, the header has 1"):
        tables.read_all(tmp_path / "x.csv", ("text",))


# -------------------------------------------------------------------------------------------------------------- parquet --
def test_parquet_with_nulls_and_wrong_types(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "train.parquet",
        text=["x", None, "z", " ", "w"],
        label=["good", "good", None, "bad", "bad"],
        unused=[1, 2, 3, 4, 5],
    )
    made = read_file(path, kind(), name="train.parquet")
    assert made.examples.texts == ["x", "w"]
    assert made.examples.labels.tolist() == [1, 0]
    assert [row.said.split(":")[0] for row in made.bad] == ["row 2", "row 3", "row 4"]
    wrong = write_parquet(tmp_path / "wrong.parquet", text=[1, 2], label=["good", "bad"])
    assert [row.said for row in read_file(wrong, kind(), name="x").bad] == [f"row {i}: text is empty or no text" for i in (1, 2)]


@pytest.mark.parametrize(
    "labels",
    [
        pa.array([1, 0], pa.int8()),
        pa.array(["1", "0"]).dictionary_encode(),
        pa.array(["1", "0"], pa.large_string()),
        pa.array(["1", "0"], pa.string_view()),
    ],
    ids=lambda a: str(a.type),
)
def test_labels_in_parquet_may_be_numbers_and_dictionaries(tmp_path: Path, labels: Any) -> None:
    path = write_parquet(tmp_path / "train.parquet", text=["x", "y"], label=labels)
    assert read_file(path, kind(labels=["0", "1"]), name="x").examples.labels.tolist() == [1, 0]


def test_words_and_chats_in_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "tags.parquet", text=[["a", "b"], ["c", None]], label=[["O", "B-X"], ["O", "O"]])
    made = read_file(path, kind("TokenClassification", labels=["O", "B-X"]), name="x")
    assert (made.examples.texts, made.examples.labels) == ([["a", "b"]], [[0, 1]])
    assert [row.said for row in made.bad] == ["row 2: text is empty or no text"]
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    path = write_parquet(tmp_path / "chat.parquet", messages=[chat])
    assert read_file(path, kind("CausalLM", labels=None, messagesColumn="messages"), name="x").examples.texts == [chat]


def test_a_text_in_parquet_that_is_not_utf_8_is_one_bad_row(tmp_path: Path) -> None:
    offsets, data = pa.array([0, 1, 5, 6], pa.int32()).buffers()[1], pa.py_buffer(b"xcaf\xe9y")
    path = write_parquet(
        tmp_path / "train.parquet",
        text=pa.StringArray.from_buffers(3, offsets, data),
        label=["good", "good", "bad"],
    )
    made = read_file(path, kind(), name="x")
    assert (made.examples.texts, made.bad) == (["x", "y"], [BadRow("row 2 is not UTF-8: save the file as UTF-8")])


def test_a_column_that_parquet_lacks_or_has_twice_is_told(tmp_path: Path) -> None:
    lacking = write_parquet(tmp_path / "a.parquet", text=["x"], mood=["good"])
    with pytest.raises(TrainingFailure, match="there is no column 'label'; the columns are 'text', 'mood': correct"):
        read_file(lacking, kind(), name="a.parquet")
    parquet.write_table(pa.Table.from_arrays([pa.array(["x"])] * 3, names=["text", "label", "text"]), tmp_path / "b.parquet")
    with pytest.raises(TrainingFailure, match="the column 'text' is there twice"):
        read_file(tmp_path / "b.parquet", kind(), name="b.parquet")
    lacking = write_parquet(tmp_path / "c.parquet", **{f"My name is Anna, {SECRET}": ["x"]})
    with pytest.raises(TrainingFailure, match=r"no column 'text', 'label'; what is there does not look like a header") as failed:
        read_file(lacking, kind(), name="c.parquet")
    assert SECRET not in failed.value.message


def test_damage_in_the_middle_of_parquet_is_told(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", text=[f"text {i}" for i in range(5000)], label=["good"] * 5000)
    content = bytearray(path.read_bytes())
    content[100:400] = bytes(300)
    path.write_bytes(content)
    with pytest.raises(TrainingFailure, match=r"x\.parquet: cannot be read as parquet"):
        read_file(path, kind(), name="x.parquet")
