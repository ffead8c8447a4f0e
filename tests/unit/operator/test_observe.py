"""Metrics and logs: the gauge of jobs follows their states, and a JSON log line is one line of JSON."""

import json
import logging

import pytest

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
