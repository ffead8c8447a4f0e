"""The work queue with many workers at once: no key is shared, no add is missed; and its metrics."""

import asyncio

import pytest

from finetune_operator.control.queue import ShutDown, WorkQueue
from finetune_operator.observe.metrics import Metrics


@pytest.fixture
async def queue() -> WorkQueue[str]:
    return WorkQueue(Metrics(), jitter=lambda _low, high: high)


def value(queue: WorkQueue[str], name: str) -> float:
    return queue._metrics.registry.get_sample_value(name) or 0.0


async def test_keys_come_out_in_order_and_once(queue: WorkQueue[str]) -> None:
    for key in ("a", "b", "a", "a"):
        queue.add(key)
    assert [await queue.get(), await queue.get()] == ["a", "b"]
    assert len(queue) == 0
    assert value(queue, "finetune_queue_adds_total") == 2
    assert value(queue, "finetune_queue_depth") == 0


async def test_a_waiting_worker_is_woken(queue: WorkQueue[str]) -> None:
    waiting = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    queue.add("a")
    assert await asyncio.wait_for(waiting, 1) == "a"


async def test_many_workers_never_share_a_key_and_miss_no_add(queue: WorkQueue[str]) -> None:
    busy: set[str] = set()
    added_last: dict[str, int] = {}
    seen_last: dict[str, int] = {}
    idle = asyncio.Event()

    async def work() -> None:
        while True:
            try:
                key = await queue.get()
            except ShutDown:
                return
            assert key not in busy
            busy.add(key)
            seen_last[key] = added_last[key]  # a level-triggered reconcile reads the newest state
            await asyncio.sleep(0)
            busy.discard(key)
            queue.done(key)
            if not busy and not len(queue):
                idle.set()

    workers = [asyncio.create_task(work()) for _ in range(8)]
    for number in range(3000):
        key = f"k{number % 17}"
        added_last[key] = number
        queue.add(key)
        idle.clear()
        if number % 5 == 0:
            await asyncio.sleep(0)
    await asyncio.wait_for(idle.wait(), 5)
    queue.close()
    await asyncio.wait_for(asyncio.gather(*workers), 2)
    assert seen_last == added_last, "the last change of a key was never looked at"


async def test_two_queues_share_the_depth() -> None:
    metrics = Metrics()
    jobs: WorkQueue[str] = WorkQueue(metrics)
    sweeps: WorkQueue[str] = WorkQueue(metrics)
    for key in ("a", "b", "c"):
        jobs.add(key)
    sweeps.add("s")
    await sweeps.get()
    assert metrics.registry.get_sample_value("finetune_queue_depth") == 3
