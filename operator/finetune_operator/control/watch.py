"""kopf's part: watch streams that put keys on our queue, and nothing else.

Only `on.event` handlers, so that kopf writes nothing to any object: no finalizer, no annotation (docs/adr/0001).
"""

import asyncio
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import kopf
from kubernetes.aio.client import Configuration

from finetune_api import names
from finetune_operator.control.loop import Key
from finetune_operator.control.queue import WorkQueue
from finetune_operator.control.sweeps import SweepReconciler
from finetune_operator.control.worker import Reconciler
from finetune_operator.kube.port import ApiError, Cluster, Resource

log = logging.getLogger(__name__)

OURS = f"{names.LABEL_MANAGED_BY}={names.MANAGER}"


class Remembers(Protocol):
    """What a resync asks of the reconciler of a kind."""

    queue: WorkQueue[Key]
    finished: set[Key]

    def known(self) -> set[Key]: ...
    def forget(self, key: Key) -> None: ...


class _Backoffs:
    """Endless, growing to 30 s, with jitter: kopf's default gives up after 54 s and ends the operator."""

    def __iter__(self) -> Iterator[float]:
        delay = 0.5
        while True:
            yield random.uniform(delay / 2, delay)
            delay = min(30.0, delay * 2)


def build_registry(reconciler: Reconciler, sweeps: SweepReconciler, configuration: Configuration) -> kopf.OperatorRegistry:
    """The handlers, in a registry of their own: no globals, many operators per process."""
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    async def login(**_: Any) -> kopf.ConnectionInfo:
        # The same credentials as our own client's; kopf asks again when they are refused, so a renewed token is read anew.
        token = await configuration.get_api_key_with_prefix("BearerToken", alias="authorization")
        return kopf.ConnectionInfo(
            server=configuration.host,
            ca_path=configuration.ssl_ca_cert,
            insecure=not configuration.verify_ssl,
            # "Bearer TOKEN" of a kubeconfig, "bearer TOKEN" of a pod's ServiceAccount.
            token=token.rpartition(" ")[2] if token else None,
            certificate_path=configuration.cert_file,
            private_key_path=configuration.key_file,
        )

    @kopf.on.event(names.GROUP, names.VERSION, names.PLURAL_JOB, registry=registry)
    async def job_event(namespace: str | None, name: str | None, labels: Mapping[str, str], type: str | None, **_: Any) -> None:
        reconciler.queue.add((str(namespace), str(name)))
        if sweep := labels.get(names.LABEL_SWEEP):
            key = (str(namespace), sweep)
            if type == "DELETED":
                sweeps.relist(key)  # of a trial that has ended nothing is read again, unless it is gone
            sweeps.touch(key, str(name))

    @kopf.on.event(names.GROUP, names.VERSION, names.PLURAL_SWEEP, registry=registry)
    async def sweep_event(namespace: str | None, name: str | None, **_: Any) -> None:
        sweeps.queue.add((str(namespace), str(name)))

    async def child_event(namespace: str | None, labels: Mapping[str, str], **_: Any) -> None:
        owner = labels.get(names.LABEL_JOB)
        key = (str(namespace), str(owner))
        if owner and key not in reconciler.finished:
            reconciler.queue.add(key)
        elif not owner and (sweep := labels.get(names.LABEL_SWEEP)):  # the Job that closes a sweep
            sweeps.touch((str(namespace), sweep), "")

    kopf.on.event("batch", "v1", "jobs", registry=registry, labels={names.LABEL_MANAGED_BY: names.MANAGER})(child_event)
    kopf.on.event("", "v1", "pods", registry=registry, labels={names.LABEL_MANAGED_BY: names.MANAGER})(child_event)
    return registry


def build_settings() -> kopf.OperatorSettings:
    """kopf, reduced to watching."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.peering.standalone = True
    settings.scanning.disabled = True
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 310
    settings.watching.connect_timeout = 10
    settings.watching.chunk_size = 500
    settings.watching.label_selectors["batch", "v1", "jobs"] = OURS
    settings.watching.label_selectors["", "v1", "pods"] = OURS
    settings.networking.error_backoffs = _Backoffs()
    settings.networking.request_timeout = 30
    settings.process.ultimate_exiting_timeout = 4
    # Never written, but two operators in one cluster must not take each other's marks for their own.
    settings.persistence.finalizer = f"{names.GROUP}/unused"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=names.GROUP)
    settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=names.GROUP)
    return settings


async def resync(
    cluster: Cluster, namespaces: list[str], kinds: Sequence[tuple[Resource, Remembers]], seconds: float, listed: asyncio.Event
) -> None:
    """Lists all resources at the start and then every so often (with jitter): catches what a watch missed, forgets what is gone."""
    while True:
        try:
            for resource, reconciler in kinds:
                await _resync(cluster, namespaces, resource, reconciler)
            listed.set()
            pause = seconds * random.uniform(0.8, 1.2)
        except ApiError as error:
            log.warning("resync: %s; trying again", error)
            pause = random.uniform(1, 10)
        await asyncio.sleep(pause)


async def _resync(cluster: Cluster, namespaces: list[str], resource: Resource, reconciler: Remembers) -> None:
    # Taken first: what is made while the list is read must not look as if it were gone.
    known, seen = reconciler.known(), set[Key]()
    places: list[str | None] = [*namespaces] or [None]
    for namespace in places:
        async for found in cluster.list(resource, namespace):
            key = (found["metadata"]["namespace"], found["metadata"]["name"])
            seen.add(key)
            if key not in reconciler.finished:
                reconciler.queue.add(key)
    for key in known - seen:
        reconciler.forget(key)
