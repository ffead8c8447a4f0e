"""Optimizer and learning-rate schedule. The rate is a pure function of the step, so that it needs no state in a checkpoint."""

from typing import TYPE_CHECKING

from finetune_api.recipe import Hyperparameters, Schedule, ScheduleType

if TYPE_CHECKING:
    import torch

DEFAULT_RATES = ((50_000_000, 2e-4), (200_000_000, 5e-5))
LARGE_MODEL_RATE = 2e-5


def learning_rate(hyperparameters: Hyperparameters, parameters: int) -> float:
    """The peak rate: as given, else by the number of parameters (small models need a larger one)."""
    if hyperparameters.learning_rate is not None:
        return hyperparameters.learning_rate
    return next((rate for below, rate in DEFAULT_RATES if parameters < below), LARGE_MODEL_RATE)


def factor(schedule: Schedule, step: int, total: int) -> float:
    """Share of the peak rate for optimizer step `step` (from 0) of `total`."""
    warmup = int(schedule.warmup) if schedule.warmup >= 1 else round(schedule.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.type is ScheduleType.CONSTANT:
        return 1.0
    return max(0.0, (total - step) / max(1, total - warmup))


def build(model: "torch.nn.Module", hyperparameters: Hyperparameters, rate: float) -> "torch.optim.AdamW":
    """AdamW over all parameters; vectors (biases, normalisation) are not decayed."""
    import torch

    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": hyperparameters.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=rate, fused=True)
