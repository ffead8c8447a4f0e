"""Suggestions: always inside the space, the same for the same records, and better than chance."""

import math
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import approx_fprime
from search_kit import (
    ALL_KINDS,
    CHOICES,
    CONDITIONAL,
    LEARNERS,
    LINE,
    bowl,
    complete,
    drawn,
    histories,
    history,
    parameter,
    pruned_by,
    study,
)  # fmt: skip

from finetune_api.sweep import Asha
from finetune_api.sweep_rules import cells
from finetune_api.sweep_space import Scalar
from finetune_operator.search import draws, gp, regression, space, tpe
from finetune_operator.search.suggest import GP_TRIALS, algorithm_of, suggest
from finetune_operator.search.types import Outcome, Study, Trial
from finetune_operator.search.view import view

SPACES = {"all kinds": ALL_KINDS, "conditional": CONDITIONAL, "choices": CHOICES}
HUGE = [
    parameter("wide", "uniform", min=-1e300, max=1e300),
    parameter("decades", "logUniform", min=1e-300, max=1e300),
    parameter("count", "intUniform", min=-(2**53), max=2**53),
    parameter("log_count", "intLogUniform", min=1, max=2**53),
    parameter("one", "intUniform", min=1, max=2, step=5),
]


def parameters_of(of: Study, trials: list[Trial], index: int) -> Mapping[str, Scalar]:
    found = suggest(of, trials, index)
    assert found is not None
    return found.parameters


