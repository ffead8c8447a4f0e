"""kill -9 anywhere: at every operation of a store while checkpoints are saved and deleted, and at every step of a training."""

import itertools
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from test_resume import EVERY_STEP, same
from trainer_kit import Job, ScriptedConsole

from finetune_trainer.run import Run
from finetune_trainer.store import FolderStore
from support.crashes import in_a_process, survives


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_death_at_any_operation_loses_nothing_durable(tmp_path: Path, *, after: bool) -> None:
    for at in itertools.count():
        folder = tmp_path / str(at)
        folder.mkdir()
        if not survives(lambda folder=folder: FolderStore(folder / "store"), folder, at, after=after):
            break
    assert at > 50, "operations that it died at"


class _Kills(ScriptedConsole):
    """Dies right after a step's arithmetic, or a later one where the run went on from there."""

    def step(self, step: int, total: int, loss: float, rate: float) -> float:
        if step >= min(self.at):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(step, total, loss, rate)


def test_a_death_at_every_step_changes_nothing(job: Job) -> None:
    """One run after the other, each killed at its step: 42 steps, the same bits as without any."""
    changes = {**EVERY_STEP, "hyperparameters": {"epochs": 7}}
    whole, cut = (replace(job, home=job.home / name, changes=changes, runs=[]) for name in ("whole", "cut"))
    assert whole.run().step == 42
    nothing: Callable[[], None] = lambda: None  # noqa: E731

    def killed(step: int) -> None:
        Run(cut.recipe(), cut.runtime(), threading.Event(), console=_Kills({step: nothing}))()

    for step in range(1, 43):
        assert in_a_process(lambda step=step: killed(step)) == -signal.SIGKILL, step  # type: ignore[misc]
    assert not (cut.output / "result.json").exists()
    cut.run()
    assert len(list((cut.checkpoints / "executions").iterdir())) == 43
    same(whole, cut)
