"""What the trainer tells: it fits where it is kept, and no length of words makes it fail."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from finetune_api.report import MAX_REFUSED, MAX_TERMINATION_BYTES, EndReport, Outcome, ProgressReport, Refused, Saving


def refused(message: str) -> list[Refused]:
    return [Refused(checkpoint=f"step-{step:08d}-0001", message=message) for step in range(MAX_REFUSED)]


@pytest.mark.parametrize("message", ["m" * 1000, "\x01" * 1000, "ä" * 1000])
def test_a_termination_message_with_many_refused_checkpoints_fits_and_keeps_some(message: str) -> None:
    end = EndReport(
        outcome=Outcome.FAILED, reason="NonFiniteLoss", message="why", corrupt=refused(message), saving=Saving(saves=3)
    )
    text = end.to_message()
    assert len(text.encode()) <= MAX_TERMINATION_BYTES
    read = EndReport.model_validate_json(text)
    assert (read.message, read.saving) == ("why", Saving(saves=3))
    assert read.corrupt == end.corrupt[: len(read.corrupt)] != []


def test_long_words_are_cut_and_what_is_new_is_ignored() -> None:
    body = {"corrupt": [{"checkpoint": "step-1", "message": "x" * 999, "file": "f"}], "saving": {"saves": 2, "queued": 1}}
    report = ProgressReport.model_validate(body)
    assert [len(r.message) for r in report.corrupt] == [256]
    assert report.saving == Saving(saves=2)
    assert json.loads(report.model_dump_json(by_alias=True, exclude_none=True))["saving"]["blockingSeconds"] == 0.0


@pytest.mark.parametrize(
    "bad",
    [
        {"saving": {"saves": -1}},
        {"saving": {"blockingSeconds": -0.1}},
        {"saving": {"uploadedBytes": 2**63}},
        {"corrupt": [{"checkpoint": "a", "message": "m"}] * (MAX_REFUSED + 1)},
    ],
)
def test_what_no_trainer_of_ours_says_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ProgressReport.model_validate(bad)
