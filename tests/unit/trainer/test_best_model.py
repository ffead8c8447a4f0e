"""The best model, where it is not the last, is put back into the place of the trained one: an accelerator never holds two."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from trainer_kit import Job, make_model, merged

from finetune_trainer import sharding, vocabulary
from finetune_trainer.loop import Loop

# The rate rises until it wrecks what was learned: the last evaluation is a bad one.
WRECKING: dict[str, Any] = {
    "hyperparameters": {"learningRate": 0.1, "epochs": 12, "schedule": {"type": "Constant", "warmup": 120}},
    "checkpoint": {"keepLast": 100},
}
LORA = {"rank": 2, "alpha": 4}
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "whole": ({}, "model.safetensors"),
    "narrow embeddings": ({}, "model.safetensors"),
    "adapters": ({"model": {"lora": {**LORA, "merge": False}}}, "adapter_model.safetensors"),
    "merged adapters": ({"model": {"lora": LORA}}, ""),
    "pooled": ({"model": {"pooling": "Mean"}, "hyperparameters": {"learningRate": 10}}, "head.safetensors"),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_it_takes_the_place_of_the_trained_one(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    changes, file = KINDS[kind]
    if kind == "narrow embeddings":
        job = replace(job, model=make_model(tmp_path / "wide", spare_words=200))
    placed: list[Any] = []
    scored: list[Any] = []
    place, scores = sharding.place, Loop.scores
    monkeypatch.setattr(sharding, "place", lambda model, *of: (placed.append(model), place(model, *of))[1])
    monkeypatch.setattr(Loop, "scores", lambda self, model, *of: (scored.append(model), scores(self, model, *of))[1])
    end = job.run(**merged(WRECKING, changes))
    assert end.result is not None
    assert end.result.best_step != end.step, "otherwise this test shows nothing"
    assert len(placed) == 1
    assert all(model is placed[0] for model in scored)
    assert bool(list(vocabulary.narrowed(placed[0]))) is (kind == "narrow embeddings")
    told = {m.name: float(m.value) for m in end.result.metrics if m.name.startswith("validation/")}
    then = next(e for e in end.evaluations if e.step == end.result.best_step)
    assert told == pytest.approx({m.name: float(m.value) for m in then.metrics}, abs=1e-4)
    if file:
        best = next(job.checkpoints.glob(f"step-{end.result.best_step:08d}-*")) / "model" / file
        assert best.read_bytes() == (job.output / "model" / file).read_bytes()
