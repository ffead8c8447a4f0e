"""Namespaces of its own for a real node: `python -m testcluster.sandbox COMMAND ...` runs a command in them (root only).

Why it exists: a node makes mounts, network devices, iptables chains and processes that outlive their makers. In namespaces of
their own (net, mount, pid) the kernel removes all of them with the last process, also after kill -9; only empty cgroups stay, and
they are removed at the end or by the next start. The command sees its own loopback, its own /run, /var/lib and /var/log, and
nothing of the network outside.

With `--uplink` there is one network device more, between the sandbox and this machine: for people who want to reach what runs inside. It goes
with the sandbox.

The outer process waits in the old namespaces; its child is pid 1 of the new ones, reaps what is orphaned there, and dies with it.
"""

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO

from testcluster import binaries
from testcluster.processes import start_time

_CLONE_NEWNS, _CLONE_NEWPID, _CLONE_NEWNET = 0x00020000, 0x20000000, 0x40000000
_PR_SET_PDEATHSIG = 1
_MARK = "FINETUNE_SANDBOX"
_HIDDEN = ("/run", "/var/lib", "/var/log")
"""Where the node's programs write to fixed places; each gets a tmpfs."""
CGROUP = "finetune-node"
NEEDED = {"containerd": "containerd", "runc": "runc", "/usr/lib/cni/ptp": "containernetworking-plugins", "iptables": "iptables"}
"""Program -> Debian package."""
UPLINK = "finetune0"
_HOST_END, _SANDBOX_END = "10.79.255.1", "10.79.255.2"
NODE_ADDRESS = "10.79.0.1"
"""The node's own address, on a bridge of the sandbox: the kubelet refuses loopback."""
_libc = ctypes.CDLL(None, use_errno=True)


class NoSandboxError(Exception):
    """This machine cannot run a node; the message says what is missing."""


def inside() -> bool:
    """Whether this process runs in a sandbox."""
    return _MARK in os.environ


def outer() -> tuple[int, int]:
    """Process id and start time of the process that owns this sandbox, as the machine outside counts them."""
    pid, _, started = os.environ[_MARK].partition(":")
    return int(pid), int(started)


def home() -> Path:
    """Where a node keeps what is worth keeping (images) and its scratch data. One sandbox at a time uses it."""
    return binaries.cache_dir() / "node"


def check() -> None:
    """Raises NoSandboxError with a sentence where a node cannot run."""
    if os.geteuid() != 0:
        raise NoSandboxError(
            "A real node needs root: containers, mounts and network devices are made. `make cluster` works without."
        )
    missing = sorted({package for program, package in NEEDED.items() if not shutil.which(program)})
    if missing and not shutil.which("apt-get"):
        raise NoSandboxError(f"A real node needs {', '.join(missing)}: install them with this machine's package manager.")
    if not Path("/sys/fs/cgroup/memory").is_dir() and not Path("/sys/fs/cgroup/cgroup.controllers").is_file():
        raise NoSandboxError("A real node needs cgroups below /sys/fs/cgroup.")


