"""The pure parts of the progress server: what a body may be, and how often a pod may post."""

import json
from typing import Any

import pytest

from finetune_operator.control.loop import Key
from finetune_operator.control.progress import BURST, POSTS_PER_SECOND, Denied, ProgressServer, _parse, _Trusted
from finetune_operator.control.queue import WorkQueue
from finetune_operator.observe.metrics import Metrics

CHECKPOINT = {"uri": "s3://b/step-1", "step": 1, "sizeBytes": 1, "time": "2026-01-01T00:00:00Z"}


def refusal(body: bytes) -> str:
    with pytest.raises(Denied) as denied:
        _parse(body)
    assert denied.value.status == 400
    return str(denied.value)


def test_kubeflows_own_body_is_taken_and_its_other_keys_are_ignored() -> None:
    report = _parse(b'{"trainerStatus": {"progressPercentage": 7, "metrics": [{"name": "loss", "value": "0.5"}]}, "theirs": 1}')
    assert report.trainer_status is not None
    assert report.trainer_status.progress_percentage == 7


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"trainerStatus": {"progressPercentage": 101}}, "trainerStatus.progressPercentage"),
        ({"trainerStatus": {"metrics": [{"name": "loss", "value": 0.5}]}}, "trainerStatus.metrics[0].value"),
        ({"checkpoint": {**CHECKPOINT, "time": "2026-01-01T00:00:00"}}, "checkpoint.time"),
        ({"checkpoint": {**CHECKPOINT, "step": -1}}, "checkpoint.step"),
        ({"evaluations": [{"examples": 1, "step": 1, "metrics": []}] * 65}, "evaluations"),
    ],
)
def test_what_is_wrong_is_named_by_field(body: dict[str, Any], field: str) -> None:
    assert field in refusal(json.dumps(body).encode())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no json",
        b"\xff\xfe",
        b"[" * 60_000,
    ],
)
def test_what_is_no_json_is_refused(body: bytes) -> None:
    assert "not JSON" in refusal(body)


@pytest.mark.parametrize(
    "body",
    [
        {"trainerStatus": {"estimatedRemainingSeconds": 10**30}},
        {"checkpoint": {**CHECKPOINT, "step": 2**63}},
        {"checkpoint": {**CHECKPOINT, "time": "0001-01-01T00:00:00+23:00"}},
        {"trainerStatus": {"lastUpdatedTime": "9999-12-31T23:59:59-23:00"}},
    ],
    ids=["seconds", "step", "before the first day", "after the last day"],
)
def test_what_the_status_cannot_hold_is_refused(body: dict[str, Any]) -> None:
    # Taken, it would stand in the way of every later write of this job's status.
    refusal(json.dumps(body).encode())


@pytest.mark.parametrize("body", [b"[]", b"null", b"7"])
def test_json_that_is_no_object_is_refused(body: bytes) -> None:
    refusal(body)


def server() -> ProgressServer:
    metrics = Metrics()
    queue: WorkQueue[Key] = WorkQueue(metrics)
    return ProgressServer(None, None, queue, metrics)  # type: ignore[arg-type]  (the limit asks neither)


def test_a_pod_may_burst_and_then_is_slowed_to_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("finetune_operator.control.progress.time.monotonic", lambda: clock[0])
    progress, pod, other = server(), _Trusted("u1", 0.0), _Trusted("u2", 0.0)
    for _ in range(int(BURST)):
        progress._limit(pod)
    with pytest.raises(Denied) as denied:
        progress._limit(pod)
    assert denied.value.status == 429
    progress._limit(other)  # another pod has an allowance of its own
    clock[0] += 1 / POSTS_PER_SECOND
    progress._limit(pod)
    with pytest.raises(Denied):
        progress._limit(pod)
