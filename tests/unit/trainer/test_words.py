"""Tags belong to words, also where a word has no token: a BERT tokenizer takes out zero-width spaces and control characters."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from tokenizers import normalizers
from trainer_kit import LABELS, WORDS

from finetune_api.recipe import Dataset
from finetune_api.tasks import Task
from finetune_trainer.tasks import IGNORED, Examples, kind_of
from finetune_trainer.tasks.tagging import Tagging

NOTHING = "\u200b"


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    found = transformers.AutoTokenizer.from_pretrained(tiny_model)
    found.backend_tokenizer.normalizer = normalizers.BertNormalizer()
    return found


@pytest.fixture
def kind() -> Tagging:
    made = kind_of(Task.TOKEN_CLASSIFICATION, Dataset.model_validate({"uri": "file:///d", "labels": LABELS}))
    assert isinstance(made, Tagging)
    return made


def encoded(kind: Tagging, tokenizer: Any, length: int, *rows: list[str]) -> Any:
    return kind.encode(Examples("x", list(rows), [[i % 3 for i in range(len(words))] for words in rows]), tokenizer, length)


def test_a_tag_is_that_of_its_word_where_one_before_has_no_token(kind: Tagging, tokenizer: Any) -> None:
    rows = [["good", NOTHING, "box", "late"], [NOTHING, "kind"], ["it", "was", NOTHING]]
    data = encoded(kind, tokenizer, 32, *rows)
    # A model that answers what is written in the labels.
    outputs = np.zeros((3, 1 + int(data.lengths.max())))
    for i, labels in enumerate(data.labels):
        outputs[i, 1 : 1 + len(labels)] = np.where(labels == IGNORED, 0, labels)
    assert [answer["tags"] for answer in kind.answer(outputs, data, rows)] == [
        [LABELS[0], None, LABELS[2], LABELS[0]],
        [None, LABELS[1]],
        [LABELS[0], LABELS[1], None],
    ]


def test_a_row_is_cut_where_a_word_that_has_tokens_is_missing(kind: Tagging, tokenizer: Any) -> None:
    words = [*WORDS["positive"], NOTHING]
    assert encoded(kind, tokenizer, 7, words).truncated == 0
    assert encoded(kind, tokenizer, 6, words).truncated == 1
    # Of the last word one token is missing, and its tag is on the first.
    assert encoded(kind, tokenizer, 4, ["good", "box-late"]).truncated == 0
    assert encoded(kind, tokenizer, 4, ["good", "box-late", "kind"], ["good", NOTHING, "box"]).truncated == 1
