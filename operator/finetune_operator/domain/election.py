"""Which of several operators may write: the decision of leader election over a Lease, without clock and I/O.

The rules are those of client-go (k8s.io/client-go/tools/leaderelection: package comment, `tryAcquireOrRenew`, `release`). A record counts
from the moment at which this process saw it change, on this process's own clock; the times written in it are for people. Every write has
the resourceVersion that was read as its precondition, so of two candidates that decide the same, one is refused.

Where the leader can be reached is an annotation beside the record, written by the same request: `holderIdentity` stays a plain name.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum, auto

from finetune_api import names
from finetune_operator.domain.types import Object

ANNOTATION_ADDRESS = f"{names.GROUP}/progress-address"
"""host:port of the leader's progress server, on the Lease."""


@dataclass(frozen=True)
class Candidate:
    """One process that wants to lead."""

    identity: str
    """Unique per process, not per pod: a container that starts anew is another one."""
    address: str
    lease_seconds: int

    @property
    def renew_seconds(self) -> float:
        """A leader that could not renew for so long gives up, while the lease still keeps the others away (client-go: 10 of 15)."""
        return self.lease_seconds * 10 / 15

    @property
    def retry_seconds(self) -> float:
        """Pause between two tries (client-go: 2 of 15)."""
        return self.lease_seconds * 2 / 15


@dataclass(frozen=True)
class Record:
    """What a Lease says. The default is what no Lease says."""

    holder: str = ""
    address: str = ""
    lease_seconds: int = 0
    acquired: str | None = None
    renewed: str | None = None
    transitions: int = 0


@dataclass(frozen=True)
class Seen:
    """The newest record, and since when it has not changed, on this process's clock."""

    record: Record = Record()
    since: float = 0.0
    version: str | None = None
    """The Lease's resourceVersion; None where there is no Lease."""

    def held(self, now: float) -> bool:
        """Somebody leads, as far as can be told."""
        return bool(self.record.holder) and now < self.since + self.record.lease_seconds


class Step(Enum):
    """What to do about the Lease."""

    WAIT = auto()
    TAKE = auto()
    """It is nobody's: create it, or write our name over the old one."""
    RENEW = auto()


def look(before: Seen, lease: Object | None, now: float) -> Seen:
    """What is seen with this Lease, read or written just now."""
    if lease is None:
        # Somebody deleted it. Its holder does not know yet: what was promised to it stays promised.
        return Seen(before.record, before.since, None)
    record = _record(lease)
    return Seen(record, before.since if record == before.record else now, lease["metadata"]["resourceVersion"])


def decide(seen: Seen, identity: str, now: float) -> Step:
    """The next step of the candidate with this identity."""
    if seen.record.holder == identity:
        return Step.RENEW
    return Step.WAIT if seen.held(now) else Step.TAKE


def claim(seen: Seen, candidate: Candidate, now: datetime) -> Object:
    """The Lease in this candidate's name: a body to create, or a merge patch."""
    ours = seen.record.holder == candidate.identity
    first = seen.version is None or ours
    return _lease(
        seen,
        address=candidate.address,
        holderIdentity=candidate.identity,
        leaseDurationSeconds=candidate.lease_seconds,
        acquireTime=seen.record.acquired if ours else _stamp(now),
        renewTime=_stamp(now),
        leaseTransitions=seen.record.transitions + (0 if first else 1),
    )


def disclaim(seen: Seen, now: datetime) -> Object:
    """The merge patch that makes the Lease nobody's, so that the next one need not wait."""
    return _lease(seen, address=None, holderIdentity=None, leaseDurationSeconds=1, renewTime=_stamp(now))


def _lease(seen: Seen, address: str | None, **spec: object) -> Object:
    version = {"resourceVersion": seen.version} if seen.version else {}
    return {"metadata": {**version, "annotations": {ANNOTATION_ADDRESS: address}}, "spec": spec}


def _record(lease: Object) -> Record:
    spec = lease.get("spec") or {}
    return Record(
        holder=spec.get("holderIdentity") or "",
        address=(lease["metadata"].get("annotations") or {}).get(ANNOTATION_ADDRESS, ""),
        lease_seconds=spec.get("leaseDurationSeconds") or 0,
        acquired=spec.get("acquireTime"),
        renewed=spec.get("renewTime"),
        transitions=spec.get("leaseTransitions") or 0,
    )


def _stamp(now: datetime) -> str:
    """MicroTime, as the API server spells it."""
    return now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
