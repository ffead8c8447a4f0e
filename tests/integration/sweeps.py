"""A sweep whose trials are played: the FineTuneJobs are real objects of a real API server, and their status is written from a script.

`Hand` stands where the reconciler of FineTuneJobs stands; what it writes is what that would write. One event at a time, so that what a sweep
decides on is the same in every run (the gate), however often its own reconciler dies.
"""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

from finetune_operator.control.loop import Key
from finetune_operator.control.queue import WorkQueue
from finetune_operator.control.sweeps import SweepReconciler
from finetune_operator.domain.status import is_finished
from finetune_operator.domain.trials import chosen, judgements
from finetune_operator.domain.types import Settings
from finetune_operator.kube.aio import AioCluster
from finetune_operator.kube.port import CHILDREN, JOBS, PODS, SWEEPS, AlreadyExists, Cluster, Conflict, Resource, Unavailable
from finetune_operator.observe.metrics import Metrics

Object = dict[str, Any]
METRIC = "validation/macro_f1"
SETTINGS = Settings(trainer_image="trainer:test", progress_url="https://127.0.0.1:1", progress_ca="none")


def sweep(name: str, **spec: Any) -> Object:
    """A HyperparameterSweep that is right; `spec` replaces fields."""
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "HyperparameterSweep",
        "metadata": {"name": name},
        "spec": {
            "objective": {"metric": METRIC, "direction": "Maximize"},
            "parameters": [
                {
                    "name": "lr",
                    "path": "hyperparameters.learningRate",
                    "searchSpace": {"logUniform": {"min": 1e-5, "max": 1e-2}},
                },
                {
                    "name": "batch",
                    "path": "hyperparameters.batchSize",
                    "searchSpace": {"categorical": {"values": [8, 16, 32]}},
                },
            ],
            "searchAlgorithm": {"tpe": {"startupTrials": 4}},
            "pruneAlgorithm": {"asha": {"minExamples": 100, "reductionFactor": 2, "maxRungs": 3}},
            "numTrials": 12,
            "parallelTrials": 3,
            "trialTemplate": {
                "spec": {
                    "task": "SequenceClassification",
                    "model": {"uri": "hf://sentence-transformers/all-MiniLM-L6-v2"},
                    "dataset": {"uri": "s3://data/feedback", "labels": ["negative", "neutral", "positive"]},
                    "output": {"storageUri": f"s3://models/{name}"},
                }
            },
            **spec,
        },
    }


class Killed(BaseException):
    """The operator's process is gone, in the middle of what it did."""


class Dying:
    """The API server as it is, for a process that dies at call `at` (from 0), before it is made or after it was answered."""

    def __init__(self, cluster: Cluster, at: int | None = None, *, after: bool = False) -> None:
        self.cluster, self.at, self.after, self.count, self.writes = cluster, at, after, 0, 0

    async def _call(self, do: Callable[[], Any], *, writes: bool = False) -> Any:
        mine, self.count = self.count == self.at, self.count + 1
        if mine and not self.after:
            raise Killed
        result = await do()
        self.writes += writes
        if mine:
            raise Killed
        return result

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.cluster, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            return await self._call(lambda: found(*args, **kwargs), writes=name in ("create", "patch", "delete"))

        return call

    async def list(self, *args: Any, **kwargs: Any) -> AsyncIterator[Object]:
        async def all_items() -> "list[Object]":
            return [item async for item in self.cluster.list(*args, **kwargs)]

        for item in await self._call(all_items):
            yield item


class DyingWhenClosing(Dying):
    """Dies after it has made the Job that ends the sweep, before it can write that it did."""

    async def create(self, resource: Resource, namespace: str, manifest: Object) -> Object:
        made = await self.cluster.create(resource, namespace, manifest)
        if resource is CHILDREN:
            raise Killed
        return made


Score = Callable[[Object, int], float]
"""Value of a trial with these parameters after so many of its evaluations (from 0)."""


class Faulty(Dying):
    """An API server as on a bad day: calls that are not answered, answers that are lost, and a process that dies in between."""

    def __init__(self, cluster: Cluster, chance: random.Random) -> None:
        super().__init__(cluster)
        self.chance = chance

    async def _call(self, do: Callable[[], Any], *, writes: bool = False) -> Any:
        fate = self.chance.random()
        if fate < 0.02:
            raise Unavailable(503, "ServiceUnavailable", "on purpose, before")
        result = await super()._call(do, writes=writes)
        if fate > 0.98:
            raise Unavailable(0, "NoAnswer", "on purpose, after")
        if fate > 0.965:
            raise Killed
        return result


