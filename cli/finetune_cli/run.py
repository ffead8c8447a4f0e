"""`finetune run`: the trainer that the pod runs, as a process of this machine, with the pod's environment and nothing else.

The trainer shows its own progress. What this adds is what the operator and the kubelet do in a cluster: it numbers the attempts, keeps two
of them from training the same job at once, passes a stop on and waits for the save, and tells how it ended.
"""

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from pydantic import ValidationError

from finetune_api import FineTuneJob, names
from finetune_api.environment import trainer_environment
from finetune_api.failures import BY_REASON
from finetune_api.report import EndReport, Outcome, ResultFile
from finetune_cli import inputs, show
from finetune_cli.alone import alone
from finetune_cli.errors import UserError

STATE_FILE = "attempts.json"
TERMINATION_FILE = "termination-log"
STOP_AGAIN_SECONDS = 1.0
SIGNAL_EXIT = 128
"""A process ended by signal n has exit code 128 + n, as in a shell and in a pod."""


def run(
    file: Path,
    overrides: list[str],
    *,
    workdir: Path | None,
    s3_root: Path | None,
    model_mirror: str | None,
    dataset_mirror: str | None,
) -> int:
    """Trains, or goes on, or shows the result that is there already; the trainer's exit code. Raises UserError."""
    job = inputs.job(file, overrides)
    root = inputs.s3_root(s3_root)
    mirrors = {
        "model_mirror": inputs.mirror("--model-mirror", model_mirror),
        "dataset_mirror": inputs.mirror("--dataset-mirror", dataset_mirror),
    }
    if not job.spec.trainer.command and importlib.util.find_spec("torch") is None:
        raise ModuleNotFoundError("torch", name="torch")
    scratch = (workdir or Path(".finetune") / job.metadata["name"]).resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    with alone(scratch, f"{job.metadata['name']} is being trained in {scratch} already") as lock:
        log = scratch / TERMINATION_FILE
        log.unlink(missing_ok=True)
        environment = trainer_environment(job, _next_attempt(scratch), workdir=str(scratch), termination_log=str(log), **mirrors)
        if root is not None:
            environment[names.ENV_S3_ROOT] = str(root)
        command = [*job.spec.trainer.command, *job.spec.trainer.args] or [sys.executable, "-m", "finetune_trainer"]
        code = _train(command, environment, lock, log, ours=not job.spec.trainer.command)
        end = _end_report(log)
    if code == 0 and job.spec.trainer.command:
        show.line(f"{job.metadata['name']}: trainer.command ended well")
    elif code == 0 and end is not None:
        _show_result(job, end, root)
    else:
        _explain(code, end)
    return code


def _next_attempt(scratch: Path) -> int:
    """Counts this attempt; the number only grows, as in the cluster."""
    state = scratch / STATE_FILE
    try:
        attempt = int(json.loads(state.read_text())["attempt"]) + 1
    except FileNotFoundError:
        attempt = 1
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{state} cannot be read: delete it (checkpoints and results are elsewhere)") from error
    fresh = state.with_suffix(".part")
    fresh.write_text(json.dumps({"attempt": attempt}))
    fresh.replace(state)
    return attempt


