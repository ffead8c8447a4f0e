"""The arithmetic of the benchmarks: a wrong number in the docs would look like any other."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def modules() -> Any:
    """They are programs, and import each other from their own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40))))
def test_what_intervals_cover_together_is_counted_once(pairs: list[tuple[int, int]]) -> None:
    import clocks

    intervals = [(min(pair), max(pair)) for pair in pairs]
    assert clocks.covered(intervals) == len({cell for start, end in intervals for cell in range(start, end)})


def test_idle_is_what_no_kernel_covers() -> None:
    import clocks

    def event(category: str, start: float, length: float) -> dict[str, Any]:
        return {"cat": category, "ts": 5e9 + start, "dur": length}

    events = [
        event("kernel", 0, 300_000),
        event("kernel", 200_000, 200_000),  # on another stream
        event("gpu_memcpy", 500_000, 400_000),
        event("kernel", 900_000, 100_000),
        {"ph": "M", "name": "process_name"},
    ]
    assert clocks.idle_share(events, "kernel", 1.0) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="no event of category cpu_op"):  # and not: idle all the time
        clocks.idle_share(events, "cpu_op", 1.0)


def test_ratios_are_paired_geometric_means_with_a_lower_bound() -> None:
    import common

    mean, bound = common.ratio([2.0, 8.0], [1.0, 1.0])
    assert mean == pytest.approx(4.0)
    assert bound == pytest.approx(
        math.exp(math.log(4) - 6.314 * math.log(2))
    )  # t with one degree; deviation ln 4 / sqrt 2, over sqrt 2
    assert common.ratio([3.0, 30.0], [1.0, 10.0]) == pytest.approx((3.0, 3.0))
    assert common.ratio([3.0], [2.0]) == (pytest.approx(1.5), 0.0)  # one pair bounds nothing
    found = common.ratios({"a": [2.0, 2.0], "b": [1.0, 1.0]}, [("a_vs_b", "a", "b"), ("a_vs_c", "a", "c")])
    assert found == pytest.approx({"a_vs_b": 2.0, "a_vs_b_lower_95": 2.0})


def test_every_case_comes_in_every_repeat_and_none_is_always_first() -> None:
    import common

    assert list(common.turns("ab", 3)) == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]


@pytest.mark.parametrize(("make", "begins"), [("Clock()", 0), ("DeviceClock(4)", 2), ("ProfileClock(3, '.')", 5)])
def test_a_clock_leaves_out_what_warms_up(make: str, begins: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import clocks

    clock, seen, now = eval(make, vars(clocks)), [], 0
    monkeypatch.setattr(clock, "start", lambda: seen.append(now))
    monkeypatch.setattr(clock, "stop", lambda: seen.append(now))
    for now in range(9):
        clock.at(now, 8)
    assert seen == [begins, 8]
