"""A decoder reads a text at its last token: which one that is must not depend on the texts beside it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from few_shot_kit import tiny
from trainer_kit import Job, merged, rows

from finetune_api import Recipe
from finetune_trainer import inference, model
from finetune_trainer.tasks import kind_of

TEXTS = ["box", "it was very late and the order is a good one", "it was great"]
TASKS: dict[str, dict[str, Any]] = {
    "classification": {},
    "regression": {
        "task": "Regression",
        "dataset": {"labels": None, "train": "train.jsonl", "validation": "validation.jsonl", "test": None},
    },
}


@pytest.fixture
def unlike(job: Job, tmp_path: Path) -> Job:
    """A Llama whose configuration pads with 0, and whose tokenizer has no padding."""
    folder = tmp_path / "unlike"
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.model)
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(folder)
    tiny("llama", transformers.AutoModelForCausalLM, len(tokenizer)).save_pretrained(folder)
    data = tmp_path / "data"
    data.mkdir()
    for file in job.data.iterdir():
        (data / file.name).write_bytes(file.read_bytes())
    for name, examples in (("train", rows(40)), ("validation", rows(12, offset=100))):
        lengths = [json.dumps({"text": row["text"], "label": len(row["text"])}) for row in examples]
        (data / f"{name}.jsonl").write_text("\n".join(lengths))
    return replace(job, model=folder, data=data)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("lora", [None, {"rank": 4, "merge": False}], ids=["whole", "adapters"])
def test_what_a_decoder_says_of_a_text_does_not_depend_on_others(unlike: Job, task: str, lora: dict[str, Any] | None) -> None:
    unlike.changes = merged(TASKS[task], {"hyperparameters": {"epochs": 1}, "model": {"lora": lora}})
    unlike.run()
    predictor = inference.load(unlike.output / "model")
    answer = (lambda a: a["value"]) if task == "regression" else (lambda a: list(a["probabilities"].values()))
    alone = [answer(predictor.predict([text])[0]) for text in TEXTS]
    np.testing.assert_allclose([answer(a) for a in predictor.predict(TEXTS)], alone, atol=1e-6)


def test_the_saved_model_and_its_tokenizer_pad_alike(unlike: Job) -> None:
    unlike.run(hyperparameters={"epochs": 1})
    folder = unlike.output / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert stock.config.pad_token_id == tokenizer.pad_token_id == 3
    with torch.inference_mode():
        alone = [stock(**tokenizer([text], return_tensors="pt")).logits[0] for text in TEXTS]
        together = stock(**tokenizer(TEXTS, return_tensors="pt", padding=True)).logits
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=0)


def test_an_encoder_that_counts_positions_from_its_padding_keeps_it(job: Job, tmp_path: Path) -> None:
    folder = tmp_path / "roberta"
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.model)
    tokenizer.pad_token = "[SEP]"
    tokenizer.save_pretrained(folder)
    tiny("roberta", transformers.AutoModel, len(tokenizer)).save_pretrained(folder)
    recipe = Recipe.model_validate(job.recipe().model_dump(by_alias=True, exclude_none=True))
    built = model.build(folder, recipe, kind_of(recipe.task, recipe.dataset), model.load_tokenizer(folder, recipe))
    assert built.config.pad_token_id == 0
