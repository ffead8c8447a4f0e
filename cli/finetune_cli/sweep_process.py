"""What a cluster has and a laptop lacks: attempts of trials as processes that look like a Job and its pod, and a server for their progress.

The decisions are the cluster's own (domain/decide.py, domain/sweep.py); they are shown these objects and never learn the difference.
"""

import hmac
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune_api import names
from finetune_api.failures import BY_EXIT_CODE
from finetune_api.report import MAX_PROGRESS_BYTES, EndReport, Outcome, ProgressReport
from finetune_cli import sweep_child
from finetune_operator.domain.types import Progress

Object = dict[str, Any]
STOP_AGAIN_SECONDS = 1.0
SIGNAL_EXIT = 128
LOG_FILE = "log.txt"
TERMINATION_FILE = "termination-log"


@dataclass
class Attempt:
    """One trainer, or the process that closes the sweep."""

    name: str
    """Of the Job that it stands for."""
    owner: str
    """uid of the FineTuneJob, or of the sweep."""
    folder: Path
    command: list[str]
    number: int = 1
    uid: str = field(default_factory=lambda: str(uuid.uuid4()))
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    finished: datetime | None = None
    deleted: bool = False
    """It was asked to end."""
    _sent: float = 0.0
    _process: "subprocess.Popen[bytes] | None" = None

    def start(self, environment: Mapping[str, str], lock: int, *, ours: bool) -> None:
        """Begins. From the main thread only: a process that is to die with its parent dies with the thread that made it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.termination.unlink(missing_ok=True)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(names.RESERVED_ENV_PREFIXES)}
        hosts = ",".join(filter(None, (inherited.get("no_proxy") or inherited.get("NO_PROXY"), "127.0.0.1")))
        # A file of the user's named as a module of ours must not be imported in its place.
        everything = {**inherited, **environment, "PYTHONSAFEPATH": "1", "no_proxy": hosts, "NO_PROXY": hosts}
        launcher = [sys.executable, "-S", sweep_child.__file__, str(os.getpid()), "ours" if ours else "theirs"]
        with (self.folder / LOG_FILE).open("ab") as log:
            # A group of its own: a Ctrl-C is for the sweep to hear, and what a trainer starts can be ended with it.
            self._process = subprocess.Popen(
                [*launcher, *self.command],
                env=everything,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[lock],
                start_new_session=True,
            )

    @property
    def termination(self) -> Path:
        return self.folder / TERMINATION_FILE

    @property
    def code(self) -> int | None:
        """Exit code as in a pod (128 + n where signal n ended it); None while it runs."""
        code = self._process.poll() if self._process else None
        return code if code is None or code >= 0 else SIGNAL_EXIT - code

    def ended(self) -> bool:
        """Whether it has ended since the last time that this was asked."""
        if self.finished is not None or self.code is None:
            return False
        self.finished = datetime.now(UTC)
        return True

    def ask(self) -> None:
        """SIGTERM: the trainer saves. Again and again, as the first may come before it can hear; but not once it has said its last words,
        because Python gives its handlers up while it ends."""
        self.deleted = True
        if self.code is None and not self.termination.exists() and time.monotonic() - self._sent > STOP_AGAIN_SECONDS:
            self._signal(signal.SIGTERM)
            self._sent = time.monotonic()

    def kill(self) -> None:
        """Ends it and all that it started, at once; waits until it is gone."""
        self.deleted = True
        if self._process is not None and self.code is None:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def _signal(self, number: int) -> None:
        if self._process is None:
            return
        try:
            if number == signal.SIGKILL:
                os.killpg(self._process.pid, number)
            else:
                self._process.send_signal(number)
        except ProcessLookupError:
            return  # it has ended by itself

    # ------------------------------------------------------------------------------------------------ as the cluster's ----
    def child(self) -> Object:
        """The batch/v1 Job that it stands for."""
        status: Object = {"startTime": self.started.isoformat()}
        if self.finished is not None:
            kind, over = "Failed" if self.code else "Complete", self.finished.isoformat()
            status["conditions"] = [{"type": kind, "status": "True", "reason": kind, "lastTransitionTime": over}]
        return {
            "kind": "Job",
            "metadata": self._meta(self.name, self.uid, self.owner, names.KIND_JOB),
            "spec": {},
            "status": status,
        }

    def pod(self) -> Object:
        """Its pod."""
        code = self.code if self.finished is not None else None
        state: Object = {"running": {"startedAt": self.started.isoformat()}}
        if code is not None and self.finished is not None:
            times = {"startedAt": self.started.isoformat(), "finishedAt": self.finished.isoformat()}
            state = {"terminated": {**times, "exitCode": code, "message": self.report(code).to_message()}}
        phase = "Running" if code is None else "Failed" if code else "Succeeded"
        status = {"phase": phase, "containerStatuses": [{"name": names.CONTAINER, "state": state}]}
        return {"metadata": self._meta(f"{self.name}-0", f"{self.uid}-0", self.uid, "Job"), "status": status}

    def _meta(self, name: str, uid: str, owner: str, kind: str) -> Object:
        # A pod's owner is its Job, whose name says which attempt it is of.
        reference = {"kind": kind, "name": self.name, "uid": owner, "controller": True}
        return {"name": name, "uid": uid, "ownerReferences": [reference]}

    def report(self, code: int) -> EndReport:
        """What it said at its end; where it could say nothing, what its exit code says."""
        try:
            return EndReport.model_validate_json(self.termination.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValidationError, UnicodeDecodeError):
            pass  # killed, or another program
        log = self.folder / LOG_FILE
        if code == 0:
            return EndReport(outcome=Outcome.COMPLETE)
        if code in BY_EXIT_CODE:
            failure = BY_EXIT_CODE[code]
            message = f"The trainer ended with exit code {code}: {failure.meaning}. Its log is {log}."
            return EndReport(outcome=Outcome.FAILED, reason=failure.reason, message=message)
        if code == SIGNAL_EXIT + signal.SIGKILL:
            message = "The trainer was ended by SIGKILL: if nobody did that, memory ran out: lower parallelTrials or hyperparameters.batchSize."
            return EndReport(outcome=Outcome.FAILED, reason="OOMKilled", message=message)
        message = f"The trainer ended with exit code {code}; its log is {log}."
        return EndReport(outcome=Outcome.FAILED, reason="UserCodeError", message=message)


class ProgressServer:
    """Takes the trainers' reports, on the loopback interface; who does not know the token is told nothing."""

    def __init__(self, wake: threading.Event) -> None:
        self._wake = wake
        self._token = secrets.token_urlsafe(24)
        self._new: dict[tuple[str, int], tuple[ProgressReport, datetime]] = {}
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="progress-server", daemon=True)

    def __enter__(self) -> "ProgressServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def url(self, job: str, attempt: int) -> str:
        """Where an attempt of this FineTuneJob reports."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/{self._token}/{job}/{attempt}"

    def take(self, uids: Mapping[str, str]) -> dict[str, Progress]:
        """The newest report of each job since the last time; `uids` by name of the jobs."""
        with self._lock:
            new, self._new = self._new, {}
        return {name: Progress(report, at, number, uids[name]) for (name, number), (report, at) in new.items() if name in uids}

    def accept(self, path: str, body: bytes) -> int:
        """Keeps a report; the HTTP status."""
        token, _, rest = path.lstrip("/").partition("/")
        job, _, attempt = rest.partition("/")
        if not hmac.compare_digest(token.encode(), self._token.encode()) or not attempt.isdecimal():
            return 404
        try:
            report = ProgressReport.model_validate_json(body)
        except ValidationError:
            return 400
        with self._lock:
            self._new[(job, int(attempt))] = (report, datetime.now(UTC))
        self._wake.set()
        return 200

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        accept = self.accept

        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_POST(self) -> None:
                length = self.headers.get("Content-Length", "")
                small = length.isdecimal() and int(length) <= MAX_PROGRESS_BYTES
                self.send_response(accept(self.path, self.rfile.read(int(length))) if small else 413)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Nobody reads it."""

        return Handler
