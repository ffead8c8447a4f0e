"""`finetune run` of a HyperparameterSweep: the cluster's decisions, with trials as processes of this machine that run side by side.

`decide_sweep` decides about the sweep and `decide` about each trial, exactly as in the operator. What they would read from an API server lies
in a folder (sweep_objects.py), and what they would start in a cluster is started here (sweep_process.py). So it may be killed at any moment:
the same command reads the folder and goes on.
"""

import importlib.util
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from finetune_api import names
from finetune_api.environment import trainer_environment
from finetune_api.failures import BY_EXIT_CODE, BY_REASON
from finetune_api.manifest import parse_job, parse_sweep
from finetune_api.names import Condition, Reason, State
from finetune_api.sweep import MUTABLE, HyperparameterSweep
from finetune_api.sweep_rules import check_start
from finetune_cli import inputs, show, sweep_show
from finetune_cli.alone import alone
from finetune_cli.errors import UserError
from finetune_cli.sweep_objects import FOLDER, Object, Objects, read
from finetune_cli.sweep_process import LOG_FILE, Attempt, ProgressServer
from finetune_operator.domain import trials as t
from finetune_operator.domain.child import child_name
from finetune_operator.domain.closing import BACKOFF_LIMIT
from finetune_operator.domain.decide import decide
from finetune_operator.domain.outcome import parse_time
from finetune_operator.domain.status import find_condition, is_finished, is_true, stamp
from finetune_operator.domain.sweep import decide_sweep
from finetune_operator.domain.sweep_types import CreateTrial, PatchTrial, SweepAction, SweepObserved
from finetune_operator.domain.types import CreateJob, DeleteJob, EndPod, Event, Observed, Progress, Settings

LOOK_SECONDS = 0.1
SETTINGS = Settings("local", "http://127.0.0.1", "", restart_backoff_seconds=1.0)
INTERRUPTED = 20
KILLED = 137


@dataclass(frozen=True)
class Places:
    """Where things are on this machine."""

    workdir: Path
    s3_root: Path | None = None
    model_mirror: str | None = None
    dataset_mirror: str | None = None

    def environment(self) -> dict[str, str]:
        """What trainers are told of it."""
        told = {
            names.ENV_S3_ROOT: str(self.s3_root) if self.s3_root else None,
            names.ENV_MODEL_MIRROR: self.model_mirror,
            names.ENV_DATASET_MIRROR: self.dataset_mirror,
        }
        return {name: value for name, value in told.items() if value}


def run_sweep(
    file: Path,
    overrides: list[str],
    *,
    workdir: Path | None,
    s3_root: Path | None,
    model_mirror: str | None,
    dataset_mirror: str | None,
) -> int:
    """Searches, or goes on, or shows what was found already. 0: complete; 1: failed; 20: interrupted. Raises UserError."""
    sweep = inputs.sweep(file, overrides)
    places = Places(
        (workdir or Path(".finetune") / sweep.metadata["name"]).resolve(),
        inputs.s3_root(s3_root),
        inputs.mirror("--model-mirror", model_mirror),
        inputs.mirror("--dataset-mirror", dataset_mirror),
    )
    if not sweep.spec.trial_template.spec.trainer.command and importlib.util.find_spec("torch") is None:
        raise ModuleNotFoundError("torch", name="torch")
    places.workdir.mkdir(parents=True, exist_ok=True)
    with alone(places.workdir, f"{sweep.metadata['name']} is being run in {places.workdir} already") as lock:
        objects = Objects(places.workdir)
        objects.load()
        stored = take_over(objects, sweep)
        if is_finished(stored.get("status") or {}):
            show.line(f"{sweep.metadata['name']} has ended already; what it found:")
            code = 0
        else:
            code = Host(objects, stored, places, lock).run()
        return code or sweep_show.finish(objects, sweep.metadata["name"], places.workdir, places.s3_root)


