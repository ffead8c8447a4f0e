"""The reconciler's memory on a real API server: what is gone is forgotten, also when no watch said so."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from finetune_operator.control import watch
from finetune_operator.control.loop import Key
from finetune_operator.control.queue import WorkQueue
from finetune_operator.control.worker import Reconciler
from finetune_operator.domain.types import Settings
from finetune_operator.kube.aio import AioCluster, load_configuration
from finetune_operator.kube.port import JOBS
from finetune_operator.observe.metrics import Metrics
from integration.chart import install
from integration.jobs import PATIENCE, Jobs, manifest
from testcluster import Cluster

SETTINGS = Settings(trainer_image="trainer:1", progress_url="https://127.0.0.1:1", progress_ca="PEM")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One on which no other operator runs: the shared one's would do the work first."""
    with Cluster() as running:
        yield running


@pytest.fixture
async def reconciler(cluster: Cluster, namespace: str) -> AsyncIterator[Reconciler]:
    """Without kopf and without workers: the test says what is looked at, so that no event can help."""
    client = AioCluster(await load_configuration(install(cluster, namespace)))
    metrics = Metrics()
    yield Reconciler(client, SETTINGS, WorkQueue[Key](metrics), metrics)
    await client.close()


async def resync_once(reconciler: Reconciler, namespace: str) -> None:
    listed = asyncio.Event()
    task = asyncio.create_task(watch.resync(reconciler.cluster, [namespace], [(JOBS, reconciler)], 3600, listed), name="resync")
    await asyncio.wait_for(listed.wait(), PATIENCE)
    task.cancel()


async def test_the_resync_puts_what_is_there_on_the_queue(reconciler: Reconciler, cluster: Cluster, namespace: str) -> None:
    Jobs(cluster, namespace).apply(manifest("a"), manifest("b"))
    await resync_once(reconciler, namespace)
    assert {await reconciler.queue.get(), await reconciler.queue.get()} == {(namespace, "a"), (namespace, "b")}


async def test_a_second_look_at_an_unchanged_world_writes_nothing(
    reconciler: Reconciler, cluster: Cluster, namespace: str
) -> None:
    jobs = Jobs(cluster, namespace)
    jobs.apply(manifest("a", suspend=True))
    await reconciler.reconcile((namespace, "a"))
    before = jobs.get("a")
    for _ in range(3):
        await reconciler.reconcile((namespace, "a"))
    assert jobs.get("a") == before
    assert reconciler.metrics.registry.get_sample_value("finetune_status_writes_total") == 1


async def test_what_went_while_no_watch_was_looking_is_forgotten(
    reconciler: Reconciler, cluster: Cluster, namespace: str
) -> None:
    jobs = Jobs(cluster, namespace)
    jobs.apply(manifest("a", suspend=True))
    await reconciler.reconcile((namespace, "a"))

    def suspended() -> float | None:
        labels = {"namespace": namespace, "state": "Suspended"}
        return reconciler.metrics.registry.get_sample_value("finetune_jobs", labels)

    assert suspended() == 1
    cluster.kubectl("-n", namespace, "delete", "ftj", "a")
    await resync_once(reconciler, namespace)
    assert suspended() == 0, "the metric would count a deleted job for ever"
