"""What people see of a local sweep: a table that redraws itself on a terminal, one line per event elsewhere, and the summary at its end."""

import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from finetune_api import names
from finetune_api.names import Condition
from finetune_cli import inputs, show
from finetune_cli.sweep_objects import Object, Objects
from finetune_cli.sweep_replay import document
from finetune_cli.sweep_report import report_html
from finetune_operator.domain import trials as t
from finetune_operator.domain.status import find_condition, is_finished, is_true
from finetune_operator.domain.types import Event

REPORT_FILE = "report.html"
DRAW_SECONDS = 0.25
ROWS_BESIDE_THE_TABLE = 8


def view(objects: Objects, sweep: str) -> "Lines":
    """The table on a terminal, else lines."""
    return Board(objects, sweep) if sys.stdout.isatty() else Lines(objects, sweep)


class Lines:
    """One line for each event."""

    def __init__(self, objects: Objects, sweep: str) -> None:
        self.objects, self.sweep = objects, sweep
        self.metric: str = objects.need(sweep)["spec"]["objective"]["metric"]
        self._told_stopping = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def line(self, text: str) -> None:
        """Something that nobody may miss."""
        show.line(text)

    def draw(self) -> None:
        """Shows how things are now."""

    def created(self, job: Object) -> None:
        said = _said(job)
        how = said.get("algorithm") or f"seed {said.get('seed')}"
        show.line(f"{job['metadata']['name']}: created with {parameters(job)} ({how})")

    def judged(self, job: Object, patch: Object) -> None:
        for key, text in (patch.get("metadata", {}).get("annotations") or {}).items():
            told = json.loads(text)
            at, verdict = key.removeprefix(names.ANNOTATION_RUNG), "stops" if told["verdict"] == "Stop" else "goes on"
            value = float(told["value"])
            show.line(f"{job['metadata']['name']}: {value:.4f} at {at} examples, rank {told['rank']} of {told['of']}: {verdict}")

    def ended(self, job: Object) -> None:
        value = t.final_metrics(job).get(self.metric)
        show.line(f"{job['metadata']['name']}: {how(job)}" + (f", {self.metric} {value:.4f}" if value is not None else ""))

    def status(self, before: Object, after: Object) -> None:
        best = after.get("best")
        if best and best.get("trial") != (before.get("best") or {}).get("trial"):
            show.line(f"best: {best['trial']}, {self.metric} {float(best['value']):.4f}")

    def event(self, event: Event) -> None:
        if event.reason != "TrialPruned":  # which its verdict has told
            show.line(f"{self.sweep}: {event.reason}: {event.message}")

    def stopping(self) -> None:
        """The user wants an end; the trainers are saving."""
        if not self._told_stopping:
            show.note("\nstopping: the trials save a checkpoint first (Ctrl-C again ends them at once; their last ones stay)")
        self._told_stopping = True


class Board(Lines):
    """A table of the trials; only what is out of the ordinary is a line above it."""

    def __init__(self, objects: Objects, sweep: str) -> None:
        super().__init__(objects, sweep)
        self.console = Console()
        self._live = Live(console=self.console, auto_refresh=False)
        self._drawn = 0.0

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.update(self.table(), refresh=True)
        self._live.stop()

    def line(self, text: str) -> None:
        self.console.print(Text(text))

    def created(self, job: Object) -> None: ...

    def judged(self, job: Object, patch: Object) -> None: ...

    def ended(self, job: Object) -> None: ...

    def status(self, before: Object, after: Object) -> None: ...

    def event(self, event: Event) -> None:
        if event.reason != "TrialPruned":
            self.line(f"{event.reason}: {event.message}")

    def draw(self) -> None:
        if time.monotonic() - self._drawn > DRAW_SECONDS:
            self._live.update(self.table(), refresh=True)
            self._drawn = time.monotonic()

    def table(self) -> Table:
        """As many trials as there is room for: those that run, the best, then the newest."""
        status = self.objects.need(self.sweep).get("status") or {}
        title = f"{self.sweep}: {status.get('state', 'Pending')}, {status.get('progress', '0')} trials have ended"
        out = Table(title=Text(title), title_justify="left", title_style="bold")
        for header in ("trial", "parameters", self.metric, "rung", "state"):
            out.add_column(Text(header), justify="right" if header in (self.metric, "rung") else "left", overflow="fold")
        best = (status.get("best") or {}).get("trial")
        jobs = self.objects.all(names.KIND_JOB)

        def weight(job: Object) -> tuple[bool, bool, str]:
            meta = job["metadata"]
            return not is_finished(job.get("status") or {}), meta["name"] == best, str(meta.get("creationTimestamp"))

        room = max(5, self.console.size.height - ROWS_BESIDE_THE_TABLE)
        kept = sorted(sorted(jobs, key=weight, reverse=True)[:room], key=lambda job: str(job["metadata"]["name"]))
        for job in kept:
            name = job["metadata"]["name"]
            style = "bold green" if name == best else "dim" if is_finished(job.get("status") or {}) else ""
            row = (f"{name} *" if name == best else name, parameters(job), self._value(job), _rung(job), how(job))
            out.add_row(*(Text(cell) for cell in row), style=style)
        return out

    def _value(self, job: Object) -> str:
        """At its end, else at its last evaluation."""
        value = t.final_metrics(job).get(self.metric)
        seen = t.evaluations(job, self.metric)
        if value is None and seen:
            value = seen[-1][1]
        return "" if value is None else f"{value:.4f}"


