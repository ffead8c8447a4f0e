"""A training of several processes that is asked to end at a moment that a test chooses: `python -m ending_kit`, under torchrun.

Evaluations take several passes of BLOCK rows. The process ENDING_RANK gets a SIGTERM in the pass ENDING_PASS of the evaluation after step
ENDING_STEP; pass 0 is the step itself. SLOW: seconds that an upload takes from then on. What happened when goes to the folder EVENTS.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from finetune_trainer import evaluation, loop
from finetune_trainer.store import FolderStore

BLOCK = 4


class Moment:
    """Calls `then` with pass number `at` of the evaluation after a step; counts the passes of each step's evaluation."""

    def __init__(self, step: int | None, at: int, then: Callable[[], None]) -> None:
        self.step, self.at, self.then = step, at, then
        self.passes: dict[int, int] = {}
        self._now = 0

    def __enter__(self) -> "Moment":
        self._before = evaluation.AT_ONCE, loop.AT_ONCE, loop.Loop._advance
        advance = loop.Loop._advance

        def advanced(running: loop.Loop, rows: int) -> None:
            advance(running, rows)
            self._now = running.state.step
            self._reached(0)

        evaluation.AT_ONCE = loop.AT_ONCE = BLOCK
        loop.Loop._advance = advanced  # type: ignore[method-assign]
        self._hook = torch.nn.modules.module.register_module_forward_pre_hook(self._seen)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        evaluation.AT_ONCE, loop.AT_ONCE, loop.Loop._advance = self._before  # type: ignore[method-assign]

    def _seen(self, module: torch.nn.Module, _: Any) -> None:
        if "ForSequenceClassification" in type(module).__name__ and not module.training:
            self.passes[self._now] = self.passes.get(self._now, 0) + 1
            self._reached(self.passes[self._now])

    def _reached(self, number: int) -> None:
        if (self._now, number) == (self.step, self.at):
            self.then()


def _note(event: str) -> None:
    (Path(os.environ["EVENTS"]) / f"{event}-{os.environ['RANK']}").write_text(str(time.time()))


def _slow_uploads(seconds: float) -> None:
    upload = FolderStore.upload

    def slow(self: FolderStore, path: Path, key: str) -> None:
        if key.endswith("optimizer.safetensors"):
            time.sleep(seconds)
        upload(self, path, key)

    FolderStore.upload = slow  # type: ignore[method-assign]


def _main() -> None:
    from finetune_trainer.__main__ import end, main

    def ask() -> None:
        _note("asked")
        os.kill(os.getpid(), signal.SIGTERM)

    here = os.environ.get("ENDING_RANK") == os.environ["RANK"]
    step, at = (int(os.environ.get(f"ENDING_{what}", "0")) for what in ("STEP", "PASS"))
    if "SLOW" in os.environ:
        _slow_uploads(float(os.environ["SLOW"]))
    with Moment(step if here else None, at, ask):
        code = main()
    _note("ended")
    end(code)


if __name__ == "__main__":
    _main()
