"""The recipe: what to train. The trainer reads it (as JSON in FINETUNE_JOB) and nothing else of the resource.

Defaults stand here and nowhere else; the API server writes them into stored objects, so that an old object keeps its meaning.
"""

import hashlib
import json
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, StringConstraints, model_validator

from finetune_api.base import Cel, EachOnce, Model, Shape
from finetune_api.few_shot import PLAIN, FewShot, Prompt
from finetune_api.hyperparameters import Hyperparameters, Precision
from finetune_api.model_source import HUB_NAME, ModelSource, Pooling
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


class EvaluationPolicy(Model):
    """When to evaluate on the validation data, and what decides."""

    every_epochs: Annotated[int, Field(ge=1, le=10000)] | None = None
    """Evaluate after every so many epochs. Default 1, unless everySteps is set."""
    every_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Evaluate after every so many optimizer steps (and at the end)."""
    at_examples: Annotated[list[Annotated[int, Field(ge=1, le=2**53)]], Field(min_length=1, max_length=32), EachOnce()] | None = (
        None
    )
    """Evaluate also at the first step after so many training examples. These evaluations are reported, and decide nothing: neither the
    best model nor early stopping. A sweep's rungs are set here."""
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


class OnSuspend(StrEnum):
    """What becomes of the work since the last checkpoint when a job is suspended."""

    SAVE = "Save"
    DISCARD = "Discard"


class WhenBusy(StrEnum):
    """What a save that is due does while the one before is still being uploaded."""

    WAIT = "Wait"
    SKIP = "Skip"


class CheckpointPolicy(Model):
    """When training state is saved, and where. Nothing of it changes the trained weights."""

    storage_uri: StorageUri | None = None
    """Where checkpoints are: s3://bucket/prefix or file:///path. Default: `checkpoints` below output.storageUri."""
    every_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Save after every so many optimizer steps. Default, without everySeconds: after every evaluation."""
    every_seconds: Annotated[int, Field(ge=10, le=604_800)] | None = None
    """Save at the first step after so many seconds since the last save: bounds what a crash loses, however long a step takes."""
    when_busy: WhenBusy = WhenBusy.WAIT
    """What a save that is due does while the one before is still being uploaded. Wait: training waits for the upload. Skip: that save is
    left out, so that slow storage does not slow training down; best models and the save at the end are never left out."""
    keep_last: Annotated[int, Field(ge=1, le=1000)] = 2
    """How many of the newest checkpoints are kept."""
    on_suspend: OnSuspend = OnSuspend.SAVE
    """What a suspension does first. Save: the trainer saves, within saveDeadlineSeconds. Discard: the pods get a second
    or two, and what was not saved by then is done again after the resume. A drain and a preemption always save."""
    on_stop: OnSuspend = OnSuspend.SAVE
    """The same for `stop`. A sweep's trials have Discard: what is stopped for being bad need not be saved."""
    save_deadline_seconds: Annotated[int, Field(ge=5, le=3600)] = 60
    """Time the trainer has to save when it is asked to end (suspend, stop, drain): the pod's termination grace period."""

    cel: ClassVar[tuple[Cel, ...]] = (
        Cel("!(has(self.everySteps) && has(self.everySeconds))", "set everySteps or everySeconds, not both", ".everySeconds"),
    )

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if self.every_steps is not None and self.every_seconds is not None:
            raise ValueError("everySeconds: set everySteps or everySeconds, not both")
        return self


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

    def deciding(self) -> dict[str, Any]:
        """What decides the trained weights, as JSON; where things are saved, and what only rounds otherwise, is not part of it.

        Fields with their default are left out: a later version that has more of them still knows its own.
        """
        parts = {"task", "model", "dataset", "hyperparameters", "evaluation"}
        # What only rounds otherwise, and what is only reported.
        left_out = {"hyperparameters": Hyperparameters.rounding, "evaluation": {"at_examples"}}
        what = self.model_dump(mode="json", by_alias=True, include=parts, exclude=left_out, exclude_defaults=True)
        if not what.get("evaluation"):
            what.pop("evaluation", None)  # nothing but what was left out
        what["dataset"]["validation"] = self.dataset.validation_file  # whether the default is written out or not
        return what

    def digest(self) -> str:
        """sha256 (hex) of what decides the trained weights."""
        return hashlib.sha256(json.dumps(self.deciding(), sort_keys=True).encode()).hexdigest()
