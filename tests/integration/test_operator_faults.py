"""Faults: the API server goes away, the operator is killed again and again, a quota is in the way, the start is not possible.

A cluster of its own: stopping the API server would disturb every other test.
"""

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from integration.jobs import Jobs, manifest, wait
from testcluster import Cluster, PodRunner, PodScript, hang, succeed
from testcluster.operator import Operator


@pytest.fixture(scope="module")
def own() -> Iterator[Cluster]:
    with Cluster() as running:
        yield running


def script(pod: dict[str, dict[str, dict[str, str]]]) -> PodScript:
    return hang(60) if pod["metadata"]["labels"].get("finetune.dev/job", "").startswith("hangs") else succeed(0.3)


@pytest.fixture
def runner(own: Cluster) -> Iterator[PodRunner]:
    """Of each test its own: without an API server there is nothing that it could play on."""
    with PodRunner(own.kubeconfig, script) as running:
        yield running


@pytest.fixture(scope="module")
def operator(own: Cluster) -> Iterator[Operator]:
    with Operator(own, arguments=["--restart-backoff-seconds=0.2"]) as running:
        yield running
        assert running.tracebacks() == []


@pytest.fixture
def jobs(own: Cluster, operator: Operator) -> Iterator[Jobs]:
    name = f"faults-{random.randrange(10**8):08d}"
    own.kubectl("create", "namespace", name)
    wait(lambda: own.kubectl("-n", name, "get", "serviceaccount", "default", check=False).returncode == 0, "the account")
    yield Jobs(own, name)
    own.kubectl("delete", "namespace", name, "--wait=false", check=False)


def bring_back(own: Cluster) -> None:
    """The API server, and controllers that do not sit out their clients' backoff of half a minute and more."""
    own.start_component("kube-apiserver")
    own.stop_component("kube-controller-manager", kill=True)
    own.start_component("kube-controller-manager")


def test_killed_again_and_again_each_job_runs_once(jobs: Jobs, operator: Operator, runner: PodRunner) -> None:
    count = 40
    jobs.apply(*(manifest(f"job-{n:02d}") for n in range(count)))
    for _ in range(4):
        time.sleep(random.uniform(0.05, 0.6))  # somewhere between creating a Job and writing the status
        operator.kill()
        operator.start()
    wait(lambda: all(j.get("status", {}).get("state") == "Complete" for j in jobs.list("ftj")), f"{count} Complete")
    assert sorted(j["metadata"]["name"] for j in jobs.list("jobs")) == [f"job-{n:02d}-1" for n in range(count)]
    assert {(j["status"]["attempt"], j["status"]["restarts"]) for j in jobs.list("ftj")} == {(1, 0)}


def test_an_outage_of_the_api_server_is_survived(jobs: Jobs, operator: Operator, own: Cluster) -> None:
    with PodRunner(own.kubeconfig, script) as runner:
        jobs.apply(manifest("hangs-on"))
        pod = jobs.wait_pod("hangs-on-1")
        runner.wait_running(pod)
        jobs.wait_state("hangs-on", "Running")
    assert operator.process is not None
    before = operator.process.pid
    own.stop_component("kube-apiserver", kill=True)
    try:
        time.sleep(4)
        assert operator.http("healthz")[0] == 200, "a restart would not bring the API server back"
    finally:
        bring_back(own)
    with PodRunner(own.kubeconfig, script) as runner:
        jobs.apply(manifest("new"))
        jobs.wait_state("new", "Complete")  # the resync comes after minutes: the watches must be back
        runner.wait_running(pod)
        runner.finish(pod, 0)
        jobs.wait_state("hangs-on", "Complete")
    assert operator.process.pid == before
    assert operator.process.process.poll() is None
    assert jobs.status("hangs-on")["restarts"] == 0


