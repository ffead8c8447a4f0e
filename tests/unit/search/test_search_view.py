"""What a sampler is shown, and the pitfalls of samplers that are fed from records (their numbers: research of the design)."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from search_kit import (
    ALL_KINDS,
    LEARNERS,
    LINE,
    at,
    bowl,
    complete,
    drawn,
    histories,
    history,
    parameter,
    pruned_by,
    study,
)

from finetune_api.sweep import Asha
from finetune_operator.search import draws, space, tpe
from finetune_operator.search.suggest import suggest
from finetune_operator.search.types import Outcome, Reading, Study, Trial, View
from finetune_operator.search.view import view


def rung_study() -> Study:
    return pruned_by(study(), Asha(min_examples=10, reduction_factor=3, max_rungs=3))


def with_parameters(of: Study, trials: Sequence[Trial]) -> list[Trial]:
    return [replace(t, parameters=drawn(of, t.index)) for t in trials]


def shown(of: Study, trials: Sequence[Trial]) -> list[float | None]:
    return [v.value for v in view(of, with_parameters(of, trials))]


# ---------------------------------------------------------------------------------------------------------- the rung ----
def test_trials_are_compared_at_the_highest_rung_that_enough_have_reached() -> None:
    of = rung_study()
    ten = [at(k, 10.0 + k, float(k)) for k in range(10)]
    assert shown(of, ten) == [float(k) for k in range(10)]
    assert shown(of, ten[:9]) == [10.0 + k for k in range(9)]
    assert shown(of, [*ten[:9], at(9, 30.0)])[9] == 30.0
    done = [at(k, 9.0, 8.0, float(k), 7.0, outcome=Outcome.COMPLETE) for k in range(10)]
    assert shown(of, done) == [float(k) for k in range(10)]  # the end of training is no rung


def test_who_was_stopped_below_is_behind_by_how_far_it_came() -> None:
    of = rung_study()
    trials = [
        *(at(k, 10.0 + k, 3.0 * k) for k in range(10)),
        at(10, 5.0, outcome=Outcome.PRUNED),
        at(11, 4.0, outcome=Outcome.PRUNED),
    ]
    found = shown(of, [*trials, at(12, 1.0), Trial(13, {}), Trial(14, {}, Outcome.PRUNED)])
    assert found[:10] == [3.0 * k for k in range(10)]
    assert found[12:14] == [None, None]  # they run below the rung
    behind = [value or 0.0 for value in (found[11], found[10], found[14])]
    assert behind == sorted(behind)
    assert 27.0 < behind[0] < behind[1] < behind[2] < 27.0 * 1.2


def test_maximize_is_turned_round() -> None:
    of = study(objective={"metric": "f1", "direction": "Maximize"})
    assert shown(of, [complete(0, {}, 0.9), complete(1, {}, 0.8)]) == [-0.9, -0.8]


def test_an_earlier_sweep_and_this_one_are_normal_scores() -> None:
    earlier = [complete(k, drawn(study(), 100 + k), 1e6 * v) for k, v in enumerate((3.0, 1.0, 2.0, 2.0))]
    strange = [complete(9, {"z": 1}, 0.0)]
    found = [v.value for v in view(study(prior=[*earlier, *strange]), history(study(), 3, lambda p: float(p["x"])))]
    assert len(found) == 7
    first = [v for v in found[:4] if v is not None]
    assert first[1] < first[2] == pytest.approx(0.0, abs=1e-9) == first[3] < first[0]
    assert sum(v for v in found[4:] if v is not None) == pytest.approx(0, abs=1e-9)


@given(st.data())
def test_views_have_finite_values_and_keep_their_order(data: st.DataObject) -> None:
    of = rung_study()
    trials = data.draw(histories(of))
    found = view(of, trials)
    learned = [t for t in trials if t.outcome is not Outcome.IGNORED]
    assert [v.parameters for v in found] == [t.parameters for t in learned]
    assert all(v.value is None or math.isfinite(v.value) for v in found)
    worst = max((v.value for v in found if v.value is not None), default=None)
    for v, t in zip(found, learned, strict=True):
        assert t.outcome is not Outcome.PRUNED or v.value is not None
        assert t.outcome is not Outcome.FAILED or v.value == worst


# ------------------------------------------------------------------------------------------------------- the pitfalls ----
@pytest.mark.parametrize("algorithm", ["random", "sobol", *LEARNERS])
def test_p1_p6_each_number_has_draws_of_its_own(algorithm: str) -> None:
    found = [suggest(study(LINE, algorithm), [], index) for index in range(12)]
    assert len({s.parameters["x"] for s in found if s}) == 12


@pytest.mark.parametrize("algorithm", LEARNERS)
def test_p2_the_order_of_a_list_does_not_matter(algorithm: str) -> None:
    of = study(ALL_KINDS, algorithm)
    trials = history(of, 15, lambda p: float(p["x"]))
    by_name = sorted(trials, key=lambda t: str(t.index))
    assert by_name != trials
    assert suggest(of, by_name, 15) == suggest(of, trials, 15)


def test_p2_the_order_is_that_of_the_numbers() -> None:
    """TPE weighs by age; as words, 10 comes before 9."""
    of = study(ALL_KINDS, "tpe")
    trials = history(of, 40, lambda p: float(p["x"]))
    found = suggest(of, trials[::-1], 40)
    assert found
    assert found.parameters == tpe.tpe(of.parameters, view(of, trials), draws.seed_of(of.spec.seed, 40))


@pytest.mark.parametrize("algorithm", LEARNERS)
def test_p4_no_name_is_part_of_it(algorithm: str) -> None:
    """A gap in the numbers is a gap, and moves nobody else's."""
    of = study(LINE, algorithm)
    trials = history(of, 20, bowl)
    gone = [t if t.index != 4 else replace(t, outcome=Outcome.IGNORED) for t in trials]
    assert suggest(of, gone, 20) == suggest(of, [t for t in trials if t.index != 4], 20)


