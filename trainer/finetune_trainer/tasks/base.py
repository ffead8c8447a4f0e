"""What the tasks have in common: how a row becomes an example, an example tokens, and a model's answer a loss and scores.

The loop knows none of them. It takes sums of losses (`loss`) over a denominator that the data knows (`Encoded.weights`), and a table of
numbers for each row (`outputs`) out of which `score` makes the metrics.
"""

import math
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from finetune_api.finetunejob import MetricValue
from finetune_api.recipe import Dataset
from finetune_trainer.tasks.encoded import Encoded, Ragged
from finetune_trainer.tasks.template import Template

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100
"""Label id of a token that has no label: PyTorch's cross entropy leaves it out."""

Row = dict[str, Any]
Floats = npt.NDArray[np.float64]


class BadRowError(ValueError):
    """A row that cannot be trained on. The message names the column and never says what stands in it."""


@dataclass(frozen=True)
class Examples:
    """One split, in file order: inputs (texts, pairs of texts, lists of words, chats) and what is to be learned."""

    name: str
    texts: list[Any]
    labels: Any
    """An array whose first axis is the rows, or a list with something for each row."""
    groups: list[str] | None = None
    """Of each row, what groupColumn says; "" where it says nothing. None without a groupColumn."""
    places: list[str] | None = None
    """Of each row, where in its file it is: `line 3`. None where its number is all that is known."""

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: npt.NDArray[np.int64]) -> "Examples":
        """These rows, in this order."""
        labels = self.labels[rows] if isinstance(self.labels, np.ndarray) else [self.labels[r] for r in rows]
        groups, places = (part and [part[r] for r in rows] for part in (self.groups, self.places))
        return Examples(self.name, [self.texts[r] for r in rows], labels, groups, places)

    def place(self, row: int) -> str:
        """Where a row is, for people."""
        return self.places[row] if self.places else f"row {row + 1}"


@dataclass(frozen=True)
class Evaluated:
    """Scores of one split; `per_class` has one row per label with precision, recall, f1 and support."""

    values: dict[str, float]
    per_class: list[dict[str, Any]] = field(default_factory=list)

    def named(self, split: str) -> list[MetricValue]:
        """As the API has it: validation/macro_f1 and so on, six significant digits. What is not defined is left out."""
        return [
            MetricValue(name=f"{split}/{name}", value=f"{value:.6g}")
            for name, value in self.values.items()
            if not math.isnan(value)
        ]


