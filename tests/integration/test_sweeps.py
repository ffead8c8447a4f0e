"""HyperparameterSweeps on a real API server: what is decided, whatever dies; bad input; suspend, deletion, warm start, promotion.

The trials are played (integration/sweeps.py); a cluster of its own, so that no other operator has a hand in.
"""

import asyncio
import json
import math
import os
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_operator.domain.replay import replay
from finetune_operator.domain.status import is_finished
from finetune_operator.domain.trials import chosen
from finetune_operator.kube.aio import AioCluster, load_configuration
from finetune_operator.kube.port import CHILDREN, JOBS, SWEEPS, AlreadyExists, Conflict, Refused, Unavailable
from integration.jobs import wait
from integration.sweeps import METRIC, DyingWhenClosing, Faulty, Hand, Killed, Object, Runs, decisions, sweep
from testcluster import Cluster


@pytest.fixture(scope="module")
def own() -> Iterator[Cluster]:
    with Cluster() as running:
        for file in sorted((Path(__file__).parents[2] / "crds").glob("*.yaml")):
            running.kubectl("apply", "--server-side", "-f", str(file))
            running.wait_for_crd(file.stem)
            wait(lambda kind=file.stem: running.kubectl("get", kind, "-A", check=False).returncode == 0, "storage")  # type: ignore[misc]
        yield running


@pytest.fixture
def place(own: Cluster) -> Iterator[str]:
    name = f"sweeps-{random.randrange(10**8):08d}"
    own.kubectl("create", "namespace", name)
    wait(lambda: own.kubectl("-n", name, "get", "serviceaccount", "default", check=False).returncode == 0, "the account")
    yield name
    own.kubectl("delete", "namespace", name, "--wait=false", check=False)


@pytest.fixture
async def cluster(own: Cluster) -> AsyncIterator[AioCluster]:
    adapter = AioCluster(await load_configuration(own.kubeconfig))
    yield adapter
    await adapter.close()


@pytest.fixture
def runs(cluster: AioCluster, place: str) -> Runs:
    return Runs(cluster, place, Hand(cluster, place, score))


def score(parameters: Object, step: int) -> float:
    """Best at lr 1e-3 and batch 16; curves rise with the evaluations and do not cross."""
    quality = -abs(math.log10(parameters["lr"]) + 3) - 0.1 * abs(math.log2(parameters["batch"]) - 4)
    return round(0.8 + 0.2 * quality - 0.1 / (step + 1), 6)


# --------------------------------------------------------------------------------------------------------- the whole ---
async def test_a_sweep_from_manifest_to_best_trial(runs: Runs) -> None:
    await runs.create(sweep("whole"))
    found = await runs.run("whole")
    status, jobs = found["status"], await runs.hand.jobs("whole")
    assert [job["metadata"]["name"] for job in jobs] == [f"whole-t{n:04d}" for n in range(12)]
    counts = status["trials"]
    assert counts["created"] == 12
    assert counts["complete"] + counts["pruned"] == 12
    assert counts["pruned"] > 0
    assert status["state"] == "Complete"
    assert next(c for c in status["conditions"] if c["type"] == "Complete")["reason"] == "TrialsDone"
    complete = [j for j in jobs if j["status"]["conditions"][0]["reason"] == "Trained"]
    best = max(complete, key=lambda j: float(j["status"]["result"]["metrics"][0]["value"]))
    assert status["best"]["trial"] == best["metadata"]["name"]
    assert float(status["best"]["value"]) == float(best["status"]["result"]["metrics"][0]["value"])
    assert [row["examples"] for row in status["rungs"]] == [100, 200, 400]
    assert sum(row["stopped"] for row in status["rungs"]) == counts["pruned"]
    for job in jobs:
        assert job["spec"]["output"]["storageUri"] == f"s3://models/whole/{job['metadata']['name']}"
        assert job["spec"]["evaluation"]["atExamples"] == [100, 200, 400]
        assert job["spec"]["checkpoint"]["onStop"] == "Discard"
        said = chosen(job)
        assert said is not None
        assert job["spec"]["hyperparameters"]["learningRate"] == said.parameters["lr"]
        assert job["metadata"]["ownerReferences"][0]["uid"] == found["metadata"]["uid"]
        assert bool(job["spec"].get("stop")) == (job["status"]["conditions"][0]["reason"] == "Stopped")
    assert status["historyUri"] == "s3://models/whole/sweep.json"


