"""The test cluster keeps the promises that every other integration test builds on: real answers, honest pods, nothing left running."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import botocore.exceptions
import pytest

import testcluster
from testcluster import Cluster, PodRunner, PodScript, RunProcess, S3Server, fail, hang, oom_killed, run_process, succeed
from testcluster.processes import start_time

SECONDS = 120.0
Pod = dict[str, Any]


def wait_for(what: str, ready: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """The first true answer."""
    end = time.monotonic() + seconds
    while not (answer := ready()):
        assert time.monotonic() < end, f"{what}: not after {seconds:.0f} s"
        time.sleep(0.05)
    return answer


def only(namespace: str, action: PodScript | RunProcess) -> Callable[[Pod], PodScript | RunProcess]:
    """A script for the pods of one namespace; what other tests left behind hangs."""
    return lambda pod: action if pod["metadata"]["namespace"] == namespace else hang()


def apply(cluster: Cluster, namespace: str, *objects: Pod) -> None:
    """Creates the objects in the namespace."""
    listed = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
    cluster.kubectl("-n", namespace, "create", "-f", "-", stdin=json.dumps(listed))


def job(name: str, **spec: Any) -> Pod:
    """A bare Job with one container that no scripted pod runs."""
    pod = {"restartPolicy": "Never", "containers": [{"name": "main", "image": "any"}]}
    meta = {"name": name}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": meta,
        "spec": {"backoffLimit": 0, **spec, "template": {"spec": pod}},
    }


def process_pod(name: str, program: str, **spec: Any) -> Pod:
    """A pod whose one container runs Python source; `container` adds to the container, the rest to the spec."""
    container = {
        "name": "main",
        "image": "python",
        "command": [sys.executable, "-c", textwrap.dedent(program)],
        **spec.pop("container", {}),
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"role": "trainer"}, "annotations": {"finetune.dev/attempt": "7"}},
        "spec": {"restartPolicy": "Never", "terminationGracePeriodSeconds": 5, "containers": [container], **spec},
    }


def get(cluster: Cluster, namespace: str, kind: str, name: str) -> Pod:
    """The object as it is now."""
    found: Pod = json.loads(cluster.kubectl("-n", namespace, "get", kind, name, "-o", "json").stdout)
    return found


def condition(found: Pod, kind: str) -> Pod | None:
    """The condition of that type, if it is true."""
    conditions: list[Pod] = found.get("status", {}).get("conditions") or []
    return next((entry for entry in conditions if entry["type"] == kind and entry["status"] == "True"), None)


def terminated(cluster: Cluster, namespace: str, name: str) -> Pod:
    """The terminated state of the pod's container, once it is there."""

    def look() -> Pod | None:
        statuses = get(cluster, namespace, "pod", name)["status"].get("containerStatuses") or [{}]
        state: Pod | None = statuses[0].get("state", {}).get("terminated")
        return state

    state: Pod = wait_for(f"end of pod {name}", look)
    return state


def test_the_cluster_answers(cluster: Cluster) -> None:
    assert cluster.kubectl("get", "--raw", "/readyz").stdout == "ok"
    version = json.loads(cluster.kubectl("version", "-o", "json").stdout)["serverVersion"]["gitVersion"]
    assert version.startswith("v1.34.")


def test_another_user_has_no_rights(cluster: Cluster, namespace: str) -> None:
    theirs = cluster.kubeconfig_for("alice", groups=["team"])
    refused = cluster.kubectl("-n", namespace, "get", "pods", f"--kubeconfig={theirs}", check=False)
    assert refused.returncode != 0
    assert 'User "alice" cannot list resource "pods"' in refused.stderr


def test_the_api_server_comes_back_with_its_data(cluster: Cluster, namespace: str) -> None:
    cluster.stop_component("kube-apiserver", kill=True)
    assert cluster.kubectl("get", "--raw", "/readyz", check=False).returncode != 0
    cluster.start_component("kube-apiserver")
    assert get(cluster, namespace, "namespace", namespace)["status"]["phase"] == "Active"


def test_a_job_completes(cluster: Cluster, namespace: str) -> None:
    with PodRunner(cluster.kubeconfig, only(namespace, succeed(seconds=0.1))):
        apply(cluster, namespace, job("good", completions=3, parallelism=3))
        done = wait_for("Complete", lambda: condition(get(cluster, namespace, "job", "good"), "Complete"))
    assert done["reason"] == "CompletionsReached"
    assert get(cluster, namespace, "job", "good")["status"]["succeeded"] == 3