class TaskKind(ABC):
    """One task, with what the recipe says of its data."""

    auto_class: str
    """The class of transformers that builds the model."""
    problem_type: str | None = None
    options: ClassVar[dict[str, Any]] = {}
    """More arguments of the model's forward pass."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.labels = dataset.labels or []
        self.ids = {label: i for i, label in enumerate(self.labels)}
        self.template = Template.of(dataset.prompt) if dataset.prompt else None

    # -------------------------------------------------------------------------------------------------------- data -----
    @property
    def columns(self) -> tuple[str, ...]:
        """That every row must have."""
        if self.template is not None:
            return (*self.template.columns, self.dataset.label_column)
        pair = (self.dataset.text_pair_column,) if self.dataset.text_pair_column else ()
        return (self.dataset.text_column, *pair, self.dataset.label_column)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Those of the columns that a prediction needs."""
        return self.columns[:-1]

    def input(self, row: Row) -> Any:
        """What the model reads: a text, or one for each of several columns. Raises BadRowError."""
        if self.template is not None:
            # In csv a number is text anyway.
            row = {column: str(value) if type(value) in (int, float) else value for column, value in row.items()}
        texts = [text_of(row, column) for column in self.inputs]
        return texts[0] if len(texts) == 1 else tuple(texts)

    @abstractmethod
    def target(self, row: Row) -> Any:
        """What the model is to say. Raises BadRowError."""

    def collect(self, targets: Sequence[Any]) -> Any:
        """Targets of all rows as Examples.labels."""
        return list(targets)

    def counts(self, labels: Any) -> dict[str, int]:  # noqa: ARG002
        """How often each label is there, in the order of dataset.labels; of a task without labels nothing."""
        return {}

    def strata(self, labels: Any) -> npt.NDArray[np.int64]:
        """What a split keeps in proportion, an id for each row: of texts with one label that, of others nothing."""
        return np.zeros(len(labels), dtype=np.int64)

    def key(self, text: Any, target: Any) -> str:  # noqa: ARG002
        """Examples with the same key are the same text: a model that trained on one has seen the other."""
        return normalised(text)

    def encode(self, examples: Examples, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> Encoded:
        """Token ids of every row, at most max_length each."""
        if self.template is not None:
            return self.encode_template(examples, tokenizer, max_length)
        pairs = bool(self.dataset.text_pair_column)
        texts = [list(sides) for sides in zip(*examples.texts, strict=True)] if pairs else [list(examples.texts)]
        wanted = {"return_attention_mask": False, "return_token_type_ids": None if pairs else False}
        made = tokenizer(*texts, truncation=True, max_length=max_length, **wanted)
        ids = Ragged.of(made["input_ids"])
        # A row of exactly max_length was most likely cut; counting exactly would mean tokenising twice.
        cut = int((ids.lengths >= max_length).sum())
        types = made.get("token_type_ids")
        return Encoded(ids, examples.labels, cut, None if types is None else Ragged.of(types))

    def encode_template(
        self, examples: Examples, tokenizer: "PreTrainedTokenizerBase", max_length: int, mask: str = ""
    ) -> Encoded:
        """Of rows with a text for each column of the template, or one text where it has one column."""
        assert self.template is not None
        rows = [[text] if isinstance(text, str) else text for text in examples.texts]
        ids, cut = self.template.encode(rows, tokenizer, max_length, mask)
        return Encoded(ids, examples.labels, cut)

    def weights(self, data: Encoded) -> Floats:
        """How much each row counts in the mean loss, shape (rows,)."""
        return np.ones(len(data))

    # ------------------------------------------------------------------------------------------------------- model -----
    def configure(self, config: "PretrainedConfig") -> None:
        """Before the model is built."""
        config.problem_type = self.problem_type
        if self.labels:
            config.num_labels = len(self.labels)
            config.id2label = dict(enumerate(self.labels))
            config.label2id = dict(self.ids)

    def keeps_head(self, config: "PretrainedConfig") -> bool:
        """Whether a checkpoint's head, if it has one for this task, says the same labels."""
        found = getattr(config, "id2label", None) or {}
        return [found[i] for i in sorted(found)] == self.labels

    def check_head(self, missing: Collection[str]) -> None:  # noqa: B027  (most tasks mind no new head)
        """Before a model is used some of whose weights were not in the checkpoint: they are new. Raises TrainingFailure."""

    def attach(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:  # noqa: B027  (nor a model's insides)
        """What the task must know of a model, and change in it, before its first forward pass. Raises TrainingFailure."""

    @abstractmethod
    def loss(self, logits: "torch.Tensor", labels: "torch.Tensor", smoothing: float) -> "torch.Tensor":
        """The summed loss of a batch, shape (). Its mean is over `weights`."""

    # ------------------------------------------------------------------------------------------------------ scores -----
    @abstractmethod
    def width(self, data: Encoded) -> int:
        """How many numbers `outputs` has for a row."""

    def outputs(self, logits: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":  # noqa: ARG002
        """What is kept of a batch's answer for the scores: (rows, width or less)."""
        return logits

    @abstractmethod
    def score(self, outputs: Floats, data: Encoded) -> Evaluated:
        """Metrics of all rows' outputs, (rows, width)."""


class Predicting(TaskKind):
    """A task whose predictions follow from the outputs of one forward pass; a decoder's are generated (inference.py)."""

    @abstractmethod
    def answer(self, outputs: Floats, data: Encoded, texts: Sequence[Any]) -> list[dict[str, Any]]:
        """Predictions in words, one per row."""


def text_of(row: Row, column: str) -> str:
    """The text in a column. Raises BadRowError."""
    text = row[column]
    if not isinstance(text, str) or not text.strip():
        raise BadRowError(f"{column} is empty or no text")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise BadRowError(f"{column} holds half a surrogate pair (\\ud800 to \\udfff): it is no valid text")
    return text


def normalised(text: Any) -> str:
    """A text (or its parts, or the messages of a chat) in Unicode's form NFC, with single spaces."""
    if isinstance(text, str):
        return " ".join(unicodedata.normalize("NFC", text).split())
    if isinstance(text, dict):
        return normalised([text["role"], text["content"]])
    return "\0".join(normalised(part) for part in text)


def softmax(scores: Floats) -> Floats:
    """Over the last axis."""
    shifted = np.exp(scores - scores.max(axis=-1, keepdims=True))
    result: Floats = shifted / shifted.sum(axis=-1, keepdims=True)
    return result


def sigmoid(scores: Floats) -> Floats:
    result: Floats = 1 / (1 + np.exp(-np.clip(scores, -500, 500)))
    return result


def log_sum_exp(scores: Floats) -> Floats:
    """Over the last axis."""
    top = scores.max(axis=-1, keepdims=True)
    result: Floats = top[..., 0] + np.log(np.exp(scores - top).sum(axis=-1))
    return result
