"""`python -m testcluster`: the programs, and a throw-away cluster to play in (`make cluster`, `make cluster-down`).

`up` leaves a supervisor running that owns everything: ending it ends all. Its pid and start time stand in a file, so that `down` ends
that process and no other that got its number.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from testcluster import PodRunner, binaries, run_process
from testcluster.cluster import Cluster
from testcluster.operator import Operator
from testcluster.processes import is_running, start_time
from testcluster.s3 import S3Server

IMAGE = "finetune-trainer"
ROOT = Path(__file__).parents[3]
EXAMPLE = "customer-feedback"


def _state_file() -> Path:
    return binaries.cache_dir() / "cluster" / "state.json"


def _running() -> dict[str, str] | None:
    try:
        state: dict[str, str] = json.loads(_state_file().read_text())
    except FileNotFoundError:
        return None
    return state if is_running(int(state["pid"]), int(state["started"])) else None


def _up() -> int:
    if state := _running():
        print(f"The cluster is up already.\n{state['hello']}")
        return 0
    binaries.ensure([name for name in binaries.PROGRAMS if name not in binaries.NODE])
    folder = _state_file().parent
    folder.mkdir(parents=True, exist_ok=True)
    _state_file().unlink(missing_ok=True)
    log = folder / "supervisor.log"
    with log.open("wb") as out:
        child = subprocess.Popen(
            [sys.executable, "-m", "testcluster", "supervise"],
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    while (state := _running()) is None:
        if child.poll() is not None:
            print(f"The cluster did not start:\n{log.read_text()[-3000:]}", file=sys.stderr)
            return 1
        time.sleep(0.2)
    print(state["hello"])
    return 0


def _supervise() -> int:
    """Owns the cluster until SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    python = {IMAGE: [sys.executable]}
    # Pods are processes of this machine, so that a folder of this machine can be the model mirror.
    fetched = subprocess.run([sys.executable, ROOT / "hack/minilm.py"], stdout=subprocess.PIPE, text=True, check=True)
    mirror = f"--model-mirror={fetched.stdout.strip()}"
    with (
        Cluster() as cluster,
        S3Server() as s3,
        Operator(cluster, trainer_image=IMAGE, arguments=[mirror]) as operator,
        PodRunner(cluster.kubeconfig, run_process, image_commands=python),
    ):
        credentials = [f"--from-literal={name}={value}" for name, value in s3.environment().items()]
        cluster.kubectl("create", "secret", "generic", "s3-credentials", *credentials)
        s3.create_bucket(EXAMPLE)
        for file in (ROOT / "examples" / EXAMPLE / "data").glob("*.csv"):
            s3.client().upload_file(str(file), EXAMPLE, f"data/{file.name}")
        kubectl = binaries.ensure(["kubectl"])["kubectl"]
        hello = (
            f"Kubernetes with the operator is up: pods run as processes of this machine. Stop it with `make cluster-down`.\n"
            f"  export KUBECONFIG={cluster.kubeconfig}\n"
            f"  alias kubectl={kubectl}\n"
            f"  S3: {s3.endpoint} (key {s3.access_key}, secret {s3.secret_key}); buckets are folders of {s3.directory / 'data'}\n"
            f"  the Secret s3-credentials in namespace default has the same; operator log: {operator.log}\n"
            f"Try it: kubectl apply -f examples/{EXAMPLE}/finetunejob.yaml && kubectl get ftj -w"
        )
        pid = os.getpid()
        state = {"pid": str(pid), "started": str(start_time(pid)), "hello": hello}
        part = _state_file().with_suffix(".part")
        part.write_text(json.dumps(state))
        part.replace(_state_file())
        while True:
            signal.pause()


def _down() -> int:
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


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m testcluster", description=__doc__)
    parser.add_argument("command", choices=("up", "down", "status", "binaries", "node-binaries", "supervise"))
    command = parser.parse_args().command
    if command == "up":
        return _up()
    if command == "supervise":
        return _supervise()
    if command == "down":
        return _down()
    if command == "status":
        state = _running()
        print(state["hello"] if state else "No cluster is running.")
        return 0
    wanted = [name for name in binaries.PROGRAMS if name not in binaries.NODE or command == "node-binaries"]
    for name, path in binaries.ensure(wanted).items():
        print(f"{name}: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
