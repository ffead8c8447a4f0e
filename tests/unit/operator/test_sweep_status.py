"""The status of a sweep stays small, however many trials it has had."""

import json
import random
from collections.abc import Callable
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


def sweep(parameters: int, values: dict[str, Any] | None = None, **spec: Any) -> HyperparameterSweep:
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
                    {
                        "name": f"parameter-{n:02d}-{'x' * 40}",
                        "env": f"P{n}",
                        "searchSpace": values or {"uniform": {"min": 0, "max": 1}},
                    }
                    for n in range(parameters)
                ],
                "trialTemplate": {"spec": {"trainer": {"image": "none", "command": ["none"]}}},
                **spec,
            },
        }
    )


def status(of: HyperparameterSweep, count: int) -> dict[str, Any]:
    found: dict[str, Any] = draft_of(of, count).done()
    return found


def draft_of(of: HyperparameterSweep, count: int, drawn: Callable[[random.Random], Any] = random.Random.random) -> SweepDraft:
    chance = random.Random(0)
    trials, jobs = [], {}
    for index in range(count):
        value, outcome = chance.random(), chance.choice([Outcome.COMPLETE, Outcome.PRUNED, Outcome.FAILED, Outcome.IGNORED])
        readings = tuple(Reading(examples, value) for examples in (500, 1000, 2000))
        parameters = {p.name: drawn(chance) for p in of.spec.parameters}
        trials.append(Trial(index, parameters, outcome, readings, value if outcome is Outcome.COMPLETE else None))
        metrics = [
            {"name": f"{split}/metric_{n}", "value": str(chance.random())} for split in ("validation", "test") for n in range(16)
        ]
        jobs[index] = {
            "metadata": {"name": f"t{index}"},
            "spec": {},
            "status": {
                "state": "Complete",
                "activeSeconds": 100,
                "gpuSeconds": 100,
                "result": {"modelUri": f"s3://models/{'f' * 200}/{index}/model", "metrics": metrics},
            },
        }
    draft = SweepDraft({}, 1, datetime(2026, 1, 1, tzinfo=UTC))
    draft.describe(of, Study(of.spec), trials, jobs, Spent(300_000, 300_000))
    return draft


@pytest.mark.parametrize(("parameters", "limit"), [(8, 16 * KIB), (20, 32 * KIB), (64, 48 * KIB)])
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


def test_the_widest_sweep_fits() -> None:
    """All that a status may hold: 64 parameters with names and values as long as they may be, all rungs, all repetitions."""
    of = sweep(64, {"categorical": {"values": ["v" * 250 + "a", "v" * 250 + "b"]}})
    asha = {"asha": {"minExamples": 10**6, "reductionFactor": 2, "maxRungs": 10}}
    spec = of.spec.model_copy(update={"prune_algorithm": type(of.spec.prune_algorithm).model_validate(asha)})
    of = of.model_copy(update={"spec": spec})
    draft = draft_of(of, 300, lambda _: "v" * 250 + "a")
    rows = []
    for index in range(20):
        runs = [complete(job(index), -0.123456789) for _ in range(21)]
        rows.append((Trial(index, {}, Outcome.COMPLETE, (), 0.1), runs))
    draft.repetitions(Study(of.spec), rows, whole=True)
    found = draft.done()
    HyperparameterSweepStatus.model_validate(found)
    assert len(found["repetitions"][0]["values"]) == 21
    assert len(found["best"]["parameters"]) == 64
    assert [entry["trial"] for entry in found["top"]] == [s["trial"] for s in found["top"] if s["value"]]
    assert len(json.dumps(found)) < 64 * KIB


def job(index: int, **status: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": f"t{index}", "labels": {names.LABEL_SWEEP: "s"}},
        "spec": {"trainer": {"command": ["x"]}},
        "status": status,
    }


