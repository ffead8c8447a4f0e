"""What a standby does with progress posts: it passes them on to the leader, whose address is on the Lease.

The Service sends trainers to any operator, and urllib follows no redirect of a POST, so an operator that does not lead is a proxy. It
judges nothing: the leader checks the token. A post is passed on once at most; a leader never does, so there is no loop.
"""

import logging
import ssl
from collections.abc import AsyncIterator

import aiohttp
from aiohttp import web
from aiohttp.typedefs import Handler
from yarl import URL

from finetune_operator.kube.lease import Leadership
from finetune_operator.observe.metrics import Metrics

log = logging.getLogger(__name__)

FORWARDED = "X-Finetune-Forwarded"
"""Header of a post that has come through a standby."""
KEPT = ("Authorization", "Content-Type")
TIMEOUT = aiohttp.ClientTimeout(total=5.0, sock_connect=2.0)
"""Trainers wait for the answer: a leader whose node is gone must not hold them up for long."""
RETRY_AFTER = {"Retry-After": "5"}


class Forwarder:
    """Answers with the leader's own words, as long as this process does not lead."""

    def __init__(self, leadership: Leadership, ca: bytes, host: str, metrics: Metrics) -> None:
        self.leadership = leadership
        self.metrics = metrics
        self.host = host
        """The name that the leader's certificate must have: the one under which pods know the progress server."""
        self._context = ssl.create_default_context(cadata=ca.decode())

    async def session(self, _: web.Application) -> AsyncIterator[None]:
        """The connections to the leader, for the life of the application."""
        async with aiohttp.ClientSession(timeout=TIMEOUT) as self._session:
            yield

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """In front of every route; what has no route is answered here."""
        if self.leadership.remaining() > 0 or request.match_info.http_exception is not None:
            return await handler(request)
        leader = None if FORWARDED in request.headers else self.leadership.leader()
        answer = await self._forward(request, leader) if leader else _nobody("no operator leads now: post again later")
        self.metrics.progress_forwarded.labels(str(answer.status)).inc()
        return answer

    async def _forward(self, request: web.Request, leader: str) -> web.Response:
        headers = {name: request.headers[name] for name in KEPT if name in request.headers} | {FORWARDED: "1"}
        body = await request.read()
        url = URL(f"https://{leader}{request.raw_path}", encoded=True)
        try:
            async with self._session.post(
                url, data=body, headers=headers, ssl=self._context, server_hostname=self.host, allow_redirects=False
            ) as answer:
                kept = {name: answer.headers[name] for name in ("Content-Type", "Retry-After") if name in answer.headers}
                return web.Response(status=answer.status, body=await answer.read(), headers=kept)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            log.warning("progress: the leader at %s does not answer: %s %s", leader, type(error).__name__, error)
            return _nobody("the operator that leads does not answer: post again later")


def _nobody(message: str) -> web.Response:
    return web.json_response({"message": message}, status=503, headers=RETRY_AFTER)
