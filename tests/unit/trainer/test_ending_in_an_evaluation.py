"""Asked to end before or in an evaluation, a training saves at once; who goes on begins with that evaluation, and the run is, bit for bit, the
one that was never asked."""

import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ending_kit import Moment
from processes_kit import Training, bits, make_recipe
from test_resume import same
from trainer_kit import Job, merged

from finetune_trainer.errors import TrainingFailure
from finetune_trainer.run import Run

HERE = str(Path(__file__).resolve().parent)
PASSES = 5
"""Of an evaluation: 18 rows, 4 at once."""
PATIENT: dict[str, Any] = {
    "checkpoint": {"everySteps": 1},
    "evaluation": {"everySteps": 2, "bestMetric": "accuracy"},
    "hyperparameters": {
        "epochs": 4,
        "earlyStopping": {"patience": 5, "minDelta": 1.0},
        "schedule": {"type": "ReduceOnPlateau", "patience": 2},
    },
}
RUNGS: dict[str, Any] = {"evaluation": {"atExamples": [20, 100]}}
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "end of an epoch": ({}, 6),
    "last step": ({}, 18),
    "patience counting": (PATIENT, 8),
    "patience at its end": (PATIENT, 12),
    "a rung": (RUNGS, 3),
    "adapters": ({"model": {"lora": {"rank": 2, "alpha": 4}}}, 12),
    "thawing": ({"hyperparameters": {"freeze": {"embeddings": True, "layers": 2}, "unfreeze": {"everyEpochs": 1}}}, 6),
}


def run(job: Job, step: int | None = None, at: int = 0) -> dict[int, int]:
    """To its end, or until it has ended as it was asked to: how many passes each step's evaluation took."""
    stopping = threading.Event()
    with Moment(step, at, stopping.set) as moment:
        running = Run(job.recipe(), job.runtime(), stopping)
        if step is None:
            running()
        else:
            with pytest.raises(TrainingFailure, match="asked to end; step"):
                running()
    return moment.passes


def saved(folder: Path) -> tuple[int, list[int]]:
    """A checkpoint's step, and the steps that had been evaluated by then."""
    state = json.loads((folder / "trainer/state.json").read_text())
    return state["step"], [e["step"] for e in state["evaluations"]]


@pytest.mark.parametrize("at", [0, 2], ids=["right before", "in the middle"])
@pytest.mark.parametrize("case", list(CASES))
def test_it_saves_at_once_and_is_the_run_never_asked(job: Job, case: str, at: int) -> None:
    changes, step = CASES[case]
    whole, cut = (replace(job, home=job.home / name, changes=changes, runs=[]) for name in ("whole", "cut"))
    undisturbed = run(whole)
    passes = run(cut, step, at)
    assert passes.get(step, 0) == at, "the evaluation is left where it was"
    newest, evaluated = saved(cut.newest())
    assert newest == step
    assert step not in evaluated
    assert not (cut.output / "result.json").exists()
    again = run(cut)
    assert again.pop(0) >= PASSES, "the evaluation comes before the first step"
    assert all(again[later] == count for later, count in undisturbed.items() if step < later < max(undisturbed))
    same(whole, cut)


def test_asked_again_and_again_in_the_same_evaluation(job: Job) -> None:
    whole, cut = (replace(job, home=job.home / name, runs=[]) for name in ("whole", "cut"))
    run(whole)
    run(cut, 6, 2)
    for at in (1, 4):
        assert run(cut, 0, at) == {0: at}, "of the process that goes on, no step was taken"
        assert saved(cut.newest()) == (6, [])
    run(cut)
    same(whole, cut)


def test_what_is_evaluated_to_its_end_counts(job: Job) -> None:
    whole, cut = (replace(job, home=job.home / name, runs=[]) for name in ("whole", "cut"))
    run(whole)
    run(cut, 6, PASSES)
    assert saved(cut.newest()) == (6, [6])
    assert 0 not in run(cut), "it is not done again"
    same(whole, cut)


# -------------------------------------------------------------------------------------------------- several processes --
@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return merged(make_recipe(tmp_path_factory.mktemp("ending")), {"hyperparameters": {"epochs": 2}})


def training(recipe: dict[str, Any], folder: Path, **env: str) -> Training:
    folder.mkdir(exist_ok=True)
    path = os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")])
    return Training(recipe, folder, 2, module="ending_kit", PYTHONPATH=path, EVENTS=str(folder), **env)


@pytest.mark.parametrize("strategy", ["DDP", "FSDP"])
def test_several_processes_hear_it_together(recipe: dict[str, Any], tmp_path: Path, strategy: str) -> None:
    """The one that does not lead is asked, in the second of three passes after the first epoch's 9 steps."""
    shared = merged(recipe, {"hyperparameters": {"strategy": strategy}})
    whole = training(shared, tmp_path / "whole")
    expected = whole.run()
    asked = {"ENDING_RANK": "1", "ENDING_STEP": "9", "ENDING_PASS": "2"}
    end = training(shared, tmp_path / "cut", **asked).fails()
    assert (end["outcome"], end["reason"]) == ("Interrupted", "Interrupted"), end["said"]
    cut = training(shared, tmp_path / "cut")
    assert saved(cut.checkpoint(9)) == (9, [])
    result = cut.run()
    assert result["evaluations"] == expected["evaluations"]
    assert result["result"]["metrics"] == expected["result"]["metrics"]
    assert bits(cut.checkpoint(18)) == bits(whole.checkpoint(18))


def test_no_process_goes_away_before_the_save_is_done(recipe: dict[str, Any], tmp_path: Path) -> None:
    # torchrun kills the others 30 s after the first one has ended; it was the one that has nothing to upload.
    asked = {"ENDING_RANK": "1", "ENDING_STEP": "4"}
    slow = training(merged(recipe, {"checkpoint": {"everySteps": 100}}), tmp_path, SLOW="3", **asked)
    end = slow.fails()
    assert (end["outcome"], end["reason"]) == ("Interrupted", "Interrupted"), end["said"]
    manifest = Path(end["checkpoint"]["uri"].removeprefix("file://")) / "MANIFEST.json"
    ended = {rank: float((tmp_path / f"ended-{rank}").read_text()) for rank in (0, 1)}
    assert manifest.stat().st_mtime - float((tmp_path / "asked-1").read_text()) > 3, "otherwise this test shows nothing"
    assert ended[1] >= manifest.stat().st_mtime


def test_a_save_that_does_not_arrive_ends_all(recipe: dict[str, Any], tmp_path: Path) -> None:
    policy = {"checkpoint": {"everySteps": 100, "saveDeadlineSeconds": 5}}
    asked = {"ENDING_RANK": "0", "ENDING_STEP": "4"}
    end = training(merged(recipe, policy), tmp_path, SLOW="60", **asked).fails()
    assert (end["outcome"], end["reason"]) == ("Failed", "StorageUnavailable"), end["said"]
    asked_at = float((tmp_path / "asked-0").read_text())
    after = [float((tmp_path / f"ended-{rank}").read_text()) - asked_at for rank in (0, 1)]
    assert after[1] > 3, "not before the leader has given up"
    assert max(after) < 20