@pytest.mark.parametrize("algorithm", LEARNERS)
def test_p8_where_trials_fail_is_left_alone(algorithm: str) -> None:
    """The minimum is at x = 0.3, and all below 0.35 fails: told so, the search goes elsewhere."""
    shares = {}
    for outcome in (Outcome.FAILED, Outcome.IGNORED):
        of, trials = study([LINE[0]], algorithm), []
        for index in range(40):
            found = suggest(of, trials, index)
            assert found
            x = float(found.parameters["x"])
            trials.append(complete(index, {"x": x}, abs(x - 0.3)) if x > 0.35 else Trial(index, {"x": x}, outcome))
        shares[outcome] = sum(t.outcome is outcome for t in trials[10:]) / 30
    assert shares[Outcome.FAILED] < 0.5 < shares[Outcome.IGNORED]


@pytest.mark.parametrize("algorithm", LEARNERS)
def test_p8_nothing_is_learned_from_failures_alone(algorithm: str) -> None:
    of = study(LINE, algorithm)
    trials = [Trial(k, drawn(of, k), Outcome.FAILED) for k in range(20)]
    found = suggest(of, trials, 20)
    assert found
    assert found.algorithm in ("random", "sobol")


@pytest.mark.parametrize("algorithm", LEARNERS)
def test_p9_trials_without_constraints_and_some_with(algorithm: str) -> None:
    of = study(LINE, algorithm, constraints=[{"metric": "bytes", "max": 1}, {"metric": "seconds", "max": 1}])
    trials = [replace(t, violations=(0.5, -1.0) if t.index % 3 else ()) for t in history(of, 15, bowl)]
    failed = [Trial(15, drawn(of, 15), Outcome.FAILED), Trial(16, drawn(of, 16))]
    assert suggest(of, [*trials, *failed], 17)