class Hand:
    """Plays the trials of one sweep."""

    def __init__(self, cluster: Cluster, namespace: str, score: Score, rungs: tuple[int, ...] = (100, 200, 400)) -> None:
        self.cluster, self.namespace, self.score, self.rungs = cluster, namespace, score, rungs
        self.touched = ""
        """The trial that something happened to last."""
        self.ends: dict[int, str] = {}
        """Trials that fail at their first evaluation, with the failure class."""

    async def jobs(self, name: str) -> list[Object]:
        found = [j async for j in self.cluster.list(JOBS, self.namespace, f"finetune.dev/sweep={name}")]
        return sorted(found, key=lambda job: job["metadata"]["name"])

    async def advance(self, name: str) -> bool:
        """One event of the trial that has come least far; False where nothing can happen."""
        open_jobs = [job for job in await self.jobs(name) if not is_finished(job.get("status") or {})]
        for job in open_jobs:
            if job["spec"].get("stop"):
                await self.end(job, "Complete", "Stopped")
                return True
        movable = [job for job in open_jobs if not job["spec"].get("suspend")]
        if not movable:
            return await self._close(name)
        job = min(movable, key=lambda j: (len((j.get("status") or {}).get("evaluations") or []), j["metadata"]["name"]))
        await self.step(job)
        return True

    async def step(self, job: Object) -> None:
        """The next evaluation, or the end."""
        said = json.loads(job["metadata"]["annotations"]["finetune.dev/trial"])
        index, parameters = (-1 if "seed" in said else said["index"]), said["parameters"]
        told = (job.get("status") or {}).get("evaluations") or []
        if index in self.ends:
            await self.end(job, "Failed", self.ends[index])
        elif len(told) < len(self.rungs):
            value = self.score(parameters, len(told))
            metrics = [{"name": METRIC, "value": repr(value)}]
            told = [*told, {"examples": self.rungs[len(told)], "step": len(told) + 1, "metrics": metrics}]
            await self.status(job, {"state": "Running", "evaluations": told, "attempt": 1})
        else:
            value = self.score(parameters, len(told))
            result = {
                "modelUri": f"s3://models/{job['metadata']['name']}/model",
                "metrics": [{"name": METRIC, "value": repr(value)}],
            }
            await self.end(job, "Complete", "Trained", result=result)

    async def end(self, job: Object, kind: str, reason: str, **more: Any) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        condition = {"type": kind, "status": "True", "reason": reason, "message": "", "lastTransitionTime": now}
        await self.status(
            job, {"state": kind, "conditions": [condition], "activeSeconds": 10, "gpuSeconds": 10, "completionTime": now, **more}
        )

    async def status(self, job: Object, status: Object) -> None:
        self.touched = job["metadata"]["name"]
        await self.cluster.patch(JOBS, self.namespace, job["metadata"]["name"], {"status": status}, subresource="status")

    async def _close(self, name: str) -> bool:
        """The closing Job's pod ends well, if there is one; the Job's own controller sees to the rest."""
        for pod in [p async for p in self.cluster.list(PODS, self.namespace, f"finetune.dev/sweep={name}")]:
            if pod["status"].get("phase") == "Pending":
                done = {"exitCode": 0, "message": json.dumps({"outcome": "Complete"}), "startedAt": now(), "finishedAt": now()}
                container = {
                    "name": "trainer",
                    "ready": False,
                    "restartCount": 0,
                    "image": "",
                    "imageID": "",
                    "state": {"terminated": done},
                }
                status = {"phase": "Succeeded", "containerStatuses": [container]}
                await self.cluster.patch(PODS, self.namespace, pod["metadata"]["name"], {"status": status}, subresource="status")
                return True
        return False


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Runs:
    """Reconciles a sweep to its end, killed where it is wanted."""

    def __init__(self, cluster: AioCluster, namespace: str, hand: Hand) -> None:
        self.cluster, self.namespace, self.hand = cluster, namespace, hand
        self.calls = 0
        self.reconciler = self.fresh(None)

    def fresh(self, at: int | None, *, after: bool = False) -> SweepReconciler:
        """A reconciler that knows nothing, as after a start."""
        self.dying = Dying(self.cluster, at, after=after)
        metrics = Metrics()
        self.reconciler = SweepReconciler(self.dying, SETTINGS, WorkQueue(metrics), metrics)  # type: ignore[arg-type]
        return self.reconciler

    async def look(self, name: str) -> None:
        """Until nothing is left to do; a kill is followed by a start."""
        key: Key = (self.namespace, name)
        for _ in range(12):
            self.dying.writes = 0
            try:
                self.reconciler.touch(key, self.hand.touched)
                await self.reconciler.reconcile(key)
            except Killed:
                self.calls += self.dying.count
                self.fresh(None)
                continue
            except (Conflict, AlreadyExists):
                self.reconciler.relist(key)
                continue
            if not self.dying.writes:
                return
        raise AssertionError("it does not come to rest")

    async def run(self, name: str, limit: int = 400) -> Object:
        """To its end; the sweep."""
        for _ in range(limit):
            await self.look(name)
            found = await self.cluster.get(SWEEPS, self.namespace, name)
            if is_finished(found.get("status") or {}):
                return found
            if not await self.hand.advance(name):
                await asyncio.sleep(0.05)
        raise AssertionError(f"not finished: {found['status']}")

    async def create(self, manifest: Object, resource: Resource = SWEEPS) -> Object:
        return await self.cluster.create(resource, self.namespace, manifest)


def decisions(jobs: list[Object]) -> list[Any]:
    """All that was decided, of all trials: parameters, who chose them, what was known; verdicts, and what was known."""
    return [
        (job["metadata"]["name"], chosen(job), judgements(job), bool(job["spec"].get("stop")), job["spec"]["hyperparameters"])
        for job in jobs
    ]
