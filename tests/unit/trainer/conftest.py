"""Fixtures of the trainer's tests: one tiny model and data set a session, a fresh job a test."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoint_kit import Place
from few_shot_kit import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from trainer_kit import Job, make_model, rows, write_data


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def job(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> Job:
    return Job(tmp_path / "job", tiny_model, tiny_data)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture(scope="session")
def masked(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny tokenizer with a mask, and a BERT that fills it in."""
    folder = tmp_path_factory.mktemp("masked")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer.save_pretrained(folder)
    tiny("bert", transformers.AutoModelForMaskedLM, len(tokenizer)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def byte_level() -> Any:
    """A byte-level tokenizer as RoBERTa has: words begin with the space before them."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    corpus = [row["text"] + " great terrible. Title: Text:" for row in rows(200)] * 3
    made.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=420, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), special, strict=True))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, cls_token="<s>", sep_token="</s>", **names)
    fast.add_special_tokens({"mask_token": transformers.AddedToken("<mask>", lstrip=True, special=True)})
    return fast
