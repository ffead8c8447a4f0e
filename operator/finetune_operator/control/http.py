"""Plain HTTP for the platform: /metrics, /healthz, /readyz."""

import asyncio
import time

from aiohttp import web

from finetune_operator.control.loop import Key
from finetune_operator.control.queue import WorkQueue
from finetune_operator.control.worker import Reconciler
from finetune_operator.kube.lease import Leadership
from finetune_operator.observe.metrics import Metrics

STUCK_SECONDS = 120.0


def build_app(
    metrics: Metrics, reconciler: Reconciler, queue: WorkQueue[Key], listed: asyncio.Event, leadership: Leadership
) -> web.Application:
    """The three endpoints."""

    async def render(_: web.Request) -> web.Response:
        return web.Response(body=metrics.render(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def healthy(_: web.Request) -> web.Response:
        # That this answers shows that the event loop turns; keys that wait while no worker takes one show a jam.
        silent = time.monotonic() - reconciler.heartbeat
        if len(queue) and silent > STUCK_SECONDS:
            return web.Response(status=500, text=f"{len(queue)} keys wait and no worker has taken one for {silent:.0f} s\n")
        return web.Response(text="ok\n")

    async def ready(_: web.Request) -> web.Response:
        # A standby lists nothing, and yet it serves: it passes progress on, and a rolling update waits for it.
        if listed.is_set() or leadership.remaining() <= 0:
            return web.Response(text="ok\n")
        return web.Response(status=503, text="the resources have not been listed yet\n")

    app = web.Application()
    app.router.add_get("/metrics", render)
    app.router.add_get("/healthz", healthy)
    app.router.add_get("/readyz", ready)
    return app
