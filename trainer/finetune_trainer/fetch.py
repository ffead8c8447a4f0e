"""Models and data sets from a store into a folder of this machine: room is checked first, progress is told, and what is there stays.

A container that starts again finds in `.fetched.json` which object each file was; of one that is still the same nothing is fetched.
"""

import contextlib
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from finetune_trainer.errors import TrainingFailure
from finetune_trainer.partfile import boot, part_of
from finetune_trainer.store import Store, Stored, disk_errors, is_plain

FETCHED = ".fetched.json"
EVERY = 5.0
"""Seconds between two lines of progress at least."""
Log = Callable[[str], None]


def to_stderr(line: str) -> None:
    """Where nothing else is to be said: output is for results."""
    sys.stderr.write(f"{line}\n")


def fetch_folder(store: Store, folder: Path, what: str = "model", log: Log = to_stderr) -> int:
    """Makes the folder what the store is; the number of files. TrainingFailure(ModelNotFound) for names that lead out of it."""
    entries = store.entries()
    if outside := [key for key in entries if not is_plain(key)]:
        raise TrainingFailure("ModelNotFound", f"{store.uri}: {outside[0]!r} is no name of a file below it")
    kept = {folder / key for key in entries} | {part_of(folder / key) for key in entries} | {folder / FETCHED}
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder before the folder
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()
        elif path not in kept:
            path.unlink()
    fetch_files(store, entries, folder, what, log)
    return len(entries)


def fetch_files(store: Store, entries: Mapping[str, Stored], folder: Path, what: str, log: Log = to_stderr) -> None:
    """Downloads those of the entries that the folder does not have. Raises Missing, TrainingFailure."""
    fetched = _fetched(folder)
    versions = {key: f"{store.uri} {stored.version} {boot()}" for key, stored in entries.items()}

    def is_there(key: str, stored: Stored) -> bool:
        # Without a version, from a server that lists none, nobody knows.
        return bool(stored.version) and fetched.get(key) == versions[key] and _size(folder / key) == stored.size

    wanted = {key: stored for key, stored in entries.items() if not is_there(key, stored)}
    if not wanted:
        return
    with disk_errors(store.uri, folder):
        folder.mkdir(parents=True, exist_ok=True)
        _check_room(store, wanted, folder, what)
        progress = _Progress(what, sum(stored.size for stored in wanted.values()), log)
        for key in wanted:
            fetched.pop(key, None)  # until it is there
            store.download(key, folder / key, progress)
            fetched[key] = versions[key]
            temporary = part_of(folder / FETCHED)
            temporary.write_text(json.dumps(fetched, indent=1))
            temporary.replace(folder / FETCHED)


def _fetched(folder: Path) -> dict[str, str]:
    try:
        said = json.loads((folder / FETCHED).read_text())
    except (OSError, ValueError):  # nothing was fetched, or a death in the middle of it
        return {}
    return said if isinstance(said, dict) else {}


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _check_room(store: Store, wanted: Mapping[str, Stored], folder: Path, what: str) -> None:
    parts = (part_of(folder / key) for key in wanted)
    begun = sum(part.stat().st_blocks * 512 for part in parts if part.is_file())
    # A file that is fetched again is there until it is replaced.
    need, free = sum(stored.size for stored in wanted.values()) - begun, shutil.disk_usage(folder).free
    if need > free:
        raise TrainingFailure(
            "StorageUnavailable",
            f"{what}: {store.uri} needs {size_text(need)} more in {folder}, where {size_text(free)} are free: give the trainer a larger volume",
        )


def size_text(size: float) -> str:
    """For people, for example 1.2 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


class _Progress:
    """Counts what arrives, by several threads, and tells it now and then."""

    def __init__(self, what: str, total: int, log: Log) -> None:
        self.what = what
        self.total = total
        self.log = log
        self.done = 0
        self._told = time.monotonic()
        self._lock = threading.Lock()

    def __call__(self, size: int) -> None:
        with self._lock:
            self.done += size
            if (now := time.monotonic()) - self._told >= EVERY:
                self._told = now
                self.log(f"{self.what}: {size_text(self.done)} of {size_text(self.total)}")
