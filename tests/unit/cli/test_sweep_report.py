"""The report of a sweep: one file that loads nothing, in which text of users is text, and which stays small for many trials."""

import json
import random
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from finetune_cli.sweep_report import MAX_DOTS, MAX_LINES, MAX_POINTS, chart_data, duration, report_html

EVIL = "</script><img src=x onerror=alert(1)>&{data}{title}\u2028"


def history(trials: int, *, direction: str = "Maximize", name: str = "search", **status: Any) -> dict[str, Any]:
    chance = random.Random(0)
    rows = []
    for index in range(trials):
        row: dict[str, Any] = {"index": index, "name": f"{name}-t{index:04d}", "outcome": "Complete", "reason": "Trained"}
        row |= {
            "parameters": {f"{name}-lr": 10 ** chance.uniform(-5, -2), "kind": chance.choice(["a", name])},
            "algorithm": "tpe",
        }
        row |= {"value": chance.random(), "activeSeconds": 30, "finished": f"2026-01-01T00:{index % 60:02d}:00Z"}
        row["evaluations"] = [[100 * k, chance.random()] for k in range(1, 41)]
        rows.append(row)
    spec = {
        "objective": {"metric": f"validation/{name}", "direction": direction},
        "parameters": [
            {
                "name": f"{name}-lr",
                "path": "hyperparameters.learningRate",
                "searchSpace": {"logUniform": {"min": 1e-5, "max": 1e-2}},
            },
            {"name": "kind", "path": "hyperparameters.schedule.type", "searchSpace": {"categorical": {"values": ["a", name]}}},
        ],
    }
    sweep = {"name": name, "namespace": name, "spec": spec}
    return {"kind": "SweepHistory", "sweep": sweep, "status": {"plan": {"rungs": [100, 300]}, **status}, "trials": rows}


class Page(HTMLParser):
    """What a browser would make of it: elements with their attributes, text by element, and the data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._in: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._in and self._in.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._in[-1:] not in (["script"], ["style"]):
            self.text += data


def data_of(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    return found


def test_text_of_users_is_text() -> None:
    plain = Page(report_html(history(3)))
    text = report_html(
        history(
            3,
            name=EVIL,
            finishedMessage=EVIL,
            state=EVIL,
            importance=[{"name": EVIL, "share": "0.5"}],
            repetitions=[{"trial": EVIL, "mean": EVIL, "values": [EVIL]}],
            result={"modelUri": EVIL, "metrics": [{"name": EVIL, "value": EVIL}]},
            historyUri=EVIL,
        )
    )
    page = Page(text)
    assert [tag for tag, _ in page.elements if tag in ("script", "img")] == ["script", "script"]
    assert not [a for _, a in page.elements if any(str(name).startswith("on") for name in a)]
    assert page.text.count(EVIL) >= 8
    # `<!--<script>` alone would keep a browser from seeing the end of the element.
    assert not set("<>&") & set(text.partition('id="data">')[2].partition("</script>")[0])
    assert data_of(text)["trials"][0]["name"] == f"{EVIL}-t0000"
    assert {tag for tag, _ in plain.elements} <= {tag for tag, _ in page.elements}


def test_it_loads_nothing() -> None:
    text = report_html(history(5))
    page = Page(text)
    assert not [(tag, a) for tag, a in page.elements if {"src", "href", "action", "data"} & set(a)]
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|innerHTML|insertAdjacentHTML|eval\(", text)
    assert any("default-src 'none'" in str(a.get("content")) for tag, a in page.elements if tag == "meta")


def test_three_thousand_trials_stay_usable() -> None:
    text = report_html(history(3000, best={"trial": "search-t0007"}))
    assert len(text.encode()) < 3_000_000
    data = data_of(text)
    assert len(data["trials"]) == 3000
    assert len(data["curves"]) <= MAX_LINES
    assert len(data["lines"]) <= MAX_LINES
    assert len(data["dots"]) <= MAX_DOTS
    assert max(len(t["evaluations"]) for t in data["trials"]) == MAX_POINTS
    assert [t["evaluations"][0][0] for t in data["trials"][:2]] == [100, 100]
    assert [t["evaluations"][-1][0] for t in data["trials"][:2]] == [4000, 4000]


@pytest.mark.parametrize(("direction", "pick"), [("Maximize", max), ("Minimize", min)])
def test_the_best_are_drawn_however_many_there_are(direction: str, pick: Any) -> None:
    document = history(2000, direction=direction)
    data = chart_data(document)
    best = pick(document["trials"], key=lambda row: row["value"])
    assert data["best"] == best["name"]
    assert all(best["index"] in data[chart] for chart in ("curves", "lines", "dots"))


def test_the_best_is_the_one_that_the_status_names() -> None:
    # One that breaks a constraint may have the better value.
    assert chart_data(history(9, best={"trial": "search-t0004"}))["best"] == "search-t0004"


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"trials": []},
        {"sweep": {"name": "s", "spec": {}}, "status": {}, "trials": [{"index": 0, "outcome": "Ignored"}]},
        {"trials": [{"index": 0, "outcome": "Complete", "value": float("nan"), "evaluations": [[8, float("inf")]]}]},
    ],
)
def test_what_is_missing_is_left_out(document: dict[str, Any]) -> None:
    text = report_html(document)
    assert "none yet" in Page(text).text
    assert all(t["value"] is None and t["evaluations"] == [] for t in data_of(text)["trials"])


def test_durations_are_for_people() -> None:
    assert [duration(s) for s in (0, 59, 61, 3600, 4350, 1_000_000)] == [
        "0 s",
        "59 s",
        "1 min",
        "1 h 0 min",
        "1 h 12 min",
        "278 h",
    ]
