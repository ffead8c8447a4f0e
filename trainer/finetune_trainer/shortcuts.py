"""Work inside a stock model that nobody reads, left out; and random numbers for dropout made four at a time.

model.py builds the stock model and calls `take`. Weights, their names and what is saved stay as they are. With dropout off, logits and
gradients are those of the stock model; with dropout on, other random numbers of the same distribution are drawn.

Why, and what it brings: docs/adr/0012.
"""

from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FIRST_TOKEN_READERS = ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra", "Ernie")
"""Families whose classifiers read the first token's last state and nothing else, with BERT's layer."""
ATTENTION = "finetune_dropout"


def take(model: "PreTrainedModel", *, attention_dropout: bool) -> None:
    """Whatever fits this model and this machine."""
    _narrow_last_layer(model)
    if not torch.cuda.is_available():  # an accelerator draws its random numbers in parallel
        for module in model.modules():
            if type(module) is nn.Dropout:
                module.__class__ = Dropout
        if attention_dropout and model.config._attn_implementation == "sdpa":
            _register_attention()
            model.set_attn_implementation(ATTENTION)


# ------------------------------------------------------------------------------------------------------- last layer ----
def _narrow_last_layer(model: "PreTrainedModel") -> None:
    """The last layer's queries, and all that follows them, for the first token alone; keys and values are of all tokens."""
    family = type(model).__name__.removesuffix("ForSequenceClassification")
    if family not in FIRST_TOKEN_READERS or not type(model).__name__.endswith("ForSequenceClassification"):
        return
    layer = model.base_model.encoder.layer[-1]
    if not model.config.is_decoder:
        layer.forward = MethodType(_first_token, layer)


def _first_token(layer: Any, hidden: torch.Tensor, mask: torch.Tensor | None = None, *_: Any, **__: Any) -> torch.Tensor:
    """BERT's layer from (rows, tokens, width) to (rows, 1, width)."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.bert.modeling_bert import eager_attention_forward

    of = layer.attention.self
    first = hidden[:, :1]

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), -1, of.num_attention_heads, of.attention_head_size).transpose(1, 2)

    attend = ALL_ATTENTION_FUNCTIONS.get_interface(of.config._attn_implementation, eager_attention_forward)
    context, _ = attend(
        of,
        heads(of.query(first)),
        heads(of.key(hidden)),
        heads(of.value(hidden)),
        None if mask is None else mask[:, :, :1],
        dropout=of.dropout.p if of.training else 0.0,
        scaling=of.scaling,
    )
    attended = layer.attention.output(context.reshape(first.shape), first)
    out: torch.Tensor = layer.feed_forward_chunk(attended)
    return out


# ---------------------------------------------------------------------------------------------------------- dropout ----
class Dropout(nn.Dropout):
    """PyTorch's, with cheaper random numbers. Its rate is exact to 1/65536."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dropped(x, self.p) if self.training else x


def dropped(x: torch.Tensor, rate: float) -> torch.Tensor:
    """Each element 0 with probability `rate`, else divided by 1 - rate.

    One draw of 64 bits serves four elements; torch's bernoulli_ makes one draw for each, one after the other: 8 % of a step.
    """
    if rate == 0 or x.device.type != "cpu":
        return nn.functional.dropout(x, rate)
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[: x.numel()]
    kept = bits.view(x.shape) >= round(rate * 2**16) - 2**15
    return x * kept.to(x.dtype).mul_(1 / (1 - rate))


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of (rows, heads, tokens, width): with dropout PyTorch has no fused kernel for CPUs, and its plain one looks for masked
    rows and scales query and key apart."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    unusual = any(value is not None for name, value in more.items() if name in ("position_bias", "softcap", "s_aux", "cache"))
    if dropout == 0 or unusual or key.shape[1] != query.shape[1]:
        out, _ = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **more)
        return out, None
    scores = (query * (query.shape[-1] ** -0.5 if scaling is None else scaling)) @ key.transpose(2, 3)
    scores = scores if mask is None else scores + mask
    weights = dropped(torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype), dropout)
    return (weights @ value).transpose(1, 2).contiguous(), None


def _register_attention() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, eager_mask)
