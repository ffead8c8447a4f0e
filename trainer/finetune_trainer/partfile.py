"""A file on its way from a bucket: what has arrived stays when the connection, or the process, breaks off.

`NAME.part` beside the target has the bytes at their places; behind them a line that says which object they are of, and a byte for each
range that is complete. What was begun for another object, or before the machine last started, counts for nothing. At last it is cut to
its size and renamed: a reader sees the whole file or none.
"""

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

RANGE = 16 << 20
"""Bytes of a range: what is lost at most, of each that was on its way, when a process is killed."""


class PartFile:
    """Several threads may write to it. Raises OSError; a write that fails (a full disk) leaves no file behind."""

    def __init__(self, path: Path, size: int, version: str) -> None:
        self.path = path
        self.size = size
        self.temporary = part_of(path)
        self._tag = f"\n{version} {size} {RANGE} {boot()}\n".encode()
        self._full = threading.Event()

    def __enter__(self) -> Self:
        self._file = os.open(self.temporary, os.O_RDWR | os.O_CREAT, 0o666)
        if os.pread(self._file, len(self._tag), self.size) != self._tag:
            os.ftruncate(self._file, 0)
            self.write(self.size, self._tag)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._file)
        if self._full.is_set():
            self.temporary.unlink(missing_ok=True)

    def missing(self) -> list[int]:
        """Numbers of the ranges that are not complete."""
        count = -(-self.size // RANGE)
        marks = os.pread(self._file, count, self.size + len(self._tag)).ljust(count, b"\0")
        return [number for number in range(count) if not marks[number]]

    @property
    def arrived(self) -> int:
        """Bytes of complete ranges."""
        return self.size - sum(end - start for start, end in map(self.bounds, self.missing()))

    def bounds(self, number: int) -> tuple[int, int]:
        """First byte of a range, and the one behind its last."""
        return number * RANGE, min(self.size, (number + 1) * RANGE)

    def write(self, at: int, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                written = os.pwrite(self._file, view, at)
                view, at = view[written:], at + written
        except OSError:
            self._full.set()
            raise

    def finished(self, number: int) -> None:
        """All bytes of the range have been written."""
        self.write(self.size + len(self._tag) + number, b"\1")

    def commit(self) -> None:
        """Under its own name, now that all of it is there."""
        os.ftruncate(self._file, self.size)
        self.temporary.replace(self.path)


def part_of(path: Path) -> Path:
    """Where a file is until all of it is there."""
    return path.with_name(f"{path.name}.part")


def boot() -> str:
    """Of the machine: what was written before it lost power may be no more than a size."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"
