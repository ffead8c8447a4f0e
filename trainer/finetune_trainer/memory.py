"""How many examples a process computes at once: what the recipe says, and less where the accelerator's memory does not hold them.

One process does a step that did not fit again, with half as many. Of several the others wait for the one that failed, in the middle of
a step: all end, and the next attempt begins with half as many. Either way the gradient stays that of the whole batch.
"""

from typing import Any

import torch

from finetune_api.hyperparameters import Hyperparameters
from finetune_trainer import snapshot
from finetune_trainer.checkpoint import Checkpoints
from finetune_trainer.dist import Group
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.gradient import Gradient
from finetune_trainer.snapshot import TrainState

NOTHING_SMALLER = (
    "the accelerator's memory does not hold a single example at a time: lower dataset.maxLength, freeze layers, set "
    "hyperparameters.gradientCheckpointing or model.lora, or share the model among GPUs with hyperparameters.strategy FSDP"
)


class Fit:
    """Gradients that fit the memory; `state.micro_batch` is what was found to."""

    def __init__(self, hyperparameters: Hyperparameters, state: TrainState, checkpoints: Checkpoints, group: Group) -> None:
        self.hyper, self.state, self.checkpoints, self.group = hyperparameters, state, checkpoints, group
        found = group.tell(checkpoints.micro_batch() if group.leads else None)
        state.micro_batch = min((n for n in (state.micro_batch, found) if n is not None), default=None)

    @property
    def at_once(self) -> int:
        """Examples of this process in one forward and backward pass, at most."""
        limits = (self.group.most(self.hyper.batch_size), self.hyper.micro_batch_size, self.state.micro_batch)
        return min(n for n in limits if n is not None)

    def __call__(self, gradient: Gradient, rows: Any, following: Any = None) -> torch.Tensor:
        """What `gradient` gives for the global batch `rows`, computed in passes that fit. Raises TrainingFailure(CudaOutOfMemory)."""
        while True:
            before = snapshot.own_random(gradient.device)
            try:
                return gradient(rows, self.at_once, following)
            except torch.OutOfMemoryError as error:
                share = self.group.most(len(rows))
                passes = -(-share // self.at_once)
                tried = -(-share // passes)
                if self.group.size > 1 or tried == 1:
                    raise self.failure(tried) from error
            # Only now: as long as the exception lives, so does all that the failed pass held.
            gradient.model.zero_grad(set_to_none=True)
            snapshot.set_own_random(before, gradient.device)
            self.state.micro_batch = tried // 2
            self.checkpoints.log(
                f"out of memory with {tried} examples at once: step {self.state.step + 1} is done again in micro-batches of {tried // 2}"
            )

    def failure(self, tried: int) -> TrainingFailure:
        """Out of memory with so many examples at once, and no way to go on: leaves word for the next attempt, if it may try fewer."""
        if tried == 1:
            return TrainingFailure("CudaOutOfMemory", NOTHING_SMALLER)
        self.checkpoints.tell_micro_batch(tried // 2)
        return TrainingFailure(
            "CudaOutOfMemory",
            f"process {self.group.rank} was out of memory with {tried} examples at once: the next attempt computes {tried // 2}",
        )
