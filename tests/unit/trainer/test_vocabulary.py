"""Training the rows of the embeddings that occur gives what training all of them gives."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_resume import EVERY_STEP, same
from trainer_kit import LABELS, Job, Killed, make_model, rows, write_csv, write_data

from finetune_trainer import optim, vocabulary
from finetune_trainer.errors import TrainingFailure

WORD_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"
NO_DROPOUT = {"hidden": 0.0, "attention": 0.0, "classifier": 0.0}
SPARE = 100


@pytest.fixture
def wide(job: Job, tmp_path: Path) -> Job:
    """A job whose model knows many words that no text has."""
    return replace(job, model=make_model(tmp_path / "wide", spare_words=SPARE))


def weights(job: Job) -> dict[str, torch.Tensor]:
    return load_file(job.output / "model/model.safetensors")


def fresh(job: Job, name: str, **hyperparameters: Any) -> Job:
    return replace(job, home=job.home / name, runs=[], changes={"hyperparameters": hyperparameters})


def moments(job: Job) -> list[tuple[int, ...]]:
    return [
        tuple(t.shape) for name, t in load_file(job.newest() / "trainer/optimizer.safetensors").items() if "exp_avg_sq" in name
    ]


def test_the_result_is_that_of_the_whole_embeddings(wide: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"dropout": NO_DROPOUT, "weightDecay": 0.0, "precision": "FP32"}
    narrow, whole = fresh(wide, "narrow", **options), fresh(wide, "whole", **options)
    narrow.run()
    monkeypatch.setattr(vocabulary, "WORTHWHILE", 0.0)
    whole.run()
    expected, found = weights(whole), weights(narrow)
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-6, msg=name)
    assert any(shape[0] > SPARE for shape in moments(whole))
    assert not any(shape[0] > SPARE for shape in moments(narrow))


def test_words_that_do_not_occur_stay_as_they_were(wide: Job) -> None:
    fresh(wide, "decayed", weightDecay=0.5).run()
    before = load_file(wide.model / "model.safetensors")["embeddings.word_embeddings.weight"]
    after = weights(replace(wide, home=wide.home / "decayed"))[WORD_EMBEDDINGS]
    assert torch.equal(after[-SPARE:], before[-SPARE:])
    assert not torch.equal(after[:-SPARE], before[:-SPARE])


def test_killed_and_resumed_is_the_run_never_killed(wide: Job) -> None:
    whole, cut = (replace(wide, home=wide.home / name, changes=EVERY_STEP, runs=[]) for name in ("whole", "cut"))
    whole.run()
    with pytest.raises(Killed):
        cut.run(kill_at=9)
    cut.run()
    same(whole, cut)


def test_other_examples_at_a_resume_are_told(wide: Job, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    moved = replace(wide, data=data, changes=EVERY_STEP, runs=[])
    with pytest.raises(Killed):
        moved.run(kill_at=3)
    changed = rows(44)
    changed[0]["text"] = "spare1 " + changed[0]["text"]
    write_csv(data / "train.csv", changed)
    with pytest.raises(TrainingFailure, match=r"dataset\.train: its examples are not those .* step 2") as failed:
        moved.run()
    assert failed.value.failure.reason == "DataInvalid"


def test_validation_may_have_words_that_training_lacks(wide: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_data(tmp_path / "data")
    words = [{"text": f"spare{i} spare{i + 20}", "label": LABELS[i % 3]} for i in range(9)]
    write_csv(data / "validation.csv", words)
    options = {"dropout": NO_DROPOUT, "weightDecay": 0.0, "precision": "FP32"}
    losses = []
    for share in (0.5, 0.0):
        monkeypatch.setattr(vocabulary, "WORTHWHILE", share)
        run = replace(fresh(wide, f"narrowed-{share}", **options), data=data)
        run.run()
        metrics = json.loads((run.output / "result.json").read_text())["result"]["metrics"]
        losses.append(float(next(m["value"] for m in metrics if m["name"] == "validation/loss")))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_default_rate_follows_from_the_model_and_not_from_the_data(wide: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForSequenceClassification

    size = AutoModelForSequenceClassification.from_pretrained(wide.model, num_labels=len(LABELS)).num_parameters()
    monkeypatch.setattr(optim, "DEFAULT_RATES", ((size, 0.1), (size + 1, 0.2)))
    for share in (0.0, 0.5):  # all words, and those that occur
        monkeypatch.setattr(vocabulary, "WORTHWHILE", share)
        run = fresh(wide, f"narrowed-{share}", learningRate=None, epochs=1)
        run.run()
        assert json.loads((run.output / "result.json").read_text())["resolved"]["learningRate"] == 0.2


@pytest.mark.parametrize(
    ("hyperparameters", "narrowed"),
    [
        ({}, True),
        ({"freeze": {"embeddings": True}}, False),
        ({"freeze": {"embeddings": True}, "unfreeze": {}}, True),
        ({"adversarial": {}}, True),
    ],
    ids=["plain", "frozen", "thawing", "adversarial"],
)
def test_embeddings_that_train_are_narrowed(wide: Job, hyperparameters: dict[str, Any], narrowed: bool) -> None:
    job = fresh(wide, "job", **hyperparameters)
    job.run()
    before = load_file(wide.model / "model.safetensors")["embeddings.word_embeddings.weight"]
    after = {n: t for file in (job.newest() / "model").glob("*.safetensors") for n, t in load_file(file).items()}[WORD_EMBEDDINGS]
    assert after.shape == before.shape
    assert torch.equal(after[-SPARE:], before[-SPARE:])
    assert torch.equal(after, before) == (not narrowed)
    assert not any(shape[0] > SPARE for shape in moments(job))


def test_embeddings_that_the_head_shares_stay_whole() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from finetune_api.hyperparameters import Hyperparameters

    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1, n_positions=16))
    vocabulary.narrow(model, Hyperparameters(), np.array([1, 2], dtype=np.int32), 0)
    assert not list(vocabulary.narrowed(model))


def test_a_word_without_a_place_is_an_error_in_training(wide: Job) -> None:
    whole = torch.nn.Embedding(10, 4, padding_idx=0)
    narrow = vocabulary.NarrowEmbedding(whole, torch.tensor([0, 3, 5]))
    assert torch.equal(narrow(torch.tensor([3, 5])), whole(torch.tensor([3, 5])))
    with pytest.raises(IndexError):
        narrow(torch.tensor([4]))
    narrow.eval()
    assert torch.equal(narrow(torch.tensor([4])), whole(torch.tensor([4])))


@pytest.mark.parametrize("first", [0.0, 0.5], ids=["whole-then-narrow", "narrow-then-whole"])
def test_narrow_and_whole_embeddings_go_on_from_one_another(wide: Job, monkeypatch: pytest.MonkeyPatch, first: float) -> None:
    """As when a training that is cut up (FSDP), whose embeddings are whole, goes on in one process."""
    options = {"dropout": NO_DROPOUT, "weightDecay": 0.0, "precision": "FP32"}
    whole, mixed = fresh(wide, "whole", **options), fresh(wide, "mixed", **options)
    monkeypatch.setattr(vocabulary, "WORTHWHILE", 0.5 - first)
    whole.run()
    monkeypatch.setattr(vocabulary, "WORTHWHILE", first)
    with pytest.raises(Killed):
        mixed.run(kill_at=9)
    monkeypatch.setattr(vocabulary, "WORTHWHILE", 0.5 - first)
    end = mixed.run()
    assert end.resumed_from is not None
    assert mixed.newest().name.startswith(whole.newest().name[:-4]), "the same last step, of another execution"
    weights = [  # of the last step: the best may be of one before the interruption
        {n: t for file in (j.newest() / "model").glob("*.safetensors") for n, t in load_file(file).items()}
        for j in (whole, mixed)
    ]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-6)
    assert moments(mixed) == moments(whole)
