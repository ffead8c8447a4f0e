"""Checkpoints: what training needs to go on, committed so that half of one never exists.

Layout below the checkpoint uri (every model/ loads with from_pretrained; tensors are safetensors, the rest JSON; no pickle):

    executions/0002.json                 {"parent": 400}: the second execution went on from step 400
    step-00000480-0002/model/...         weights, config, tokenizer
    step-00000480-0002/trainer/...       optimizer, random state, progress
    step-00000480-0002/MANIFEST.json     written last, if absent: without it the step does not exist

A reader takes the newest step whose every file matches the manifest's size and sha256, and falls back to older ones. An execution
that was only thought dead may go on writing: its steps beyond the point where a newer execution started are ignored.
"""

import hashlib
import json
import shutil
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune_api.finetunejob import CheckpointStatus
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.store import Missing, Store, is_plain

MANIFEST = "MANIFEST.json"


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: its folder below the store, and what its manifest says."""

    name: str
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    def status(self, store: Store) -> CheckpointStatus:
        size = sum(int(f["size"]) for f in self.manifest["files"])
        return CheckpointStatus(step=self.step, uri=f"{store.uri}/{self.name}", time=self.manifest["time"], size_bytes=size)


class Checkpoints:
    """The checkpoints of one job, seen and written by one execution."""

    def __init__(
        self, store: Store, scratch: Path, digest: str, *, keep_last: int, overwrite: bool, log: Callable[[str], None] = print
    ) -> None:
        self.store = store
        self.scratch = scratch
        self.digest = digest
        self.keep_last = keep_last
        self.overwrite = overwrite
        self.log = log
        self.execution = 0
        self.best: str | None = None
        """Name of the checkpoint with the best model: never deleted."""
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    # ---------------------------------------------------------------------------------------------------------- read --
    def committed(self) -> list[Checkpoint]:
        """All committed checkpoints of this recipe that count, newest first."""
        keys = self.store.list()
        parents = {int(k[11:-5]): self._json(k)["parent"] for k in keys if k.startswith("executions/") and k.endswith(".json")}
        found = []
        for key in keys:
            if key.endswith(f"/{MANIFEST}") and key.startswith("step-") and (manifest := self._manifest(key)):
                newer = [parent for n, parent in parents.items() if n > manifest["execution"]]
                if all(manifest["step"] <= parent for parent in newer):
                    found.append(Checkpoint(key.removesuffix(f"/{MANIFEST}"), manifest))
        foreign = [c for c in found if c.manifest["recipe"] != self.digest]
        if foreign and not self.overwrite:
            raise TrainingFailure(
                "OutputExists",
                f"{self.store.uri} holds checkpoints of another recipe: change output.storageUri, or set output.overwrite: true "
                "to train anew",
            )
        ours = [c for c in found if c.manifest["recipe"] == self.digest]
        return sorted(ours, key=lambda c: (c.step, c.manifest["execution"]), reverse=True)

    def restore(self) -> tuple[Checkpoint, Path] | None:
        """The newest checkpoint that verifies, downloaded. None where there is none; CheckpointCorrupt where none verifies."""
        candidates = self.committed()
        by_name = {c.name: c for c in candidates}
        for checkpoint in candidates:
            if (folder := self.fetch(checkpoint)) is None:
                continue
            # Told now and not after hours of training, when the best model is to be restored.
            best = checkpoint.manifest.get("best")
            if best in (None, checkpoint.name) or (best in by_name and self.fetch(by_name[best]) is not None):
                return checkpoint, folder
            self.log(f"checkpoint {checkpoint.name} is not used: {best}, its best model, cannot be read")
        if candidates:
            raise TrainingFailure(
                "CheckpointCorrupt",
                f"{self.store.uri} holds {len(candidates)} checkpoints and none of them can be read: delete them to train anew",
            )
        return None

    def fetch(self, checkpoint: Checkpoint) -> Path | None:
        """Downloads and verifies; None (and a line in the log) if a file is missing or differs."""
        folder = self.scratch / "restored" / checkpoint.name
        for file in checkpoint.manifest["files"]:
            target = folder / file["path"]
            try:
                self.store.download(f"{checkpoint.name}/{file['path']}", target)
            except Missing:
                self.log(f"checkpoint {checkpoint.name} is not used: {file['path']} is missing")
                return None
            if target.stat().st_size != file["size"] or _sha256(target) != file["sha256"]:
                self.log(f"checkpoint {checkpoint.name} is not used: {file['path']} differs from its manifest")
                return None
        return folder

    def _json(self, key: str) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.store.get(key))
        return value

    def _manifest(self, key: str) -> dict[str, Any] | None:
        try:
            manifest = self._json(key)
            safe = all(is_plain(f["path"]) and int(f["size"]) >= 0 and len(f["sha256"]) == 64 for f in manifest["files"])
            typed = isinstance(manifest["step"], int) and isinstance(manifest["execution"], int)
            if safe and typed and manifest["recipe"] and datetime.fromisoformat(manifest["time"]).tzinfo:
                return manifest
        except (ValueError, KeyError, TypeError):
            pass
        self.log(f"checkpoint manifest {key} is not used: it is not one of ours")
        return None

    # --------------------------------------------------------------------------------------------------------- write --
    def begin(self, parent: int) -> None:
        """Registers this execution as the newest; what older ones write beyond `parent` does not count from now on."""
        number = max([0, *(int(k[11:-5]) for k in self.store.list("executions/"))]) + 1
        # The id tells our own entry from that of an execution that begins in the same second (put_if_absent compares content).
        data = json.dumps({"parent": parent, "time": _now(), "id": uuid.uuid4().hex}).encode()
        while not self.store.put_if_absent(f"executions/{number:04d}.json", data):
            number += 1
        self.execution = number

    @property
    def origin(self) -> str:
        """The id of the oldest execution at this place: a training that begins anew after its output was deleted has another."""
        return str(self._json(min(self.store.list("executions/"))).get("id", ""))

    def name(self, step: int) -> str:
        """Folder of this execution's checkpoint at this step."""
        return f"step-{step:08d}-{self.execution:04d}"

    def save(self, step: int, stage: Callable[[Path], None], done: Callable[[Checkpoint], None]) -> None:
        """Stages now, uploads and commits in the background; waits first if the save before is still on its way."""
        self.wait()
        folder = self.scratch / "staged" / self.name(step)
        stage(folder)
        self._thread = threading.Thread(target=self._commit, args=(step, folder, self.best, done), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is on its way. Raises what went wrong in the background."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _check_not_replaced(self) -> None:
        """A newer execution has begun: what this one writes no longer counts, and it must not delete what the newer one needs."""
        newest = max(int(k[11:-5]) for k in self.store.list("executions/"))
        if newest > self.execution:
            raise TrainingFailure("Interrupted", f"execution {newest} of this training has taken over from this one")

    def _commit(self, step: int, folder: Path, best: str | None, done: Callable[[Checkpoint], None]) -> None:
        try:
            name = self.name(step)
            files = []
            for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                key = path.relative_to(folder).as_posix()
                self.store.upload(path, f"{name}/{key}")
                files.append({"path": key, "size": path.stat().st_size, "sha256": _sha256(path)})
            manifest = {
                "step": step,
                "execution": self.execution,
                "recipe": self.digest,
                "best": best,
                "time": _now(),
                "files": files,
            }
            if not self.store.put_if_absent(f"{name}/{MANIFEST}", json.dumps(manifest).encode()):
                raise TrainingFailure("Interrupted", f"{self.store.uri}/{name} was committed by somebody else")
            shutil.rmtree(folder)
            self._check_not_replaced()
            done(Checkpoint(name, manifest))
            self._delete_old()
        except BaseException as error:  # noqa: BLE001  (raised again in the training thread, by wait)
            self._error = error

    def _delete_old(self) -> None:
        found = self.committed()
        # Every kept checkpoint needs its best model: a resume may fall back to an older one.
        needed = {self.best, *(c.manifest.get("best") for c in found[: self.keep_last])}
        for old in found[self.keep_last :]:
            if old.name not in needed:
                self.store.delete(f"{old.name}/{MANIFEST}")  # first: from here on the step does not exist
                for file in old.manifest["files"]:
                    self.store.delete(f"{old.name}/{file['path']}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