def test_a_failing_pod_fails_its_job_and_tells_why(cluster: Cluster, namespace: str) -> None:
    with PodRunner(cluster.kubeconfig, only(namespace, fail(exit_code=23, message="no more disk"))):
        apply(cluster, namespace, job("bad"))
        failed = wait_for("Failed", lambda: condition(get(cluster, namespace, "job", "bad"), "Failed"))
        pods = json.loads(cluster.kubectl("-n", namespace, "get", "pods", "-l", "job-name=bad", "-o", "json").stdout)["items"]
    assert failed["reason"] == "BackoffLimitExceeded"
    state = pods[0]["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (state["exitCode"], state["reason"], state["message"]) == (23, "Error", "no more disk")


def test_an_oom_kill_looks_like_one(cluster: Cluster, namespace: str) -> None:
    with PodRunner(cluster.kubeconfig, only(namespace, oom_killed())):
        apply(cluster, namespace, process_pod("big", ""))
        state = terminated(cluster, namespace, "big")
    assert (state["exitCode"], state["reason"]) == (137, "OOMKilled")


def test_a_deleted_pod_ends_and_goes(cluster: Cluster, namespace: str) -> None:
    with PodRunner(cluster.kubeconfig, only(namespace, hang())) as runner:
        apply(cluster, namespace, process_pod("stays", ""))
        runner.wait_running("stays")
        cluster.kubectl("-n", namespace, "delete", "pod", "stays", "--wait=true", timeout=60)
    assert cluster.kubectl("-n", namespace, "get", "pod", "stays", check=False).returncode != 0


PROGRAM = """
    import json, os, pathlib
    env = {name: value for name, value in os.environ.items() if name.startswith("T_")}
    read = lambda name: pathlib.Path(os.environ[name]).read_text()
    pathlib.Path(os.environ["T_SCRATCH"], "made").write_text("by the pod")
    said = {"env": env, "config": read("T_CONFIG"), "secret": read("T_SECRET"), "labels": read("T_LABEL"), "token": read("T_TOKEN")}
    print(json.dumps(said))
    pathlib.Path(os.environ["FINETUNE_TERMINATION_LOG"]).write_text('{"outcome": "fine"}')
    raise SystemExit(7)
"""


def test_pods_of_a_namespace_that_ends_are_not_begun_anew(cluster: Cluster, namespace: str) -> None:
    with PodRunner(cluster.kubeconfig, only(namespace, hang())) as runner:
        apply(cluster, namespace, process_pod("left", "pass"))
        runner.wait_running("left")
    cluster.kubectl("delete", "namespace", namespace, "--wait=false")
    wait_for("the pod's deletion", lambda: "deletionTimestamp" in get(cluster, namespace, "pod", "left")["metadata"])
    with PodRunner(cluster.kubeconfig, only(namespace, RunProcess())):  # there is no token for it any more
        wait_for("the pod to go", lambda: not cluster.kubectl("-n", namespace, "get", "pods", "-o", "name").stdout)


def _volumes() -> dict[str, Any]:
    token = {"serviceAccountToken": {"path": "token", "audience": "finetune.dev/progress", "expirationSeconds": 600}}
    label = {"path": "role", "fieldRef": {"fieldPath": "metadata.labels['role']"}}
    return {
        "container": {
            "env": [
                {"name": "T_PLAIN", "value": "a value"},
                {"name": "T_TWICE", "value": "$(T_PLAIN), $$(T_PLAIN)"},
                {"name": "T_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                {"name": "T_ATTEMPT", "valueFrom": {"fieldRef": {"fieldPath": "metadata.annotations['finetune.dev/attempt']"}}},
                {"name": "T_KEY", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "id"}}},
                {"name": "T_SCRATCH", "value": "/scratch"},
                {"name": "T_CONFIG", "value": "/etc/settings/colour"},
                {"name": "T_SECRET", "value": "/etc/keys/id"},
                {"name": "T_LABEL", "value": "/etc/projected/role"},
                {"name": "T_TOKEN", "value": "/etc/projected/token"},
                {"name": "FINETUNE_TERMINATION_LOG", "value": "/dev/termination-log"},
            ],
            "envFrom": [{"configMapRef": {"name": "settings"}}],
            "volumeMounts": [
                {"name": "scratch", "mountPath": "/scratch"},
                {"name": "settings", "mountPath": "/etc/settings"},
                {"name": "keys", "mountPath": "/etc/keys"},
                {"name": "both", "mountPath": "/etc/projected"},
            ],
        },
        "volumes": [
            {"name": "scratch", "emptyDir": {}},
            {"name": "settings", "configMap": {"name": "settings"}},
            {"name": "keys", "secret": {"secretName": "keys"}},
            {"name": "both", "projected": {"sources": [token, {"downwardAPI": {"items": [label]}}]}},
        ],
    }


def test_a_process_gets_its_env_volumes_and_token(cluster: Cluster, namespace: str) -> None:
    settings = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "settings"},
        "data": {"colour": "blue", "T_FROM": "all"},
    }
    keys = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "keys"}, "stringData": {"id": "s3cret"}}
    with PodRunner(cluster.kubeconfig, only(namespace, run_process({}))) as runner:
        apply(cluster, namespace, settings, keys, process_pod("trainer", PROGRAM, **_volumes()))
        state = terminated(cluster, namespace, "trainer")
        said = json.loads(runner.log_of("trainer"))
        uid = get(cluster, namespace, "pod", "trainer")["metadata"]["uid"]
        review = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": said["token"], "audiences": ["finetune.dev/progress"]},
        }
        reviewed = json.loads(cluster.kubectl("create", "-f", "-", "-o", "json", stdin=json.dumps(review)).stdout)["status"]
    assert (state["exitCode"], state["reason"], state["message"]) == (7, "Error", '{"outcome": "fine"}')
    expected = {"T_PLAIN": "a value", "T_TWICE": "a value, $(T_PLAIN)", "T_NAME": "trainer", "T_ATTEMPT": "7", "T_KEY": "s3cret"}
    assert {name: said["env"].get(name) for name in expected} == expected
    assert said["env"]["T_FROM"] == "all"
    assert (said["config"], said["secret"], said["labels"]) == ("blue", "s3cret", "trainer")
    assert reviewed["authenticated"], reviewed
    assert reviewed["user"]["extra"]["authentication.kubernetes.io/pod-uid"] == [uid]


