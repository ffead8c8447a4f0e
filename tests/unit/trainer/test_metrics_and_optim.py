"""Metrics agree with scikit-learn; the learning rate is a pure function of the step; the right parameters are decayed."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, precision_recall_fscore_support, recall_score

from finetune_api.hyperparameters import Schedule, ScheduleType
from finetune_api.recipe import Recipe
from finetune_trainer import metrics, optim, selection
from finetune_trainer.snapshot import TrainState
from finetune_trainer.tasks import Evaluated

CLASSES = 4
PAIRS = st.lists(st.tuples(st.integers(0, CLASSES - 1), st.integers(0, CLASSES - 1)), min_size=1, max_size=60)


@settings(deadline=None)
@given(PAIRS)
def test_metrics_agree_with_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    labels, predictions = (np.array(side, dtype=np.int64) for side in zip(*pairs, strict=True))
    matrix = metrics.confusion(labels, predictions, CLASSES)
    mine = metrics.summary(matrix)
    present = sorted(set(labels.tolist()))  # a label without rows has no recall to average
    assert mine["accuracy"] == pytest.approx(accuracy_score(labels, predictions))
    assert mine["macro_f1"] == pytest.approx(f1_score(labels, predictions, labels=present, average="macro", zero_division=0))
    assert mine["macro_recall"] == pytest.approx(
        recall_score(labels, predictions, labels=present, average="macro", zero_division=0)
    )
    if len(set(labels.tolist())) > 1:
        assert mine["mcc"] == pytest.approx(matthews_corrcoef(labels, predictions), abs=1e-9)
    weighted = f1_score(labels, predictions, labels=present, average="weighted", zero_division=0)
    assert mine["weighted_f1"] == pytest.approx(weighted)
    theirs = precision_recall_fscore_support(labels, predictions, labels=range(CLASSES), zero_division=0)
    for i, row in enumerate(metrics.per_class(matrix, list("abcd"))):
        assert row["label"] == "abcd"[i]
        assert [row["precision"], row["recall"], row["f1"], row["support"]] == pytest.approx([t[i] for t in theirs])


def recipe(**changes: object) -> Recipe:
    spec = {
        "task": "SequenceClassification",
        "model": {"uri": "hf://a/b"},
        "dataset": {"uri": "s3://data/x", "labels": ["a", "b"]},
        "output": {"storageUri": "s3://models/x"},
    }
    return Recipe.model_validate(spec | changes)


def rates(total: int, **schedule: object) -> list[float]:
    return [optim.factor(Schedule.model_validate(schedule), step, total) for step in range(total)]


def test_linear_rises_in_warmup_and_falls_towards_zero() -> None:
    got = rates(10, type="Linear", warmup=2)
    assert got[:3] == [0.5, 1.0, 1.0]
    assert got[2:] == pytest.approx([i / 8 for i in range(8, 0, -1)])


def test_constant_stays_after_warmup() -> None:
    assert rates(6, type="Constant", warmup=0.5) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])


def test_a_share_of_warmup_is_of_all_steps_and_zero_is_none() -> None:
    assert rates(100, type="Constant", warmup=0.1)[9] == 1.0
    assert rates(100, type="Constant", warmup=0.1)[8] == pytest.approx(0.9)
    assert rates(5, type="Constant", warmup=0) == [1.0] * 5


@settings(deadline=None)
@given(
    total=st.integers(1, 500),
    warmup=st.one_of(st.floats(0, 0.99), st.integers(1, 600)),
    kind=st.sampled_from(list(ScheduleType)),
)
def test_the_rate_is_always_between_zero_and_the_peak(total: int, warmup: float, kind: ScheduleType) -> None:
    got = rates(total, type=kind, warmup=warmup if warmup < 1 else int(warmup))
    assert all(math.isfinite(rate) and 0 < rate <= 1 for rate in got)


@pytest.mark.parametrize(("parameters", "rate"), [(22_700_000, 2e-4), (110_000_000, 5e-5), (355_000_000, 2e-5)])
def test_the_default_rate_goes_by_size(parameters: int, rate: float) -> None:
    assert optim.learning_rate(recipe(), parameters) == rate
    assert optim.learning_rate(recipe(model={"uri": "hf://a/b", "lora": {}}), parameters) == pytest.approx(10 * rate)
    assert optim.learning_rate(recipe(hyperparameters={"learningRate": 1e-3}), parameters) == 1e-3


def test_of_two_models_that_score_the_same_the_first_is_kept() -> None:
    state = TrainState()
    for step, score, improved in ((1, 0.5, True), (2, 0.5, False), (3, 0.6, True)):
        state.step = step
        assert selection.judge(state, recipe(), Evaluated({"macro_f1": score, "loss": 1.0})) is improved
    assert state.best_step == 3
