"""Reading examples: every bad row is told by file and line and never by its text; batches are a pure function."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.recipe import Dataset
from finetune_api.tasks import Task
from finetune_trainer.data import BUCKET_BATCHES, plan, read_split
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.tasks import TaskKind, kind_of

SECRET = "confidential-words-of-a-customer"


def kind(task: str = "SequenceClassification", **changes: Any) -> TaskKind:
    return kind_of(Task(task), Dataset.model_validate({"uri": "file:///data", "labels": ["bad", "good"]} | changes))


def read(tmp_path: Path, content: str | bytes, *, name: str = "train.csv", training: bool = False, **changes: Any) -> Any:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_split(path, kind(**changes), name=name, training=training)


def test_csv_with_quotes_line_breaks_and_a_byte_order_mark(tmp_path: Path) -> None:
    content = '\ufefftext,label,extra\n"a, quoted\ntwo lines",good,1\n\nplain "inside",bad,2\n'
    examples = read(tmp_path, content)
    assert examples.texts == ["a, quoted\ntwo lines", 'plain "inside"']
    assert examples.labels.tolist() == [1, 0]


def test_jsonl_with_numbers_as_labels_and_line_separators_in_texts(tmp_path: Path) -> None:
    rows = [{"text": "one\u2028line", "label": 1}, {"text": "é", "label": "0"}]
    content = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    examples = read(tmp_path, content, name="train.jsonl", labels=["0", "1"])
    assert examples.texts == ["one\u2028line", "é"]
    assert examples.labels.tolist() == [1, 0]


BAD: dict[str, tuple[str | bytes, str, str]] = {
    "empty-file": ("", "train.csv", "the file is empty"),
    "blank-file": (" \n\n", "train.csv", "the file is empty"),
    "header-alone": ("text,label\n", "train.csv", "holds no examples"),
    "no-text-column": (f"message,label\n{SECRET},good\n", "train.csv", r"no column 'text'; the columns are 'message', 'label'"),
    "no-label-column": (
        f'{{"text": "{SECRET}"}}\n',
        "train.jsonl",
        r"line 1: there is no column 'label'.*correct the columns in dataset",
    ),
    "unknown-label": (f"text,label\nx,good\n{SECRET},terrible\n", "train.csv", r"line 3: its label is not one of .*bad, good"),
    "empty-text": ("text,label\n  ,good\n", "train.csv", "line 2: text is empty"),
    "null-text": ('{"text": null, "label": "good"}\n', "train.jsonl", "line 1: text is empty or no text"),
    "line-after-line-break": (f'text,label\n"a\nb",good\n{SECRET},ugly\n', "train.csv", "line 4: its label"),
    "ragged": (f"text,label\nx,good\n{SECRET}, and more,good\n", "train.csv", r"line 3 has 3 fields, the header has 2: quote"),
    "short-row": (f"text,label\n{SECRET}\n", "train.csv", "line 2 has 1 fields, the header has 2"),
    "open-quote": (f'text,label\nx,good\n"{SECRET},good\n', "train.csv", "line 3 is not valid csv"),
    "latin-1": (b"text,label\nok,good\ncaf\xe9,good\n", "train.csv", "line 3 is not UTF-8: save the file as UTF-8"),
    "utf-16": ("text,label\n".encode("utf-16"), "train.csv", "line 1 is not UTF-8"),
    "nul": (b"text,label\na,good\n\0,good\n", "train.csv", "line 3 holds a NUL byte"),
    "not-json": (f'{{"text": "x", "label": "good"}}\n{{"text": "{SECRET}", \n', "train.jsonl", "line 2 is not valid JSON"),
    "not-an-object": (f'["{SECRET}"]\n', "train.jsonl", "line 1 is not a JSON object"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_told_by_file_and_line_and_never_by_text(tmp_path: Path, case: str) -> None:
    content, name, said = BAD[case]
    with pytest.raises(TrainingFailure, match=said) as failed:
        read(tmp_path, content, name=name)
    assert failed.value.failure.reason == "DataInvalid"
    assert failed.value.message.startswith(f"{name}: ")
    assert SECRET not in failed.value.message
    assert "terrible" not in failed.value.message, "a label that is not listed is text as well"


def test_many_bad_rows_are_counted(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailure, match="line 6: .* and 4 more rows$"):
        read(tmp_path, "text,label\n" + "x,ugly\n" * 9)


def test_a_label_without_training_rows_is_told(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailure, match=r"no row has the label 'good' of dataset\.labels"):
        read(tmp_path, "text,label\nx,bad\n", training=True)
    assert len(read(tmp_path, "text,label\nx,bad\n")) == 1, "validation data need not have every label"


def test_encoding_cuts_at_max_length_and_counts(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    examples = read(tmp_path, f"text,label\n{'good ' * 30},good\nbad,bad\n")
    encoded = kind().encode(examples, tokenizer, 10)
    assert [len(row) for row in encoded.ids] == [10, 3]
    assert encoded.truncated == 1
    assert encoded.lengths.tolist() == [10, 3]


# --------------------------------------------------------------------------------------------------------- batch plan --
LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=400).map(lambda values: np.array(values, dtype=np.int64))


@settings(deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 100), size=st.integers(1, 40))
def test_an_epoch_holds_every_row_once_in_full_batches(lengths: Any, seed: int, epoch: int, size: int) -> None:
    batches = plan(seed, epoch, size, lengths)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // size)
    assert sorted(len(b) for b in batches)[1:] == [size] * (len(batches) - 1), "one batch may be smaller"


def test_the_plan_depends_on_its_arguments_alone() -> None:
    lengths = np.arange(1, 200, dtype=np.int64)
    np.random.seed(0)
    first = plan(1, 0, 8, lengths)
    np.random.seed(1)
    again = plan(1, 0, 8, lengths)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    for other in (plan(2, 0, 8, lengths), plan(1, 1, 8, lengths)):
        assert any(len(a) != len(b) or (a != b).any() for a, b in zip(first, other, strict=True))


def test_buckets_leave_little_padding_and_batches_come_in_mixed_order() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 120, size=BUCKET_BATCHES * 16 * 2)
    batches = plan(3, 0, 16, lengths)
    longest = np.array([lengths[b].max() for b in batches])
    padded = sum(m * len(b) for m, b in zip(longest, batches, strict=True))
    assert lengths.sum() / padded > 0.95
    # Neither rising nor falling: sorted batches would be a curriculum nobody asked for.
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.3
