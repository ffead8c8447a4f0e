"""`make cluster`: a cluster to play in, with the operator, an S3 server and the example's data.

On a machine where a real node can run (root, see sandbox.py) pods are containers of our images and the operator is installed with Helm.
Elsewhere, or with NODE=0, pods run as processes of this machine.

`up` leaves a supervisor running that owns everything: ending it ends all. Its pid and start time stand in a file, so that `down` ends
that process and no other that got its number.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from testcluster import PodRunner, binaries, images, run_process, sandbox
from testcluster.cluster import Cluster
from testcluster.node import ADDRESS, Node
from testcluster.operator import Operator
from testcluster.processes import is_running, start_time
from testcluster.s3 import S3Server

IMAGE = "finetune-trainer"
ROOT = Path(__file__).parents[3]
EXAMPLE = "customer-feedback"
MODELS, SYSTEM, RELEASE = "finetune-models", "finetune-system", "finetune-operator"


def _state_file() -> Path:
    return binaries.cache_dir() / "cluster" / "state.json"


def _running() -> dict[str, str] | None:
    try:
        state: dict[str, str] = json.loads(_state_file().read_text())
    except FileNotFoundError:
        return None
    return state if is_running(int(state["pid"]), int(state["started"])) else None


def up(*, node: bool) -> int:
    """The exit code. `node`: with a real node, where one can run."""
    if state := _running():
        print(f"The cluster is up already.\n{state['hello']}")
        return 0
    command = [sys.executable, "-m", "testcluster"]
    _pretrained()  # now: a sandbox has no way to a package index
    if node and _node_can_run():
        images.prepare()
        binaries.ensure()
        command = [sys.executable, "-m", "testcluster.sandbox", "--uplink", *command, "supervise-node"]
    else:
        binaries.ensure([name for name in binaries.PROGRAMS if name not in binaries.NODE])
        command += ["supervise"]
    folder = _state_file().parent
    folder.mkdir(parents=True, exist_ok=True)
    _state_file().unlink(missing_ok=True)
    log = folder / "supervisor.log"
    with log.open("wb") as out:
        child = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True)
    while (state := _running()) is None:
        if child.poll() is not None:
            print(f"The cluster did not start:\n{log.read_text()[-3000:]}", file=sys.stderr)
            return 1
        time.sleep(0.2)
    print(state["hello"])
    return 0


def _node_can_run() -> bool:
    try:
        sandbox.check()
    except sandbox.NoSandboxError as error:
        print(f"{error} Pods will run as processes of this machine.", file=sys.stderr)
        return False
    return True


def supervise() -> int:
    """Owns a control plane without a node until SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    python = {IMAGE: [sys.executable]}
    # Pods are processes of this machine, so that a folder of this machine can be the model mirror.
    mirror = f"--model-mirror={_pretrained()}"
    with (
        Cluster() as cluster,
        S3Server() as s3,
        Operator(cluster, trainer_image=IMAGE, arguments=[mirror]) as operator,
        PodRunner(cluster.kubeconfig, run_process, image_commands=python),
    ):
        _fill(cluster, s3)
        _say_hello(cluster, s3, "pods run as processes of this machine", f"operator log: {operator.log}")
        while True:
            signal.pause()


def supervise_node() -> int:
    """Owns a real node until SIGTERM; in a sandbox with an uplink."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with Node() as node, S3Server(host=ADDRESS) as s3:
        images.load()
        cluster = node.cluster
        s3.create_bucket(MODELS)
        mirror = _pretrained()
        for file in (path for path in mirror.rglob("*") if path.is_file()):
            s3.client().upload_file(str(file), MODELS, str(file.relative_to(mirror)))
        _fill(cluster, s3)
        repository, _, tag = images.name_of("operator").rpartition(":")
        values = {
            "image": {"repository": repository, "tag": tag},
            "jobDefaults": {"image": images.name_of("trainer"), "modelMirror": f"s3://{MODELS}"},
        }
        words = ["upgrade", "--install", RELEASE, str(ROOT / "charts/finetune-operator"), "-n", SYSTEM, "--create-namespace"]
        command = [str(binaries.ensure(["helm"])["helm"]), *words, "--wait", f"--kubeconfig={cluster.kubeconfig}", "--values=-"]
        subprocess.run(command, input=json.dumps(values), text=True, check=True, stdout=subprocess.DEVNULL)
        log = f"operator log: kubectl -n {SYSTEM} logs deployment/{RELEASE}"
        _say_hello(cluster, s3, "one real node, 8 pretended GPUs, the operator installed with Helm", log)
        while True:
            signal.pause()


def _pretrained() -> Path:
    fetched = subprocess.run([sys.executable, ROOT / "hack/minilm.py"], stdout=subprocess.PIPE, text=True, check=True)
    return Path(fetched.stdout.strip())


def _fill(cluster: Cluster, s3: S3Server) -> None:
    """What the example asks for: credentials and data."""
    credentials = [f"--from-literal={name}={value}" for name, value in s3.environment().items()]
    cluster.kubectl("create", "secret", "generic", "s3-credentials", *credentials)
    s3.create_bucket(EXAMPLE)
    for file in (ROOT / "examples" / EXAMPLE / "data").glob("*.csv"):
        s3.client().upload_file(str(file), EXAMPLE, f"data/{file.name}")


def _say_hello(cluster: Cluster, s3: S3Server, kind: str, log: str) -> None:
    kubectl = binaries.ensure(["kubectl"])["kubectl"]
    hello = (
        f"Kubernetes with the operator is up: {kind}. Stop it with `make cluster-down`.\n"
        f"  export KUBECONFIG={cluster.kubeconfig}\n"
        f"  alias kubectl={kubectl}\n"
        f"  S3: {s3.endpoint} (key {s3.access_key}, secret {s3.secret_key}); buckets are folders of {s3.directory / 'data'}\n"
        f"  the Secret s3-credentials in namespace default has the same; {log}\n"
        f"Try it: kubectl apply -f examples/{EXAMPLE}/finetunejob.yaml && kubectl get ftj -w"
    )
    pid, started = sandbox.outer() if sandbox.inside() else (os.getpid(), start_time(os.getpid()))
    part = _state_file().with_suffix(".part")
    part.write_text(json.dumps({"pid": str(pid), "started": str(started), "hello": hello}))
    part.replace(_state_file())


def down() -> int:
    """The exit code."""
    state = _running()
    if state is None:
        print("No cluster is running.")
        return 0
    pid = int(state["pid"])
    os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + 30
    while is_running(pid, int(state["started"])):
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)  # its children die with it
        time.sleep(0.1)
    _state_file().unlink(missing_ok=True)
    print("The cluster is down.")
    return 0


def status() -> int:
    """The exit code."""
    state = _running()
    print(state["hello"] if state else "No cluster is running.")
    return 0