def test_sigterm_during_an_outage_ends_within_five_seconds(jobs: Jobs, operator: Operator, own: Cluster) -> None:
    jobs.apply(*(manifest(f"hangs-{n}") for n in range(5)))
    wait(lambda: len(jobs.list("pods")) == 5, "5 pods")
    own.stop_component("kube-apiserver", kill=True)
    try:
        time.sleep(1.0)
        assert operator.stop() < 5.0
    finally:
        bring_back(own)
        operator.start()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_end_it_ends_well(operator: Operator, number: signal.Signals) -> None:
    assert operator.process is not None
    process = operator.process.process
    try:
        started = time.monotonic()
        os.kill(process.pid, number)
        assert process.wait(10) == 0
        assert time.monotonic() - started < 5.0
    finally:
        operator.kill()
        operator.start()


def test_a_quota_is_told_and_the_job_goes_on_when_it_is_raised(jobs: Jobs, own: Cluster, runner: PodRunner) -> None:
    own.kubectl("-n", jobs.namespace, "create", "quota", "full", "--hard=count/jobs.batch=0")
    # The test cluster has no quota controller, which would count what is there.
    counted = '{"status": {"hard": {"count/jobs.batch": "0"}, "used": {"count/jobs.batch": "0"}}}'
    own.kubectl("-n", jobs.namespace, "patch", "quota", "full", "--subresource=status", "--type=merge", "-p", counted)
    jobs.apply(manifest("waits"))
    wait(lambda: jobs.condition("waits", "Running").get("reason") == "CreateRefused", "CreateRefused")
    assert "exceeded quota: full" in jobs.condition("waits", "Running")["message"]
    assert jobs.status("waits")["attempt"] == 0
    own.kubectl("-n", jobs.namespace, "delete", "quota", "full")
    jobs.wait_state("waits", "Complete")
    assert jobs.status("waits")["attempt"] == 1


def test_applied_while_the_operator_was_down_is_run(jobs: Jobs, operator: Operator, runner: PodRunner) -> None:
    operator.kill()
    try:
        jobs.apply(manifest("early"))
    finally:
        operator.start()
    jobs.wait_state("early", "Complete")


# ------------------------------------------------------------------------------------------------------- the start ---
def run(operator: Operator, **replaced: str) -> "subprocess.CompletedProcess[str]":
    """A second operator with other flags, which must end by itself."""
    flags = {"--metrics-bind": "127.0.0.1:0", "--progress-bind": "127.0.0.1:0", **replaced}
    command = [word for word in operator.command() if word.partition("=")[0] not in flags]
    command += [f"{flag}={value}" for flag, value in flags.items()]
    environment = {k: v for k, v in os.environ.items() if k != "KUBECONFIG"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


def sentence(done: "subprocess.CompletedProcess[str]", code: int = 1) -> str:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_without_an_api_server_it_says_so(operator: Operator, tmp_path: Path) -> None:
    config = yaml.safe_load(operator.kubeconfig.read_text())
    config["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:1"
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    assert "does not answer" in sentence(run(operator, **{"--kubeconfig": str(path)}))


def test_without_its_secret_it_says_which(operator: Operator, own: Cluster) -> None:
    own.kubectl("-n", operator.namespace, "delete", "secret", operator.secret)
    try:
        said = sentence(run(operator))
        assert f"The Secret {operator.namespace}/{operator.secret} does not exist" in said
    finally:
        operator.install()


def test_another_secret_is_a_missing_right(operator: Operator) -> None:
    said = sentence(run(operator, **{"--tls-secret": "somebody-elses"}))
    assert f"get secrets somebody-elses in {operator.namespace}" in said


def test_a_port_that_is_taken_is_said(operator: Operator) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = sentence(run(operator, **{"--metrics-bind": f"127.0.0.1:{taken.getsockname()[1]}"}))
    assert "cannot listen" in said


def test_a_wrong_flag_is_exit_code_2(operator: Operator) -> None:
    assert "--progress-url" in sentence(run(operator, **{"--progress-url": "http://x"}), 2)
