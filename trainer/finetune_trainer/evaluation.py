"""Runs a classifier over data: evaluation while training, and prediction afterwards, through the same code."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from finetune_api.finetunejob import MetricValue
from finetune_trainer import metrics
from finetune_trainer.data import Encoded, collate
from finetune_trainer.dist import ALONE, Group

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BATCH_SIZE = 64


@dataclass(frozen=True)
class Evaluated:
    """Scores of one split."""

    values: dict[str, float]
    matrix: metrics.Matrix

    def named(self, split: str) -> list[MetricValue]:
        """As the API has it: validation/macro_f1 and so on, six significant digits."""
        return [MetricValue(name=f"{split}/{name}", value=f"{value:.6g}") for name, value in self.values.items()]

    def per_class(self, labels: list[str]) -> list[dict[str, Any]]:
        return metrics.per_class(self.matrix, labels)


def logits(
    model: "PreTrainedModel", encoded: Encoded, pad: int, device: "torch.device", group: Group = ALONE
) -> npt.NDArray[np.float32]:
    """Logits, shape (rows, labels), in row order; batches are formed by length and shared out. Leaves the model in eval mode."""
    import torch

    model.eval()
    if not len(encoded):
        raise ValueError("there is nothing to evaluate")
    mine = group.share(np.argsort(encoded.lengths, kind="stable"))
    out = torch.zeros(len(encoded), model.config.num_labels)
    with torch.inference_mode():
        for start in range(0, len(mine), BATCH_SIZE):
            rows = mine[start : start + BATCH_SIZE]
            batch = collate(encoded, rows, pad, device)
            values = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            out[torch.from_numpy(rows)] = values.float().cpu()
    scores: npt.NDArray[np.float32] = group.sum(out).numpy()  # each row is one process's, and 0 at the others
    return scores


def evaluate(model: "PreTrainedModel", encoded: Encoded, pad: int, device: "torch.device", group: Group = ALONE) -> Evaluated:
    """Metrics of the model on a split, with the mean cross entropy as loss."""
    scores = logits(model, encoded, pad, device, group).astype(np.float64)
    top = scores.max(axis=1, keepdims=True)
    log_sum = top[:, 0] + np.log(np.exp(scores - top).sum(axis=1))
    loss = float(np.mean(log_sum - scores[np.arange(len(scores)), encoded.labels]))
    matrix = metrics.confusion(encoded.labels, scores.argmax(axis=1), scores.shape[1])
    return Evaluated(metrics.summary(matrix, loss), matrix)
