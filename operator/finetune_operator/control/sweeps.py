"""The reconcile of sweeps: observe -> decide (pure, in a thread: a suggestion takes up to half a second) -> apply -> one status write.

Ended trials are remembered and rebuilt by one LIST after a start. Those that are open are read live: after an event about them, and all of
them every READ_ALL_SECONDS. A reading that comes late is no harm: each decision records what it knew.
"""

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from finetune_api import names
from finetune_operator.control.events import tell
from finetune_operator.control.loop import Key, KeyLoop
from finetune_operator.control.queue import WorkQueue
from finetune_operator.domain.child import owned_by
from finetune_operator.domain.closing import closing_name
from finetune_operator.domain.status import find_condition, is_finished, is_true
from finetune_operator.domain.sweep import decide_sweep
from finetune_operator.domain.sweep_types import CreateTrial, DeleteSweep, PatchTrial, SweepDecision, SweepObserved
from finetune_operator.domain.trials import ROLE_REPEAT, chosen
from finetune_operator.domain.types import CreateJob, Event, Object, Settings
from finetune_operator.kube import port
from finetune_operator.kube.port import CHILDREN, JOBS, PODS, SWEEPS, Cluster, Resource, merge_patch
from finetune_operator.observe.metrics import Metrics

log = logging.getLogger(__name__)

READ_ALL_SECONDS = 30.0


@dataclass
class Known:
    """What is remembered of one sweep: its jobs as last read."""

    uid: str
    jobs: dict[str, Object] = field(default_factory=dict)
    """FineTuneJobs by name."""
    touched: set[str] = field(default_factory=set)
    """Those that an event was about since they were read."""
    read: float = field(default_factory=time.monotonic)
    """When all that are open were read."""
    warm: list[Object] | None = None
    """Trials of the sweep that it starts warm from."""


