"""The operator as the chart starts it in its other modes: the command line of the rendered Deployment, no right but those of the rendered
roles. What it was refused stands in the audit log of a cluster of its own.
"""

import json
import ssl
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from finetune_operator.control.tls import READ_FILES_SECONDS, make_ca, make_leaf
from finetune_operator.kube.permissions import PERMISSIONS
from integration.jobs import Jobs, Object, manifest, wait
from integration.sweeps import METRIC, sweep
from integration.test_operator_progress import Pod, percent, percentage
from testcluster import Cluster, PodRunner, PodScript, audit, hang, succeed
from testcluster.operator import Operator

ACCOUNT = "system:serviceaccount:finetune-system:finetune-operator"
ASKED_BY_ADMISSION = {("update", "finetune.dev", f"{kind}/finalizers") for kind in ("finetunejobs", "hyperparametersweeps")}
"""Of the operator, when it sets blockOwnerDeletion; no request of its own."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(audit=True) as running:
        yield running


def script(pod: Object) -> PodScript:
    labels = pod["metadata"]["labels"]
    again = labels.get("finetune.dev/job") == "pair" and labels["finetune.dev/attempt"] != "1"
    return succeed() if again else hang()


@pytest.fixture(scope="module")
def runner(cluster: Cluster) -> Iterator[PodRunner]:
    with PodRunner(cluster.kubeconfig, script) as running:
        yield running


def team(cluster: Cluster, name: str) -> Jobs:
    """A new namespace."""
    cluster.kubectl("create", "namespace", name)
    wait(lambda: cluster.kubectl("-n", name, "get", "serviceaccount", "default", check=False).returncode == 0, "the account")
    return Jobs(cluster, name)


def life(jobs: Jobs, runner: PodRunner) -> None:
    """What needs every right in the namespace: progress, a restart, a suspend that discards, several pods, a sweep that outlives its time."""
    jobs.apply(manifest("train"), manifest("pair", trainer={"numNodes": 2}, checkpoint={"onSuspend": "Discard"}))
    first = Pod(jobs, "train-1")
    runner.wait_running(first.name)
    jobs.wait_state("train", "Running")
    assert first.post(first.token(), percent(42)) == (200, {})
    wait(lambda: percentage(jobs) == 42, "progress in the status")
    runner.finish(first.name, 1)
    second = jobs.wait_pod("train-2")
    runner.wait_running(second)
    runner.finish(second)
    jobs.wait_state("pair", "Running")
    jobs.patch("pair", {"suspend": True})
    jobs.wait_state("pair", "Suspended")
    jobs.patch("pair", {"suspend": False})
    for name in ("train", "pair"):
        assert jobs.wait_state(name, "Complete")["attempt"] == 2
    search(jobs, runner)


def search(jobs: Jobs, runner: PodRunner) -> None:
    """A sweep of one trial, suspended once, from its manifest to its deletion."""
    jobs.apply(sweep("search", numTrials=1, ttlSecondsAfterFinished=0, pruneAlgorithm={"none": {}}))
    runner.wait_running(jobs.wait_pod("search-t0000-1"))
    for suspend in (True, False):
        jobs.cluster.kubectl(
            "-n", jobs.namespace, "patch", "hps", "search", "--type=merge", "-p", json.dumps({"spec": {"suspend": suspend}})
        )
        wait(lambda wanted=suspend: jobs.get("search-t0000")["spec"]["suspend"] == wanted, "the trial's suspend")  # type: ignore[misc]
        if suspend:
            jobs.wait_state("search-t0000", "Suspended")
    trial = jobs.wait_pod("search-t0000-2")
    runner.wait_running(trial)
    result = {"modelUri": "s3://models/search/model", "metrics": [{"name": METRIC, "value": "0.7"}]}
    runner.finish(trial, 0, json.dumps({"outcome": "Complete", "result": result}))
    closing = jobs.wait_pod("search-closing")
    runner.wait_running(closing)
    runner.finish(closing)
    wait(lambda: not jobs.list("hps"), "the deletion of the sweep")


# --------------------------------------------------------------------------------------------------- watchNamespaces --
def test_with_watched_namespaces_jobs_complete_there_and_nowhere_else(cluster: Cluster, runner: PodRunner) -> None:
    a, b, elsewhere = (team(cluster, name) for name in ("team-a", "team-b", "elsewhere"))
    operator = Operator(cluster, values=["watchNamespaces={team-a,team-b}"], arguments=["--restart-backoff-seconds=0.2"])
    operator.install()
    elsewhere.apply(manifest("before"))
    with operator:
        elsewhere.apply(manifest("after"))
        for jobs in (a, b):
            life(jobs, runner)
        assert operator.tracebacks() == []
        assert "forbidden" not in operator.log.read_text().lower()
    assert [job.get("status") for job in elsewhere.list("ftj")] == [None, None]
    assert elsewhere.list("jobs") == []
    asked = audit.requests(cluster.audit_log, ACCOUNT)
    assert [r for r in asked if r.refused] == []
    assert {r.namespace for r in asked} == {"", "team-a", "team-b", "finetune-system"}
    granted = {(verb, row.group, row.resource) for row in PERMISSIONS for verb in row.verbs}
    assert granted - {(r.verb, r.group, r.resource) for r in asked} == ASKED_BY_ADMISSION


# ------------------------------------------------------------------------------------------------------- cert-manager --
def renew(folder: Path, ca: tuple[bytes, bytes]) -> int:
    """What cert-manager's Secret mounts: CA, leaf and key of another issuer than the operator. The leaf's serial number."""
    certificate, key = make_leaf(*ca, ["127.0.0.1"])
    for name, content in (("ca.crt", ca[0]), ("tls.crt", certificate), ("tls.key", key)):
        (folder / f"{name}.new").write_bytes(content)
        (folder / f"{name}.new").replace(folder / name)
    return x509.load_pem_x509_certificate(certificate).serial_number


def served(operator: Operator) -> int:
    """The serial number of the leaf that the progress server shows."""
    shown = ssl.get_server_certificate(("127.0.0.1", operator.progress_port), timeout=10)
    return x509.load_pem_x509_certificate(shown.encode()).serial_number


def test_with_files_of_cert_manager_pods_trust_the_issuers_ca_and_a_new_leaf_serves(
    cluster: Cluster, runner: PodRunner, tmp_path: Path
) -> None:
    jobs = team(cluster, "certified")
    ca = make_ca()
    first = renew(tmp_path, ca)
    before = len(audit.requests(cluster.audit_log, ACCOUNT))
    values = ["progressTLS.certManager.enabled=true", "progressTLS.certManager.issuerRef.name=ca"]
    with Operator(cluster, values=values, arguments=[f"--tls-dir={tmp_path}"]) as operator:
        assert [word for word in operator.command() if word.startswith("--tls-")] == [
            "--tls-dir=/etc/finetune-operator/tls",
            f"--tls-dir={tmp_path}",
        ]
        jobs.apply(manifest("train"))
        pod = Pod(jobs, "train-1")
        runner.wait_running(pod.name)
        jobs.wait_state("train", "Running")
        assert pod.ca.strip() == ca[0].decode().strip(), "the pod must be told the issuer's CA"
        token = pod.token()
        assert pod.post(token, percent(10)) == (200, {})
        assert served(operator) == first

        second = renew(tmp_path, ca)
        wait(lambda: served(operator) == second, "the renewed leaf", READ_FILES_SECONDS + 20)
        assert pod.post(token, percent(20)) == (200, {}), "a pod of before trusts the new leaf"
        wait(lambda: percentage(jobs) == 20, "progress in the status")

        # A leaf whose key does not fit is told, and the old one serves on.
        (tmp_path / "tls.key").write_bytes(make_leaf(*ca, ["127.0.0.1"])[1])
        wait(lambda: "the certificate is not renewed" in operator.log.read_text(), "the log", READ_FILES_SECONDS + 20)
        assert served(operator) == second

        # Another issuer's pod is not fooled: it trusts the CA that it was told, and no other.
        pod.ca = make_ca()[0].decode()
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            pod.post(token, percent(30))
        assert operator.tracebacks() == []
    mine = audit.requests(cluster.audit_log, ACCOUNT)[before:]
    assert [r for r in mine if r.refused] == []
    assert "secrets" not in {r.resource for r in mine}, "it has a CA, and needs no Secret"
