"""Decisions about a sweep that are rare: edits that a rule forbids at the start, sources that are gone, values that do not go together."""

import base64
import gzip
import json
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from finetune_api import JobDefaults, names
from finetune_api.manifest import parse_sweep
from finetune_operator.domain import history
from finetune_operator.domain import trials as t
from finetune_operator.domain.closing import build_closing
from finetune_operator.domain.replay import replay
from finetune_operator.domain.sweep import decide_sweep
from finetune_operator.domain.sweep_status import SweepDraft
from finetune_operator.domain.sweep_types import CreateTrial, PatchTrial, SweepDecision, SweepObserved
from finetune_operator.domain.types import CreateJob, Event, Settings
from finetune_operator.search.types import Outcome, Reading, Study, Suggestion, Trial, Verdict

Object = dict[str, Any]
NOW = datetime(2026, 1, 1, tzinfo=UTC)
SETTINGS = Settings(trainer_image="trainer:test", progress_url="https://127.0.0.1:1", progress_ca="none")
METRIC = "validation/macro_f1"


def values(name: str, *choices: Any) -> Object:
    return {"name": name, "path": f"hyperparameters.{name}", "searchSpace": {"categorical": {"values": list(choices)}}}


def sweep(**spec: Any) -> Object:
    recipe = {
        "task": "SequenceClassification",
        "model": {"uri": "s3://models/base"},
        "dataset": {"uri": "s3://data/feedback", "labels": ["bad", "good"]},
        "output": {"storageUri": "s3://models/out"},
    }
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND_SWEEP,
        "metadata": {"name": "mood", "namespace": "team", "uid": "u", "generation": 1},
        "spec": {
            "objective": {"metric": METRIC, "direction": "Maximize"},
            "parameters": [values("batchSize", 8, 16, 32), values("epochs", 1, 2)],
            "searchAlgorithm": {"grid": {}},
            "numTrials": 6,
            "parallelTrials": 2,
            "trialTemplate": {"spec": recipe},
            **spec,
        },
    }


def ended(job: Object, value: float | None = 0.5, kind: str = "Complete", reason: str = "Trained") -> Object:
    """A trial at its end, with its model's metrics or, failed, with its last words."""
    told = [{"name": METRIC, "value": str(value)}]
    result = {"result": {"modelUri": "s3://models/x/model", "metrics": told}} if kind == "Complete" else {}
    conditions = [{"type": kind, "status": "True", "reason": reason}]
    return {**job, "status": {"state": kind, "conditions": conditions, "trainerStatus": {"metrics": told}, **result}}


def look(of: Object, jobs: Iterable[Object] = (), **more: Any) -> SweepDecision:
    return decide_sweep(SweepObserved(of, {said.index: job for job in jobs if (said := t.chosen(job))}, **more), NOW, SETTINGS)


def made(decision: SweepDecision) -> list[Object]:
    """The trials that it creates, as the API server would have them."""
    manifests = [action.manifest for action in decision.actions if isinstance(action, CreateTrial)]
    return [{**m, "metadata": {**m["metadata"], "uid": m["metadata"]["name"]}} for m in manifests]


def condition(decision: SweepDecision, kind: str) -> Object:
    return next(c for c in decision.status["conditions"] if c["type"] == kind)


# ---------------------------------------------------------------------------------------------------------- edits ----
def test_a_grid_may_be_cut_short_while_it_runs() -> None:
    begun = look(of := sweep())
    jobs = made(begun)
    of = {**of, "spec": {**of["spec"], "numTrials": 3}, "status": begun.status}
    decision = look(of, [ended(jobs[0]), jobs[1]])
    assert [t.chosen(job).index for job in made(decision) if t.chosen(job)] == [2]  # type: ignore[union-attr]
    assert decision.status["state"] == "Running"
    assert decision.status["plan"] | {"cells": 6, "trials": 3} == decision.status["plan"]
    done = look({**of, "status": decision.status}, [ended(job) for job in (*jobs, *made(decision))])
    assert done.status["finished"] == "TrialsDone"