# ------------------------------------------------------------------------------------------------------------- kills ---
EVERY = 1 if os.environ.get("FAULTS") else 23
"""`make test` takes a sample of the crash points; `make faults` all of them."""


async def test_killed_before_and_after_any_call_it_decides_the_same(cluster: AioCluster, place: str) -> None:
    undisturbed = Runs(cluster, place, Hand(cluster, place, score))
    expected, calls = await _decided(undisturbed, "plain", None)
    assert calls > 60
    offset = random.randrange(EVERY)
    print(f"{calls} calls; every {EVERY}th from {offset}")
    for at in range(offset, calls, EVERY):
        for after in (False, True):
            name = f"k{at}-{'after' if after else 'before'}"
            runs = Runs(cluster, place, Hand(cluster, place, score))
            decided, _ = await _decided(runs, name, at, after=after)
            assert runs.calls > 0, "it was never killed"
            assert _renamed(decided, name) == _renamed(expected, "plain"), f"killed {'after' if after else 'before'} call {at}"


async def test_killed_when_it_has_made_the_job_that_ends_it(runs: Runs, cluster: AioCluster) -> None:
    """The status does not lead to that Job yet. Every later look met a Job that was there already, and the sweep never ended."""
    await runs.create(sweep("closing", numTrials=2, parallelTrials=2))
    runs.reconciler.cluster = runs.dying = DyingWhenClosing(cluster)  # type: ignore[assignment]
    found = await runs.run("closing")
    assert found["status"]["state"] == "Complete"
    assert runs.calls > 0, "it was never killed"


async def _decided(runs: Runs, name: str, at: int | None, *, after: bool = False) -> tuple[list[Any], int]:
    await runs.create(sweep(name))
    runs.fresh(at, after=after)
    await runs.run(name)
    return decisions(await runs.hand.jobs(name)), runs.calls + runs.dying.count


def _renamed(decided: list[Any], name: str) -> list[Any]:
    return [(row[0].replace(name, "sweep"), *row[1:]) for row in decided]