def take_over(objects: Objects, sweep: HyperparameterSweep) -> Object:
    """The sweep as it is kept: new, or with what may change taken over from the manifest. Raises UserError where it is another one."""
    spec = sweep.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    name = sweep.metadata["name"]
    kept = objects.all(names.KIND_SWEEP)
    if not kept:
        try:
            check_start(sweep.spec)
        except ValueError as error:
            raise UserError(f"spec.{error}") from error
        meta = {k: v for k, v in sweep.metadata.items() if k in ("name", "namespace", "labels", "annotations")}
        return objects.create({"apiVersion": names.API_VERSION, "kind": names.KIND_SWEEP, "metadata": meta, "spec": spec})
    stored = kept[0]
    if stored["metadata"]["name"] != name:
        raise UserError(f"{objects.folder} holds the sweep {stored['metadata']['name']}: give {name} another --workdir", 1)
    before = _normal(stored)
    differ = sorted(key for key in {*spec, *before} if spec.get(key) != before.get(key) and key not in MUTABLE)
    if differ:
        raise UserError(
            f"spec.{differ[0]} differs from the sweep in {objects.folder}, and may not change once trials were chosen by it (only "
            f"{', '.join(MUTABLE)} may): put it back, or give the sweep another name"
        )
    if is_finished(stored.get("status") or {}):
        return stored
    changed = {key: spec.get(key) for key in MUTABLE if spec.get(key) != before.get(key)}
    # Replaced and not merged: a part that the manifest no longer has is gone.
    kept_spec = {**{k: v for k, v in before.items() if k not in changed}, **{k: v for k, v in changed.items() if v is not None}}
    if not changed:
        return stored
    generation = int(stored["metadata"].get("generation", 1)) + 1
    show.line(f"changed: {', '.join(changed)}")
    return objects.put({**stored, "metadata": {**stored["metadata"], "generation": generation}, "spec": kept_spec})


def _normal(stored: Object) -> Object:
    """The kept spec as this version writes it: fields that are new since have their defaults."""
    parsed = parse_sweep({key: stored[key] for key in ("apiVersion", "kind", "metadata", "spec")})
    dumped: Object = parsed.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    return dumped


