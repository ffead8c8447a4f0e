"""Kills at every operation of a store: a process of its own saves checkpoints, and is gone by SIGKILL before or after the n-th one.

Processes are forked from the test's own, which has imported everything: a kill costs milliseconds.
"""

import json
import os
import signal
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm.std import TqdmDefaultWriteLock, tqdm

from finetune_trainer.checkpoint import Checkpoint, Checkpoints
from finetune_trainer.lineage import Lineage
from finetune_trainer.store import Store

OPERATIONS = ("put", "put_if_absent", "get", "upload", "download", "list", "entries", "copy", "delete", "discard_unfinished")

# A progress bar's own lock is one semaphore of all forked processes: one that dies with it held would stop every other. Each of tqdm's
# classes would make that of its own, unless the first has another; and the thread that looks after bars could hold it at a fork.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0


class Dying:
    """A store as it is, whose process dies at operation `at` (from 0), before it is done or after."""

    def __init__(self, store: Store, at: int | None = None, *, after: bool = False) -> None:
        self._store, self._at, self._after = store, at, after
        self.count = 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if name not in OPERATIONS:
            return found

        def operation(*args: Any, **kwargs: Any) -> Any:
            mine, self.count = self.count == self._at, self.count + 1
            if mine and not self._after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = found(*args, **kwargs)
            if mine:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return operation


def in_a_process(do: Callable[[], None]) -> int:
    """Forks; the exit code, negative for a signal."""
    assert not hasattr(TqdmDefaultWriteLock, "mp_lock"), "a progress bar began before this module was there: see above"
    if (pid := os.fork()) == 0:
        code = 1
        try:
            do()
            code = 0
        except BaseException:  # noqa: BLE001  (told, and the exit code says it)
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def stage(folder: Path, step: int) -> None:
    (folder / "model").mkdir(parents=True)
    (folder / "model/weights").write_bytes(step.to_bytes(4, "big") * 64)
    (folder / "state.json").write_text(json.dumps({"step": step}))


def whole(folder: Path, step: int) -> bool:
    """Whether a restored folder is what `stage` wrote."""
    told = json.loads((folder / "state.json").read_text()) == {"step": step}
    return told and (folder / "model/weights").read_bytes() == step.to_bytes(4, "big") * 64


def execution(store: Any, scratch: Path, *, log: Callable[[str], None] = lambda _: None) -> Checkpoints:
    return Checkpoints(store, scratch, Lineage("d" * 64), keep_last=2, overwrite=False, log=log)


def train(store: Any, scratch: Path, durable: Path, steps: int) -> None:
    """Goes on from what is there, and saves every step up to `steps`, each second one the best; `durable` is told each that is committed."""
    checkpoints = execution(store, scratch)
    restored = checkpoints.restore()
    begun = restored[0].step if restored else 0
    checkpoints.begin(begun)
    checkpoints.best = restored[0].manifest["best"] if restored else None

    def done(checkpoint: Checkpoint) -> None:
        with durable.open("a") as file:
            file.write(f"{checkpoint.step}\n")

    for step in range(begun + 1, steps + 1):
        if step % 2:
            checkpoints.best = checkpoints.name(step)
        checkpoints.save(step, lambda step=step: lambda folder: stage(folder, step), done)  # type: ignore[misc]
        checkpoints.wait()


def survives(opened: Callable[[], Store], folder: Path, at: int, *, after: bool, steps: int = 4) -> bool:
    """Dies at that operation of a training; another one goes on. False where there is no such operation. Raises AssertionError.

    Each process opens the store itself: they must not share connections.
    """
    durable = folder / "durable"
    durable.write_text("")
    code = in_a_process(lambda: train(Dying(opened(), at, after=after), folder / "first", durable, steps))
    if code == 0:
        return False
    assert code == -signal.SIGKILL, code
    committed = [int(line) for line in durable.read_text().split()]
    lines: list[str] = []
    restored = execution(opened(), folder / "reader", log=lines.append).restore()
    assert (restored[0].step if restored else 0) >= max(committed, default=0), (at, after, lines)
    assert restored is None or whole(restored[1], restored[0].step)
    assert in_a_process(lambda: train(opened(), folder / "second", durable, steps + 1)) == 0
    last = execution(opened(), folder / "last").restore()
    assert last is not None
    assert last[0].step == steps + 1
    assert whole(last[1], steps + 1)
    return True
