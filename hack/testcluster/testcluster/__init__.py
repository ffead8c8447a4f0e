"""A real Kubernetes control plane, a real S3 server and scripted pods for tests and for `make cluster`.

Why it exists: the operator is tested against a real API server and not against a hand-written one, on machines with neither a
container runtime nor root. etcd, kube-apiserver and kube-controller-manager run on free loopback ports. There is no
kubelet: `PodRunner` plays it, either from a script or by running the pod's own command as a local process.

Cluster and storage::

    with Cluster() as cluster:                    # start() and stop() do the same; ready in seconds once the binaries are built
        cluster.url, cluster.kubeconfig           # "https://127.0.0.1:PORT" and the Path of an admin kubeconfig file
        cluster.ca_file                           # Path of the CA certificate (PEM)
        cluster.kubectl("get", "jobs", "-A")      # -> subprocess.CompletedProcess[str]; raises on failure unless check=False
        cluster.kubeconfig_for("alice", groups=["team"])   # Path: client certificate of that user (RBAC tests)
        cluster.issue_server_certificate("progress", ["localhost", "127.0.0.1"])   # -> (cert Path, key Path) from the same CA
        cluster.stop_component("kube-apiserver"); cluster.start_component("kube-apiserver")   # outages; same port, same data
    Cluster(audit=True).audit_log                 # Path of the audit log (level Metadata), one JSON object a line
    audit.requests(cluster.audit_log, account)    # what one account asked for, and what it was refused
    Cluster(controllers=("pod-garbage-collector-controller",))   # more controllers than the default ones

    with S3Server() as s3:                        # versitygw: honours If-None-Match (412), verifies checksums (400)
        s3.endpoint, s3.access_key, s3.secret_key, s3.region
        s3.environment()                          # the AWS_* variables for a process
        s3.create_bucket("models")                # at least three characters
        s3.client()                               # boto3 S3 client, path-style addressing

Pods, scripted (the callback gets the pod as the API server sent it, a dict, once per pod)::

    def script(pod): return succeed(seconds=1, message='{"ok": true}')
    with PodRunner(cluster.kubeconfig, script):
        ...
    # succeed(seconds, message) fail(exit_code, message, seconds) oom_killed(seconds) evicted(seconds) disrupted(seconds, reason)
    # image_pull_backoff() unschedulable() hang(exit_code_on_term)   and the dataclass behind all of them: PodScript(...)

    runner.finish("pod-name", exit_code=3, message="...")   # ends a running scripted pod now (also one that hangs)
    runner.wait_running("pod-name", timeout=10)

Pods, as processes: the pod's own command with exactly its env and volumes, token included (details in `podspec`)::

    with PodRunner(cluster.kubeconfig, run_process, image_commands={"trainer:dev": [sys.executable, "-m", "trainer"]}) as runner:
        runner.process_of("pod-name")             # pid, for os.kill(pid, signal.SIGKILL)
        runner.oom_kill("pod-name")               # SIGKILL, reported as OOMKilled
        runner.log_of("pod-name")                 # what it printed so far
        runner.root_of("pod-name")                # Path that stands for "/" (its mounts, its termination log)

`script` may mix: `run_process` is itself a callback that answers `RunProcess()` for every pod. A callback that raises fails
its pod, and `PodRunner.stop()` raises what it raised.

pytest fixtures (tests/integration/conftest.py): `cluster` and `s3` (one per session), `namespace` (a fresh name per test, its
default service account is there), `kubectl` (callable), `helm_binary` (Path).

On the command line: `python -m testcluster up | down | status | binaries`.
"""

from testcluster.cluster import Cluster
from testcluster.pods import PodRunner
from testcluster.podscript import (
    PodScript,
    RunProcess,
    disrupted,
    evicted,
    fail,
    hang,
    image_pull_backoff,
    oom_killed,
    run_process,
    succeed,
    unschedulable,
)
from testcluster.s3 import S3Server

__all__ = [
    "Cluster",
    "PodRunner",
    "PodScript",
    "RunProcess",
    "S3Server",
    "disrupted",
    "evicted",
    "fail",
    "hang",
    "image_pull_backoff",
    "oom_killed",
    "run_process",
    "succeed",
    "unschedulable",
]
