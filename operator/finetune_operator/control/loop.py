"""What the reconcilers of both kinds share: a worker takes one key at a time from its queue, and whatever happens the key comes back.

After an event, after a conflict, after a backoff, at the resync. What is done with a key is the reconciler's own (worker.py, sweeps.py).
"""

import asyncio
import logging
import time
from abc import ABC, abstractmethod

from prometheus_client import Histogram

from finetune_operator.control.queue import ShutDown, WorkQueue
from finetune_operator.kube import port
from finetune_operator.observe.metrics import Metrics

log = logging.getLogger(__name__)

Key = tuple[str, str]
"""Namespace and name of a resource."""


class KeyLoop(ABC):
    """Works on one key at a time; many run side by side on different keys."""

    kind: str
    """Of the resource, for the log."""

    def __init__(self, queue: WorkQueue[Key], metrics: Metrics, seconds: Histogram) -> None:
        self.queue, self.metrics, self._seconds = queue, metrics, seconds
        self.finished: set[Key] = set()
        """Resources that are Complete or Failed: events of their children need no read."""
        self.heartbeat = time.monotonic()

    @abstractmethod
    async def reconcile(self, key: Key) -> None:
        """Once. Raises ApiError."""

    def outdated(self, key: Key) -> None:  # noqa: B027  (who remembers nothing has nothing to forget)
        """The API server has something else than what was read."""

    async def work(self) -> None:
        """Until the queue is closed."""
        while True:
            try:
                key = await self.queue.get()
            except ShutDown:
                return
            self.heartbeat = time.monotonic()
            try:
                await self._one(key)
            finally:
                self.queue.done(key)

    async def _one(self, key: Key) -> None:
        with self._seconds.time():
            try:
                await self.reconcile(key)
            except (port.Conflict, port.AlreadyExists):
                self.outdated(key)
                self.queue.retry(key)  # somebody wrote in between: look again
            except port.ApiError as error:
                log.warning("%s %s/%s: %s; trying again", self.kind, *key, error)
                self.metrics.reconcile_errors.labels(error.reason).inc()
                self.outdated(key)  # a write whose answer was lost may have been made
                self.queue.retry(key, at_least=error.retry_after or 0.0)
            except Exception as error:
                log.exception("%s %s/%s: unexpected error", self.kind, *key)
                self.metrics.reconcile_errors.labels(type(error).__name__).inc()
                self.outdated(key)
                self.queue.retry(key, at_least=1.0)
            else:
                self.queue.forget(key)


async def run_workers(reconciler: KeyLoop, count: int) -> None:
    """So many workers, until the queue is closed; a worker that dies takes all down."""
    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(reconciler.work())
