"""Where the curves of a run go: TensorBoard's files always; MLflow and Weights & Biases where their usual variables are set.

Only the leading process has any. What speaks to a server does so from a thread of its own, behind a queue that cannot grow for ever: a
server that is slow, down or wrong is told in the log and neither ends nor stalls a training. An execution that goes on from a
checkpoint goes on with the run of the one before, which it finds by `Training.key`.
"""

import hashlib
import importlib
import json
import math
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

from finetune_api.report import Outcome
from finetune_trainer.errors import TrainingFailure

INTERVAL_SECONDS = 5.0
RETRY_SECONDS = 30.0
KEPT_POINTS = 10_000
"""Points that wait for a server; beyond them the oldest are dropped."""
END_SECONDS = 15.0
INTERRUPTED_END_SECONDS = 5.0
"""How long an ending run waits for its servers; asked to end, it has little time."""

DEFAULTS = {
    # One try and no wait: Background tries again by itself, and the client's own retries take minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ALLOW_FILE_STORE": "true",  # who names a folder wants it
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "WANDB_INIT_TIMEOUT": "30",
    "WANDB_FINISH_TIMEOUT": "10",
    "WANDB_SYMLINK": "false",
    # What goes out is what this module sends: no output, no code, and nothing about the clients' use to their makers.
    "WANDB_CONSOLE": "off",
    "WANDB_SILENT": "true",
    "WANDB_DISABLE_CODE": "true",
    "WANDB_DISABLE_GIT": "true",
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}
"""Variables of the clients, where the environment does not set them."""

_THREAD = "tracker-"

Scalar = str | int | float | bool


class Point(NamedTuple):
    """Scalars at an optimizer step; `time` is seconds since 1970."""

    step: int
    values: Mapping[str, float]
    time: float


@dataclass(frozen=True)
class Training:
    """Which training this is. `key` is the same for all its executions and for no other training; letters, digits and -, at most 64."""

    job: str
    key: str
    folder: Path
    """Where this execution's event files are; they are uploaded at the end."""

    @classmethod
    def of(cls, job: str, recipe_digest: str, origin: str, folder: Path) -> Self:
        """`origin` tells a training from one that begins anew with the same recipe (Checkpoints.origin)."""
        return cls(job, f"{job}-{hashlib.sha256(f'{origin} {recipe_digest}'.encode()).hexdigest()[:11]}", folder)


class Tracker(Protocol):
    """One place that keeps what a run was and how it went. All calls come from one thread."""

    def params(self, values: Mapping[str, Scalar]) -> None:
        """What is trained, told once, before any point."""

    def scalars(self, points: Sequence[Point]) -> None:
        """The same points may come twice, when the first call failed."""

    def end(self, outcome: Outcome) -> None:
        """Writes everything out."""


class Remote(Tracker, Protocol):
    """One that is elsewhere."""

    address: str
    """Where a person can see the run; empty where there is no such page."""


# --------------------------------------------------------------------------------------------------------- adapters ----
class EventFiles:
    """TensorBoard event files."""

    def __init__(self, training: Training) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(training.folder))

    def params(self, values: Mapping[str, Scalar]) -> None:
        rows = "\n".join(f"| {name} | {value} |" for name, value in values.items())
        self._writer.add_text("params", f"| | |\n|---|---|\n{rows}")

    def scalars(self, points: Sequence[Point]) -> None:
        for point in points:
            for name, value in point.values.items():
                self._writer.add_scalar(name, value, point.step, point.time)

    def end(self, outcome: Outcome) -> None:  # noqa: ARG002
        self._writer.close()