def test_a_process_gets_sigterm_when_its_pod_is_deleted(cluster: Cluster, namespace: str, tmp_path: Path) -> None:
    note = tmp_path / "note"
    program = f"""
        import pathlib, signal, sys, time
        def end(*_):
            pathlib.Path({str(note)!r}).write_text("asked to end")
            sys.exit(20)
        signal.signal(signal.SIGTERM, end)
        print("ready", flush=True)
        time.sleep(60)
    """
    with PodRunner(cluster.kubeconfig, only(namespace, run_process({}))) as runner:
        apply(cluster, namespace, process_pod("polite", program))
        runner.wait_running("polite")
        wait_for("the handler", lambda: "ready" in runner.log_of("polite"))
        cluster.kubectl("-n", namespace, "delete", "pod", "polite", "--wait=true", timeout=60)
    assert note.read_text() == "asked to end"


def test_a_killed_process_is_137(cluster: Cluster, namespace: str) -> None:
    with PodRunner(cluster.kubeconfig, only(namespace, run_process({}))) as runner:
        apply(cluster, namespace, process_pod("victim", "import time; time.sleep(60)"))
        runner.wait_running("victim")
        os.kill(runner.process_of("victim"), signal.SIGKILL)
        state = terminated(cluster, namespace, "victim")
    assert (state["exitCode"], state["reason"]) == (137, "Error")


HARNESS = """
    import sys, time
    from pathlib import Path
    from testcluster import Cluster, PodRunner, S3Server, run_process
    cluster, s3 = Cluster(), S3Server()
    cluster.start(), s3.start()
    parts = ("etcd", "kube-apiserver", "kube-controller-manager")
    print("servers", s3.pid, *(cluster.pid_of(part) for part in parts), flush=True)
    runner = PodRunner(cluster.kubeconfig, run_process)
    runner.start()
    cluster.kubectl("create", "-f", "-", stdin=sys.argv[1])
    runner.wait_running("left")
    print("pods", runner.process_of("left"), flush=True)
    time.sleep(120)
"""


def test_a_killed_harness_leaves_nothing_running(tmp_path: Path) -> None:
    source = str(Path(testcluster.__file__).parents[1])
    pod = json.dumps(process_pod("left", "import time; time.sleep(120)"))
    environment = {**os.environ, "PYTHONPATH": source, "TMPDIR": str(tmp_path)}
    harness = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HARNESS), pod], stdout=subprocess.PIPE, text=True, env=environment
    )
    started: dict[int, int] = {}
    kinds: dict[int, str] = {}
    try:
        assert harness.stdout is not None
        for _ in range(2):
            kind, *pids = harness.stdout.readline().split()
            kinds |= dict.fromkeys(map(int, pids), kind)
            started |= {int(pid): start_time(int(pid)) or 0 for pid in pids}
        assert len(started) == 5
        assert all(started.values())
        harness.kill()
        harness.wait()
        end = time.monotonic() + 10
        while (alive := _alive(started)) and time.monotonic() < end:
            time.sleep(0.05)
        assert {kinds[pid] for pid in alive} == set(), "still running after the harness was killed"
    finally:
        harness.kill()
        harness.wait()
        for pid in _alive(started):  # only after a failure: exactly those that this test started
            os.kill(pid, signal.SIGKILL)


def _alive(started: dict[int, int]) -> list[int]:
    return [pid for pid, ticks in started.items() if ticks and start_time(pid) == ticks]


def test_s3_refuses_the_second_writer(s3: S3Server) -> None:
    client, bucket = s3.client(), s3.create_bucket("second-writer")
    client.put_object(Bucket=bucket, Key="manifest", Body=b"first", IfNoneMatch="*")
    with pytest.raises(botocore.exceptions.ClientError) as refused:
        client.put_object(Bucket=bucket, Key="manifest", Body=b"second", IfNoneMatch="*")
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 412
    assert client.get_object(Bucket=bucket, Key="manifest")["Body"].read() == b"first"


def test_s3_refuses_a_wrong_checksum(s3: S3Server) -> None:
    client, bucket = s3.client(), s3.create_bucket("wrong-checksum")
    with pytest.raises(botocore.exceptions.ClientError) as refused:
        client.put_object(Bucket=bucket, Key="shard", Body=b"content", ChecksumCRC32="AAAAAA==")
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 400
    assert "Contents" not in client.list_objects_v2(Bucket=bucket)
