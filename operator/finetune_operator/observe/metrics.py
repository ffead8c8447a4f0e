"""Prometheus metrics. docs/reference/metrics.md is made from them; alerts and dashboards are compared with them."""

import time
from datetime import datetime
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from finetune_api.report import Saving
from finetune_operator import __version__


class Metrics:
    """All series of one operator process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.jobs = Gauge("finetune_jobs", "FineTuneJobs by namespace and state.", ["namespace", "state"], registry=r)
        self.finished = Counter(
            "finetune_jobs_finished",
            "FineTuneJobs that ended, by condition and reason.",
            ["namespace", "outcome", "reason"],
            registry=r,
        )
        self.restarts = Counter("finetune_restarts", "Restarts of attempts.", ["namespace"], registry=r)
        self.lost_work = Counter(
            "finetune_lost_work_seconds", "Training time after the last checkpoint that restarts lost.", ["namespace"], registry=r
        )
        # By field of finetune_api.report.Saving.
        self.saving = {
            field: Counter(f"finetune_checkpoint_{field}", text, ["namespace"], registry=r)
            for field, text in (
                ("saves", "Checkpoints that became durable."),
                ("skipped", "Saves left out because the one before was being uploaded."),
                ("blocking_seconds", "Time that training stood still for checkpoints."),
                ("upload_seconds", "Time that uploads of checkpoints took."),
                ("uploaded_bytes", "Bytes of checkpoints sent to the storage."),
            )
        }
        self.checkpoint_age = Gauge(
            "finetune_checkpoint_age_seconds",
            "Of a job that runs: time since its last durable checkpoint or, where that was later, since it began to run.",
            ["namespace", "name"],
            registry=r,
        )
        self.reconcile_seconds = Histogram("finetune_reconcile_seconds", "Duration of one reconcile.", registry=r)
        self.reconcile_errors = Counter(
            "finetune_reconcile_errors", "Reconciles that failed and are retried.", ["error"], registry=r
        )
        self.status_writes = Counter("finetune_status_writes", "Writes of a FineTuneJob's status.", registry=r)
        self.sweeps = Gauge("finetune_sweeps", "HyperparameterSweeps by namespace and state.", ["namespace", "state"], registry=r)
        self.sweeps_finished = Counter(
            "finetune_sweeps_finished",
            "HyperparameterSweeps that ended, by condition and reason.",
            ["namespace", "outcome", "reason"],
            registry=r,
        )
        self.sweep_trials = Gauge(
            "finetune_sweep_trials", "Trials of a sweep by what has become of them.", ["namespace", "name", "state"], registry=r
        )
        self.sweep_best = Gauge(
            "finetune_sweep_best_value", "The best objective of a sweep so far.", ["namespace", "name"], registry=r
        )
        self.trials_ended = Counter("finetune_trials_ended", "Trials that ended, by how.", ["namespace", "state"], registry=r)
        self.gpu_seconds_saved = Counter(
            "finetune_gpu_seconds_saved", "GPU-seconds that pruned trials would still have taken.", ["namespace"], registry=r
        )
        self.sweep_reconcile_seconds = Histogram(
            "finetune_sweep_reconcile_seconds", "Duration of one reconcile of a sweep.", registry=r
        )
        self.queue_depth = Gauge("finetune_queue_depth", "Keys waiting in the work queue.", registry=r)
        self.queue_adds = Counter("finetune_queue_adds", "Keys put on the work queue.", registry=r)
        self.queue_wait_seconds = Histogram("finetune_queue_wait_seconds", "Time that a key waited in the queue.", registry=r)
        self.queue_retries = Counter("finetune_queue_retries", "Keys put back with a backoff.", registry=r)
        self.api_requests = Counter(
            "finetune_api_requests",
            "Requests to the API server, without kopf's watches.",
            ["verb", "resource", "code"],
            registry=r,
        )
        self.progress_posts = Counter("finetune_progress_posts", "Progress posts by answer.", ["code"], registry=r)
        self.progress_forwarded = Counter(
            "finetune_progress_forwarded",
            "Progress posts that a standby passed on to the leader, by answer.",
            ["code"],
            registry=r,
        )
        self.leader = Gauge("finetune_leader", "1 while this operator may write, 0 while it stands by.", registry=r)
        self.build = Gauge("finetune_build_info", "Always 1; the version is the label.", ["version"], registry=r)
        self.build.labels(__version__).set(1)
        self._states: dict[tuple[str, str], str] = {}
        self._sweep_states: dict[tuple[str, str], str] = {}
        self._sweep_series: dict[tuple[str, str], set[str]] = {}
        """Series of each sweep that are shown; the empty one is its best value."""
        self._unsaved: dict[tuple[str, str], datetime] = {}
        self._counted: dict[tuple[str, str], tuple[str, dict[str, float]]] = {}
        """Per job: the execution that is reported on, and how much of its sums is counted."""

    def saw(self, namespace: str, name: str, state: str | None) -> None:
        """Keeps the gauge by state; None is a resource that is gone."""
        before = self._states.pop((namespace, name), None)
        if before is not None:
            self.jobs.labels(namespace, before).dec()
        if state is not None:
            self._states[(namespace, name)] = state
            self.jobs.labels(namespace, state).inc()

    def saw_sweep(self, namespace: str, name: str, status: dict[str, Any] | None) -> None:
        """Keeps the gauges of a sweep; None is one that is gone."""
        key = (namespace, name)
        before = self._sweep_states.pop(key, None)
        if before is not None:
            self.sweeps.labels(namespace, before).dec()
        if status is None:
            self._without_series(key)
            return
        state = status.get("state") or "Unknown"
        self._sweep_states[key] = state
        self.sweeps.labels(namespace, state).inc()
        for fate, count in (status.get("trials") or {}).items():
            if fate != "created":
                self.sweep_trials.labels(namespace, name, fate).set(count)
                self._sweep_series.setdefault(key, set()).add(fate)
        if best := status.get("best"):
            self.sweep_best.labels(namespace, name).set(float(best["value"]))
            self._sweep_series.setdefault(key, set()).add("")

    def _without_series(self, key: tuple[str, str]) -> None:
        for fate in self._sweep_series.pop(key, ()):
            if fate:
                self.sweep_trials.remove(*key, fate)
            else:
                self.sweep_best.remove(*key)

    def unsaved(self, namespace: str, name: str, since: datetime | None) -> None:
        """Since when a running job has not saved; None is one that does not run."""
        if since is not None:
            self._unsaved[(namespace, name)] = since
        elif self._unsaved.pop((namespace, name), None):
            self.checkpoint_age.remove(namespace, name)

    def began(self, namespace: str, name: str, execution: str) -> None:
        """An execution begins: all that it will report is new."""
        self._counted[(namespace, name)] = (execution, {})

    def saved(self, namespace: str, name: str, execution: str, saving: Saving) -> None:
        """Counts what is new in the sums of this execution; of one that began before this operator did, what comes from now on."""
        sums: dict[str, float] = saving.model_dump()
        known, counted = self._counted.get((namespace, name), ("", {}))
        if known == execution:
            for field, counter in self.saving.items():
                counter.labels(namespace).inc(max(0.0, sums[field] - counted.get(field, 0.0)))
            sums = {field: max(value, counted.get(field, 0.0)) for field, value in sums.items()}
        self._counted[(namespace, name)] = (execution, sums)

    def forget(self, namespace: str, name: str) -> None:
        """The resource is gone."""
        self.unsaved(namespace, name, None)
        self._counted.pop((namespace, name), None)

    def render(self) -> bytes:
        """The text format."""
        now = time.time()
        for job, since in self._unsaved.items():
            self.checkpoint_age.labels(*job).set(max(0.0, now - since.timestamp()))
        return generate_latest(self.registry)
