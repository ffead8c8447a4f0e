"""`python -m finetune_trainer`: hears signals first, then imports and runs everything else (process.py).

Imports take a second or more, and a SIGTERM in that time must count: it would end a process, and process 1 of a container, to which the
kernel gives no signal that it has no handler for, would never learn of it and train on until it is killed.
"""

import os
import signal
import sys
import threading
from typing import NoReturn


def main() -> int:
    """The exit code."""
    stopping, signals = threading.Event(), (signal.SIGTERM, signal.SIGINT)

    def heard(*_: object) -> None:
        """Only sets a flag: the loop looks at it between steps, where the state is whole."""
        for number in signals:  # a second one within set(), whose lock is held, would wait for it for ever
            signal.signal(number, signal.SIG_IGN)
        stopping.set()

    for number in signals:
        signal.signal(number, heard)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)  # `finetune run` holds back those that come earlier
    from finetune_trainer.process import run

    return run(stopping)


def end(code: int) -> NoReturn:
    """The process, with this exit code."""
    from finetune_trainer import trackers

    # One of several processes has threads of gloo or NCCL. When the interpreter takes them down in its own order, it now and then aborts,
    # and torchrun would take that for a failure of a training that is done.
    # And a save that did not arrive in time must not hold up the end.
    others = any(
        thread.is_alive() and not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()
    )
    if others or trackers.left_behind() or os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    end(main())