@pytest.mark.parametrize("seen", ["trials", "status"])
def test_a_spec_that_is_not_understood_ends_no_sweep_that_runs(seen: str) -> None:
    begun = look(of := sweep())
    of = {**of, "spec": {**of["spec"], "ofTheFuture": 1}, "status": begun.status if seen == "status" else {}}
    decision = look(of, made(begun) if seen == "trials" else ())
    assert decision.status == of["status"]
    [event] = decision.actions
    assert isinstance(event, Event)
    assert (event.reason, "ofTheFuture" in event.message) == ("NotUnderstood", True)
    assert condition(look({**of, "status": {}}), "Failed")["reason"] == "SweepInvalid"


# ----------------------------------------------------------------------------------------- values that do not go together
PAIR = [values("batchSize", 8, 16, 32), values("microBatchSize", 4, 16, 32)]


@pytest.mark.parametrize("algorithm", ["random", "sobol", "tpe", "gp"])
def test_only_what_the_recipe_takes_together_is_tried(algorithm: str) -> None:
    of = sweep(parameters=PAIR, searchAlgorithm={algorithm: {}}, numTrials=40, parallelTrials=40)
    jobs = made(look(of))
    tried = [t.chosen(job).parameters for job in jobs if t.chosen(job)]  # type: ignore[union-attr]
    assert len(tried) == 40
    assert all(int(p["microBatchSize"]) <= int(p["batchSize"]) for p in tried)
    assert len({tuple(p.items()) for p in tried}) > 3
    assert replay(of, jobs).mismatches == ()


def test_a_grid_and_a_point_that_the_recipe_does_not_take_are_named() -> None:
    grid = look(sweep(parameters=PAIR, numTrials=9))
    assert "the grid has the cell batchSize=8, microBatchSize=16" in condition(grid, "Failed")["message"]
    point = look(sweep(parameters=PAIR, searchAlgorithm={"tpe": {}}, initialPoints=[{"batchSize": 8, "microBatchSize": 32}]))
    assert "initialPoints[0]" in condition(point, "Failed")["message"]
    part = sweep(parameters=PAIR, searchAlgorithm={"tpe": {}}, initialPoints=[{"microBatchSize": 32}])
    assert t.chosen(made(look(part))[0]).parameters == {"batchSize": 32, "microBatchSize": 32}  # type: ignore[union-attr]


def test_a_space_of_nothing_that_the_recipe_takes_ends_with_a_sentence() -> None:
    of = sweep(parameters=[values("batchSize", 8, 16)], searchAlgorithm={"random": {}})
    of["spec"]["trialTemplate"]["spec"]["hyperparameters"] = {"microBatchSize": 32}  # right beside the batch that is not searched
    failed = condition(look(of), "Failed")
    assert failed["reason"] == "SweepInvalid"
    assert "are not taken together: spec.hyperparameters.microBatchSize" in failed["message"]


# ----------------------------------------------------------------------------------------------------- warm start ----
def test_a_sweep_goes_on_when_the_one_that_it_started_warm_from_is_deleted() -> None:
    source = sweep()
    old = [ended(job, 0.1 * n) for n, job in enumerate(made(look(source)))]
    source["status"] = {"conditions": [{"type": "Complete", "status": "True", "reason": "TrialsDone"}]}
    of = sweep(warmStartFrom={"name": "old"}, searchAlgorithm={"random": {}})
    assert condition(look(of), "Running")["reason"] == "WarmStartWaiting"
    begun = look(of, warm=source, warm_trials=old)
    jobs = made(begun)
    assert len(jobs) == 2
    decision = look({**of, "status": begun.status}, [ended(jobs[0]), jobs[1]])
    assert len(made(decision)) == 1
    assert "there is no sweep old; the search goes on" in condition(decision, "Running")["message"]
    suspended = {**of, "spec": {**of["spec"], "suspend": True}, "status": begun.status}
    assert [a for a in look(suspended, jobs).actions if isinstance(a, PatchTrial)], "the edit was not heard"

    assert replay(of, jobs, (source, old)).mismatches == ()
    [first, _] = replay(of, jobs, (source, old[:1])).mismatches
    assert not first.replayed
    assert "it knew 2 trials of the sweep that it started warm from; there are 1" in first.message