def _rung(job: Object) -> str:
    judged = t.judgements(job)
    return f"{judged[-1].examples} ({judged[-1].rank}/{judged[-1].of})" if judged else ""


def _said(job: Object) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(job["metadata"]["annotations"][names.ANNOTATION_TRIAL])
    return said


def parameters(job: Object) -> str:
    """In one line."""
    told = _said(job)["parameters"].items()
    return ", ".join(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in told)


def how(job: Object) -> str:
    """How it ended or, while it has not, what it does, with how much of it is done."""
    status = job.get("status") or {}
    if is_true(status, Condition.FAILED):
        failed = find_condition(status, Condition.FAILED) or {}
        return f"Failed ({failed['reason']}: {failed['message']})"
    if is_finished(status):
        return "Stopped" if (find_condition(status, Condition.COMPLETE) or {}).get("reason") == "Stopped" else "Complete"
    done = (status.get("trainerStatus") or {}).get("progressPercentage")
    return str(status.get("state", "Pending")) + (f" {done}%" if done is not None else "")


# --------------------------------------------------------------------------------------------------------- the end ----
def finish(objects: Objects, name: str, workdir: Path, root: Path | None) -> int:
    """Writes history and report, shows what was found; 0 where the sweep is complete, 1 where it failed."""
    sweep = objects.need(name)
    status = sweep["status"]
    history = document(sweep, objects.all(names.KIND_JOB))
    file, report = workdir / names.HISTORY_FILE, workdir / REPORT_FILE
    file.write_text(json.dumps(history, indent=1), encoding="utf-8")
    report.write_text(report_html(history), encoding="utf-8")
    if best := status.get("best"):
        _show_best(best, status)
    _show_places(status, root, [file, report])
    if is_true(status, Condition.FAILED):
        failed = find_condition(status, Condition.FAILED) or {}
        show.note(f"finetune: the sweep failed with {failed['reason']}: {failed['message']}")
        return 1
    return 0


def _show_best(best: Object, status: Object) -> None:
    promoted = (status.get("result") or {}).get("metrics")
    rows = [("parameter", told["name"], told["value"]) for told in best["parameters"]]
    rows += [("metric", told["name"], f"{float(told['value']):.4f}") for told in promoted or status.get("metrics") or []]
    show.line("")
    show.table(
        f"the best of {status['trials']['created']} trials: {best['trial']}", ("", "name", "value"), rows, words=("", "name")
    )
    repeated: Sequence[Object] = status.get("repetitions") or []
    if any(len(row["values"]) > 1 for row in repeated):
        told = [(row["trial"], row.get("mean", ""), ", ".join(row["values"])) for row in repeated]
        show.table("with several seeds", ("trial", "mean", "values"), told, words=("trial",))
    if shares := status.get("importance"):
        show.table("what decides", ("parameter", "share"), [(s["name"], s["share"]) for s in shares], words=("parameter",))


def _show_places(status: Object, root: Path | None, files: Sequence[Path]) -> None:
    uri = (status.get("result") or {}).get("modelUri") or (status.get("best") or {}).get("modelUri")
    if uri:
        place = str(inputs.local_path(uri, root) or uri)
        show.line(f"model: {place}" + (f"  ({uri})" if place != uri else ""))
        show.line(f"try:   finetune predict --model {shlex.quote(place)} 'some text'")
    if stored := status.get("historyUri"):
        show.line(f"stored: {inputs.local_path(stored, root) or stored}")
    for file in files:
        show.line(f"{'report' if file.suffix == '.html' else 'trials'}: {file}")
