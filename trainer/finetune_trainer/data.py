"""Plans the batches of an epoch and makes them. Pure: reading is done by tables.py and splits.py, tokenising by the tasks."""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from finetune_trainer.tasks import IGNORED, Encoded, Ragged

if TYPE_CHECKING:
    import torch

BUCKET_BATCHES = 50
"""Batches whose rows are sorted by length together: little padding, and still a random mix."""


def plan(seed: int, epoch: int, batch_size: int, lengths: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """The global batches of one epoch: row numbers, every row once. A pure function of its arguments.

    Rows are shuffled, sorted by length within windows of BUCKET_BATCHES batches, cut into batches, and the batches shuffled.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    order = rng.permutation(len(lengths))
    window = BUCKET_BATCHES * batch_size
    batches: list[npt.NDArray[np.int64]] = []
    for start in range(0, len(order), window):
        rows = order[start : start + window]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches.extend(rows[i : i + batch_size] for i in range(0, len(rows), batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]


def collate(encoded: Encoded, rows: npt.NDArray[np.int64], pad: int, device: "torch.device") -> "dict[str, torch.Tensor]":
    """Tensors of one batch: input_ids, attention_mask and, of pairs, token_type_ids (rows, longest); or features (rows, width); and
    labels (rows, ...)."""
    import torch

    arrays: dict[str, npt.NDArray[Any]] = {}
    if encoded.features is not None:
        arrays["features"] = encoded.features[rows]
    else:
        arrays["input_ids"] = encoded.ids.padded(rows, pad)
        attended = np.arange(arrays["input_ids"].shape[1]) < encoded.ids.lengths[rows][:, None]
        arrays["attention_mask"] = attended.astype(np.int64)
        if encoded.types is not None:
            arrays["token_type_ids"] = encoded.types.padded(rows, 0)
    by_token = isinstance(encoded.labels, Ragged)
    arrays["labels"] = encoded.labels.padded(rows, IGNORED) if by_token else encoded.labels[rows]
    return {name: torch.from_numpy(a).to(device, non_blocking=True) for name, a in arrays.items()}
