"""Metrics of a classification, from a confusion matrix. numpy alone; a test compares with scikit-learn."""

from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.int64]


def confusion(labels: npt.NDArray[np.int64], predictions: npt.NDArray[np.int64], classes: int) -> Matrix:
    """Counts, shape (classes, classes): row = true label, column = predicted label."""
    return np.bincount(labels * classes + predictions, minlength=classes * classes).reshape(classes, classes)


def per_class(matrix: Matrix, names: list[str]) -> list[dict[str, Any]]:
    """One row per label: precision, recall, f1 (0 where undefined) and support."""
    hits = np.diag(matrix).astype(float)
    predicted, support = matrix.sum(axis=0), matrix.sum(axis=1)
    precision = np.divide(hits, predicted, out=np.zeros_like(hits), where=predicted > 0)
    recall = np.divide(hits, support, out=np.zeros_like(hits), where=support > 0)
    total = precision + recall
    f1 = np.divide(2 * precision * recall, total, out=np.zeros_like(hits), where=total > 0)
    return [
        {"label": n, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
        for n, p, r, f, s in zip(names, precision, recall, f1, support, strict=True)
    ]


def summary(matrix: Matrix, loss: float) -> dict[str, float]:
    """accuracy, macro_f1, macro_recall and loss. Labels without a row in the data are left out of the macro averages."""
    rows = [r for r in per_class(matrix, [str(i) for i in range(len(matrix))]) if r["support"]]
    return {
        "accuracy": float(np.trace(matrix) / max(1, matrix.sum())),
        "macro_f1": float(np.mean([r["f1"] for r in rows])),
        "macro_recall": float(np.mean([r["recall"] for r in rows])),
        "loss": loss,
    }
