"""How to train: the hyperparameters of a recipe. The trainer reads them; defaults and rules stand here and nowhere else."""

from enum import StrEnum
from typing import Annotated, ClassVar, Self

from pydantic import Field, StringConstraints, model_validator
from pydantic.alias_generators import to_camel

from finetune_api.base import Cel, EachOnce, Model
from finetune_api.model_source import Share


class Dropout(Model):
    """Dropout rates by role; each is set on the model's configuration before it is built. Unset keeps the model's own rate."""

    hidden: Share | None = None
    """Rate after embeddings and in residual branches."""
    attention: Share | None = None
    """Rate on attention probabilities."""
    classifier: Share | None = None
    """Rate before the classification head."""


class ScheduleType(StrEnum):
    """How the learning rate moves after warm-up."""

    CONSTANT = "Constant"
    LINEAR = "Linear"
    COSINE = "Cosine"
    COSINE_RESTARTS = "CosineRestarts"
    POLYNOMIAL = "Polynomial"
    INVERSE_SQRT = "InverseSqrt"
    ONE_CYCLE = "OneCycle"
    WARMUP_STABLE_DECAY = "WarmupStableDecay"
    SLANTED_TRIANGULAR = "SlantedTriangular"
    REDUCE_ON_PLATEAU = "ReduceOnPlateau"


class Schedule(Model):
    """The learning-rate schedule."""

    type: ScheduleType = ScheduleType.LINEAR
    """Constant keeps the rate; Linear falls to zero at the last step, Cosine along half a cosine, CosineRestarts along several,
    Polynomial as (1 - t)^power; InverseSqrt falls with the root of the step; OneCycle rises and falls along cosines, from 1/25
    of the peak to 1/250,000; WarmupStableDecay keeps the rate and falls over the last steps; SlantedTriangular rises and falls
    along lines, from 1/32 of the peak and back; ReduceOnPlateau falls when evaluation.bestMetric stands still."""
    warmup: Annotated[float, Field(ge=0, le=10_000_000)] = 0.06
    """Steps over which the rate rises from zero: below 1 a share of all steps, from 1 on a number of steps. OneCycle is usually
    used with 0.3, SlantedTriangular with 0.1."""
    min_factor: Share | None = None
    """Share of the peak below which the rate does not fall. Default 0. For Linear, Cosine, CosineRestarts, Polynomial,
    WarmupStableDecay and ReduceOnPlateau."""
    cycles: Annotated[int, Field(ge=1, le=1000)] | None = None
    """How many half cosines CosineRestarts has. Default 3."""
    power: Annotated[float, Field(gt=0, le=10)] | None = None
    """Exponent of Polynomial. Default 2."""
    decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the steps after warm-up over which WarmupStableDecay falls, at the end. Default 0.2."""
    factor: Annotated[float, Field(gt=0, lt=1)] | None = None
    """What ReduceOnPlateau multiplies the rate with. Default 0.5."""
    patience: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Evaluations in a row without an improvement before ReduceOnPlateau does so. Default 1."""

    defaults: ClassVar[dict[str, float]] = {"min_factor": 0, "cycles": 3, "power": 2, "decay": 0.2, "factor": 0.5, "patience": 1}
    """Of the fields that belong to some types only; they are not stored in objects of other types."""
    only: ClassVar[dict[str, tuple[ScheduleType, ...]]] = {
        "min_factor": (
            ScheduleType.LINEAR,
            ScheduleType.COSINE,
            ScheduleType.COSINE_RESTARTS,
            ScheduleType.POLYNOMIAL,
            ScheduleType.WARMUP_STABLE_DECAY,
            ScheduleType.REDUCE_ON_PLATEAU,
        ),
        "cycles": (ScheduleType.COSINE_RESTARTS,),
        "power": (ScheduleType.POLYNOMIAL,),
        "decay": (ScheduleType.WARMUP_STABLE_DECAY,),
        "factor": (ScheduleType.REDUCE_ON_PLATEAU,),
        "patience": (ScheduleType.REDUCE_ON_PLATEAU,),
    }
    cel: ClassVar[tuple[Cel, ...]] = (
        Cel(
            "self.warmup < 1.0 || self.warmup == double(int(self.warmup))",
            "warmup must be a share below 1 or a whole number of steps",
            ".warmup",
        ),
        *(
            Cel(
                f"!has(self.{to_camel(name)}) || self.type in [{', '.join(repr(t.value) for t in types)}]",
                f"{to_camel(name)} is for {', '.join(types)} only",
                f".{to_camel(name)}",
            )
            for name, types in only.items()
        ),
    )

    @model_validator(mode="after")
    def _whole_steps(self) -> Self:
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError("warmup: must be a share below 1 or a whole number of steps")
        for name, types in self.only.items():
            if getattr(self, name) is not None and self.type not in types:
                raise ValueError(f"{to_camel(name)}: {to_camel(name)} is for {', '.join(types)} only")
        return self

    def value(self, name: str) -> float:
        """Of one of those fields: as given, else its default."""
        given: float | None = getattr(self, name)
        return self.defaults[name] if given is None else given


