"""Puts the parts together and runs them until one ends: a part that dies takes the process down, and the Deployment starts it anew."""

import asyncio
import logging
import signal
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlparse

import kopf
from aiohttp import web
from kubernetes.aio.client import Configuration

from finetune_api import JobDefaults
from finetune_operator.control import http, preflight, tls, watch
from finetune_operator.control.loop import Key, run_workers
from finetune_operator.control.progress import ProgressServer
from finetune_operator.control.queue import WorkQueue
from finetune_operator.control.standby import Forwarder
from finetune_operator.control.sweeps import SweepReconciler
from finetune_operator.control.worker import Reconciler
from finetune_operator.domain.election import Candidate
from finetune_operator.domain.types import Settings
from finetune_operator.kube import port
from finetune_operator.kube.aio import AioCluster, load_configuration
from finetune_operator.kube.lease import Alone, Elector, Leadership
from finetune_operator.kube.port import JOBS, SWEEPS
from finetune_operator.observe.metrics import Metrics

log = logging.getLogger(__name__)

T = TypeVar("T")

STOP_SECONDS = 3.0
SWEEP_WORKERS = 2
"""Decisions about sweeps are made in threads, and share Python's lock with everything else."""


@dataclass(frozen=True)
class Options:
    """The command line."""

    namespaces: list[str]
    trainer_image: str
    progress_bind: tuple[str, int]
    progress_url: str
    metrics_bind: tuple[str, int]
    tls_secret: str
    tls_dir: Path | None
    """Certificates that somebody else makes; without it the operator makes its own CA in `tls_secret`."""
    own_namespace: str
    lease: str
    """Name of the Lease in the own namespace; empty: this is the only operator."""
    lease_seconds: int
    pod_name: str
    pod_ip: str
    workers: int
    resync_seconds: float
    restart_backoff_seconds: float
    model_mirror: str | None
    dataset_mirror: str | None
    job_defaults: JobDefaults
    kubeconfig: Path | None


async def run(options: Options) -> None:
    """Until SIGTERM or SIGINT. Raises preflight.NotReady, lease.LeaseLost, or whatever a part died of."""
    stop = asyncio.Event()
    _take_signals(stop)
    metrics = Metrics()
    try:
        configuration = await load_configuration(options.kubeconfig)
    except port.ApiError as error:
        raise preflight.NotReady(error.message) from error

    def count(verb: str, resource: str, code: str) -> None:
        metrics.api_requests.labels(verb, resource, code).inc()

    # What is done before there is a leader, and the Lease itself: on connections that no flood of reconciles can take.
    unfenced = AioCluster(configuration, count)
    leadership = _leadership(options, unfenced)
    cluster = AioCluster(configuration, count, leadership.remaining)
    metrics.leader.set_function(lambda: float(leadership.remaining() > 0))
    try:
        host = str(urlparse(options.progress_url).hostname)
        # An API server that does not answer must not keep a process that was asked to end.
        identity = await _unless_stopped(stop, _prepare(options, unfenced, host))
        if identity is None:
            return
        settings = Settings(
            trainer_image=options.trainer_image,
            progress_url=options.progress_url,
            progress_ca=identity.ca.decode(),
            model_mirror=options.model_mirror,
            dataset_mirror=options.dataset_mirror,
            defaults=options.job_defaults,
            restart_backoff_seconds=options.restart_backoff_seconds,
        )
        queue: WorkQueue[Key] = WorkQueue(metrics)
        reconciler = Reconciler(cluster, settings, queue, metrics)
        sweeps = SweepReconciler(cluster, settings, WorkQueue(metrics), metrics)
        listed = asyncio.Event()
        forwarder = Forwarder(leadership, identity.ca, host, metrics)
        progress = ProgressServer(cluster, reconciler, queue, metrics).app(forwarder.middleware)
        progress.cleanup_ctx.extend((forwarder.session, identity.kept(stop)))
        async with (
            _serve(http.build_app(metrics, reconciler, queue, listed, leadership), options.metrics_bind),
            _serve(progress, options.progress_bind, identity.context),
        ):
            await _until_stopped(options, reconciler, sweeps, configuration, listed, leadership, stop)
    finally:
        await asyncio.gather(cluster.close(), unfenced.close())


def _leadership(options: Options, cluster: AioCluster) -> Leadership:
    if not options.lease:
        return Alone()
    ip = f"[{options.pod_ip}]" if ":" in options.pod_ip else options.pod_ip
    identity = f"{options.pod_name}_{uuid.uuid4()}"
    candidate = Candidate(identity, f"{ip}:{options.progress_bind[1]}", options.lease_seconds)
    return Elector(cluster, options.own_namespace, options.lease, candidate)


