"""An S3 server of a few lines that answers what a test tells it to: faults that no real server gives on request.

It knows the requests that the trainer makes of small objects, no signature and no bucket. What needs a real server is in tests/integration.
"""

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import boto3
import pytest


class Wire:
    """The objects by key, every request as `METHOD key`, and the answers that come first: `METHOD key` -> error codes, one a request."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.faults: dict[str, list[tuple[int, str]]] = {}
        self.uploads: dict[str, str] = {}
        """Unfinished multipart uploads: key -> when each began."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wire: Wire

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _handle(self) -> None:
        url = urlsplit(self.path)
        key, query = unquote(url.path).lstrip("/").partition("/")[2], parse_qs(url.query, keep_blank_values=True)
        body = self._body()
        asked = f"{self.command} {'?uploads' if 'uploads' in query else key}"
        self.wire.asked.append(asked)
        if faults := self.wire.faults.get(asked):
            status, code = faults.pop(0)
            self._answer(status, f"<Error><Code>{code}</Code></Error>".encode())
        elif "uploads" in query:
            found = {k: t for k, t in sorted(self.wire.uploads.items()) if k.startswith(query["prefix"][0])}
            rows = (
                f"<Upload><Key>{k}</Key><UploadId>of-{k}</UploadId><Initiated>{t}</Initiated></Upload>" for k, t in found.items()
            )
            self._answer(200, f"<ListMultipartUploadsResult>{''.join(rows)}</ListMultipartUploadsResult>".encode())
        elif "list-type" in query:
            found_keys = sorted(k for k in self.wire.objects if k.startswith(query["prefix"][0]))
            entries = (f"<Contents><Key>{escape(k)}</Key><Size>{len(self.wire.objects[k])}</Size></Contents>" for k in found_keys)
            self._answer(200, f"<ListBucketResult>{''.join(entries)}</ListBucketResult>".encode())
        elif self.command == "PUT":
            if "If-None-Match" in self.headers and key in self.wire.objects:
                self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
            else:
                self.wire.objects[key] = body
                self._answer(200)
        elif self.command == "DELETE":
            (self.wire.uploads if "uploadId" in query else self.wire.objects).pop(key, None)
            self._answer(204)
        elif key in self.wire.objects:
            data = self.wire.objects[key]
            self._answer(200, data, ETag=f'"{hashlib.sha256(data).hexdigest()}"')
        else:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked" and "aws-chunked" not in self.headers.get("Content-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass  # the trailer
        return body

    do_GET = do_HEAD = do_PUT = do_DELETE = _handle  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client may go away in the middle
            super().handle_error(request, client_address)  # type: ignore[arg-type]


@contextmanager
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    """A server for this test; the environment says where it is."""
    wire = Wire()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"wire": wire}))
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anybody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    yield wire
    server.shutdown()
    server.server_close()
