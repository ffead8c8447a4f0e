"""The sweep engine: pure functions over records of trials. The same ones decide in the cluster, under `finetune run` and in a replay."""

from functools import cache
from importlib.metadata import version

DECISIONS = 2
"""Grows whenever the same records would lead to another decision. A replay by another engine says so, and not that decisions were wrong."""
LIBRARIES = ("optuna", "scipy", "numpy")
"""What it draws and computes with."""


@cache
def engine() -> str:
    """What decides: this engine, and the versions of its libraries."""
    return ", ".join((str(DECISIONS), *(f"{name} {version(name)}" for name in LIBRARIES)))
