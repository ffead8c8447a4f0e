"""Optimizer and learning-rate schedules. The rate is a pure function of the step, so that it needs no state in a checkpoint.

Only ReduceOnPlateau knows more than the step: how often the metric stood still, which is part of the training's progress.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from finetune_api.hyperparameters import Hyperparameters, Schedule, ScheduleType
from finetune_api.model_source import Pooling
from finetune_api.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

DEFAULT_RATES = ((50_000_000, 2e-4), (200_000_000, 5e-5))
LARGE_MODEL_RATE = 2e-5
MEAN_POOLED_RATE = 1e-2
"""For a linear head on standardised features (pooling.py)."""
LORA_FACTOR = 10
"""Adapters start at zero and want a larger rate than weights (Hu et al., 2021; Schulman et al., 2025, measured a factor near ten)."""

ONE_CYCLE_START, ONE_CYCLE_END = 1 / 25, 1 / 25e4
"""Share of the peak at the first and the last step (Smith and Topin, 2018; the values of torch's OneCycleLR)."""
SLANTED_RATIO = 32.0
"""How much smaller the lowest rate is than the peak (Howard and Ruder, 2018)."""


def learning_rate(recipe: Recipe, parameters: int) -> float:
    """The peak rate: as given, else by method and number of parameters (small models need a larger one)."""
    if recipe.hyperparameters.learning_rate is not None:
        return recipe.hyperparameters.learning_rate
    if recipe.model.pooling is Pooling.MEAN:
        return MEAN_POOLED_RATE
    rate = next((rate for below, rate in DEFAULT_RATES if parameters < below), LARGE_MODEL_RATE)
    return rate * LORA_FACTOR if recipe.model.lora else rate


# -------------------------------------------------------------------------------------------------------- schedules ----
def factor(schedule: Schedule, step: int, total: int, plateaus: int = 0) -> float:
    """Share of the peak rate for optimizer step `step` (from 0) of `total`, after the metric stood still `plateaus` times."""
    warmup = int(schedule.warmup) if schedule.warmup >= 1 else round(schedule.warmup * total)
    kind = schedule.type
    if step < warmup:
        return _RISE[kind](step, warmup) if kind in _RISE else (step + 1) / warmup
    if kind is ScheduleType.CONSTANT:
        return 1.0
    if kind is ScheduleType.INVERSE_SQRT:
        # Vaswani et al. (2017): from the end of warm-up; without warm-up from the first step.
        return math.sqrt(warmup / step) if warmup else 1 / math.sqrt(step + 1)
    if kind is ScheduleType.REDUCE_ON_PLATEAU:
        return max(schedule.value("min_factor"), schedule.value("factor") ** plateaus)
    rest = max(1, total - warmup)
    if kind is ScheduleType.ONE_CYCLE:  # its last step is the lowest
        return ONE_CYCLE_END + (1 - ONE_CYCLE_END) * _cosine((step + 1 - warmup) / rest)
    done = min(1.0, (step - warmup) / rest)
    if kind is ScheduleType.SLANTED_TRIANGULAR:
        return _slanted(1 - done)
    low = schedule.value("min_factor")
    return low + (1 - low) * _FALL[kind](schedule, done)


def _cosine(done: float) -> float:
    return (1 + math.cos(math.pi * done)) / 2


def _slanted(height: float) -> float:
    return (1 + height * (SLANTED_RATIO - 1)) / SLANTED_RATIO


_RISE: dict[ScheduleType, Callable[[int, int], float]] = {
    ScheduleType.ONE_CYCLE: lambda step, warmup: 1 - (1 - ONE_CYCLE_START) * _cosine(step / max(1, warmup - 1)),
    ScheduleType.SLANTED_TRIANGULAR: lambda step, warmup: _slanted(step / warmup),
}
_FALL: dict[ScheduleType, Callable[[Schedule, float], float]] = {
    ScheduleType.LINEAR: lambda _, done: 1 - done,
    ScheduleType.COSINE: lambda _, done: _cosine(done),
    ScheduleType.COSINE_RESTARTS: lambda s, done: _cosine(done * s.value("cycles") % 1.0) if done < 1 else 0.0,
    ScheduleType.POLYNOMIAL: lambda s, done: (1 - done) ** s.value("power"),
    # Hu et al. (2024): the rate stays, and falls over the last part.
    ScheduleType.WARMUP_STABLE_DECAY: lambda s, done: min(1.0, (1 - done) / s.value("decay")),
}


# -------------------------------------------------------------------------------------------------------- optimizer ----
def build(model: "PreTrainedModel", hyperparameters: Hyperparameters, rate: float) -> "torch.optim.AdamW":
    """AdamW over all parameters; groups have a `scale`, their share of the rate (layer-wise decay)."""
    import torch

    from finetune_trainer.layers import groups

    return torch.optim.AdamW(groups(model, hyperparameters), lr=rate, fused=True)


def clip(model: "PreTrainedModel", limit: float) -> "torch.Tensor":
    """Scales the gradients down to this L2 norm of all of them; the norm before, shape (). To be called by all processes."""
    import torch

    from finetune_trainer import sharding

    return sharding.full(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))


def set_rate(optimizer: "torch.optim.Optimizer", rate: float) -> None:
    """The rate of this step, for each group by its scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
