"""The recipe: what to train. The trainer reads it (as JSON in FINETUNE_JOB) and nothing else of the resource.

Defaults stand here and nowhere else; the API server writes them into stored objects, so that an old object keeps its meaning.
"""

import hashlib
import json
from enum import StrEnum
from typing import Annotated, ClassVar, Self

from pydantic import Field, StringConstraints, model_validator
from pydantic.alias_generators import to_camel

from finetune_api.base import Cel, EachOnce, Model, Shape
from finetune_api.few_shot import PLAIN, FewShot, Prompt
from finetune_api.model_source import HUB_NAME, ModelSource, Pooling, Share
from finetune_api.names import CHECKPOINTS_DIR
from finetune_api.tasks import METRICS, RULES, Metric, Task

DATA_URI = rf"^({HUB_NAME}|s3://[a-z0-9][a-z0-9.-]{{1,61}}[a-z0-9](/.*)?|file:///.+)$"
STORAGE_URI = r"^(s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/.+|file:///.+)$"
DATA_FILE = r"^[A-Za-z0-9_][A-Za-z0-9._/-]*\.(csv|jsonl|parquet)$"

Column = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Label = Annotated[str, StringConstraints(min_length=1, max_length=128)]
DataUri = Annotated[
    str,
    StringConstraints(max_length=1024),
    Shape(DATA_URI, "must be hf://org/name[@revision], s3://bucket/prefix or file:///path"),
]
StorageUri = Annotated[
    str,
    StringConstraints(max_length=1024),
    Shape(STORAGE_URI, "must be s3://bucket/prefix (with a prefix) or file:///path"),
]
DataFile = Annotated[
    str,
    StringConstraints(max_length=253),
    Shape(DATA_FILE, "must be the name of a .csv, .jsonl or .parquet file, relative to dataset.uri"),
]


