"""Metrics and logs: the gauge of jobs follows their states, and a JSON log line is one line of JSON."""

import json
import logging
from datetime import UTC, datetime, timedelta

import pytest

from finetune_api.report import Saving
from finetune_operator import __version__
from finetune_operator.observe.log import set_up
from finetune_operator.observe.metrics import Metrics


def test_two_operators_in_one_process_do_not_share_series_and_all_are_ours() -> None:
    Metrics()
    text = Metrics().render().decode()
    assert f'finetune_build_info{{version="{__version__}"}} 1.0' in text
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# HELP")]
    assert names
    assert all(name.startswith("finetune_") for name in names)


def test_a_json_line_holds_message_and_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        set_up("info", "json")
        try:
            raise ValueError("line one\nline two")
        except ValueError:
            logging.getLogger("x").exception('ns/name: "quoted"')
        logging.getLogger("x").debug("too fine")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    entry = json.loads(lines[0])
    assert (entry["level"], entry["message"]) == ("error", 'ns/name: "quoted"')
    assert "line two" in entry["exception"]


def sums(metrics: Metrics, name: str) -> float:
    return sum(float(line.split()[-1]) for line in metrics.render().decode().splitlines() if line.startswith(f"{name}{{"))


def test_what_saving_costs_is_counted_once_however_often_it_is_told() -> None:
    metrics = Metrics()
    metrics.began("ns", "a", "u/1")
    for saves in (1, 3, 3, 2):  # told again, and told late
        metrics.saved("ns", "a", "u/1", Saving(saves=saves, blocking_seconds=saves / 2))
    assert sums(metrics, "finetune_checkpoint_saves_total") == 3
    assert sums(metrics, "finetune_checkpoint_blocking_seconds_total") == 1.5
    metrics.began("ns", "a", "u/2")
    metrics.saved("ns", "a", "u/2", Saving(saves=2))
    assert sums(metrics, "finetune_checkpoint_saves_total") == 5, "the next attempt begins at zero"


def test_a_new_operator_counts_only_what_comes_from_now_on() -> None:
    metrics = Metrics()
    metrics.saved("ns", "a", "u/1", Saving(saves=100))
    metrics.saved("ns", "a", "u/1", Saving(saves=101))
    assert sums(metrics, "finetune_checkpoint_saves_total") == 1


def test_the_age_of_a_checkpoint_grows_while_its_job_runs_and_ends_with_it() -> None:
    metrics = Metrics()
    metrics.unsaved("ns", "a", datetime.now(UTC) - timedelta(seconds=90))
    assert 90 <= sums(metrics, "finetune_checkpoint_age_seconds") < 120
    metrics.unsaved("ns", "a", None)
    assert "finetune_checkpoint_age_seconds{" not in metrics.render().decode()
    metrics.unsaved("ns", "a", datetime.now(UTC))
    metrics.forget("ns", "a")
    assert "finetune_checkpoint_age_seconds{" not in metrics.render().decode()
