"""A small world for the tests of the reconcile decision: a resource, its Jobs and pods, an operator that may die between actions."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_api import FineTuneJobStatus
from finetune_api.failures import BY_REASON
from finetune_operator.domain.decide import decide
from finetune_operator.domain.status import find_condition
from finetune_operator.domain.types import CreateJob, Decision, DeleteJob, EndPod, Observed, Progress, Settings

SETTINGS = Settings(
    trainer_image="trainer:1", progress_url="https://progress:8443", progress_ca="PEM", restart_backoff_seconds=10
)
T0 = datetime(2026, 1, 1, tzinfo=UTC)


def stamp(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


class World:
    """What the API server would hold, and one reconcile at a time."""

    def __init__(self, **spec: Any) -> None:
        self.now = T0
        self.uid = 0
        self.created: list[str] = []
        self.children: dict[str, dict[str, Any]] = {}
        self.pods: dict[str, dict[str, Any]] = {}
        self.progress: Progress | None = None
        self.create_error: str | None = None
        self.job: dict[str, Any] = {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": "ft", "namespace": "ns", "uid": "u0", "generation": 1, "labels": {}},
            "spec": {
                "task": "SequenceClassification",
                "model": {"uri": "hf://a/b"},
                "dataset": {"uri": "s3://data/x", "labels": ["a", "b"]},
                "output": {"storageUri": "s3://out/x"},
                **spec,
            },
        }

    @property
    def status(self) -> dict[str, Any]:
        return self.job.get("status") or {}

    def condition(self, kind: str) -> dict[str, Any]:
        found = find_condition(self.status, kind)
        assert found is not None
        return found

    def look(self) -> Decision:
        attempt = self.status.get("attempt") or 0
        child = self.children.get(f"ft-{attempt}")
        finished = child is None or bool(child["status"].get("conditions"))
        return decide(
            Observed(
                job=self.job,
                child=child,
                next_child=self.children.get(f"ft-{attempt + 1}") if finished else None,
                pods=tuple(self.pods.values()),
                progress=self.progress,
                create_error=self.create_error,
            ),
            self.now,
            SETTINGS,
        )

    def reconcile(self, *, die_before_status: bool = False) -> Decision:
        decision = self.look()
        for action in decision.actions:
            if isinstance(action, CreateJob):
                self.create(action.manifest)
            if isinstance(action, DeleteJob):
                self.delete(action.name)
            if isinstance(action, EndPod):
                self.end_pod(action.uid)
        if not die_before_status:
            FineTuneJobStatus.model_validate(decision.status)
            self.job["status"] = json.loads(json.dumps(decision.status))
        return decision

    def create(self, manifest: dict[str, Any]) -> None:
        name = manifest["metadata"]["name"]
        if name in self.children:
            return
        assert not [p for p in self.pods.values() if self.alive(p)], "an older pod still runs"
        self.created.append(name)
        self.uid += 1
        self.children[name] = {**manifest, "metadata": {**manifest["metadata"], "uid": f"j{self.uid}"}, "status": {}}
        for index in range(manifest["spec"]["completions"]):
            key = f"{name}/{index}" if index else name
            self.pods[key] = self.pod(
                key, f"p{self.uid}", {"kind": "Job", "name": name, "uid": f"j{self.uid}", "controller": True}
            )

    def pod(self, name: str, uid: str, *owners: dict[str, Any]) -> dict[str, Any]:
        meta = {"name": f"{name}-x", "uid": uid, "creationTimestamp": stamp(self.now), "ownerReferences": [*owners]}
        return {"metadata": meta, "status": {"phase": "Pending"}}

    def alive(self, pod: dict[str, Any]) -> bool:
        """Its process may be running, and nobody has given its node up."""
        ends = pod["metadata"].get("deletionTimestamp")
        lost = ends is not None and self.now > datetime.fromisoformat(ends) + timedelta(seconds=60)
        return pod["status"]["phase"] in ("Pending", "Running") and not lost

    def delete(self, name: str) -> None:
        if self.children.pop(name, None):
            for key, pod in self.pods.items():
                if key.partition("/")[0] == name:
                    pod["metadata"].setdefault("deletionTimestamp", stamp(self.now + timedelta(seconds=60)))
                    pod["metadata"].setdefault("deletionGracePeriodSeconds", 60)

    def end_pod(self, uid: str) -> None:
        for pod in self.pods.values():
            if pod["metadata"]["uid"] == uid:
                end = stamp(self.now + timedelta(seconds=1))
                pod["metadata"] |= {"deletionTimestamp": end, "deletionGracePeriodSeconds": 1}

    def lose(self, name: str) -> None:
        """The pod's node dies; its deletion was asked for, and nobody is left to carry it out."""
        self.pods[name]["metadata"].setdefault("deletionTimestamp", stamp(self.now))

    def gone(self) -> None:
        """What was asked to end has ended; a Job that loses a pod so has failed."""
        for key in [key for key, pod in self.pods.items() if "deletionTimestamp" in pod["metadata"]]:
            del self.pods[key]
            if child := self.children.get(key.partition("/")[0]):
                child["status"].setdefault("conditions", [self.now_true("Failed")])

    def now_true(self, kind: str) -> dict[str, Any]:
        return {"type": kind, "status": "True", "lastTransitionTime": stamp(self.now)}

    def run(self, name: str) -> None:
        self.pods[name]["status"] = {
            "phase": "Running",
            "containerStatuses": [{"name": "trainer", "state": {"running": {"startedAt": stamp(self.now)}}}],
        }

    def end(self, name: str, code: int, message: str = "", reason: str = "Error", **pod_status: Any) -> None:
        begun = self.pods[name]["status"].get("containerStatuses", [{}])[0].get("state", {}).get("running", {}).get("startedAt")
        state = {"exitCode": code, "reason": reason, "message": message, "startedAt": begun, "finishedAt": stamp(self.now)}
        self.pods[name]["status"] = {
            "phase": "Failed" if code else "Succeeded",
            "containerStatuses": [{"name": "trainer", "state": {"terminated": state}}],
            **pod_status,
        }
        if name in self.children:
            self.children[name]["status"] = {"conditions": [self.now_true("Failed" if code else "Complete")]}

    def fail(self, name: str, reason: str, message: str = "because") -> None:
        report = {"outcome": "Failed", "reason": reason, "message": message}
        self.end(name, BY_REASON[reason].exit_code or 1, json.dumps(report))

    def wait(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def running(**spec: Any) -> World:
    world = World(**spec)
    world.reconcile()
    world.run("ft-1")
    world.reconcile()
    return world


def disrupt(world: World, step: int | None = None) -> None:
    """The newest attempt runs and is preempted, after it has saved this step; then all is done that follows."""
    name = world.created[-1]
    world.run(name)
    world.reconcile()
    world.wait(600)
    saved = {"step": step, "uri": f"s3://c/{step}", "time": stamp(world.now), "sizeBytes": 1}
    report = {"outcome": "Interrupted", "reason": "Interrupted", "message": "m"} | ({"checkpoint": saved} if step else {})
    preempted = {"conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}]}
    world.end(name, 20, json.dumps(report), **preempted)
    world.reconcile()
    world.wait(300)
    world.reconcile()
