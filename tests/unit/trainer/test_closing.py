"""The Job that closes a sweep scores a winner of any kind as the training itself would have, and copies all of its model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_tasks import MAKERS, SPECS, _files
from trainer_kit import Job, merged

from finetune_api import names
from finetune_api.report import Outcome, ResultFile
from finetune_trainer import closing
from finetune_trainer.errors import TrainingFailure

LORA = {"rank": 2, "alpha": 4}
KINDS: dict[str, dict[str, Any]] = {
    "merged adapters": {"model": {"lora": LORA}},
    "adapters alone": {"model": {"lora": {**LORA, "merge": False}}},
    "mean pooling": {"model": {"pooling": "Mean"}, "hyperparameters": {"learningRate": None}},
    "several labels": SPECS["multi"],
    "regression": SPECS["regression"],
    "tags": SPECS["tagging"],
    "pairs": SPECS["pair"],
}
DATA = {"several labels": "multi", "regression": "regression", "tags": "tagging", "pairs": "pair"}


@pytest.mark.parametrize("kind", list(KINDS))
def test_any_winner_is_scored_as_its_own_training_would_have(job: Job, tmp_path: Path, kind: str) -> None:
    buckets = tmp_path / "buckets"
    (buckets / "bucket").mkdir(parents=True)
    if kind in DATA:
        job = replace(job, data=_files(tmp_path / "data", MAKERS[DATA[kind]]))
    job = replace(job, s3_root=buckets, changes=KINDS[kind])
    alone = replace(job, changes=merged(job.changes, {"output": {"storageUri": "s3://bucket/alone"}}))
    trial = replace(job, changes=merged(job.changes, {"output": {"storageUri": "s3://bucket/trial"}, "dataset": {"test": None}}))
    expected = alone.run().result
    trial.run()
    recipe = job.recipe(output={"storageUri": "s3://bucket/promoted"})
    end = closing.promote(recipe, job.runtime(), "s3://bucket/trial/model")
    assert (end.outcome, expected is not None, end.result is not None) == (Outcome.COMPLETE, True, True)
    assert end.result is not None
    assert expected is not None
    assert [m.name for m in end.result.metrics] == [m.name for m in expected.metrics]
    assert {m.name: float(m.value) for m in end.result.metrics} == pytest.approx(
        {m.name: float(m.value) for m in expected.metrics}, rel=1e-4
    )
    there, here = (
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()}
        for f in (buckets / "bucket/trial/model", buckets / "bucket/promoted/model")
    )
    assert there == here
    ResultFile.model_validate_json((buckets / "bucket/promoted" / names.RESULT_FILE).read_text())


def test_without_a_place_for_the_history_it_says_so(job: Job) -> None:
    with pytest.raises(TrainingFailure, match="FINETUNE_SWEEP_HISTORY_URI is not set"):
        closing.close({names.ENV_WORKDIR: str(job.home / "closing")})
