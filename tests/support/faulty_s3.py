"""A proxy in front of a real S3 server that fails as networks and busy servers do, so that what answers in the end is the real thing.

The Host header goes through as it came: the client signs for the proxy's address, and the server checks the signature against that header.
"""

import http.client
import random
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from urllib.parse import urlsplit

CODES = {"500": "InternalError", "503": "SlowDown", "403": "AccessDenied"}
FAULTS = (*CODES, "reset", "lost", "slow", "cut")
"""lost: the request is done and the answer never arrives. cut: the answer's body breaks off somewhere."""


@dataclass
class Faulty:
    """What goes wrong, changed by a test at any time, and what has been seen."""

    upstream: str
    endpoint: str = ""
    share: float = 0.0
    """Of the requests, drawn from `dice`."""
    dice: random.Random = field(default_factory=lambda: random.Random(0))
    gone_until: float = 0.0
    """By time.monotonic(): no request gets an answer before."""
    cuts: list[int] = field(default_factory=list)
    """Bytes after which the next bodies of GET break off, one a request."""
    flips: int = 0
    """So many of the next bodies of GET have a wrong byte."""
    before: dict[int, object] = field(default_factory=dict)
    """Called before the n-th GET (from 1) is passed on."""
    refuses_checksums: bool = False
    """As servers that know none of their headers: 400."""
    asked: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    sent: int = 0
    """Bytes of bodies of GET that went to the client."""
    lock: Lock = field(default_factory=Lock)

    def gone(self, seconds: float) -> None:
        self.gone_until = time.monotonic() + seconds

    def draw(self) -> str:
        with self.lock:
            fault = self.dice.choice(FAULTS) if self.dice.random() < self.share else ""
            if fault:
                self.faults.append(fault)
            return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faulty: Faulty

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        faulty = self.faulty
        with faulty.lock:
            faulty.asked.append(f"{self.command} {self.path}")
            number = sum(asked.startswith("GET") and "list-type" not in asked for asked in faulty.asked)
            call = faulty.before.pop(number, None) if self.command == "GET" else None
        if callable(call):
            call()
        if time.monotonic() < faulty.gone_until:
            self._reset()
            return
        fault = faulty.draw()
        if fault == "slow":
            time.sleep(0.3)
        if fault == "reset":
            self._reset()
        elif fault in CODES:
            self._error(int(fault), CODES[fault])
        elif faulty.refuses_checksums and any("checksum" in f"{k} {v}".lower() for k, v in self.headers.items()):
            self._error(400, "InvalidArgument")
        else:
            self._pass_on(body, fault)

    def _pass_on(self, body: bytes, fault: str) -> None:
        server = http.client.HTTPConnection(urlsplit(self.faulty.upstream).netloc, timeout=60)
        server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("expect", "connection"):
                server.putheader(name, value)
        server.endheaders(body)
        answer = server.getresponse()
        data = answer.read()
        server.close()
        if fault == "lost":
            self._reset()
            return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if self.command == "HEAD":
            return
        keep = len(data)
        if self.faulty.flips and self.command == "GET":
            self.faulty.flips -= 1
            data = data[:-1] + bytes([data[-1] ^ 1])
        if self.command == "GET" and answer.status < 300 and "list-type" not in self.path:
            with self.faulty.lock:
                if self.faulty.cuts:
                    keep = min(keep, self.faulty.cuts.pop(0))
                elif fault == "cut":
                    keep = self.faulty.dice.randrange(keep + 1)
                self.faulty.sent += keep
        self.wfile.write(data[:keep])
        if keep < len(data):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_WR)  # an orderly end in the middle: what was sent arrives
            self.close_connection = True

    def _error(self, status: int, code: str) -> None:
        body = b"" if self.command == "HEAD" else f"<Error><Code>{code}</Code></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        # The files hold the socket open: without them the last close is the reset.
        self.rfile.close()
        self.connection.close()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Of connections that a test has broken."""


@contextmanager
def faulty_s3(upstream: str) -> Iterator[Faulty]:
    """Runs while the context is open; `endpoint` is where clients go."""
    faulty = Faulty(upstream)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"faulty": faulty}))
    faulty.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield faulty
    finally:
        server.shutdown()
        server.server_close()
