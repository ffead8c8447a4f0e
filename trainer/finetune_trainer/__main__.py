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
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        # Only a flag: the loop looks at it between steps, where the state is whole.
        signal.signal(number, lambda *_: stopping.set())
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