# ------------------------------------------------------------------------------------------------------- the process ----
class _Stops:
    """Counts Ctrl-C and SIGTERM while the trainer runs."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        self.asked += 1


def _train(command: list[str], environment: dict[str, str], lock: int, log: Path, *, ours: bool) -> int:
    """Runs the trainer to its end; its exit code (128 + n where signal n ended it)."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(names.RESERVED_ENV_PREFIXES)}
    # A file of the user's named as a module of ours must not be imported in its place.
    everything = {**inherited, **environment, "PYTHONSAFEPATH": "1"}
    stops = _Stops()
    before = {number: signal.signal(number, stops) for number in (signal.SIGINT, signal.SIGTERM)}
    # Signals that are held back stay so in the child until it has its own handlers: a Ctrl-C while Python starts would kill it unsaved.
    # A script of the user's might never get one. Here they are held back too for a moment, and none is lost.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, before if ours else ())
    try:
        try:
            process = subprocess.Popen(command, env=everything, stdin=subprocess.DEVNULL, pass_fds=[lock])
        except OSError as error:
            raise UserError(f"trainer.command: {command[0]} cannot be started: {error.strerror}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        code = _wait(process, stops, log)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else SIGNAL_EXIT - code


def _wait(process: "subprocess.Popen[bytes]", stops: _Stops, log: Path) -> int:
    sent: float | None = None
    while True:
        try:
            return process.wait(timeout=0.1)
        except subprocess.TimeoutExpired:
            pass
        if stops.asked > 1:
            process.kill()
        elif stops.asked and not log.exists() and (sent is None or time.monotonic() - sent > STOP_AGAIN_SECONDS):
            if sent is None:
                show.note("\nstopping: the trainer saves a checkpoint first (Ctrl-C again ends it at once; the last one stays)")
            # Again and again, as the first may come before the trainer can hear it; but not to one that has said its last words, because
            # Python gives its handlers up while it ends.
            process.terminate()
            sent = time.monotonic()


def _end_report(log: Path) -> EndReport | None:
    try:
        return EndReport.model_validate_json(log.read_text())
    except (FileNotFoundError, ValidationError):
        return None  # a trainer that was killed tells nothing, or half of it


# -------------------------------------------------------------------------------------------------------- how it ended ----
def _show_result(job: FineTuneJob, end: EndReport, root: Path | None) -> None:
    recipe = job.spec.recipe()
    metrics = end.result.metrics if end.result else []
    values: dict[str, dict[str, str]] = {}
    for metric in metrics:
        split, _, name = metric.name.partition("/")
        values.setdefault(split, {})[name] = f"{float(metric.value):.4f}"
    show.line("")
    if end.outcome is Outcome.ALREADY_COMPLETED:
        show.line("trained already; the stored result:")
    if values:
        metrics_of = list(next(iter(values.values())))
        rows = [(name, *(scores.get(name, "") for scores in values.values())) for name in metrics_of]
        show.table(f"{job.metadata['name']}: the best model", ("metric", *values), rows, words=("metric",))
    stored = _stored_result(recipe.output.storage_uri, root)
    if stored.per_class:
        split = "test" if "test" in stored.per_class else next(iter(stored.per_class))
        show.scores(f"{split}, by label", stored.per_class[split])
    _show_model(stored, root)


def _stored_result(uri: str, root: Path | None) -> ResultFile:
    from finetune_trainer.errors import TrainingFailure
    from finetune_trainer.store import Missing, open_store

    try:
        return ResultFile.model_validate_json(open_store(uri, root).get(names.RESULT_FILE))
    except (TrainingFailure, Missing, ValidationError) as error:
        raise UserError(f"the training has ended well, but {uri}/{names.RESULT_FILE} cannot be read: {error}", 1) from error


def _show_model(stored: ResultFile, root: Path | None) -> None:
    uri = stored.result.model_uri or ""
    place = str(inputs.local_path(uri, root) or uri)
    show.line(f"model: {place}" + (f"  ({uri})" if place != uri else ""))
    show.line(f"try:   finetune predict --model {shlex.quote(place)} 'some text'")


def _explain(code: int, end: EndReport | None) -> None:
    """What the trainer's last line (its sentence) means, and what can be done. The sentence itself is on the screen already."""
    again = "run the same command again"
    killer = next((number.name for number in signal.Signals if number == code - SIGNAL_EXIT), None)
    if end is not None and end.reason in BY_REASON:
        failure = BY_REASON[end.reason]
        if end.outcome is Outcome.INTERRUPTED:
            saved = f"it goes on from step {end.checkpoint.step}" if end.checkpoint else "no step was done yet, it begins anew"
            show.note(f"finetune: stopped. To go on, {again}: {saved}.")
            return
        advice = f"{again} to go on from the last checkpoint" if failure.retriable else f"correct that, then {again}"
        show.note(f"finetune: the training failed with {failure.reason} ({failure.meaning}): {advice}. Exit code {code}.")
    elif killer is not None:
        memory = "; if nobody did that, memory ran out: lower hyperparameters.batchSize or dataset.maxLength"
        cause = f"the trainer was ended by {killer}{memory if killer == 'SIGKILL' else ''}"
        show.note(f"finetune: {cause}. To go on from the last checkpoint, {again}. Exit code {code}.")
    else:
        show.note(f"finetune: the trainer ended without a report; its output above says why. Exit code {code}.")
