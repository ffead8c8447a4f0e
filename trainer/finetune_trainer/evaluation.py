"""Runs a model over data: evaluation while training, and prediction afterwards, through the same code."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from finetune_api import Recipe
from finetune_trainer.data import collate
from finetune_trainer.dist import ALONE, Group
from finetune_trainer.tasks import Encoded, Evaluated, TaskKind
from finetune_trainer.tasks.base import Floats

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from finetune_trainer.snapshot import TrainState

AT_ONCE = 64
"""Rows."""


class Dropped(Exception):  # noqa: N818
    """An evaluation is not finished, as the training is asked to end: who goes on does it again from its beginning."""


def due(recipe: Recipe, state: "TrainState", steps: int) -> tuple[bool, bool]:
    """Whether the model of this step, of `steps` in all, is still to be evaluated, and whether that decides something.

    A step that was saved by a process with no time left for its evaluation tells so by itself: the evaluation is not there.
    """
    from finetune_trainer import selection

    policy = recipe.evaluation
    if state.evaluations and state.evaluations[-1]["step"] == state.step:
        return False, False
    if policy.every_steps is not None:
        decides = state.step % policy.every_steps == 0
    else:
        decides = state.batch == 0 and state.epoch % (policy.every_epochs or 1) == 0
    decides = decides or state.step >= steps
    return decides or selection.at_a_rung(state, recipe), decides


def outputs(
    model: "PreTrainedModel",
    kind: TaskKind,
    encoded: Encoded,
    pad: int,
    device: "torch.device",
    group: Group = ALONE,
    at_once: int = AT_ONCE,
    ending: Callable[[], bool] = lambda: False,
) -> Floats:
    """What the task keeps of each row's answer, (rows, width), in row order. Leaves the model in eval mode. Raises Dropped."""
    from finetune_trainer import sharding

    def answer(batch: "dict[str, torch.Tensor]", labels: "torch.Tensor") -> "torch.Tensor":
        return kind.outputs(model(**batch, **kind.options).logits, labels)

    model.eval()
    try:
        return by_row(answer, kind.width(encoded), encoded, pad, device, group, at_once, ending).astype(np.float64)
    finally:
        sharding.close(model, group)


def by_row(
    answer: "Callable[[dict[str, torch.Tensor], torch.Tensor], torch.Tensor]",
    width: int,
    encoded: Encoded,
    pad: int,
    device: "torch.device",
    group: Group = ALONE,
    at_once: int = AT_ONCE,
    ending: Callable[[], bool] = lambda: False,
) -> npt.NDArray[np.float32]:
    """answer(batch, labels) of all rows, (rows, width), in row order; batches are formed by length and shared out.

    Out of memory, it goes on with half as many rows at once; not where other processes wait for this very pass (torch.OutOfMemoryError).
    Raises Dropped where it is `ending`, which is asked now and then and must say the same at all processes.
    """
    import torch

    if not len(encoded):
        raise ValueError("there is nothing to evaluate")
    mine = group.share(np.argsort(encoded.lengths, kind="stable"))
    out = torch.zeros(len(encoded), width)
    done, most = 0, group.most(len(encoded))
    # A model that is cut up makes its buffers in its first pass, of a run that goes on one like this; training writes to them later.
    with torch.no_grad() if group.sharded else torch.inference_mode():
        for block in range(0, most, AT_ONCE):
            if ending():  # as often at every process, whatever each has memory for
                raise Dropped
            while done < min(block + AT_ONCE, most):
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
    ending: Callable[[], bool] = lambda: False,
) -> Evaluated:
    """Metrics of the model on a split. Raises Dropped."""
    return kind.score(outputs(model, kind, encoded, pad, device, group, at_once, ending), encoded)