async def _prepare(options: Options, cluster: AioCluster, host: str) -> tls.Identity:
    """The progress server's certificate, when everything is there that the operator needs; else preflight.NotReady."""
    own_objects = {"leases": options.lease} if options.lease else {}
    if not options.tls_dir:
        own_objects["secrets"] = options.tls_secret
    await preflight.check(cluster, options.namespaces, options.own_namespace, own_objects)
    try:
        if options.tls_dir:
            return tls.files_identity(options.tls_dir)
        ca = await tls.load_ca(cluster, options.own_namespace, options.tls_secret)
    except tls.UnusableFilesError as error:
        raise preflight.NotReady(f"--tls-dir: {error}") from error
    except port.NotFound as error:
        place = f"{options.own_namespace}/{options.tls_secret}"
        raise preflight.NotReady(f"The Secret {place} does not exist: create it empty (the chart does).") from error
    return tls.own_identity(*ca, [host, "localhost", "127.0.0.1"])


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
    reconciler: Reconciler,
    sweeps: SweepReconciler,
    configuration: Configuration,
    listed: asyncio.Event,
    leadership: Leadership,
    stop: asyncio.Event,
) -> None:
    """A standby first, then the leader; never a standby again: who loses the lease ends."""
    try:
        await _unless_stopped(stop, leadership.acquire())
        if not stop.is_set():
            log.info("ready: watching %s with %d workers", ", ".join(options.namespaces) or "all namespaces", options.workers)
            await _lead(options, reconciler, sweeps, configuration, listed, leadership, stop)
    finally:
        await leadership.release()
    log.info("stopped")


async def _unless_stopped(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """What the work gives, or raises; None when the end comes first."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
    for task in (working, stopping):
        task.cancel()
    await asyncio.gather(working, stopping, return_exceptions=True)
    return None if working.cancelled() else working.result()


async def _lead(
    options: Options,
    reconciler: Reconciler,
    sweeps: SweepReconciler,
    configuration: Configuration,
    listed: asyncio.Event,
    leadership: Leadership,
    stop: asyncio.Event,
) -> None:
    # Tasks that exist before kopf starts are left alone when it ends.
    workers = asyncio.create_task(run_workers(reconciler, options.workers), name="workers")
    searching = asyncio.create_task(run_workers(sweeps, SWEEP_WORKERS), name="sweep workers")
    kinds = ((JOBS, reconciler), (SWEEPS, sweeps))
    listing = watch.resync(reconciler.cluster, options.namespaces, kinds, options.resync_seconds, listed)
    resync = asyncio.create_task(listing, name="resync")
    lease = asyncio.create_task(leadership.keep(), name="lease")
    stopping = asyncio.create_task(stop.wait(), name="stopping")
    ready = asyncio.Event()
    watching = asyncio.create_task(
        kopf.operator(
            registry=watch.build_registry(reconciler, sweeps, configuration),
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
    signals = asyncio.create_task(_take_signals_back(ready, stop), name="signals")
    parts: set[asyncio.Task[Any]] = {workers, searching, resync, lease, stopping, watching}
    done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
    stop.set()
    asyncio.get_running_loop().set_exception_handler(_on_loop_error)
    reconciler.queue.close()
    sweeps.queue.close()
    for part in (resync, signals):
        part.cancel()
    flushing = asyncio.create_task(_flush(workers, reconciler, leadership), name="flush")
    _, late = await asyncio.wait({workers, flushing, searching, watching, resync, signals}, timeout=STOP_SECONDS)
    # To the last write the lease is renewed.
    for part in (*late, lease):
        part.cancel()
    await asyncio.gather(*late, lease, return_exceptions=True)
    for part in done - {stopping}:
        if (error := part.exception()) is not None:
            raise error
        if part is not watching:  # kopf ends by itself only when it took the signal
            raise RuntimeError(f"{part.get_name()} ended by itself")


async def _flush(workers: "asyncio.Task[None]", reconciler: Reconciler, leadership: Leadership) -> None:
    await asyncio.wait({workers})  # one key is never worked on twice at a time
    if leadership.remaining() > 0:
        await reconciler.flush()


def _on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """kopf leaves its watches to asyncio, which closes the outer and the inner generator of each at once when the loop ends: whichever
    comes second complains. Nothing is lost by then, and a traceback at each stop would hide real ones."""
    if getattr(context.get("asyncgen"), "__qualname__", "") == "infinite_watch":
        log.debug("%s: %s", context["message"], context.get("exception"))
    else:
        loop.default_exception_handler(context)


def _take_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)


async def _take_signals_back(ready: asyncio.Event, stop: asyncio.Event) -> None:
    """kopf installs handlers of its own while it starts: ours go over them."""
    await ready.wait()
    _take_signals(stop)
