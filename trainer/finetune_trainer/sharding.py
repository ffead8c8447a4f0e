"""FSDP: each process holds a part of every weight, gradient and optimizer state (Zhao et al., 2023; torch's fully_shard).

Each layer is gathered when it computes; what lies around the layers (embeddings, norms, head) is gathered together. Files know nothing of
it: `whole` puts tensors together before they are saved, `part` cuts those that were read. So one process, several with all of the model
each, and several with a part of it each go on from one another's checkpoints.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from finetune_trainer import layers
from finetune_trainer.dist import Group
from finetune_trainer.errors import TrainingFailure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Weights = dict[str, torch.Tensor]


def place(model: "PreTrainedModel", group: Group, dtype: torch.dtype | None) -> "PreTrainedModel":
    """The model on this process's device, or this process's part of it there: changed in place.

    `dtype` is what autocast computes in. Weights are gathered in it, where autocast would keep a whole copy of them until the backward pass;
    gradients are added up in 32 bits. Raises TrainingFailure(RecipeInvalid).
    """
    device = group.device()
    if not group.sharded:
        return model.to(device)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    _check(model, dtype)
    mesh = init_device_mesh(device.type, (group.size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    if stack := layers.parts(model).stack:
        for layer in model.get_submodule(stack).children():
            fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def _check(model: "PreTrainedModel", dtype: torch.dtype | None) -> None:
    """RecipeInvalid for what would be computed wrongly or not at all."""
    where = "hyperparameters.strategy: FSDP"
    if dtype is torch.float16:
        message = f"{where} computes in BF16 or FP32, and this GPU has no BF16: set precision FP32, or strategy DDP"
        raise TrainingFailure("RecipeInvalid", message)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if scalars := [name for name, p in parameters.items() if p.ndim == 0]:
        raise TrainingFailure("RecipeInvalid", f"{where} cannot cut up {scalars[0]}, which is a single number: use DDP")
    stack = layers.parts(model).stack
    homes: dict[int, set[str]] = {}
    for name, p in parameters.items():
        # The layer, or "" for what lies around them: these are gathered at different times.
        home = name[len(stack) + 1 :].partition(".")[0] if stack and name.startswith(f"{stack}.") else ""
        homes.setdefault(id(p), set()).add(home)
    if shared := [name for name, p in parameters.items() if len(homes[id(p)]) > 1]:
        message = f"{where} cannot cut up {shared[0]}, which is also a weight of another layer: use DDP"
        raise TrainingFailure("RecipeInvalid", message)


def close(model: torch.nn.Module, group: Group) -> None:
    """After a forward pass without a backward pass: what was gathered for it is let go."""
    if group.sharded:
        model.reshard()  # type: ignore[operator]


# ------------------------------------------------------------------------------------------------- whole and in parts ----
def full(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, at every process; to be called by all of them."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(tensors: Mapping[str, torch.Tensor], group: Group) -> Weights:
    """The same tensors, put together in the leader's memory; nothing at the others. To be called by all.

    One tensor with two names (tied weights) stays one.
    """
    if not group.sharded:
        return dict(tensors)
    made: dict[int, torch.Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in made:
            value = full(tensor).detach()
            made[id(tensor)] = value.cpu() if group.leads else value.new_empty(0)  # one after the other: none stays here
    return {name: made[id(tensor)] for name, tensor in tensors.items()} if group.leads else {}


def part(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that it has whole, cut as `like` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or value.ndim == 0:
        return value
    # Without a source, nothing is sent: every process has read the same file.
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