# ------------------------------------------------------------------------------------------------------ promotion ----
def test_a_repetition_without_a_model_does_not_win() -> None:
    study = Study(parse_sweep(sweep()).spec)
    own = ended({"metadata": {"name": "own", "labels": {names.LABEL_SWEEP: "mood"}}}, 0.5)
    failed = ended({"metadata": {"name": "failed"}}, 0.9, "Failed", "CudaOutOfMemory")
    stopped = ended({"metadata": {"name": "stopped"}}, 0.9, "Complete", "Stopped")
    undefined = ended({"metadata": {"name": "undefined"}}, float("nan"))
    row = (Trial(0, {}, Outcome.COMPLETE, value=0.5), [own, failed, stopped, undefined])
    assert SweepDraft.winner(study, [row]) == (row[0], own)
    draft = SweepDraft({}, 1, NOW)
    draft.repetitions(study, [row], whole=True)
    assert draft.new["repetitions"] == [{"trial": "mood-t0000", "values": ["0.5"], "mean": "0.5"}]


def test_every_name_that_a_sweep_gives_is_a_jobs_name() -> None:
    longest = "s" * names.MAX_SWEEP_NAME_LENGTH
    given = [t.trial_name(longest, 9999), *(t.repeat_name(longest, 9999, seed) for seed in range(1, 21))]
    assert len(set(given)) == 21
    assert max(map(len, given)) <= names.MAX_NAME_LENGTH


