"""An accelerator whose memory holds so many rows and no more, without an accelerator: hooks on the model's modules raise what torch raises.

`python -m support.out_of_memory` is the trainer with such a memory: ROWS_THAT_FIT, in the process whose rank is FULL_RANK, or all.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def rows_that_fit(limit: int, *, training: bool = True, backward: bool = False) -> Iterator[list[int]]:
    """Within, a pass in training mode (or in evaluation) over more rows fails, half way. Gives the numbers of rows that were tried."""
    tried: list[int] = []

    def check(rows: int) -> None:
        if rows > limit:
            raise torch.OutOfMemoryError("CUDA out of memory (a test's)")

    def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        # Behind a part of the layer: dropout has been drawn, and on the way back gradients of upper layers are there.
        if not type(module).__name__.endswith("SelfOutput") or module.training is not training:
            return
        tried.append(len(args[0]))
        if backward and args[0].requires_grad:
            args[0].register_hook(lambda grad: check(len(grad)))
        else:
            check(len(args[0]))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        yield tried
    finally:
        handle.remove()


if __name__ == "__main__":
    from finetune_trainer.__main__ import end, main

    full = os.environ.get("FULL_RANK", os.environ["RANK"]) == os.environ["RANK"]
    with rows_that_fit(
        int(os.environ["ROWS_THAT_FIT"]) if full else 10**6, training=os.environ.get("IN", "training") == "training"
    ):
        end(main())