def install_packages(needed: dict[str, str]) -> None:
    """What is missing, from Debian. Raises NoSandboxError with apt's words."""
    missing = sorted({package for program, package in needed.items() if not shutil.which(program)})
    if not missing:
        return
    print(f"testcluster: installing {', '.join(missing)} (apt-get)", file=sys.stderr, flush=True)
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *missing]):
        done = subprocess.run(["apt-get", *words], env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise NoSandboxError(f"apt-get {' '.join(words)} failed: {done.stderr.strip()[-500:]}")


def run(argv: list[str], *, uplink: bool = False) -> int:
    """Runs the command in new namespaces; its exit code. SIGTERM and SIGINT are passed on."""
    check()
    install_packages(NEEDED)
    with _only_user() as lock:
        remove_cgroups()
        scratch = home() / "tmp"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            return _fork(argv, scratch, lock, uplink)
        finally:
            remove_cgroups()
            shutil.rmtree(scratch, ignore_errors=True)


def forget_images() -> None:
    """Removes what containerd keeps; it is loaded again when it is asked for. Raises NoSandboxError while a node uses it."""
    with _only_user():
        shutil.rmtree(containerd_root(), ignore_errors=True)


def containerd_root() -> Path:
    """Where the node's containerd keeps images."""
    return home() / "containerd"


@contextlib.contextmanager
def _only_user() -> Iterator[IO[str]]:
    home().mkdir(parents=True, exist_ok=True)
    with (home() / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise NoSandboxError(
                f"Another node uses {home()}: stop it first (`make cluster-down`), or set FINETUNE_CACHE_DIR."
            ) from None
        yield lock


def _fork(argv: list[str], scratch: Path, lock: IO[str], uplink: bool) -> int:
    mark = f"{os.getpid()}:{start_time(os.getpid())}"
    _call("unshare", _CLONE_NEWPID)
    unshared, linked = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        lock.close()  # the lock is the outer process's: an orphan must not hold it
        try:
            _enter_namespaces()
            os.write(unshared[1], b"x")
            os.close(linked[1])
            if os.read(linked[0], 1):  # nothing comes from a parent that could not make the link
                _become_init(argv, scratch, mark, uplink)
        except BaseException as error:  # noqa: BLE001  (a forked child must never return into its parent's code)
            print(f"sandbox: {error}", file=sys.stderr, flush=True)
        os._exit(125)
    os.close(unshared[1])
    os.close(linked[0])
    try:
        if os.read(unshared[0], 1):  # else it ended, and has said why
            if uplink:
                _link()
            os.write(linked[1], b"x")
    finally:
        os.close(linked[1])
    return _wait(child)


def _link() -> None:
    """A pair of devices, one end in the sandbox; with a route to the node."""
    # Whatever this process starts now is in the new pid namespace, where the sandbox's first process is pid 1.
    subprocess.run(["ip", "link", "delete", UPLINK], capture_output=True, check=False)  # of a sandbox that is just ending
    for words in (
        ["link", "add", UPLINK, "type", "veth", "peer", "name", UPLINK, "netns", "1"],
        ["address", "add", f"{_HOST_END}/30", "dev", UPLINK],
        ["link", "set", UPLINK, "up"],
        ["route", "add", NODE_ADDRESS, "via", _SANDBOX_END],
    ):
        done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise NoSandboxError(f"ip {' '.join(words)} failed: {done.stderr.strip()}")


def _enter_namespaces() -> None:
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    _call("unshare", _CLONE_NEWNS | _CLONE_NEWNET)


def _become_init(argv: list[str], scratch: Path, mark: str, uplink: bool) -> None:
    for words in (["--make-rprivate", "/"], ["-t", "proc", "proc", "/proc"], *(["-t", "tmpfs", "tmpfs", at] for at in _HIDDEN)):
        subprocess.run(["mount", *words], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    if uplink:
        subprocess.run(["ip", "address", "add", f"{_SANDBOX_END}/30", "dev", UPLINK], check=True)
        subprocess.run(["ip", "link", "set", UPLINK, "up"], check=True)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    environment = os.environ | {_MARK: mark, "TMPDIR": str(scratch)}
    command = os.posix_spawnp(argv[0], argv, environment, setpgroup=0)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, _frame: _pass_on(command, got))
    while True:  # orphans of the whole sandbox come here; when the command ends, so does everything
        pid, status = os.wait()
        if pid == command:
            os._exit(os.waitstatus_to_exitcode(status) % 256)


def _wait(child: int) -> int:
    def forward(number: int, _frame: FrameType | None) -> None:
        _pass_on(child, number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        _, status = os.waitpid(child, 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return os.waitstatus_to_exitcode(status)


def _pass_on(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _call(name: str, flags: int) -> None:
    if getattr(_libc, name)(flags) != 0:
        raise NoSandboxError(f"{name}: {os.strerror(ctypes.get_errno())}: a real node needs all of root's rights here")


def remove_cgroups() -> None:
    """The empty cgroups of nodes that are gone."""
    for top in [*Path("/sys/fs/cgroup").glob(f"*/{CGROUP}"), Path("/sys/fs/cgroup") / CGROUP]:
        for folder in [*sorted((p for p in top.rglob("*") if p.is_dir()), key=lambda p: -len(p.parts)), top]:
            with contextlib.suppress(OSError):  # not there, or a process of it is still ending
                folder.rmdir()


def main() -> int:
    """The exit code of the command; 125 with a sentence where there can be no sandbox."""
    try:
        uplink = sys.argv[1:2] == ["--uplink"]
        return run(sys.argv[1 + uplink :], uplink=uplink)
    except NoSandboxError as error:
        print(error, file=sys.stderr)
        return 125


if __name__ == "__main__":
    sys.exit(main())