class MlflowRun:
    """A run of MLFLOW_TRACKING_URI, in the experiment of MLFLOW_EXPERIMENT_NAME or _ID; found again by its tag."""

    PARAM_LENGTH = 500  # what servers of all ages take
    PER_REQUEST = 1000
    PARAMS_PER_REQUEST = 100
    TAG = "finetune.dev/run"

    def __init__(self, training: Training) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        experiment = self._experiment()
        where = f"tags.`{self.TAG}` = '{training.key}'"
        found = self._client.search_runs([experiment], where, order_by=["attributes.start_time DESC"], max_results=1)
        if found:
            self._run = found[0]
            self._client.update_run(self._run.info.run_id, status="RUNNING")
        else:
            tags = {self.TAG: training.key, "finetune.dev/job": training.job}
            self._run = self._client.create_run(experiment, tags=tags, run_name=training.job)
        uri = self._client.tracking_uri
        page = f"{uri.rstrip('/')}/#/experiments/{self._run.info.experiment_id}/runs/{self._run.info.run_id}"
        self.address = page if uri.startswith("http") else ""

    def _experiment(self) -> str:
        if known := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return known
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default"
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self._client.create_experiment(name))

    def params(self, values: Mapping[str, Scalar]) -> None:
        from mlflow.entities import Param

        # A param cannot change; what another execution said first stays.
        new = [Param(_plain(n), str(v)[: self.PARAM_LENGTH]) for n, v in values.items() if _plain(n) not in self._run.data.params]
        for start in range(0, len(new), self.PARAMS_PER_REQUEST):
            self._client.log_batch(self._run.info.run_id, params=new[start : start + self.PARAMS_PER_REQUEST])

    def scalars(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(_plain(n), v, int(p.time * 1000), p.step) for p in points for n, v in p.values.items()]
        for start in range(0, len(metrics), self.PER_REQUEST):
            self._client.log_batch(self._run.info.run_id, metrics=metrics[start : start + self.PER_REQUEST])

    def end(self, outcome: Outcome) -> None:
        status = {Outcome.COMPLETE: "FINISHED", Outcome.INTERRUPTED: "KILLED"}.get(outcome, "FAILED")
        self._client.set_terminated(self._run.info.run_id, status)


def _plain(name: str) -> str:
    """A name that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]


class WandbRun:
    """A run of WANDB_PROJECT. Offline (WANDB_MODE) its files lie beside the event files, for `wandb sync`."""

    def __init__(self, training: Training) -> None:
        import wandb

        env = os.environ
        self._run: Any = wandb.init(
            id=env.get("WANDB_RUN_ID") or training.key,
            name=env.get("WANDB_NAME") or training.job,
            tags=[training.job],
            resume="allow",
            dir=env.get("WANDB_DIR") or str(training.folder if env.get("WANDB_MODE") == "offline" else training.folder.parent),
        )
        self.address: str = self._run.url or ""
        # Not its own count of steps: that drops what an execution does again after it was cut off.
        self._run.define_metric("*", step_metric="step")

    def params(self, values: Mapping[str, Scalar]) -> None:
        self._run.config.update(dict(values), allow_val_change=True)

    def scalars(self, points: Sequence[Point]) -> None:
        for point in points:
            self._run.log({**point.values, "step": point.step, "_timestamp": point.time})

    def end(self, outcome: Outcome) -> None:
        if outcome is Outcome.INTERRUPTED:
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if outcome is Outcome.COMPLETE else 1)


# ------------------------------------------------------------------------------------------------------- background ----
class Background:
    """A tracker in a thread of its own, `connect` included. Its methods return at once and never raise."""

    def __init__(self, name: str, connect: Callable[[], Remote], log: Callable[[str], None]) -> None:
        self._name, self._connect, self._log = name, connect, log
        self._tracker: Remote | None = None
        self._params: Mapping[str, Scalar] = {}
        self._points: deque[Point] = deque(maxlen=KEPT_POINTS)
        self._outcome: Outcome | None = None
        self._wake = threading.Condition()
        self._down = False
        self._thread = threading.Thread(target=self._run, name=f"{_THREAD}{name}", daemon=True)
        self._thread.start()

    def params(self, values: Mapping[str, Scalar]) -> None:
        with self._wake:
            self._params = dict(values)

    def scalars(self, points: Sequence[Point]) -> None:
        with self._wake:
            self._points.extend(points)

    def end(self, outcome: Outcome) -> None:
        """What is left is sent, in the background: `wait` waits for it."""
        with self._wake:
            self._outcome = outcome
            self._wake.notify()

    def wait(self, seconds: float) -> None:
        """At most so long; the thread is left alone then, it ends with the process."""
        self._thread.join(max(0.0, seconds))
        if self._thread.is_alive():
            self._log(f"{self._name} does not answer: the end of this run may be missing there")

    def _run(self) -> None:
        pause = 0.0
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._outcome is not None, timeout=pause)
                params, points, outcome = self._params, list(self._points), self._outcome
                self._params = {}
                self._points.clear()
            try:
                self._send(params, points, outcome)
            except Exception as error:  # noqa: BLE001  (whatever a client raises: it is told, and training goes on)
                if not self._down:
                    self._log(f"{self._name} cannot be reached ({_sentence(error)}); training goes on")
                if outcome is not None:
                    self._log(f"{self._name} was not reached to the end: {len(points)} points are missing there")
                with self._wake:
                    self._params = self._params or params
                    self._points = deque([*points, *self._points], maxlen=KEPT_POINTS)
                self._down, pause = True, RETRY_SECONDS
            else:
                if self._down:
                    self._log(f"{self._name} is reached again")
                self._down, pause = False, INTERVAL_SECONDS
            if outcome is not None:
                return

    def _send(self, params: Mapping[str, Scalar], points: list[Point], outcome: Outcome | None) -> None:
        if self._tracker is None:
            self._tracker = self._connect()
            if self._tracker.address:
                self._log(f"{self._name}: {_without_password(self._tracker.address)}")
        if params:
            self._tracker.params(params)
        if points:
            self._tracker.scalars(points)
        if outcome is not None:
            self._tracker.end(outcome)


def _sentence(error: Exception) -> str:
    said = " ".join(str(error).split())[:300] or type(error).__name__
    return _without_password(said)


def _without_password(text: str) -> str:
    """An address may hold one."""
    return re.sub(r"//[^/@\s]+@", "//", text)


def left_behind() -> bool:
    """Whether a server has not answered to the end. The client's own exit hook would go on waiting for it: leave by os._exit."""
    return any(thread.name.startswith(_THREAD) for thread in threading.enumerate())