class Freeze(Model):
    """What does not train."""

    embeddings: bool = False
    """Whether the embeddings are frozen. Saves the memory and time of their gradients, about a fifth of a small model's step."""
    layers: Annotated[int, Field(ge=0, le=1000)] = 0
    """How many of the lowest layers are frozen; more than the model has is an error that names the number."""
    patterns: Annotated[
        list[Annotated[str, StringConstraints(min_length=1, max_length=253)]], Field(max_length=64), EachOnce()
    ] = []
    """Names of parameters to freeze, with * and ? as wildcards, for example "*.LayerNorm.*". One that matches nothing is an
    error. They stay frozen when `unfreeze` is set."""


class Unfreeze(Model):
    """Gradual unfreezing (Howard and Ruder, 2018) of what `freeze` says."""

    every_epochs: Annotated[int, Field(ge=1, le=10000)] = 1
    """After every so many epochs the topmost frozen layer thaws; the embeddings come last."""


class AdversarialMethod(StrEnum):
    """How the adversarial example is made."""

    FGM = "FGM"


class Adversarial(Model):
    """Adversarial training on the word embeddings: each step also trains on the batch moved against its gradient."""

    method: AdversarialMethod = AdversarialMethod.FGM
    """FGM (Miyato et al., 2017): one move along the gradient, of length epsilon. Doubles the time of a step."""
    epsilon: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Length of the move, in the L2 norm of all word embeddings."""


class Precision(StrEnum):
    """Number format of the forward and backward pass. Weights and the optimizer stay in 32 bits."""

    AUTO = "Auto"
    FP32 = "FP32"
    BF16 = "BF16"
    FP16 = "FP16"


class Strategy(StrEnum):
    """How several processes share a model."""

    AUTO = "Auto"
    DDP = "DDP"
    FSDP = "FSDP"


class EarlyStopping(Model):
    """Ends training when the metric evaluation.bestMetric no longer improves."""

    patience: Annotated[int, Field(ge=1, le=1000)] = 3
    """Evaluations in a row without an improvement before training ends."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Smallest change that counts as an improvement, in units of the metric."""


