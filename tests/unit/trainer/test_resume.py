"""A run that is cut off anywhere and goes on is, bit for bit, the run that was never cut off."""

import json
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from trainer_kit import Job, Killed

from finetune_trainer.errors import TrainingFailure
from finetune_trainer.memory import Fit

STEPS_PER_EPOCH = 6
EVERY_STEP: dict[str, Any] = {"checkpoint": {"everySteps": 1}}
PATIENT: dict[str, Any] = {
    "checkpoint": {"everySteps": 1},
    "evaluation": {"everySteps": 2, "bestMetric": "accuracy"},
    # A delta that no evaluation reaches: patience counts up from the second evaluation on.
    "hyperparameters": {"epochs": 4, "earlyStopping": {"patience": 5, "minDelta": 1.0}},
}


def lever(hyperparameters: dict[str, Any]) -> dict[str, Any]:
    return {**EVERY_STEP, "hyperparameters": hyperparameters}


def fresh(job: Job, name: str, changes: dict[str, Any]) -> Job:
    return replace(job, home=job.home / name, changes=changes, runs=[])


def same(a: Job, b: Job) -> None:
    """Weights of the result, and of the last checkpoint weights, optimizer, random state and progress: bytes."""
    for one, other in ((a.output / "model", b.output / "model"), (a.newest(), b.newest())):
        files = sorted(p.relative_to(one) for p in one.rglob("*.safetensors"))
        assert files == sorted(p.relative_to(other) for p in other.rglob("*.safetensors"))
        for file in files:
            assert (one / file).read_bytes() == (other / file).read_bytes(), file
    one, other = a.newest(), b.newest()
    # Only the name of the best checkpoint tells who wrote it.
    states = [json.loads((folder / "trainer/state.json").read_text()) for folder in (one, other)]
    bests = [state.pop("best_checkpoint") for state in states]
    assert states[0] == states[1]
    assert bests[0].rpartition("-")[0] == bests[1].rpartition("-")[0]
    results = [json.loads((j.output / "result.json").read_text()) for j in (a, b)]
    for key in ("evaluations", "perClass", "steps", "examples", "resolved"):
        assert results[0][key] == results[1][key], key
    assert results[0]["result"]["metrics"] == results[1]["result"]["metrics"]


@pytest.mark.parametrize(
    ("changes", "kill_at"),
    [
        pytest.param(EVERY_STEP, 1, id="before-any-checkpoint"),
        pytest.param(EVERY_STEP, 2, id="first-step"),
        pytest.param(EVERY_STEP, 4, id="mid-epoch"),
        pytest.param(EVERY_STEP, STEPS_PER_EPOCH + 1, id="epoch-edge"),
        pytest.param(EVERY_STEP, 2 * STEPS_PER_EPOCH + 3, id="mid-last-epoch"),
        pytest.param(EVERY_STEP, 3 * STEPS_PER_EPOCH, id="last-step"),
        pytest.param({}, STEPS_PER_EPOCH + 4, id="between-sparse-checkpoints"),
        pytest.param(PATIENT, 8, id="patience-counting"),
        pytest.param(
            lever({"freeze": {"embeddings": True, "layers": 2}, "unfreeze": {"everyEpochs": 1}}), 9, id="mid-unfreezing"
        ),
        pytest.param(lever({"microBatchSize": 3}), 9, id="accumulation"),
        pytest.param(lever({"adversarial": {}, "labelSmoothing": 0.1}), 9, id="adversarial"),
        pytest.param({**EVERY_STEP, "model": {"lora": {"rank": 2, "alpha": 4}}}, 9, id="adapters"),
        pytest.param({**EVERY_STEP, "model": {"lora": {"rank": 2, "alpha": 4, "merge": False}}}, 4, id="adapters-alone"),
        pytest.param({**EVERY_STEP, "model": {"pooling": "Mean"}}, 4, id="pooled"),
    ],
)
def test_killed_and_resumed_is_the_run_never_killed(job: Job, changes: dict[str, Any], kill_at: int) -> None:
    whole, cut = fresh(job, "whole", changes), fresh(job, "cut", changes)
    whole.run()
    with pytest.raises(Killed):
        cut.run(kill_at=kill_at)
    assert not (cut.output / "result.json").exists()
    saved = cut.steps()
    end = cut.run()
    assert (end.resumed_from.step if end.resumed_from else 0) == (saved[-1] if saved else 0)
    same(whole, cut)


