"""Puts the parts together and runs them until one ends: a part that dies takes the process down, and the Deployment starts it anew."""

import asyncio
import logging
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import kopf
from aiohttp import web
from kubernetes.aio.client import Configuration

from finetune_operator.control import http, preflight, tls, watch
from finetune_operator.control.progress import ProgressServer
from finetune_operator.control.queue import WorkQueue
from finetune_operator.control.worker import Key, Reconciler, run_workers
from finetune_operator.domain.types import Settings
from finetune_operator.kube import port
from finetune_operator.kube.aio import AioCluster, load_configuration
from finetune_operator.observe.metrics import Metrics

log = logging.getLogger(__name__)

STOP_SECONDS = 3.0


@dataclass(frozen=True)
class Options:
    """The command line."""

    namespaces: list[str]
    trainer_image: str
    progress_bind: tuple[str, int]
    progress_url: str
    metrics_bind: tuple[str, int]
    tls_secret: str
    own_namespace: str
    workers: int
    resync_seconds: float
    restart_backoff_seconds: float
    model_mirror: str | None
    kubeconfig: Path | None


async def run(options: Options) -> None:
    """Until SIGTERM or SIGINT. Raises preflight.NotReady, or whatever a part died of."""
    metrics = Metrics()
    try:
        configuration = await load_configuration(options.kubeconfig)
    except port.ApiError as error:
        raise preflight.NotReady(error.message) from error
    cluster = AioCluster(configuration, lambda verb, resource, code: metrics.api_requests.labels(verb, resource, code).inc())
    try:
        await preflight.check(cluster, options.namespaces, options.own_namespace, options.tls_secret)
        try:
            ca, ca_key = await tls.load_ca(cluster, options.own_namespace, options.tls_secret)
        except port.NotFound as error:
            place = f"{options.own_namespace}/{options.tls_secret}"
            raise preflight.NotReady(f"The Secret {place} does not exist: create it empty (the chart does).") from error
        settings = Settings(
            trainer_image=options.trainer_image,
            progress_url=options.progress_url,
            progress_ca=ca.decode(),
            model_mirror=options.model_mirror,
            restart_backoff_seconds=options.restart_backoff_seconds,
        )
        queue: WorkQueue[Key] = WorkQueue(metrics)
        reconciler = Reconciler(cluster, settings, queue, metrics)
        listed = asyncio.Event()
        progress = ProgressServer(cluster, reconciler, queue, metrics).app()
        hosts = [str(urlparse(options.progress_url).hostname), "localhost", "127.0.0.1"]
        async with (
            _serve(http.build_app(metrics, reconciler, queue, listed), options.metrics_bind),
            _serve(progress, options.progress_bind, tls.server_context(ca, ca_key, hosts)),
        ):
            log.info("ready: watching %s with %d workers", ", ".join(options.namespaces) or "all namespaces", options.workers)
            await _until_stopped(options, queue, reconciler, cluster, configuration, listed)
    finally:
        await cluster.close()


class _serve:  # noqa: N801  (used as a function: `async with _serve(app, address):`)
    def __init__(self, app: web.Application, address: tuple[str, int], context: object = None) -> None:
        self.runner = web.AppRunner(app, access_log=None)
        self.address = address
        self.context = context

    async def __aenter__(self) -> None:
        await self.runner.setup()
        await web.TCPSite(self.runner, *self.address, ssl_context=self.context, shutdown_timeout=1.0).start()  # type: ignore[arg-type]

    async def __aexit__(self, *_: object) -> None:
        await self.runner.cleanup()


async def _until_stopped(
    options: Options,
    queue: WorkQueue[Key],
    reconciler: Reconciler,
    cluster: AioCluster,
    configuration: Configuration,
    listed: asyncio.Event,
) -> None:
    stop = asyncio.Event()
    # Tasks that exist before kopf starts are left alone when it ends.
    workers = asyncio.create_task(run_workers(reconciler, options.workers), name="workers")
    resync = asyncio.create_task(
        watch.resync(cluster, options.namespaces, queue, reconciler, options.resync_seconds, listed), name="resync"
    )
    stopping = asyncio.create_task(stop.wait(), name="stopping")
    ready = asyncio.Event()
    watching = asyncio.create_task(
        kopf.operator(
            registry=watch.build_registry(queue, reconciler, configuration),
            settings=watch.build_settings(),
            clusterwide=not options.namespaces,
            namespaces=options.namespaces,
            standalone=True,
            stop_flag=stop,
            ready_flag=ready,
            # kopf would ask for the name of the user, and a uid that the platform made up has none.
            identity="finetune-operator",  # type: ignore[arg-type]
        ),
        name="watching",
    )
    signals = asyncio.create_task(_take_signals(ready, stop), name="signals")
    parts: set[asyncio.Task[Any]] = {workers, resync, stopping, watching}
    done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
    stop.set()
    queue.close()
    for part in (resync, signals):
        part.cancel()
    _, late = await asyncio.wait({workers, watching, resync, signals}, timeout=STOP_SECONDS)
    for part in late:
        part.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    for part in done - {stopping}:
        if (error := part.exception()) is not None:
            raise error
        if part is not watching:  # kopf ends by itself only when it took the signal
            raise RuntimeError(f"{part.get_name()} ended by itself")
    log.info("stopped")


async def _take_signals(ready: asyncio.Event, stop: asyncio.Event) -> None:
    """SIGTERM and SIGINT set `stop`. kopf installs handlers of its own while it starts: ours go over them."""
    loop = asyncio.get_running_loop()
    for _ in range(2):
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await ready.wait()
