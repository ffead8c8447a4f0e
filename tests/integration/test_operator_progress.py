"""The progress server over restarts and re-created jobs, asked as pods ask it: the URL and the CA out of the pod's own spec.

test_progress.py holds who is refused and how often is written; this file what happens when things change under a pod.
"""

import json
import os
import signal
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from finetune_api import names
from integration.jobs import Jobs, Object, manifest, wait
from testcluster import Cluster, PodRunner, hang
from testcluster.operator import Operator


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One of their own: they stop and kill the operator in the middle."""
    with Cluster() as running:
        yield running


@pytest.fixture(scope="module")
def operator(cluster: Cluster) -> Iterator[Operator]:
    with Operator(cluster, arguments=["--restart-backoff-seconds=0.2"]) as running:
        yield running
        assert running.tracebacks() == []


@pytest.fixture(scope="module")
def runner(cluster: Cluster) -> Iterator[PodRunner]:
    with PodRunner(cluster.kubeconfig, lambda _pod: hang(20)) as running:
        yield running


@pytest.fixture
def jobs(cluster: Cluster, operator: Operator, runner: PodRunner, namespace: str) -> Jobs:
    return Jobs(cluster, namespace)


class Pod:
    """What a trainer's pod has: the server's address and CA, and a token that is bound to it."""

    def __init__(self, jobs: Jobs, child: str) -> None:
        self.jobs = jobs
        self.name = jobs.wait_pod(child)
        self.object = jobs.get(self.name, "pod")
        env = {e["name"]: e.get("value", "") for e in self.object["spec"]["containers"][0]["env"]}
        self.url = env[names.ENV_PROGRESS_URL]
        self.ca = self.object["metadata"]["annotations"][names.ANNOTATION_PROGRESS_CA]

    def token(self, audience: str = names.PROGRESS_AUDIENCE, *, bound: bool = True) -> str:
        uid = self.object["metadata"]["uid"]
        to_pod = ["--bound-object-kind=Pod", f"--bound-object-name={self.name}", f"--bound-object-uid={uid}"]
        arguments = ["create", "token", "default", f"--audience={audience}", *(to_pod if bound else [])]
        return self.jobs.cluster.kubectl("-n", self.jobs.namespace, *arguments).stdout.strip()

    def post(self, token: str | None, body: object = None, *, url: str = "", raw: bytes | None = None) -> tuple[int, Object]:
        """Status and answer."""
        data = raw if raw is not None else json.dumps(body if body is not None else percent(1)).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        request = urllib.request.Request(url or self.url, data, headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=30, context=ssl.create_default_context(cadata=self.ca)) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())


def percent(value: int) -> Object:
    return {"trainerStatus": {"progressPercentage": value, "metrics": [{"name": "loss", "value": "0.5"}]}}


@pytest.fixture
def pod(jobs: Jobs, runner: PodRunner) -> Pod:
    """The running pod of the job `train`."""
    jobs.apply(manifest("train"))
    found = Pod(jobs, "train-1")
    runner.wait_running(found.name)
    jobs.wait_state("train", "Running")
    return found


def percentage(jobs: Jobs, name: str = "train") -> int | None:
    found: int | None = (jobs.status(name).get("trainerStatus") or {}).get("progressPercentage")
    return found


def test_a_report_reaches_the_status(pod: Pod, jobs: Jobs, operator: Operator) -> None:
    before = operator.metric("finetune_progress_posts_total", code="200")
    token = pod.token()
    assert pod.post(token, percent(42)) == (200, {})
    wait(lambda: percentage(jobs) == 42, "progress in the status")
    assert jobs.condition("train", "Progressing")["status"] == "True"
    assert jobs.status("train")["trainerStatus"]["lastUpdatedTime"]
    assert operator.metric("finetune_progress_posts_total", code="200") == before + 1
    assert token not in operator.log.read_text()


def test_without_a_token_or_in_another_namespace_nobody_is_heard(pod: Pod, jobs: Jobs) -> None:
    assert pod.post(None)[0] == 401
    status, answer = pod.post(pod.token(), url=pod.url.replace(f"/namespaces/{jobs.namespace}/", "/namespaces/default/"))
    assert (status, answer["message"]) == (403, "the token is of another namespace")


def test_the_pod_of_an_older_attempt_is_told_so(pod: Pod, jobs: Jobs, runner: PodRunner) -> None:
    token = pod.token()
    runner.finish(pod.name, 1)
    now = Pod(jobs, "train-2")
    wait(lambda: jobs.status("train").get("attempt") == 2, "attempt 2")
    status, answer = pod.post(token)
    assert status == 409
    assert "attempt 1 is over" in answer["message"]
    assert now.post(now.token())[0] == 200


def test_a_pod_that_posts_too_often_is_slowed_and_the_others_are_not(pod: Pod, jobs: Jobs) -> None:
    jobs.apply(manifest("calm"))
    calm = Pod(jobs, "calm-1")
    token = pod.token()
    codes = [pod.post(token)[0] for _ in range(40)]
    assert codes[0] == 200
    assert codes.count(429) > 0
    assert set(codes) == {200, 429}
    assert calm.post(calm.token())[0] == 200


def test_a_pod_goes_on_posting_after_the_operator_was_killed(pod: Pod, jobs: Jobs, operator: Operator) -> None:
    token = pod.token()
    assert pod.post(token, percent(10))[0] == 200
    operator.kill()
    operator.start()
    assert pod.post(token, percent(20)) == (200, {}), "the CA must be the one that the pod was given"
    wait(lambda: percentage(jobs) == 20, "progress after the restart")


def test_what_a_pod_was_told_is_taken_is_in_the_status_when_the_operator_has_ended(
    pod: Pod, jobs: Jobs, operator: Operator
) -> None:
    """The second report waits for its turn: whoever leads next would not have it."""
    token = pod.token()
    assert pod.post(token, percent(30))[0] == 200
    wait(lambda: percentage(jobs) == 30, "progress in the status")
    assert pod.post(token, percent(31))[0] == 200
    assert operator.stop() < 5
    assert percentage(jobs) == 31
    operator.start()


def test_a_job_made_anew_under_a_name_does_not_inherit_progress(pod: Pod, jobs: Jobs, operator: Operator) -> None:
    pod.post(pod.token(), percent(77))
    wait(lambda: percentage(jobs) == 77, "progress")
    with paused(operator):
        jobs.cluster.kubectl("-n", jobs.namespace, "delete", "ftj", "train")
        wait(lambda: not jobs.list("jobs") and not jobs.list("pods"), "children gone")
        jobs.apply(manifest("train"))
    jobs.wait_state("train", "Running")
    time.sleep(1.0)
    assert percentage(jobs) is None


class paused:  # noqa: N801  (used as a function)
    """The operator is not dead, it only sees nothing for a while: as on an overloaded node."""

    def __init__(self, operator: Operator) -> None:
        assert operator.process is not None
        self.pid = operator.process.pid

    def __enter__(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def __exit__(self, *_: object) -> None:
        os.kill(self.pid, signal.SIGCONT)


def test_a_job_made_anew_under_the_name_of_a_finished_one_is_followed(
    pod: Pod, jobs: Jobs, operator: Operator, runner: PodRunner
) -> None:
    runner.finish(pod.name, 0)
    jobs.wait_state("train", "Complete")
    with paused(operator):
        jobs.cluster.kubectl("-n", jobs.namespace, "delete", "ftj", "train")
        wait(lambda: not jobs.list("jobs") and not jobs.list("pods"), "children gone")
        jobs.apply(manifest("train"))
    again = jobs.wait_pod("train-1")
    runner.wait_running(again)
    runner.finish(again, 0)
    jobs.wait_state("train", "Complete")
