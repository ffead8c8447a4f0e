"""The pure parts of the progress server: what a body may be, and how often a pod may post."""

import json
from typing import Any

import pytest
from aiohttp.test_utils import make_mocked_request

from finetune_operator.control.loop import Key
from finetune_operator.control.progress import BURST, POSTS_PER_SECOND, Denied, ProgressServer, _parse, _Trusted
from finetune_operator.control.queue import WorkQueue
from finetune_operator.kube.aio import _path
from finetune_operator.kube.port import JOBS
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


@pytest.mark.parametrize(
    ("namespace", "name", "there"),
    [
        ("team", "my", True),
        ("team", "my.job-2", True),
        ("team", "x1%2F..%2Fmy", False),
        ("team%2F..%2Fother", "my", False),
        ("team", "my%2Fstatus", False),
        ("team", "..", False),
    ],
)
async def test_one_job_has_one_address(namespace: str, name: str, there: bool) -> None:
    """An address more would be an allowance more, and memory without bound."""
    request = make_mocked_request("POST", f"/v1/namespaces/{namespace}/finetunejobs/{name}/attempts/1/progress")
    found = await server().app().router.resolve(request)
    assert (found.http_exception is None) is there


def test_a_name_leads_to_no_other_object() -> None:
    assert _path(JOBS, "team", "x/../my").endswith("/namespaces/team/finetunejobs/x%2F..%2Fmy")
    assert "/namespaces/a%2F..%2Fb/" in _path(JOBS, "a/../b")
