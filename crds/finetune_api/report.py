"""What the trainer tells the operator, in three ways that carry the same facts.

While it trains: a POST in Kubeflow's wire protocol (ProgressReport). When it ends: the termination message (EndReport), which
the kubelet keeps in the pod's status. For people and for a re-created job: result.json beside the model (ResultFile).
"""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints

from finetune_api.base import Model
from finetune_api.finetunejob import CheckpointStatus, Count, Evaluation, Result, TrainerStatus

MAX_TERMINATION_BYTES = 4000
"""The kubelet keeps 4,096 bytes of a termination message."""
MAX_PROGRESS_BYTES = 64 * 1024
MAX_REFUSED = 8

Seconds = Annotated[float, Field(ge=0, le=1e9)]
# Cut and not refused: a report must not fail for the length of its words.
Sentence = Annotated[str, AfterValidator(lambda text: text[:256])]


class Saving(Model):
    """What checkpoints have cost so far: sums since this execution began, so that a report that is lost loses nothing."""

    model_config = ConfigDict(extra="ignore")

    saves: Count = 0
    """Checkpoints that are durable."""
    skipped: Count = 0
    """Saves that were left out because the one before was still being uploaded (checkpoint.whenBusy: Skip)."""
    blocking_seconds: Seconds = 0.0
    """Time that training stood still for them."""
    upload_seconds: Seconds = 0.0
    """Time of the uploads, while training went on."""
    uploaded_bytes: Count = 0
    """Bytes that were sent to the storage."""


class Refused(Model):
    """A checkpoint that was committed and could not be used when the run began."""

    model_config = ConfigDict(extra="ignore")

    checkpoint: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    """Its folder, such as step-00000480-0002."""
    message: Sentence
    """Why, in a sentence."""


class ProgressReport(Model):
    """Body of the progress POST. Kubeflow's own clients send trainerStatus alone; unknown keys of theirs are ignored."""

    model_config = ConfigDict(extra="ignore")

    trainer_status: TrainerStatus | None = None
    evaluations: Annotated[list[Evaluation], Field(max_length=64)] = []
    checkpoint: CheckpointStatus | None = None
    resumed_from: CheckpointStatus | None = None
    saving: Saving | None = None
    corrupt: Annotated[list[Refused], Field(max_length=MAX_REFUSED)] = []
    """Checkpoints that were refused when the run began; it went on from an older one."""


class Outcome(StrEnum):
    """How a trainer process ended."""

    COMPLETE = "Complete"
    ALREADY_COMPLETED = "AlreadyCompleted"
    INTERRUPTED = "Interrupted"
    FAILED = "Failed"


class EndReport(Model):
    """The termination message: JSON, at most MAX_TERMINATION_BYTES. No text of the data set in it."""

    model_config = ConfigDict(extra="ignore")

    outcome: Outcome
    reason: Annotated[str, StringConstraints(max_length=64)] = ""
    """Failure class (failures.FAILURES) when outcome is Failed or Interrupted."""
    message: str = ""
    """A sentence that says what to change."""
    step: int | None = None
    result: Result | None = None
    checkpoint: CheckpointStatus | None = None
    resumed_from: CheckpointStatus | None = None
    evaluations: list[Evaluation] = []
    saving: Saving | None = None
    corrupt: Annotated[list[Refused], Field(max_length=MAX_REFUSED)] = []

    def to_message(self) -> str:
        """As JSON below the size limit: drops evaluations first, then metrics and refused checkpoints, then cuts the sentence."""
        slim = self
        while len(text := slim.model_dump_json(by_alias=True, exclude_none=True).encode()) > MAX_TERMINATION_BYTES:
            if slim.evaluations:
                slim = slim.model_copy(update={"evaluations": slim.evaluations[len(slim.evaluations) // 2 + 1 :]})
            elif slim.result is not None and slim.result.metrics:
                half = slim.result.metrics[: len(slim.result.metrics) // 2]
                slim = slim.model_copy(update={"result": slim.result.model_copy(update={"metrics": half})})
            elif slim.corrupt:
                slim = slim.model_copy(update={"corrupt": slim.corrupt[: len(slim.corrupt) // 2]})
            else:
                slim = slim.model_copy(update={"message": slim.message[: len(slim.message) // 2]})
        return text.decode()


class DataCounts(Model):
    """What was read, and what of it was trained on."""

    examples: dict[str, int]
    """Rows of each split."""
    bad_rows: int = 0
    """Left out by dataset.maxBadRows."""
    duplicates: int = 0
    """Rows of train that were left out because their text is also in validation or test."""


class ResultFile(Model):
    """result.json under output.storageUri. Written last: its presence means that model/ is whole."""

    recipe_digest: str
    result: Result
    recipe: dict[str, Any]
    """The recipe as trained."""
    resolved: dict[str, Any] = {}
    """Values that were worked out, such as the learning rate."""
    data: DataCounts | None = None
    evaluations: list[Evaluation] = []
    per_class: dict[str, list[dict[str, Any]]] = {}
    """Per split: one row per label with precision, recall, f1 and support."""
    steps: int
    examples: int
    started: datetime
    finished: datetime
    versions: dict[str, str] = {}
