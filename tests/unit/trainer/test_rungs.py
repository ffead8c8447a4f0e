"""A sweep's rungs in the trainer (evaluation.atExamples), and the Job that closes a sweep."""

import base64
import gzip
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from trainer_kit import LABELS, Job, Killed

from finetune_api import names
from finetune_api.report import Outcome, ResultFile
from finetune_trainer import closing
from finetune_trainer.errors import TrainingFailure

# 44 examples at 8 a step: the epochs end at 44, 88 and 132 examples.
RUNGS: dict[str, Any] = {"evaluation": {"atExamples": [10, 20, 88, 100]}}
PATIENT = {"hyperparameters": {"earlyStopping": {"patience": 2}, "schedule": {"type": "ReduceOnPlateau"}}}


def result(job: Job) -> ResultFile:
    return ResultFile.model_validate_json((job.output / "result.json").read_text())


def seen(job: Job) -> list[int]:
    return [e.examples for e in result(job).evaluations]


def fresh(job: Job, name: str) -> Job:
    return replace(job, home=job.home / name, runs=[])


def test_it_evaluates_at_the_first_step_behind_each_rung(job: Job) -> None:
    job.run(**RUNGS)
    assert seen(job) == [16, 24, 44, 88, 104, 132]


@pytest.mark.parametrize("changes", [{}, PATIENT], ids=["plain", "patient"])
def test_rungs_decide_nothing(job: Job, changes: dict[str, Any]) -> None:
    without, with_rungs = fresh(job, "without"), fresh(job, "with")
    without.run(**changes)
    with_rungs.run(**changes, **RUNGS)
    assert len(seen(with_rungs)) > len(seen(without))
    assert with_rungs.steps() == without.steps(), "nothing is saved for a rung"
    a, b = (j.output / "model/model.safetensors" for j in (without, with_rungs))
    assert a.read_bytes() == b.read_bytes()
    one, other = (result(j) for j in (without, with_rungs))
    assert one.result.metrics == other.result.metrics
    assert one.result.best_step == other.result.best_step
    assert one.recipe_digest == other.recipe_digest


def test_a_resumed_run_passes_no_rung_twice(job: Job) -> None:
    whole, cut = fresh(job, "whole"), fresh(job, "cut")
    saving = {"checkpoint": {"everySteps": 1}}
    whole.run(**RUNGS, **saving)
    for kill_at in (3, 4, 12):
        with pytest.raises(Killed):
            cut.run(kill_at=kill_at, **RUNGS, **saving)
    cut.run(**RUNGS, **saving)
    assert result(cut).evaluations == result(whole).evaluations
    a, b = (j.output / "model/model.safetensors" for j in (whole, cut))
    assert a.read_bytes() == b.read_bytes()


def test_a_job_that_was_done_before_tells_its_evaluations(job: Job) -> None:
    first = job.run(**RUNGS)
    again = job.run(**RUNGS)
    assert again.outcome is Outcome.ALREADY_COMPLETED
    assert again.evaluations == first.evaluations


# ------------------------------------------------------------------------------------------------------------ closing --
HISTORY = {"kind": "SweepHistory", "trials": [{"index": n, "value": n / 7} for n in range(50)]}


def environment(job: Job, *, piece: int = 1000, winner: bool = True, **changes: Any) -> dict[str, str]:
    """As the operator makes it (domain/closing.py)."""
    packed = base64.b64encode(gzip.compress(json.dumps(HISTORY).encode())).decode()
    env = {f"{names.ENV_SWEEP_HISTORY}{n}": packed[at : at + piece] for n, at in enumerate(range(0, len(packed), piece))}
    env[names.ENV_SWEEP_HISTORY_URI] = f"file://{job.home / 'sweep'}"
    env[names.ENV_WORKDIR] = str(job.home / "closing")
    (job.home / "sweep").mkdir(parents=True, exist_ok=True)
    if winner:
        recipe = job.recipe(output={"storageUri": f"file://{job.home / 'promoted'}"}, **changes)
        env[names.ENV_JOB] = recipe.model_dump_json(by_alias=True, exclude_none=True)
        env[names.ENV_SWEEP_WINNER] = f"file://{job.output}/model"
    return env