class SweepReconciler(KeyLoop):
    """Of HyperparameterSweeps."""

    kind = names.KIND_SWEEP

    def __init__(self, cluster: Cluster, settings: Settings, queue: WorkQueue[Key], metrics: Metrics) -> None:
        super().__init__(queue, metrics, metrics.sweep_reconcile_seconds)
        self.cluster, self.settings = cluster, settings
        self._known: dict[Key, Known] = {}

    def outdated(self, key: Key) -> None:
        self.relist(key)

    async def reconcile(self, key: Key) -> None:
        """Once. Raises ApiError."""
        try:
            sweep = await self.cluster.get(SWEEPS, *key)
        except port.NotFound:
            self.forget(key)
            return
        if not is_finished(sweep.get("status") or {}):
            self.finished.discard(key)  # another one of that name had ended
        observed = await self.observe(key, sweep)
        decision = await asyncio.to_thread(decide_sweep, observed, datetime.now(UTC), self.settings)
        decision = await self._apply(key, observed, decision)
        await self._write(key, sweep, decision)

    def known(self) -> set[Key]:
        """Everything that is remembered."""
        return {*self._known, *self.finished}

    def forget(self, key: Key) -> None:
        """The sweep is gone."""
        self._known.pop(key, None)
        self.finished.discard(key)
        self.metrics.saw_sweep(*key, None)

    def touch(self, key: Key, name: str) -> None:
        """Something happened to one of its jobs."""
        if known := self._known.get(key):
            known.touched.add(name)
        if key not in self.finished:
            self.queue.add(key)

    def relist(self, key: Key) -> None:
        """Remembers nothing of the sweep's jobs: the next look lists them."""
        self._known.pop(key, None)

    # ----------------------------------------------------------------------------------------------------- observe -----
    async def observe(self, key: Key, sweep: Object) -> SweepObserved:
        """Reads what belongs to the sweep. A finished one costs nothing more."""
        if is_finished(sweep.get("status") or {}):
            return SweepObserved(sweep)
        namespace, name = key
        jobs = await self._jobs(key, sweep)
        by_number: dict[int, Object] = {}
        repeats: dict[str, Object] = {}
        for job in jobs.values():
            said = chosen(job)
            if job["metadata"]["labels"].get(names.LABEL_ROLE) == ROLE_REPEAT:
                repeats[job["metadata"]["name"]] = job
            elif said is not None:
                by_number[said.index] = job
        observed = SweepObserved(sweep, by_number, repeats)
        if warm := (sweep["spec"].get("warmStartFrom") or {}).get("name"):
            observed = await self._with_warm_start(observed, namespace, warm)
        if (sweep.get("status") or {}).get("finished"):
            closing = await self._get(CHILDREN, namespace, closing_name(name))
            if closing is not None and owned_by(closing, sweep["metadata"]["uid"]):
                pods = [p async for p in self.cluster.list(PODS, namespace, f"{names.LABEL_SWEEP}={name}")]
                observed = replace(observed, closing=closing, closing_pods=pods)
        return observed

    async def _jobs(self, key: Key, sweep: Object) -> dict[str, Object]:
        uid = sweep["metadata"]["uid"]
        known = self._known.get(key)
        if known is None or known.uid != uid:
            known = self._known[key] = Known(uid)  # first: what happens while they are listed is newer
            known.jobs |= await self._listed(key, uid)
            return known.jobs
        if time.monotonic() - known.read > READ_ALL_SECONDS:
            known.touched, known.read = set(known.jobs), time.monotonic()
        names_of_open = [name for name, job in known.jobs.items() if not is_finished(job.get("status") or {})]
        for name in known.touched.intersection(names_of_open):
            known.touched.discard(name)  # first: an event that comes while it is read is about something newer
            fresh = await self._get(JOBS, key[0], name)
            if fresh is None or not owned_by(fresh, uid):
                del known.jobs[name]
            else:
                known.jobs[name] = fresh
        return known.jobs

    async def _listed(self, key: Key, uid: str) -> dict[str, Object]:
        selector = f"{names.LABEL_SWEEP}={key[1]}"
        return {job["metadata"]["name"]: job async for job in self.cluster.list(JOBS, key[0], selector) if owned_by(job, uid)}

    async def _with_warm_start(self, observed: SweepObserved, namespace: str, name: str) -> SweepObserved:
        warm = await self._get(SWEEPS, namespace, name)
        if warm is None or not is_finished(warm.get("status") or {}):
            return replace(observed, warm=warm)
        known = self._known.get((namespace, observed.sweep["metadata"]["name"])) or Known("")
        if known.warm is None:
            known.warm = list((await self._listed((namespace, name), warm["metadata"]["uid"])).values())
        return replace(observed, warm=warm, warm_trials=known.warm)

    async def _get(self, resource: Resource, namespace: str, name: str) -> Object | None:
        try:
            return await self.cluster.get(resource, namespace, name)
        except port.NotFound:
            return None

    # ------------------------------------------------------------------------------------------------------- apply -----
    async def _apply(self, key: Key, observed: SweepObserved, decision: SweepDecision) -> SweepDecision:
        for action in decision.actions:
            if isinstance(action, CreateTrial | CreateJob):
                resource = JOBS if isinstance(action, CreateTrial) else CHILDREN
                try:
                    await self._create(key, observed.sweep, resource, action.manifest)
                except port.Refused as error:
                    # What came before it stands, and is seen by the next look; the status says what is in the way.
                    said = f"The API server refused {action.manifest['metadata']['name']}: {error.message}"
                    fresh = replace(await self.observe(key, observed.sweep), refused=said)
                    return await self._apply_refused(key, fresh)
            elif isinstance(action, PatchTrial):
                await self._patch(key, action)
            elif isinstance(action, DeleteSweep):
                await self._delete(key, action)
            else:
                await self._tell(observed.sweep, action)
        return decision

    async def _apply_refused(self, key: Key, observed: SweepObserved) -> SweepDecision:
        decision = await asyncio.to_thread(decide_sweep, observed, datetime.now(UTC), self.settings)
        await self._tell(observed.sweep, Event("Warning", "CreateRefused", str(observed.refused)))
        return await self._apply(key, observed, decision)

    async def _create(self, key: Key, sweep: Object, resource: Resource, manifest: Object) -> None:
        namespace, name = key[0], manifest["metadata"]["name"]
        try:
            made = await self.cluster.create(resource, namespace, manifest)
        except port.AlreadyExists as error:
            existing = await self.cluster.get(resource, namespace, name)
            if not owned_by(existing, sweep["metadata"]["uid"]):
                raise port.Refused(
                    409, "NameConflict", f"a {manifest['kind']} of that name exists that is not this sweep's"
                ) from error
            # Made by an operator that died before it could say so.
            if resource is CHILDREN:
                return  # what ends the sweep: the status that this look writes leads to it
            raise  # a trial: its parameters win; what comes after it is decided anew
        log.info("sweep %s/%s: created %s %s", *key, manifest["kind"], name)
        if resource is JOBS:
            self._keep(key, made)

    async def _patch(self, key: Key, action: PatchTrial) -> None:
        try:
            # With the uid in it the patch is refused where another object has the name by now.
            body = {**action.patch, "metadata": {**action.patch.get("metadata", {}), "uid": action.uid}}
            self._keep(key, await self.cluster.patch(JOBS, key[0], action.name, body))
            log.info("sweep %s/%s: %s: %s", *key, action.name, ", ".join(sorted(action.patch)))
        except port.NotFound:
            self.relist(key)

    def _keep(self, key: Key, job: Object) -> None:
        if known := self._known.get(key):  # else it was told to read all anew meanwhile
            known.jobs[job["metadata"]["name"]] = job

    async def _delete(self, key: Key, action: DeleteSweep) -> None:
        with contextlib.suppress(port.NotFound, port.Conflict):  # gone, or another one by now
            await self.cluster.delete(SWEEPS, key[0], action.name, action.uid)

    async def _tell(self, sweep: Object, event: Event) -> None:
        await tell(self.cluster, self.metrics, sweep, event)

    # ------------------------------------------------------------------------------------------------------- write -----
    async def _write(self, key: Key, sweep: Object, decision: SweepDecision) -> None:
        old, new = sweep.get("status") or {}, decision.status
        self.metrics.saw_sweep(*key, new)
        if new != old:
            patch = {"metadata": {"resourceVersion": sweep["metadata"]["resourceVersion"]}, "status": merge_patch(old, new)}
            try:
                await self.cluster.patch(SWEEPS, *key, patch, subresource="status")
            except port.NotFound:
                self.forget(key)
                return
            self._count(key, old, new)
        if decision.finished:
            self.finished.add(key)
            self.relist(key)
        if decision.requeue_after is not None:
            self.queue.add_after(key, decision.requeue_after)

    def _count(self, key: Key, old: Object, new: Object) -> None:
        for state, count in (new.get("trials") or {}).items():
            more = count - int((old.get("trials") or {}).get(state) or 0)
            if state in ("complete", "pruned", "failed", "lost") and more > 0:
                self.metrics.trials_ended.labels(key[0], state).inc(more)
        if saved := int(new.get("gpuSecondsSaved") or 0) - int(old.get("gpuSecondsSaved") or 0):
            self.metrics.gpu_seconds_saved.labels(key[0]).inc(max(0, saved))
        if is_finished(new) and not is_finished(old):
            outcome = "Complete" if is_true(new, "Complete") else "Failed"
            reason = (find_condition(new, outcome) or {}).get("reason", "")
            self.metrics.sweeps_finished.labels(key[0], outcome, reason).inc()
            log.info("sweep %s/%s: %s (%s)", *key, outcome, reason)
