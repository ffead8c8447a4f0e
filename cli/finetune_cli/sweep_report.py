"""`finetune sweep report`: a sweep as one HTML file that needs nothing else, no network and no server.

Made of a history document (finetune_operator/domain/history.py). Python says what is shown and how much of it; report/report.js draws it at
the width of the window, and report/report.css has both colour schemes. Text of users reaches the page through `escape` or as JSON that
the script puts into text nodes, never as markup.
"""

import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

Object = Mapping[str, Any]

ASSETS = Path(__file__).parent / "report"
MAX_LINES = 240
"""Lines in a chart: more of them hide each other and make a browser slow. The best are among them."""
MAX_POINTS = 24
"""Evaluations of one line."""
MAX_DOTS = 1200
"""Trials in a chart of dots."""


def report_html(history: Object) -> str:
    """The page. `history` is a SweepHistory document; what is missing in it is left out of the page."""
    data = chart_data(history)
    sweep = history.get("sweep") or {}
    title = f"{sweep.get('name') or 'sweep'}: hyperparameter sweep"
    body = "\n".join((_header(history, data), _summary(history, data), _CHARTS, _TABLE, _footer(history)))
    style, script = ((ASSETS / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    return _PAGE.format(title=escape(title), style=style, script=script, body=body, data=_as_json(data))


def _as_json(data: Any) -> str:
    """JSON that no text in it can lead out of its script element with."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


# ------------------------------------------------------------------------------------------------------------- data ----
def chart_data(history: Object) -> dict[str, Any]:
    """What the script draws: the space, all trials for the table, and which of them each chart shows."""
    spec = (history.get("sweep") or {}).get("spec") or {}
    status = history.get("status") or {}
    objective = spec.get("objective") or {}
    sign = 1 if objective.get("direction") == "Minimize" else -1
    trials = [_trial(row) for row in history.get("trials") or []]
    ranked = sorted((t for t in trials if t["value"] is not None), key=lambda t: (sign * t["value"], t["index"]))
    best = (status.get("best") or {}).get("trial") or (ranked[0]["name"] if ranked else None)
    ahead = [t["index"] for t in ranked[: MAX_LINES // 4]]
    return {
        "metric": objective.get("metric") or "objective",
        "minimize": sign > 0,
        "best": best,
        "parameters": [_parameter(p) for p in spec.get("parameters") or []],
        "rungs": [r["examples"] for r in status.get("rungs") or []] or list((status.get("plan") or {}).get("rungs") or []),
        "importance": [[i["name"], _number(i["share"]) or 0.0] for i in status.get("importance") or []],
        "trials": trials,
        "curves": _some(ahead, [t["index"] for t in trials if t["evaluations"]], MAX_LINES),
        "lines": _some(ahead, [t["index"] for t in ranked], MAX_LINES),
        "dots": _some(ahead, [t["index"] for t in trials if t["value"] is not None or t["evaluations"]], MAX_DOTS),
    }


def _trial(row: Object) -> dict[str, Any]:
    evaluations = [[int(examples), value] for examples, v in row.get("evaluations") or [] if (value := _number(v)) is not None]
    return {
        "index": int(row["index"]),
        "name": str(row.get("name") or row["index"]),
        "outcome": str(row.get("outcome") or "Open"),
        "reason": str(row.get("reason") or ""),
        "algorithm": str(row.get("algorithm") or ""),
        "parameters": {str(name): value for name, value in (row.get("parameters") or {}).items()},
        "value": _number(row.get("value")),
        "evaluations": _thin(evaluations),
        "seconds": int(row.get("activeSeconds") or 0),
        "finished": _seconds(row.get("finished")),
    }


def _parameter(parameter: Object) -> dict[str, Any]:
    (kind, space), *_ = (parameter.get("searchSpace") or {"uniform": {}}).items()
    return {
        "name": str(parameter["name"]),
        "target": str(parameter.get("path") or parameter.get("env") or ""),
        "log": kind in ("logUniform", "intLogUniform"),
        "min": space.get("min"),
        "max": space.get("max"),
        "values": space.get("values"),
    }


def _number(value: Any) -> float | None:
    """A status has numbers as text. What is not finite is not shown."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _seconds(text: Any) -> float | None:
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return None


def _thin(points: list[list[float]]) -> list[list[float]]:
    if len(points) <= MAX_POINTS:
        return points
    last = len(points) - 1
    return [points[round(last * k / (MAX_POINTS - 1))] for k in range(MAX_POINTS)]


def _some(first: Sequence[int], rest: Sequence[int], most: int) -> list[int]:
    """At most so many: those that come first, and evenly of the rest."""
    if len(rest) <= most:
        return list(rest)
    kept, others = set(first), [index for index in rest if index not in set(first)]
    step = len(others) / (most - len(kept))
    kept |= {others[int(k * step)] for k in range(most - len(kept))}
    return [index for index in rest if index in kept]


# ------------------------------------------------------------------------------------------------------------- text ----
def duration(seconds: float) -> str:
    """For people, such as 1 h 12 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 100 else f"{seconds / 3600:,.0f} h"


def figure(value: Any) -> str:
    """A number with as many digits as say something; text as it is."""
    number = None if isinstance(value, bool) else _number(value)
    return f"{number:.4g}" if number is not None else str(value).lower() if isinstance(value, bool) else str(value)


def _header(history: Object, data: Object) -> str:
    sweep, status = history.get("sweep") or {}, history.get("status") or {}
    spec = sweep.get("spec") or {}
    state = status.get("state") or ("Complete" if status.get("finished") else "Running")
    said = status.get("finishedMessage") or _WHY.get(str(status.get("finished")), "")
    search = (status.get("plan") or {}).get("algorithm") or next(iter(spec.get("searchAlgorithm") or {"auto": {}}))
    pruner = next(iter(spec.get("pruneAlgorithm") or {"none": {}}))
    how = f"{'lower' if data['minimize'] else 'higher'} {data['metric']} is better · search {search}"
    how += f" · pruning {pruner}" if pruner != "none" else " · no pruning"
    return (
        f'<header><p class="eyebrow">Hyperparameter sweep · {escape(str(sweep.get("namespace") or "default"))}</p>'
        f'<h1>{escape(str(sweep.get("name") or ""))} <span class="state {escape(str(state).lower())}">{escape(str(state))}</span></h1>'
        f'<p class="lead">{escape(str(said))}</p><p class="how">{escape(how)}</p></header>'
    )


_WHY = {
    "GoalReached": "A trial has reached the goal.",
    "TrialsDone": "All trials have ended.",
    "BudgetSpent": "The budget is spent.",
    "NoImprovement": "Further trials brought no improvement.",
    "TooManyFailed": "Too many trials failed.",
    "Invalid": "The sweep cannot be run as it is written.",
}


def _summary(history: Object, data: Object) -> str:
    status = history.get("status") or {}
    best = next((t for t in data["trials"] if t["name"] == data["best"]), None)
    tiles = [_tile("Trials", f"{len(data['trials']):,}", _counts(data["trials"]))]
    seconds = status.get("activeSeconds")
    seconds = sum(t["seconds"] for t in data["trials"]) if seconds is None else seconds
    tiles.append(_tile("Time that trials ran", duration(int(seconds)), "all trials together"))
    if status.get("gpuSeconds"):
        saved = int(status.get("gpuSecondsSaved") or 0)
        tiles.append(
            _tile("GPU time", duration(int(status["gpuSeconds"])), f"pruning saved {duration(saved)}" if saved else "all trials")
        )
    if best is None:
        first = _tile("Best trial", "none yet", "no trial has ended with a value that counts", wide=True)
    else:
        value = figure(best["value"]) if best["value"] is not None else figure((status.get("best") or {}).get("value", ""))
        rows = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(figure(v))}</dd></div>" for k, v in best["parameters"].items())
        first = (
            f'<div class="tile best"><div><p class="label">Best {escape(data["metric"])}</p><p class="value">{escape(value)}</p>'
            f'<p class="note">{escape(best["name"])}</p></div><dl>{rows}</dl></div>'
        )
    return f'<section class="summary" aria-label="Summary">{first}<div class="tiles">{"".join(tiles)}</div></section>{_promoted(status)}'


def _tile(label: str, value: str, note: str, *, wide: bool = False) -> str:
    kind = "tile best" if wide else "tile"
    return (
        f'<div class="{kind}"><div><p class="label">{escape(label)}</p><p class="value">{escape(value)}</p>'
        f'<p class="note">{escape(note)}</p></div></div>'
    )


def _counts(trials: Sequence[Object]) -> str:
    words = {"Complete": "complete", "Pruned": "pruned", "Failed": "failed", "Ignored": "not counted", "Open": "open"}
    counted = {word: sum(t["outcome"] == outcome for t in trials) for outcome, word in words.items()}
    return ", ".join(f"{count:,} {word}" for word, count in counted.items() if count)


def _promoted(status: Object) -> str:
    """The repetitions and the promoted model, where there are some."""
    parts = []
    if repetitions := status.get("repetitions"):
        rows = "".join(
            f'<tr><td>{escape(str(r["trial"]))}</td><td class="n">{escape(figure(r.get("mean", "–")))}</td>'
            f'<td class="n">{escape("  ".join(figure(v) for v in r.get("values") or []))}</td></tr>'
            for r in repetitions
        )
        parts.append(
            '<section class="card"><h2>The best, repeated with other seeds</h2><div class="scroll"><table><thead><tr><th>Trial</th>'
            f'<th class="n">Mean</th><th class="n">Each seed</th></tr></thead><tbody>{rows}</tbody></table></div></section>'
        )
    if result := status.get("result"):
        rows = "".join(
            f"<div><dt>{escape(str(m['name']))}</dt><dd>{escape(figure(m['value']))}</dd></div>"
            for m in result.get("metrics") or []
        )
        parts.append(
            f'<section class="card"><h2>Promoted model</h2><p class="uri"><code>{escape(str(result.get("modelUri", "")))}</code></p>'
            f'<dl class="metrics">{rows}</dl></section>'
        )
    return "".join(parts)


def _footer(history: Object) -> str:
    status = history.get("status") or {}
    began, ended = _seconds(status.get("startTime")), _seconds(status.get("completionTime"))
    said = [f"from {status['startTime']}" if began else "", f"to {status['completionTime']}" if ended else ""]
    where = f" · history: {status['historyUri']}" if status.get("historyUri") else ""
    return f"<footer>{escape(' '.join(s for s in said if s) + where)}</footer>"


def _card(name: str, title: str, note: str, *, wide: bool = False) -> str:
    kind = "card wide" if wide else "card"
    return f'<section class="{kind}" id="{name}"><h2>{title}</h2><p class="note">{note}</p><div class="plot"></div></section>'


_CHARTS = (
    '<div class="grid">'
    + _card("curves", "Learning curves", "Objective by training examples seen; dashed lines are the rungs.", wide=True)
    + _card(
        "overTrials",
        "Best so far, by trial",
        "A dot is a trial that ran to its end; those beyond the axis are drawn at its edge.",
    )
    + _card("overCost", "Best so far, by cost", "The cost is the time that all trials together have run.")
    + _card(
        "parallel",
        "Which parameters go with which result",
        "A line is a trial that ran to its end; the stronger its colour, the better its rank.",
        wide=True,
    )
    + _card("importance", "What decides", "Estimated share of each parameter in the differences between trials.", wide=True)
    + _card("slices", "Each parameter by itself", "Rings below are trials that did not run to their end.", wide=True)
    + "</div>"
)
_TABLE = (
    '<section class="card" id="trials"><h2>All trials</h2><p class="note">Press a heading to sort.</p>'
    '<div class="scroll"><table></table></div><button type="button" hidden>Show all</button></section>'
)
# Nothing may be loaded, whatever a name or value says.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
<noscript><p class="noscript">The charts and the table of trials are drawn by a script in this file; scripts are switched off.</p></noscript>
<div id="tip" role="status" hidden></div>
<script type="application/json" id="data">{data}</script>
<script>
{script}</script>
</body>
</html>
"""
