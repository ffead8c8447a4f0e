"""Becomes a trainer that dies with the process that started it: `python sweep_child.py PARENT ours|theirs COMMAND...`.

A local sweep that is killed must not leave trainers behind, or the next one would train the same trials beside them. The kernel sees to that
(prctl(2), PR_SET_PDEATHSIG). Set here and not between fork and exec of the sweep's process, where a thread of it may hold any lock.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
CANNOT_START = 127


def main(parent: int, whose: str, command: list[str]) -> int:
    """Does not return where the command can be started."""
    if whose == "ours":
        # Until it has its own handlers a SIGTERM would end it unsaved. A script of the user's might never get one: it keeps the default.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            return 1  # it died before it could be said
    try:
        os.execvp(command[0], command)  # noqa: S606  (the user's own command)
    except OSError as error:
        sys.stderr.write(f"{command[0]} cannot be started: {error.strerror}\n")
        return CANNOT_START


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
