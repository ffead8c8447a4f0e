"""Progress on a real control plane: real pod-bound tokens are heard, all others refused; the status is written sparingly."""

import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from finetune_api.names import PROGRESS_AUDIENCE
from integration.jobs import Jobs, manifest, wait
from testcluster import Cluster, PodRunner, hang
from testcluster.operator import Operator

REPORT = {
    "trainerStatus": {
        "progressPercentage": 45,
        "estimatedRemainingSeconds": 3600,
        "metrics": [{"name": "loss", "value": "0.23"}],
        "lastUpdatedTime": "2026-06-12T03:00:00Z",
    }
}


@pytest.fixture(scope="module")
def runner(cluster: Cluster) -> Iterator[PodRunner]:
    with PodRunner(cluster.kubeconfig, lambda _pod: hang(20)) as running:
        yield running


class Poster:
    """Posts as pods of one running job would."""

    def __init__(self, jobs: Jobs, operator: Operator, name: str) -> None:
        self.jobs = jobs
        self.operator = operator
        self.name = name

    def token(self, name: str, *, audience: str = PROGRESS_AUDIENCE, bound: bool = True) -> str:
        arguments = ["create", "token", "default", f"--audience={audience}"]
        if bound:
            pod = self.jobs.get(name, "pod")["metadata"]
            arguments += ["--bound-object-kind=Pod", f"--bound-object-name={pod['name']}", f"--bound-object-uid={pod['uid']}"]
        return str(self.jobs.cluster.kubectl("-n", self.jobs.namespace, *arguments).stdout).strip()

    def post(self, token: str, body: Any = REPORT, *, name: str = "", attempt: int = 1) -> tuple[int, str]:
        ca = json.loads(
            self.jobs.cluster.kubectl("-n", self.operator.namespace, "get", "secret", self.operator.secret, "-o", "json").stdout
        )
        import base64

        context = ssl.create_default_context(cadata=base64.b64decode(ca["data"]["ca.crt"]).decode())
        path = f"/v1/namespaces/{self.jobs.namespace}/finetunejobs/{name or self.name}/attempts/{attempt}/progress"
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"https://127.0.0.1:{self.operator.progress_port}{path}", data=data, method="POST")
        request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, context=context, timeout=30) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@pytest.fixture
def poster(cluster: Cluster, operator: Operator, runner: PodRunner, namespace: str) -> Poster:
    jobs = Jobs(cluster, namespace)
    jobs.apply(manifest("mine"), manifest("other"))
    jobs.wait_state("mine", "Running")
    jobs.wait_state("other", "Running")
    return Poster(jobs, operator, "mine")


def test_the_pods_own_token_is_heard_and_shows_in_the_status(poster: Poster) -> None:
    pod = poster.jobs.wait_pod("mine-1")
    assert poster.post(poster.token(pod)) == (200, "{}")
    status = wait(lambda: poster.jobs.status("mine").get("trainerStatus"), "trainerStatus")
    assert status == REPORT["trainerStatus"]
    assert poster.jobs.condition("mine", "Progressing")["status"] == "True"


def test_everybody_else_is_refused(poster: Poster, cluster: Cluster) -> None:
    mine, other = poster.jobs.wait_pod("mine-1"), poster.jobs.wait_pod("other-1")
    assert poster.post("rubbish")[0] == 401
    assert poster.post(poster.token(mine, audience="https://kubernetes.default.svc"))[0] == 401
    assert poster.post(poster.token(mine, bound=False))[0] == 403
    assert poster.post(poster.token(other))[0] == 403
    assert poster.post(poster.token(mine), name="other")[0] == 403
    assert poster.post(poster.token(mine), name="absent")[0] == 403
    assert poster.post(poster.token(mine), attempt=2)[0] == 403
    # A pod that only claims to be of the job: our labels, but not our Job's. With the Job's own the Job controller would adopt and delete it.
    labels = {k: v for k, v in poster.jobs.get(mine, "pod")["metadata"]["labels"].items() if "finetune.dev" in k}
    forged = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "forged", "labels": labels},
        "spec": {"containers": [{"name": "trainer", "image": "x"}]},
    }
    cluster.kubectl("-n", poster.jobs.namespace, "apply", "-f", "-", stdin=json.dumps(forged))
    assert poster.post(poster.token("forged"))[0] == 403
    assert "trainerStatus" not in poster.jobs.status("mine")