def trained(job: Job) -> Job:
    """A trial: without the test split."""
    job.changes = {"dataset": {"test": None}}
    job.run()
    job.changes = {"dataset": {"test": "test.csv"}}
    return job


def test_the_history_is_put_together_and_written(job: Job) -> None:
    end = closing.close(environment(job, piece=64, winner=False))
    assert (end.outcome, end.result) == (Outcome.COMPLETE, None)
    assert json.loads((job.home / "sweep" / names.HISTORY_FILE).read_text()) == HISTORY


@pytest.mark.parametrize("spoiled", ["", "rubbish!", base64.b64encode(b"no gzip").decode()])
def test_a_history_that_is_none_is_told(job: Job, spoiled: str) -> None:
    env = environment(job, winner=False) | {f"{names.ENV_SWEEP_HISTORY}0": spoiled}
    with pytest.raises(TrainingFailure, match="hold no history"):
        closing.close(env)


def test_the_winner_is_scored_on_test_and_copied(job: Job) -> None:
    alone = fresh(job, "alone")
    alone.run()  # a training that read the test split by itself
    end = closing.close(environment(trained(job)))
    promoted = job.home / "promoted"
    file = ResultFile.model_validate_json((promoted / "result.json").read_text())
    assert end.result == file.result
    assert end.result is not None
    assert end.result.model_uri == f"file://{promoted}/model"
    assert end.result.metrics == result(alone).result.metrics
    assert {m.name.partition("/")[0] for m in end.result.metrics} == {"validation", "test"}
    assert (promoted / "model/model.safetensors").read_bytes() == (job.output / "model/model.safetensors").read_bytes()
    assert "test" in file.per_class
    assert [row["label"] for row in file.per_class["test"]] == LABELS


def test_closing_twice_ends_well_and_changes_nothing(job: Job) -> None:
    env = environment(trained(job))
    first = closing.close(env)
    before = {p: p.stat().st_mtime_ns for p in (job.home / "promoted").rglob("*") if p.is_file()}
    again = closing.close(env)
    assert (again.outcome, again.result) == (Outcome.ALREADY_COMPLETED, first.result)
    assert {p: p.stat().st_mtime_ns for p in (job.home / "promoted").rglob("*") if p.is_file()} == before


def test_another_recipes_result_is_kept(job: Job) -> None:
    closing.close(environment(trained(job)))
    with pytest.raises(TrainingFailure, match=r"promote\.storageUri") as failed:
        closing.close(environment(job, hyperparameters={"learningRate": 1e-4}))
    assert failed.value.failure.reason == "OutputExists"


def test_a_winner_that_is_gone_is_told(job: Job) -> None:
    env = environment(trained(job))
    (job.output / "result.json").unlink()
    with pytest.raises(TrainingFailure, match=r"result\.json is not there") as failed:
        closing.close(env)
    assert failed.value.failure.reason == "ModelNotFound"


def test_as_a_process_it_tells_how_it_ended(job: Job, tmp_path: Path) -> None:
    log = tmp_path / "termination-log"
    env = os.environ | environment(job, winner=False)
    env |= {names.ENV_TERMINATION_LOG: str(log), names.ENV_S3_ROOT: str(tmp_path)}
    env[names.ENV_SWEEP_HISTORY_URI] = "s3://no-such-bucket/sweep"
    done = subprocess.run([sys.executable, "-m", "finetune_trainer.closing"], env=env, capture_output=True, text=True)
    assert done.returncode == 15, done.stderr
    assert json.loads(log.read_text())["reason"] == "StorageNotFound"
