"""Where bytes live: a folder or a prefix of an S3 bucket behind one small Protocol.

Keys are relative, with "/" between parts. Every error leaves here as a failure class with a sentence that names the place;
nothing else in the trainer knows boto3.
"""

import base64
import contextlib
import errno
import os
import random
import re
import secrets
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from finetune_trainer.errors import TrainingFailure

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

DENIED = {
    "AccessDenied",
    "InvalidAccessKeyId",
    "XAdminUserNotFound",
    "SignatureDoesNotMatch",
    "403",
    "Forbidden",
    "ExpiredToken",
    "InvalidToken",
}
UNFINISHED = timedelta(days=1)
"""Age from which on something half written has no writer any more."""
_PART = re.compile(r"\.[0-9a-f]{16}\.part$")
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""What file systems without hard links say to one."""
CONFLICT_TRIES, CONFLICT_WAIT = 6, 0.05
"""Tries of a conditional write, and seconds: the wait between two doubles up to 1.6 s."""
MISSING = {"NoSuchKey", "404", "NotFound"}
LARGE, PART = 256 << 20, 64 << 20
"""Bytes from which on a file goes in parts, and of a part. In one request it is hashed once less here, and not put together there."""


class Missing(KeyError):  # noqa: N818
    """There is no object under this key."""


class Store(Protocol):
    """A place for objects. `put_if_absent` is the only write that may refuse; a reader never sees half an object."""

    uri: str

    def put(self, key: str, data: bytes) -> None: ...
    def put_if_absent(self, key: str, data: bytes) -> bool: ...
    def get(self, key: str) -> bytes: ...
    def upload(self, path: Path, key: str) -> None: ...
    def download(self, key: str, path: Path) -> None: ...
    def list(self, prefix: str = "") -> "list[str]": ...
    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of each object below the prefix."""

    def copy(self, source: str, key: str) -> None:
        """Another object with the same content, made where the store is. Raises Missing."""

    def delete(self, key: str) -> None: ...
    def discard_unfinished(self, prefix: str, age: timedelta = UNFINISHED) -> None:
        """Removes what writers that died left half written below the prefix, where it is older than `age`."""

    def check(self, *, writable: bool = False) -> None:
        """Raises the failure that a first use would: no such place, no access, no answer. `writable`: it is to be written to."""


def open_store(uri: str, s3_root: Path | None = None) -> Store:
    """The store at s3://bucket/prefix or file:///path. With `s3_root`, s3://bucket/key is the folder s3_root/bucket/key."""
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
    return S3Store(bucket, prefix.strip("/"))


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

    def download(self, key: str, path: Path) -> None:
        with self._errors(key):
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.root / key, path)

    def copy(self, source: str, key: str) -> None:
        self.upload(self.root / source, key)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        with self._errors(prefix):
            return {key: (self.root / key).stat().st_size for key in self.list(prefix)}

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
            yield
        except FileNotFoundError as error:
            raise Missing(key) from error
        except OSError as error:
            if isinstance(error, PermissionError) or error.errno == errno.EROFS:
                raise TrainingFailure("StorageDenied", f"{self.uri}: no permission to use {self.root / key}") from error
            raise TrainingFailure("StorageUnavailable", f"{self.uri}: {error.strerror or error}") from error


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


