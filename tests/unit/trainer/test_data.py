"""Batches are a pure function of the recipe; what is collated is what was encoded."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.recipe import Dataset
from finetune_api.tasks import Task
from finetune_trainer.data import BUCKET_BATCHES, collate, plan
from finetune_trainer.tasks import IGNORED, Encoded, Examples, Ragged, kind_of


def test_encoding_cuts_at_max_length_and_counts(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    kind = kind_of(Task.SEQUENCE_CLASSIFICATION, Dataset.model_validate({"uri": "file:///data", "labels": ["bad", "good"]}))
    encoded = kind.encode(Examples("x", ["good " * 30, "bad"], np.array([1, 0])), tokenizer, 10)
    assert [len(row) for row in encoded.ids] == [10, 3]
    assert encoded.truncated == 1
    assert encoded.lengths.tolist() == [10, 3]


ROWS = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=9), min_size=1, max_size=12)


@given(ROWS, st.data())
def test_rows_are_padded_as_lists_would_be(rows: list[list[int]], data: st.DataObject) -> None:
    chosen = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=6)))
    ragged = Ragged.of(rows)
    assert [row.tolist() for row in ragged] == rows
    assert ragged.lengths.tolist() == [len(row) for row in rows]
    longest = max(len(rows[i]) for i in chosen)
    assert ragged.padded(chosen, -100).tolist() == [rows[i] + [-100] * (longest - len(rows[i])) for i in chosen]


def test_a_batch_has_what_the_model_reads() -> None:
    ids, types, tags = (Ragged.of(rows) for rows in ([[2, 0, 3], [2, 3]], [[0, 1, 1], [0, 1]], [[IGNORED, 4, IGNORED], [5, 6]]))
    batch = collate(Encoded(ids, tags, 0, types), np.array([1, 0]), 9, torch.device("cpu"))
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[2, 3, 9], [2, 0, 3]],
        "attention_mask": [[1, 1, 0], [1, 1, 1]],
        "token_type_ids": [[0, 1, 0], [0, 1, 1]],
        "labels": [[5, 6, IGNORED], [IGNORED, 4, IGNORED]],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    plain = collate(Encoded(ids, np.array([0.5, 1.5], dtype=np.float32), 0), np.array([1, 0]), 9, torch.device("cpu"))
    assert plain["labels"].tolist() == [1.5, 0.5]
    assert "token_type_ids" not in plain


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
