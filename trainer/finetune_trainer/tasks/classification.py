"""SequenceClassification: one label for a text, or (multiLabel) any number of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_trainer import metrics
from finetune_trainer.tasks.base import BadRowError, Evaluated, Floats, Predicting, Row, log_sum_exp, sigmoid, softmax
from finetune_trainer.tasks.encoded import Encoded

if TYPE_CHECKING:
    import torch


class SingleLabel(Predicting):
    """Cross entropy over the labels."""

    auto_class = "AutoModelForSequenceClassification"
    problem_type = "single_label_classification"

    def target(self, row: Row) -> int:
        label = str(row[self.dataset.label_column])
        if label not in self.ids:
            raise BadRowError(f"its {self.dataset.label_column} is not one of dataset.labels ({', '.join(self.labels)})")
        return self.ids[label]

    def collect(self, targets: Sequence[Any]) -> Any:
        return np.array(targets, dtype=np.int64)

    def counts(self, labels: Any) -> dict[str, int]:
        return dict(zip(self.labels, np.bincount(labels, minlength=len(self.labels)).tolist(), strict=True))

    def strata(self, labels: Any) -> Any:
        return labels

    def loss(self, logits: "torch.Tensor", labels: "torch.Tensor", smoothing: float) -> "torch.Tensor":
        from torch.nn.functional import cross_entropy

        return cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing)

    def width(self, data: Encoded) -> int:  # noqa: ARG002
        return len(self.labels)

    def score(self, outputs: Floats, data: Encoded) -> Evaluated:
        loss = float(np.mean(log_sum_exp(outputs) - outputs[np.arange(len(outputs)), data.labels]))
        matrix = metrics.confusion(data.labels, outputs.argmax(axis=1), outputs.shape[1])
        truth = np.eye(outputs.shape[1], dtype=bool)[data.labels]
        values = metrics.summary(matrix) | {"auroc": metrics.macro_auroc(truth, softmax(outputs)), "loss": loss}
        return Evaluated(values, metrics.per_class(matrix, self.labels))

    def answer(self, outputs: Floats, data: Encoded, texts: Sequence[Any]) -> list[dict[str, Any]]:  # noqa: ARG002
        return [
            {"label": self.labels[int(row.argmax())], "probabilities": dict(zip(self.labels, row.tolist(), strict=True))}
            for row in softmax(outputs)
        ]


class MultiLabelled(Predicting):
    """Binary cross entropy for each label, their mean for each row."""

    auto_class = "AutoModelForSequenceClassification"
    problem_type = "multi_label_classification"

    @property
    def threshold(self) -> float:
        assert self.dataset.multi_label is not None
        return self.dataset.multi_label.threshold

    def target(self, row: Row) -> list[float]:
        assert self.dataset.multi_label is not None
        column, value = self.dataset.label_column, row[self.dataset.label_column]
        given = value if isinstance(value, list) else str(value or "").split(self.dataset.multi_label.separator)
        labels = [label for item in given if (label := str(item).strip())]
        if any(label not in self.ids for label in labels):
            raise BadRowError(f"its {column} has a label that is not one of dataset.labels ({', '.join(self.labels)})")
        return [float(label in labels) for label in self.labels]

    def collect(self, targets: Sequence[Any]) -> Any:
        return np.array(targets, dtype=np.float32).reshape(len(targets), len(self.labels))

    def counts(self, labels: Any) -> dict[str, int]:
        return dict(zip(self.labels, labels.sum(axis=0).astype(int).tolist(), strict=True))

    def loss(self, logits: "torch.Tensor", labels: "torch.Tensor", smoothing: float) -> "torch.Tensor":
        from torch.nn.functional import binary_cross_entropy_with_logits

        targets = labels * (1 - smoothing) + smoothing / 2
        return binary_cross_entropy_with_logits(logits.float(), targets, reduction="sum") / len(self.labels)

    def width(self, data: Encoded) -> int:  # noqa: ARG002
        return len(self.labels)

    def score(self, outputs: Floats, data: Encoded) -> Evaluated:
        truth = data.labels > 0.5
        loss = float(np.mean(np.logaddexp(0, outputs) - outputs * truth))
        predicted = sigmoid(outputs) >= self.threshold
        rows = metrics.per_label(truth, predicted, self.labels)
        values = metrics.averages(rows)
        values["accuracy"] = float((truth == predicted).all(axis=1).mean())
        values |= {"auroc": metrics.macro_auroc(truth, outputs), "loss": loss}
        return Evaluated(values, rows)

    def answer(self, outputs: Floats, data: Encoded, texts: Sequence[Any]) -> list[dict[str, Any]]:  # noqa: ARG002
        return [
            {
                "labels": [label for label, p in zip(self.labels, row, strict=True) if p >= self.threshold],
                "probabilities": dict(zip(self.labels, row.tolist(), strict=True)),
            }
            for row in sigmoid(outputs)
        ]
