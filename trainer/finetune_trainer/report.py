"""What people and the operator see of a run: lines or a progress bar, progress as the operator reads it, the termination message."""

import fcntl
import math
import os
import sys
import time
from datetime import UTC, datetime
from typing import TextIO

from pydantic import ValidationError

from finetune_api.finetunejob import MetricValue, TrainerStatus
from finetune_api.report import EndReport, Outcome
from finetune_trainer.config import Runtime

BAR = 24
LINES_PER_RUN = 20


class Console:
    """Progress for people: a bar that redraws itself on a terminal, one line per log interval elsewhere."""

    def __init__(self, out: TextIO = sys.stdout) -> None:
        self.out = out
        self.bar = out.isatty()
        self.started = time.monotonic()
        self.first_step: int | None = None
        self._drawn = 0.0
        self._open = False

    def line(self, text: str) -> None:
        """One line of its own."""
        self.out.write(f"\r\033[K{text}\n" if self._open else f"{text}\n")
        self._open = False
        self.out.flush()

    def step(self, step: int, total: int, loss: float, rate: float) -> float:
        """Shows progress; the seconds that are left at the pace since this process began."""
        now = time.monotonic()
        if self.first_step is None:
            self.first_step, self.started = step, now  # the clock starts when the first step is done
        done = step - self.first_step
        left = (total - step) * (now - self.started) / done if done else 0.0
        known = f"{loss:.4f}" if math.isfinite(loss) else "-"  # the first loss is read one step late
        text = f"step {step}/{total}  loss {known}  learning rate {rate:.2e}  {_clock(left)} left"
        if self.bar:
            if now - self._drawn > 0.1 or step == total:
                filled = BAR * step // total
                self.out.write(f"\r\033[K[{'#' * filled}{'.' * (BAR - filled)}] {text}")
                self.out.flush()
                self._drawn, self._open = now, True
        elif step % max(1, total // LINES_PER_RUN) == 0 or step == total:
            self.line(text)
        return left


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def trainer_status(step: int, total: int, left: float, values: dict[str, float], scores: list[MetricValue]) -> TrainerStatus:
    """Progress in Kubeflow's shape."""
    return TrainerStatus(
        progress_percentage=min(100, 100 * step // max(1, total)),
        estimated_remaining_seconds=max(0, round(left)),
        metrics=[*(MetricValue(name=n, value=f"{v:.6g}") for n, v in values.items()), *scores],
        last_updated_time=datetime.now(UTC).replace(microsecond=0),
    )


def write_end(runtime: Runtime, end: EndReport, *, alone: bool = True) -> None:
    """The termination message. Without a file for it (a run by hand) there is nobody to tell.

    Not `alone`, the processes of a pod share the file, which is this attempt's own: what says no more than what is there is not written.
    """
    if runtime.termination_log is not None:
        try:
            # In place and never by rename: the kubelet has mounted this very file.
            with os.fdopen(os.open(runtime.termination_log, os.O_RDWR | os.O_CREAT, 0o666), "r+") as file:
                if not alone:
                    fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
                    if _worth(file.read()) >= _worth(end):
                        return
                    file.seek(0)
                file.truncate()
                file.write(end.to_message())
        except OSError as error:
            # The exit code still tells the class, and result.json the result.
            sys.stderr.write(f"{runtime.termination_log} cannot be written: {error.strerror}\n")


def _worth(end: EndReport | str) -> int:
    """How much a report says. A result is durable, whatever happens after; a named cause comes before the stop and the broken connections
    that it brings to the other processes; of those the first says most."""
    if isinstance(end, str):
        try:
            end = EndReport.model_validate_json(end)
        except ValidationError:
            return 0
    if end.outcome in (Outcome.COMPLETE, Outcome.ALREADY_COMPLETED):
        return 3
    return 1 if end.reason in ("Interrupted", "UserCodeError") else 2
