"""A sweep whose objective nobody reports fails; one whose trials have only told of their loss so far does not."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sweep_kit import METRIC, SETTINGS, Place

from finetune_api.manifest import load_sweep
from finetune_cli.sweep_objects import Objects
from finetune_cli.sweep_run import take_over
from finetune_operator.domain.sweep import decide_sweep
from finetune_operator.domain.sweep_types import CreateTrial, SweepObserved

Object = dict[str, Any]
LOSS = {"progressPercentage": 6, "metrics": [{"name": "loss", "value": "1.09"}, {"name": "learning_rate", "value": "4e-05"}]}


def after(folder: Path, status: Object) -> Object:
    """Status of a sweep, one trial of which has this status."""
    objects = Objects(folder / "work")
    objects.load()
    sweep = take_over(objects, load_sweep(Place(folder).manifest().read_text()))
    first = decide_sweep(SweepObserved(sweep), datetime.now(UTC), SETTINGS)
    made = [objects.create(action.manifest) for action in first.actions if isinstance(action, CreateTrial)]
    jobs = {0: {**made[0], "status": status}, 1: made[1]}
    return decide_sweep(SweepObserved({**sweep, "status": first.status}, jobs), datetime.now(UTC), SETTINGS).status


def evaluated(metric: str) -> list[Object]:
    return [{"examples": 480, "step": 60, "metrics": [{"name": metric, "value": "0.5"}]}]


@pytest.mark.parametrize("status", [{}, {"trainerStatus": LOSS}, {"trainerStatus": LOSS, "evaluations": evaluated(METRIC)}])
def test_progress_before_the_first_evaluation_says_nothing_of_the_objective(tmp_path: Path, status: Object) -> None:
    assert after(tmp_path, status)["state"] == "Running"


def test_an_objective_that_no_evaluation_has_is_told(tmp_path: Path) -> None:
    found = after(tmp_path, {"trainerStatus": LOSS, "evaluations": evaluated("validation/other")})
    assert found["state"] == "Stopping" or "MetricNotFound" in json.dumps(found)
