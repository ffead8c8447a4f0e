"""Regression: one number for a text, or for two."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_trainer import metrics
from finetune_trainer.tasks.base import BadRowError, Evaluated, Floats, Predicting, Row
from finetune_trainer.tasks.encoded import Encoded

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


class Regression(Predicting):
    """Squared error."""

    auto_class = "AutoModelForSequenceClassification"
    problem_type = "regression"

    def target(self, row: Row) -> float:
        column, value = self.dataset.label_column, row[self.dataset.label_column]
        try:
            number = float("nan") if isinstance(value, bool) else float(value)
        except (TypeError, ValueError) as error:
            raise BadRowError(f"its {column} is no number") from error
        if not math.isfinite(number):
            raise BadRowError(f"its {column} is no finite number")
        return number

    def collect(self, targets: Sequence[Any]) -> Any:
        return np.array(targets, dtype=np.float32)

    def configure(self, config: "PretrainedConfig") -> None:
        super().configure(config)
        config.num_labels = 1

    def keeps_head(self, config: "PretrainedConfig") -> bool:
        return bool(config.num_labels == 1)

    def loss(self, logits: "torch.Tensor", labels: "torch.Tensor", smoothing: float) -> "torch.Tensor":  # noqa: ARG002
        return (logits.float()[:, 0] - labels).square().sum()

    def width(self, data: Encoded) -> int:  # noqa: ARG002
        return 1

    def score(self, outputs: Floats, data: Encoded) -> Evaluated:
        predicted, truth = outputs[:, 0], data.labels.astype(np.float64)
        mse = float(np.mean((predicted - truth) ** 2))
        values = {
            "mse": mse,
            "spearman": metrics.pearson(metrics.ranks(predicted), metrics.ranks(truth)),
            "pearson": metrics.pearson(predicted, truth),
            "loss": mse,
        }
        return Evaluated(values)

    def answer(self, outputs: Floats, data: Encoded, texts: Sequence[Any]) -> list[dict[str, Any]]:  # noqa: ARG002
        return [{"value": float(row[0])} for row in outputs]
