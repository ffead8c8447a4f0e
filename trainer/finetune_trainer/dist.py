"""Several processes that train one model: who this one is, and the few things that all must agree on. For one process all is a no-op.

torchrun starts the processes and tells them RANK, WORLD_SIZE and LOCAL_RANK. Rank 0 leads: it alone reads and writes results, commits
checkpoints and reports progress. What is agreed goes through gloo, so that it needs no accelerator; gradients go through the
accelerator's own library where there is one.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune_api.hyperparameters import Strategy

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Group:
    """All processes of one training, and this one's place in it."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    sharded: bool = False
    """Whether each process holds a part of the model (sharding.py) and not all of it: then a forward pass needs them all."""

    @classmethod
    def join(cls, strategy: Strategy = Strategy.AUTO, env: Mapping[str, str] = os.environ) -> "Group":
        """Waits for the other processes. Without torchrun's variables there are none."""
        size = int(env.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        import torch
        from torch import distributed

        group = cls(int(env["RANK"]), size, int(env.get("LOCAL_RANK", "0")), strategy is Strategy.FSDP)
        if torch.cuda.is_available():
            torch.cuda.set_device(group.device())
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        return group

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def device(self) -> "torch.device":
        """This process's accelerator, or the CPU."""
        import torch

        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def share(self, rows: Any) -> Any:
        """This process's part of a global batch; empty where there are fewer rows than processes."""
        return rows[self.rank :: self.size]

    def most(self, rows: int) -> int:
        """The size of the largest share of so many rows."""
        return -(-rows // self.size)

    @property
    def strategy(self) -> Strategy | None:
        """How the model is shared; None where there is one process."""
        if self.size == 1:
            return None
        return Strategy.FSDP if self.sharded else Strategy.DDP

    def wrap(self, model: "torch.nn.Module") -> "torch.nn.Module":
        """The model to call in training: its gradients are the mean over all processes."""
        if self.strategy is not Strategy.DDP:
            return model
        from torch.nn.parallel import DistributedDataParallel

        warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
        # Not every architecture uses all of its parameters. A static graph would do as well, but its first step after a resume adds up in
        # another order than later ones: with three processes or more the weights would no longer agree bit for bit.
        return DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)

    def sum(self, values: "torch.Tensor") -> "torch.Tensor":
        """In place: the sum over all processes."""
        if self.size > 1:
            from torch import distributed

            distributed.all_reduce(values)
        return values

    def tell(self, value: Any) -> Any:
        """What the leader has, at every process. JSON-like values only."""
        if self.size == 1:
            return value
        from torch import distributed

        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    @contextlib.contextmanager
    def leader_first(self) -> Iterator[None]:
        """Nobody leaves before the leader does, be it with an error: of a pod's processes, torchrun kills those that are still there 30 s
        after the first one has ended unfinished."""
        try:
            yield
        finally:
            with contextlib.suppress(RuntimeError):  # from a process that is gone: it waits for nobody
                self.tell(None)

    def collect(self, values: "torch.Tensor") -> "list[torch.Tensor]":
        """The tensors of all processes, which have one shape, in the order of their ranks."""
        if self.size == 1:
            return [values]
        import torch
        from torch import distributed

        out = [torch.empty_like(values) for _ in range(self.size)]
        distributed.all_gather(out, values)
        return out


ALONE = Group()
