"""Classification as a cloze question to a masked language model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from few_shot_kit import ENCODERS, refused, scores, tiny
from trainer_kit import LABELS, Job, Killed, merged, rows

from finetune_api.recipe import Dataset
from finetune_api.tasks import Task
from finetune_trainer import inference
from finetune_trainer.data import collate
from finetune_trainer.tasks import Encoded, Examples, kind_of
from finetune_trainer.tasks.cloze import Cloze

CPU = torch.device("cpu")


CLOZE: dict[str, Any] = {
    "prompt": {"template": "{text} it was {mask}", "verbalizers": {"negative": "bad", "neutral": "box", "positive": "good"}}
}


@pytest.fixture
def cloze(job: Job, masked: Path) -> Job:
    return replace(job, model=masked, changes={"dataset": CLOZE, "hyperparameters": {"epochs": 30, "learningRate": 5e-3}})


def asked(job: Job, **prompt: Any) -> Job:
    return replace(job, changes=merged(job.changes, {"dataset": {"prompt": prompt}}))


def test_a_masked_language_model_learns_to_fill_in_the_labels_word(cloze: Job) -> None:
    cloze.run()
    assert scores(cloze)["validation/macro_f1"] > 0.8
    folder = cloze.output / "model"
    stock = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    before = transformers.AutoModelForMaskedLM.from_pretrained(cloze.model).state_dict()
    changed = {n for n, w in stock.state_dict().items() if not torch.equal(w, before[n])}
    assert any("embeddings" in n for n in changed)
    assert any(n.startswith("cls.") for n in changed)
    predictor = inference.load(folder)
    words = [predictor.tokenizer.convert_tokens_to_ids(w) for w in ("bad", "box", "good")]
    texts = [row["text"] for row in rows(15, offset=300)]
    for text, answer in zip(texts, predictor.predict(texts), strict=True):
        given = predictor.tokenizer([f"{text} it was [MASK]"], return_tensors="pt")
        with torch.inference_mode():
            at = stock(**given).logits[0, (given["input_ids"][0] == predictor.tokenizer.mask_token_id).nonzero()[0, 0]]
        np.testing.assert_allclose(list(answer["probabilities"].values()), torch.softmax(at[words], 0).numpy(), atol=1e-5)
    told = scores(cloze)
    for name, value in predictor.evaluate(rows(15, offset=300)).values.items():
        assert value == pytest.approx(told[f"test/{name}"], rel=1e-3), name


def test_a_killed_cloze_goes_on_bit_for_bit(cloze: Job) -> None:
    short = merged(cloze.changes, {"hyperparameters": {"epochs": 3}})
    whole, cut = (replace(cloze, home=cloze.home / name, changes=short, runs=[]) for name in ("whole", "cut"))
    whole.run()
    with pytest.raises(Killed):
        cut.run(kill_at=9)
    cut.run()
    assert (whole.output / "model/model.safetensors").read_bytes() == (cut.output / "model/model.safetensors").read_bytes()


def test_adapters_learn_a_cloze(cloze: Job) -> None:
    alone = replace(cloze, changes=merged(cloze.changes, {"model": {"lora": {"rank": 4, "merge": False}}}))
    alone.run()
    assert not (alone.output / "model/model.safetensors").exists()
    again = inference.load(alone.output / "model").evaluate(rows(15, offset=300)).values
    assert again["loss"] == pytest.approx(scores(alone)["test/loss"], rel=1e-3)


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_head_reads_the_mask_alone_and_says_what_it_always_said(masked: Path, kind: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(masked)
    stock = tiny(kind, transformers.AutoModelForMaskedLM, len(tokenizer))
    mine = tiny(kind, transformers.AutoModelForMaskedLM, len(tokenizer))
    task = kind_of(Task.SEQUENCE_CLASSIFICATION, Dataset.model_validate({"uri": "file:///d", "labels": LABELS, **CLOZE}))
    assert isinstance(task, Cloze)
    task.attach(mine, tokenizer)
    data = task.encode(Examples("x", ["good", "the box was very slow"], np.array([2, 0])), tokenizer, 32)
    batch = collate(data, np.arange(2), 0, CPU)
    labels = batch.pop("labels")
    with torch.inference_mode():
        logits = mine(**batch).logits
        whole = stock(**batch).logits
    assert logits.shape == (2, 1, whole.shape[-1])
    at = whole[batch["input_ids"] == tokenizer.mask_token_id]
    torch.testing.assert_close(logits[:, 0], at)
    by_hand = torch.nn.functional.cross_entropy(at[:, task.word_ids], labels, reduction="sum")
    assert float(task.loss(logits, labels, 0.0)) == pytest.approx(float(by_hand), rel=1e-5)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"negative": "bad slow"}, "'bad slow' is not one token of the model's tokenizer but 'bad', 'slow'"),
        ({"negative": "dreadful"}, "'dreadful' is not one token of the model's tokenizer but '[UNK]'"),
    ],
)
def test_a_word_that_is_no_token_is_told(cloze: Job, words: dict[str, str], says: str) -> None:
    assert says in refused(asked(cloze, verbalizers=words))


def test_words_are_those_that_stand_behind_what_is_before_the_mask(byte_level: Any) -> None:
    def ids(text: str, **words: str) -> list[int]:
        data = {"uri": "file:///d", "labels": list(words), "prompt": {"template": text, "verbalizers": words}}
        task = kind_of(Task.SEQUENCE_CLASSIFICATION, Dataset.model_validate(data))
        assert isinstance(task, Cloze)
        return task.find_words(byte_level)

    behind = ids("{text} It was {mask}.", a="great", b="slow")
    assert byte_level.convert_ids_to_tokens(behind) == ["Ġgreat", "Ġslow"]
    assert byte_level.convert_ids_to_tokens(ids("{text}:{mask}", a="great", b="slow")) == ["great", "slow"]


def test_two_words_of_one_token_are_told(cloze: Job, tmp_path: Path) -> None:
    shutil.copytree(cloze.model, tmp_path / "uncased")
    file = tmp_path / "uncased/tokenizer.json"
    made = json.loads(file.read_text())
    file.write_text(json.dumps({**made, "normalizer": {"type": "Lowercase"}}))
    same = asked(replace(cloze, model=tmp_path / "uncased"), verbalizers={"negative": "Good"})
    assert "'Good' is the same token as the word of another label" in refused(same)


def test_a_model_without_a_head_for_words_is_told(cloze: Job, job: Job, tmp_path: Path) -> None:
    assert "the model's tokenizer has no mask" in refused(replace(cloze, model=job.model))
    shutil.copytree(cloze.model, tmp_path / "body")
    transformers.AutoModel.from_pretrained(cloze.model).save_pretrained(tmp_path / "body")
    assert "no trained head that fills in words" in refused(replace(cloze, model=tmp_path / "body"))


def test_long_texts_keep_their_question(masked: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(masked)
    task = kind_of(Task.SEQUENCE_CLASSIFICATION, Dataset.model_validate({"uri": "file:///d", "labels": LABELS, **CLOZE}))
    data: Encoded = task.encode(Examples("x", ["good " * 50, "bad [MASK]"], np.array([2, 0])), tokenizer, 16)
    assert [tokenizer.decode(row) for row in data.ids] == [
        "[CLS] " + "good " * 11 + "it was [MASK] [SEP]",
        "[CLS] bad it was [MASK] [SEP]",
    ]
    assert data.truncated == 1