@pytest.mark.parametrize("algorithm", LEARNERS)
def test_p10_whole_numbers_are_values_too(algorithm: str) -> None:
    of = study(LINE, algorithm)
    trials = history(of, 15, lambda p: float(round(10 * float(p["x"]))))
    whole = [replace(t, value=int(t.value or 0)) for t in trials]
    assert suggest(of, whole, 15) == suggest(of, trials, 15)


def test_p11_rungs_are_ordered_as_numbers() -> None:
    of = pruned_by(study(), Asha(min_examples=9, reduction_factor=2, max_rungs=3))
    trials = [Trial(0, {}, Outcome.PRUNED, (Reading(9, 1.0), Reading(18, 1.0))), Trial(1, {}, Outcome.PRUNED, (Reading(9, 0.0),))]
    done = [Trial(k, {}, Outcome.OPEN, tuple(Reading(r, 5.0) for r in (9, 18, 36))) for k in range(2, 12)]
    found = shown(of, [*trials, *done])
    assert found[0] is not None
    assert found[1] is not None
    assert found[0] < found[1]


def test_p12_values_that_look_alike_stay_apart() -> None:
    of = study(ALL_KINDS)
    kind = of.parameters[-1]
    values = kind.search_space.categorical
    assert values
    assert [space.place_of(kind, v) for v in values.values] == list(range(6))
    assert space.place_of(kind, 8.0) == 0
    assert not space.fits(of.parameters, {**drawn(of, 0), "kind": False})
    told = tpe.study_of([kind], [View({"kind": v}, 0.0) for v in values.values]).trials
    assert [t.params["kind"] for t in told] == list(range(6))


@pytest.mark.parametrize("algorithm", LEARNERS)
def test_p12_a_value_that_is_no_number_is_a_failure(algorithm: str) -> None:
    of = study(LINE, algorithm)
    trials = history(of, 15, bowl)
    strange = [complete(15, drawn(of, 15), math.nan)]
    assert suggest(of, [*trials, *strange], 16) == suggest(of, [*trials, Trial(15, drawn(of, 15), Outcome.FAILED)], 16)


@pytest.mark.parametrize("algorithm", LEARNERS)
def test_p13_parameters_outside_the_space_are_left_out(algorithm: str) -> None:
    of = study(LINE, algorithm)
    trials = history(of, 15, bowl)
    edited = [
        complete(15, {"x": 3.0, "y": 0.0}, -9.0),
        complete(16, {"x": "a"}, -9.0),
        complete(17, {"x": 0.5, "y": 0.0, "z": 1}, -9.0),
    ]
    assert suggest(of, [*trials, *edited], 18) == suggest(of, trials, 18)


@pytest.mark.parametrize("algorithm", LEARNERS)
def test_p14_p15_a_trial_that_waits_is_neither_suggested_again_nor_forever_avoided(algorithm: str) -> None:
    of = study(LINE, algorithm)
    trials = history(of, 15, bowl)
    alone = suggest(of, trials, 18)
    assert alone
    waiting = [Trial(15 + k, alone.parameters) for k in range(3)]
    assert suggest(of, [*trials, *waiting], 18) != alone
    assert suggest(of, [*trials, *(replace(t, outcome=Outcome.IGNORED) for t in waiting)], 18) == alone


@pytest.mark.parametrize("algorithm", LEARNERS)
def test_p19_what_came_later_has_no_say(algorithm: str) -> None:
    """A trial is made again exactly, although meanwhile others are known."""
    of = study(LINE, algorithm)
    trials = history(of, 20, bowl)
    assert suggest(of, trials, 15) == suggest(of, trials[:15], 15)


def test_a_parameter_with_one_value() -> None:
    of = study([*LINE, parameter("one", "intUniform", min=1, max=2, step=5)], "tpe")
    trials = history(of, 15, bowl)
    found = suggest(of, trials, 15)
    assert found
    assert found.parameters["one"] == 1
