"""Metrics, with numpy alone; tests compare with scikit-learn, scipy and seqeval."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Booleans = npt.NDArray[np.bool_]


# --------------------------------------------------------------------------------------------------- classification ----
def confusion(labels: npt.NDArray[np.int64], predictions: npt.NDArray[np.int64], classes: int) -> Matrix:
    """Counts, shape (classes, classes): row = true label, column = predicted label."""
    return np.bincount(labels * classes + predictions, minlength=classes * classes).reshape(classes, classes)


def per_class(matrix: Matrix, names: Sequence[str]) -> list[dict[str, Any]]:
    """One row per label: precision, recall, f1 (0 where undefined) and support."""
    return _rows(names, np.diag(matrix), matrix.sum(axis=0), matrix.sum(axis=1))


def per_label(truth: Booleans, predicted: Booleans, names: Sequence[str]) -> list[dict[str, Any]]:
    """The same for several labels a row: arrays of shape (rows, labels)."""
    return _rows(names, (truth & predicted).sum(axis=0), predicted.sum(axis=0), truth.sum(axis=0))


def _rows(names: Sequence[str], hits: Any, predicted: Any, support: Any) -> list[dict[str, Any]]:
    hits = np.asarray(hits, dtype=float)
    precision = np.divide(hits, predicted, out=np.zeros_like(hits), where=predicted > 0)
    recall = np.divide(hits, support, out=np.zeros_like(hits), where=support > 0)
    total = precision + recall
    f1 = np.divide(2 * precision * recall, total, out=np.zeros_like(hits), where=total > 0)
    return [
        {"label": n, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
        for n, p, r, f, s in zip(names, precision, recall, f1, support, strict=True)
    ]


def averages(rows: list[dict[str, Any]]) -> dict[str, float]:
    """macro_f1, weighted_f1 and macro_recall. Labels without a row in the data are left out of the averages."""
    present = [row for row in rows if row["support"]]
    if not present:
        return dict.fromkeys(("macro_f1", "weighted_f1", "macro_recall"), 0.0)
    support = [row["support"] for row in present]
    return {
        "macro_f1": float(np.mean([row["f1"] for row in present])),
        "weighted_f1": float(np.average([row["f1"] for row in present], weights=support)),
        "macro_recall": float(np.mean([row["recall"] for row in present])),
    }


def summary(matrix: Matrix) -> dict[str, float]:
    """accuracy, the averages, and mcc: Matthews' correlation (Gorodkin, 2004), 0 where one side has a single label."""
    count, right = float(matrix.sum()), float(np.trace(matrix))
    truth, predicted = matrix.sum(axis=1).astype(float), matrix.sum(axis=0).astype(float)
    spread = (count**2 - (truth**2).sum()) * (count**2 - (predicted**2).sum())
    mcc = (right * count - (truth * predicted).sum()) / math.sqrt(spread) if spread > 0 else 0.0
    names = [str(i) for i in range(len(matrix))]
    return {"accuracy": right / max(1.0, count), **averages(per_class(matrix, names)), "mcc": float(mcc)}


def macro_auroc(truth: Booleans, scores: Floats) -> float:
    """Mean area under the ROC curve, each label against the rest; truth and scores (rows, labels). NaN where no label has both sides."""
    areas = []
    for label in range(truth.shape[1]):
        positive = truth[:, label]
        p, n = int(positive.sum()), int((~positive).sum())
        if p and n:
            # Mann and Whitney: ranks of the positives, ties counting half.
            areas.append((ranks(scores[:, label])[positive].sum() - p * (p + 1) / 2) / (p * n))
    return float(np.mean(areas)) if areas else float("nan")


# ------------------------------------------------------------------------------------------------------- regression ----
def ranks(values: Floats) -> Floats:
    """From 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    result: Floats = (last - (counts - 1) / 2)[inverse]
    return result


def pearson(a: Floats, b: Floats) -> float:
    """Correlation; NaN where one side does not vary."""
    a, b = a - a.mean(), b - b.mean()
    spread = math.sqrt(float((a**2).sum()) * float((b**2).sum()))
    return float((a * b).sum() / spread) if spread > 0 else float("nan")


# ------------------------------------------------------------------------------------------------------------ spans ----
Span = tuple[str, int, int]


def spans_of(tags: Sequence[str]) -> list[Span]:
    """(type, first, last) of a sentence's spans, as the CoNLL evaluation reads IOB and IOBES tags: B and S begin one, so does a
    change of type; E and S end one. A tag without such a prefix (NOUN) is a span of one word; O is none."""
    found: list[Span] = []
    begun: tuple[str, int] | None = None
    before = "O"
    for i, tag in enumerate([*tags, "O"]):
        prefix, kind = _parted(tag)
        goes_on = begun is not None and kind == begun[0] and prefix in "IE" and before in "BI"
        if begun is not None and not goes_on:
            found.append((begun[0], begun[1], i - 1))
            begun = None
        if begun is None and prefix != "O":
            begun = (kind, i)
        before = prefix
    return found


def _parted(tag: str) -> tuple[str, str]:
    prefix, dash, kind = tag.partition("-")
    if dash and prefix in ("B", "I", "E", "S"):
        return prefix, kind
    return ("O", "") if tag == "O" else ("S", tag)


def spans(truth: Iterable[Sequence[str]], predicted: Iterable[Sequence[str]]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """precision, recall and f1 over all spans, which are right where type and both ends are; and one row per type."""
    hits, guessed, there = Counter[str](), Counter[str](), Counter[str]()
    for t, p in zip(truth, predicted, strict=True):
        true_spans, predicted_spans = set(spans_of(t)), set(spans_of(p))
        there.update(s[0] for s in true_spans)
        guessed.update(s[0] for s in predicted_spans)
        hits.update(s[0] for s in true_spans & predicted_spans)
    names = sorted(there | guessed)
    counts = [np.array([c[n] for n in names], dtype=float) for c in (hits, guessed, there)]
    overall = _rows(["all"], *(np.array([c.sum()]) for c in counts))[0]
    return {name: overall[name] for name in ("f1", "precision", "recall")}, _rows(names, *counts)
