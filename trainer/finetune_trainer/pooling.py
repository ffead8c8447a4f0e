"""model.pooling: Mean. A frozen encoder, the mean of its last hidden states, and a linear head: what learns from few examples in no time.

The encoder runs once over all splits (`with_features`); what trains afterwards is the head alone, on rows of features in place of tokens.
To loop.py, layers.py and optim.py the model looks like one of transformers. A checkpoint holds the head; the result also the encoder.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from finetune_trainer.dist import ALONE, Group
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.evaluation import by_row
from finetune_trainer.tasks import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD_FILE = "head.safetensors"


class Answer(NamedTuple):
    """What a model of transformers answers, as far as it is asked for here."""

    logits: torch.Tensor


class Head(nn.Module):
    """Standardised features into a linear layer: (rows, width) to (rows, outputs). Of a regression the output is standardised too.

    So one learning rate does for every encoder and every unit, and a few steps are enough. Features share one scale: with few examples
    the wide directions are the ones to trust. Weights begin at zero: the loss is convex.
    """

    def __init__(self, width: int, outputs: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(outputs, width)), nn.Parameter(torch.zeros(outputs))
        self.center, self.scale = nn.Buffer(torch.zeros(width)), nn.Buffer(torch.ones(1))
        self.output_center, self.output_scale = nn.Buffer(torch.zeros(1)), nn.Buffer(torch.ones(1))
        self.dropout = nn.Dropout(dropout)

    def standardise(self, features: npt.NDArray[np.float32], numbers: npt.NDArray[np.float32] | None = None) -> None:
        """From now on by the mean and deviation of these features, (rows, width), and of a regression's numbers, (rows,)."""
        _set(self.center, self.scale, torch.from_numpy(features))
        if numbers is not None:
            _set(self.output_center, self.output_scale, torch.from_numpy(numbers)[:, None])

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        standard = self.dropout((features - self.center) / self.scale)
        return nn.functional.linear(standard, self.weight, self.bias) * self.output_scale + self.output_center


def _set(center: torch.Tensor, scale: torch.Tensor, values: torch.Tensor) -> None:
    variance, mean = torch.var_mean(values, dim=0, correction=0)
    center.copy_(mean)
    scale.fill_(variance.mean().sqrt() or 1.0)  # 1 where all rows are the same


class MeanPooled(nn.Module):
    """An encoder that does not train, and a head that does."""

    base_model_prefix = "encoder"

    def __init__(self, encoder: "PreTrainedModel", head: Head) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(requires_grad=False).eval()
        self.linear_head = head  # by this name layers.py knows what trains

    @property
    def base_model(self) -> "PreTrainedModel":
        return self.encoder

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.encoder.get_input_embeddings()
        return embeddings

    def train(self, mode: bool = True) -> "MeanPooled":
        super().train(mode)
        self.encoder.eval()
        return self

    def pooled(self, attention_mask: torch.Tensor, **tokens: torch.Tensor) -> torch.Tensor:
        """Mean of the last hidden states of each text's own tokens: (rows, width)."""
        states = self.encoder(attention_mask=attention_mask, **tokens).last_hidden_state
        mask = attention_mask[..., None].to(states.dtype)
        mean: torch.Tensor = (states * mask).sum(dim=1) / mask.sum(dim=1)
        return mean

    def forward(self, features: torch.Tensor | None = None, **tokens: torch.Tensor) -> Answer:
        """Of features (rows, width), or of tokens as the encoder takes them: logits (rows, outputs)."""
        if features is None:
            with torch.no_grad():
                features = self.pooled(**tokens)
        return Answer(self.linear_head(features))


def with_features(
    model: MeanPooled,
    splits: dict[str, Encoded],
    pad: int,
    device: torch.device,
    group: Group = ALONE,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Encoded]:
    """The splits with what the encoder makes of each row, in 32 bits; all processes share the work. `between` is called before each batch."""

    def pooled(batch: dict[str, torch.Tensor], _: torch.Tensor) -> torch.Tensor:
        between()
        return model.pooled(**batch)

    model.eval()
    width = len(model.linear_head.center)
    return {name: replace(split, features=by_row(pooled, width, split, pad, device, group)) for name, split in splits.items()}


# ----------------------------------------------------------------------------------------------------------- files ----
def load_encoder(folder: Path, **options: Any) -> "PreTrainedModel":
    """Raises TrainingFailure where there is no one sequence of states to take the mean of."""
    import transformers

    # What a checkpoint lacks (BERT's pooler, which is not used here) is made up: the same each time, and no other dice are moved.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        encoder = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32, use_safetensors=True, **options
        )
    if encoder.config.is_encoder_decoder:
        message = (
            f"model.pooling: {encoder.config.model_type} is an encoder with a decoder; Mean is for models that are one of them"
        )
        raise TrainingFailure("RecipeInvalid", message)
    return encoder


def load(folder: Path, encoder: "PreTrainedModel", dropout: float = 0.0) -> MeanPooled:
    """The encoder with the head in the folder. Raises OSError, ValueError."""
    try:
        weights = load_file(folder / HEAD_FILE)
        outputs, width = weights["weight"].shape
        head = Head(width, outputs, dropout)
        head.load_state_dict(weights)
    except (KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder / HEAD_FILE} is no head of ours") from error
    return MeanPooled(encoder, head)


def save_head(weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Of all weights of the model, those of the head."""
    folder.mkdir(parents=True, exist_ok=True)
    prefix = "linear_head."
    save_file({name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}, folder / HEAD_FILE)
