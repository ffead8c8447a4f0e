"""Holds the Lease that lets one of several operators write; domain/election.py decides, this reads, writes and keeps the time.

After client-go's LeaderElector (k8s.io/client-go/tools/leaderelection), and stricter in one thing: `remaining` counts from before the
request that renewed the lease was sent, so that it is over here before anybody else may think so, and every write asks it (kube/aio.py).
"""

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Protocol

from finetune_operator.domain.election import Candidate, Seen, Step, claim, decide, disclaim, look
from finetune_operator.kube import port
from finetune_operator.kube.port import LEASES, Cluster, Object

log = logging.getLogger(__name__)

JITTER = 1.2
"""A candidate waits between one and 1 + JITTER times its pause, as in client-go: two that wait do not keep step."""
RELEASE_SECONDS = 1.0


class LeaseLost(Exception):  # noqa: N818
    """This process may lead no longer; the sentence says why."""


class Leadership(Protocol):
    """Whether this process may write, and who else may."""

    def remaining(self) -> float:
        """Seconds for which a write may still start; 0 for a standby."""

    def leader(self) -> str | None:
        """host:port of the progress server of another process that leads now."""

    async def acquire(self) -> None:
        """Until this process leads."""

    async def keep(self) -> None:
        """Stays the leader, without an end; raises LeaseLost."""

    async def release(self) -> None:
        """After the last write. Nothing to do for a standby."""


class Alone:
    """Without a Lease there is one operator, and it leads (the Deployment sees to it: strategy Recreate)."""

    def remaining(self) -> float:
        return math.inf

    def leader(self) -> str | None:
        return None

    async def acquire(self) -> None:
        pass

    async def keep(self) -> None:
        await asyncio.Event().wait()

    async def release(self) -> None:
        pass


class Elector:
    """One candidate for one Lease."""

    def __init__(
        self, cluster: Cluster, namespace: str, name: str, candidate: Candidate, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.cluster = cluster
        self.namespace, self.name = namespace, name
        self.candidate = candidate
        self._clock = clock
        self._seen = Seen()
        self._renewed: float | None = None
        """When the last request that renewed the lease was begun; None: this process does not lead."""

    def remaining(self) -> float:
        if self._renewed is None:
            return 0.0
        return max(0.0, self._renewed + self.candidate.lease_seconds - self._clock())

    def leader(self) -> str | None:
        record = self._seen.record
        others = self._seen.held(self._clock()) and record.holder != self.candidate.identity
        return record.address or None if others else None

    async def acquire(self) -> None:
        while True:
            if await self._try(self.candidate.renew_seconds / 2):
                break
            await asyncio.sleep(self.candidate.retry_seconds * random.uniform(1, 1 + JITTER))
        log.info("leading: %s holds the Lease %s/%s", self.candidate.identity, self.namespace, self.name)

    async def keep(self) -> None:
        while True:
            await asyncio.sleep(min(self.candidate.retry_seconds, self._until_deadline()))
            # Asked after the sleep: a process that was stopped, or a busy one, sleeps longer than it meant to.
            if (left := self._until_deadline()) <= 0:
                seconds = self.candidate.renew_seconds
                raise LeaseLost(f"{self._name} was not renewed for {seconds:g} s: somebody else may lead by now")
            await self._try(min(left, self.candidate.renew_seconds / 2))

    async def release(self) -> None:
        if self.remaining() <= 0:
            return
        self._renewed = None
        try:
            async with asyncio.timeout(RELEASE_SECONDS):
                await self._disclaim()
        except (TimeoutError, port.ApiError) as error:
            log.warning("%s was not released and will expire: %s", self._name, error)
        else:
            log.info("%s is released", self._name)

    async def _disclaim(self) -> None:
        try:
            await self.cluster.patch(LEASES, self.namespace, self.name, disclaim(self._seen, datetime.now(UTC)))
        except port.Conflict:
            # A renewal that was cut off at the end may have been written all the same.
            self._see(await self._read())
            if self._seen.record.holder != self.candidate.identity:
                raise
            await self.cluster.patch(LEASES, self.namespace, self.name, disclaim(self._seen, datetime.now(UTC)))

    def _until_deadline(self) -> float:
        return self.remaining() - self.candidate.lease_seconds + self.candidate.renew_seconds

    @property
    def _name(self) -> str:
        return f"the Lease {self.namespace}/{self.name}"

    async def _try(self, seconds: float) -> bool:
        """One look, and one write where it is our turn: whether the lease was taken or renewed. Raises LeaseLost."""
        try:
            async with asyncio.timeout(seconds):
                return await self._step()
        except (port.Conflict, port.AlreadyExists) as error:
            log.info("%s: another was first: %s", self._name, error)
        except (TimeoutError, port.ApiError) as error:
            log.warning("%s: %s; trying again", self._name, str(error) or "no answer in time")
        return False

    async def _step(self) -> bool:
        self._see(await self._read())
        step = decide(self._seen, self.candidate.identity, self._clock())
        if self._renewed is not None and step is not Step.RENEW:
            self._renewed = None
            raise LeaseLost(f"{self._name} is held by {self._seen.record.holder or 'nobody'}: somebody else may lead by now")
        if step is Step.WAIT:
            return False
        begun = self._clock()
        body = claim(self._seen, self.candidate, datetime.now(UTC))
        if self._seen.version is None:
            body = {"apiVersion": f"{LEASES.group}/{LEASES.version}", "kind": "Lease", **body}
            body["metadata"]["name"] = self.name
            self._see(await self.cluster.create(LEASES, self.namespace, body))
        else:
            self._see(await self.cluster.patch(LEASES, self.namespace, self.name, body))
        self._renewed = begun
        return True

    async def _read(self) -> Object | None:
        try:
            return await self.cluster.get(LEASES, self.namespace, self.name)
        except port.NotFound:
            return None

    def _see(self, lease: Object | None) -> None:
        before, self._seen = self._seen.record.holder, look(self._seen, lease, self._clock())
        holder = self._seen.record.holder
        if holder not in (before, self.candidate.identity):
            log.info("standing by: %s leads", holder or "nobody")
