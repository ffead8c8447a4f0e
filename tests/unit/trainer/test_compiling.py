"""Compiled training learns what plain training does; deterministic training is said to torch; where either cannot be, a sentence says so."""

import functools
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes_kit import Training, make_recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainer_kit import Job, Killed, merged

from finetune_api.report import EndReport
from finetune_trainer import compiling
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.process import _unexpected

PLAIN: dict[str, Any] = {"dropout": {"hidden": 0.0, "attention": 0.0, "classifier": 0.0}, "precision": "FP32", "epochs": 2}


def run(job: Job, name: str, hyperparameters: dict[str, Any]) -> Job:
    done = replace(job, home=job.home / name, changes={"hyperparameters": hyperparameters}, runs=[])
    done.run()
    return done


def losses(job: Job) -> list[float]:
    events = EventAccumulator(str(next((job.output / "logs").iterdir())))
    events.Reload()
    return [event.value for event in events.Scalars("train/loss")]


# -------------------------------------------------------------------------------------------------------- compiled ----
@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Torch's own compiler up to the graphs, which run as they are: its last part writes C++, and that takes a minute. Counts calls."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(compiling, "COMPILERS", {"cpu": ("CXX", ("true",))})  # nothing is built
    torch._dynamo.reset()
    counters.clear()
    yield counters["stats"]
    torch._dynamo.reset()


def test_compiled_it_learns_the_same(job: Job, graphs: dict[str, int]) -> None:
    """Over batches of several sizes and lengths, micro-batches and thawing among them; saving and evaluation see the plain model."""
    levers = {**PLAIN, "microBatchSize": 3, "freeze": {"layers": 1}, "unfreeze": {"everyEpochs": 1}, "adversarial": {}}
    plain = run(job, "plain", levers)
    assert not graphs.get("unique_graphs")
    compiled = run(job, "compiled", {**levers, "compile": True})
    assert 0 < graphs["unique_graphs"] < 20, "not one for every length"
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)
    names = [sorted(p.name for p in each.newest().rglob("*") if p.is_file()) for each in (plain, compiled)]
    assert names[0] == names[1]
    # It is the same training: the plain one goes on from a checkpoint of the compiled one.
    (compiled.output / "result.json").unlink()
    assert compiled.run(hyperparameters={"compile": False}).resumed_from is not None


@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler, and there is none"
)
def test_machine_code_learns_the_same(tmp_path: Path) -> None:
    recipe = merged(make_recipe(tmp_path), {"hyperparameters": {"maxSteps": 4}})
    plain = Training(recipe, tmp_path / "plain", 1)
    plain.run()
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    compiled = Training(merged(recipe, {"hyperparameters": {"compile": True}}), tmp_path / "compiled", 1, **cache)
    compiled.run()
    assert list((tmp_path / "cache").rglob("*.so")), "something was built"
    assert compiled.losses() == pytest.approx(plain.losses(), rel=1e-4)


def test_without_a_compiler_it_is_told_at_once(job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(TrainingFailure, match=r"hyperparameters\.compile: this image has no g\+\+ or clang\+\+") as failed:
        run(job, "none", {"compile": True})
    assert failed.value.failure.reason == "RecipeInvalid"
    monkeypatch.setenv("CC", "cc-of-mine")
    with pytest.raises(TrainingFailure, match="has no cc-of-mine"):
        compiling.compiled(torch.nn.Linear(2, 2), torch.device("cuda", 0))  # type: ignore[arg-type]


def test_what_the_compiler_refuses_is_told(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that is there and does not work."""
    import torch._inductor.config
    from torch._inductor.utils import fresh_cache

    monkeypatch.setenv("CXX", "false")
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("false",))  # it has read the variable when it was imported
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)
    torch._dynamo.reset()
    with (
        fresh_cache(),  # what a compiler has made before does not count
        pytest.raises(
            TrainingFailure, match=r"hyperparameters\.compile: torch\.compile cannot compile this model here"
        ) as failed,
    ):
        run(job, "broken", {**PLAIN, "compile": True})
    torch._dynamo.reset()
    assert failed.value.failure.reason == "RecipeInvalid"


# --------------------------------------------------------------------------------------------------- deterministic ----
@pytest.fixture
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    before = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(mode=False)
    torch.backends.cudnn.benchmark = before


@pytest.mark.usefixtures("_as_before")
def test_deterministic_is_said_to_torch_and_changes_nothing_on_a_cpu(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    plain = run(job, "plain", {})
    assert not torch.are_deterministic_algorithms_enabled()
    torch.backends.cudnn.benchmark = True
    exact = replace(job, home=job.home / "exact", changes={"hyperparameters": {"deterministic": True}}, runs=[])
    with pytest.raises(Killed):
        exact.run(kill_at=8)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    exact.run()
    assert (exact.output / "model/model.safetensors").read_bytes() == (plain.output / "model/model.safetensors").read_bytes()


@pytest.mark.usefixtures("_as_before")
def test_an_operation_that_has_no_such_form_is_told() -> None:
    torch.use_deterministic_algorithms(mode=True)
    end: EndReport | None = None
    try:
        torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))
    except RuntimeError as error:
        end = _unexpected(error)
    assert end is not None
    assert end.reason == "RecipeInvalid"
    assert end.message == "hyperparameters.deterministic: put_ does not have a deterministic implementation: set it to false"
