"""The few lines that stand between the test cluster and each program it starts: die with the parent, then become the program.

Why it exists: a test run that is killed (SIGKILL, out of memory) can clean up nothing, so the kernel must do it: Linux sends
the signal asked for here when the parent *thread* ends (`processes` starts everything from a thread that lives as long as
the process). It is a script run by an isolated interpreter, because code between fork and exec in a process with threads is
not safe in Python. Arguments: the parent's pid, "keep" or "drop" for LC_CTYPE, then the program and its arguments.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Replaces this process by the program; exits with 127 if it cannot be started, as a shell does."""
    parent, locale, *argv = sys.argv[1:]
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"cannot ask to die with the parent: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != int(parent):  # it died before the line above
        sys.exit("the parent is gone")
    if locale == "drop":  # this interpreter sets it in the C locale; the program gets exactly the environment meant for it
        os.environ.pop("LC_CTYPE", None)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and exec would hand that on
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        print(f"{argv[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(126 if isinstance(error, PermissionError) else 127)


if __name__ == "__main__":
    main()
