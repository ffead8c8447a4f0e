"""Where bytes live: a folder or a prefix of an S3 bucket behind one small Protocol.

Keys are relative, with "/" between parts. Every error leaves here as a failure class with a sentence that names the place. The bucket
is in s3.py, which is loaded only where one is opened.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

from finetune_trainer.errors import TrainingFailure
from finetune_trainer.partfile import part_of

PATIENCE = 120.0
"""Seconds without an answer after which a use of the storage fails."""
LONG_PATIENCE = 600.0
"""The same for what took hours to make: checkpoints and results."""
UNFINISHED = timedelta(days=1)
"""Age from which on something half written has no writer any more."""
_PART = re.compile(r"\.[0-9a-f]{16}\.part$")
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""What file systems without hard links say to one."""
NO_ROOM = {errno.ENOSPC, errno.EDQUOT}


class Missing(KeyError):  # noqa: N818
    """There is no object under this key."""


class Stored(NamedTuple):
    """What a store says of an object without its content."""

    size: int
    """Bytes."""
    version: str
    """Another one when the content is: the ETag, or for a file what the file system notes of changes."""


def nobody(size: int) -> None:
    """Is told how many bytes more have arrived; fewer than none where some count no longer."""


class Store(Protocol):
    """A place for objects. `put_if_absent` is the only write that may refuse; a reader never sees half an object."""

    uri: str

    def put(self, key: str, data: bytes) -> None: ...
    def put_if_absent(self, key: str, data: bytes) -> bool: ...
    def get(self, key: str) -> bytes: ...
    def upload(self, path: Path, key: str) -> None: ...
    def download(self, key: str, path: Path, tell: Callable[[int], None] = nobody) -> None:
        """The file is there with all of its content, or as it was before. What is half there may stay beside it and be gone on from."""

    def stat(self, key: str) -> Stored: ...
    def entries(self, prefix: str = "") -> dict[str, Stored]: ...
    def list(self, prefix: str = "") -> "list[str]": ...
    def copy(self, source: str, key: str) -> None:
        """Another object with the same content, made where the store is. Raises Missing."""

    def delete(self, key: str) -> None: ...
    def discard_unfinished(self, prefix: str, age: timedelta = UNFINISHED) -> None:
        """Removes what writers that died left half written below the prefix, where it is older than `age`."""

    def check(self, *, writable: bool = False) -> None:
        """Raises the failure that a first use would: no such place, no access, no answer. `writable`: it is to be written to."""


def open_store(uri: str, s3_root: Path | None = None, *, patience: float = PATIENCE) -> Store:
    """The store at s3://bucket/prefix or file:///path. With `s3_root`, s3://bucket/key is the folder s3_root/bucket/key.

    `patience`: seconds without an answer until a use fails. Raises TrainingFailure.
    """
    scheme, _, rest = uri.partition("://")
    if scheme == "file":
        return FolderStore(Path(rest), uri.rstrip("/"))
    bucket, _, prefix = rest.partition("/")
    if s3_root is not None:
        if not (s3_root / bucket).is_dir():
            raise TrainingFailure(
                "StorageNotFound",
                f"{uri}: there is no folder for the bucket {bucket!r} below {s3_root}: create it, or correct the uri",
            )
        return FolderStore(s3_root / bucket / prefix.lstrip("/"), uri.rstrip("/"))
    from finetune_trainer.s3 import S3Store

    return S3Store(bucket, prefix.strip("/"), patience)


