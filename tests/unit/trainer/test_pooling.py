"""A frozen encoder whose features are their mean, computed once, and the head that learns from them."""

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from few_shot_kit import ENCODERS, refused, result, scores, tiny
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from trainer_kit import LABELS, WORDS, Job, Killed, merged, rows

from finetune_trainer import inference, layers, model, pooling
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.run import Run
from finetune_trainer.tasks import kind_of

MEAN: dict[str, Any] = {"model": {"pooling": "Mean"}, "hyperparameters": {"learningRate": None, "epochs": 3}}
EVERY: dict[str, Any] = {"checkpoint": {"everySteps": 1}}


def mean(job: Job, name: str = "mean", **changes: Any) -> Job:
    return replace(job, home=job.home / name, changes=merged(MEAN, changes), runs=[])


def features_of(folder: Path, texts: list[str]) -> Any:
    """Attention-masked means, text by text."""
    encoder, tokenizer = (auto.from_pretrained(folder) for auto in (transformers.AutoModel, transformers.AutoTokenizer))
    with torch.inference_mode():
        return np.stack([encoder.eval()(**tokenizer([t], return_tensors="pt")).last_hidden_state[0].mean(dim=0) for t in texts])


def test_the_result_is_the_encoder_as_it_was_and_a_head_that_has_learned(job: Job) -> None:
    done = mean(job)
    done.run()
    folder = done.output / "model"
    before, after = (transformers.AutoModel.from_pretrained(f).state_dict() for f in (job.model, folder))
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert json.loads((folder / "finetune.json").read_text())["pooling"] == "Mean"
    head = load_file(folder / "head.safetensors")
    texts = [row["text"] for row in rows(44)]
    inputs = features_of(job.model, texts)
    np.testing.assert_allclose(head["center"], inputs.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(head["scale"], np.sqrt(((inputs - inputs.mean(axis=0)) ** 2).mean()), atol=1e-5)
    logits = (inputs - head["center"].numpy()) / head["scale"].numpy() @ head["weight"].numpy().T + head["bias"].numpy()
    odds = torch.softmax(torch.from_numpy(logits), dim=1).numpy()
    answers = inference.load(folder).predict(texts)
    np.testing.assert_allclose([list(a["probabilities"].values()) for a in answers], odds, atol=1e-5)
    told = result(done)
    assert (told["resolved"]["learningRate"], told["resolved"]["precision"]) == (0.01, "FP32")
    losses = [float(m["value"]) for e in told["evaluations"] for m in e["metrics"] if m["name"] == "validation/loss"]
    assert losses[-1] < losses[0] < np.log(3)
    assert "the encoder has read 77 texts" in done.runs[0].text


def test_the_encoder_reads_every_text_once(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    pooled = pooling.MeanPooled.pooled

    def counted(self: Any, attention_mask: Any, **tokens: Any) -> Any:
        seen.append(len(attention_mask))
        return pooled(self, attention_mask, **tokens)

    monkeypatch.setattr(pooling.MeanPooled, "pooled", counted)
    mean(job, hyperparameters={"epochs": 20}).run()
    assert sum(seen) == 44 + 18 + 15


def test_a_checkpoint_holds_the_head_alone(job: Job) -> None:
    done = mean(job)
    done.run()
    assert (done.newest() / "model/head.safetensors").exists()
    assert not list(done.newest().rglob("model.safetensors"))


@pytest.mark.parametrize("kill_at", [1, 8, 13])
def test_a_killed_run_goes_on_bit_for_bit(job: Job, kill_at: int) -> None:
    changes = merged(EVERY, {"hyperparameters": {"dropout": {"classifier": 0.3}}})
    whole, cut = mean(job, "whole", **changes), mean(job, "cut", **changes)
    whole.run()
    with pytest.raises(Killed):
        cut.run(kill_at=kill_at)
    cut.run()
    for file in ("model/head.safetensors", "model/model.safetensors"):
        assert (whole.output / file).read_bytes() == (cut.output / file).read_bytes()
    assert (whole.newest() / "trainer/optimizer.safetensors").read_bytes() == (
        cut.newest() / "trainer/optimizer.safetensors"
    ).read_bytes()
    for key in ("evaluations", "perClass", "resolved"):
        assert result(whole)[key] == result(cut)[key]


def test_early_stopping_restores_the_best_head(job: Job) -> None:
    policy = {"learningRate": 10.0, "epochs": 30, "earlyStopping": {"patience": 3}}
    done = mean(job, hyperparameters=policy, evaluation={"bestMetric": "loss"})
    done.run()
    told = result(done)
    losses = {e["step"]: float(m["value"]) for e in told["evaluations"] for m in e["metrics"] if m["name"] == "validation/loss"}
    assert len(losses) < 30
    assert told["result"]["bestStep"] == min(losses, key=losses.__getitem__) != max(losses)
    assert scores(done)["validation/loss"] == pytest.approx(min(losses.values()), rel=1e-4)


def test_it_says_the_same_of_a_file_later(job: Job) -> None:
    done = mean(job)
    done.run()
    again = inference.load(done.output / "model").evaluate(rows(15, offset=300)).values
    for name, value in again.items():
        assert value == pytest.approx(scores(done)[f"test/{name}"], rel=1e-4), name


@pytest.mark.parametrize("task", ["Regression", "multi"])
def test_numbers_and_several_labels_are_learned_too(job: Job, tmp_path: Path, task: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name, count, offset in (("train", 44, 0), ("validation", 18, 100), ("test", 15, 300)):
        lines = []
        for row in rows(count, offset):
            said = [n for n in LABELS if set(WORDS[n]) & set(row["text"].split())]
            score = 2000.0 + 300 * ("positive" in said) - 300 * ("negative" in said)
            lines.append(json.dumps({"text": row["text"], "label": said if task == "multi" else score}))
        (data / f"{name}.jsonl").write_text("\n".join(lines))
    files = {split: f"{split}.jsonl" for split in ("train", "validation", "test")}
    own = {"dataset": {"multiLabel": {}}} if task == "multi" else {"task": task, "dataset": {"labels": None}}
    done = mean(replace(job, data=data), **merged({"dataset": files, "hyperparameters": {"epochs": 40}}, own))
    done.run()
    if task == "multi":
        assert scores(done)["validation/auroc"] > 0.75
    else:
        assert scores(done)["validation/pearson"] > 0.4
        assert scores(done)["validation/mse"] < 200**2, "whatever the unit: the deviation is 220, the mean 2000"


def test_it_is_as_good_as_logistic_regression(job: Job) -> None:
    done = mean(job, hyperparameters={"epochs": 200, "weightDecay": 0, "learningRate": 0.3}, evaluation={"everyEpochs": 200})
    done.run()
    head = load_file(done.output / "model/head.safetensors")
    train = rows(44)
    inputs = (features_of(job.model, [row["text"] for row in train]) - head["center"].numpy()) / head["scale"].numpy()
    targets = np.array([LABELS.index(row["label"]) for row in train])

    def loss(logits: Any) -> float:
        return float(torch.nn.functional.cross_entropy(torch.as_tensor(logits).float(), torch.from_numpy(targets)))

    theirs = LogisticRegression(C=10, max_iter=10_000).fit(inputs, targets)
    assert loss(inputs @ head["weight"].numpy().T + head["bias"].numpy()) < loss(theirs.decision_function(inputs)) + 0.05


@pytest.mark.parametrize("kind", ENCODERS)
def test_every_encoder_is_pooled_and_frozen(job: Job, tmp_path: Path, kind: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.model)
    tokenizer.save_pretrained(tmp_path / kind)
    tiny(kind, transformers.AutoModel, len(tokenizer)).save_pretrained(tmp_path / kind)
    done = mean(replace(job, model=tmp_path / kind), hyperparameters={"epochs": 1})
    recipe = done.recipe()
    made = model.build(tmp_path / kind, recipe, kind_of(recipe.task, recipe.dataset), tokenizer).train()
    assert {n for n, trains in layers.trainable(made, recipe.hyperparameters, 0).items() if trains} == {
        "linear_head.weight",
        "linear_head.bias",
    }
    assert not made.encoder.training
    done.run()
    texts = ["it was great", "box"]
    alone = inference.load(done.output / "model")
    together = alone.model.pooled(**_tokens(alone.tokenizer, texts)).detach().numpy()
    np.testing.assert_allclose(together, features_of(tmp_path / kind, texts), atol=1e-5)


def _tokens(tokenizer: Any, texts: list[str]) -> dict[str, torch.Tensor]:
    made = tokenizer(texts, padding=True, return_tensors="pt")
    return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}


def test_what_never_changes_divides_by_nothing() -> None:
    head = pooling.Head(2, 3)
    head.standardise(np.array([[1.0, 5.0], [1.0, 5.0]], dtype=np.float32), np.array([7.0, 7.0], dtype=np.float32))
    assert (head.center.tolist(), head.scale.tolist()) == ([1, 5], [1])
    assert (head.output_center.tolist(), head.output_scale.tolist()) == ([7], [1])


def test_an_encoder_with_a_decoder_is_refused(job: Job, tmp_path: Path) -> None:
    shutil.copytree(job.model, tmp_path / "t5")
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformers.T5Model(config).save_pretrained(tmp_path / "t5")
    assert "model.pooling: t5 is an encoder with a decoder" in refused(mean(replace(job, model=tmp_path / "t5")))


@pytest.mark.parametrize("damage", ["absent", "torn"])
def test_a_damaged_head_is_told(job: Job, damage: str) -> None:
    done = mean(job)
    done.run()
    head = done.output / "model/head.safetensors"
    head.unlink() if damage == "absent" else head.write_bytes(head.read_bytes()[:100])
    with pytest.raises(TrainingFailure, match=r"head\.safetensors") as failed:
        inference.load(done.output / "model")
    assert failed.value.failure.reason == "ModelNotFound"


def test_asked_to_end_while_the_encoder_reads_it_ends(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    done = mean(job)
    pooled = pooling.MeanPooled.pooled
    stop: Any = []

    def stopping(self: Any, attention_mask: Any, **tokens: Any) -> Any:
        stop[0].set()
        return pooled(self, attention_mask, **tokens)

    monkeypatch.setattr(pooling.MeanPooled, "pooled", stopping)
    stop.append(threading.Event())
    with pytest.raises(TrainingFailure, match="before the first step"):
        Run(done.recipe(), done.runtime(), stop[0])()


def test_pairs_of_features_and_templates_go_together(job: Job) -> None:
    done = mean(job, dataset={"prompt": {"template": "it was {text}"}})
    done.run()
    again = inference.load(done.output / "model").evaluate(rows(15, offset=300)).values
    assert again["loss"] == pytest.approx(scores(done)["test/loss"], rel=1e-4)