class MultiLabel(Model):
    """Any number of labels for one text."""

    separator: Annotated[str, StringConstraints(min_length=1, max_length=8)] = "|"
    """What stands between the labels in one field of labelColumn. In jsonl a list of labels does as well."""
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Probability from which on a label is predicted."""


# What a dataset's rules in CEL say of fields that may be absent.
_VALIDATION = "(has(self.validation) ? self.validation : 'validation.csv')"
_OTHER_TEXTS = ", ".join(
    f"has(self.{name}) ? self.{name} : ''" for name in ("textPairColumn", "promptColumn", "completionColumn", "messagesColumn")
)


class Dataset(Model):
    """The labelled examples: csv (with a header line), jsonl (one object per line), both in UTF-8, or parquet."""

    uri: DataUri
    """Folder that holds the files: s3://bucket/prefix, file:///path (a path inside the pod) or hf://org/name[@revision], a data set of
    the hub. hf:// looks first in the mirror (FINETUNE_DATASET_MIRROR), then at the hub."""
    train: DataFile = "train.csv"
    """File to train on, relative to uri."""
    validation: DataFile | None = None
    """File that selects the best model and decides on early stopping, relative to uri. Default validation.csv, unless
    validationFraction is set."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of train that is held out as validation, in place of a file: drawn with hyperparameters.seed, each label in proportion (to
    within one row) where a text has one label."""
    split_group_column: Column | None = None
    """Column of train, for example with a customer's number: rows that agree in it stay on one side of validationFraction. Labels are
    then in proportion as far as groups allow."""
    test: DataFile | None = None
    """File that the final model is scored on, once, relative to uri. Without it there are no test metrics."""
    text_column: Column = "text"
    """Column with the text. For TokenClassification with the words: separated by spaces, or a list in jsonl."""
    text_pair_column: Column | None = None
    """Column with a second text, for tasks about two texts. For SequenceClassification and Regression."""
    label_column: Column = "label"
    """Column with the label; for Regression with a number; for TokenClassification with one tag for each word."""
    labels: Annotated[list[Label], Field(min_length=2, max_length=1000), EachOnce()] | None = None
    """All labels; their order gives their ids. A row with another label is an error that names the row. SequenceClassification
    and TokenClassification need it."""
    group_column: Column | None = None
    """Column with the group of customers or the channel that a row is from. The rows of each group are counted in the log, and nothing
    else is done with it."""
    multi_label: MultiLabel | None = None
    """For SequenceClassification where a text may have several labels, or none."""
    prompt_column: Column | None = None
    """Column with the prompt. CausalLM needs it and completionColumn, or messagesColumn."""
    completion_column: Column | None = None
    """Column with what the model shall write after the prompt; the loss is on these tokens only."""
    messages_column: Column | None = None
    """Column with a chat: a list of objects with role and content, in jsonl. The model's chat template makes the text; the loss is on
    what the assistant says."""
    few_shot: FewShot | None = None
    """Train on a sample of the training data. For SequenceClassification with one label."""
    prompt: Prompt | None = None
    """Make the text that the model reads of several columns, or ask a masked language model. For SequenceClassification and
    Regression."""
    max_length: Annotated[int, Field(ge=8, le=32768)] = 256
    """Longest text in tokens; the rest of a longer text is cut off (the share of cut texts is logged)."""
    max_bad_rows: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """How many rows may be left out, over all files, because they cannot be used (no text, a label that is not listed, broken
    encoding, not as many fields as the header, no JSON). They are logged by line; more of them are an error. What is not valid csv
    counts once for each of its lines."""

    default_validation: ClassVar[str] = "validation.csv"
    cel: ClassVar[tuple[Cel, ...]] = (
        Cel(
            "self.textColumn != self.labelColumn",
            "textColumn and labelColumn must be different columns",
            ".labelColumn",
        ),
        Cel(
            "has(self.promptColumn) == has(self.completionColumn)",
            "promptColumn and completionColumn belong together",
            ".completionColumn",
        ),
        Cel(
            "!(has(self.promptColumn) && has(self.messagesColumn))",
            "set promptColumn and completionColumn or messagesColumn, not both",
            ".messagesColumn",
        ),
        Cel(
            "!(has(self.validation) && has(self.validationFraction))",
            "set validation or validationFraction, not both",
            ".validationFraction",
        ),
        Cel(
            "!has(self.splitGroupColumn) || has(self.validationFraction)",
            "splitGroupColumn needs validationFraction",
            ".splitGroupColumn",
        ),
        Cel(
            f"has(self.validationFraction) || self.train != {_VALIDATION}",
            "train and validation must be different files",
            ".validation",
        ),
        Cel(
            f"!has(self.test) || (self.test != self.train && (has(self.validationFraction) || self.test != {_VALIDATION}))",
            "test must be a different file than train and validation",
            ".test",
        ),
        Cel(
            f"!has(self.groupColumn) || !(self.groupColumn in [self.textColumn, {_OTHER_TEXTS}])",
            "groupColumn must not be a column with texts: its values are logged",
            ".groupColumn",
        ),
        Cel(
            f"!has(self.prompt) || !{PLAIN.format('.prompt')}.contains('{{' + self.labelColumn + '}}')",
            "prompt.template must not hold the column of the label",
            ".prompt",
        ),
        Cel(
            "!has(self.prompt) || !has(self.textPairColumn)",
            "prompt.template can hold both columns: leave textPairColumn out",
            ".textPairColumn",
        ),
        Cel(
            "!has(self.prompt) || !has(self.prompt.verbalizers) || (has(self.labels) && size(self.labels) == size(self.prompt.verbalizers)"
            " && self.labels.all(label, label in self.prompt.verbalizers))",
            "prompt.verbalizers must have a word for each of dataset.labels and no other",
            ".prompt",
        ),
    )

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if self.text_column == self.label_column:
            raise ValueError("labelColumn: textColumn and labelColumn must be different columns")
        if (self.prompt_column is None) != (self.completion_column is None):
            raise ValueError("completionColumn: promptColumn and completionColumn belong together")
        if self.prompt_column is not None and self.messages_column is not None:
            raise ValueError("messagesColumn: set promptColumn and completionColumn or messagesColumn, not both")
        self._check_files()
        texts = (self.text_column, self.text_pair_column, self.prompt_column, self.completion_column, self.messages_column)
        if self.group_column is not None and self.group_column in texts:
            raise ValueError("groupColumn: groupColumn must not be a column with texts: its values are logged")
        if self.prompt is not None:
            self._fits_the_prompt(self.prompt)
        return self

    def _check_files(self) -> None:
        if self.validation is not None and self.validation_fraction is not None:
            raise ValueError("validationFraction: set validation or validationFraction, not both")
        if self.split_group_column is not None and self.validation_fraction is None:
            raise ValueError("splitGroupColumn: splitGroupColumn needs validationFraction")
        if self.train == self.validation_file:
            raise ValueError("validation: train and validation must be different files")
        if self.test is not None and self.test in (self.train, self.validation_file):
            raise ValueError("test: test must be a different file than train and validation")

    @property
    def validation_file(self) -> str | None:
        """None: validation is held out of train."""
        return None if self.validation_fraction is not None else self.validation or self.default_validation

    def _fits_the_prompt(self, prompt: Prompt) -> None:
        if self.label_column in prompt.columns:
            raise ValueError("prompt: prompt.template must not hold the column of the label")
        if self.text_pair_column is not None:
            raise ValueError("textPairColumn: prompt.template can hold both columns: leave textPairColumn out")
        if prompt.verbalizers is not None and set(prompt.verbalizers) != set(self.labels or []):
            raise ValueError("prompt: prompt.verbalizers must have a word for each of dataset.labels and no other")


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


