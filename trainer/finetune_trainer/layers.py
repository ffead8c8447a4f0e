"""Where the layers of a model are, and which of them train: freezing, gradual unfreezing, and the depth that layer-wise rates need.

Architectures name their parts differently; three facts hold for all of them. The stack of layers is the largest list of modules in
the body; what turns ids into vectors has "embed" in its name (GPT-2: wte, wpe) or holds the input embeddings; the head is what is
not in the body.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import nn

from finetune_api.hyperparameters import Hyperparameters
from finetune_trainer.errors import TrainingFailure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDINGS = 0
"""Depth of the embeddings; layers follow from 1, and what comes after them (final norms, pooler, head) has the depth behind the last."""


@dataclass(frozen=True)
class Parts:
    """Depth of each parameter by name, and how many layers there are."""

    depth: dict[str, int]
    layers: int
    stack: str
    """Name of the list of layers."""

    @property
    def top(self) -> int:
        return self.layers + 1


def parts(model: "PreTrainedModel") -> Parts:
    """The parts of this model."""
    prefix = f"{model.base_model_prefix}."
    body = model.base_model
    stack, length = _stack(body)
    stack = f"{prefix if body is not model else ''}{stack}"
    embeddings = _embeddings(model)
    depth: dict[str, int] = {}
    for name, _ in model.named_parameters():
        if length and name.startswith(f"{stack}."):
            depth[name] = 1 + int(name[len(stack) + 1 :].split(".")[0])
        elif name.startswith(embeddings) or _embeds(name):
            depth[name] = EMBEDDINGS
        else:
            depth[name] = length + 1
    return Parts(depth, length, stack)


def _stack(body: nn.Module) -> tuple[str, int]:
    """Path and length of the largest list of modules; an architecture that shares one layer (ALBERT) has one."""
    lists = [(name, module) for name, module in body.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        return "", 0
    name, found = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return name, len(found)


def _embeddings(model: "PreTrainedModel") -> str:
    """The name before the parameters of the module that holds the input embeddings."""
    path = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    parent = path.rpartition(".")[0]
    # Where they lie directly in the body, the body's other parts are no embeddings.
    return f"{parent}." if _embeds(parent) else f"{path}."


def _embeds(name: str) -> bool:
    words = name.split(".")
    return any("embed" in word or word in ("wte", "wpe") for word in words)


# --------------------------------------------------------------------------------------------------------- freezing ----
def check(model: "PreTrainedModel", hyperparameters: Hyperparameters) -> None:
    """RecipeInvalid where the model has no such layers or names."""
    freeze, names = hyperparameters.freeze, [name for name, _ in model.named_parameters()]
    found = parts(model)
    if freeze.layers > found.layers:
        raise TrainingFailure(
            "RecipeInvalid", f"hyperparameters.freeze.layers: {freeze.layers} is more than the model's {found.layers} layers"
        )
    for pattern in freeze.patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            some = ", ".join([*names[:3], *names[-2:]])
            raise TrainingFailure(
                "RecipeInvalid", f"hyperparameters.freeze.patterns: no parameter is named {pattern!r}; they are: {some}, ..."
            )
    if not any(trainable(model, hyperparameters, epoch=0).values()):
        raise TrainingFailure("RecipeInvalid", "hyperparameters.freeze: nothing is left to train")


def of_addition(name: str) -> bool:
    """Whether a parameter belongs to what trains beside a model that does not: an adapter or the copy of the head that trains with it
    (adapters.py), or the head on a frozen encoder (pooling.py)."""
    return ".lora_" in name or ".modules_to_save." in name or name.startswith("linear_head.")


def trainable(model: "PreTrainedModel", hyperparameters: Hyperparameters, epoch: int) -> dict[str, bool]:
    """Whether each parameter trains in this epoch. A pure function of the recipe and the epoch: a resume needs no state.

    Gradual unfreezing (Howard and Ruder, 2018): the topmost frozen layer first, the embeddings last; patterns stay frozen.
    """
    freeze, found = hyperparameters.freeze, parts(model)
    frozen = [EMBEDDINGS] * freeze.embeddings + list(range(1, freeze.layers + 1))
    if hyperparameters.unfreeze is not None:
        thawed = epoch // hyperparameters.unfreeze.every_epochs
        frozen = frozen[: max(0, len(frozen) - thawed)]
    added = any(of_addition(name) for name in found.depth)
    return {
        name: depth not in frozen
        and not any(fnmatchcase(name, pattern) for pattern in freeze.patterns)
        and (not added or of_addition(name))
        for name, depth in found.depth.items()
    }


def set_trainable(model: "PreTrainedModel", hyperparameters: Hyperparameters, epoch: int) -> bool:
    """Freezes and unfreezes; whether that changed anything."""
    wanted = trainable(model, hyperparameters, epoch)
    changed = [(p, wanted[name]) for name, p in model.named_parameters() if p.requires_grad != wanted[name]]
    for parameter, value in changed:
        parameter.requires_grad_(value)
        if not value:
            parameter.grad = None
    return bool(changed)


def groups(model: "PreTrainedModel", hyperparameters: Hyperparameters) -> Iterator[dict[str, object]]:
    """Parameter groups for an optimizer: by depth, with vectors (biases, normalisation) not decayed. `scale` is the share of the rate.

    All parameters, also frozen ones: they are skipped as long as they have no gradient, and are there when they thaw.
    """
    found = parts(model)
    sets: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        level = found.depth[name] if hyperparameters.layerwise_decay != 1 else found.top
        sets.setdefault((level, parameter.ndim >= 2), []).append(parameter)
    for (level, decayed), members in sorted(sets.items(), key=lambda item: (-item[0][0], not item[0][1])):
        yield {
            "params": members,
            "weight_decay": hyperparameters.weight_decay if decayed else 0.0,
            "scale": hyperparameters.layerwise_decay ** (found.top - level),
        }