class FolderStore:
    """A folder; writes are atomic by rename and durable by fsync of the file and of the folder that holds its name.

    `put_if_absent` is atomic by a hard link. On a file system without them (a mounted bucket, a share of Windows) it creates the file and
    fills it: still only one of many writers wins, but a reader, and a death in between, may see half of it. Checkpoints allow for that.
    """

    def __init__(self, root: Path, uri: str | None = None) -> None:
        self.root = root
        self.uri = uri or f"file://{root}"

    def put(self, key: str, data: bytes) -> None:
        with self._errors(key), self._temporary(key) as temporary:
            temporary.write_bytes(data)
            self._rename(temporary, key)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        target = self.root / key
        with self._errors(key), self._temporary(key) as temporary:
            temporary.write_bytes(data)
            _sync(temporary)
            try:
                os.link(temporary, target)  # unlike rename, link refuses an existing name
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                if not _create(target, data):
                    return False
            _sync(target.parent)
        return True

    def get(self, key: str) -> bytes:
        with self._errors(key):
            return (self.root / key).read_bytes()

    def upload(self, path: Path, key: str) -> None:
        with self._errors(key), self._temporary(key) as temporary:
            shutil.copyfile(path, temporary)
            self._rename(temporary, key)

    def download(self, key: str, path: Path, tell: Callable[[int], None] = nobody) -> None:
        temporary = part_of(path)
        with self._errors(key), disk_errors(self.uri, path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(self.root / key, temporary)
                temporary.replace(path)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
        tell(path.stat().st_size)

    def stat(self, key: str) -> Stored:
        with self._errors(key):
            found = (self.root / key).stat()
        # The time of a change alone is not enough: copies keep the time of what they are copies of.
        return Stored(found.st_size, f"{found.st_dev}-{found.st_ino}-{found.st_mtime_ns}-{found.st_ctime_ns}")

    def entries(self, prefix: str = "") -> dict[str, Stored]:
        found = {}
        for key in self.list(prefix):
            with contextlib.suppress(Missing):  # deleted meanwhile
                found[key] = self.stat(key)
        return found

    def copy(self, source: str, key: str) -> None:
        self.upload(self.root / source, key)

    def list(self, prefix: str = "") -> list[str]:
        folder = self.root / prefix.rpartition("/")[0]
        with self._errors(prefix):
            found = (p.relative_to(self.root).as_posix() for p in folder.rglob("*") if p.is_file() and p.suffix != ".part")
            return sorted(key for key in found if key.startswith(prefix))

    def delete(self, key: str) -> None:
        with self._errors(key):
            (self.root / key).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # the first folder that is not empty ends it
                for folder in list(PurePosixPath(key).parents)[:-1]:  # the root is not ours to remove
                    (self.root / folder).rmdir()

    def discard_unfinished(self, prefix: str, age: timedelta = UNFINISHED) -> None:
        with self._errors(prefix):
            for path in (self.root / prefix.rpartition("/")[0]).rglob("*.part"):
                if _PART.search(path.name) and path.relative_to(self.root).as_posix().startswith(prefix):
                    with contextlib.suppress(FileNotFoundError):  # its writer has finished
                        if path.stat().st_mtime < time.time() - age.total_seconds():
                            path.unlink()

    def check(self, *, writable: bool = False) -> None:
        with self._errors(""):
            if writable:
                with self._temporary("check"):
                    return
            # In a bucket a prefix without objects is no error; a folder that is not there is.
            if not self.root.is_dir() and self.uri.startswith("file://"):
                raise TrainingFailure(
                    "StorageNotFound", f"{self.uri}: the folder {self.root} does not exist: create it, or correct the uri"
                )

    @contextlib.contextmanager
    def _temporary(self, key: str) -> Iterator[Path]:
        target = self.root / key
        missing = [folder for folder in target.parents if not folder.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            _sync(folder.parent)
        # Not mkstemp: its files are for their owner alone, and a model is for others too.
        path = target.with_name(f"{target.name}.{secrets.token_hex(8)}.part")
        path.touch(exist_ok=False)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _rename(self, temporary: Path, key: str) -> None:
        _sync(temporary)
        temporary.replace(self.root / key)
        _sync((self.root / key).parent)

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        try:
            with disk_errors(self.uri, self.root / key):
                yield
        except FileNotFoundError as error:
            raise Missing(key) from error


@contextlib.contextmanager
def disk_errors(uri: str, path: Path) -> Iterator[None]:
    """What a disk refuses as a sentence; a file that is not there is the caller's to judge."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        place = error.filename2 or error.filename or path
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            raise TrainingFailure("StorageDenied", f"{uri}: no permission to use {place}") from error
        if error.errno in NO_ROOM:
            raise TrainingFailure("StorageUnavailable", f"{uri}: no room on the disk of {place} ({error.strerror})") from error
        raise TrainingFailure("StorageUnavailable", f"{uri}: {error.strerror or error}: {place}") from error


def _sync(path: Path) -> None:
    """The content of a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no fsync of folders: there the server decides when a name is durable.
        if not (path.is_dir() and error.errno in {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}):
            raise
    finally:
        os.close(descriptor)


def _create(path: Path, data: bytes) -> bool:
    """Writes a new file under its own name; False if there is one already."""
    try:
        file = path.open("xb")
    except FileExistsError:
        return False
    with file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            path.unlink(missing_ok=True)
            raise
    return True


def is_plain(path: str) -> bool:
    """Whether it stays below the folder that it is joined to: names in a bucket and in a manifest may be anything."""
    return bool(path) and not path.startswith("/") and not path.endswith("/") and ".." not in path.split("/") and "\\" not in path


def sweep(store: Store, prefix: str, log: Callable[[str], None]) -> None:
    """Removes what earlier writers left half written. Not every store and every account can: that is told, and costs room only."""
    try:
        store.discard_unfinished(prefix)
    except TrainingFailure as failure:
        log(f"what earlier runs left half written stays there: {failure.message}")
