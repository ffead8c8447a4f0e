"""The loop around a reconcile: after every failure what was remembered is read anew, and the key comes back."""

import pytest

from finetune_operator.control.loop import Key, KeyLoop
from finetune_operator.control.queue import WorkQueue
from finetune_operator.kube import port
from finetune_operator.observe.metrics import Metrics

KEY = ("team", "mood")


class Failing(KeyLoop):
    kind = "Thing"

    def __init__(self, error: Exception) -> None:
        metrics = Metrics()
        queue: WorkQueue[Key] = WorkQueue(metrics, jitter=lambda _low, _high: 0.0)
        super().__init__(queue, metrics, metrics.reconcile_seconds)
        self.error, self.forgotten = error, 0

    async def reconcile(self, key: Key) -> None:
        raise self.error

    def outdated(self, key: Key) -> None:
        self.forgotten += 1


@pytest.mark.parametrize(
    "error",
    [
        port.Conflict(409, "Conflict", "changed"),
        # The write may have been made, and its answer lost: deciding on what was read before would decide twice.
        port.Unavailable(0, "NoAnswer", "reset"),
        RuntimeError("ours"),
    ],
    ids=["conflict", "answer lost", "bug"],
)
async def test_what_was_remembered_is_read_anew(error: Exception) -> None:
    loop = Failing(error)
    await loop._one(KEY)
    assert loop.forgotten == 1
    assert await loop.queue.get() == KEY
