"""What the sweep benchmark measures with: regrets that are 0 at the known minima, curves that end there, time that is simulated right."""

from pathlib import Path
from typing import Any

import pytest
from search_kit import at, study

from finetune_operator.search.types import Outcome, Trial

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def modules() -> Any:
    """They are programs, and import each other from their own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


def test_the_minima_are_known() -> None:
    from sweep_problems import PROBLEMS

    best: dict[str, dict[str, Any]] = {
        "branin": {"x0": 9.42477796, "x1": 2.475},
        "hartmann6": dict(
            zip((f"x{k}" for k in range(6)), (0.20169, 0.150011, 0.476874, 0.275332, 0.311652, 0.6573), strict=True)
        ),
        "ackley5": {f"x{k}": 0.0 for k in range(5)},
        "levy4": {f"x{k}": 1.0 for k in range(4)},
        "mixed": {"optimizer": "adamw", "rate": 10**-4.5, "batch": 32, "frozen": 4, "dropout": 0.12, "schedule": "cosine"},
        "conditional": {"method": "lora", "rate": 10**-3.2, "rank": 16, "alpha": 0.4},
    }
    for name, point in best.items():
        assert PROBLEMS[name].regret(point) == pytest.approx(0, abs=1e-5), name


def test_curves_fall_to_the_problems_own_value() -> None:
    from sweep_problems import PROBLEMS, Curves

    problem, point = PROBLEMS["branin"], {"x0": 1.0, "x1": 2.0}
    for strong in (True, False):
        curves = Curves(problem, strong, seed=3)
        values = [curves.value(point, 5, time) for time in (1, 3, 9, 27, 81)]
        assert values[-1] == problem.regret(point)
        assert values == sorted(values, reverse=True)
        assert values == [curves.value(point, 5, time) for time in (1, 3, 9, 27, 81)]


def test_simulated_searches() -> None:
    from sweep_problems import PROBLEMS, Curves
    from sweep_runs import Ours, asha, least, search, search_curves

    problem = PROBLEMS["failing"]
    of = study(problem.parameters)
    shown: list[int] = []

    class Watched(Ours):
        def propose(self, trials: Any, index: int) -> Any:
            shown.append(sum(t.outcome is Outcome.OPEN for t in trials))
            return super().propose(trials, index)

    trials = search(problem, Watched(of), 4, 30, seed=1)
    assert shown == [0, 1, 2, *[3] * 27]
    assert [t.outcome is Outcome.FAILED for t in trials] == [problem.fails(t.parameters) for t in trials]
    assert least([at(0, 1.0), Trial(1, {}, Outcome.FAILED)]) == float("inf")
    assert least(trials) == min(t.value for t in trials if t.value is not None)

    curves, pruned = Curves(PROBLEMS["branin"], True, 1), asha(study(PROBLEMS["branin"].parameters), 3, 3, 3)
    trials = search_curves(curves, Ours(pruned), pruned, (3, 9, 27), 4, 324.0)
    counts = [sum(len(t.readings) >= k for t in trials) for k in (1, 2, 3)]
    assert counts[0] > 1.5 * counts[1] > 2 * counts[2] > 0
    assert any(t.outcome is Outcome.COMPLETE for t in trials)


def test_numbers_of_the_table() -> None:
    import sweep

    low, high = sweep.interval([1.0, 2.0, 3.0, 4.0, 100.0])
    assert 1 <= low < 3 < high <= 100
    rows = [{"problem": "p", "searcher": s, "regrets": r} for s, r in (("a", [1.0, 2.0, 3.0]), ("b", [2.0, 4.0, 6.0, 1e9]))]
    assert sweep.paired(rows, "p", "a", "b")[0] == 0.5
    found = sweep.bars({"identical": {"same": 9, "compared": 10}})
    assert [(b["value"], b["holds"]) for b in found] == [(1, False)]
