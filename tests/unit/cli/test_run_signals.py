"""`finetune run` is asked to end while it starts the trainer, and the trainer while it is asked already: none is lost, none is in the way."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune_cli import run

TRAINER = """
import signal, sys, time
time.sleep(0.5)  # imports
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: sys.exit(20))
signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))
time.sleep(10)
"""


@pytest.mark.parametrize("whom", ["the command", "the trainer", "both"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_while_the_trainer_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whom: str, number: signal.Signals
) -> None:
    popen = subprocess.Popen

    def started(*arguments: Any, **more: Any) -> "subprocess.Popen[bytes]":
        process = popen(*arguments, **more)
        if whom != "the command":
            os.kill(process.pid, number)
        if whom != "the trainer":
            os.kill(os.getpid(), number)
        return process

    monkeypatch.setattr(subprocess, "Popen", started)
    lock = os.open(tmp_path, os.O_RDONLY)
    before = signal.getsignal(signal.SIGINT), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert run._train([sys.executable, "-c", TRAINER], {}, lock, tmp_path / "log", ours=True) == 20
    os.close(lock)
    assert (signal.getsignal(signal.SIGINT), signal.pthread_sigmask(signal.SIG_BLOCK, ())) == before


NESTED = """
import os, signal, sys, threading, types
from finetune_trainer import __main__ as trainer

class Interrupted(threading.Event):
    def set(self):
        with self._cond:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            self._flag = True

def run(stopping):
    os.kill(os.getpid(), signal.SIGTERM)
    return 20 if stopping.is_set() else 1

threading.Event = Interrupted
sys.modules["finetune_trainer.process"] = types.SimpleNamespace(run=run)
sys.exit(trainer.main())
"""


def test_a_second_signal_within_the_first_changes_nothing() -> None:
    # It waited for the lock of the flag that the first one was setting: for ever.
    assert subprocess.run([sys.executable, "-c", NESTED], timeout=60).returncode == 20
