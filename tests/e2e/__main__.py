"""`python -m e2e PATHS`: prepares the cluster (world.py) and runs pytest in it, once for tests that run side by side and once for the others.

Trainers spend most of a test's time with their start and with waiting, so a few tests at once need hardly more time than one. Those marked
`alone` change what all tests share: the operator's release, its rights, the node.
"""

import subprocess
import sys

import pytest

from e2e.world import world

AT_ONCE = 3


def main() -> int:
    """The first exit code that tells of a failure."""
    with world() as made:
        made.fill()
        made.install()
        made.to_environment()
        run = [sys.executable, "-m", "pytest", *sys.argv[1:]]
        shared = subprocess.run([*run, "-m", "not alone", f"--numprocesses={AT_ONCE}"], check=False).returncode
        alone = subprocess.run([*run, "-m", "alone"], check=False).returncode
    codes = [code for code in (shared, alone) if code != pytest.ExitCode.NO_TESTS_COLLECTED]
    return next((code for code in codes if code), 0) if codes else int(pytest.ExitCode.NO_TESTS_COLLECTED)


if __name__ == "__main__":
    sys.exit(main())
