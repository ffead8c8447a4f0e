"""The pretrained model, and what is put on it. A part of the recipe."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field, StringConstraints

from finetune_api.base import EachOnce, Model, Shape

HUB_NAME = r"hf://[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*(@[A-Za-z0-9._/-]+)?"
MODEL_URI = rf"^({HUB_NAME}|s3://[a-z0-9][a-z0-9.-]{{1,61}}[a-z0-9]/.+|file:///.+)$"

Share = Annotated[float, Field(ge=0, lt=1)]
ModelUri = Annotated[
    str,
    StringConstraints(max_length=1024),
    Shape(MODEL_URI, "must be hf://org/name[@revision], s3://bucket/prefix or file:///path"),
]


class Pooling(StrEnum):
    """How one vector is made of a text's tokens."""

    AUTO = "Auto"
    MEAN = "Mean"


class Lora(Model):
    """Low-rank adapters (Hu et al., 2021): the pretrained weights stay, small matrices beside them train, and the head."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of the matrices."""
    alpha: Annotated[int, Field(ge=1, le=4096)] = 32
    """The adapters' output is multiplied with alpha/rank."""
    dropout: Share = 0.0
    """Dropout rate before the adapters."""
    target_modules: (
        Annotated[
            list[Annotated[str, StringConstraints(min_length=1, max_length=253)]], Field(min_length=1, max_length=64), EachOnce()
        ]
        | None
    ) = None
    """Ends of the names of the linear modules that get an adapter, for example q_proj. Default: all linear modules of all
    layers."""
    merge: bool = True
    """true: the adapters are added to the weights at the end and the result is a whole stock model. false: model/ holds the adapter
    alone, as peft has it."""


class ModelSource(Model):
    """The pretrained model to start from."""

    uri: ModelUri
    """Where the model is: hf://org/name[@revision], s3://bucket/prefix or file:///path (a path inside the pod). hf:// looks
    first in the mirror (FINETUNE_MODEL_MIRROR: folders org/name/, and org/name@revision/ where a revision is given), then at the hub."""
    pooling: Pooling = Pooling.AUTO
    """Auto is the architecture's own head, and the result is a stock model. Mean is for few examples or little time: the encoder does not
    train, its last hidden states are averaged over each text once, and a linear head learns from them. model/ is then the
    encoder, as it was, with head.safetensors beside it. For SequenceClassification and Regression."""
    lora: Lora | None = None
    """Train low-rank adapters instead of the weights."""

    @property
    def partly_saved(self) -> bool:
        """Whether a checkpoint holds only what trains, and the rest is fetched again."""
        return self.lora is not None or self.pooling is Pooling.MEAN
