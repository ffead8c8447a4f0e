"""What an evaluation means for the training: whether the model is the best so far, and how long it has not got better."""

import math

from finetune_api import Recipe
from finetune_api.hyperparameters import ScheduleType
from finetune_trainer.snapshot import TrainState
from finetune_trainer.tasks import Evaluated


def judge(state: TrainState, recipe: Recipe, scores: Evaluated) -> bool:
    """Writes the evaluation into the state; whether it is the best so far."""
    metric, stop = recipe.best_metric, recipe.hyperparameters.early_stopping
    note(state, scores)
    value = scores.values[metric] if metric.higher_is_better else -scores.values[metric]
    value = value if math.isfinite(value) else -math.inf  # not defined, such as the correlation with a constant
    # The first evaluation is always an improvement; minDelta is about patience, not about which model is kept.
    improved = state.best_metric is None or value > state.best_metric
    patient = state.best_metric is None or value > state.best_metric + (stop.min_delta if stop else 0.0)
    state.bad_evaluations = 0 if patient else state.bad_evaluations + 1
    _count_plateau(state, recipe, patient)
    if improved:
        state.best_metric, state.best_step = value, state.step
    return improved


def note(state: TrainState, scores: Evaluated) -> bool:
    """Writes the evaluation down, and no more: it decides nothing."""
    named = [m.model_dump(by_alias=True) for m in scores.named("validation")]
    state.evaluations.append({"examples": state.examples, "step": state.step, "metrics": named})
    return False


def at_a_rung(state: TrainState, recipe: Recipe) -> bool:
    """Whether one of evaluation.atExamples has been reached since the last evaluation."""
    seen = state.evaluations[-1]["examples"] if state.evaluations else 0
    return any(seen < rung <= state.examples for rung in recipe.evaluation.at_examples or ())


def _count_plateau(state: TrainState, recipe: Recipe, improved: bool) -> None:
    schedule = recipe.hyperparameters.schedule
    state.plateau_evaluations = 0 if improved else state.plateau_evaluations + 1
    if schedule.type is ScheduleType.REDUCE_ON_PLATEAU and state.plateau_evaluations >= schedule.value("patience"):
        state.plateaus, state.plateau_evaluations = state.plateaus + 1, 0
