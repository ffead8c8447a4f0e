"""What a process computes of each global batch: its share, cut into micro-batches, on its device.

On an accelerator the batches of the next step are made and sent while it still computes the present one: from pinned memory, so that
sending waits for nothing. A CPU has nothing to wait for, and gets its batches when they are asked for.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from finetune_trainer.data import collate
from finetune_trainer.dist import Group
from finetune_trainer.tasks import Encoded


@dataclass(frozen=True)
class MicroBatch:
    """Rows that are computed at once. `counts` is False for one that a process only takes part with, having no row of its own."""

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    counts: bool


class Feed:
    """The micro-batches of global batches of `data`; `ahead` says whether those of the next one are made before they are asked for."""

    def __init__(self, data: Encoded, pad: int, device: torch.device, group: Group) -> None:
        self.data, self.pad, self.device, self.group = data, pad, device, group
        self.ahead = device.type == "cuda"
        self._ready: tuple[Any, int, list[MicroBatch]] | None = None

    def __call__(self, rows: Any, at_once: int) -> list[MicroBatch]:
        """This process's part of the global batch, at most `at_once` rows each; as many at every process."""
        ready, self._ready = self._ready, None
        if ready is not None and ready[0] is rows and ready[1] == at_once:
            return ready[2]
        share = self.group.share(rows)
        count = -(-self.group.most(len(rows)) // at_once)
        return [self._made(piece if len(piece) else rows[:1], counts=len(piece) > 0) for piece in np.array_split(share, count)]

    def prepare(self, rows: Any, at_once: int) -> None:
        """What is asked for next, unless there is no next (None)."""
        if self.ahead and rows is not None:
            self._ready = (rows, at_once, self(rows, at_once))

    def _made(self, rows: Any, *, counts: bool) -> MicroBatch:
        if self.device.type == "cuda":
            there = collate(self.data, rows, self.pad, torch.device("cpu"))
            batch = {name: t.pin_memory().to(self.device, non_blocking=True) for name, t in there.items()}
        else:
            batch = collate(self.data, rows, self.pad, self.device)
        labels = batch.pop("labels")
        return MicroBatch(batch, labels, counts)
