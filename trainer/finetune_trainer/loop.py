"""The training loop. Read top to bottom: `train` is the whole story, `TrainState` is all that changes and all that is saved.

A run that is cut off anywhere and goes on from a checkpoint does the same arithmetic as one that was never cut off: batches are a
pure function of (seed, epoch), the learning rate is one of the step, and dropout's random state is part of the checkpoint.

Several processes (dist.py) share each global batch out; every process takes the same step with the same gradient.
"""

import json
import math
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from finetune_api import Recipe
from finetune_trainer import optim
from finetune_trainer.checkpoint import Checkpoint, Checkpoints
from finetune_trainer.data import Encoded, collate, plan
from finetune_trainer.dist import ALONE, Group
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.evaluation import Evaluated, evaluate

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class TrainState:
    """Progress. `batch` is the next batch of `epoch`; `examples` counts training examples seen."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    examples: int = 0
    best_metric: float | None = None
    best_step: int | None = None
    best_checkpoint: str | None = None
    bad_evaluations: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Loop:
    """One training. `on_step(loss, rate)`, `on_evaluation(scores)` and `on_commit(checkpoint)` tell what happens."""

    recipe: Recipe
    model: "PreTrainedModel"
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
        hyper = self.recipe.hyperparameters
        self.device = next(self.model.parameters()).device
        self.rate = optim.learning_rate(hyper, sum(p.numel() for p in self.model.parameters()))
        self.optimizer = optim.build(self.model, hyper, self.rate)
        self.steps_per_epoch = math.ceil(len(self.train_data) / hyper.batch_size)
        self.total_steps = self.steps_per_epoch * hyper.epochs
        self._advice = f"lower hyperparameters.learningRate (it is {self.rate:g}) or maxGradNorm, or look for broken rows"
        # The last step's loss, and how many processes were asked to end.
        self._told: torch.Tensor | None = None
        self._ending = False
        self._wrapped = self.group.wrap(self.model)
        if self.resumed is not None:
            self._restore(self.resumed)

    # ------------------------------------------------------------------------------------------------------- train -----
    def train(self) -> None:
        """Until the epochs are done or early stopping says so. Raises TrainingFailure(Interrupted) after a save on SIGTERM."""
        hyper = self.recipe.hyperparameters
        while not self.finished:
            batches = plan(hyper.seed, self.state.epoch, hyper.batch_size, self.train_data.lengths)
            self._step(batches[self.state.batch :])
        self._read_loss()
        self.checkpoints.wait()

    @property
    def finished(self) -> bool:
        patience = self.recipe.hyperparameters.early_stopping
        stopped_early = patience is not None and self.state.bad_evaluations >= patience.patience
        return stopped_early or self.state.epoch >= self.recipe.hyperparameters.epochs

    def _step(self, batches: list[Any]) -> None:
        for rows in batches:
            self.model.train()
            rate = self.rate * optim.factor(self.recipe.hyperparameters.schedule, self.state.step, self.total_steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.zero_grad(set_to_none=True)
            loss = self._backward(rows)
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.hyperparameters.max_grad_norm)
            self.optimizer.step()
            self._read_loss()  # of the step before: waiting for this one would stall an accelerator
            # A gradient that is not finite spoils the weights of this very step, whose loss was fine.
            self._told = self.group.sum(torch.stack([loss, torch.full_like(loss, self.stopping.is_set())]))
            self._told[0] = torch.where(torch.isfinite(norm), self._told[0], norm)
            self._advance(len(rows))
            self.on_step(self._shown_loss, rate)
            self._maybe_evaluate_and_save()
            if self.finished:
                return

    def _backward(self, rows: Any) -> torch.Tensor:
        """Gradients of the global batch; this process's part of its loss."""
        mine = self.group.share(rows)
        batch = collate(self.train_data, mine if len(mine) else rows[:1], self.pad, self.device)
        logits = self._wrapped(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        # Summed loss over a global denominator: the gradient does not depend on how a batch is cut up. Without a row of its own a
        # process takes part with one that counts nothing.
        loss = cross_entropy(logits.float(), batch["labels"], reduction="sum") * (len(mine) > 0) / len(rows)
        # What comes back is a mean over the processes.
        (loss * self.group.size).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

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
        last = state.epoch >= self.recipe.hyperparameters.epochs
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
        random = {"cpu": self.group.collect(torch.get_rng_state())}
        if self.device.type == "cuda":
            random["cuda"] = self.group.collect(torch.cuda.get_rng_state(self.device))
        if self.group.leads:
            self.checkpoints.save(self.state.step, lambda folder: self._stage(folder, random), self.on_commit)

    def _evaluate(self) -> bool:
        """Scores the model on the validation data; whether it is the best so far."""
        self._read_loss()
        state, metric = self.state, self.recipe.evaluation.best_metric
        scores = evaluate(self.model, self.validation_data, self.pad, self.device, self.group)
        named = [m.model_dump(by_alias=True) for m in scores.named("validation")]
        state.evaluations.append({"examples": state.examples, "step": state.step, "metrics": named})
        if not math.isfinite(scores.values["loss"]):
            raise TrainingFailure("NonFiniteLoss", f"the validation loss became {scores.values['loss']}: {self._advice}")
        value = scores.values[metric] if metric.higher_is_better else -scores.values[metric]
        stop = self.recipe.hyperparameters.early_stopping
        # The first evaluation is always an improvement; minDelta is about patience, not about which model is kept.
        improved = state.best_metric is None or value > state.best_metric
        patient = state.best_metric is None or value > state.best_metric + (stop.min_delta if stop else 0.0)
        state.bad_evaluations = 0 if patient else state.bad_evaluations + 1
        if improved:
            state.best_metric, state.best_step = value, state.step
            state.best_checkpoint = self.checkpoints.best = self.checkpoints.name(state.step)
        self.on_evaluation(scores)
        return improved

    def _stage(self, folder: Path, random: dict[str, list[torch.Tensor]]) -> None:
        self.save_model(self.model, folder / "model")
        trainer = folder / "trainer"
        trainer.mkdir(parents=True, exist_ok=True)
        flat = {f"{i}.{k}": v for i, s in self.optimizer.state_dict()["state"].items() for k, v in s.items()}
        save_file({k: v.contiguous() for k, v in flat.items()}, trainer / "optimizer.safetensors")
        by_rank = {f"{kind}.{rank}": state for kind, states in random.items() for rank, state in enumerate(states)}
        save_file(by_rank, trainer / "random.safetensors")
        (trainer / "state.json").write_text(json.dumps(asdict(self.state)))

    def _restore(self, folder: Path) -> None:
        """Everything but the model's weights, which were loaded from the checkpoint's model/. Random state comes last."""
        self.state = TrainState(**json.loads((folder / "trainer/state.json").read_text()))
        self.checkpoints.best = self.state.best_checkpoint
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in load_file(folder / "trainer/optimizer.safetensors").items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        random = load_file(folder / "trainer/random.safetensors")
        # A process that was not there when this was saved keeps the state that its seed gave it.
        if (cpu := random.get(f"cpu.{self.group.rank}")) is not None:
            torch.set_rng_state(cpu)
        if (cuda := random.get(f"cuda.{self.group.rank}")) is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(cuda, self.device)