class S3Store:
    """A prefix of a bucket. Retries (with jitter, capped) are botocore's; conditional writes use If-None-Match."""

    def __init__(self, bucket: str, prefix: str, client: "S3Client | None" = None) -> None:
        self.bucket = bucket
        self.prefix = prefix
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self.client = client or _s3_client()

    def put(self, key: str, data: bytes) -> None:
        with self._errors(key):
            self.client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        tried = 0
        while True:
            tried += 1
            with self._errors(key):
                try:
                    self.client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data, IfNoneMatch="*")
                except ClientError as error:
                    if (status := _status(error)) == 412:
                        with contextlib.suppress(Missing):  # deleted meanwhile
                            # A retried request may have met its own first try: what is there then is ours.
                            return self.get(key) == data
                    # 409: another one is being written. S3 says to try again: neither of the two may have won.
                    if status not in {409, 412} or tried == CONFLICT_TRIES:
                        raise
                else:
                    return True
            time.sleep(random.uniform(0.5, 1.0) * CONFLICT_WAIT * 2**tried)

    def get(self, key: str) -> bytes:
        with self._errors(key):
            data: bytes = self.client.get_object(Bucket=self.bucket, Key=self._key(key))["Body"].read()
            return data

    def upload(self, path: Path, key: str) -> None:
        from boto3.s3.transfer import TransferConfig

        with self._errors(key):
            # The checksum of the whole object makes the store refuse what arrives changed.
            extra = {"ChecksumCRC32": _crc32(path), "ChecksumAlgorithm": "CRC32"}
            parts = TransferConfig(multipart_threshold=LARGE, multipart_chunksize=PART)
            self.client.upload_file(str(path), self.bucket, self._key(key), ExtraArgs=extra, Config=parts)

    def download(self, key: str, path: Path) -> None:
        with self._errors(key):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.client.download_file(self.bucket, self._key(key), str(path))

    def copy(self, source: str, key: str) -> None:
        with self._errors(source):
            # In parts where it is large.
            self.client.copy({"Bucket": self.bucket, "Key": self._key(source)}, self.bucket, self._key(key))

    def list(self, prefix: str = "") -> list[str]:
        return sorted(self.sizes(prefix))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        with self._errors(prefix):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._key(prefix))
            cut = len(self.prefix) + 1 if self.prefix else 0
            found = (o for page in pages for o in page.get("Contents", []))
            # Empty objects whose name ends in "/" stand for folders, where a console or a mounted bucket has made them.
            return {o["Key"][cut:]: o["Size"] for o in found if o["Size"] > 0 or not o["Key"].endswith("/")}

    def delete(self, key: str) -> None:
        with self._errors(key):
            self.client.delete_object(Bucket=self.bucket, Key=self._key(key))

    def discard_unfinished(self, prefix: str, age: timedelta = UNFINISHED) -> None:
        with self._errors(prefix):
            pages = self.client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=self._key(prefix))
            for upload in [u for page in pages for u in page.get("Uploads", [])]:
                if upload["Initiated"] < datetime.now(UTC) - age:
                    self.client.abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])

    def check(self, *, writable: bool = False) -> None:  # noqa: ARG002  (a probe would leave an object behind)
        with self._errors(""):
            self.client.list_objects_v2(Bucket=self.bucket, Prefix=self._key(""), MaxKeys=1)

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        from boto3.exceptions import Boto3Error, S3UploadFailedError
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

        try:
            yield
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise TrainingFailure("StorageDenied", _no_credentials(self.uri)) from error
        except (ClientError, S3UploadFailedError) as error:
            cause = error if isinstance(error, ClientError) else error.__context__
            code = _code(cause) if isinstance(cause, ClientError) else str(cause)
            if code == "NoSuchBucket":
                message = f"{self.uri}: the bucket {self.bucket!r} does not exist: create it, or correct the uri"
                raise TrainingFailure("StorageNotFound", message) from error
            if code in MISSING:
                raise Missing(key) from error
            # By status as well: servers other than AWS have codes of their own.
            if code in DENIED or _status(cause) in {401, 403}:
                raise TrainingFailure(
                    "StorageDenied", f"{self.uri}: the storage refused the credentials ({code}). {_ADVICE}"
                ) from error
            raise TrainingFailure("StorageUnavailable", f"{self.uri}: the storage answered {code}") from error
        except (BotoCoreError, Boto3Error) as error:  # boto3 has its own for a download that was tried too often
            message = f"{self.uri}: the storage does not answer ({type(error).__name__}). Check AWS_ENDPOINT_URL and the network"
            raise TrainingFailure("StorageUnavailable", message) from error


_ADVICE = (
    "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (trainer.envFrom names a Secret with them) or the ServiceAccount, "
    "and its rights on the bucket"
)


def _no_credentials(uri: str) -> str:
    return f"{uri}: no S3 credentials were given. {_ADVICE}"


def _status(error: Any) -> int:
    return int(error.response["ResponseMetadata"].get("HTTPStatusCode", 0)) if hasattr(error, "response") else 0


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", "unknown"))


def _crc32(path: Path) -> str:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return base64.b64encode(crc.to_bytes(4, "big")).decode()


def _s3_client() -> "S3Client":
    import boto3
    from botocore.config import Config

    config = Config(
        connect_timeout=10,
        read_timeout=60,
        retries={"mode": "standard", "total_max_attempts": 6},
        max_pool_connections=40,  # boto3's ten for each of the files that are uploaded at once (checkpoint.py)
        # Custom endpoints rarely resolve bucket.host; AWS itself understands both.
        s3={"addressing_style": "path"} if os.environ.get("AWS_ENDPOINT_URL") else None,
    )
    return boto3.client(
        "s3", region_name=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1", config=config
    )


def is_plain(path: str) -> bool:
    """Whether it stays below the folder that it is joined to: names in a bucket and in a manifest may be anything."""
    return bool(path) and not path.startswith("/") and not path.endswith("/") and ".." not in path.split("/") and "\\" not in path


def fetch_folder(store: Store, folder: Path) -> int:
    """Downloads every object of the store into the folder; the number of files. ModelNotFound for names that lead out of it."""
    keys = store.list()
    if outside := [key for key in keys if not is_plain(key)]:
        raise TrainingFailure("ModelNotFound", f"{store.uri}: {outside[0]!r} is no name of a file below it")
    for key in keys:
        store.download(key, folder / key)
    return len(keys)


def sweep(store: Store, prefix: str, log: Callable[[str], None]) -> None:
    """Removes what earlier writers left half written. Not every store and every account can: that is told, and costs room only."""
    try:
        store.discard_unfinished(prefix)
    except TrainingFailure as failure:
        log(f"what earlier runs left half written stays there: {failure.message}")
