"""The reconcile: observe (live reads) -> decide (pure) -> apply (idempotent) -> one status write.

The loop around it is in loop.py.
"""

import asyncio
import logging
import time
from dataclasses import replace
from datetime import UTC, datetime

from finetune_api import names
from finetune_operator.control.events import tell
from finetune_operator.control.loop import Key, KeyLoop
from finetune_operator.control.queue import WorkQueue
from finetune_operator.domain.child import child_name, owned_by
from finetune_operator.domain.decide import KILL_SECONDS, decide
from finetune_operator.domain.outcome import true_condition
from finetune_operator.domain.status import find_condition, is_finished, is_true, only_progress_differs, unsaved_since
from finetune_operator.domain.types import CreateJob, Decision, DeleteJob, EndPod, Event, Object, Observed, Progress, Settings
from finetune_operator.kube import port
from finetune_operator.kube.port import CHILDREN, JOBS, PODS, SERVICES, Cluster, Resource, merge_patch
from finetune_operator.observe.metrics import Metrics

log = logging.getLogger(__name__)

PROGRESS_WRITE_SECONDS = 10.0


class Reconciler(KeyLoop):
    """Of FineTuneJobs."""

    kind = names.KIND_JOB

    def __init__(self, cluster: Cluster, settings: Settings, queue: WorkQueue[Key], metrics: Metrics) -> None:
        super().__init__(queue, metrics, metrics.reconcile_seconds)
        self.cluster = cluster
        self.settings = settings
        self.progress: dict[Key, Progress] = {}
        """Newest report per resource, filled by the progress server."""
        self.unwritten: set[Key] = set()
        """Resources whose newest report is not in their status yet."""
        self._written: dict[Key, float] = {}
        self._uids: dict[Key, str] = {}
        """Which object a key stood for when it was last read: what is remembered is of that one."""

    async def reconcile(self, key: Key) -> None:
        """Once. Raises ApiError."""
        try:
            job = await self.cluster.get(JOBS, *key)
        except port.NotFound:
            self.forget(key)
            return
        uid = job["metadata"]["uid"]
        if self._uids.get(key, uid) != uid:
            self.forget(key)  # deleted and made anew between two looks
        self._uids[key] = uid
        observed = await self.observe(job)
        decision = decide(observed, datetime.now(UTC), self.settings)
        decision = await self._apply(job, observed, decision)
        if await self._write(key, job, decision) and self.progress.get(key) is observed.progress:
            self.unwritten.discard(key)

    async def flush(self) -> None:
        """Writes down the reports that still wait for their turn: trainers were told that they were taken, and whoever leads next does not
        have them. After the workers have ended."""
        self._written.clear()
        async with asyncio.TaskGroup() as group:
            for key in self.unwritten.copy():
                group.create_task(self._one(key))

    def known(self) -> set[Key]:
        """Everything that is remembered."""
        return {*self._uids}

    def uid(self, key: Key) -> str | None:
        """Of the resource, as last read."""
        return self._uids.get(key)

    def forget(self, key: Key) -> None:
        """The resource is gone."""
        self.progress.pop(key, None)
        self.unwritten.discard(key)
        self._written.pop(key, None)
        self.finished.discard(key)
        self._uids.pop(key, None)
        self.metrics.saw(*key, None)
        self.metrics.forget(*key)

    # ----------------------------------------------------------------------------------------------------- observe -----
    async def observe(self, job: Object) -> Observed:
        """Reads what belongs to the resource. A finished one costs nothing more."""
        status = job.get("status") or {}
        if is_finished(status):
            return Observed(job=job)
        namespace, name = job["metadata"]["namespace"], job["metadata"]["name"]
        attempt = int(status.get("attempt") or 0)
        child = await self._child(namespace, child_name(name, attempt)) if attempt else None
        over = child is None or true_condition(child, "Complete") or true_condition(child, "Failed")
        following = await self._child(namespace, child_name(name, attempt + 1)) if over else None
        # Before the first attempt too: a job of the same name that was deleted may have pods that still save.
        pods = tuple([pod async for pod in self.cluster.list(PODS, namespace, f"{names.LABEL_JOB}={name}")])
        return Observed(job=job, child=child, next_child=following, pods=pods, progress=self.progress.get((namespace, name)))

    async def _child(self, namespace: str, name: str) -> Object | None:
        try:
            child = await self.cluster.get(CHILDREN, namespace, name)
        except port.NotFound:
            return None
        # A child that is being deleted is as good as gone: its pods are what counts.
        return None if child["metadata"].get("deletionTimestamp") else child

    # ------------------------------------------------------------------------------------------------------- apply -----
    async def _apply(self, job: Object, observed: Observed, decision: Decision) -> Decision:
        for action in decision.actions:
            if isinstance(action, CreateJob):
                try:
                    await self._create(job, action)
                except port.Refused as error:
                    refused = decide(replace(observed, create_error=error.message), datetime.now(UTC), self.settings)
                    return await self._apply(job, observed, refused)
            elif isinstance(action, DeleteJob):
                await self._delete(job, action)
            elif isinstance(action, EndPod):
                await self._end_pod(job, action)
            else:
                await self._tell(job, action)
        return decision

    async def _create(self, job: Object, action: CreateJob) -> None:
        if action.service is not None:
            await self._create_one(job, SERVICES, action.service)
        await self._create_one(job, CHILDREN, action.manifest)

    async def _create_one(self, job: Object, resource: Resource, manifest: Object) -> None:
        namespace, kind, name = job["metadata"]["namespace"], manifest["kind"], manifest["metadata"]["name"]
        try:
            await self.cluster.create(resource, namespace, manifest)
            log.info("%s/%s: created %s %s", namespace, job["metadata"]["name"], kind, name)
        except port.AlreadyExists as error:
            existing = await self.cluster.get(resource, namespace, name)
            if not owned_by(existing, job["metadata"]["uid"]):
                if resource is SERVICES:  # told like anything else that the API server refuses
                    raise port.Refused(409, "NameConflict", f"a Service {name} that is not this job's is in the way") from error
                raise port.Conflict(409, "NameConflict", f"{kind} {name} belongs to somebody else") from error

    async def _delete(self, job: Object, action: DeleteJob) -> None:
        namespace = job["metadata"]["namespace"]
        try:
            await self.cluster.delete(CHILDREN, namespace, action.name, action.uid)
            log.info("%s/%s: deleted Job %s", namespace, job["metadata"]["name"], action.name)
        except (port.NotFound, port.Conflict):
            pass  # gone, or another one by now: either way ours is no more

    async def _end_pod(self, job: Object, action: EndPod) -> None:
        namespace = job["metadata"]["namespace"]
        try:
            await self.cluster.delete(PODS, namespace, action.name, action.uid, grace=KILL_SECONDS)
            log.info("%s/%s: ended pod %s without a save", namespace, job["metadata"]["name"], action.name)
        except (port.NotFound, port.Conflict):
            pass  # gone already

    async def _tell(self, job: Object, event: Event) -> None:
        await tell(self.cluster, self.metrics, job, event)

    # ------------------------------------------------------------------------------------------------------- write -----
    async def _write(self, key: Key, job: Object, decision: Decision) -> bool:
        """Whether the status is what was decided; else it waits for its turn."""
        old = job.get("status") or {}
        new = decision.status
        self.metrics.saw(*key, new.get("state") or "Unknown")
        self.metrics.unsaved(*key, unsaved_since(new))
        execution = f"{job['metadata']['uid']}/{new.get('attempt')}"
        if new.get("attempt") != old.get("attempt"):
            self.metrics.began(*key, execution)
        if decision.saving:
            self.metrics.saved(*key, execution, decision.saving)
        written = True
        if new != old:
            wait = self._written.get(key, 0.0) + PROGRESS_WRITE_SECONDS - time.monotonic()
            if wait > 0 and only_progress_differs(old, new):
                self.queue.add_after(key, wait)
                written = False
            else:
                patch = {"metadata": {"resourceVersion": job["metadata"]["resourceVersion"]}, "status": merge_patch(old, new)}
                try:
                    await self.cluster.patch(JOBS, *key, patch, subresource="status")
                except port.NotFound:
                    self.forget(key)
                    return True
                self._written[key] = time.monotonic()
                self.metrics.status_writes.inc()
                self._count(key, old, new)
        if decision.finished:
            self.finished.add(key)
            self.metrics.forget(*key)
            self.progress.pop(key, None)
            self._written.pop(key, None)
        elif decision.requeue_after is not None:
            self.queue.add_after(key, decision.requeue_after)
        return written

    def _count(self, key: Key, old: Object, new: Object) -> None:
        if more := int(new.get("restarts") or 0) - int(old.get("restarts") or 0):
            self.metrics.restarts.labels(key[0]).inc(max(0, more))
        if lost := int(new.get("lostWorkSeconds") or 0) - int(old.get("lostWorkSeconds") or 0):
            self.metrics.lost_work.labels(key[0]).inc(max(0, lost))
        if is_finished(new) and not is_finished(old):
            outcome = "Complete" if is_true(new, "Complete") else "Failed"
            reason = (find_condition(new, outcome) or {}).get("reason", "")
            self.metrics.finished.labels(key[0], outcome, reason).inc()
            log.info("%s/%s: %s (%s)", *key, outcome, reason)
