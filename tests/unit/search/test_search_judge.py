"""Verdicts at rungs, and which evaluation is the reading of a rung."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from search_kit import VALUES, at, pruned_by, study

from finetune_api.sweep import Asha, Direction, Median
from finetune_operator.search.judge import judge, rungs_of
from finetune_operator.search.types import Outcome, Reading, Study, Trial, Verdict


def asha(direction: str = "Minimize", factor: int = 3) -> Study:
    of = study(objective={"metric": "loss", "direction": direction})
    return pruned_by(of, Asha(min_examples=10, reduction_factor=factor, max_rungs=4))


def median(min_trials: int = 3) -> Study:
    return pruned_by(study(), Median(min_examples=10, max_rungs=3, min_trials=min_trials))


# ------------------------------------------------------------------------------------------------------------- asha ----
def test_of_three_the_best_goes_on_and_the_first_always_does() -> None:
    of = asha()
    assert judge(of, [], 0, 10, 5.0) == Verdict(stop=False, rank=1, of=1)
    assert judge(of, [at(0, 5.0)], 1, 10, 6.0) == Verdict(stop=True, rank=2, of=2)
    assert judge(of, [at(0, 5.0)], 1, 10, 4.0) == Verdict(stop=False, rank=1, of=2)
    six = [at(k, float(k)) for k in range(5)]
    assert judge(of, six, 5, 10, 0.5) == Verdict(stop=False, rank=2, of=6)
    assert judge(of, six, 5, 10, 1.5) == Verdict(stop=True, rank=3, of=6)


def test_equals_share_a_rank_and_none_is_stopped_for_it() -> None:
    """As at the first rung of a small data set, where all say the class that is most frequent."""
    assert judge(asha(), [at(0, 1.0), at(1, 1.0)], 2, 10, 1.0) == Verdict(stop=False, rank=1, of=3)
    assert judge(asha(), [at(0, 1.0), at(1, 1.0)], 2, 10, 1.1) == Verdict(stop=True, rank=3, of=3)


def test_maximize_turns_it_round() -> None:
    assert not judge(asha("Maximize"), [at(0, 0.8), at(1, 0.7)], 2, 10, 0.9).stop
    assert judge(asha("Maximize"), [at(0, 0.8), at(1, 0.7)], 2, 10, 0.6).stop


def test_only_the_same_rung_is_compared() -> None:
    of = asha()
    assert judge(of, [at(0, 9.0, 0.1), at(1, 8.0)], 2, 10, 8.5) == Verdict(stop=True, rank=2, of=3)
    assert judge(of, [at(0, 9.0, 0.1), at(1, 8.0)], 2, 30, 0.2) == Verdict(stop=True, rank=2, of=2)
    assert judge(of, [at(0, 9.0, 0.1), at(1, 8.0)], 2, 90, 0.2) == Verdict(stop=False, rank=1, of=1)


@pytest.mark.parametrize("of", [asha(), asha("Maximize"), median()])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_stops_even_the_first(of: Study, value: float) -> None:
    assert judge(of, [], 0, 10, value).stop


@given(
    st.lists(st.tuples(st.lists(VALUES, max_size=4), st.sampled_from(list(Outcome))), max_size=30),
    st.sampled_from(["Minimize", "Maximize"]),
)
def test_the_best_is_never_stopped(records: list[tuple[list[float], Outcome]], direction: str) -> None:
    for of in (asha(direction), pruned_by(asha(direction), Median(min_examples=10, min_trials=2))):
        trials = [
            at(k, *values, outcome=outcome) if values else Trial(k, {}, outcome) for k, (values, outcome) in enumerate(records)
        ]
        finite = [v for values, _ in records for v in values if math.isfinite(v)]
        beyond = of.sign * (min((of.sign * v for v in finite), default=0.0) - 1)
        for rung in (10, 30, 90, 270):
            verdict = judge(of, trials, 99, rung, beyond)
            assert not verdict.stop
            assert verdict.rank == 1
            assert 1 <= judge(of, trials, 99, rung, -beyond).rank <= verdict.of


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=60, unique=True), st.integers(2, 5))
def test_about_one_in_so_many_goes_on(values: list[float], factor: int) -> None:
    of, trials, kept = asha(factor=factor), [], 0
    for index, value in enumerate(values):
        verdict = judge(of, trials, index, 10, value)
        assert verdict.of == index + 1
        assert verdict.rank == 1 + sum(other < value for other in values[:index])
        assert verdict.stop == (verdict.rank > max(verdict.of // factor, 1))
        trials.append(at(index, value, outcome=Outcome.PRUNED if verdict.stop else Outcome.OPEN))
        kept += not verdict.stop
    assert kept >= 1


# ----------------------------------------------------------------------------------------------------------- median ----
def test_worse_than_the_median_stops_once_enough_came_so_far() -> None:
    three = [at(0, 1.0), at(1, 2.0, outcome=Outcome.PRUNED), at(2, 9.0, outcome=Outcome.COMPLETE)]
    assert not judge(median(), three[:2], 3, 10, 100.0).stop
    assert judge(median(), three, 3, 10, 2.1).stop
    assert not judge(median(), three, 3, 10, 2.0).stop


# ------------------------------------------------------------------------------------------------------- the pitfalls ----
def test_p3_verdicts_need_nothing_but_the_records() -> None:
    """The same sweep, with every record made anew from plain numbers before each verdict, prunes the same trials."""
    of, kept, anew = asha(), [], []
    for index in range(30):
        value = math.sin(17.0 * index)
        fresh = [
            Trial(t.index, dict(t.parameters), Outcome(str(t.outcome)), tuple(Reading(r.examples, r.value) for r in t.readings))
            for t in kept
        ]
        first, second = judge(of, kept, index, 10, value), judge(of, list(reversed(fresh)), index, 10, value)
        assert first == second
        anew.append(second.stop)
        kept.append(at(index, value, outcome=Outcome.PRUNED if first.stop else Outcome.OPEN))
    assert 15 <= sum(anew) <= 27  # pruning is on


def test_p8_a_failed_trial_was_worst_at_the_first_rung_that_it_did_not_reach() -> None:
    failed = [at(k, 1.0, outcome=Outcome.FAILED) for k in range(3)]
    of = asha()
    assert judge(of, failed, 9, 10, 2.0) == Verdict(stop=True, rank=4, of=4)
    assert judge(of, failed, 9, 30, 2.0) == Verdict(stop=False, rank=1, of=4)
    assert judge(of, failed, 9, 90, 2.0) == Verdict(stop=False, rank=1, of=1)
    lost = [replace(t, outcome=Outcome.IGNORED) for t in failed]
    assert judge(of, lost, 9, 30, 2.0) == Verdict(stop=False, rank=1, of=1)


def test_p16_who_runs_or_was_stopped_counts_too() -> None:
    wave = [at(0, 1.0), at(1, 2.0), at(2, 3.0, outcome=Outcome.PRUNED)]
    assert judge(median(), wave, 3, 10, 2.5) == Verdict(stop=True, rank=3, of=4)


def test_p17_the_first_evaluation_at_or_behind_a_rung_is_its_reading() -> None:
    evaluations = [(5, 9.0), (12, 8.0), (29, 7.0), (95, 2.0), (100, 1.0)]
    assert rungs_of(evaluations, (10, 30, 90, 270), Direction.MINIMIZE, complete=False) == (
        Reading(10, 8.0),
        Reading(30, 2.0),
        Reading(90, 2.0),
    )


def test_p17_a_trial_that_is_judged_again_does_not_count_itself() -> None:
    trials = [at(0, 1.0), at(1, 2.0, 1.5)]
    assert judge(asha(), trials, 0, 10, 1.0) == Verdict(stop=False, rank=1, of=2)


@pytest.mark.parametrize(("direction", "best"), [(Direction.MAXIMIZE, 0.9), (Direction.MINIMIZE, 0.2)])
def test_a_complete_trial_has_its_best_value_behind_its_end(direction: Direction, best: float) -> None:
    evaluations = [(10, 0.2), (20, 0.9), (25, math.nan), (30, 0.5)]
    readings = rungs_of(evaluations, (10, 30, 90, 270), direction, complete=True)
    assert readings == (Reading(10, 0.2), Reading(30, 0.5), Reading(90, best), Reading(270, best))
    assert rungs_of([], (10, 30), direction, complete=True) == ()
    assert rungs_of([(50, math.nan)], (10, 90), direction, complete=True)[0].examples == 10
