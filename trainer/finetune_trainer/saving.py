"""When training state is saved, after the recipe's checkpoint policy, and what training waits for then: a copy in memory.

All processes come to the same answer, and all take part in a save; the leader has the files written and uploaded (checkpoint.py).
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finetune_api.recipe import CheckpointPolicy, WhenBusy
from finetune_trainer import snapshot
from finetune_trainer.checkpoint import Checkpoint, Checkpoints
from finetune_trainer.dist import Group
from finetune_trainer.sharding import Weights
from finetune_trainer.snapshot import Tensors, TrainState

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SaveModel = Callable[["PreTrainedModel", Path, Weights, frozenset[str]], None]
"""Writes a model with these weights into a folder; those named last do not train."""


class Saves:
    """Asked after each step. The leader's clock counts, and whether its upload is on its way."""

    def __init__(
        self,
        policy: CheckpointPolicy,
        checkpoints: Checkpoints,
        group: Group,
        save_model: SaveModel,
        done: Callable[[Checkpoint], None],
    ) -> None:
        self.policy, self.checkpoints, self.group, self.save_model, self.done = policy, checkpoints, group, save_model, done
        self._buffers = snapshot.Buffers()
        self._last = time.monotonic()

    @property
    def by_the_clock(self) -> bool:
        """Whether it is time, at this process; what counts is what the leader says."""
        every = self.policy.every_seconds
        return every is not None and self.group.leads and time.monotonic() - self._last >= every

    def due(self, step: int, *, evaluated: bool, by_the_clock: bool, must: bool) -> bool:
        """Whether this step is saved. `must`: its model is the best so far, or the last before the end of this process."""
        if must:
            return True
        if self.policy.every_steps is not None:
            wanted = step % self.policy.every_steps == 0
        elif self.policy.every_seconds is not None:
            wanted = by_the_clock
        else:
            wanted = evaluated
        if wanted and self.policy.when_busy is WhenBusy.SKIP and self.group.tell(self.checkpoints.busy):
            self.checkpoints.skip()
            return False
        return wanted

    def save(
        self, state: TrainState, model: "PreTrainedModel", optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> None:
        """To be called by all processes, between two steps."""
        self._last = time.monotonic()
        gather = partial(snapshot.gather, model, optimizer, self.group)
        if self.group.leads:
            self.checkpoints.save(state.step, partial(self._hold, gather, state, model, scaler), self.done)
        else:
            gather()

    def _hold(
        self, gather: Callable[[], Tensors], state: TrainState, model: "PreTrainedModel", scaler: torch.amp.GradScaler
    ) -> Callable[[Path], None]:
        progress = {**asdict(state), "scaler": scaler.state_dict()}
        tensors = self._buffers.hold(gather())
        return partial(snapshot.write, state=progress, tensors=tensors, save_model=partial(self.save_model, model))
