"""Asked to end while it starts: a real process, against an API server that takes connections and never answers."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

SECONDS = 5.0
HANDLED = 1 << (signal.SIGTERM - 1)


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(120)
        yield server


@pytest.fixture
def operator(silent: socket.socket, tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    path = tmp_path / "kubeconfig"
    cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{silent.getsockname()[1]}"}}
    context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
    users = [{"name": "u", "user": {"token": "t"}}]
    path.write_text(json.dumps({"clusters": [cluster], "contexts": [context], "users": users, "current-context": "c"}))
    flags = ["--trainer-image=x", "--progress-url=https://a", f"--kubeconfig={path}"]
    flags += ["--metrics-bind=127.0.0.1:0", "--progress-bind=127.0.0.1:0"]
    command = [sys.executable, "-m", "finetune_operator", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


def ends(process: "subprocess.Popen[str]", number: int) -> None:
    """With exit code 0 and without a complaint; one that does not handle the signal dies of it, and as process 1 it does not even do that."""
    started = time.monotonic()
    os.kill(process.pid, number)
    said = process.communicate(timeout=60)[1]
    assert time.monotonic() - started < SECONDS
    assert (process.returncode, "Traceback" in said) == (0, False), said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_while_the_api_server_is_silent(operator: "subprocess.Popen[str]", silent: socket.socket, number: int) -> None:
    connection, _ = silent.accept()
    with connection:
        assert connection.recv(4) == b"GET "
        ends(operator, number)


def test_before_it_has_even_been_imported(operator: "subprocess.Popen[str]", silent: socket.socket) -> None:
    status = Path(f"/proc/{operator.pid}/status")
    caught = 0
    while not caught & HANDLED:
        assert operator.poll() is None
        caught = int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("SigCgt")), 16)
    ends(operator, signal.SIGTERM)
    silent.settimeout(0)
    with pytest.raises(BlockingIOError):
        silent.accept()
