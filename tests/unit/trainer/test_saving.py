"""When a training is saved: the recipe's policy, the clock, and an upload that is still on its way."""

import itertools
import threading
from dataclasses import replace
from typing import Any

import pytest
from checkpoint_kit import Place, stage
from trainer_kit import Job, ScriptedConsole

from finetune_api.recipe import CheckpointPolicy, WhenBusy
from finetune_trainer import saving
from finetune_trainer.checkpoint import Checkpoints
from finetune_trainer.dist import ALONE
from finetune_trainer.saving import Saves


def saves(checkpoints: Checkpoints, **policy: Any) -> Saves:
    return Saves(CheckpointPolicy(**policy), checkpoints, ALONE, lambda *_: None, lambda _: None)


@pytest.mark.parametrize("when_busy", WhenBusy)
def test_a_save_that_is_due_while_one_is_uploading_waits_or_is_skipped(
    place: Place, monkeypatch: pytest.MonkeyPatch, when_busy: WhenBusy
) -> None:
    checkpoints, go_on = place.execution(), threading.Event()
    upload = place.store.upload
    monkeypatch.setattr(place.store, "upload", lambda path, key: (go_on.wait(60), upload(path, key)))
    asked = saves(checkpoints, every_steps=2, when_busy=when_busy)

    def due(step: int, *, must: bool = False) -> bool:
        return asked.due(step, evaluated=False, by_the_clock=False, must=must)

    assert [due(step) for step in (1, 2)] == [False, True]
    checkpoints.save(2, lambda: lambda folder: stage(folder, 2), place._done)
    assert checkpoints.busy
    waits = when_busy is WhenBusy.WAIT
    assert due(4) is waits
    assert due(5, must=True), "the best model is never left out"
    assert checkpoints.saving.skipped == (0 if waits else 1)
    threading.Timer(0.3, go_on.set).start()
    checkpoints.save(6, lambda: lambda folder: stage(folder, 6), place._done)
    assert place.done[0] == 2, "one at a time"
    checkpoints.wait()
    assert place.done == [2, 6]
    assert checkpoints.saving.blocking_seconds >= 0.2


def test_saves_by_the_clock(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by 4 s a step, and 10 s between saves; an epoch has 6 steps, and its end alone saves nothing."""
    now = itertools.count(0, 4)
    monkeypatch.setattr(saving.time, "monotonic", lambda: next(now) / 2)  # it is asked about twice a step
    job.run(checkpoint={"everySeconds": 10, "keepLast": 100}, evaluation={"bestMetric": "loss"})
    by_evaluation = replace(job, home=job.home / "other", runs=[])
    by_evaluation.run(checkpoint={"keepLast": 100})
    assert by_evaluation.steps() == [6, 12, 18]
    assert len(job.steps()) > 4
    assert set(job.steps()) - {6, 12, 18}


def test_the_clock_asks_once(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes 4 s, and a save is due after 24 s: it comes a step later, and the next one 24 s after it."""
    now, step = itertools.count(4, 4), ScriptedConsole.step
    clock = [0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: clock[0])

    def later(console: ScriptedConsole, *of: Any) -> float:
        clock[0] = next(now)
        return step(console, *of)

    monkeypatch.setattr(ScriptedConsole, "step", later)
    changes = {"checkpoint": {"everySeconds": 24, "keepLast": 100}, "evaluation": {"everyEpochs": 6, "bestMetric": "loss"}}
    job.run(**changes, hyperparameters={"epochs": 6})
    assert job.steps() == [8, 16, 24, 32, 36]  # and after the last step, which is evaluated
