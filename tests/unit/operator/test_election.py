"""The election's decision: a record and a clock in, a step out; and that no schedule of candidates and clocks makes two leaders."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_operator.domain.election import ANNOTATION_ADDRESS, Candidate, Record, Seen, Step, claim, decide, disclaim, look
from finetune_operator.domain.types import Object
from unit.operator.test_parts import apply

NOW = datetime(2026, 1, 2, 3, 4, 5, 678, UTC)
ME = Candidate("me", "10.0.0.1:8443", 15)
OTHER = Candidate("other", "10.0.0.2:8443", 15)
NOBODY = Seen()


def stored(body: Object, version: str = "1") -> Object:
    return {**body, "metadata": {**body["metadata"], "resourceVersion": version}}


def held_by(candidate: Candidate, since: float = 100.0) -> Seen:
    return look(NOBODY, stored(claim(NOBODY, candidate, NOW)), since)


@pytest.mark.parametrize(
    ("seen", "now", "step"),
    [
        (NOBODY, 0.0, Step.TAKE),
        (held_by(ME), 100.0, Step.RENEW),
        (held_by(ME), 1000.0, Step.RENEW),
        (held_by(OTHER), 114.9, Step.WAIT),
        (held_by(OTHER), 115.0, Step.TAKE),
        (Seen(Record(transitions=3), 100.0, "1"), 100.0, Step.TAKE),
        (look(held_by(OTHER), None, 110.0), 114.9, Step.WAIT),
        (look(held_by(OTHER), None, 110.0), 115.0, Step.TAKE),
        (look(held_by(ME), None, 110.0), 110.0, Step.RENEW),
    ],
    ids=["no-lease", "ours", "ours-old", "held", "expired", "released", "deleted-held", "deleted-expired", "deleted-ours"],
)
def test_the_step(seen: Seen, now: float, step: Step) -> None:
    assert decide(seen, ME.identity, now) is step


def test_a_record_counts_from_its_change_and_not_from_the_time_in_it() -> None:
    long_ago = stored(claim(NOBODY, OTHER, datetime(2001, 1, 1, tzinfo=UTC)))
    first = look(NOBODY, long_ago, 500.0)
    assert decide(first, ME.identity, 514.0) is Step.WAIT
    same = look(first, stored(long_ago, "2"), 514.0)
    assert decide(same, ME.identity, 515.0) is Step.TAKE, "another label on the Lease is not a renewal"
    renewed = look(first, stored(claim(first, OTHER, NOW), "2"), 514.0)
    assert decide(renewed, ME.identity, 528.0) is Step.WAIT


def test_another_holder_is_counted_and_a_renewal_is_not() -> None:
    mine = claim(held_by(OTHER), ME, NOW)
    assert mine["metadata"] == {"resourceVersion": "1", "annotations": {ANNOTATION_ADDRESS: ME.address}}
    assert mine["spec"]["leaseTransitions"] == 1
    assert mine["spec"]["renewTime"] == "2026-01-02T03:04:05.000678Z"
    later = claim(look(NOBODY, stored(mine), 0.0), ME, NOW.replace(hour=4))
    assert later["spec"]["leaseTransitions"] == 1
    assert later["spec"]["acquireTime"] == mine["spec"]["acquireTime"] != later["spec"]["renewTime"]


def test_released_it_is_nobodys_and_has_no_address() -> None:
    before = stored(claim(NOBODY, OTHER, NOW))
    seen = look(NOBODY, before, 0.0)
    after = look(seen, stored(apply(before, disclaim(seen, NOW)), "2"), 1.0)
    assert (after.record.holder, after.record.address) == ("", "")
    assert decide(after, ME.identity, 1.0) is Step.TAKE


@dataclass
class Store:
    """One object with a resourceVersion, as etcd keeps it: a write onto another version than was read is refused."""

    lease: Object | None = None
    version: int = 0

    def write(self, body: Object) -> Object | None:
        expected = body["metadata"].get("resourceVersion")
        if expected != (self.lease["metadata"]["resourceVersion"] if self.lease else None):
            return None
        self.version += 1
        self.lease = stored(apply(self.lease or {}, body), str(self.version))
        return self.lease


@dataclass
class Process:
    """A candidate whose clock began at any time and who may be stopped between any two of its steps."""

    candidate: Candidate
    offset: float
    seen: Seen = field(default_factory=Seen)
    read_at: float = 0.0
    until: float = -1.0

    def turn(self, store: Store, now: float, writes: bool) -> None:
        clock = now + self.offset
        if not writes:
            self.seen, self.read_at = look(self.seen, store.lease, clock), clock
            return
        if decide(self.seen, self.candidate.identity, self.read_at) is Step.WAIT:
            return
        # A renewal is known by its time: no two of them are of the same microsecond.
        moment = NOW + timedelta(microseconds=store.version)
        if (written := store.write(claim(self.seen, self.candidate, moment))) is not None:
            self.seen, self.until = look(self.seen, written, clock), now + self.candidate.lease_seconds


TURNS = st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.sampled_from([0.0, 0.5, 3.0, 14.5, 15.5])), max_size=40)


@settings(max_examples=2000)
@given(TURNS, st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3))
def test_there_is_never_more_than_one_leader(turns: list[tuple[int, bool, float]], offsets: list[float]) -> None:
    store, now = Store(), 0.0
    processes = [Process(Candidate(f"p{n}", f"10.0.0.{n}:1", 15), offset) for n, offset in enumerate(offsets)]
    for who, writes, seconds in turns:
        now += seconds
        processes[who].turn(store, now, writes)
        assert sum(p.until > now + 1e-6 for p in processes) <= 1
