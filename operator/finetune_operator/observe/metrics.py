"""Prometheus metrics. One table of names and help texts; docs and alerts are compared with it."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

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
        self.reconcile_seconds = Histogram("finetune_reconcile_seconds", "Duration of one reconcile.", registry=r)
        self.reconcile_errors = Counter(
            "finetune_reconcile_errors", "Reconciles that failed and are retried.", ["error"], registry=r
        )
        self.status_writes = Counter("finetune_status_writes", "Writes of a FineTuneJob's status.", registry=r)
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

    def saw(self, namespace: str, name: str, state: str | None) -> None:
        """Keeps the gauge by state; None is a resource that is gone."""
        before = self._states.pop((namespace, name), None)
        if before is not None:
            self.jobs.labels(namespace, before).dec()
        if state is not None:
            self._states[(namespace, name)] = state
            self.jobs.labels(namespace, state).inc()

    def render(self) -> bytes:
        """The text format."""
        return generate_latest(self.registry)
