"""An S3 bucket as a Store: the only place that knows boto3, which is imported when the first one is opened.

Three layers. botocore tries each request a few times within seconds. `_patiently` tries each operation (of a large object: each part) again,
with full jitter, until the store's patience is over: a storage that restarts costs a wait and no training. `_anew` begins a whole transfer again
where the object or the upload under it is no longer the same. What will not pass (wrong credentials, no such key) is told at once; a
refusal of what was allowed before is tried again like a server error, because busy servers and gateways give it at random.
"""

import base64
import contextlib
import logging
import os
import random
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from finetune_api.names import ENV_S3_ADDRESSING
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.partfile import PartFile
from finetune_trainer.store import PATIENCE, UNFINISHED, Missing, Stored, disk_errors, nobody

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")
MiB = 1 << 20

CHECK_PATIENCE = 10.0
"""Seconds after which a first check gives up: an endpoint that is wrong is to be told soon, and a proxy beside us needs a moment to start."""
MIN_WAIT, MAX_WAIT = 0.2, 10.0
"""Seconds: a wait is a random part of the first, doubled with each try up to the second."""
TOLD_AFTER, TOLD_AGAIN = 5.0, 60.0
"""Seconds of trying again after which that is said, and said again."""
AT_ONCE = 256 * MiB
"""Bytes up to which a file goes in one request: it is hashed once less here, and not put together there."""
PART, MAX_PARTS = 16 * MiB, 1000
"""Bytes of a part of a larger one, more only where there would be too many: 10,000 are allowed, of up to 5 GiB; objects up to 5 TB."""
THREADS = 4
"""Parts on their way at once. They are read from the file as they are sent: no part is ever in memory."""
COPIED_AT_ONCE = 1 << 30
"""Bytes that the store copies in one request: more takes several, and 5 GiB is S3's limit."""
BLOCK = MiB
"""Bytes that a download holds in memory for each part."""
CONFLICT_TRIES, CONFLICT_WAIT = 6, 0.05
"""Tries of a conditional write, and seconds: the wait between two doubles up to 1.6 s."""
ANEW_TRIES = 5
REFUSALS = 6
"""Of one use, until it is believed that the account may not do what it has never done yet: some may not delete. Takes about 3 s."""

