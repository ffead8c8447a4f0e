"""`python -m testcluster`: the programs, and a throw-away cluster to play in (`make cluster`, `make cluster-down`)."""

import argparse
import sys

from testcluster import binaries, playground


def _binaries(*, node: bool) -> int:
    for name, path in binaries.ensure([name for name in binaries.PROGRAMS if node or name not in binaries.NODE]).items():
        print(f"{name}: {path}")
    return 0


COMMANDS = {
    "up": lambda: playground.up(node=False),
    "up-node": lambda: playground.up(node=True),
    "down": playground.down,
    "status": playground.status,
    "binaries": lambda: _binaries(node=False),
    "node-binaries": lambda: _binaries(node=True),
    "supervise": playground.supervise,
    "supervise-node": playground.supervise_node,
}


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m testcluster", description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    return COMMANDS[parser.parse_args().command]()


if __name__ == "__main__":
    sys.exit(main())