class EvaluationPolicy(Model):
    """When to evaluate on the validation data, and what decides."""

    every_epochs: Annotated[int, Field(ge=1, le=10000)] | None = None
    """Evaluate after every so many epochs. Default 1, unless everySteps is set."""
    every_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Evaluate after every so many optimizer steps (and at the end)."""
    best_metric: Metric | None = None
    """Metric that selects the best model and drives early stopping. Default: macro_f1 for SequenceClassification, mse for Regression,
    f1 for TokenClassification, loss for CausalLM."""

    cel: ClassVar[tuple[Cel, ...]] = (
        Cel("!(has(self.everyEpochs) && has(self.everySteps))", "set everyEpochs or everySteps, not both", ".everySteps"),
    )

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if self.every_epochs is not None and self.every_steps is not None:
            raise ValueError("everySteps: set everyEpochs or everySteps, not both")
        return self


class CheckpointPolicy(Model):
    """When training state is saved, and where."""

    storage_uri: StorageUri | None = None
    """Where checkpoints are: s3://bucket/prefix or file:///path. Default: `checkpoints` below output.storageUri."""
    every_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Save after every so many optimizer steps. Default: after every evaluation."""
    keep_last: Annotated[int, Field(ge=1, le=1000)] = 2
    """How many of the newest checkpoints are kept."""
    save_deadline_seconds: Annotated[int, Field(ge=5, le=3600)] = 60
    """Time the trainer has to save when it is asked to end (suspend, stop, drain): the pod's termination grace period."""


class Output(Model):
    """Where the result goes."""

    storage_uri: StorageUri
    """Receives model/, result.json and logs/: s3://bucket/prefix or file:///path."""
    overwrite: bool = False
    """What to do when the output already holds the result of another recipe: false fails, true replaces it. A result of the same
    recipe always ends the job as AlreadyCompleted, without training."""


class Recipe(Model):
    """What to train: the part of a FineTuneJob's spec that the trainer reads."""

    task: Task
    """What the model learns to do."""
    model: ModelSource
    """The pretrained model to start from."""
    dataset: Dataset
    """The labelled examples."""
    hyperparameters: Hyperparameters = Hyperparameters()
    """How to train."""
    evaluation: EvaluationPolicy = EvaluationPolicy()
    """When to evaluate, and which metric decides."""
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    """When training state is saved, and where."""
    output: Output
    """Where the result goes."""

    cel: ClassVar[tuple[Cel, ...]] = tuple(
        Cel(rule.guarded, f"{rule.field}: {rule.sentence}", f".{rule.field}") for rule in RULES
    )

    @model_validator(mode="after")
    def _fits_the_task(self) -> Self:
        # In a FineTuneJob with a script of the user's they are absent.
        if self.task is not None and self.dataset is not None and self.model is not None:
            for rule in RULES:
                if not rule.holds(self):
                    raise ValueError(f"{rule.field}: {rule.sentence}")
        return self

    @property
    def best_metric(self) -> Metric:
        return self.evaluation.best_metric or METRICS[self.task][0]

    @property
    def labels(self) -> list[str]:
        """Of a task that has any."""
        return self.dataset.labels or []

    @property
    def precision(self) -> Precision:
        """As asked for; a linear head gains nothing from fewer bits."""
        return Precision.FP32 if self.model.pooling is Pooling.MEAN else self.hyperparameters.precision

    @property
    def checkpoint_uri(self) -> str:
        return self.checkpoint.storage_uri or f"{self.output.storage_uri.rstrip('/')}/{CHECKPOINTS_DIR}"

    def digest(self) -> str:
        """sha256 (hex) of what decides the trained weights; where things are saved, and what only rounds otherwise, is not part of it."""
        parts = {"task", "model", "dataset", "hyperparameters", "evaluation"}
        what = self.model_dump(mode="json", by_alias=True, include=parts, exclude={"hyperparameters": Hyperparameters.rounding})
        what["dataset"]["validation"] = self.dataset.validation_file  # whether the default is written out or not
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
