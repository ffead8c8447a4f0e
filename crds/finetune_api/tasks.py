"""The tasks: what each is scored with, and which fields of a recipe belong to which of them."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from finetune_api.model_source import Pooling

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


def _encoder_rule(field: str, cel: str, holds: "Callable[[Recipe], bool]") -> Rule:
    return Rule(
        field,
        "is for an encoder that trains; with model.pooling Mean it does not",
        f"self.model.pooling != '{Pooling.MEAN}' || ({cel})",
        lambda r: r.model.pooling is not Pooling.MEAN or holds(r),
    )


_FROZEN_RULES: tuple[Rule, ...] = (
    _encoder_rule("model.lora", "!has(self.model.lora)", lambda r: r.model.lora is None),
    _encoder_rule(
        "hyperparameters.freeze",
        "!self.hyperparameters.freeze.embeddings && self.hyperparameters.freeze.layers == 0"
        " && (!has(self.hyperparameters.freeze.patterns) || self.hyperparameters.freeze.patterns.size() == 0)",
        lambda r: (
            not (r.hyperparameters.freeze.embeddings or r.hyperparameters.freeze.layers or r.hyperparameters.freeze.patterns)
        ),
    ),
    _encoder_rule(
        "hyperparameters.layerwiseDecay",
        "self.hyperparameters.layerwiseDecay == 1.0",
        lambda r: r.hyperparameters.layerwise_decay == 1,
    ),
    _encoder_rule(
        "hyperparameters.adversarial", "!has(self.hyperparameters.adversarial)", lambda r: r.hyperparameters.adversarial is None
    ),
    _encoder_rule(
        "hyperparameters.gradientCheckpointing",
        "!self.hyperparameters.gradientCheckpointing",
        lambda r: not r.hyperparameters.gradient_checkpointing,
    ),
    _encoder_rule(
        "hyperparameters.precision",
        "self.hyperparameters.precision in ['Auto', 'FP32']",
        lambda r: r.hyperparameters.precision in ("Auto", "FP32"),
    ),
    _encoder_rule(
        "hyperparameters.strategy",
        "self.hyperparameters.strategy != 'FSDP'",
        lambda r: r.hyperparameters.strategy != "FSDP",
    ),
    _encoder_rule("hyperparameters.compile", "!self.hyperparameters.compile", lambda r: not r.hyperparameters.compile),
    *(
        _encoder_rule(
            f"hyperparameters.dropout.{role}",
            f"!has(self.hyperparameters.dropout) || !has(self.hyperparameters.dropout.{role})",
            lambda r, role=role: getattr(r.hyperparameters.dropout, role) is None,  # type: ignore[misc]
        )
        for role in ("hidden", "attention")
    ),
)

_CLOZE = "has(self.dataset.prompt) && has(self.dataset.prompt.verbalizers)"


def _cloze(r: "Recipe") -> bool:
    return r.dataset.prompt is not None and r.dataset.prompt.verbalizers is not None


RULES: tuple[Rule, ...] = (
    Rule(
        "model.pooling",
        "Mean is for SequenceClassification and Regression",
        f"self.model.pooling != '{Pooling.MEAN}' || {_in(*_PAIRED)}",
        lambda r: r.model.pooling is not Pooling.MEAN or r.task in _PAIRED,
    ),
    *_FROZEN_RULES,
    Rule(
        "dataset.fewShot",
        "is for SequenceClassification with one label",
        f"!has(self.dataset.fewShot) || ({_in(Task.SEQUENCE_CLASSIFICATION)} && !has(self.dataset.multiLabel))",
        lambda r: r.dataset.few_shot is None or (r.task is Task.SEQUENCE_CLASSIFICATION and r.dataset.multi_label is None),
    ),
    Rule(
        "dataset.prompt",
        "is for SequenceClassification and Regression",
        f"!has(self.dataset.prompt) || {_in(*_PAIRED)}",
        lambda r: r.dataset.prompt is None or r.task in _PAIRED,
    ),
    Rule(
        "dataset.prompt.verbalizers",
        "is for SequenceClassification with one label",
        f"!({_CLOZE}) || ({_in(Task.SEQUENCE_CLASSIFICATION)} && !has(self.dataset.multiLabel))",
        lambda r: not _cloze(r) or (r.task is Task.SEQUENCE_CLASSIFICATION and r.dataset.multi_label is None),
    ),
    Rule(
        "dataset.prompt.verbalizers",
        "asks the model's own head; with model.pooling Mean there is another",
        f"!({_CLOZE}) || self.model.pooling != '{Pooling.MEAN}'",
        lambda r: not _cloze(r) or r.model.pooling is not Pooling.MEAN,
    ),
    Rule(
        "hyperparameters.dropout.classifier",
        "is for a classification head; with dataset.prompt.verbalizers there is none",
        f"!({_CLOZE}) || !has(self.hyperparameters.dropout) || !has(self.hyperparameters.dropout.classifier)",
        lambda r: not _cloze(r) or r.hyperparameters.dropout.classifier is None,
    ),
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
    *(_metric_rule(task, metrics) for task, metrics in METRICS.items()),
    Rule(
        "evaluation.bestMetric",
        "mcc is not defined for dataset.multiLabel",
        "!has(self.dataset.multiLabel) || !has(self.evaluation) || !has(self.evaluation.bestMetric) || self.evaluation.bestMetric != 'mcc'",
        lambda r: r.dataset.multi_label is None or r.evaluation.best_metric is not Metric.MCC,
    ),
)
