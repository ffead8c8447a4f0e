"""The progress bar, on a real terminal (a pty): one line that redraws itself, whole lines for whatever else is said."""

import contextlib
import os
import pty
import re
import threading
import time
from collections.abc import Callable

from finetune_trainer.report import Console


def shown(use: Callable[[Console], None]) -> tuple[list[str], str]:
    """What stands on the terminal's lines after it, and all that was written."""
    ours, theirs = pty.openpty()
    read: list[bytes] = []

    def reader() -> None:
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while block := os.read(ours, 4096):
                read.append(block)

    terminal = threading.Thread(target=reader)
    terminal.start()
    with os.fdopen(theirs, "w") as out:
        use(Console(out))
    terminal.join()
    os.close(ours)
    written = b"".join(read).decode()
    lines = [""]
    for part in re.split(r"(\r\n|\r|\033\[K)", written):
        if part == "\r\n":
            lines.append("")
        elif part not in ("\r", "\033[K"):
            lines[-1] = part or lines[-1]  # a return to the beginning of the line; what comes overwrites it
        elif part == "\033[K":
            lines[-1] = ""
    return lines, written


def test_the_bar_redraws_one_line_and_gives_way_to_others() -> None:
    def use(console: Console) -> None:
        assert console.bar
        console.line("data: 3 examples")
        for step in range(1, 4):
            console.step(step, 4, 0.5, 1e-3)
            time.sleep(0.11)
        console.line("step 3: validation  loss 0.4")
        console.step(4, 4, 0.25, 1e-3)

    lines, written = shown(use)
    assert lines[:2] == ["data: 3 examples", "step 3: validation  loss 0.4"]
    assert lines[2:] == ["[########################] step 4/4  loss 0.2500  learning rate 1.00e-03  0:00 left"]
    assert written.count("\n") == 2
    assert "[######..................] step 1/4  loss 0.5000" in written


def test_the_bar_is_drawn_ten_times_a_second_at_most_and_at_the_end() -> None:
    def use(console: Console) -> None:
        for step in range(1, 1001):
            console.step(step, 1000, 0.5, 1e-3)

    began = time.monotonic()
    lines, written = shown(use)
    assert written.count("\r") <= 2 + (time.monotonic() - began) / 0.1
    assert "step 1000/1000" in lines[-1]