class Hyperparameters(Model):
    """How to train. The optimizer is AdamW (Loshchilov and Hutter, 2019) with beta (0.9, 0.999)."""

    learning_rate: Annotated[float, Field(gt=0, le=10)] | None = None
    """Peak learning rate. Default by model size: 2e-4 below 50M parameters, 5e-5 below 200M, 2e-5 above; with model.lora ten times
    as much; with model.pooling Mean 1e-2. The value used is in result.json."""
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 32
    """Examples per optimizer step, over all processes."""
    micro_batch_size: Annotated[int, Field(ge=1, le=65536)] | None = None
    """Examples that a process computes at once, at most; a step is cut into as many passes as that takes, and its gradient stays that of
    the whole batch. Default: all of the process's share. Where the GPU's memory does not hold them, half as many are tried, down to
    one; the number in use is in result.json."""
    epochs: Annotated[int, Field(ge=1, le=10000)] = 3
    """Passes over the training data, at most."""
    max_steps: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    """Optimizer steps, at most: training ends after them or after the epochs, whichever comes first. The schedule ends there
    too."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.01
    """Decoupled weight decay; biases and normalisation weights are never decayed, and words that no training text has keep
    their vectors."""
    layerwise_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the rate of the layer above that a layer gets; 1 gives all the same. 0.95 is usual, 0.38 is that of Howard and
    Ruder (2018)."""
    freeze: Freeze = Freeze()
    """What does not train."""
    unfreeze: Unfreeze | None = None
    """Thaws frozen layers one after the other; without it they stay frozen."""
    label_smoothing: Share = 0.0
    """Share of the target that is spread over all labels."""
    adversarial: Adversarial | None = None
    """Adversarial training; without it there is none."""
    precision: Precision = Precision.AUTO
    """BF16 and FP16 compute the forward and backward pass in 16 bits (FP16 with a scaled loss, on a GPU only). Auto takes BF16 where the
    hardware has instructions for it, FP16 on older GPUs, FP32 elsewhere; the one used is in result.json."""
    gradient_checkpointing: bool = False
    """Computes activations again in the backward pass: less memory, about a third more time."""
    strategy: Strategy = Strategy.AUTO
    """How several processes share the model; with one process there is nothing to share. DDP: each has all of it. FSDP: weights, gradients
    and optimizer state are cut up among them, for models that do not fit one GPU. Auto is DDP."""
    compile: bool = False
    """Compiles the model for training (torch.compile): faster after some minutes at the start, for long runs. Needs a C compiler in the
    image, which ours has not. A resume then agrees within rounding and not bit for bit."""
    deterministic: bool = False
    """On a GPU: takes only operations that give the same bits each time, so that a resume is bit for bit the run that was never
    interrupted. Costs some speed. CPUs do that anyway."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm when theirs is larger."""
    dropout: Dropout = Dropout()
    """Dropout rates."""
    schedule: Schedule = Schedule()
    """Learning-rate schedule."""
    early_stopping: EarlyStopping | None = None
    """Early stopping; without it all epochs are trained. The best model is restored either way."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 42
    """Seed of head initialisation, batch order and dropout."""

    cel: ClassVar[tuple[Cel, ...]] = (
        Cel(
            "!has(self.unfreeze) || self.freeze.embeddings || self.freeze.layers > 0",
            "unfreeze needs freeze.layers or freeze.embeddings",
            ".unfreeze",
        ),
        Cel("!has(self.adversarial) || !self.freeze.embeddings", "adversarial needs the embeddings to train", ".adversarial"),
        Cel(
            "!has(self.microBatchSize) || self.microBatchSize <= self.batchSize",
            "microBatchSize must not be more than batchSize",
            ".microBatchSize",
        ),
        Cel(
            "self.strategy != 'FSDP' || self.precision != 'FP16'",
            "strategy FSDP computes in BF16 or FP32, not in FP16",
            ".strategy",
        ),
        Cel(
            "!(self.compile && self.deterministic)",
            "compile cannot give the same bits each time: set compile or deterministic, not both",
            ".compile",
        ),
    )
    rounding: ClassVar[set[str]] = {"micro_batch_size", "strategy", "compile", "deterministic"}
    """Decide how the same weights are computed, up to rounding: a training goes on when they change."""

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.unfreeze and not (self.freeze.embeddings or self.freeze.layers):
            raise ValueError("unfreeze: unfreeze needs freeze.layers or freeze.embeddings")
        if self.adversarial and self.freeze.embeddings:
            raise ValueError("adversarial: adversarial needs the embeddings to train")
        if self.micro_batch_size and self.micro_batch_size > self.batch_size:
            raise ValueError("microBatchSize: microBatchSize must not be more than batchSize")
        if self.strategy is Strategy.FSDP and self.precision is Precision.FP16:
            raise ValueError("strategy: strategy FSDP computes in BF16 or FP32, not in FP16")
        if self.compile and self.deterministic:
            raise ValueError("compile: compile cannot give the same bits each time: set compile or deterministic, not both")
        return self