async def test_many_trials_through_kills_and_faults_replay_exactly(cluster: AioCluster, place: str) -> None:
    count, parallel = (300, 30) if os.environ.get("FAULTS") else (80, 10)
    seed = random.randrange(10**6)
    print(f"seed {seed}, {count} trials, {parallel} at a time")
    chance = random.Random(seed)
    hand = Hand(cluster, place, score)
    hand.ends = {n: "NonFiniteLoss" for n in range(count) if chance.random() < 0.03}
    hand.ends |= {n: "StorageUnavailable" for n in range(count) if n not in hand.ends and chance.random() < 0.03}
    runs = Runs(cluster, place, hand)
    await runs.create(sweep("many", numTrials=count, parallelTrials=parallel, maxFailedTrials=count))
    key, kills = (place, "many"), 0

    def faulty() -> None:
        runs.fresh(None)
        runs.reconciler.cluster = Faulty(cluster, chance)  # type: ignore[assignment]

    faulty()
    for _ in range(count * 40):
        try:
            await runs.reconciler.reconcile(key)
        except Killed:
            kills += 1
            faulty()
        except (Conflict, AlreadyExists):
            runs.reconciler.relist(key)
        except Unavailable:
            continue
        found = await cluster.get(SWEEPS, place, "many")
        if is_finished(found.get("status") or {}):
            break
        jobs = [job for job in await hand.jobs("many") if not is_finished(job.get("status") or {})]
        for job in chance.sample(jobs, min(len(jobs), 1 + parallel // 3)):
            await (hand.end(job, "Complete", "Stopped") if job["spec"].get("stop") else hand.step(job))
            runs.reconciler.touch(key, job["metadata"]["name"])
        if not jobs:
            await hand.advance("many")
    jobs = await hand.jobs("many")
    counts = found["status"]["trials"]
    assert found["status"]["state"] == "Complete", found["status"]
    assert kills > 0
    assert [job["metadata"]["name"] for job in jobs] == [f"many-t{n:04d}" for n in range(count)]
    assert counts["created"] == count
    assert sum(counts.values()) == 2 * count
    assert counts["failed"] + counts["lost"] <= len(hand.ends)
    reasons = [job["status"]["conditions"][0]["reason"] for job in jobs]
    assert reasons.count("Trained") == counts["complete"]
    assert reasons.count("Stopped") == counts["pruned"]
    assert reasons.count("NonFiniteLoss") == counts["failed"]
    assert reasons.count("StorageUnavailable") == counts["lost"]
    replayed = replay(found, jobs)
    assert replayed.mismatches == ()
    assert replayed.suggestions == count
    assert 0 < replayed.verdicts <= sum(row["reached"] for row in found["status"]["rungs"])
    assert len(json.dumps(found["status"])) < 64 * 1024


# --------------------------------------------------------------------------------------------------------- bad input ---
def spoiled(**changes: Any) -> Object:
    out = sweep("bad")
    out["spec"] |= changes
    return out


def parameter(space: Object, path: str = "hyperparameters.learningRate", **more: Any) -> list[Object]:
    return [{"name": "lr", "path": path, "searchSpace": space, **more}]


@pytest.mark.parametrize(
    ("manifest", "sentence"),
    [
        (spoiled(parameters=[]), "spec.parameters"),
        (spoiled(parameters=parameter({"uniform": {"min": 2, "max": 1}})), "min must be less than max"),
        (
            spoiled(parameters=parameter({"logUniform": {"min": 0, "max": 1}})),
            "min must be greater than 0 on a logarithmic scale",
        ),
        (spoiled(parameters=parameter({})), "set exactly one of uniform, logUniform"),
        (spoiled(objective={"metric": "test/macro_f1", "direction": "Maximize"}), "the test split is read once"),
        (
            spoiled(parameters=parameter({"intUniform": {"min": 1, "max": 5}}, "hyperparameters.epochs")),
            "cannot be searched with pruning",
        ),
        (spoiled(searchAlgorithm={"tpe": {}, "gp": {}}), "set exactly one of auto, grid"),
        (spoiled(constraints=[{"metric": "validation/loss", "min": 2, "max": 1}]), "no value is allowed"),
        (
            spoiled(
                pruneAlgorithm={"none": {}},
                promote={"storageUri": "s3://models/best"},
                trialTemplate={"spec": {**sweep("x")["spec"]["trialTemplate"]["spec"], "trainer": {"command": ["mine"]}}},
            ),
            "promote needs our own trainer",
        ),
    ],
)
async def test_the_api_server_refuses(runs: Runs, manifest: Object, sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        await runs.create(manifest)


@pytest.mark.parametrize(
    ("manifest", "sentence"),
    [
        (spoiled(parameters=parameter({"uniform": {"min": 0, "max": 1}}, "hyperparameters.rate")), "has no field 'rate'"),
        (spoiled(parameters=parameter({"uniform": {"min": 1, "max": 100}})), "less than or equal to 10"),
        (spoiled(objective={"metric": "validation/f0", "direction": "Maximize"}), "it has validation/macro_f1"),
        (spoiled(searchAlgorithm={"grid": {"points": 5}}), "the grid has 15 cells and numTrials is 12"),
        (
            spoiled(
                searchAlgorithm={"grid": {}},
                parameters=[
                    {"name": name, "path": f"hyperparameters.{name}", "searchSpace": {"categorical": {"values": [8, 16]}}}
                    for name in ("batchSize", "microBatchSize")
                ],
            ),
            "the grid has the cell batchSize=8, microBatchSize=16",
        ),
        (
            spoiled(
                parameters=[
                    *sweep("x")["spec"]["parameters"],
                    {
                        "name": "decay",
                        "path": "hyperparameters.weightDecay",
                        "searchSpace": {"uniform": {"min": 0, "max": 0.1}},
                        "when": {"parameter": "batch", "values": [64]},
                    },
                ]
            ),
            "batch is never 64: it is one of 8, 16, 32",
        ),
        (spoiled(initialPoints=[{"lr": 1.0}]), "lr: 1 is not in its search space"),
    ],
)
async def test_what_the_api_server_cannot_see_fails_with_a_sentence(runs: Runs, manifest: Object, sentence: str) -> None:
    await runs.create(manifest)
    found = await runs.run("bad")
    condition = next(c for c in found["status"]["conditions"] if c["type"] == "Failed")
    assert (condition["status"], condition["reason"]) == ("True", "SweepInvalid")
    assert sentence in condition["message"]
    assert await runs.hand.jobs("bad") == []


async def test_a_metric_that_nobody_reports_is_named_with_those_that_exist(runs: Runs) -> None:
    manifest = sweep("unknown", objective={"metric": "validation/auroc", "direction": "Maximize"})
    await runs.create(manifest)
    found = await runs.run("unknown")
    condition = next(c for c in found["status"]["conditions"] if c["type"] == "Failed")
    assert condition["reason"] == "MetricNotFound"
    assert f"no trial has reported validation/auroc; there are {METRIC}" in condition["message"]
    assert len(await runs.hand.jobs("unknown")) == 3  # what ran by then; no more


async def test_all_trials_failing_ends_the_sweep_early(runs: Runs) -> None:
    runs.hand.ends = dict.fromkeys(range(12), "DataInvalid")
    await runs.create(sweep("failing", pruneAlgorithm={"none": {}}))
    found = await runs.run("failing")
    condition = next(c for c in found["status"]["conditions"] if c["type"] == "Failed")
    assert condition["reason"] == "TooManyFailed"
    assert "run it alone as a FineTuneJob" in condition["message"]
    assert found["status"]["trials"]["lost"] == 3
    assert found["status"]["trials"]["created"] < 12


async def test_failures_of_parameters_are_learned_from_and_others_are_not(runs: Runs) -> None:
    runs.hand.ends = {1: "CudaOutOfMemory", 4: "StorageUnavailable"}
    await runs.create(sweep("some"))
    status = (await runs.run("some"))["status"]
    assert status["state"] == "Complete"
    assert (status["trials"]["failed"], status["trials"]["lost"]) == (1, 1)


async def test_a_sweep_of_the_name_of_a_finished_one_is_heard(runs: Runs, place: str) -> None:
    """As kubectl replace --force does: the next look finds the new one, and never that the old one was gone."""
    await runs.create(sweep("twice", numTrials=2, parallelTrials=2))
    old = await runs.run("twice")
    key = (place, "twice")
    assert key in runs.reconciler.finished
    await runs.cluster.delete(SWEEPS, place, "twice", old["metadata"]["uid"])
    await runs.create(sweep("twice", numTrials=3, parallelTrials=1))
    await runs.reconciler.reconcile(key)
    assert key not in runs.reconciler.finished, "events of its trials are dropped"


# ------------------------------------------------------------------------------------------------------ what changes ---
async def test_immutable_and_mutable(runs: Runs, place: str) -> None:
    await runs.create(sweep("fixed"))
    await runs.look("fixed")
    for spec, sentence in (
        ({"seed": 1}, "spec.seed is immutable: create a new HyperparameterSweep"),
        ({"parameters": sweep("fixed")["spec"]["parameters"][::-1]}, "spec.parameters is immutable"),
        ({"initialPoints": [{"lr": 1e-3}]}, "spec.initialPoints is immutable"),
        ({"objective": {"goal": 0.9}}, "spec.objective is immutable"),
        ({"trialTemplate": {"spec": {"hyperparameters": {"epochs": 9}}}}, "spec.trialTemplate is immutable"),
    ):
        with pytest.raises(Refused, match=sentence):
            await runs.cluster.patch(SWEEPS, place, "fixed", {"spec": spec})
    await runs.cluster.patch(SWEEPS, place, "fixed", {"spec": {"numTrials": 5, "parallelTrials": 1}})
    assert (await runs.run("fixed"))["status"]["trials"]["created"] == 5
    # Fewer than there are points, which would be refused at the start.
    await runs.create(sweep("fewer", initialPoints=[{"lr": rate} for rate in (1e-4, 1e-3, 2e-3)], parallelTrials=1))
    await runs.look("fewer")
    await runs.cluster.patch(SWEEPS, place, "fewer", {"spec": {"numTrials": 2}})
    fewer = (await runs.run("fewer"))["status"]
    assert (fewer["state"], fewer["trials"]["created"]) == ("Complete", 2)


async def test_suspend_and_resume(runs: Runs, place: str) -> None:
    await runs.create(sweep("pause"))
    await runs.look("pause")
    await runs.hand.advance("pause")
    await runs.cluster.patch(SWEEPS, place, "pause", {"spec": {"suspend": True}})
    await runs.look("pause")
    jobs = await runs.hand.jobs("pause")
    assert all(job["spec"]["suspend"] for job in jobs)
    assert len(jobs) == 3
    for job in jobs:  # as the reconciler of the jobs does
        await runs.hand.end(job, "Suspended", "Suspended")
        runs.reconciler.touch((place, "pause"), job["metadata"]["name"])
    await runs.look("pause")
    assert (await runs.cluster.get(SWEEPS, place, "pause"))["status"]["state"] == "Suspended"
    await runs.cluster.patch(SWEEPS, place, "pause", {"spec": {"suspend": False}})
    await runs.look("pause")
    assert not any(job["spec"].get("suspend") for job in await runs.hand.jobs("pause"))
    assert (await runs.run("pause"))["status"]["trials"]["created"] == 12


async def test_a_deleted_trial_is_counted_and_its_number_never_used_again(runs: Runs, place: str) -> None:
    await runs.create(sweep("gone"))
    await runs.look("gone")
    last = (await runs.hand.jobs("gone"))[-1]
    assert last["metadata"]["name"] == "gone-t0002"
    await runs.cluster.delete(JOBS, place, "gone-t0002", last["metadata"]["uid"])
    runs.reconciler.relist((place, "gone"))  # as the event of its deletion does
    found = await runs.run("gone")
    assert found["status"]["trials"]["deleted"] == 1
    names = [job["metadata"]["name"] for job in await runs.hand.jobs("gone")]
    assert "gone-t0002" not in names
    assert "gone-t0003" in names
    assert found["status"]["trials"]["created"] == 12


async def test_a_name_that_is_taken_is_told_and_waited_for(runs: Runs, place: str) -> None:
    foreign = {**sweep("x")["spec"]["trialTemplate"], "apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob"}
    foreign["metadata"] = {"name": "taken-t0000"}
    await runs.create(foreign, JOBS)
    await runs.create(sweep("taken"))
    await runs.look("taken")
    condition = (await runs.cluster.get(SWEEPS, place, "taken"))["status"]["conditions"][0]
    assert condition["reason"] == "CreateRefused"
    assert "not this sweep's" in condition["message"]
    theirs = await runs.cluster.get(JOBS, place, "taken-t0000")
    await runs.cluster.delete(JOBS, place, "taken-t0000", theirs["metadata"]["uid"])
    assert (await runs.run("taken"))["status"]["state"] == "Complete"


async def test_the_goal_ends_it_and_stops_what_runs(runs: Runs) -> None:
    objective = {"metric": METRIC, "direction": "Maximize", "goal": 0.3}
    await runs.create(sweep("goal", objective=objective, pruneAlgorithm={"none": {}}))
    found = await runs.run("goal")
    assert found["status"]["finished"] == "GoalReached"
    assert found["status"]["trials"]["stopped"] == 2
    assert found["status"]["trials"]["created"] == 3


async def test_the_budget_ends_it(runs: Runs) -> None:
    await runs.create(sweep("budget", budget={"gpuSeconds": 45}, pruneAlgorithm={"none": {}}, onComplete="LetFinish"))
    status = (await runs.run("budget"))["status"]
    assert status["finished"] == "BudgetSpent"
    assert 45 <= status["gpuSeconds"] <= 45 + 3 * 10
    assert status["trials"]["stopped"] == 0


async def test_warm_start_learns_from_another_sweep(runs: Runs) -> None:
    await runs.create(sweep("early", pruneAlgorithm={"none": {}}))
    await runs.create(sweep("warm", warmStartFrom={"name": "early"}, numTrials=4, seed=7))
    await runs.look("warm")
    waiting = await runs.cluster.get(SWEEPS, runs.namespace, "warm")
    assert waiting["status"]["conditions"][0]["reason"] == "WarmStartWaiting"
    await runs.run("early")
    await runs.run("warm")
    first = chosen((await runs.hand.jobs("warm"))[0])
    assert first is not None
    cold = sweep("cold", numTrials=4, seed=7)
    await runs.create(cold)
    await runs.look("cold")
    unlearned = chosen((await runs.hand.jobs("cold"))[0])
    assert unlearned is not None
    assert first.parameters != unlearned.parameters
    assert score(dict(first.parameters), 3) > score(dict(unlearned.parameters), 3)


async def test_promotion_repeats_the_best_and_the_best_mean_wins(runs: Runs) -> None:
    promote = {"storageUri": "s3://models/winner", "topK": 2, "seeds": 2}
    template = sweep("p")["spec"]["trialTemplate"]
    template["spec"]["dataset"]["test"] = "test.csv"
    await runs.create(sweep("best", promote=promote, numTrials=4, pruneAlgorithm={"none": {}}, trialTemplate=template))
    found = await runs.run("best")
    jobs = {job["metadata"]["name"]: job for job in await runs.hand.jobs("best")}
    repeats = {name: job for name, job in jobs.items() if "-r0" in name}
    top = [row["trial"] for row in found["status"]["top"][:2]]
    assert sorted(repeats) == sorted(f"{name.replace('-t', '-r')}{letter}" for name in top for letter in "ab")
    assert {job["spec"]["hyperparameters"]["seed"] for job in repeats.values()} == {43, 44}
    assert all("test" not in job["spec"]["dataset"] for job in jobs.values())
    assert [row["trial"] for row in found["status"]["repetitions"]] == top
    assert all(len(row["values"]) == 3 and row["mean"] for row in found["status"]["repetitions"])
    closing = await runs.cluster.get(CHILDREN, runs.namespace, "best-closing")
    env = {v["name"]: v.get("value", "") for v in closing["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert '"test":"test.csv"' in env["FINETUNE_JOB"]
    assert '"storageUri":"s3://models/winner"' in env["FINETUNE_JOB"]
    assert env["FINETUNE_SWEEP_WINNER"].startswith("s3://models/best/best-") or env["FINETUNE_SWEEP_WINNER"].startswith(
        "s3://models/best-"
    )


async def test_the_ttl_deletes_the_sweep(runs: Runs, place: str) -> None:
    await runs.create(sweep("brief", numTrials=1, ttlSecondsAfterFinished=2))
    await runs.run("brief")
    await runs.reconciler.reconcile((place, "brief"))
    assert len([s async for s in runs.cluster.list(SWEEPS, place)]) == 1
    await asyncio.sleep(2.5)
    await runs.reconciler.reconcile((place, "brief"))
    assert [s async for s in runs.cluster.list(SWEEPS, place)] == []


async def test_somebody_elses_sweep_is_left_alone(runs: Runs, place: str) -> None:
    await runs.create(sweep("theirs", managedBy="example.com/other"))
    await runs.look("theirs")
    assert "status" not in await runs.cluster.get(SWEEPS, place, "theirs")
    assert await runs.hand.jobs("theirs") == []
