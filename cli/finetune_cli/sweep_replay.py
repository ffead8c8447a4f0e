"""`finetune sweep replay` and `finetune sweep report`: reads a sweep from a folder, from its history or from a cluster.

The cluster is read through kubectl, which knows the user's contexts and credentials, so that the command line needs no client of its own.
"""

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from finetune_api import names
from finetune_api.manifest import ManifestError, parse_sweep
from finetune_cli import show
from finetune_cli.errors import UserError
from finetune_cli.sweep_objects import FOLDER, Object, read
from finetune_operator.domain import history
from finetune_operator.domain import trials as t
from finetune_operator.domain.child import owned_by
from finetune_operator.domain.replay import Replayed, replay
from finetune_operator.search.types import Study

Sweep = tuple[Object, list[Object]]
"""A HyperparameterSweep and its FineTuneJobs."""
KUBECTL_SECONDS = 120


def replay_sweep(source: Path | None, name: str | None, namespace: str | None, warm: Path | None) -> int:
    """Makes all decisions again; 0 where they come out as they were kept, else 1. Raises UserError."""
    if source is not None:
        if source.is_file() and "asOf" in _history_file(source).get("leftOut", ()):
            raise UserError(
                f"{source} cannot be replayed: of so many trials it does not hold what each decision knew; replay the cluster's objects",
                1,
            )
        sweep, jobs = load(source)
        other = load(warm) if warm is not None else _beside(source, sweep)
    else:
        sweep, jobs = from_cluster(str(name), namespace)
        needed = (sweep["spec"].get("warmStartFrom") or {}).get("name")
        other = from_cluster(needed, namespace) if needed else None
    try:
        found = replay(sweep, jobs, other)
    except ManifestError as error:
        raise UserError(f"the sweep cannot be read: {'; '.join(error.problems)}", 1) from error
    except LookupError as error:
        raise UserError(f"cannot be replayed: {error.args[0]}: name them with --warm", 1) from error
    return _tell(sweep["metadata"]["name"], found)


def _beside(source: Path, sweep: Object) -> Sweep | None:
    """The sweep that it started warm from, where `finetune run` has put it."""
    needed = (sweep["spec"].get("warmStartFrom") or {}).get("name")
    folder = (source if source.is_dir() else source.parent).resolve().parent / str(needed)
    return load(folder) if needed and folder.is_dir() else None


def _tell(name: str, found: Replayed) -> int:
    differ = [m for m in found.mismatches if m.replayed]
    show.line(f"{name}: {found.suggestions} suggestions and {found.verdicts} verdicts come out as they were kept")
    for mismatch in found.mismatches:
        show.line(f"  {mismatch.trial}, {mismatch.about}: {mismatch.message}")
    if found.mismatches:
        show.line(f"{len(differ)} differ, {len(found.mismatches) - len(differ)} cannot be replayed")
    return 1 if found.mismatches else 0


def report(source: Path, out: Path | None) -> int:
    """Writes the report; 0. Raises UserError."""
    from finetune_cli.sweep_report import report_html

    document_ = _history_file(source) if source.is_file() else document(*load(source))
    file = out or (source if source.is_dir() else source.parent) / "report.html"
    file.write_text(report_html(document_), encoding="utf-8")
    show.line(f"report: {file}")
    return 0


# --------------------------------------------------------------------------------------------------------- sources ----
def load(source: Path) -> Sweep:
    """Of the folder of `finetune run`, or of a history. Raises UserError."""
    if source.is_file():
        try:
            return history.objects(_history_file(source))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{source} is no history of a sweep: {error!r}") from error
    found = read(source / FOLDER if (source / FOLDER).is_dir() else source)
    sweeps = [item for item in found.values() if item["kind"] == names.KIND_SWEEP]
    if len(sweeps) != 1:
        raise UserError(f"{source}: there is no sweep; name the folder of one, .finetune/<name>, or its {names.HISTORY_FILE}")
    return sweeps[0], [item for item in found.values() if item["kind"] == names.KIND_JOB]


def _history_file(source: Path) -> Object:
    try:
        found = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{source} cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("kind") != history.KIND:
        raise UserError(f"{source} is no history of a sweep: its kind is not {history.KIND}")
    return found


def from_cluster(name: str, namespace: str | None) -> Sweep:
    """Of the cluster that kubectl speaks to. Raises UserError."""
    sweep = _kubectl(["get", f"{names.PLURAL_SWEEP}.{names.GROUP}", name], namespace)
    jobs = _kubectl(["get", f"{names.PLURAL_JOB}.{names.GROUP}", "-l", f"{names.LABEL_SWEEP}={name}"], namespace)
    return sweep, [job for job in jobs["items"] if owned_by(job, sweep["metadata"]["uid"])]


def _kubectl(arguments: Sequence[str], namespace: str | None) -> Object:
    if shutil.which("kubectl") is None:
        raise UserError(
            "kubectl is not installed, and a sweep of a cluster is read through it: install it, or name its sweep.json", 1
        )
    where = ["-n", namespace] if namespace else []
    try:
        done = subprocess.run(
            ["kubectl", *arguments, *where, "-o", "json"],
            capture_output=True, text=True, timeout=KUBECTL_SECONDS, check=True,
        )  # fmt: skip
        found: Object = json.loads(done.stdout)
    except subprocess.CalledProcessError as error:
        raise UserError(f"kubectl {' '.join(arguments)}: {error.stderr.strip()}", 1) from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"kubectl {' '.join(arguments)}: no answer within {KUBECTL_SECONDS} seconds", 1) from error
    except ValueError as error:
        raise UserError(f"kubectl {' '.join(arguments)}: what it printed is not JSON: {error}", 1) from error
    return found


def document(sweep: Object, jobs: Sequence[Object]) -> Object:
    """The history of a sweep, as it is exported. Raises ManifestError."""
    parsed = parse_sweep({key: sweep[key] for key in ("apiVersion", "kind", "metadata", "spec")})
    status = sweep.get("status") or {}
    by_index = {said.index: job for job in jobs if (said := t.chosen(job))}
    created = max([int((status.get("trials") or {}).get("created") or 0), *(index + 1 for index in by_index)])
    study = Study(parsed.spec)
    return history.history(study, parsed, status, t.read_trials(study, by_index, created), by_index)
