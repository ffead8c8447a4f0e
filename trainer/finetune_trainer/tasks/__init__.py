"""The tasks: what is read, what is learned, how it is scored. One class each; `kind_of` chooses."""

from finetune_api.recipe import Dataset
from finetune_api.tasks import Task
from finetune_trainer.tasks.base import IGNORED, BadRowError, Evaluated, Examples, TaskKind
from finetune_trainer.tasks.classification import MultiLabelled, SingleLabel
from finetune_trainer.tasks.cloze import Cloze
from finetune_trainer.tasks.completion import Completion
from finetune_trainer.tasks.encoded import Encoded, Ragged
from finetune_trainer.tasks.regression import Regression
from finetune_trainer.tasks.tagging import Tagging

__all__ = ["IGNORED", "BadRowError", "Completion", "Encoded", "Evaluated", "Examples", "Ragged", "TaskKind", "kind_of"]


def kind_of(task: Task, dataset: Dataset) -> TaskKind:
    """The task with what the recipe says of its data."""
    if task is Task.SEQUENCE_CLASSIFICATION and dataset.multi_label is not None:
        return MultiLabelled(dataset)
    if dataset.prompt is not None and dataset.prompt.verbalizers is not None:
        return Cloze(dataset)
    classes: dict[Task, type[TaskKind]] = {
        Task.SEQUENCE_CLASSIFICATION: SingleLabel,
        Task.REGRESSION: Regression,
        Task.TOKEN_CLASSIFICATION: Tagging,
        Task.CAUSAL_LM: Completion,
    }
    return classes[task](dataset)