# ------------------------------------------------------------------------------------------------------- properties ----
@pytest.mark.parametrize("algorithm", ["random", "sobol", *LEARNERS])
@pytest.mark.parametrize("name", SPACES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_suggestions_are_inside_the_space_and_the_same_each_time(name: str, algorithm: str, data: st.DataObject) -> None:
    of = study(SPACES[name], algorithm, seed=data.draw(st.integers(0, 2**31 - 1)), constraints=[{"metric": "bytes", "max": 1}])
    if data.draw(st.booleans()):
        of = pruned_by(of, Asha(min_examples=10, max_rungs=3))
    trials = data.draw(histories(of))
    index = 25 + data.draw(st.integers(0, 5))
    chosen = parameters_of(of, trials, index)
    assert space.fits(of.parameters, chosen)  # all that are in use, and no other
    assert [(k, v, type(v)) for k, v in chosen.items()] == [
        (k, v, type(v)) for k, v in parameters_of(of, data.draw(st.permutations(trials)), index).items()
    ]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # Optuna's own arithmetic
@pytest.mark.parametrize("algorithm", ["random", "sobol", *LEARNERS])
def test_absurdly_wide_ranges(algorithm: str) -> None:
    of = study(HUGE, algorithm)
    for index in range(15):
        trials = history(of, index, lambda p: float(p["log_count"]))
        assert space.fits(of.parameters, parameters_of(of, trials, index))


@given(units=st.lists(st.floats(0, 1), min_size=5, max_size=5))
def test_a_point_of_the_cube_comes_back(units: list[float]) -> None:
    for name in ("all kinds", "conditional"):
        of = study(SPACES[name])
        chosen = space.point(of.parameters, units)
        assert space.fits(of.parameters, chosen)
        assert list(space.point(of.parameters, space.units(of.parameters, chosen))) == list(chosen)
        snapped = gp.Cube(of.parameters).snap(np.array([units]))[0]
        assert snapped == pytest.approx(space.units(of.parameters, chosen), abs=1e-9)
        assert space.point(of.parameters, snapped.tolist()) == pytest.approx(chosen)


# -------------------------------------------------------------------------------------------------- without a model ----
def test_a_grid_in_order_and_then_nothing() -> None:
    of = study(CHOICES, "grid")
    tried = [suggest(of, [], index) for index in range(11)]
    assert [dict(s.parameters) for s in tried if s] == list(cells(of.parameters, 5))
    assert tried[9:] == [None, None]


def test_a_random_draw_depends_on_seed_and_number_alone() -> None:
    first = [parameters_of(study(seed=1), [], index) for index in range(20)]
    assert len({p["x"] for p in first}) == 20
    assert parameters_of(study(seed=1), history(study(seed=1), 19, bowl), 19) == first[19]
    assert parameters_of(study(seed=2), [], 0) != first[0]


def test_known_draws() -> None:
    """The same on every machine and in every version: these numbers are a promise."""
    assert draws.seed_of(42, 0) == 3224692507
    assert parameters_of(study(), [], 7)["x"] == pytest.approx(0.6584984921861479)


def test_sobol_covers_better_than_chance() -> None:
    places = np.array([draws.sobol_units(3, index, 2) for index in range(64)])
    assert len({(int(x * 8), int(y * 8)) for x, y in places}) == 64  # a net: one point in each of 64 squares


def test_initial_points_come_first_and_are_completed() -> None:
    points: list[dict[str, Any]] = [{"how": 0.25}, {"method": "full", "frozen": 12.0}, {}]
    of = study(CONDITIONAL, "auto", initialPoints=points)
    tried = [suggest(of, [], index) for index in range(4)]
    assert [s.algorithm for s in tried if s] == ["initialPoint"] * 3 + ["sobol"]
    assert tried[0] is not None
    assert tried[0].parameters["how"] == 0.25
    assert tried[0].parameters["method"] == "lora"  # else `how` would not be in use
    assert tried[1] is not None
    assert tried[1].parameters == {"method": "full", "frozen": 12}
    assert type(tried[1].parameters["frozen"]) is int
    assert all(s and space.fits(of.parameters, s.parameters) for s in tried)
    assert tried[2] is not None
    assert tried[2].parameters == drawn(of, 2)


# ----------------------------------------------------------------------------------------------------------- models ----
def test_auto_takes_a_process_in_a_small_space_and_tpe_for_many_trials() -> None:
    assert algorithm_of(study(CONDITIONAL, "auto").spec) == "gp"
    many = [parameter(f"x{k}", "uniform", min=0, max=1) for k in range(11)]
    assert algorithm_of(study(many, "auto").spec) == "tpe"
    of = study(LINE, "auto")
    trials = history(of, GP_TRIALS + 1, bowl)
    names = [found.algorithm for count in (0, 9, 10, GP_TRIALS + 1) if (found := suggest(of, trials[:count], count))]
    assert names == ["sobol", "sobol", "gp", "tpe"]


def test_what_may_change_meanwhile_has_no_say() -> None:
    trials = history(study(), 12, bowl)
    for algorithm in LEARNERS:
        fields = {"numTrials": 13, "parallelTrials": 900, "maxFailedTrials": 1, "budget": {"gpuSeconds": 1}}
        assert suggest(study(LINE, algorithm), trials, 12) == suggest(study(LINE, algorithm, **fields), trials, 12)


@pytest.mark.parametrize("algorithm", LEARNERS)
@pytest.mark.parametrize("direction", ["Minimize", "Maximize"])
def test_models_find_the_bowl(algorithm: str, direction: str) -> None:
    sign = 1 if direction == "Minimize" else -1
    of = study(LINE, algorithm, objective={"metric": "loss", "direction": direction})
    trials: list[Trial] = []
    for index in range(40):
        chosen = parameters_of(of, trials, index)
        trials.append(complete(index, chosen, sign * bowl(chosen)))
    chance = statistics.median(bowl(t.parameters) for t in history(of, 40, bowl))
    assert statistics.median(bowl(t.parameters) for t in trials[20:]) < (chance / 3 if algorithm == "tpe" else 1e-3)


@pytest.mark.parametrize("space_of", [LINE, ALL_KINDS])
def test_a_study_made_anew_is_the_one_that_was_kept(space_of: list[dict[str, Any]]) -> None:
    """Bit for bit, with trials that run: the live study is told as they end, and each suggestion has the seed of its number."""
    import optuna

    of = study(space_of, "tpe")
    live, trials = tpe.study_of(of.parameters, []), []
    for index in range(40):
        chosen = parameters_of(of, trials, index)
        if index < 14:  # 10 values and 4 that run: the first that TPE is asked for
            running = Trial(index, chosen)
            live.add_trial(_frozen(of, running))
        else:
            live.sampler = tpe.sampler_of(of.parameters, draws.seed_of(of.spec.seed, index))
            assert tpe.ask(live, of.parameters) == chosen
        trials.append(Trial(index, chosen))
        if index >= 4:
            ended = index - 4
            value = math.sin(37.0 * ended)
            trials[ended] = complete(ended, trials[ended].parameters, value)
            live.tell(ended, value)
    assert len(live.get_trials(states=[optuna.trial.TrialState.COMPLETE])) == 36


def _frozen(of: Study, trial: Trial) -> Any:
    return tpe.study_of(of.parameters, view(of, [trial])).trials[0]


def test_a_loss_that_exploded_does_not_blind_the_process() -> None:
    of = study(LINE, "gp")
    trials = history(of, 25, lambda p: bowl(p) if float(p["x"]) < 0.9 else 1e9)
    assert any(t.value == 1e9 for t in trials)
    assert bowl(parameters_of(of, trials, 25)) < 0.01


def test_running_trials_are_kept_away_from() -> None:
    of = study(LINE, "gp")
    trials = history(of, 20, bowl)
    alone = parameters_of(of, trials, 30)
    beside = [Trial(20 + k, parameters_of(of, trials, 30)) for k in range(3)]
    again = parameters_of(of, trials + beside, 30)
    assert abs(float(again["x"]) - float(alone["x"])) + abs(float(again["y"]) - float(alone["y"])) > 0.001


@pytest.mark.parametrize("algorithm", LEARNERS)
def test_constraints_are_learned(algorithm: str) -> None:
    """The bowl's own best is where the constraint is broken."""
    of = study(LINE, algorithm, constraints=[{"metric": "bytes", "max": 0.6}])
    trials: list[Trial] = []
    for index in range(45):
        chosen = parameters_of(of, trials, index)
        trials.append(complete(index, chosen, bowl(chosen), 0.6 - float(chosen["x"])))
    kept = [t for t in trials if t.feasible]
    assert len(kept) > 10, "a search that knew nothing of it would come back to the bowl's own best"
    assert min(bowl(t.parameters) for t in kept) < 0.09 + 0.03


@pytest.mark.parametrize("algorithm", LEARNERS)
def test_an_earlier_sweep_counts_by_rank(algorithm: str) -> None:
    """Its values are on another scale, and its ordering is the same: the first suggestion already is good."""
    earlier = [replace(t, value=1e9 + 1e6 * float(t.value or 0)) for t in history(study(), 40, bowl)]
    of = study(LINE, algorithm, prior=earlier)
    found = [suggest(of, [], index) for index in range(8)]
    assert {s.algorithm for s in found if s} == {algorithm}
    assert statistics.median(bowl(s.parameters) for s in found if s) < 0.1


def test_of_very_many_trials_the_best_and_the_newest_are_shown() -> None:
    trials = history(study(), 2 * tpe.MOST, lambda p: float(p["x"]))
    views = view(study(), [*trials, Trial(9999, trials[0].parameters)])
    found = tpe.shown(views)
    assert len(found) < tpe.MOST + 30
    assert found[-1].value is None
    assert (
        sorted(v.value for v in views if v.value is not None)[:25] == sorted(v.value for v in found if v.value is not None)[:25]
    )


# ---------------------------------------------------------------------------------------------------------- process ----
def test_gradients_of_fit_and_acquisition() -> None:
    random = np.random.default_rng(0)
    points = random.random((30, 4))
    points[:, 3] = (random.integers(0, 3, 30) + 0.5) / 3
    values = np.sin(5 * points[:, 0]) + points[:, 1] ** 2 + (points[:, 3] > 0.5)
    values = (values - values.mean()) / values.std()
    categorical = np.array([False, False, False, True])
    squared = regression.squared_differences(points, points, categorical)
    theta = np.array([0.5, 1.0, 2.0, 0.3, 0.2, -4.0])
    slope = approx_fprime(theta, lambda t: regression._loss(t, squared, values)[0], 1e-6)
    assert regression._loss(theta, squared, values)[1] == pytest.approx(slope, rel=1e-3, abs=1e-4)
    lengths = np.array([4.0, 2.0, 1.0, 1.0])
    process = regression.Process(points, values, categorical, lengths, 1.0, 0.1)
    keeping = regression.Process(points, points[:, 0] - 0.5, categorical, lengths, 1.0, 0.1)
    acquisition = gp.Acquisition(process, float(values.min()), keeping)
    here = np.array([0.4, 0.05, 0.5, 0.5])
    value, gradient = acquisition.slope(here)
    assert value == pytest.approx(float(acquisition(here[None])[0]))
    found = approx_fprime(here[:3], lambda x: float(acquisition(np.array([[*x, here[3]]]))[0]), 1e-6)
    assert gradient[:3] == pytest.approx(found, rel=1e-3)
    assert gradient[3] == 0


def test_log_improvement_is_smooth_and_finite_everywhere() -> None:
    z = np.concatenate([-np.geomspace(1e6, 1e-3, 2000), [0.0], np.geomspace(1e-3, 1e3, 500)])
    found = gp.log_improvement(z)
    assert np.isfinite(found).all()
    assert (np.diff(found) > 0).all()
    assert gp.log_improvement(np.array([0.0]))[0] == pytest.approx(math.log(1 / math.sqrt(2 * math.pi)))
    assert gp.log_improvement(np.array([50.0]))[0] == pytest.approx(math.log(50))


def test_a_small_space_is_not_tried_twice() -> None:
    """Nine points: the models find all nine in the first nine that they choose or draw, and go on after that."""
    for algorithm in LEARNERS:
        of = study(CHOICES, algorithm)
        trials: list[Trial] = []
        for index in range(20):
            chosen = parameters_of(of, trials, index)
            trials.append(complete(index, chosen, float(chosen["a"]) + float(chosen["b"])))
        learned = [tuple(t.parameters.values()) for t in trials[10:]]
        before = {tuple(t.parameters.values()) for t in trials[:10]}
        fresh = [point for point in learned if point not in before]
        assert len(before | set(learned)) == 9, algorithm
        assert len(fresh) == len(set(fresh)), algorithm


def test_importing_the_engine_loads_nothing_heavy() -> None:
    names = ["suggest", "judge", "finished", "importance", "view", "tpe", "gp", "regression", "draws", "space"]
    program = f"import sys\nfrom finetune_operator.search import {', '.join(names)}\nprint(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert not {"numpy", "scipy", "optuna", "sklearn", "torch"} & set(loaded)


def test_outcomes_that_tell_nothing_change_nothing() -> None:
    for algorithm in LEARNERS:
        of = study(LINE, algorithm)
        trials = history(of, 15, bowl)
        noise = [Trial(15, drawn(of, 15), Outcome.IGNORED), Trial(16, {}, Outcome.IGNORED), Trial(17, {}), Trial(18, {"x": 7})]
        assert suggest(of, trials, 30) == suggest(of, [*trials, *noise], 30)


def test_where_most_trials_are_equally_good_the_bad_ones_are_still_bad() -> None:
    """As accuracies of a plateau; all were cut to the same value, and nothing was left to learn from."""
    scaled = gp._standardised(np.array([-0.95] * 6 + [-0.33] * 4))
    assert (scaled[6:] > scaled[:6].max() + 1).all()
    one_exploded = gp._standardised(np.array([0.1, 0.2, 0.3, 1e9]))
    assert one_exploded[2] - one_exploded[0] > 0.3
