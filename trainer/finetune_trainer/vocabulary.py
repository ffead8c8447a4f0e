"""Trains only the rows of the word embeddings that the training data can touch.

A vocabulary has tens of thousands of words, a data set a few thousand of them; the other rows' gradient is always zero. The dense gradient, its
norm, AdamW's moments and their traffic are then most of what the embeddings cost. `narrow` puts the rows that occur in a parameter of their
own, under the name of the old one; for these rows AdamW does what it would have done. The others stay as they were pretrained (AdamW
would have decayed them by its weight decay, the same for every row, whatever the data says).

Why, and what it brings: docs/adr/0012.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from finetune_trainer.layers import trainable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetune_api.hyperparameters import Hyperparameters

WORTHWHILE = 0.5
"""Share of the rows above which there is nothing to gain."""


class NarrowEmbedding(nn.Module):
    """An embedding whose `weight`, (rows that occur, width), trains. Outside training all words are there."""

    def __init__(self, whole: nn.Embedding, used: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(whole.weight.detach()[used])
        self.padding_idx = whole.padding_idx
        place = torch.full((whole.num_embeddings,), -1, device=used.device)
        place[used] = torch.arange(len(used), device=used.device)
        self.register_buffer("used", used, persistent=False)
        self.register_buffer("place", place, persistent=False)
        self.register_buffer("pretrained", whole.weight.detach(), persistent=False)
        # Its gradient is zero, as that of the embedding before.
        self.padding = None if self.padding_idx is None or place[self.padding_idx] < 0 else int(place[self.padding_idx])

    used: torch.Tensor
    place: torch.Tensor
    pretrained: torch.Tensor

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Vectors of token ids: (..., width)."""
        if self.training:  # a word that the training data lacks has no place: an error, not another word's vector
            return nn.functional.embedding(self.place[ids], self.weight, self.padding)
        return nn.functional.embedding(ids, self.whole())

    def whole(self) -> torch.Tensor:
        """All rows, (vocabulary, width), as they are now."""
        self.pretrained[self.used] = self.weight.detach()
        return self.pretrained


def narrow(model: "PreTrainedModel", hyperparameters: "Hyperparameters", ids: npt.NDArray[np.int32], pad: int) -> None:
    """Where it pays, and the embeddings train and are no other part's too. `ids` are all
    of the training data, `pad` is in every batch."""
    whole = model.get_input_embeddings()
    output = model.get_output_embeddings()
    if type(whole) is not nn.Embedding or (output is not None and output.weight is whole.weight):
        return
    path = next(name for name, module in model.named_modules() if module is whole)
    # The last epoch: by then gradual unfreezing has come as far as it comes.
    if not trainable(model, hyperparameters, hyperparameters.epochs - 1)[f"{path}.weight"]:
        return
    used = torch.from_numpy(np.unique(np.append(ids, pad)).astype(np.int64)).to(whole.weight.device)
    if len(used) <= WORTHWHILE * whole.num_embeddings:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, NarrowEmbedding(whole, used))


def narrowed(model: nn.Module) -> Iterator[tuple[str, NarrowEmbedding]]:
    """Those of the model's modules, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, NarrowEmbedding))


def size(model: nn.Module) -> int:
    """How many parameters the model has, words that do not occur included: what follows from it must not depend on the data."""
    hidden = sum(module.pretrained.numel() - module.weight.numel() for _, module in narrowed(model))
    return sum(p.numel() for p in model.parameters()) + hidden


def whole_weights(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict with all rows, as a stock model has them."""
    return state | {f"{name}.weight": module.whole() for name, module in narrowed(model)}
