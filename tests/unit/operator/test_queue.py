"""The work queue keeps client-go's contract."""

import asyncio

import pytest

from finetune_operator.control.queue import MAX_SECONDS, ShutDown, WorkQueue
from finetune_operator.observe.metrics import Metrics


@pytest.fixture
async def queue() -> WorkQueue[str]:
    return WorkQueue(Metrics(), jitter=lambda _low, high: high)


async def test_a_key_that_waits_is_one_key(queue: WorkQueue[str]) -> None:
    for _ in range(5):
        queue.add("a")
    assert await queue.get() == "a"
    assert len(queue) == 0


async def test_a_key_added_while_it_is_worked_on_comes_once_more_and_never_twice_at_a_time(queue: WorkQueue[str]) -> None:
    queue.add("a")
    key = await queue.get()
    queue.add("a")
    queue.add("a")
    assert len(queue) == 0
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(queue.get(), 0.05)
    queue.done(key)
    assert await asyncio.wait_for(queue.get(), 1) == "a"
    queue.done("a")
    assert len(queue) == 0


async def test_keys_come_in_order_and_side_by_side(queue: WorkQueue[str]) -> None:
    for key in "abc":
        queue.add(key)
    assert [await queue.get() for _ in range(3)] == ["a", "b", "c"]


async def test_a_delayed_key_comes_at_the_earliest_time_asked_for(queue: WorkQueue[str]) -> None:
    queue.add_after("a", 30)
    queue.add_after("a", 0.02)
    queue.add_after("a", 30)
    assert await asyncio.wait_for(queue.get(), 1) == "a"


async def test_backoff_doubles_up_to_a_cap_and_is_forgotten(queue: WorkQueue[str]) -> None:
    delays: list[float] = []
    queue.add_after = lambda _key, seconds: delays.append(seconds)  # type: ignore[method-assign]
    for _ in range(30):
        queue.retry("a")
    assert delays[:3] == [0.05, 0.1, 0.2]
    assert delays[-1] == MAX_SECONDS
    queue.forget("a")
    queue.retry("a", at_least=7.0)
    assert delays[-1] == pytest.approx(7.05)


async def test_closing_ends_every_waiting_worker(queue: WorkQueue[str]) -> None:
    waiting = [asyncio.create_task(queue.get()) for _ in range(3)]
    await asyncio.sleep(0)
    queue.close()
    assert all(isinstance(r, ShutDown) for r in await asyncio.gather(*waiting, return_exceptions=True))
    queue.add("a")
    assert len(queue) == 0
