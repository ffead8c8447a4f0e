"""Checkpoints: what training needs to go on, committed so that half of one never exists.

Layout below the checkpoint uri (every model/ loads with from_pretrained; tensors are safetensors, the rest JSON; no pickle):

    executions/0002.json                 {"parent": 400}: the second execution went on from step 400
    step-00000480-0002/model/...         weights, config, tokenizer
    step-00000480-0002/trainer/...       optimizer, random state, progress
    step-00000480-0002/MANIFEST.json     written last, if absent: without it the step does not exist
    micro-batch.json                     {"rows": 8}: an execution was out of memory with 16 at once (memory.py)
    LATEST.json, BEST.json               {"checkpoint": "step-00000480-0002"}: hints for people; readers look at the manifests

A reader takes the newest step whose every file matches the manifest's size and sha256, and falls back to older ones. An execution
that was only thought dead may go on writing: its steps beyond the point where a newer execution started are ignored.
"""

import contextlib
import errno
import hashlib
import json
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from finetune_api.finetunejob import CheckpointStatus
from finetune_api.report import MAX_REFUSED, Refused, Saving
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.lineage import Lineage
from finetune_trainer.manifests import NAME, folder_name, sealed
from finetune_trainer.manifests import read as read_manifest
from finetune_trainer.store import Missing, Store, sweep

