"""The tasks: what each is scored with, and which fields of a recipe belong to which of them."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune_api.recipe import Recipe


class Task(StrEnum):
    """What the model learns to do."""

    SEQUENCE_CLASSIFICATION = "SequenceClassification"
    REGRESSION = "Regression"
    TOKEN_CLASSIFICATION = "TokenClassification"  # noqa: S105
    CAUSAL_LM = "CausalLM"


class Metric(StrEnum):
    """Metrics on the validation data; a task has those of `METRICS`."""

    MACRO_F1 = "macro_f1"
    WEIGHTED_F1 = "weighted_f1"
    ACCURACY = "accuracy"
    MACRO_RECALL = "macro_recall"
    MCC = "mcc"
    AUROC = "auroc"
    MSE = "mse"
    SPEARMAN = "spearman"
    PEARSON = "pearson"
    F1 = "f1"
    PRECISION = "precision"
    RECALL = "recall"
    PERPLEXITY = "perplexity"
    TOKEN_ACCURACY = "token_accuracy"  # noqa: S105
    LOSS = "loss"

    @property
    def higher_is_better(self) -> bool:
        return self not in (Metric.LOSS, Metric.MSE, Metric.PERPLEXITY)


METRICS: dict[Task, tuple[Metric, ...]] = {
    Task.SEQUENCE_CLASSIFICATION: (
        Metric.MACRO_F1,
        Metric.WEIGHTED_F1,
        Metric.ACCURACY,
        Metric.MACRO_RECALL,
        Metric.MCC,
        Metric.AUROC,
        Metric.LOSS,
    ),
    Task.REGRESSION: (Metric.MSE, Metric.SPEARMAN, Metric.PEARSON, Metric.LOSS),
    Task.TOKEN_CLASSIFICATION: (Metric.F1, Metric.PRECISION, Metric.RECALL, Metric.ACCURACY, Metric.LOSS),
    Task.CAUSAL_LM: (Metric.LOSS, Metric.PERPLEXITY, Metric.TOKEN_ACCURACY),
}
"""The first is the default of evaluation.bestMetric."""


@dataclass(frozen=True)
class Rule:
    """One rule between task and fields, as CEL and as Python; of a recipe whose task, model and dataset are there."""

    field: str
    """Path of the field that is wrong."""
    sentence: str
    cel: str
    holds: "Callable[[Recipe], bool]"

    @property
    def guarded(self) -> str:
        """The CEL rule for an object where they may be absent."""
        return f"!has(self.task) || !has(self.dataset) || !has(self.model) || ({self.cel})"


def _in(*tasks: Task) -> str:
    return f"self.task in {[task.value for task in tasks]}"


_LABELLED = (Task.SEQUENCE_CLASSIFICATION, Task.TOKEN_CLASSIFICATION)
_PAIRED = (Task.SEQUENCE_CLASSIFICATION, Task.REGRESSION)


def _metric_rule(task: Task, metrics: tuple[Metric, ...]) -> Rule:
    words = [metric.value for metric in metrics]
    return Rule(
        "evaluation.bestMetric",
        f"{task} has {', '.join(words)}",
        f"self.task != '{task}' || !has(self.evaluation) || !has(self.evaluation.bestMetric) || self.evaluation.bestMetric in {words}",
        lambda r: r.task is not task or r.evaluation.best_metric in (None, *metrics),
    )


RULES: tuple[Rule, ...] = (
    Rule(
        "dataset.labels",
        "is needed by SequenceClassification and TokenClassification, and by no other task",
        f"has(self.dataset.labels) == ({_in(*_LABELLED)})",
        lambda r: (r.dataset.labels is not None) == (r.task in _LABELLED),
    ),
    Rule(
        "dataset.promptColumn",
        "CausalLM needs dataset.promptColumn and completionColumn, or messagesColumn; no other task has them",
        f"(has(self.dataset.messagesColumn) || has(self.dataset.promptColumn)) == ({_in(Task.CAUSAL_LM)})",
        lambda r: bool(r.dataset.messages_column or r.dataset.prompt_column) == (r.task is Task.CAUSAL_LM),
    ),
    Rule(
        "dataset.multiLabel",
        "is for SequenceClassification",
        f"!has(self.dataset.multiLabel) || {_in(Task.SEQUENCE_CLASSIFICATION)}",
        lambda r: r.dataset.multi_label is None or r.task is Task.SEQUENCE_CLASSIFICATION,
    ),
    Rule(
        "dataset.textPairColumn",
        "is for SequenceClassification and Regression",
        f"!has(self.dataset.textPairColumn) || {_in(*_PAIRED)}",
        lambda r: r.dataset.text_pair_column is None or r.task in _PAIRED,
    ),
    Rule(
        "hyperparameters.labelSmoothing",
        "is not for Regression",
        f"self.hyperparameters.labelSmoothing == 0.0 || !({_in(Task.REGRESSION)})",
        lambda r: r.hyperparameters.label_smoothing == 0 or r.task is not Task.REGRESSION,
    ),
    Rule(
        "hyperparameters.adversarial",
        "needs the embeddings to train; with model.lora they do not",
        "!has(self.model.lora) || !has(self.hyperparameters.adversarial)",
        lambda r: r.model.lora is None or r.hyperparameters.adversarial is None,
    ),
    Rule(
        "hyperparameters.strategy",
        "FSDP does not go with model.lora",
        "!has(self.model.lora) || self.hyperparameters.strategy != 'FSDP'",
        lambda r: r.model.lora is None or r.hyperparameters.strategy != "FSDP",
    ),
    *(_metric_rule(task, metrics) for task, metrics in METRICS.items()),
    Rule(
        "evaluation.bestMetric",
        "mcc is not defined for dataset.multiLabel",
        "!has(self.dataset.multiLabel) || !has(self.evaluation) || !has(self.evaluation.bestMetric) || self.evaluation.bestMetric != 'mcc'",
        lambda r: r.dataset.multi_label is None or r.evaluation.best_metric is not Metric.MCC,
    ),
)