# --------------------------------------------------------------------------------------------------------------- all ----
class Trackers:
    """All trackers of a run, until the `with` block ends; how it ends tells them the outcome."""

    def __init__(self, files: EventFiles | None = None, remote: Sequence[Background] = ()) -> None:
        self._remote = remote
        self._all: list[Tracker] = [*([files] if files else []), *remote]

    def params(self, **parts: Any) -> None:
        """Nested values under dotted names; None is left out."""
        flat = dict(flatten(parts))
        for tracker in self._all:
            tracker.params(flat)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """What is not defined (NaN) is left out."""
        if finite := {name: float(value) for name, value in values.items() if math.isfinite(value)}:
            for tracker in self._all:
                tracker.scalars([Point(step, finite, time.time())])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        interrupted = isinstance(error, TrainingFailure) and error.failure.reason == "Interrupted"
        outcome = Outcome.COMPLETE if error is None else Outcome.INTERRUPTED if interrupted else Outcome.FAILED
        for tracker in self._all:
            tracker.end(outcome)
        until = time.monotonic() + (INTERRUPTED_END_SECONDS if interrupted else END_SECONDS)
        for background in self._remote:
            background.wait(until - time.monotonic())


def flatten(value: Any, path: str = "") -> "list[tuple[str, Scalar]]":
    """Leaves of nested mappings with dotted names; lists as JSON."""
    if isinstance(value, Mapping):
        return [leaf for name, inner in value.items() for leaf in flatten(inner, f"{path}.{name}" if path else str(name))]
    if value is None:
        return []
    return [(path, value if isinstance(value, Scalar) else json.dumps(value, ensure_ascii=False))]


def open_trackers(training: Training, log: Callable[[str], None]) -> Trackers:
    """Those that the environment asks for."""
    env = os.environ
    for name, value in DEFAULTS.items():
        env.setdefault(name, value)
    asked: list[tuple[str, str, str, Callable[[Training], Remote]]] = []
    if env.get("MLFLOW_TRACKING_URI"):
        asked.append(("MLflow", "mlflow", "MLFLOW_TRACKING_URI", MlflowRun))
    mode = env.get("WANDB_MODE")
    if mode != "disabled" and (env.get("WANDB_API_KEY") or mode == "offline"):
        asked.append(("Weights & Biases", "wandb", "WANDB_API_KEY" if env.get("WANDB_API_KEY") else "WANDB_MODE", WandbRun))
    remote = []
    for name, package, variable, adapter in asked:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            log(f"{variable} is set, but {error.name} is not installed: nothing is told to {name}")
        except Exception as error:  # noqa: BLE001  (a client that does not fit what is installed is no reason not to train)
            log(f"{variable} is set, but {package} cannot be imported ({error}): nothing is told to {name}")
        else:
            remote.append(Background(name, partial(adapter, training), log))
    return Trackers(EventFiles(training), remote)
