"""Runs a model over data: evaluation while training, and prediction afterwards, through the same code."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from finetune_trainer.data import collate
from finetune_trainer.dist import ALONE, Group
from finetune_trainer.tasks import Encoded, Evaluated, TaskKind
from finetune_trainer.tasks.base import Floats

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

AT_ONCE = 64
"""Rows."""


def outputs(
    model: "PreTrainedModel",
    kind: TaskKind,
    encoded: Encoded,
    pad: int,
    device: "torch.device",
    group: Group = ALONE,
    at_once: int = AT_ONCE,
) -> Floats:
    """What the task keeps of each row's answer, (rows, width), in row order. Leaves the model in eval mode."""
    from finetune_trainer import sharding

    def answer(batch: "dict[str, torch.Tensor]", labels: "torch.Tensor") -> "torch.Tensor":
        return kind.outputs(model(**batch, **kind.options).logits, labels)

    model.eval()
    out = by_row(answer, kind.width(encoded), encoded, pad, device, group, at_once).astype(np.float64)
    sharding.close(model, group)
    return out


def by_row(
    answer: "Callable[[dict[str, torch.Tensor], torch.Tensor], torch.Tensor]",
    width: int,
    encoded: Encoded,
    pad: int,
    device: "torch.device",
    group: Group = ALONE,
    at_once: int = AT_ONCE,
) -> npt.NDArray[np.float32]:
    """answer(batch, labels) of all rows, (rows, width), in row order; batches are formed by length and shared out.

    Out of memory, it goes on with half as many rows at once; not where other processes wait for this very pass (torch.OutOfMemoryError).
    """
    import torch

    if not len(encoded):
        raise ValueError("there is nothing to evaluate")
    mine = group.share(np.argsort(encoded.lengths, kind="stable"))
    out = torch.zeros(len(encoded), width)
    done = 0
    with torch.inference_mode():
        while done < group.most(len(encoded)):
            rows = mine[done : done + at_once]
            # As many passes at every process: one that has no more rows takes part with any.
            batch = collate(encoded, rows if len(rows) else np.array([0]), pad, device)
            labels = batch.pop("labels")
            try:
                values = answer(batch, labels).float().cpu()
            except torch.OutOfMemoryError:
                if group.sharded or len(rows) <= 1:
                    raise
                at_once = len(rows) // 2
                continue
            out[torch.from_numpy(rows), : values.shape[1]] = values[: len(rows)]
            done += at_once
    # Each row is one process's, and 0 at the others.
    together: npt.NDArray[np.float32] = group.sum(out).numpy()
    return together


def evaluate(
    model: "PreTrainedModel",
    kind: TaskKind,
    encoded: Encoded,
    pad: int,
    device: "torch.device",
    group: Group = ALONE,
    at_once: int = AT_ONCE,
) -> Evaluated:
    """Metrics of the model on a split."""
    return kind.score(outputs(model, kind, encoded, pad, device, group, at_once), encoded)
