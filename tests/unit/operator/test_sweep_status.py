"""The status of a sweep stays small, however many trials it has had."""

import json
import random
from datetime import UTC, datetime
from typing import Any

import pytest

from finetune_api import names
from finetune_api.manifest import parse_sweep
from finetune_api.sweep import Direction, HyperparameterSweep
from finetune_api.sweep_status import HyperparameterSweepStatus
from finetune_operator.domain.sweep_status import SweepDraft, _rung
from finetune_operator.search.types import Outcome, Reading, Spent, Study, Trial

KIB = 1024


def sweep(parameters: int) -> HyperparameterSweep:
    """Of parameters that take much room: long names, long values."""
    return parse_sweep(
        {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "HyperparameterSweep",
            "metadata": {"name": "s" * names.MAX_SWEEP_NAME_LENGTH, "uid": "u", "generation": 1},
            "spec": {
                "objective": {"metric": "loss", "direction": "Minimize"},
                "numTrials": 3000,
                "parallelTrials": 30,
                "parameters": [
                    {"name": f"parameter-{n:02d}-{'x' * 40}", "env": f"P{n}", "searchSpace": {"uniform": {"min": 0, "max": 1}}}
                    for n in range(parameters)
                ],
                "trialTemplate": {"spec": {"trainer": {"image": "none", "command": ["none"]}}},
            },
        }
    )


def status(of: HyperparameterSweep, count: int) -> dict[str, Any]:
    chance = random.Random(0)
    trials, jobs = [], {}
    for index in range(count):
        value, outcome = chance.random(), chance.choice([Outcome.COMPLETE, Outcome.PRUNED, Outcome.FAILED, Outcome.IGNORED])
        readings = tuple(Reading(examples, value) for examples in (500, 1000, 2000))
        parameters = {p.name: chance.random() for p in of.spec.parameters}
        trials.append(Trial(index, parameters, outcome, readings, value if outcome is Outcome.COMPLETE else None))
        metrics = [
            {"name": f"{split}/metric_{n}", "value": str(chance.random())} for split in ("validation", "test") for n in range(16)
        ]
        jobs[index] = {
            "metadata": {"name": f"t{index}"},
            "status": {
                "state": "Complete",
                "activeSeconds": 100,
                "gpuSeconds": 100,
                "result": {"modelUri": f"s3://models/{'f' * 200}/{index}/model", "metrics": metrics},
            },
        }
    draft = SweepDraft({}, 1, datetime(2026, 1, 1, tzinfo=UTC))
    draft.describe(of, Study(of.spec), trials, jobs, Spent(300_000, 300_000))
    found: dict[str, Any] = draft.done()
    return found


@pytest.mark.parametrize(("parameters", "limit"), [(8, 16 * KIB), (20, 32 * KIB), (64, 96 * KIB)])
def test_three_thousand_trials_fit(parameters: int, limit: int) -> None:
    of = sweep(parameters)
    found = status(of, 3000)
    HyperparameterSweepStatus.model_validate(found)
    assert found["trials"]["created"] == 3000
    assert len(found["top"]) == 10
    assert len(found["importance"]) == parameters
    size = len(json.dumps(found))
    assert size < limit
    assert size < 1.1 * len(json.dumps(status(of, 300)))


@pytest.mark.parametrize("direction", ["Maximize", "Minimize"])
def test_a_rungs_best_is_a_number(direction: str) -> None:
    of = sweep(1)
    spec = of.spec.model_copy(update={"objective": of.spec.objective.model_copy(update={"direction": Direction(direction)})})
    values = (float("nan"), 0.2, float("inf"), 0.4, -float("inf"))
    trials = [Trial(n, {}, Outcome.PRUNED, (Reading(100, value),)) for n, value in enumerate(values)]
    rung = _rung(Study(spec), trials, 100)
    assert (rung["reached"], rung["best"]) == (5, "0.4" if direction == "Maximize" else "0.2")
    assert "best" not in _rung(Study(spec), trials[:1], 100)
