"""The work queue: client-go's contract in asyncio.

A key that is added while it waits is one key. A key that is added while it is being worked on is worked on once more afterwards,
never twice at a time. A key that failed comes back after an exponential backoff with full jitter.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from finetune_operator.observe.metrics import Metrics

K = TypeVar("K", bound=Hashable)

BASE_SECONDS = 0.05
MAX_SECONDS = 60.0


class ShutDown(Exception):  # noqa: N818
    """The queue gives out no more keys."""


class WorkQueue(Generic[K]):
    """Keys to look at."""

    def __init__(self, metrics: Metrics, jitter: Callable[[float, float], float] = random.uniform) -> None:
        self._metrics = metrics
        self._jitter = jitter
        self._ready: deque[K] = deque()
        self._dirty: set[K] = set()
        self._processing: set[K] = set()
        self._since: dict[K, float] = {}
        self._later: dict[K, asyncio.TimerHandle] = {}
        self._failures: dict[K, int] = {}
        self._wake = asyncio.Condition()
        self._closed = False
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def closed(self) -> bool:
        """Whether it takes no more keys."""
        return self._closed

    def __len__(self) -> int:
        return len(self._ready)

    def add(self, key: K) -> None:
        """Now, or as soon as the key is not being worked on."""
        if self._closed or key in self._dirty:
            return
        self._metrics.queue_adds.inc()
        self._dirty.add(key)
        if key not in self._processing:
            self._push(key)

    def add_after(self, key: K, seconds: float) -> None:
        """In so many seconds, or earlier if that was asked for already."""
        if self._closed:
            return
        loop = asyncio.get_running_loop()
        waiting = self._later.get(key)
        if waiting is not None:
            if waiting.when() <= loop.time() + seconds:
                return
            waiting.cancel()
        self._later[key] = loop.call_later(max(0.0, seconds), self._due, key)

    def retry(self, key: K, at_least: float = 0.0) -> None:
        """After a failure: between 0 and BASE_SECONDS * 2^failures, at most MAX_SECONDS."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        self._metrics.queue_retries.inc()
        self.add_after(key, at_least + self._jitter(0, min(MAX_SECONDS, BASE_SECONDS * 2.0 ** min(failures, 20))))

    def forget(self, key: K) -> None:
        """After a success: the next failure starts with a short backoff again."""
        self._failures.pop(key, None)

    async def get(self) -> K:
        """The next key; `done` must follow. Raises ShutDown."""
        async with self._wake:
            await self._wake.wait_for(lambda: self._ready or self._closed)
            if self._closed:
                raise ShutDown
            key = self._ready.popleft()
        self._metrics.queue_depth.dec()  # two queues share it
        self._metrics.queue_wait_seconds.observe(time.monotonic() - self._since.pop(key))
        self._dirty.discard(key)
        self._processing.add(key)
        return key

    def done(self, key: K) -> None:
        """The key has been worked on."""
        self._processing.discard(key)
        if key in self._dirty:
            self._push(key)

    def close(self) -> None:
        """Ends every waiting `get`."""
        self._closed = True
        for handle in self._later.values():
            handle.cancel()
        self._later.clear()
        self._notify()

    def _due(self, key: K) -> None:
        self._later.pop(key, None)
        self.add(key)

    def _push(self, key: K) -> None:
        self._since[key] = time.monotonic()
        self._ready.append(key)
        self._metrics.queue_depth.inc()
        self._notify()

    def _notify(self) -> None:
        async def wake() -> None:
            async with self._wake:
                self._wake.notify_all()

        task = asyncio.get_running_loop().create_task(wake())
        self._tasks.add(task)  # a task that nobody holds may be collected before it ran
        task.add_done_callback(self._tasks.discard)