STRANGER = {"InvalidAccessKeyId", "XAdminUserNotFound", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
"""Codes that say whose fault it is: the credentials are wrong."""
DENIED = {"AccessDenied", "403", "Forbidden", *STRANGER}
MISSING = {"NoSuchKey", "404", "NotFound"}
PASSING = {"RequestTimeout", "IncompleteBody", "SlowDown", "RequestLimitExceeded", "Throttling", "ThrottlingException"}
"""Codes of a moment, whatever their status."""
STYLES = ("path", "virtual", "auto")

_log = logging.getLogger(__name__)


class _PassingError(TrainingFailure):
    """The storage does not answer, or answers that it cannot just now: the same again may do better. `doubted`: or it never will."""

    def __init__(self, message: str, reason: str = "StorageUnavailable", *, doubted: bool = False) -> None:
        super().__init__(reason, message)
        self.doubted = doubted


class _ChangedError(Exception):
    """What has been transferred belongs to an object, or to an upload, that is no longer there."""


class S3Store:
    """A prefix of a bucket; conditional writes use If-None-Match. `patience`: seconds without an answer until a use fails."""

    def __init__(self, bucket: str, prefix: str, patience: float = PATIENCE) -> None:
        self.bucket = bucket
        self.prefix = prefix
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self.patience = patience
        self._allowed: set[str] = set()
        """Names of the API's operations that have succeeded here."""
        self.client = self._client()
        self._told = -TOLD_AGAIN

    def _client(self, read_timeout: float = 60.0) -> "S3Client":
        def note(http_response: Any, model: Any, **_: Any) -> None:
            if http_response.status_code < 300:
                self._allowed.add(model.name)

        client = s3_client(read_timeout)
        client.meta.events.register("after-call.s3", note)
        return client

    # --------------------------------------------------------------------------------------------------- small objects --
    def put(self, key: str, data: bytes) -> None:
        self._call(key, self.client.put_object, Key=self._key(key), Body=data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        for tried in range(1, CONFLICT_TRIES + 1):
            written = self._patiently(key, partial(self._put_if_absent, key, data, last=tried == CONFLICT_TRIES))
            if written is not None:
                return written
            time.sleep(random.uniform(0.5, 1.0) * CONFLICT_WAIT * 2**tried)
        raise AssertionError("the last try returns or raises")

    def _put_if_absent(self, key: str, data: bytes, *, last: bool) -> bool | None:
        """None where it is to be tried again."""
        from botocore.exceptions import ClientError

        try:
            self.client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data, IfNoneMatch="*")
        except ClientError as error:
            if (status := _status(error)) == 412:
                with contextlib.suppress(Missing):  # deleted meanwhile
                    # A retried request may have met its own first try: what is there then is ours.
                    return self.get(key) == data
            # 409: another one is being written. S3 says to try again: neither of the two may have won.
            if status not in {409, 412} or last:
                raise
            return None
        return True

    def get(self, key: str) -> bytes:
        def read() -> bytes:
            data: bytes = self.client.get_object(Bucket=self.bucket, Key=self._key(key))["Body"].read()
            return data

        return self._patiently(key, read)

    def stat(self, key: str) -> Stored:
        found = self._call(key, self.client.head_object, Key=self._key(key))
        return Stored(found["ContentLength"], found["ETag"])

    def entries(self, prefix: str = "") -> dict[str, Stored]:
        cut = len(self.prefix) + 1 if self.prefix else 0
        pages = self._pages(prefix, self.client.list_objects_v2, {"NextContinuationToken": "ContinuationToken"})
        # Empty objects whose name ends in "/" stand for folders, where a console or a mounted bucket has made them.
        found = (o for page in pages for o in page.get("Contents", []) if o["Size"] > 0 or not o["Key"].endswith("/"))
        return {o["Key"][cut:]: Stored(o["Size"], o.get("ETag", "")) for o in sorted(found, key=lambda o: str(o["Key"]))}

    def list(self, prefix: str = "") -> list[str]:
        return list(self.entries(prefix))

    def copy(self, source: str, key: str) -> None:
        from boto3.s3.transfer import TransferConfig

        at_once = TransferConfig(multipart_threshold=COPIED_AT_ONCE, multipart_chunksize=COPIED_AT_ONCE)
        there = {"Bucket": self.bucket, "Key": self._key(source)}
        self._patiently(source, partial(self.client.copy, there, self.bucket, self._key(key), Config=at_once))  # type: ignore[arg-type]

    def delete(self, key: str) -> None:
        self._call(key, self.client.delete_object, Key=self._key(key))

    def discard_unfinished(self, prefix: str, age: timedelta = UNFINISHED) -> None:
        following = {"NextKeyMarker": "KeyMarker", "NextUploadIdMarker": "UploadIdMarker"}
        pages = self._pages(prefix, self.client.list_multipart_uploads, following)
        for upload in [u for page in pages for u in page.get("Uploads", [])]:
            if upload["Initiated"] < datetime.now(UTC) - age:
                with contextlib.suppress(_ChangedError):  # somebody else has just done it
                    self._call(prefix, self.client.abort_multipart_upload, Key=upload["Key"], UploadId=upload["UploadId"])

    def check(self, *, writable: bool = False) -> None:  # noqa: ARG002  (a probe would leave an object behind)
        look = partial(self._client(CHECK_PATIENCE).list_objects_v2, Bucket=self.bucket, Prefix=self._key(""), MaxKeys=1)
        self._patiently("", look, min(CHECK_PATIENCE, self.patience))

    # --------------------------------------------------------------------------------------------------- large objects --
    def upload(self, path: Path, key: str) -> None:
        with disk_errors(self.uri, path):
            self._anew(key, partial(self._upload, path, key))

    def _upload(self, path: Path, key: str) -> None:
        size = path.stat().st_size
        part = max(PART, -(-size // MAX_PARTS))
        # The checksum of the whole object makes the store refuse what arrives changed. when_required: the server may not know any.
        crc = _crc32(path) if getattr(self.client.meta.config, "request_checksum_calculation", "") == "when_supported" else None
        algorithm = {"ChecksumAlgorithm": "CRC32"} if crc else {}
        whole = {"ChecksumCRC32": crc} if crc else {}
        if size <= AT_ONCE:
            self._patiently(key, partial(self._send, self.client.put_object, path, 0, size, Key=self._key(key), **whole))
            return
        full = {"ChecksumType": "FULL_OBJECT"} if crc else {}
        begun = self._call(key, self.client.create_multipart_upload, Key=self._key(key), **algorithm, **full)
        place: dict[str, Any] = {"Key": self._key(key), "UploadId": begun["UploadId"]}

        def send(number: int) -> dict[str, Any]:
            more = place | algorithm | {"PartNumber": number + 1}
            start = number * part
            sent = self._patiently(
                key, partial(self._send, self.client.upload_part, path, start, min(part, size - start), **more)
            )
            sums = {"ChecksumCRC32": sent["ChecksumCRC32"]} if crc and "ChecksumCRC32" in sent else {}
            return {"PartNumber": number + 1, "ETag": sent["ETag"], **sums}

        try:
            parts = _each(send, range(-(-size // part)))
            try:
                self._call(key, self.client.complete_multipart_upload, **place, **whole, **full, MultipartUpload={"Parts": parts})
            except _ChangedError:
                # A retried request may have met its own first try.
                there = self._call(key, self.client.head_object, Key=self._key(key), ChecksumMode="ENABLED")
                if not crc or there.get("ChecksumCRC32") != crc:
                    raise
        except BaseException:
            with contextlib.suppress(TrainingFailure, _ChangedError):  # else `discard_unfinished` finds it
                self._patiently(key, partial(self.client.abort_multipart_upload, Bucket=self.bucket, **place), 0.0)
            raise

    def _send(self, method: Callable[..., T], path: Path, start: int, length: int, **arguments: Any) -> T:
        from s3transfer.utils import ReadFileChunk

        with ReadFileChunk.from_filename(str(path), start, length) as body:
            return method(Bucket=self.bucket, Body=body, **arguments)

    def download(self, key: str, path: Path, tell: Callable[[int], None] = nobody) -> None:
        with disk_errors(self.uri, path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._anew(key, partial(self._download, key, path, tell))

    def _download(self, key: str, path: Path, tell: Callable[[int], None]) -> None:
        stored = self.stat(key)
        with PartFile(path, stored.size, f"{self.uri}/{key} {stored.version}") as part:
            tell(part.arrived)
            try:
                _each(partial(self._fetch, key, stored, part, tell), part.missing())
            except _ChangedError:
                tell(-part.arrived)
                raise
            part.commit()

    def _fetch(self, key: str, stored: Stored, part: PartFile, tell: Callable[[int], None], number: int) -> None:
        """One range of an object; a connection that breaks is followed by one for the rest."""
        from botocore.exceptions import ClientError, FlexibleChecksumError

        start, end = part.bounds(number)
        at = start

        def go_on() -> None:
            nonlocal at
            # Without a range, where all is asked for: then there is a checksum to hold it against.
            some = {} if (at, end) == (0, stored.size) else {"Range": f"bytes={at}-{end - 1}"}
            try:
                got = self.client.get_object(Bucket=self.bucket, Key=self._key(key), IfMatch=stored.version, **some)  # type: ignore[arg-type]
            except ClientError as error:
                if _status(error) == 412:
                    raise _ChangedError from error
                raise
            if (got["ETag"], got["ContentLength"]) != (stored.version, end - at):  # from a server that knows no If-Match
                raise _ChangedError
            before = at
            try:
                with self._errors(key):
                    for block in got["Body"].iter_chunks(BLOCK):
                        part.write(at, block)
                        at += len(block)
                        tell(len(block))
            except _PassingError as broken:
                if isinstance(broken.__cause__, FlexibleChecksumError):
                    tell(start - at)
                    at = start
                if at <= before:  # else it comes on, if slowly
                    raise

        try:
            while at < end:
                self._patiently(key, go_on)
            part.finished(number)
        except BaseException:
            tell(start - at)  # what is not complete is fetched again
            raise

    # ---------------------------------------------------------------------------------------------------------- trying --
    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _call(self, key: str, method: Callable[..., T], **arguments: Any) -> T:
        return self._patiently(key, partial(method, Bucket=self.bucket, **arguments))

    def _pages(self, prefix: str, method: Callable[..., Any], following: dict[str, str]) -> Iterator[Any]:
        """All pages of a listing, each tried on its own. `following`: what a page says and the next request repeats."""
        place: dict[str, str] = {}
        while True:
            page = self._call(prefix, method, Prefix=self._key(prefix), **place)
            yield page
            if not page.get("IsTruncated"):
                return
            place = {asked: page[said] for said, asked in following.items()}

    def _patiently(self, key: str, operation: Callable[[], T], patience: float | None = None) -> T:
        """Its result, however often it takes within the patience, which begins with the first try that fails."""
        patience = self.patience if patience is None else patience
        tried, refused, began = 0, 0, 0.0
        while True:
            try:
                with self._errors(key):
                    return operation()
            except _PassingError as failure:
                now = time.monotonic()
                began = began if tried else now
                refused += failure.doubted
                if (left := began + patience - now) <= 0 or refused >= REFUSALS:
                    after = f" (tried for {patience:.0f} s)" if patience and left <= 0 else ""
                    raise TrainingFailure(failure.failure.reason, f"{failure.message}{after}") from failure
                pause = min(left, random.uniform(0, min(MAX_WAIT, MIN_WAIT * 2 ** min(tried, 10))))
                if now + pause - began > TOLD_AFTER < left and now - self._told > TOLD_AGAIN:
                    _log.warning("%s (trying again for %.0f s at most)", failure.message, left)
                    self._told = now
                time.sleep(pause)
                tried += 1

    def _anew(self, key: str, transfer: Callable[[], None]) -> None:
        for _ in range(ANEW_TRIES):
            with contextlib.suppress(_ChangedError):
                return transfer()
        raise TrainingFailure(
            "StorageUnavailable", f"{self.uri}/{key}: it was replaced {ANEW_TRIES} times while it was on its way"
        )

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        from botocore import exceptions as botocore
        from urllib3.exceptions import HTTPError

        try:
            yield
        except (botocore.NoCredentialsError, botocore.PartialCredentialsError) as error:
            raise TrainingFailure("StorageDenied", f"{self.uri}: no S3 credentials were given. {_ADVICE}") from error
        except botocore.ClientError as error:
            raise self._answered(key, error) from error
        except botocore.SSLError as error:
            if "CERTIFICATE_VERIFY_FAILED" not in str(error):
                raise self._silent(error) from error
            message = f"{self.uri}: the storage's certificate is not trusted: name the file of your CA in AWS_CA_BUNDLE"
            raise TrainingFailure("StorageUnavailable", message) from error
        except (
            botocore.HTTPClientError,
            botocore.ConnectionError,
            botocore.IncompleteReadError,
            botocore.FlexibleChecksumError,
            botocore.CredentialRetrievalError,
            HTTPError,
        ) as error:
            raise self._silent(error) from error
        except botocore.BotoCoreError as error:
            raise TrainingFailure("StorageUnavailable", f"{self.uri}: {' '.join(str(error).split())}") from error

    def _silent(self, error: Exception) -> _PassingError:
        advice = "Check AWS_ENDPOINT_URL and the network"
        return _PassingError(f"{self.uri}: the storage does not answer ({type(error).__name__}). {advice}")

    def _answered(self, key: str, error: Any) -> Exception:
        """What to raise for an answer that is an error. By status as well: servers other than AWS have codes of their own."""
        code, status = str(error.response.get("Error", {}).get("Code", "unknown")), _status(error)
        if code == "NoSuchBucket":
            message = f"{self.uri}: the bucket {self.bucket!r} does not exist: create it, or correct the uri"
            return TrainingFailure("StorageNotFound", message)
        if code == "NoSuchUpload":
            return _ChangedError(key)
        if code in MISSING:
            return Missing(key)
        if code in DENIED or status in {401, 403}:
            message = f"{self.uri}: the storage refused the credentials ({code}). {_ADVICE}"
            if code in STRANGER and not self._allowed:
                return TrainingFailure("StorageDenied", message)
            return _PassingError(message, "StorageDenied", doubted=error.operation_name not in self._allowed)
        message = f"{self.uri}: the storage answered {code}"
        if code in PASSING or status in {408, 429} or (status >= 500 and status != 501):  # 501: it never will
            return _PassingError(message)
        return TrainingFailure("StorageUnavailable", message)


_ADVICE = (
    "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (trainer.envFrom names a Secret with them) or the ServiceAccount, "
    "and its rights on the bucket"
)


def _each(work: Callable[[int], T], numbers: Iterable[int]) -> list[T]:
    """The results in order, THREADS at once; the first failure is raised, and what has not begun then never does."""
    numbers = list(numbers)
    if len(numbers) == 1:
        return [work(numbers[0])]
    with ThreadPoolExecutor(THREADS, "s3") as pool:
        futures = [pool.submit(work, number) for number in numbers]
        done, others = wait(futures, return_when=FIRST_EXCEPTION)
        for future in others:
            future.cancel()
        for future in done:
            future.result()
    return [future.result() for future in futures]


def _status(error: Any) -> int:
    return int(error.response["ResponseMetadata"].get("HTTPStatusCode", 0))


def _crc32(path: Path) -> str:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(MiB):
            crc = zlib.crc32(block, crc)
    return base64.b64encode(crc.to_bytes(4, "big")).decode()


_making = threading.Lock()
"""boto3's shared session is not for several threads."""


def s3_client(read_timeout: float = 60.0) -> "S3Client":
    """As the environment says (docs/credentials.md). Raises TrainingFailure(RecipeInvalid) for settings that cannot be."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    # Custom endpoints rarely resolve bucket.host; AWS itself understands both.
    custom = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    style: Any = os.environ.get(ENV_S3_ADDRESSING) or ("path" if custom else None)
    if style not in {None, *STYLES}:
        raise TrainingFailure("RecipeInvalid", f"{ENV_S3_ADDRESSING}: {style!r} is none of {', '.join(STYLES)}")
    if (bundle := os.environ.get("AWS_CA_BUNDLE")) and not Path(bundle).exists():
        raise TrainingFailure("RecipeInvalid", f"AWS_CA_BUNDLE: there is no file {bundle}")
    config = Config(
        connect_timeout=5,
        read_timeout=read_timeout,
        tcp_keepalive=True,
        max_pool_connections=32,  # several files at once (checkpoint.py), each in several parts
        retries={"mode": "standard", "total_max_attempts": 3},
        s3={"addressing_style": style} if style else None,
    )
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    try:
        with _making:
            return boto3.client("s3", region_name=region, config=config)
    except (ValueError, BotoCoreError) as error:  # of an endpoint that is no URL, of a value that a variable cannot have
        raise TrainingFailure("RecipeInvalid", f"the AWS_* variables: {' '.join(str(error).split())}") from error
