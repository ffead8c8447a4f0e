"""One run at a time in a folder: the lock of `finetune run`, for a job and for a sweep."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune_cli.errors import UserError

LOCK_FILE = "lock"
LOCK_SECONDS = 10.0
"""How long the trainers of a run that was killed may take to be gone: the kernel needs a moment to end a large process."""
LOOK_SECONDS = 0.1


@contextmanager
def alone(folder: Path, said: str) -> Iterator[int]:
    """Holds the folder's lock; yields its descriptor. Raises UserError with `said` where another run keeps it.

    Trainers inherit the descriptor, so that the lock outlives a run whose trainers do: the kernel ends them with it, but not on every system,
    and not what they have started themselves.
    """
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise UserError(f"{said}: wait until that has ended, or give another --workdir", 1) from error
                time.sleep(LOOK_SECONDS)
        yield descriptor
    finally:
        os.close(descriptor)
