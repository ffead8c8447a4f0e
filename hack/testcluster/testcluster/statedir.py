"""Folders of running test clusters and S3 servers, and the removal of those whose owner was killed.

Why it exists: a killed run cannot delete its folder (etcd's data, hundreds of megabytes after a large test), so the next
start does. A folder names its owner by pid and start time, so that a stranger with a reused pid does not keep it alive.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

from testcluster.processes import is_running, start_time

_OWNER = "owner.json"


def create(kind: str) -> Path:
    """A fresh folder that belongs to this process, after removing the folders of processes that are gone."""
    base = Path(tempfile.gettempdir()) / f"finetune-testcluster-{os.getuid()}"
    base.mkdir(mode=0o700, exist_ok=True)
    if base.stat().st_uid != os.getuid():
        raise PermissionError(f"{base} belongs to somebody else; set TMPDIR to a folder of yours")
    for folder in base.iterdir():
        if _is_stale(folder):
            shutil.rmtree(folder, ignore_errors=True)  # another start may be removing it at the same time
    # The owner is recorded before the folder gets its name: nobody ever sees a folder without an owner.
    prepared = Path(tempfile.mkdtemp(prefix=f".{kind}-", dir=base))
    claim(prepared)
    return prepared.rename(base / prepared.name.removeprefix("."))


def claim(folder: Path) -> None:
    """Records this process as the owner of the folder."""
    (folder / _OWNER).write_text(json.dumps({"pid": os.getpid(), "started": start_time(os.getpid())}))


def owner(folder: Path) -> int | None:
    """The pid of the folder's owner if exactly that process still runs."""
    file = folder / _OWNER
    if not file.is_file():
        return None
    try:
        recorded = json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # removed, or cut off by a kill, just now
        return None
    return int(recorded["pid"]) if is_running(recorded["pid"], recorded["started"]) else None


def remove(folder: Path) -> None:
    """Deletes a folder of this process."""
    shutil.rmtree(folder, ignore_errors=True)


def _is_stale(folder: Path) -> bool:
    return not folder.name.startswith(".") and folder.is_dir() and owner(folder) is None
