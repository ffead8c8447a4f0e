"""A small asyncio client for the API server: objects are dicts, errors carry the server's Status.

Why it exists: the pod runner needs requests with a retry, and watches whose errors are errors (an ERROR event is a Status
object, and the generated client hands it on as if it were a pod), at a thousand pods in seconds.
"""

import asyncio
import json
import random
import ssl
import tempfile
import time
from base64 import b64decode
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import yaml

type Object = dict[str, Any]

MERGE_PATCH = "application/merge-patch+json"
STRATEGIC_PATCH = "application/strategic-merge-patch+json"  # keeps conditions of other types that others have written
_RETRY_SECONDS = 30.0  # an API server that restarts is away for about five
_RETRY_PAUSE = (0.1, 0.5)
_WATCH_SECONDS = 240
_CONNECTIONS = 64


class ApiError(Exception):
    """The server said no: `code` is the HTTP status, `reason` the machine-readable word, for example AlreadyExists."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(f"{code} {reason}: {message}")
        self.code, self.reason = code, reason


class ApiClient:
    """One connection pool; use it with `async with` in one event loop."""

    def __init__(self, kubeconfig: Path) -> None:
        self.server, self._ssl, self._headers = _read_kubeconfig(kubeconfig)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(ssl=self._ssl, limit=_CONNECTIONS)
        self._session = aiohttp.ClientSession(connector=connector, headers=self._headers, timeout=aiohttp.ClientTimeout(total=30))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._open.close()

    @property
    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("use the client with `async with`")
        return self._session

    async def get(self, path: str) -> Object:
        """The object or list at `path`."""
        return await self.request("GET", path)

    async def post(self, path: str, body: Object) -> Object:
        """Creates an object."""
        return await self.request("POST", path, body)

    async def patch(self, path: str, body: Object, content_type: str = MERGE_PATCH) -> Object:
        """Changes an object."""
        return await self.request("PATCH", path, body, content_type)

    async def delete(self, path: str, body: Object) -> Object:
        """Deletes an object; `body` is a DeleteOptions object."""
        return await self.request("DELETE", path, body)

    async def request(self, method: str, path: str, body: Object | None = None, content_type: str = "application/json") -> Object:
        """Sends one request; while the server is away or overloaded it is sent again, for half a minute. Raises ApiError."""
        deadline = time.monotonic() + _RETRY_SECONDS
        while True:
            try:
                return await self._send(method, path, body, content_type)
            except (aiohttp.ClientError, TimeoutError):
                if time.monotonic() > deadline:
                    raise
            except ApiError as error:
                if error.code not in (429, 500, 502, 503, 504) or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(random.uniform(*_RETRY_PAUSE))

    async def watch(self, path: str, resource_version: str) -> AsyncIterator[tuple[str, Object]]:
        """Event type and object of every change after `resource_version`, until the server ends the watch.

        Raises ApiError also for an ERROR event, with the code in its Status (410: list again).
        """
        params = {"watch": "1", "allowWatchBookmarks": "true", "resourceVersion": resource_version, "timeoutSeconds": str(_WATCH_SECONDS)}
        timeout = aiohttp.ClientTimeout(total=None, sock_read=_WATCH_SECONDS + 30)
        async with self._open.get(self.server + path, params=params, timeout=timeout) as answer:
            if answer.status != 200:
                raise _error(answer.status, await answer.text())
            pending = b""
            async for chunk in answer.content.iter_any():
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        raise _error(int(event["object"].get("code", 500)), json.dumps(event["object"]))
                    yield event["type"], event["object"]

    async def _send(self, method: str, path: str, body: Object | None, content_type: str) -> Object:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": content_type} if data is not None else {}
        async with self._open.request(method, self.server + path, data=data, headers=headers) as answer:
            text = await answer.text()
            if answer.status >= 300:
                raise _error(answer.status, text)
            parsed: Object = json.loads(text)
            return parsed


def _error(code: int, text: str) -> ApiError:
    try:
        status = json.loads(text)
    except json.JSONDecodeError:  # a proxy in front of the API server answers in its own words
        return ApiError(code, "Unknown", text)
    if not isinstance(status, dict):
        return ApiError(code, "Unknown", text)
    return ApiError(code, str(status.get("reason", "Unknown")), str(status.get("message", text)))


def _read_kubeconfig(file: Path) -> tuple[str, ssl.SSLContext | bool, dict[str, str]]:
    """Server, TLS and headers of the current context; certificates by file or inline, or a token."""
    config = yaml.safe_load(file.read_text())
    context = _named(config, "context", config["current-context"])
    cluster, user = _named(config, "cluster", context["cluster"]), _named(config, "user", context["user"])
    tls: ssl.SSLContext | bool = True
    if cluster["server"].startswith("https:"):
        authority = _content(cluster, "certificate-authority", file)
        tls = ssl.create_default_context(cadata=authority.decode() if authority else None)
        certificate, key = _content(user, "client-certificate", file), _content(user, "client-key", file)
        if certificate and key:
            # The ssl module reads files only; this one is gone again before the next line runs.
            with tempfile.NamedTemporaryFile() as joined:
                joined.write(certificate + b"\n" + key)
                joined.flush()
                tls.load_cert_chain(joined.name)
    headers = {"Authorization": f"Bearer {user['token']}"} if user.get("token") else {}
    return cluster["server"].rstrip("/"), tls, headers


def _named(config: Mapping[str, Any], kind: str, name: str) -> Object:
    for entry in config[f"{kind}s"]:
        if entry["name"] == name:
            found: Object = entry[kind]
            return found
    raise KeyError(f"the kubeconfig has no {kind} {name!r}")


def _content(section: Mapping[str, Any], key: str, kubeconfig: Path) -> bytes | None:
    inline = section.get(f"{key}-data")
    if inline:
        return b64decode(inline)
    named = section.get(key)
    return (kubeconfig.parent / named).read_bytes() if named else None
