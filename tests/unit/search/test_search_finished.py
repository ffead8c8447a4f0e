"""When a sweep is over, what it says then, and which trials are the best; what decides."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from search_kit import ALL_KINDS, CHOICES, CONDITIONAL, LINE, bowl, complete, drawn, history, study

from finetune_api.sweep_rules import cells
from finetune_operator.search.finished import best, finished
from finetune_operator.search.importance import importance
from finetune_operator.search.types import Finish, Outcome, Spent, Study, Trial


def values(*found: float) -> list[Trial]:
    return [complete(index, {}, value) for index, value in enumerate(found)]


def why(of: Study, trials: list[Trial], spent: Spent | None = None, created: int | None = None) -> Finish | None:
    found = finished(of, trials, spent or Spent(), len(trials) if created is None else created)
    return found and found.why


# ------------------------------------------------------------------------------------------------------------- best ----
def test_the_best_is_complete_and_keeps_the_constraints() -> None:
    trials = [
        complete(0, {}, 3.0), complete(1, {}, 1.0, 0.5), complete(2, {}, 2.0, -1.0, 0.0), complete(3, {}, math.nan),
        Trial(4, {}, Outcome.PRUNED, (), 0.0), Trial(5, {}, Outcome.FAILED), complete(6, {}, 2.0),
    ]  # fmt: skip
    assert [t.index for t in best(study(), trials)] == [2, 6, 0]
    turned = study(objective={"metric": "loss", "direction": "Maximize"})
    assert [t.index for t in best(turned, trials)] == [0, 2, 6]


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False)), st.randoms())
def test_the_order_of_the_records_does_not_matter(found: list[float], random: Any) -> None:
    trials = values(*found)
    mixed = list(trials)
    random.shuffle(mixed)
    assert best(study(), mixed) == best(study(), trials)
    patient = study(stopWhen={"noImprovementTrials": 3}, objective={"metric": "loss", "direction": "Minimize", "goal": -1})
    assert finished(patient, mixed, Spent(), len(mixed)) == finished(patient, trials, Spent(), len(trials))


# ------------------------------------------------------------------------------------------------------------- ends ----
@pytest.mark.parametrize(("direction", "goal", "value"), [("Minimize", 0.5, 0.5), ("Maximize", 0.9, 0.95)])
def test_the_goal(direction: str, goal: float, value: float) -> None:
    of = study(objective={"metric": "loss", "direction": direction, "goal": goal})
    worse = 0.6
    assert why(of, values(worse)) is None
    found = finished(of, [*values(worse, value), Trial(2, {})], Spent(), 3)
    assert found
    assert found.why is Finish.GOAL_REACHED
    assert found.message == f"trial 1 has loss {value}, and objective.goal is {goal}"
    assert why(of, [complete(0, {}, value, 0.1)]) is None


def test_all_trials_have_ended() -> None:
    of = study(numTrials=3)
    assert why(of, values(1, 2)) is None
    assert why(of, [*values(1, 2), Trial(2, {})]) is None
    assert why(of, values(1, 2, 3)) is Finish.TRIALS_DONE
    assert why(of, values(1, 2), created=3) is Finish.TRIALS_DONE  # the third is gone; its number stays taken
    assert why(study(numTrials=4), values(1, 2, 3)) is None  # raised meanwhile: it goes on


def test_p5_a_grid_ends_with_its_cells() -> None:
    of = study(CHOICES, "grid")
    trials = [complete(index, cell, 0.0) for index, cell in enumerate(cells(of.parameters, 5))]
    assert why(of, trials[:8]) is None
    assert why(of, trials) is Finish.TRIALS_DONE


@pytest.mark.parametrize("field", ["gpuSeconds", "activeSeconds"])
def test_the_budget(field: str) -> None:
    of = study(budget={field: 100})
    spent = {"gpuSeconds": ("gpu_seconds", 99, 100), "activeSeconds": ("active_seconds", 99, 100)}[field]
    assert why(of, values(1), Spent(**{spent[0]: spent[1]})) is None
    found = finished(of, values(1), Spent(**{spent[0]: spent[2]}), 1)
    assert found
    assert found.why is Finish.BUDGET_SPENT
    assert f"budget.{field} 100" in found.message


def test_nothing_improves() -> None:
    of = study(stopWhen={"noImprovementTrials": 3})
    assert why(of, values(5, 4, 6, 6)) is None
    assert why(of, values(5, 4, 6, 6, 6)) is Finish.NO_IMPROVEMENT
    assert why(of, values(5, 4, 4, 4, 4)) is Finish.NO_IMPROVEMENT  # as good is not better
    assert why(of, values(5, 4, 6, 6, 3)) is None
    assert why(of, values(5, 6, 6, 6, 3)) is Finish.NO_IMPROVEMENT  # it was over then; a better one since does not undo it
    assert why(of, values(9)[:0] + [Trial(k, {}, Outcome.PRUNED) for k in range(9)]) is None  # there is nothing to improve on
    stopped = [*values(5), *(Trial(k, {}, Outcome.PRUNED) for k in (1, 2)), Trial(3, {}, Outcome.FAILED)]
    assert why(of, stopped) is Finish.NO_IMPROVEMENT
    assert why(of, [*values(5), *(Trial(k, {}, Outcome.IGNORED) for k in (1, 2, 3))]) is None


def test_a_trial_that_runs_may_still_be_the_best() -> None:
    """Under pruning those that run long are the good ones: what was begun after it and stopped does not end the sweep."""
    of = study(stopWhen={"noImprovementTrials": 2})
    trials = [*values(5), Trial(1, {}), *(Trial(k, {}, Outcome.PRUNED) for k in (2, 3, 4))]
    assert why(of, trials) is None
    trials[1] = complete(1, {}, 6.0)
    assert why(of, trials) is Finish.NO_IMPROVEMENT


def test_too_many_failed() -> None:
    of = study(maxFailedTrials=4)
    assert why(of, values(1), Spent(failed=4)) is None
    found = finished(of, values(1), Spent(failed=5), 6)
    assert found
    assert found.why is Finish.TOO_MANY_FAILED
    assert "raise maxFailedTrials" in found.message


def test_a_template_that_does_not_work_is_not_tried_two_hundred_times() -> None:
    of = study(numTrials=1000, parallelTrials=4)
    failed = [Trial(k, {}, Outcome.FAILED if k % 2 else Outcome.IGNORED) for k in range(4)]
    assert why(of, failed[:3], Spent(failed=3)) is None
    found = finished(of, failed, Spent(failed=4), 4)
    assert found
    assert found.why is Finish.TOO_MANY_FAILED
    assert "template" in found.message
    assert why(of, [*failed, complete(4, {}, 1.0)], Spent(failed=4)) is None
    assert why(of, [*failed, Trial(4, {}, Outcome.PRUNED)], Spent(failed=4)) is None
    assert why(of, [*failed[:3], Trial(3, {})], Spent(failed=3)) is None
    assert why(of, failed, Spent(failed=0)) is None  # stopped by hand, not failed
    # With fewer trials than that, all of them: more would not help.
    assert why(study(numTrials=2), failed[:2], Spent(failed=2)) is Finish.TOO_MANY_FAILED


# ------------------------------------------------------------------------------------------------------- importance ----
def test_what_decides_comes_first() -> None:
    of = study(ALL_KINDS)
    trials = history(of, 60, lambda p: 10 * abs(float(p["x"])) + (p["kind"] is True))
    found = importance(of, trials)
    assert found[0][0] == "x"
    assert {name for name, _ in found} == {p.name for p in of.parameters}
    assert sum(share for _, share in found) == pytest.approx(1)
    assert found == importance(of, trials)


def test_importance_is_of_complete_trials_alone() -> None:
    of = study(LINE)
    trials = history(of, 30, bowl)
    others = [Trial(30 + k, drawn(of, k), outcome) for k, outcome in enumerate(Outcome) if outcome is not Outcome.COMPLETE]
    strange = [complete(40, drawn(of, 40), math.nan), complete(41, {"x": 99}, 0.0), complete(42, {}, 0.0)]
    assert importance(of, [*trials, *others, *strange]) == importance(of, trials)
    assert importance(of, trials[:9]) == []
    assert importance(of, history(of, 30, lambda _: 1.0)) == []


def test_importance_in_a_space_with_conditions() -> None:
    of = study(CONDITIONAL)
    found = importance(of, history(of, 60, lambda p: float(p["method"] == "full")))
    assert found[0] == ("method", 1.0)
    assert {share for _, share in found[1:]} == {0.0}