def test_every_row_comes_when_it_would_have_come(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their numbers in the data, step by step: none is repeated and none left out."""
    seen: dict[int, list[int]] = {}
    inner = Fit.__call__

    def watched(self: Fit, gradient: Any, rows: Any, following: Any) -> Any:
        seen[self.state.step] = rows.tolist()
        return inner(self, gradient, rows, following)

    monkeypatch.setattr(Fit, "__call__", watched)
    whole, cut = fresh(job, "whole", EVERY_STEP), fresh(job, "cut", EVERY_STEP)
    whole.run()
    expected = dict(seen)
    assert sorted(row for step in range(STEPS_PER_EPOCH) for row in expected[step]) == list(range(44))
    seen.clear()
    with pytest.raises(Killed):
        cut.run(kill_at=STEPS_PER_EPOCH + 3)
    before = dict(seen)
    seen.clear()
    cut.run()
    assert {**before, **seen} == expected
    assert all(seen[step] == before[step] for step in before.keys() & seen.keys())


def test_resumed_twice_is_the_run_never_killed(job: Job) -> None:
    whole, cut = fresh(job, "whole", EVERY_STEP), fresh(job, "cut", EVERY_STEP)
    whole.run()
    for kill_at in (4, STEPS_PER_EPOCH + 3):
        with pytest.raises(Killed):
            cut.run(kill_at=kill_at)
    assert cut.run().resumed_from is not None
    assert len(list((cut.checkpoints / "executions").iterdir())) == 3
    same(whole, cut)


def test_early_stopping_counts_on_where_it_was(job: Job) -> None:
    whole, cut = fresh(job, "whole", PATIENT), fresh(job, "cut", PATIENT)
    end = whole.run()
    assert end.step == 12, "the first evaluation and then five without an improvement of 1.0"
    with pytest.raises(Killed):
        cut.run(kill_at=9)
    assert json.loads((cut.newest() / "trainer/state.json").read_text())["bad_evaluations"] == 3
    assert cut.run().step == 12
    same(whole, cut)


@pytest.mark.parametrize("stop_at", [1, 3, STEPS_PER_EPOCH, 3 * STEPS_PER_EPOCH])
def test_asked_to_end_it_saves_between_steps_and_goes_on(job: Job, stop_at: int) -> None:
    whole, cut = fresh(job, "whole", {}), fresh(job, "cut", {})
    whole.run()
    with pytest.raises(TrainingFailure) as stopped:
        cut.run(stop_at=stop_at)
    assert stopped.value.failure.reason == "Interrupted"
    assert cut.steps()[-1] == stop_at
    assert not (cut.output / "result.json").exists()
    end = cut.run()
    assert end.resumed_from is not None
    assert end.resumed_from.step == stop_at
    same(whole, cut)


def test_dropout_is_drawn_anew_each_step(job: Job) -> None:
    # Without this, the tests above would hold even if the random state were never saved.
    dropped = fresh(job, "dropped", {"hyperparameters": {"dropout": {"hidden": 0.3}}})
    plain = fresh(job, "plain", {"hyperparameters": {"dropout": {"hidden": 0.0, "attention": 0.0, "classifier": 0.0}}})
    dropped.run()
    plain.run()
    weights = [(j.output / "model/model.safetensors").read_bytes() for j in (dropped, plain)]
    assert weights[0] != weights[1]


def test_another_seed_is_another_run(job: Job) -> None:
    a, b = fresh(job, "a", {}), fresh(job, "b", {"hyperparameters": {"seed": 7}})
    a.run()
    b.run()
    assert (a.output / "model/model.safetensors").read_bytes() != (b.output / "model/model.safetensors").read_bytes()


def test_a_run_can_go_on_on_another_machine(job: Job) -> None:
    """Only the checkpoint place is shared: nothing of the work folder is needed."""
    with pytest.raises(Killed):
        job.run(kill_at=8)
    for work in job.home.glob("work-*"):
        shutil.rmtree(work)
    assert job.run().resumed_from is not None


def test_a_resume_takes_as_many_threads_as_it_began_with(job: Job) -> None:
    """Sums are split among them."""
    with pytest.raises(Killed):
        job.run(kill_at=8)
    torch.set_num_threads(2)
    try:
        assert job.run().resumed_from is not None
        assert torch.get_num_threads() == 1
        torch.set_num_threads(2)
        fresh(job, "other", {}).run()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
