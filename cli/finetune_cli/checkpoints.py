"""`finetune checkpoints`: what a training can go on from, whether it is whole, and one of its models as a folder."""

import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune_api.failures import BY_REASON
from finetune_cli import inputs, show
from finetune_cli.errors import UserError
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.inspect_checkpoints import Found, Inspection, Standing
from finetune_trainer.lineage import Lineage
from finetune_trainer.store import open_store

CORRUPT = BY_REASON["CheckpointCorrupt"].exit_code or 1
"""Exit code where a checkpoint is not what its manifest says."""
WHOLE, GONE = "yes", "deleted meanwhile"


def checkpoints(
    uri: str | None,
    file: Path | None,
    overrides: list[str],
    *,
    verify: bool,
    export: str | None,
    to: Path | None,
    as_json: bool,
    s3_root: Path | None,
) -> int:
    """Lists, verifies or exports; 0, or CORRUPT. Raises UserError."""
    if (uri is None) == (file is None):
        raise UserError("name the checkpoints by -f job.yaml or by their uri, one of the two")
    if (export is None) != (to is None):
        raise UserError("--export STEP|best|latest and --to FOLDER belong together")
    if to is not None and to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"--to {to}: it is there already and is not an empty folder")
    place, lineage = _place(uri, file, overrides)
    with tempfile.TemporaryDirectory(prefix="finetune-checkpoints-") as scratch:
        try:
            store = open_store(place, inputs.s3_root(s3_root))
            store.check()
            inspection = Inspection(store, Path(scratch) / "fetched", lineage)
            found, unreadable = inspection.look()
            if export is not None and to is not None:
                return _export(inspection, _choose(found, export, place), to)
            said = {f.checkpoint.name: _verify(inspection, f) for f in found} if verify else {}
        except TrainingFailure as failure:
            raise UserError(f"{failure.failure.reason}: {failure.message}", failure.failure.exit_code or 1) from failure
    _show(place, found, said, as_json=as_json)
    corrupt = [word for word in said.values() if word not in (WHOLE, GONE)]
    for sentence in (*unreadable, *corrupt):
        show.note(sentence)
    return CORRUPT if corrupt or (verify and unreadable) else 0


def _place(uri: str | None, file: Path | None, overrides: list[str]) -> tuple[str, Lineage | None]:
    """Where they are, and of which recipe where a manifest says it."""
    if file is not None:
        job = inputs.job(file, overrides)
        if not job.spec.has_recipe:
            raise UserError(f"{file}: trainer.command runs a script of yours, whose checkpoints only it knows")
        recipe = job.spec.recipe()
        return recipe.checkpoint_uri, Lineage(recipe.digest(), recipe)
    if overrides:
        raise UserError("--set changes a manifest: name one with -f")
    if not str(uri).startswith(("s3://", "file:///")):
        raise UserError(f"{uri}: must be s3://bucket/prefix or file:///path")
    return str(uri).rstrip("/"), None


def _verify(inspection: Inspection, found: Found) -> str:
    with inspection.fetched(found.checkpoint) as got:
        return WHOLE if isinstance(got, Path) else got or GONE


def _choose(found: list[Found], wanted: str, place: str) -> Found:
    """The one that is meant: of several with this step one that counts, and the newest of those."""
    counting = [f for f in found if f.standing is Standing.COUNTS]
    if wanted == "latest":
        meant = counting
    elif wanted == "best":
        meant = [f for f in counting if f.best]
    elif wanted.isdecimal():
        meant = [f for f in (*counting, *found) if f.checkpoint.step == int(wanted)]
    else:
        raise UserError(f"--export {wanted}: must be a step, best or latest")
    if not meant:
        steps = ", ".join(str(f.checkpoint.step) for f in counting) or "none"
        raise UserError(f"--export {wanted}: {place} has no such checkpoint; steps that count: {steps}")
    return meant[0]


def _export(inspection: Inspection, chosen: Found, to: Path) -> int:
    """Writes its model/ once all of the checkpoint is known to be whole: there is no folder with half a model."""
    with inspection.fetched(chosen.checkpoint) as got:
        if not isinstance(got, Path):
            show.note(got or f"checkpoint {chosen.checkpoint.name} was deleted meanwhile: try again")
            return CORRUPT if got else 1
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{to.name}.", dir=to.parent) as beside:
            (Path(shutil.copytree(got / "model", Path(beside) / "model"))).replace(to)
    show.line(f"model of step {chosen.checkpoint.step} ({chosen.checkpoint.name}, {chosen.standing}): {to}")
    if not (to / "config.json").is_file():
        show.note("it holds only what was trained (adapters, or the head): it goes onto the model that finetune.json names")
    return 0


def _show(place: str, found: list[Found], said: dict[str, str], *, as_json: bool) -> None:
    if as_json:
        show.as_json([_row(place, f, said) for f in found])
        return
    if not found:
        show.line(f"{place}: there are no checkpoints (by default they are in checkpoints/ below output.storageUri)")
        return
    several = len({f.checkpoint.manifest["recipe"] for f in found}) > 1
    header = (
        "step",
        "execution",
        "committed (UTC)",
        "size",
        "best",
        "standing",
        *(["recipe"] * several),
        *(["whole"] * bool(said)),
    )
    rows = []
    for f in found:
        manifest = f.checkpoint.manifest
        committed = datetime.fromisoformat(manifest["time"]).astimezone(UTC)
        cells = [str(f.checkpoint.step), str(manifest["execution"]), f"{committed:%Y-%m-%d %H:%M:%S}", _size(f.size_bytes)]
        cells += ["best" if f.best else "", str(f.standing), *([manifest["recipe"][:8]] * several)]
        word = said.get(f.checkpoint.name, "")
        rows.append((*cells, *([word if word in (WHOLE, GONE) else "no"] if said else [])))
    show.table(f"checkpoints at {place}", header, rows, words=("committed (UTC)", "best", "standing", "recipe", "whole"))


def _row(place: str, found: Found, said: dict[str, str]) -> dict[str, Any]:
    manifest = found.checkpoint.manifest
    row = {
        "name": found.checkpoint.name,
        "uri": f"{place}/{found.checkpoint.name}",
        "step": found.checkpoint.step,
        "execution": manifest["execution"],
        "time": manifest["time"],
        "sizeBytes": found.size_bytes,
        "best": found.best,
        "standing": str(found.standing),
        "recipeDigest": manifest["recipe"],
    }
    if word := said.get(found.checkpoint.name):
        row["whole"] = word == WHOLE
        row["problem"] = None if word == WHOLE else word
    return row


def _size(count: int) -> str:
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{count} B" if units[0] == "B" else f"{size:.1f} {units[0]}"
