"""Starts, watches and ends local programs so that nothing is left running, whatever happens to this process.

Why it exists: etcd, the API server, versitygw, Go builds and pods' commands all need the same: a log file, an own process
group, an end that is polite first and certain later, and death together with this process even when that is killed. Also
here: free ports, and telling a recorded process from a stranger that got its pid later.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_WRAPPER = Path(__file__).with_name("child_exec.py")
_STOP_SECONDS = 10.0


class ChildError(Exception):
    """A program ended although it should run; the message carries the last lines of its log."""


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a text file, for error messages."""
    if not path.is_file():
        return f"(there is no {path.name})"
    with path.open(errors="replace") as file:
        return "".join(deque(file, maxlen=lines)).rstrip() or "(nothing was logged)"


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that was free a moment ago; whoever binds it must cope with losing the race (see `lost_the_port`)."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def lost_the_port(log: Path) -> bool:
    """Whether the program that wrote this log ended because somebody else took its port."""
    return log.is_file() and "address already in use" in log.read_text(errors="replace")


_lock = threading.Lock()
_spawner: tuple[int, ThreadPoolExecutor] | None = None


def _spawn(start: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """Forks in one thread that lives as long as this process, because PR_SET_PDEATHSIG follows the thread that forked."""
    global _spawner  # noqa: PLW0603 - one per process; a forked child has no such thread and makes its own
    with _lock:
        if _spawner is None or _spawner[0] != os.getpid():
            _spawner = os.getpid(), ThreadPoolExecutor(max_workers=1, thread_name_prefix="testcluster-spawner")
        executor = _spawner[1]
    return executor.submit(start).result()


@dataclass
class Child:
    """A running program with its log."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(
        cls,
        name: str,
        argv: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> "Child":
        """Starts `argv` in a process group of its own, output appended to `log`; it is killed when this process ends.

        A program that does not exist ends with 127 at once, with a line in the log, as in a shell.
        """
        environment = dict(os.environ if environment is None else environment)
        locale = "keep" if "LC_CTYPE" in environment else "drop"
        wrapped = [sys.executable, "-I", "-S", str(_WRAPPER), str(os.getpid()), locale, *argv]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            process = _spawn(
                lambda: subprocess.Popen(
                    wrapped,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    cwd=directory,
                    start_new_session=True,
                )
            )
        return cls(name, process, log)

    @property
    def pid(self) -> int:
        """The program's own pid (the wrapper became the program)."""
        return self.process.pid

    def wait(self, seconds: float) -> int | None:
        """The exit code (negative: the signal), or None if it still runs after that time."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def check(self) -> None:
        """Raises ChildError with the end of the log if the program has ended."""
        code = self.process.poll()
        if code is not None:
            raise ChildError(f"{self.name} ended with {code}; its log ({self.log}) ends with:\n{tail(self.log)}")

    def signal_group(self, number: signal.Signals) -> None:
        """Sends a signal to the program and all it started."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return  # all of them have ended: that is what every caller wants to reach

    def stop(self, seconds: float = _STOP_SECONDS) -> int:
        """SIGTERM, then SIGKILL for the whole group after `seconds` (0: SIGKILL only); returns the exit code. Twice is fine."""
        if seconds > 0 and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.wait(seconds)
        self.signal_group(signal.SIGKILL)
        return self.process.wait()


def wait_until(ready: Callable[[], bool], children: Sequence[Child], seconds: float, what: str) -> None:
    """Polls until `ready`; raises ChildError as soon as one of the children has ended, or when the time is over."""
    deadline = time.monotonic() + seconds
    while not ready():
        for child in children:
            child.check()
        if time.monotonic() > deadline:
            logs = "\n".join(f"--- {child.log}\n{tail(child.log)}" for child in children)
            raise ChildError(f"{what} was not ready after {seconds:.0f} s\n{logs}")
        time.sleep(0.05)


def start_time(pid: int) -> int | None:
    """When the process started, in clock ticks since boot: with the pid it names one process for ever. None: no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # the command name before it may hold spaces and brackets
    return None if fields[0] == "Z" else int(fields[19])


def is_running(pid: int, started: int) -> bool:
    """Whether exactly that process still runs."""
    return start_time(pid) == started