def test_an_older_attempt_is_not_heard(poster: Poster, runner: PodRunner) -> None:
    pod = poster.jobs.wait_pod("mine-1")
    token = poster.token(pod)
    runner.finish(pod, 137)
    wait(lambda: poster.jobs.status("mine").get("attempt") == 2, "attempt 2")
    code, text = poster.post(token)
    # The API server refuses tokens of a pod that is gone; a finished pod that is still there is refused by us.
    assert code in (401, 409), text
    # Nor does the new attempt's pod speak for the old one.
    code, text = poster.post(poster.token(poster.jobs.wait_pod("mine-2")), attempt=1)
    assert (code, json.loads(text)["message"]) == (403, "the token is not of this attempt's pod")


def test_a_bad_body_is_told_with_the_field(poster: Poster) -> None:
    token = poster.token(poster.jobs.wait_pod("mine-1"))
    assert poster.post(token, b"{")[0] == 400
    code, text = poster.post(token, {"trainerStatus": {"progressPercentage": 101}})
    assert code == 400
    assert "trainerStatus.progressPercentage" in text
    assert poster.post(token, b"x" * 70_000)[0] == 413


def test_the_status_is_written_at_most_every_ten_seconds_for_progress_alone(poster: Poster, operator: Operator) -> None:
    token = poster.token(poster.jobs.wait_pod("mine-1"))
    assert poster.post(token)[0] == 200
    wait(lambda: poster.jobs.status("mine").get("trainerStatus"), "the first report")
    before = poster.jobs.get("mine")["metadata"]["resourceVersion"]
    for percent in range(50, 58):
        assert poster.post(token, {"trainerStatus": {"progressPercentage": percent}})[0] == 200
        time.sleep(0.3)
    assert poster.jobs.get("mine")["metadata"]["resourceVersion"] == before
    wait(lambda: poster.jobs.status("mine")["trainerStatus"]["progressPercentage"] == 57, "the last report")


def test_a_pod_that_posts_too_much_is_slowed_down(poster: Poster) -> None:
    token = poster.token(poster.jobs.wait_pod("mine-1"))
    codes = [poster.post(token)[0] for _ in range(40)]
    assert codes[0] == 200
    assert 429 in codes


def test_what_saving_costs_and_a_refused_checkpoint_reach_metrics_and_events(poster: Poster, operator: Operator) -> None:
    def metric(name: str) -> float:
        return operator.metric(name, namespace=poster.jobs.namespace)

    token = poster.token(poster.jobs.wait_pod("mine-1"))
    refused = {"checkpoint": "step-00000480-0002", "message": "model/model.safetensors differs from its manifest"}
    saving = {"saves": 2, "skipped": 1, "blockingSeconds": 1.5, "uploadSeconds": 8.0, "uploadedBytes": 4096}
    for more in ({}, {"saves": 3}, {"saves": 3}):
        assert poster.post(token, {**REPORT, "saving": saving | more, "corrupt": [refused]})[0] == 200
        time.sleep(1.0)
    wait(lambda: metric("finetune_checkpoint_saves_total") == 3, "three saves counted")
    assert metric("finetune_checkpoint_skipped_total") == 1
    assert metric("finetune_checkpoint_blocking_seconds_total") == 1.5
    assert metric("finetune_checkpoint_upload_seconds_total") == 8
    assert metric("finetune_checkpoint_uploaded_bytes_total") == 4096
    assert metric("finetune_checkpoint_age_seconds") > 0
    events = [e for e in poster.jobs.list("events") if e["reason"] == "CheckpointCorrupt"]
    assert [(e["type"], e["involvedObject"]["name"]) for e in events] == [("Warning", "mine")]
    assert all(word in events[0]["message"] for word in refused.values())
    for name in ("mine", "other"):
        poster.jobs.patch(name, {"stop": True})
        poster.jobs.wait_state(name, "Complete")
    assert (
        f'finetune_checkpoint_age_seconds{{name="mine",namespace="{poster.jobs.namespace}"}}' not in operator.http("metrics")[1]
    )
    assert metric("finetune_lost_work_seconds_total") >= 2
