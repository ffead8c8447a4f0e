"""A real S3 server: versitygw over a folder.

Why it exists: the trainer's safety rests on If-None-Match (412 for the second writer) and on checksums the server verifies
(400 for a wrong one). Imitations of S3 in Python do neither; this server does both.
"""

import secrets
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from testcluster import binaries, statedir
from testcluster.pki import Authority
from testcluster.processes import Child, ChildError, free_port, lost_the_port, wait_until
from testcluster.readiness import answers_ok

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_LOOPBACK = "127.0.0.1"
_READY_SECONDS = 30.0
_START_ATTEMPTS = 3
_HEALTH = "/health"


class S3Server:
    """Starts on `start()` or `with`; objects are files below `directory`, which is removed at the end if it was made here."""

    region = "us-east-1"

    def __init__(
        self,
        *,
        directory: Path | None = None,
        host: str = _LOOPBACK,
        access_key: str = "testcluster",
        secret_key: str | None = None,
        authority: Authority | None = None,
    ) -> None:
        """With `directory`, buckets survive a stop. Without `secret_key` a random one is made. With `authority`, over TLS."""
        self._authority = authority
        self._own_directory = directory is None
        self._directory = directory
        self._host = host
        self.access_key = access_key
        self.secret_key = secret_key or secrets.token_hex(16)
        self._program: Path | None = None
        self._child: Child | None = None
        self._port = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Returns when the server answers. After a `stop` with a given directory: same port, same buckets."""
        if self._child is not None:
            raise RuntimeError("this S3 server runs already")
        self._program = binaries.ensure(["versitygw"])["versitygw"]
        if self._own_directory:
            self._directory = statedir.create("s3")
        (self.directory / "data").mkdir(parents=True, exist_ok=True)
        for attempt in range(1, _START_ATTEMPTS + 1):
            self._port = self._port or free_port(self._host)
            try:
                self._start_once(self._program)
            except ChildError:
                if attempt == _START_ATTEMPTS or not lost_the_port(self._log):
                    self.stop()
                    raise
                self._port, self._child = 0, None  # the server has ended already: it had no port
            else:
                return

    def stop(self) -> None:
        """Ends the server and removes the folder if `start` made it. Twice is fine."""
        if self._child is not None:
            self._child.stop()
            self._child = None
        if self._own_directory and self._directory is not None:
            statedir.remove(self._directory)
            self._directory = None

    @property
    def directory(self) -> Path:
        """The folder with the data and the log."""
        if self._directory is None:
            raise RuntimeError("this S3 server does not run")
        return self._directory

    @property
    def endpoint(self) -> str:
        """The server's address."""
        return f"{'https' if self._authority else 'http'}://{self._host}:{self._port}"

    @property
    def pid(self) -> int:
        """The server's pid."""
        if self._child is None:
            raise RuntimeError("this S3 server does not run")
        return self._child.pid

    def environment(self) -> dict[str, str]:
        """The variables with which boto3 in another process finds this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
        }

    def client(self) -> "S3Client":
        """A boto3 client for this server; path-style, because there are no DNS names for buckets."""
        import boto3  # noqa: PLC0415 - costs a second, and not everyone who starts a cluster needs it
        from botocore.config import Config  # noqa: PLC0415

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=self.region,
            verify=str(self._authority.ca_file) if self._authority else None,
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 2}),
        )

    def create_bucket(self, name: str) -> str:
        """Makes a bucket (three characters or more) and returns its name."""
        self.client().create_bucket(Bucket=name)
        return name

    @property
    def _log(self) -> Path:
        return self.directory / "versitygw.log"

    def _start_once(self, program: Path) -> None:
        encryption: list[str] = []
        if self._authority:
            certificate, key = self._authority.server("s3", [self._host])
            encryption = [f"--cert={certificate}", f"--key={key}"]
        argv = [
            str(program),
            f"--port={self._host}:{self._port}",
            f"--health={_HEALTH}",
            *encryption,
            "--quiet",
            "posix",
            str(self.directory / "data"),
        ]
        environment = {"ROOT_ACCESS_KEY": self.access_key, "ROOT_SECRET_KEY": self.secret_key, "VGW_REGION": self.region}
        self._child = Child.start("versitygw", argv, log=self._log, environment=environment)
        ca_file = self._authority.ca_file if self._authority else None
        wait_until(lambda: answers_ok(self.endpoint + _HEALTH, ca_file), [self._child], _READY_SECONDS, "versitygw")