MANIFEST = "MANIFEST.json"
_STEP = re.compile(f"({NAME})/.+")
_EXECUTION = re.compile(r"executions/([0-9]+)\.json")
MICRO_BATCH = "micro-batch.json"
WORTH_A_COPY = 1 << 20
"""Bytes from which on a copy at the storage, two requests, is better than sending it again."""
FILES_AT_ONCE = 4
"""Files on their way at the same time: one is hashed while another is sent, and small ones do not wait for the answer to each other."""


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
        self,
        store: Store,
        scratch: Path,
        lineage: Lineage,
        *,
        keep_last: int,
        overwrite: bool,
        log: Callable[[str], None] = print,
    ) -> None:
        self.store = store
        self.scratch = scratch
        self.lineage = lineage
        self.keep_last = keep_last
        self.overwrite = overwrite
        self.log = log
        self.execution = 0
        self.best: str | None = None
        """Name of the checkpoint with the best model: never deleted."""
        self.saving = Saving()
        self._counting = threading.Lock()
        self.refused: list[Refused] = []
        """Committed checkpoints that could not be used, newest first."""
        self._unreadable: list[str] = []
        """Those with a manifest that cannot be used, as last listed."""
        self._stored: dict[str, tuple[str, str]] = {}
        """Of the newest checkpoint: file -> sha256, key."""
        self._rubbish: dict[str, None] = {}
        """Keys that are to be deleted, in this order."""
        self._told_denied = False
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.stopping = threading.Event()
        """Set when the process is asked to end: from then on a save is waited for no longer than `seconds_to_end`."""
        self.seconds_to_end = threading.TIMEOUT_MAX
        self._asked: float | None = None
        self._late = False

    # ---------------------------------------------------------------------------------------------------------- read --
    def committed(self) -> list[Checkpoint]:
        """All committed checkpoints of this recipe that count, newest first."""
        found, _ = self._found(self.store.list())
        ours = []
        for checkpoint in found:
            if differs := self.lineage.differences(checkpoint.manifest):
                if not self.overwrite:
                    raise TrainingFailure(
                        "OutputExists",
                        f"{self.store.uri} holds checkpoints of another recipe ({differs}): change output.storageUri, or set "
                        "output.overwrite: true to train anew",
                    )
            else:
                ours.append(checkpoint)
        return sorted(ours, key=lambda c: (c.step, c.manifest["execution"]), reverse=True)

    def _found(self, keys: list[str]) -> tuple[list[Checkpoint], list[Checkpoint]]:
        """Committed checkpoints of any recipe: those that count, and those beyond the point where a newer execution began."""
        parents = {n: parent for n, key in _executions(keys).items() if (parent := self._parent(key)) is not None}
        counting: list[Checkpoint] = []
        overtaken: list[Checkpoint] = []
        self._unreadable = []
        for key in sorted(keys, reverse=True):
            # Names of the layout alone: "step-x/../../MANIFEST.json" is one that a bucket may hold, and leads out of the scratch folder.
            if not (named := _STEP.fullmatch(key)) or key != f"{named[1]}/{MANIFEST}":
                continue
            if manifest := self._manifest(key):
                newer = [parent for n, parent in parents.items() if n > manifest["execution"]]
                counts = all(manifest["step"] <= parent for parent in newer)
                (counting if counts else overtaken).append(Checkpoint(named[1], manifest))
            else:
                self._unreadable.append(named[1])
        return counting, overtaken

    def restore(self) -> tuple[Checkpoint, Path] | None:
        """The newest checkpoint that verifies, downloaded. None where there is none; CheckpointCorrupt where none verifies."""
        candidates = self.committed()
        for name in self._unreadable:
            self._remember_refused(name, f"{MANIFEST} cannot be read or was changed")
        by_name = {c.name: c for c in candidates}
        for checkpoint in candidates:
            if (folder := self.fetch(checkpoint)) is None:
                continue
            # Told now and not after hours of training, when the best model is to be restored.
            best = checkpoint.manifest.get("best")
            if best in (None, checkpoint.name) or (best in by_name and self.fetch(by_name[best]) is not None):
                self._remember(checkpoint)
                return checkpoint, folder
            self._refuse(checkpoint, f"{best}, its best model, cannot be read")
        # A single one may be a first save that was cut off, where the file system cannot write whole or not at all.
        if candidates or len(self._unreadable) > 1:
            raise TrainingFailure(
                "CheckpointCorrupt",
                f"{self.store.uri} holds {len(candidates) + len(self._unreadable)} checkpoints and none of them can be read: delete them "
                "to train anew",
            )
        return None

    def fetch(self, checkpoint: Checkpoint) -> Path | None:
        """Downloads and verifies; None (and a line in the log) if a file is missing or differs."""
        folder = self.scratch / "restored" / checkpoint.name
        there = self.store.entries(f"{checkpoint.name}/")
        for file in checkpoint.manifest["files"]:  # before anything is fetched
            found = there.get(f"{checkpoint.name}/{file['path']}")
            if found is None or found.size != file["size"]:
                what = "is missing" if found is None else f"has {found.size} bytes and not {file['size']}"
                self._refuse(checkpoint, f"{file['path']} {what}")
                return None
        with ThreadPoolExecutor(FILES_AT_ONCE, "download") as pool:
            wrong = list(filter(None, pool.map(partial(self._receive, checkpoint.name, folder), checkpoint.manifest["files"])))
        if wrong:
            self._refuse(checkpoint, wrong[0])
            return None
        return folder

    def _receive(self, name: str, folder: Path, file: dict[str, Any]) -> str | None:
        """Why this file cannot be used."""
        target = folder / file["path"]
        try:
            self.store.download(f"{name}/{file['path']}", target)
        except Missing:
            return f"{file['path']} is missing"
        if _sha256(target) != file["sha256"]:
            return f"{file['path']} differs from its manifest"
        return None

    def _refuse(self, checkpoint: Checkpoint, why: str) -> None:
        self.log(f"checkpoint {checkpoint.name} is not used: {why}")
        self._remember_refused(checkpoint.name, why)

    def _remember_refused(self, name: str, why: str) -> None:
        if len(self.refused) < MAX_REFUSED:
            self.refused.append(Refused(checkpoint=name, message=why))

    def micro_batch(self) -> int | None:
        """How many rows at once this recipe's executions are to try, where one was out of memory."""
        try:
            told = self._json(MICRO_BATCH)
            if told["recipe"] == self.lineage.digest and int(told["rows"]) >= 1:
                return int(told["rows"])
        except Missing:
            pass
        except _NOT_OURS:
            self.log(f"{MICRO_BATCH} is not used: it is not one of ours")
        return None

    def _json(self, key: str) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.store.get(key))
        return value

    def _parent(self, key: str) -> int | None:
        """The step that an execution began from; None for one that died while it wrote that down, and so never began."""
        try:
            return int(self._json(key)["parent"])
        except _NOT_OURS:
            self.log(f"{self.store.uri}/{key} is not used: it is not one of ours")
            return None

    def _manifest(self, key: str) -> dict[str, Any] | None:
        with contextlib.suppress(Missing):
            if found := read_manifest(self.store.get(key), key.removesuffix(f"/{MANIFEST}")):
                return found
        self.log(f"checkpoint manifest {key} is not used: it is not one of ours")
        return None

    # --------------------------------------------------------------------------------------------------------- write --
    def begin(self, parent: int, needs: Collection[str | None] = ()) -> None:
        """Registers this execution as the newest; what older ones write beyond `parent` does not count from now on, and is removed.

        Raises Superseded where an older one, that was only thought dead, has deleted a checkpoint that this one `needs`: then it does not
        count itself, and the newer steps do.
        """
        number = max(_executions(self.store.list("executions/")), default=0) + 1
        # The id tells our own entry from that of an execution that begins in the same second (put_if_absent compares content).
        data = json.dumps({"parent": parent, "time": _now(), "id": uuid.uuid4().hex}).encode()
        while not self.store.put_if_absent(f"executions/{number:04d}.json", data):
            number += 1
        self.execution = number
        if lost := {*needs} - {None, *(c.name for c in self.committed())}:
            self.store.delete(f"executions/{number:04d}.json")
            raise TrainingFailure(
                "Superseded", f"{', '.join(map(str, lost))} was deleted meanwhile: an older execution is still at work"
            )
        sweep(self.store, "step-", self.log)
        with self._only_told():
            self._rubbish |= dict.fromkeys(self._leftovers())
            self._delete_rubbish()

    @property
    def origin(self) -> str:
        """The id of the oldest execution at this place: a training that begins anew after its output was deleted has another."""
        for _, key in sorted(_executions(self.store.list("executions/")).items()):
            with contextlib.suppress(*_NOT_OURS):  # half written, or not one of ours
                return str(self._json(key)["id"])
        return ""

    def tell_micro_batch(self, rows: int) -> None:
        """For the executions after this one; any process may say it."""
        self.store.put(MICRO_BATCH, json.dumps({"rows": rows, "recipe": self.lineage.digest}).encode())

    def name(self, step: int) -> str:
        """Folder of this execution's checkpoint at this step."""
        return folder_name(step, self.execution)

    @property
    def busy(self) -> bool:
        """Whether a save is on its way."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, step: int, hold: Callable[[], Callable[[Path], None]], done: Callable[[Checkpoint], None]) -> None:
        """Has `hold` copy what is to be saved; what that returns writes it into a folder, in the background, where it is uploaded and
        committed. One save is on its way at a time: waits first for the one before."""
        began = time.perf_counter()
        self.wait()
        write = hold()
        self._thread = threading.Thread(target=self._commit, args=(step, _now(), write, self.best, done), name="checkpoint")
        self._thread.start()
        self._count(blocking_seconds=time.perf_counter() - began)

    def skip(self) -> None:
        """A save that was due was left out."""
        self._count(skipped=1)

    def _count(self, **more: float) -> None:
        with self._counting:  # all threads count
            self.saving = self.saving.model_copy(update={name: getattr(self.saving, name) + n for name, n in more.items()})

    def wait(self) -> None:
        """Until nothing is on its way. Raises what went wrong in the background, or that there is no more time to wait."""
        if self._thread is not None:
            while self._thread.is_alive():
                self._thread.join(0.2)
                if self.stopping.is_set():
                    self._asked = self._asked or time.monotonic()
                    self._thread.join(max(0.0, self._asked + self.seconds_to_end - time.monotonic()))
                    if self._thread.is_alive():
                        self._late = True
                        raise TrainingFailure(
                            "StorageUnavailable",
                            f"{self.store.uri}: asked to end, and the last save did not arrive within {self.seconds_to_end:.0f} s "
                            "(checkpoint.saveDeadlineSeconds)",
                        )
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def settle(self) -> None:
        """Where training has failed: lets what is on its way come through first, as an interpreter that ends starts no more threads."""
        try:
            if not self._late:
                self.wait()
        except Exception as error:  # noqa: BLE001  (told: the other failure is the one that counts)
            self.log(f"the last save failed as well: {getattr(error, 'message', type(error).__name__)}")

    def check_not_replaced(self) -> None:
        """A newer execution has begun: what this one writes no longer counts, and it must not delete what the newer one needs."""
        newest = max(_executions(self.store.list("executions/")), default=0)
        if newest > self.execution:
            raise TrainingFailure(
                "Superseded",
                f"execution {newest} has taken over {self.store.uri} from this one, execution {self.execution}: if another job of the "
                "same recipe writes there too, give each an output.storageUri of its own",
            )

    def _commit(
        self, step: int, taken: str, write: Callable[[Path], None], best: str | None, done: Callable[[Checkpoint], None]
    ) -> None:
        try:
            name = self.name(step)
            folder = self.scratch / "staged" / name
            with self._room(folder):
                shutil.rmtree(folder.parent, ignore_errors=True)  # of a save that failed
                write(folder)
            manifest = {
                "step": step,
                "execution": self.execution,
                **self.lineage.facts,
                "best": best,
                "time": taken,
                "files": self._upload(name, folder),
            }
            if not self.store.put_if_absent(f"{name}/{MANIFEST}", json.dumps(sealed(manifest)).encode()):
                raise TrainingFailure("Superseded", f"{self.store.uri}/{name} was committed by somebody else")
            self._remember(Checkpoint(name, manifest))
            shutil.rmtree(folder)
            self.check_not_replaced()
            self._count(saves=1)
            done(Checkpoint(name, manifest))
            with self._only_told():
                self.store.put("LATEST.json", json.dumps({"checkpoint": name}).encode())
                if best is not None:
                    self.store.put("BEST.json", json.dumps({"checkpoint": best}).encode())
                self._delete_old()
        except BaseException as error:  # noqa: BLE001  (raised again in the training thread, by wait)
            self._error = error

    def _upload(self, name: str, folder: Path) -> list[dict[str, Any]]:
        """The manifest's files. What is the same as in the last commit is copied where it is."""
        began = time.perf_counter()
        with ThreadPoolExecutor(FILES_AT_ONCE, "upload") as pool:
            files = list(pool.map(partial(self._send, name, folder), sorted(p for p in folder.rglob("*") if p.is_file())))
        arrived = self.store.entries(f"{name}/")
        for file in files:
            entry = arrived.get(key := f"{name}/{file['path']}")
            if (there := entry.size if entry else 0) != file["size"]:
                raise TrainingFailure(
                    "StorageUnavailable", f"{self.store.uri}/{key} arrived with {there} of {file['size']} bytes"
                )
        self._count(upload_seconds=time.perf_counter() - began)
        return files

    def _send(self, name: str, folder: Path, path: Path) -> dict[str, Any]:
        key, size, sha256 = path.relative_to(folder).as_posix(), path.stat().st_size, _sha256(path)
        if not self._copied(key, size, sha256, f"{name}/{key}"):
            self.store.upload(path, f"{name}/{key}")
            self._count(uploaded_bytes=size)
        return {"path": key, "size": size, "sha256": sha256}

    def _remember(self, checkpoint: Checkpoint) -> None:
        self._stored = {f["path"]: (f["sha256"], f"{checkpoint.name}/{f['path']}") for f in checkpoint.manifest["files"]}

    def _copied(self, path: str, size: int, sha256: str, key: str) -> bool:
        known, source = self._stored.get(path, ("", ""))
        if known != sha256 or size < WORTH_A_COPY:
            return False
        try:
            self.store.copy(source, key)
        except Missing:  # somebody has deleted it
            return False
        return True

    @contextlib.contextmanager
    def _room(self, folder: Path) -> Iterator[None]:
        """A full disk is told as one."""
        try:
            yield
        except Exception as error:
            # safetensors has an error of its own, with the system's words.
            if getattr(error, "errno", None) != errno.ENOSPC and "No space left on device" not in str(error):
                raise
            raise TrainingFailure(
                "StorageUnavailable",
                f"the disk of {folder} is full: a checkpoint is put together there before it is uploaded; give the pod's work folder more "
                "room (trainer.podTemplate)",
            ) from error

    def _delete_old(self) -> None:
        found = self.committed()
        # Every kept checkpoint needs its best model: a resume may fall back to an older one.
        needed = {self.best, *(c.manifest.get("best") for c in found[: self.keep_last])}
        for old in found[self.keep_last :]:
            if old.name not in needed:
                # The manifest first: from there on the step does not exist.
                self._rubbish |= dict.fromkeys(
                    f"{old.name}/{path}" for path in (MANIFEST, *(f["path"] for f in old.manifest["files"]))
                )
        self._delete_rubbish()

    def _leftovers(self) -> list[str]:
        """What older executions left and nobody will read again: steps that they did not commit, and ours that no longer count.

        Never a newer execution's, nor what another recipe has committed, nor the best model of a checkpoint that counts.
        """
        keys = self.store.list()
        counting, overtaken = self._found(keys)
        kept = {key.removesuffix(f"/{MANIFEST}") for key in keys if key.endswith(f"/{MANIFEST}")}
        kept -= {c.name for c in overtaken if not self.lineage.differences(c.manifest)}
        kept |= {str(c.manifest.get("best")) for c in counting}
        steps = [match for key in keys if (match := _STEP.fullmatch(key))]
        found = [match[0] for match in steps if int(match[2]) < self.execution and match[1] not in kept]
        return sorted(found, key=lambda key: not key.endswith(f"/{MANIFEST}"))  # first: from there on the step does not exist

    def _delete_rubbish(self) -> None:
        for key in list(self._rubbish):
            self.store.delete(key)
            del self._rubbish[key]

    @contextlib.contextmanager
    def _only_told(self) -> Iterator[None]:
        """What is not tidied up takes room and nothing else: the storage's refusal is told, and the next save tries again."""
        try:
            yield
        except TrainingFailure as failure:
            denied = failure.failure.reason == "StorageDenied"
            if not denied and failure.failure.reason != "StorageUnavailable":
                raise
            if not (denied and self._told_denied):
                self.log(f"old checkpoints are not deleted now, the next save tries again: {failure.message}")
            self._told_denied = self._told_denied or denied


_NOT_OURS = (ValueError, KeyError, TypeError, OverflowError, RecursionError)
"""What comes of reading JSON that may hold anything."""


def _executions(keys: Iterable[str]) -> dict[int, str]:
    """Keys of executions by number; people and consoles leave other things beside them."""
    return {int(match[1]): key for key in keys if (match := _EXECUTION.fullmatch(key))}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
