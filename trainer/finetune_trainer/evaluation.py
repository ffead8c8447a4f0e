"""Runs a classifier over data: evaluation while training, and prediction afterwards, through the same code."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from finetune_api.finetunejob import MetricValue
from finetune_trainer import metrics
from finetune_trainer.data import Encoded, collate

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


def logits(model: "PreTrainedModel", encoded: Encoded, pad: int, device: "torch.device") -> npt.NDArray[np.float32]:
    """Logits, shape (rows, labels), in row order; batches are formed by length. Leaves the model in eval mode."""
    import torch

    model.eval()
    order = np.argsort(encoded.lengths, kind="stable")
    out: npt.NDArray[np.float32] | None = None
    with torch.inference_mode():
        for start in range(0, len(order), BATCH_SIZE):
            rows = order[start : start + BATCH_SIZE]
            batch = collate(encoded, rows, pad, device)
            values = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float().cpu().numpy()
            if out is None:
                out = np.zeros((len(order), values.shape[1]), dtype=np.float32)
            out[rows] = values
    if out is None:
        raise ValueError("there is nothing to evaluate")
    return out


def evaluate(model: "PreTrainedModel", encoded: Encoded, pad: int, device: "torch.device") -> Evaluated:
    """Metrics of the model on a split, with the mean cross entropy as loss."""
    scores = logits(model, encoded, pad, device).astype(np.float64)
    top = scores.max(axis=1, keepdims=True)
    log_sum = top[:, 0] + np.log(np.exp(scores - top).sum(axis=1))
    loss = float(np.mean(log_sum - scores[np.arange(len(scores)), encoded.labels]))
    matrix = metrics.confusion(encoded.labels, scores.argmax(axis=1), scores.shape[1])
    return Evaluated(metrics.summary(matrix, loss), matrix)
