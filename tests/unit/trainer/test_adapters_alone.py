"""Adapters without the model they belong to (model.lora.merge: false) are put on it as they were trained beside it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from few_shot_kit import scores
from trainer_kit import Job, make_model, rows

from finetune_trainer import inference
from finetune_trainer.errors import TrainingFailure

CHANGES: dict[str, Any] = {"model": {"lora": {"rank": 2, "alpha": 4, "merge": False}}, "hyperparameters": {"epochs": 6}}


def _in_16_bits(folder: Path) -> None:
    transformers.AutoModel.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)


def _for_five_labels(folder: Path) -> None:
    transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=5).save_pretrained(folder)


@pytest.fixture
def own(job: Job, tmp_path: Path) -> Job:
    """A job with a model of its own."""
    return replace(job, model=make_model(tmp_path / "base"), changes=CHANGES)


@pytest.mark.parametrize("saved", [_in_16_bits, _for_five_labels])
def test_they_say_what_they_said_when_they_were_trained(own: Job, saved: Callable[[Path], None]) -> None:
    saved(own.model)
    own.run()
    predictor = inference.load(own.output / "model")
    assert {p.dtype for p in predictor.model.parameters()} == {torch.float32}
    found = predictor.evaluate(rows(15, offset=300)).values
    told = {name: value for name, value in scores(own).items() if name.startswith("test/")}
    assert {f"test/{name}": value for name, value in found.items()} == pytest.approx(told, rel=1e-5)


def test_a_model_that_they_do_not_fit_is_told(own: Job) -> None:
    own.run()
    wider = transformers.BertConfig(
        vocab_size=23, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(wider).save_pretrained(own.model)  # somebody has replaced it
    with pytest.raises(TrainingFailure, match="the model cannot be loaded") as failed:
        inference.load(own.output / "model")
    assert failed.value.failure.reason == "ModelNotFound"