def test_the_closing_job_has_what_every_job_of_the_cluster_has() -> None:
    defaults = JobDefaults.model_validate(
        {
            "queueName": "gpus",
            "envFrom": [{"secretRef": {"name": "s3-credentials"}}],
            "serviceAccountName": "training",
            "podTemplate": {"metadata": {"labels": {"team": "a"}}, "spec": {"imagePullSecrets": [{"name": "registry"}]}},
        }
    )
    job = build_closing(parse_sweep(sweep()), {}, None, None, replace(SETTINGS, defaults=defaults))
    assert job is not None
    assert job["spec"]["podReplacementPolicy"] == "Failed", "two pods at once write the same files"
    assert job is not None
    pod = job["spec"]["template"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert pod["metadata"]["labels"]["team"] == "a"
    assert pod["spec"]["containers"][0]["envFrom"] == [{"secretRef": {"name": "s3-credentials"}}]
    assert (pod["spec"]["serviceAccountName"], pod["spec"]["imagePullSecrets"]) == ("training", [{"name": "registry"}])


# -------------------------------------------------------------------------------------------------------- history ----
@pytest.mark.parametrize(
    ("count", "room", "left_out"),
    [(10, history.ROOM, []), (3000, history.ROOM, ["evaluations"]), (3000, 200_000, ["evaluations", "asOf"])],
)
def test_the_history_fits_into_a_pod(monkeypatch: pytest.MonkeyPatch, count: int, room: int, left_out: list[str]) -> None:
    """Of trials that run 30 at a time, with as many evaluations as a status holds."""
    of = parse_sweep(
        sweep(
            numTrials=10_000,
            parallelTrials=30,
            searchAlgorithm={"tpe": {}},
            parameters=[
                {"name": "rate", "path": "hyperparameters.learningRate", "searchSpace": {"logUniform": {"min": 1e-6, "max": 1}}}
            ],
            pruneAlgorithm={"asha": {"minExamples": 100, "maxRungs": 3}},
        )
    )
    trials, jobs = [], {}
    for index in range(count):
        known = t.AsOf(index, {max(0, index - k): k * 7919 % 4 for k in range(30)})
        job = ended(t.build_trial(of, index, Suggestion({"rate": (index * 0.37) ** 0.5 % 1}, "tpe"), known), index**0.5 % 1)
        job["status"]["evaluations"] = [
            {"examples": 10 * n, "metrics": [{"name": METRIC, "value": str((index + n) ** 0.5 % 1)}]} for n in range(1, 65)
        ]
        for rung in (100, 300):
            said = t.verdict_patch(rung, (index + rung) ** 0.5 % 1, Verdict(False, 1, 2), known)
            job["metadata"]["annotations"] |= said["metadata"]["annotations"]
        jobs[index] = job
        trials.append(Trial(index, {}, Outcome.COMPLETE, (Reading(100, 0.1),), 0.5))
    document = history.history(Study(of.spec), of, {"trials": {"created": count}}, trials, jobs)
    monkeypatch.setattr(history, "ROOM", room)
    packed = history.pack(document)
    assert sum(map(len, packed)) <= room
    read = json.loads(gzip.decompress(base64.b64decode("".join(packed))))
    assert read.get("leftOut", []) == left_out
    assert len(history.objects(read)[1]) == count


def test_a_search_that_is_over_is_recorded_before_anything_follows_from_it() -> None:
    # numTrials was raised between the create of the closing Job and the write of the status: an old history, and an old winner promoted.
    of = sweep(numTrials=3, searchAlgorithm={"random": {}})
    begun = look(of)
    jobs = [ended(job) for job in made(begun)]
    begun = look({**of, "status": begun.status}, jobs)
    jobs += [ended(job) for job in made(begun)]
    last = look({**of, "status": begun.status}, jobs)
    assert last.status["finished"] == "TrialsDone"
    assert all(isinstance(action, Event) for action in last.actions)
    assert last.requeue_after == 0
    raised = {**of, "spec": {**of["spec"], "numTrials": 4}, "status": begun.status}
    assert len(made(look(raised, jobs))) == 1
    after = look({**of, "status": last.status}, jobs)
    assert [action.manifest["metadata"]["name"] for action in after.actions if isinstance(action, CreateJob)] == ["mood-closing"]


@pytest.mark.parametrize(
    ("constraints", "objective", "said"),
    [
        (
            [{"metric": "latency", "max": 5}],
            "loss",
            "constraints[0].metric: no trial has reported latency; there are loss, memory",
        ),
        ([{"metric": "memory", "max": 5}], "loss", None),
        ([], "score", "objective.metric: no trial has reported score; there are loss, memory"),
    ],
)
def test_a_metric_that_a_script_does_not_report_is_told_at_its_first_end(
    constraints: list[Object], objective: str, said: str | None
) -> None:
    # Each trial counted as one that breaks the constraint, to the last, and then: loosen them.
    template = {"spec": {"trainer": {"image": "mine", "command": ["train"]}}}
    rate = {"name": "rate", "env": "RATE", "searchSpace": {"uniform": {"min": 0, "max": 1}}}
    spec = {"objective": {"metric": objective, "direction": "Minimize"}, "parameters": [rate], "constraints": constraints}
    of = sweep(**spec, trialTemplate=template, searchAlgorithm={"random": {}})
    begun = look(of)
    first, second = made(begun)
    told = {"trainerStatus": {"metrics": [{"name": "loss", "value": "1"}, {"name": "memory", "value": "2"}]}}
    running = {**second, "status": {"state": "Running", **told}}
    assert (
        condition(look({**of, "status": begun.status}, [{**first, "status": told}, running]), "Running")["reason"] != "Stopping"
    )
    ends = [{"type": "Complete", "status": "True", "reason": "Trained"}]
    decision = look({**of, "status": begun.status}, [{**first, "status": {**told, "conditions": ends}}, running])
    if said is None:
        assert decision.status["state"] == "Running"
    else:
        patches = [action.patch for action in decision.actions if isinstance(action, PatchTrial)]
        assert patches == [{"spec": {"stop": True}}]
        ended_too = {**second, "status": {**told, "conditions": ends}}
        failed = look({**of, "status": decision.status}, [{**first, "status": {**told, "conditions": ends}}, ended_too])
        assert condition(failed, "Failed")["message"].startswith(said)


def test_trials_that_run_spend_the_budget_while_nobody_tells() -> None:
    of = sweep(budget={"activeSeconds": 150}, searchAlgorithm={"random": {}})
    begun = look(of)
    since = [{"type": "Running", "status": "True", "lastTransitionTime": "2025-12-31T23:58:20Z"}]
    jobs = [{**job, "status": {"state": "Running", "conditions": since}} for job in made(begun)]
    waiting = look(of := {**of, "status": begun.status}, jobs[:1])
    assert (waiting.status.get("finished"), waiting.requeue_after) == (None, 10.0)
    assert look(of, jobs).status["finished"] == "BudgetSpent"
