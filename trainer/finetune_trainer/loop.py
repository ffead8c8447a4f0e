"""The training loop. Read top to bottom: `train` is the whole story, `TrainState` is all that changes and all that is saved.

A run that is cut off anywhere and goes on from a checkpoint does the same arithmetic as one that was never cut off: batches are a
pure function of (seed, epoch), the learning rate is one of the step, and dropout's random state is part of the checkpoint.

Several processes (dist.py) share each global batch out; every process takes the same step with the same gradient. Who else has a part:
gradient.py (forward, backward), memory.py (how much at once), sharding.py (a model that is cut up), selection.py (what an evaluation means).
"""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune_api import Recipe
from finetune_api.hyperparameters import Precision
from finetune_trainer import layers, optim, selection, sharding, snapshot, vocabulary
from finetune_trainer.checkpoint import Checkpoint, Checkpoints
from finetune_trainer.data import plan
from finetune_trainer.dist import ALONE, Group
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.evaluation import AT_ONCE, Dropped, due, evaluate
from finetune_trainer.gradient import DTYPES, Gradient, later, resolve
from finetune_trainer.memory import Fit
from finetune_trainer.saving import SaveModel, Saves
from finetune_trainer.snapshot import TrainState
from finetune_trainer.tasks import Encoded, Evaluated, TaskKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Loop:
    """One training. `on_step(loss, rate)`, `on_evaluation(scores)` and `on_commit(checkpoint)` tell what happens."""

    recipe: Recipe
    model: "PreTrainedModel"
    kind: TaskKind
    train_data: Encoded
    validation_data: Encoded
    pad: int
    checkpoints: Checkpoints
    save_model: SaveModel
    stopping: threading.Event
    on_step: Callable[[float, float], None]
    on_evaluation: Callable[[Evaluated], None]
    on_commit: Callable[[Checkpoint], None]
    base: str = ""
    group: Group = ALONE
    state: TrainState = field(default_factory=TrainState)
    resumed: Path | None = None

    def __post_init__(self) -> None:
        self.hyper, self.device = self.recipe.hyperparameters, self.group.device()
        self.state.data, self.state.base = self.train_data.digest, self.base
        if self.resumed is not None:
            self.state = snapshot.progress(self.resumed, self.state)
            self.checkpoints.best = self.state.best_checkpoint
        snapshot.agree_on_threads(self.state, self.device)
        precision = Precision(self.state.precision or resolve(self.recipe.precision, self.device))
        self.state.precision = precision.value
        layers.check(self.model, self.hyper)
        sharding.place(self.model, self.group, DTYPES.get(precision))
        self.rate = optim.learning_rate(self.recipe, vocabulary.size(self.model))
        self.optimizer = optim.build(self.model, self.hyper, self.rate)
        self.steps_per_epoch = math.ceil(len(self.train_data) / self.hyper.batch_size)
        planned = self.steps_per_epoch * self.hyper.epochs
        self.total_steps = min(planned, self.hyper.max_steps or planned)
        self._advice = f"lower hyperparameters.learningRate (it is {self.rate:g}) or maxGradNorm, or look for broken rows"
        # The last step's loss, how many processes were asked to end, and whether the leader's clock asks for a save.
        self._told: Callable[[], list[float]] | None = None
        self._ending = self._save_asked = False
        self.saves = Saves(self.recipe.checkpoint, self.checkpoints, self.group, self.save_model, self.on_commit)
        self.fit = Fit(self.hyper, self.state, self.checkpoints, self.group)
        self.gradient = Gradient(self.model, self.hyper, precision, self.kind, self.train_data, self.pad, self.group)
        if self.resumed is not None:
            snapshot.restore(self.resumed, self.model, self.optimizer, self.gradient.scaler)
        layers.set_trainable(self.model, self.hyper, self.state.epoch)
        self.gradient.wrap()
        if self.resumed is not None:
            snapshot.restore_random(self.resumed, self.device, self.group)

    # ------------------------------------------------------------------------------------------------------- train -----
    def train(self) -> None:
        """Until the epochs are done or early stopping says so. Raises TrainingFailure(Interrupted) after a save on SIGTERM."""
        if self.resumed is not None and any(due(self.recipe, self.state, self.total_steps)):  # the one before had no time for it
            self._maybe_evaluate_and_save()
        while not self.finished:
            if layers.set_trainable(self.model, self.hyper, self.state.epoch):
                self.gradient.wrap()
            batches = plan(self.hyper.seed, self.state.epoch, self.hyper.batch_size, self.train_data.lengths)
            self._epoch(batches[self.state.batch :])
        self._read_loss()
        self.checkpoints.wait()

    @property
    def finished(self) -> bool:
        patience = self.hyper.early_stopping
        stopped_early = patience is not None and self.state.bad_evaluations >= patience.patience
        return stopped_early or self.state.step >= self.total_steps

    def _epoch(self, batches: list[Any]) -> None:
        for rows, following in zip(batches, [*batches[1:], None], strict=True):
            self.model.train()
            rate = self.rate * optim.factor(self.hyper.schedule, self.state.step, self.total_steps, self.state.plateaus)
            optim.set_rate(self.optimizer, rate)
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.fit(self.gradient, rows, following)
            scaler = self.gradient.scaler
            scaler.unscale_(self.optimizer)
            norm = optim.clip(self.model, self.hyper.max_grad_norm)
            scaler.step(self.optimizer)
            scaler.update()
            self._read_loss()  # of the step before: waiting for this one would stall an accelerator
            # A gradient that is not finite spoils the weights of this very step, whose loss was fine; a scaler leaves such a step out.
            flags = [torch.full_like(loss, asked) for asked in (self.stopping.is_set(), self.saves.by_the_clock)]
            told = self.group.sum(torch.stack([loss, *flags]))
            if not scaler.is_enabled():
                told[0] = torch.where(torch.isfinite(norm), told[0], norm)
            self._told = later(told)
            self._advance(len(rows))
            self.on_step(self._shown_loss, rate)
            self._maybe_evaluate_and_save()
            if self.finished:
                return

    def _advance(self, rows: int) -> None:
        state = self.state
        state.step += 1
        state.examples += rows
        state.batch += 1
        if state.batch == self.steps_per_epoch:
            state.epoch, state.batch = state.epoch + 1, 0

    _shown_loss = float("nan")

    def _read_loss(self) -> None:
        if self._told is None:
            return
        (value, asked, clock), self._told = self._told(), None
        self._ending, self._save_asked = self._ending or asked > 0, clock > 0
        if not math.isfinite(value):
            raise TrainingFailure("NonFiniteLoss", f"the loss became {value} near step {self.state.step}: {self._advice}")
        self._shown_loss = value

    # -------------------------------------------------------------------------------------------- evaluate and save ----
    def _maybe_evaluate_and_save(self) -> None:
        wanted, decides = due(self.recipe, self.state, self.total_steps)
        improved = wanted and self._evaluate(decides=decides)
        if self.group.size == 1:
            self._ending = self.stopping.is_set()  # else all processes must have heard the same
        must = improved or self._ending
        if self.saves.due(self.state.step, evaluated=decides, by_the_clock=self._save_asked, must=must):
            self._save()
        if self._ending:
            with self.group.leader_first():  # it is the one that saves
                self.checkpoints.wait()
            raise TrainingFailure("Interrupted", f"asked to end; step {self.state.step} is saved")

    def _asked(self) -> bool:
        """Whether any process was asked to end: all must call it, and hear the same."""
        self._ending = self._ending or self.group.sum(torch.tensor(float(self.stopping.is_set()))).item() > 0
        return self._ending

    def _save(self) -> None:
        self._read_loss()  # nothing is saved before its loss is known to be finite
        self._save_asked = False  # the clock was looked at before this save
        self.saves.save(self.state, self.model, self.optimizer, self.gradient.scaler)

    def scores(self, model: "PreTrainedModel", data: Encoded, ending: Callable[[], bool] = lambda: False) -> Evaluated:
        """Of a model that has its place; to be called by all processes. Raises Dropped."""
        # A pass of one that holds a part of the model needs the others: none may go on with fewer rows than they.
        at_once = min(AT_ONCE, self.fit.at_once) if self.group.sharded else AT_ONCE
        try:
            return evaluate(model, self.kind, data, self.pad, self.device, self.group, at_once, ending)
        except torch.OutOfMemoryError as error:
            raise self.fit.failure(at_once if self.group.sharded else 1) from error

    def _evaluate(self, *, decides: bool) -> bool:
        """Scores the model on the validation data; whether it `decides` and is the best so far."""
        self._read_loss()
        try:
            scores = self.scores(self.model, self.validation_data, self._asked)
        except Dropped:  # the time that there is, is for the save
            return False
        if not math.isfinite(scores.values["loss"]):
            raise TrainingFailure("NonFiniteLoss", f"the validation loss became {scores.values['loss']}: {self._advice}")
        improved = selection.judge(self.state, self.recipe, scores) if decides else selection.note(self.state, scores)
        if improved:
            self.state.best_checkpoint = self.checkpoints.best = self.checkpoints.name(self.state.step)
        self.on_evaluation(scores)
        return improved
