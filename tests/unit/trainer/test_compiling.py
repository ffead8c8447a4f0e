"""Compiled training learns what the model itself learns; deterministic operations are asked for; what is not there is told."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from trainer_kit import Job

from finetune_trainer.errors import TrainingFailure

NO_DROPOUT = {"hidden": 0.0, "attention": 0.0, "classifier": 0.0}


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, and there is none")
def test_compiled_it_learns_the_same(job: Job) -> None:
    losses = []
    for compiled in (False, True):
        torch._dynamo.utils.counters.clear()
        hyper: dict[str, Any] = {"compile": compiled, "dropout": NO_DROPOUT, "precision": "FP32", "epochs": 1}
        run = replace(job, home=job.home / str(compiled), changes={"hyperparameters": hyper}, runs=[])
        run.run()
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == compiled
        evaluations = json.loads((run.output / "result.json").read_text())["evaluations"]
        losses += [float(m["value"]) for m in evaluations[-1]["metrics"] if m["name"] == "validation/loss"]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_without_a_compiler_it_is_told(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(TrainingFailure, match=r"hyperparameters\.compile: this image has no no-such-compiler") as failed:
        job.run(hyperparameters={"compile": True})
    assert failed.value.failure.reason == "RecipeInvalid"


@pytest.fixture
def _as_before() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_as_before")
def test_deterministic_operations_are_asked_for(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    fresh = replace(job, home=job.home / "usual")
    fresh.run()
    assert not torch.are_deterministic_algorithms_enabled()
    job.run(hyperparameters={"deterministic": True})
    assert torch.are_deterministic_algorithms_enabled()