def complete(of: dict[str, Any], value: float) -> dict[str, Any]:
    conditions = [{"type": "Complete", "status": "True", "reason": "Trained"}]
    return {
        **of,
        "status": {**of["status"], "conditions": conditions, "result": {"metrics": [{"name": "loss", "value": str(value)}]}},
    }


@pytest.mark.parametrize("direction", ["Maximize", "Minimize"])
def test_the_best_mean_wins_and_not_the_best_run(direction: str) -> None:
    of = sweep(1)
    spec = of.spec.model_copy(update={"objective": of.spec.objective.model_copy(update={"direction": Direction(direction)})})
    sign = 1 if direction == "Minimize" else -1
    lucky, steady = (
        (Trial(index, {}, Outcome.COMPLETE), [complete(job(index, seed=n), sign * value) for n, value in enumerate(values)])
        for index, values in enumerate([(0.1, 0.9, 0.9), (0.5, 0.3, 0.4)])
    )
    for rows in ([lucky, steady], [steady, lucky]):
        trial, run = SweepDraft.winner(Study(spec), rows)
        assert (trial.index, run["status"]["seed"]) == (1, 1)


def test_what_a_sweep_will_cost_is_told_by_the_trials_that_have_ended() -> None:
    """Those that run have cost nothing yet, and a grid has no more trials than cells."""
    of = sweep(1)
    trials = [
        Trial(index, {}, Outcome.COMPLETE if index < 2 else Outcome.OPEN, (), 0.5 if index < 2 else None) for index in range(30)
    ]
    jobs = {index: complete(job(index, activeSeconds=100, gpuSeconds=400), 0.5) for index in range(2)}
    jobs |= {index: job(index, state="Running", activeSeconds=0) for index in range(2, 30)}
    draft = SweepDraft({}, 1, datetime(2026, 1, 1, tzinfo=UTC))
    draft.describe(of, Study(of.spec), trials, jobs, Spent(200, 800))
    assert (draft.new["plan"]["expectedActiveSeconds"], draft.new["plan"]["expectedGpuSeconds"]) == (300_000, 1_200_000)
    assert draft.new["progress"] == "2/3000"
    assert draft.new["estimatedRemainingSeconds"] == round(100 * (3000 - 2 - 14) / 30)
    grid = sweep(1, {"categorical": {"values": [1, 2, 3]}}, searchAlgorithm={"grid": {}})
    draft.describe(grid, Study(grid.spec), trials[:3], {n: jobs[n] for n in range(3)}, Spent(200, 800))
    assert (draft.new["plan"]["expectedActiveSeconds"], draft.new["progress"]) == (300, "2/3")
    assert draft.new["estimatedRemainingSeconds"] == round(100 * 0.5 / 30)


def test_the_best_is_gone_when_its_trial_is() -> None:
    of = sweep(1)
    draft = draft_of(of, 3)
    assert draft.new["best"]
    again = SweepDraft(draft.done(), 1, datetime(2026, 1, 1, tzinfo=UTC))
    again.describe(of, Study(of.spec), [Trial(0, {}, Outcome.IGNORED)], {}, Spent(0, 0))
    assert (again.new["top"], again.new.get("best"), again.new.get("metrics")) == ([], None, None)


@pytest.mark.parametrize("direction", ["Maximize", "Minimize"])
def test_a_rungs_best_is_a_number(direction: str) -> None:
    of = sweep(1)
    spec = of.spec.model_copy(update={"objective": of.spec.objective.model_copy(update={"direction": Direction(direction)})})
    values = (float("nan"), 0.2, float("inf"), 0.4, -float("inf"))
    trials = [Trial(n, {}, Outcome.PRUNED, (Reading(100, value),)) for n, value in enumerate(values)]
    rung = _rung(Study(spec), trials, 100)
    assert (rung["reached"], rung["best"]) == (5, "0.4" if direction == "Maximize" else "0.2")
    assert "best" not in _rung(Study(spec), trials[:1], 100)
