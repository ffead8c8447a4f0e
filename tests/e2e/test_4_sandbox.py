"""What the sandbox leaves behind on a machine: nothing, also after kill -9. A sandbox in this sandbox, so that no machine is at risk."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from integration.jobs import wait
from testcluster import sandbox
from testcluster.sandbox import UPLINK

pytestmark = pytest.mark.alone
INSIDE = f"""
set -e
ip -brief address show dev {UPLINK} >$REPORT/address
mkdir -p /run/left/behind && mount -t tmpfs tmpfs /run/left/behind
ip link add bridge0 type bridge
setsid sleep 300 &
echo $$ >$REPORT/ready
wait
"""


def processes() -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended while we looked
            found += [process.name] if b"sleep\x00300" in (process / "cmdline").read_bytes() else []
    return found


def devices() -> str:
    return subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout


def mounts() -> set[str]:
    return {line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()}


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left(tmp_path: Path, end: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    if not sandbox.inside():
        pytest.skip("runs in a sandbox only: a cluster of yours has none")
    monkeypatch.setenv("FINETUNE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("REPORT", str(tmp_path))
    before = devices(), mounts(), processes()
    running = subprocess.Popen([sys.executable, "-m", "testcluster.sandbox", "--uplink", "bash", "-c", INSIDE])
    wait((tmp_path / "ready").exists, "the sandbox", 30)
    assert "10.79.255.2/30" in (tmp_path / "address").read_text()
    assert (len(processes()), UPLINK in devices(), "bridge0" in devices()) == (1, True, False)
    os.kill(running.pid, end)
    running.wait(20)
    wait(lambda: (devices(), mounts(), processes()) == before, "the machine as it was", 90)