class Host:
    """One run of the command: observes, decides, acts, as the operator's reconcilers do."""

    def __init__(self, objects: Objects, sweep: Object, places: Places, lock: int) -> None:
        self.objects, self.places, self.lock = objects, places, lock
        self.name: str = sweep["metadata"]["name"]
        self.attempts: dict[str, Attempt] = {}
        """The newest of each trial, by the trial's name."""
        self.reports: dict[str, Progress] = {}
        self.closing: Attempt | None = None
        self.wake = threading.Event()
        self.server = ProgressServer(self.wake)
        self.view = sweep_show.view(objects, self.name)
        self.asked = 0
        self.changed = True
        self.due: dict[str, float] = {}
        """When to look again without news, by name, on the monotonic clock."""

    # ----------------------------------------------------------------------------------------------------- the loop ----
    def run(self) -> int:
        """Until the sweep has ended (0), was interrupted (20) or waits for somebody else (20)."""
        before = {number: signal.signal(number, self._signalled) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with self.server, self.view:
                self._adopt()
                code = None
                while code is None:
                    code = self._look()
        finally:
            for attempt in (*self.attempts.values(), *filter(None, [self.closing])):
                attempt.kill()
            for number, handler in before.items():
                signal.signal(number, handler)
        return code

    def _signalled(self, _number: int, _frame: FrameType | None) -> None:
        self.asked += 1  # and no more: `wake` has a lock, which the code that was interrupted here may hold

    def _look(self) -> int | None:
        """One round; the exit code where it was the last."""
        self.wake.wait(LOOK_SECONDS)
        self.wake.clear()
        if self.asked > 1:
            show.note(f"finetune: ended at once. To go on from the newest checkpoints, {_AGAIN}.")
            return KILLED
        jobs = self.objects.all(names.KIND_JOB)
        # Before the reports are taken: all that an attempt has said is there once it has ended.
        ended = {name for name, attempt in self.attempts.items() if attempt.ended()}
        news = self.server.take({job["metadata"]["name"]: job["metadata"]["uid"] for job in jobs})
        self.reports |= news
        still = False
        for job in jobs:
            if not is_finished(job.get("status") or {}):
                self._tend(job, news=job["metadata"]["name"] in news.keys() | ended)
                after = self.objects.need(job["metadata"]["name"]).get("status") or {}
                still = still or not (is_finished(after) or is_true(after, Condition.SUSPENDED))
        if self.asked:
            return self._interrupted(still)
        if self.changed or self._closed() or self._is_due(self.name):
            self.changed = False
            if self._decide():
                return 0
        self.view.draw()
        return self._nothing_to_do()

    def _is_due(self, name: str) -> bool:
        if time.monotonic() < self.due.get(name, float("inf")):
            return False
        del self.due[name]
        return True

    def _interrupted(self, still: bool) -> int | None:
        if self.closing is not None:
            self.closing.kill()  # it does no harm where it is begun again
        if still:
            self.view.stopping()
            return None
        jobs = [job for job in self.objects.all(names.KIND_JOB) if not is_finished(job.get("status") or {})]
        show.note(f"finetune: stopped; {len(jobs)} trials are saved where they were. To go on, {_AGAIN}.")
        return INTERRUPTED

    def _nothing_to_do(self) -> int | None:
        """The exit code where only somebody else can change anything."""
        status = self.objects.need(self.name).get("status") or {}
        state, waits = status.get("state"), find_condition(status, Condition.RUNNING) or {}
        if state == State.SUSPENDED:
            show.note(f"finetune: suspended by spec.suspend. Set it to false to go on, and {_AGAIN}.")
            return INTERRUPTED
        if waits.get("reason") == Reason.WARM_START_WAITING:
            raise UserError(
                f"{waits['message']} Run that one first; its --workdir must be {self.places.workdir.parent}/<name>.", 1
            )
        return None

    # --------------------------------------------------------------------------------------------------- the trials ----
    def _adopt(self) -> None:
        """Trials that were running when the last run was killed are taken for suspended: they go on from their checkpoints."""
        now = datetime.now(UTC)
        for job in self.objects.all(names.KIND_JOB):
            status = job.get("status") or {}
            if is_finished(status) or not status.get("attempt") or is_true(status, Condition.SUSPENDED):
                continue
            ran = self._ran(job) if is_true(status, Condition.RUNNING) else 0
            conditions = [c for c in status["conditions"] if c["type"] not in (Condition.RUNNING, Condition.SUSPENDED)]
            for kind, word in ((Condition.RUNNING, "False"), (Condition.SUSPENDED, "True")):
                said = {"reason": str(Reason.SUSPENDED), "message": "The sweep was killed.", "lastTransitionTime": stamp(now)}
                conditions.append({"type": str(kind), "status": word, **said})
            seconds = {
                "activeSeconds": int(status.get("activeSeconds") or 0) + ran,
                "gpuSeconds": int(status.get("gpuSeconds") or 0) + ran * t.gpus_of(job),
            }
            rest = {key: value for key, value in status.items() if key != "restartTime"}
            fresh = {**rest, **seconds, "conditions": conditions, "state": str(State.SUSPENDED), "jobsStatus": []}
            self.objects.put({**job, "status": fresh})

    def _ran(self, job: Object) -> int:
        """Seconds of the attempt that nobody saw the end of: its last words are in its log."""
        begun = parse_time((find_condition(job["status"], Condition.RUNNING) or {}).get("lastTransitionTime"))
        log = self.places.workdir / job["metadata"]["name"] / LOG_FILE
        if begun is None or not log.exists():
            return 0
        return max(0, int(log.stat().st_mtime - begun.timestamp()))

    def _tend(self, job: Object, *, news: bool) -> None:
        """The decision about one trial, where there is a reason for one."""
        name = job["metadata"]["name"]
        attempt = self.attempts.get(name)
        if attempt is not None and attempt.deleted:
            attempt.ask()
        status = job.get("status") or {}
        # The spec's wish is not met yet, or nothing was decided at all.
        unmet = not status or self.asked or job["spec"].get("stop") or job["spec"].get("suspend") or is_true(status, "Suspended")
        if news or unmet or self._is_due(name) or attempt is None:
            self._decide_trial(job, attempt)

    def _decide_trial(self, job: Object, attempt: Attempt | None) -> None:
        name, uid = job["metadata"]["name"], job["metadata"]["uid"]
        observed = Observed(
            self._seen(job),
            attempt.child() if attempt is not None and not attempt.deleted else None,
            None,
            (attempt.pod(),) if attempt is not None else (),
            self.reports.get(name),
        )
        decision = decide(observed, datetime.now(UTC), SETTINGS)
        before, after = job.get("status") or {}, decision.status
        if after != before:
            self.changed = True
            self.objects.put({**job, "status": after})
        kills = any(isinstance(action, EndPod) for action in decision.actions)
        for action in decision.actions:
            if isinstance(action, CreateJob):
                self._start(name, uid, after["attempt"])
                self.due[name] = 0.0
            elif isinstance(action, EndPod) and attempt is not None:
                attempt.kill()  # the whole group, and nothing is saved
            elif isinstance(action, DeleteJob) and attempt is not None and not kills:
                attempt.ask()
            elif isinstance(action, Event) and action.type == "Warning":
                self.view.line(f"{name}: {action.reason}: {action.message}")
        if decision.requeue_after is not None:
            self.due.setdefault(name, time.monotonic() + min(decision.requeue_after, 1.0))
        if is_finished(after):
            self.attempts.pop(name, None)
            self.view.ended(self.objects.need(name))

    def _seen(self, job: Object) -> Object:
        """The job as it is decided about: on one machine, and as long as the sweep itself is to stop, suspended with a save."""
        spec = {**job["spec"], "trainer": {**(job["spec"].get("trainer") or {}), "numNodes": 1}}
        if self.asked and not spec.get("stop"):
            spec |= {"suspend": True, "checkpoint": {**(spec.get("checkpoint") or {}), "onSuspend": "Save"}}
        return {**job, "spec": spec}

    def _start(self, name: str, uid: str, number: int) -> None:
        """The trainer's process of an attempt. The status that says so is on the disk already: a number is never used twice."""
        stored = self.objects.need(name)
        job = parse_job({key: stored[key] for key in ("apiVersion", "kind", "metadata", "spec")})
        sweep = self._sweep().spec
        ours = not job.spec.trainer.command
        command = [*job.spec.trainer.command, *job.spec.trainer.args] or [sys.executable, "-m", "finetune_trainer"]
        folder = self.places.workdir / name
        attempt = Attempt(child_name(name, number), uid, folder, command, number)
        environment = trainer_environment(job, number, workdir=str(folder), termination_log=str(attempt.termination))
        # Of the pod's environment only what the search itself has set: the rest speaks of a cluster.
        searched = {parameter.env for parameter in sweep.parameters if parameter.env}
        environment |= {v.name: v.value for v in job.spec.trainer.env if v.name in searched and v.value is not None}
        environment |= {**self.places.environment(), names.ENV_PROGRESS_URL: self.server.url(name, number)}
        if "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // sweep.parallel_trials))
        attempt.start(environment, self.lock, ours=ours)
        self.attempts[name] = attempt

    # ---------------------------------------------------------------------------------------------------- the sweep ----
    def _sweep(self) -> HyperparameterSweep:
        stored = self.objects.need(self.name)
        return parse_sweep({key: stored[key] for key in ("apiVersion", "kind", "metadata", "spec")})

    def _decide(self) -> bool:
        """The decision about the sweep; whether it has ended."""
        sweep = self.objects.need(self.name)
        decision = decide_sweep(self._observe(sweep), datetime.now(UTC), SETTINGS)
        for action in decision.actions:
            self._apply(action)
        if decision.status != sweep.get("status"):
            self.objects.put({**sweep, "status": decision.status})
            self.view.status(sweep.get("status") or {}, decision.status)
        if decision.requeue_after is not None:
            self.due[self.name] = time.monotonic() + decision.requeue_after
        return decision.finished

    def _observe(self, sweep: Object) -> SweepObserved:
        trials, repeats = {}, {}
        for job in self.objects.all(names.KIND_JOB):
            said = t.chosen(job)
            if job["metadata"]["labels"].get(names.LABEL_ROLE) == t.ROLE_REPEAT:
                repeats[job["metadata"]["name"]] = job
            elif said is not None:
                trials[said.index] = job
        observed = SweepObserved(sweep, trials, repeats)
        if self.closing is not None:
            observed = replace(observed, closing=self.closing.child(), closing_pods=[self.closing.pod()])
        if warm := (sweep["spec"].get("warmStartFrom") or {}).get("name"):
            found = read(self.places.workdir.parent / warm / FOLDER)
            others = [job for job in found.values() if job["kind"] == names.KIND_JOB]
            observed = replace(observed, warm=found.get(warm), warm_trials=others)
        return observed

    def _apply(self, action: SweepAction) -> None:
        if isinstance(action, CreateTrial):
            self.view.created(self.objects.create(action.manifest))
            self.changed = True
        elif isinstance(action, PatchTrial):
            patched = self.objects.patch(action.name, action.uid, action.patch)
            if patched is not None:
                self.view.judged(patched, action.patch)
            self.changed = True
        elif isinstance(action, CreateJob):
            self._close(action.manifest)
        elif isinstance(action, Event):
            self.view.event(action)

    def _close(self, manifest: Object, number: int = 1) -> None:
        """The process that ends the sweep, as its Job's container would be told to."""
        container = manifest["spec"]["template"]["spec"]["containers"][0]
        told = {v["name"]: v["value"] for v in container["env"] if "value" in v and v["name"].startswith("FINETUNE_")}
        if names.ENV_JOB in told:
            told[names.ENV_JOB] = told[names.ENV_JOB].replace("$$(", "$(")  # which the kubelet would do
        name = manifest["metadata"]["name"]
        owner: str = self.objects.need(self.name)["metadata"]["uid"]
        command = [sys.executable, "-m", "finetune_trainer.closing"]
        self.closing = Attempt(name, owner, self.places.workdir / name, command, number)
        self.closing_manifest = manifest
        here = {names.ENV_WORKDIR: str(self.closing.folder), names.ENV_TERMINATION_LOG: str(self.closing.termination)}
        self.closing.start({**told, **here, **self.places.environment(), "PYTHONUNBUFFERED": "1"}, self.lock, ours=True)

    def _closed(self) -> bool:
        """Whether the closing has just ended; it is begun again, as often as its Job would, where that may help."""
        closing = self.closing
        if closing is None or not closing.ended():
            return False
        code = closing.code or 0
        failure = BY_EXIT_CODE.get(code) or BY_REASON["UserCodeError"]
        if code and failure.retriable and closing.number <= BACKOFF_LIMIT:
            self.view.line(f"{closing.name}: {closing.report(code).message} Trying again.")
            self._close(self.closing_manifest, closing.number + 1)
            return False
        return True


_AGAIN = "run the same command again"
