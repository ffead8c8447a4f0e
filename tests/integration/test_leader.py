"""Two operators, one Lease: one writes, the other stands by, passes progress on, and takes over when the first is gone.

A cluster of its own with an audit log: what counts is what the API server was asked to write, and by which of the two processes.
"""

import base64
import json
import os
import random
import re
import signal
import subprocess
from collections.abc import Iterator

import pytest
import yaml

from finetune_operator.domain.election import ANNOTATION_ADDRESS
from integration.jobs import Jobs, Object, manifest, wait
from integration.test_operator_progress import Pod, percent, percentage
from testcluster import Cluster, PodRunner, PodScript, hang, succeed
from testcluster.operator import Operator

LEASE = "finetune-operator"
SECONDS = 5
"""Long enough that a busy machine does not lose the lease, short enough to wait for."""
FLAGS = [f"--lease={LEASE}", f"--lease-seconds={SECONDS}", "--pod-ip=127.0.0.1", "--restart-backoff-seconds=0.2"]
TAKEN_OVER = 30.0
WRITES = {"create", "update", "patch", "delete", "deletecollection"}
QUESTIONS = {"tokenreviews", "selfsubjectaccessreviews"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(audit=True) as running:
        yield running


def script(pod: Object) -> PodScript:
    return hang(60) if pod["metadata"]["labels"].get("finetune.dev/job") == "train" else succeed(0.3)


@pytest.fixture(scope="module")
def runner(cluster: Cluster) -> Iterator[PodRunner]:
    with PodRunner(cluster.kubeconfig, script) as running:
        yield running


@pytest.fixture(scope="module")
def both(cluster: Cluster) -> Iterator[list[Operator]]:
    operators = [Operator(cluster, arguments=[*FLAGS, f"--pod-name=operator-{n}"]) for n in "ab"]
    for one in operators:
        one.install()
    yield operators
    for one in operators:
        one.stop()
    assert [one.tracebacks() for one in operators] == [[], []]


class Pair:
    """The operator that leads, and the one that stands by."""

    def __init__(self, both: list[Operator]) -> None:
        for one in both:
            if one.process is None:
                one.start()
        self.leader = wait(lambda: leading(both), "a leader", TAKEN_OVER)
        self.standby = next(one for one in both if one is not self.leader)


@pytest.fixture
def pair(both: list[Operator]) -> Pair:
    return Pair(both)


@pytest.fixture
def jobs(cluster: Cluster, pair: Pair, runner: PodRunner) -> Iterator[Jobs]:
    name = f"leader-{random.randrange(10**8):08d}"
    cluster.kubectl("create", "namespace", name)
    wait(lambda: cluster.kubectl("-n", name, "get", "serviceaccount", "default", check=False).returncode == 0, "the account")
    yield Jobs(cluster, name)
    cluster.kubectl("delete", "namespace", name, "--wait=false", check=False)


def leading(both: list[Operator]) -> Operator | None:
    """The one that says that it leads and whose name is on the Lease."""
    found = [one for one in both if one.process is not None and one.metric("finetune_leader") == 1.0]
    assert len(found) < 2
    return found[0] if found and holder(found[0].cluster).startswith(pod_name(found[0])) else None


def pod_name(operator: Operator) -> str:
    return operator.arguments[-1].partition("=")[2]


def lease(cluster: Cluster) -> Object:
    found: Object = json.loads(cluster.kubectl("-n", "finetune-system", "get", "lease", LEASE, "-o", "json").stdout)
    return found


def holder(cluster: Cluster) -> str:
    return str(lease(cluster)["spec"].get("holderIdentity") or "")


def writes(operator: Operator) -> list[str]:
    """Everything that the API server was asked to write with the token of this operator, in order."""
    token = yaml.safe_load(operator.kubeconfig.read_text())["users"][0]["user"]["token"].split(".")[1]
    credential = f"JTI={json.loads(base64.urlsafe_b64decode(token + '=='))['jti']}"
    found = []
    for line in operator.cluster.audit_log.read_text().splitlines():
        event = json.loads(line)
        about = event.get("objectRef") or {}
        theirs = (event["user"].get("extra") or {}).get("authentication.kubernetes.io/credential-id") == [credential]
        if theirs and event["verb"] in WRITES and about.get("resource") not in QUESTIONS:
            found.append(f"{event['verb']} {about.get('resource')}/{about.get('subresource', '')} {about.get('name')}")
    return found


def exit_code(operator: Operator) -> int:
    """Of an operator that ends by itself."""
    assert operator.process is not None
    code = operator.process.process.wait(TAKEN_OVER)
    operator.kill()
    return code


def each_ran_once(jobs: Jobs, names: list[str]) -> None:
    wait(lambda: {j.get("status", {}).get("state") for j in jobs.list("ftj")} == {"Complete"}, "all Complete")
    assert sorted(j["metadata"]["name"] for j in jobs.list("jobs")) == [f"{name}-1" for name in sorted(names)]
    assert {(j["status"]["attempt"], j["status"]["restarts"]) for j in jobs.list("ftj")} == {(1, 0)}


def test_one_leads_and_only_that_one_writes(jobs: Jobs, pair: Pair, cluster: Cluster) -> None:
    jobs.apply(manifest("one"), manifest("two"))
    each_ran_once(jobs, ["one", "two"])
    assert lease(cluster)["metadata"]["annotations"][ANNOTATION_ADDRESS] == f"127.0.0.1:{pair.leader.progress_port}"
    assert {one.http("readyz")[0] for one in (pair.leader, pair.standby)} == {200}
    assert pair.standby.metric("finetune_leader") == 0.0
    assert [w for w in writes(pair.leader) if w.startswith("create jobs")]
    # The CA of the progress server is made by the one that starts first.
    assert [w for w in writes(pair.standby) if "secrets" not in w] == []


def test_killed_the_other_takes_over_and_nothing_is_made_twice(jobs: Jobs, pair: Pair, both: list[Operator]) -> None:
    names = [f"job-{n:02d}" for n in range(20)]
    jobs.apply(*(manifest(name) for name in names[:10]))
    pair.leader.kill()
    jobs.apply(*(manifest(name) for name in names[10:]))
    each_ran_once(jobs, names)
    assert leading(both) is pair.standby


def test_asked_to_end_the_leader_gives_the_lease_back(jobs: Jobs, pair: Pair, both: list[Operator], cluster: Cluster) -> None:
    assert pair.leader.process is not None
    process, before = pair.leader.process.process, holder(cluster)
    assert pair.leader.stop() < 5.0
    assert process.returncode == 0
    # No waiting here: it is not the end of the lease that makes it free.
    assert holder(cluster) != before
    jobs.apply(manifest("next"))
    each_ran_once(jobs, ["next"])
    assert leading(both) is pair.standby


def test_asked_to_end_a_standby_ends_too(pair: Pair, both: list[Operator]) -> None:
    assert pair.standby.process is not None
    process = pair.standby.process.process
    assert pair.standby.stop() < 5.0
    assert process.returncode == 0
    assert leading(both) is pair.leader


def test_stopped_beyond_its_lease_it_writes_nothing_more_and_ends(jobs: Jobs, pair: Pair, cluster: Cluster) -> None:
    frozen, other = pair.leader, pair.standby
    assert frozen.process is not None
    os.kill(frozen.process.pid, signal.SIGSTOP)
    wait(lambda: other.metric("finetune_leader") == 1.0, "the standby leads", TAKEN_OVER)
    before = writes(frozen)
    # Nobody does this work before the frozen one wakes up and sees it.
    other.stop()
    jobs.apply(manifest("tempting"))
    os.kill(frozen.process.pid, signal.SIGCONT)
    assert exit_code(frozen) == 1
    assert writes(frozen) == before
    assert "somebody else may lead by now" in frozen.log.read_text()
    assert jobs.list("jobs") == []
    other.start()
    each_ran_once(jobs, ["tempting"])


def test_who_finds_another_name_on_the_lease_ends(pair: Pair, cluster: Cluster) -> None:
    patch = json.dumps({"spec": {"holderIdentity": "somebody", "leaseDurationSeconds": 1}})
    cluster.kubectl("-n", "finetune-system", "patch", "lease", LEASE, "--type=merge", "-p", patch)
    assert exit_code(pair.leader) == 1
    assert "is held by somebody" in pair.leader.log.read_text()


def to(operator: Operator, url: str) -> str:
    """The same URL at another operator."""
    return re.sub(r":\d+/", f":{operator.progress_port}/", url, count=1)


@pytest.fixture
def pod(jobs: Jobs, runner: PodRunner) -> Pod:
    jobs.apply(manifest("train"))
    found = Pod(jobs, "train-1")
    runner.wait_running(found.name)
    jobs.wait_state("train", "Running")
    return found


def test_a_standby_passes_progress_on_and_answers_as_the_leader_does(pod: Pod, jobs: Jobs, pair: Pair) -> None:
    url = to(pair.standby, pod.url)
    # One that has just begun does not know the leader yet, and says 503: the trainer posts again.
    wait(lambda: pod.post(pod.token(), percent(42), url=url) == (200, {}), "the standby knows the leader", TAKEN_OVER)
    wait(lambda: percentage(jobs) == 42, "progress in the status")
    assert pair.standby.metric("finetune_progress_forwarded_total", code="200") == 1.0
    for token, body in ((None, None), ("no-token", None), (pod.token(), {"trainerStatus": 1})):
        assert pod.post(token, body, url=url) == pod.post(token, body, url=to(pair.leader, pod.url))
    assert pair.leader.metric("finetune_progress_forwarded_total") == 0.0


def test_the_rights_on_the_lease_are_asked_for_where_one_is_named(both: list[Operator], cluster: Cluster) -> None:
    command = [word for word in both[0].command() if "-bind" not in word and "--lease=" not in word]
    command += ["--metrics-bind=127.0.0.1:0", "--progress-bind=127.0.0.1:0", "--lease=another"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    for verb in ("get", "patch"):
        assert f"{verb} leases.coordination.k8s.io another in finetune-system" in done.stderr
    assert "create leases" not in done.stderr
