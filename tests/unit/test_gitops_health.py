"""Argo CD's health of a FineTuneJob and of a sweep: the odd objects. Those that they really go through are in integration/test_gitops.py.

`health` runs the Lua as Argo CD does: Lua 5.1, without the string, math and io libraries.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml
from lupa.lua51 import LuaRuntime

ARGOCD = Path(__file__).parents[2] / "examples" / "gitops" / "argocd"
KEPT = {
    "_G",
    "_VERSION",
    "assert",
    "error",
    "ipairs",
    "next",
    "pairs",
    "pcall",
    "select",
    "tonumber",
    "tostring",
    "type",
    "table",
}

Object = dict[str, Any]


def health(job: Object) -> tuple[str, str]:
    """Status and message."""
    lua = LuaRuntime(register_eval=False)
    lua.execute("for name in pairs(string) do string[name] = nil end")  # ("x"):format() finds them without the global
    for name in set(lua.globals()) - KEPT:
        lua.globals()[name] = None
    lua.globals()["obj"] = lua.table_from(job, recursive=True)
    answer = lua.execute((ARGOCD / "health.lua").read_text(encoding="utf-8"))
    return answer["status"], answer["message"]


def job(conditions: list[Object] | None = None, *, generation: int = 1, suspend: bool = False, **status: Any) -> Object:
    """What the API server would answer, so far as the Lua reads it."""
    seen = {"observedGeneration": 1, **status} | ({"conditions": conditions} if conditions is not None else {})
    return {"metadata": {"generation": generation}, "spec": {"suspend": suspend}, "status": seen}


def condition(kind: str, status: str = "True", reason: str = "Because", message: str = "") -> Object:
    return {"type": kind, "status": status, "reason": reason, "message": message}


def test_without_a_status_it_is_progressing() -> None:
    bare = {"metadata": {"generation": 1}, "spec": {"suspend": False}}
    assert health(bare) == ("Progressing", "The operator has not seen this version yet.")
    assert health({**bare, "status": {}})[0] == "Progressing"


def test_a_status_of_an_older_generation_is_progressing() -> None:
    running = [condition("Running")]
    assert health(job(running, generation=2, state="Running")) == (
        "Progressing",
        "The operator has not seen this version yet.",
    )
    assert health(job([condition("Suspended")], generation=2, suspend=True))[0] == "Progressing"


@pytest.mark.parametrize("conditions", [None, [], [condition("Sparkling")]], ids=["none", "empty", "unknown"])
def test_without_conditions_that_it_knows_it_is_progressing(conditions: list[Object] | None) -> None:
    assert health(job(conditions)) == ("Progressing", "Pending")


@pytest.mark.parametrize("word", ["False", "Unknown"])
def test_only_true_counts(word: str) -> None:
    assert health(job([condition("Complete", word), condition("Failed", word), condition("Suspended", word)]))[0] == "Progressing"


def test_what_is_finished_stays_so_whatever_is_changed_afterwards() -> None:
    assert health(job([condition("Complete", message="The model is trained.")], generation=2)) == (
        "Healthy",
        "The model is trained.",
    )
    failed = condition("Failed", reason="DataInvalid", message="train.csv: line 3")
    assert health(job([failed], generation=2)) == ("Degraded", "DataInvalid: train.csv: line 3")


def test_a_job_that_is_being_resumed_is_not_suspended() -> None:
    refused = condition("Running", "False", "CreateRefused", "exceeded quota")
    conditions = [refused, condition("Suspended")]
    assert health(job(conditions, suspend=False, state="Pending")) == ("Progressing", "Pending: exceeded quota")
    assert health(job(conditions, suspend=True, state="Suspended"))[0] == "Suspended"


@pytest.mark.parametrize(
    ("trainer", "says"),
    [
        ({}, "Running"),
        ({"progressPercentage": 0}, "Running, 0 %"),
        ({"progressPercentage": 40, "estimatedRemainingSeconds": 0}, "Running, 40 %, about 1 min left"),
        ({"progressPercentage": 40, "estimatedRemainingSeconds": 3725}, "Running, 40 %, about 63 min left"),
    ],
)
def test_how_far_it_is(trainer: Object, says: str) -> None:
    assert health(job([condition("Running")], state="Running", trainerStatus=trainer)) == ("Progressing", says)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({}, "Running"),
        ({"progress": "3/12"}, "Running, 3/12 trials"),
        ({"progress": "3/12", "estimatedRemainingSeconds": 130}, "Running, 3/12 trials, about 3 min left"),
    ],
)
def test_how_far_a_sweep_is(more: Object, says: str) -> None:
    assert health(job([condition("Running")], state="Running", **more)) == ("Progressing", says)


@pytest.mark.parametrize("kind", ["FineTuneJob", "HyperparameterSweep"])
def test_the_config_map_holds_the_same_lua(kind: str) -> None:
    data = yaml.safe_load((ARGOCD / "argocd-cm.yaml").read_text(encoding="utf-8"))["data"]
    lua = data[f"resource.customizations.health.finetune.dev_{kind}"]
    assert lua == (ARGOCD / "health.lua").read_text(encoding="utf-8")
    ignored = yaml.safe_load(data[f"resource.customizations.ignoreResourceUpdates.finetune.dev_{kind}"])
    assert ignored == {"jsonPointers": ["/status"]}
