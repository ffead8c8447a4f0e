"""The training loop. Read top to bottom: `train` is the whole story, `TrainState` is all that changes and all that is saved.

A run that is cut off anywhere and goes on from a checkpoint does the same arithmetic as one that was never cut off: batches are a
pure function of (seed, epoch), the learning rate is one of the step, and dropout's random state is part of the checkpoint.

Several processes (dist.py) share each global batch out; every process takes the same step with the same gradient.
"""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune_api import Recipe
from finetune_api.recipe import Precision, ScheduleType
from finetune_trainer import layers, optim, snapshot, vocabulary
from finetune_trainer.checkpoint import Checkpoint, Checkpoints
from finetune_trainer.data import plan
from finetune_trainer.dist import ALONE, Group
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.evaluation import evaluate
from finetune_trainer.gradient import Gradient, resolve
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
    save_model: Callable[["PreTrainedModel", Path], None]
    stopping: threading.Event
    on_step: Callable[[float, float], None]
    on_evaluation: Callable[[Evaluated], None]
    on_commit: Callable[[Checkpoint], None]
    group: Group = ALONE
    state: TrainState = field(default_factory=TrainState)
    resumed: Path | None = None

    def __post_init__(self) -> None:
        self.hyper = self.recipe.hyperparameters
        self.device = next(self.model.parameters()).device
        self.rate = optim.learning_rate(self.recipe, sum(p.numel() for p in self.model.parameters()))
        self.optimizer = optim.build(self.model, self.hyper, self.rate)
        self.steps_per_epoch = math.ceil(len(self.train_data) / self.hyper.batch_size)
        planned = self.steps_per_epoch * self.hyper.epochs
        self.total_steps = min(planned, self.hyper.max_steps or planned)
        self._advice = f"lower hyperparameters.learningRate (it is {self.rate:g}) or maxGradNorm, or look for broken rows"
        # The last step's loss, and how many processes were asked to end.
        self._told: torch.Tensor | None = None
        self._ending = False
        layers.check(self.model, self.hyper)
        self.state.vocabulary = words = vocabulary.digest(self.model)
        if self.resumed is not None:
            self.state = snapshot.progress(self.resumed, words)
            self.checkpoints.best = self.state.best_checkpoint
        precision = Precision(self.state.precision or resolve(self.recipe.precision, self.device))
        self.state.precision = precision.value
        self.gradient = Gradient(self.model, self.hyper, precision, self.kind, self.train_data, self.pad, self.group)
        if self.resumed is not None:
            snapshot.restore(self.resumed, self.optimizer, self.gradient.scaler)
        layers.set_trainable(self.model, self.hyper, self.state.epoch)
        self.gradient.wrap()
        if self.resumed is not None:
            snapshot.restore_random(self.resumed, self.device, self.group)

    # ------------------------------------------------------------------------------------------------------- train -----
    def train(self) -> None:
        """Until the epochs are done or early stopping says so. Raises TrainingFailure(Interrupted) after a save on SIGTERM."""
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
        for rows in batches:
            self.model.train()
            rate = self.rate * optim.factor(self.hyper.schedule, self.state.step, self.total_steps, self.state.plateaus)
            optim.set_rate(self.optimizer, rate)
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.gradient(rows)
            scaler = self.gradient.scaler
            scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.hyper.max_grad_norm)
            scaler.step(self.optimizer)
            scaler.update()
            self._read_loss()  # of the step before: waiting for this one would stall an accelerator
            # A gradient that is not finite spoils the weights of this very step, whose loss was fine; a scaler leaves such a step out.
            self._told = self.group.sum(torch.stack([loss, torch.full_like(loss, self.stopping.is_set())]))
            if not scaler.is_enabled():
                self._told[0] = torch.where(torch.isfinite(norm), self._told[0], norm)
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
        (value, asked), self._told = self._told.tolist(), None
        self._ending = self._ending or asked > 0
        if not math.isfinite(value):
            raise TrainingFailure("NonFiniteLoss", f"the loss became {value} near step {self.state.step}: {self._advice}")
        self._shown_loss = value

    # -------------------------------------------------------------------------------------------- evaluate and save ----
    def _maybe_evaluate_and_save(self) -> None:
        policy, state = self.recipe.evaluation, self.state
        last = state.step >= self.total_steps
        if policy.every_steps is not None:
            due = state.step % policy.every_steps == 0
        else:
            due = state.batch == 0 and state.epoch % (policy.every_epochs or 1) == 0
        improved = self._evaluate() if due or last else False
        every = self.recipe.checkpoint.every_steps
        save = (state.step % every == 0) if every is not None else (due or last)
        if self.group.size == 1:
            self._ending = self.stopping.is_set()  # else all processes must have heard the same
        if save or improved or self._ending:
            self._save()
        if self._ending:
            self.checkpoints.wait()
            raise TrainingFailure("Interrupted", f"asked to end; step {state.step} is saved")

    def _save(self) -> None:
        self._read_loss()  # nothing is saved before its loss is known to be finite
        random = snapshot.random_state(self.device, self.group)
        if self.group.leads:
            self.checkpoints.save(self.state.step, lambda folder: self._stage(folder, random), self.on_commit)

    def _evaluate(self) -> bool:
        """Scores the model on the validation data; whether it is the best so far."""
        self._read_loss()
        state, metric = self.state, self.recipe.best_metric
        scores = evaluate(self.model, self.kind, self.validation_data, self.pad, self.device, self.group)
        named = [m.model_dump(by_alias=True) for m in scores.named("validation")]
        state.evaluations.append({"examples": state.examples, "step": state.step, "metrics": named})
        if not math.isfinite(scores.values["loss"]):
            raise TrainingFailure("NonFiniteLoss", f"the validation loss became {scores.values['loss']}: {self._advice}")
        value = scores.values[metric] if metric.higher_is_better else -scores.values[metric]
        value = value if math.isfinite(value) else -math.inf  # not defined, such as the correlation with a constant
        stop = self.hyper.early_stopping
        # The first evaluation is always an improvement; minDelta is about patience, not about which model is kept.
        improved = state.best_metric is None or value > state.best_metric
        patient = state.best_metric is None or value > state.best_metric + (stop.min_delta if stop else 0.0)
        state.bad_evaluations = 0 if patient else state.bad_evaluations + 1
        self._count_plateau(patient)
        if improved:
            state.best_metric, state.best_step = value, state.step
            state.best_checkpoint = self.checkpoints.best = self.checkpoints.name(state.step)
        self.on_evaluation(scores)
        return improved

    def _count_plateau(self, improved: bool) -> None:
        state, schedule = self.state, self.hyper.schedule
        state.plateau_evaluations = 0 if improved else state.plateau_evaluations + 1
        if schedule.type is ScheduleType.REDUCE_ON_PLATEAU and state.plateau_evaluations >= schedule.value("patience"):
            state.plateaus, state.plateau_evaluations = state.plateaus + 1, 0

    def _stage(self, folder: Path, random: snapshot.Random) -> None:
        def save_model(target: Path) -> None:
            self.save_model(self.model, target)

        snapshot.stage(folder, self.state, self.optimizer, self.gradient.scaler, random, save_model)
