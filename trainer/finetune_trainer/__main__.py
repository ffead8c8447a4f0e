"""`python -m finetune_trainer`: hears signals first, then imports and runs everything else (process.py).

Imports take a second or more, and a SIGTERM in that time must count: it would end a process, and process 1 of a container, to which the
kernel gives no signal that it has no handler for, would never learn of it and train on until it is killed.
"""

import os
import signal
import sys
import threading


def main() -> int:
    """The exit code."""
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        # Only a flag: the loop looks at it between steps, where the state is whole.
        signal.signal(number, lambda *_: stopping.set())
    from finetune_trainer.process import run

    return run(stopping)


if __name__ == "__main__":
    code = main()
    from finetune_trainer import trackers

    if trackers.left_behind():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
