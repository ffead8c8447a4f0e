"""The sweep engine: pure functions over records of trials. The same ones decide in the cluster, under `finetune run` and in a replay."""

from functools import cache
from importlib.metadata import version

DECISIONS = 1
"""Grows whenever the same records would lead to another decision. A replay by another engine says so, and not that decisions were wrong."""


@cache
def engine() -> str:
    """What decides: this engine and the sampler's version."""
    return f"{DECISIONS}, Optuna {version('optuna')}"
