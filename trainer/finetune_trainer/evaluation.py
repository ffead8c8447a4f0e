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

BATCH_SIZE = 64


def outputs(
    model: "PreTrainedModel", kind: TaskKind, encoded: Encoded, pad: int, device: "torch.device", group: Group = ALONE
) -> Floats:
    """What the task keeps of each row's answer, (rows, width), in row order. Leaves the model in eval mode."""

    def answer(batch: "dict[str, torch.Tensor]", labels: "torch.Tensor") -> "torch.Tensor":
        return kind.outputs(model(**batch, **kind.options).logits, labels)

    model.eval()
    return by_row(answer, kind.width(encoded), encoded, pad, device, group).astype(np.float64)


def by_row(
    answer: "Callable[[dict[str, torch.Tensor], torch.Tensor], torch.Tensor]",
    width: int,
    encoded: Encoded,
    pad: int,
    device: "torch.device",
    group: Group = ALONE,
) -> npt.NDArray[np.float32]:
    """answer(batch, labels) of all rows, (rows, width), in row order; batches are formed by length and shared out."""
    import torch

    if not len(encoded):
        raise ValueError("there is nothing to evaluate")
    mine = group.share(np.argsort(encoded.lengths, kind="stable"))
    out = torch.zeros(len(encoded), width)
    with torch.inference_mode():
        for start in range(0, len(mine), BATCH_SIZE):
            rows = mine[start : start + BATCH_SIZE]
            batch = collate(encoded, rows, pad, device)
            labels = batch.pop("labels")
            values = answer(batch, labels).float().cpu()
            out[torch.from_numpy(rows), : values.shape[1]] = values
    # Each row is one process's, and 0 at the others.
    together: npt.NDArray[np.float32] = group.sum(out).numpy()
    return together


def evaluate(
    model: "PreTrainedModel", kind: TaskKind, encoded: Encoded, pad: int, device: "torch.device", group: Group = ALONE
) -> Evaluated:
    """Metrics of the model on a split."""
    return kind.score(outputs(model, kind, encoded, pad, device, group), encoded)
