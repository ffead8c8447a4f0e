"""The FineTuneJob resource: spec (recipe + placement), status, and what of it may change when."""

import re
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, AwareDatetime, Field, StringConstraints, field_validator, model_validator
from pydantic_core import PydanticCustomError

from finetune_api.base import Cel, EachOnce, Model
from finetune_api.model_source import ModelSource
from finetune_api.names import API_VERSION, KIND_JOB, MAX_NAME_LENGTH
from finetune_api.placement import Placement
from finetune_api.recipe import Dataset, Output, Recipe
from finetune_api.tasks import Task

NAME = rf"^[a-z]([-a-z0-9]{{0,{MAX_NAME_LENGTH - 2}}}[a-z0-9])?$"

ALWAYS_MUTABLE = ("suspend", "stop", "failurePolicy")
MUTABLE_WHILE_SUSPENDED = ("trainer", "checkpoint")
"""May change while `suspend` is true before and after the edit; applied by the next attempt. All else never changes."""


CORE_FIELDS = ("task", "model", "dataset", "output")
"""What our own trainer cannot do without; a script of the user's (trainer.command) can."""


class FineTuneJobSpec(Recipe, Placement):
    """What to train, where it runs."""

    # Here they may be absent, with trainer.command.
    task: Task | None = None  # type: ignore[assignment]
    """What the model learns to do. Required, unless trainer.command runs a script of yours."""
    model: ModelSource | None = None  # type: ignore[assignment]
    """The pretrained model to start from. Required, unless trainer.command runs a script of yours."""
    dataset: Dataset | None = None  # type: ignore[assignment]
    """The labelled examples. Required, unless trainer.command runs a script of yours."""
    output: Output | None = None  # type: ignore[assignment]
    """Where the result goes. Required, unless trainer.command runs a script of yours."""

    cel: ClassVar[tuple[Cel, ...]] = (
        *Recipe.cel,
        *(
            Cel(
                f"has(self.{name}) || (has(self.trainer) && has(self.trainer.command)"
                f" && {' && '.join(f'!has(self.{other})' for other in CORE_FIELDS if other != name)})",
                f"{name} is required (only with trainer.command may {', '.join(CORE_FIELDS)} be left out, all four together)",
            )
            for name in CORE_FIELDS
        ),
        Cel("!oldSelf.stop || self.stop", "stop cannot be taken back: create a new job", ".stop"),
        # The rules for the immutable fields are made from the two tables above (crd.py).
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        absent = [name for name in CORE_FIELDS if getattr(self, name) is None]
        if absent and not (self.trainer.command and len(absent) == len(CORE_FIELDS)):
            raise PydanticCustomError(
                "core_fields",
                "{absent}: required, but not set (only with trainer.command may {all} be left out, all four together)",
                {"absent": ", ".join(absent), "all": ", ".join(CORE_FIELDS)},
            )
        return self

    @property
    def has_recipe(self) -> bool:
        """Whether there is something for our own trainer to read; False for a script of the user's that needs none."""
        return self.task is not None

    def recipe(self) -> Recipe:
        """The part that the trainer reads, where there is one."""
        return Recipe.model_validate(self.model_dump(include=set(Recipe.model_fields)))


# ---------------------------------------------------------------------------------------------------------- status --
def _has_utc(time: datetime) -> datetime:
    try:
        time.astimezone(UTC)
    except OverflowError as error:
        raise ValueError("a time between the years 1 and 9999 in UTC") from error
    return time


def _fits_int64(value: int) -> int:
    if value >= 2**63:
        raise ValueError("a number below 2**63")
    return value


# What trainers report ends in the status: a value that it cannot hold would stand in the way of every later write.
Time = Annotated[AwareDatetime, AfterValidator(_has_utc)]
Count = Annotated[int, Field(ge=0), AfterValidator(_fits_int64)]


class StatusCondition(Model):
    """One aspect of the job's state (metav1.Condition)."""

    type: Annotated[str, StringConstraints(min_length=1, max_length=316)]
    """Running, Progressing, Checkpointed, Suspended, Complete or Failed."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    reason: Annotated[str, StringConstraints(min_length=1, max_length=1024)]
    """Why, in one CamelCase word."""
    message: Annotated[str, StringConstraints(max_length=32768)] = ""
    """Why, in a sentence."""
    observed_generation: int | None = None
    """Generation of the spec that this was decided for."""
    last_transition_time: AwareDatetime
    """When `status` last changed."""


class MetricValue(Model):
    """A number with a name. The value is a string, as in Kubeflow's TrainJob, so that NaN can be told."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    """Name, for example loss or validation/macro_f1."""
    value: Annotated[str, StringConstraints(max_length=64)]
    """Value as a decimal string."""


class TrainerStatus(Model):
    """Progress as the trainer last reported it (the shape of Kubeflow's TrainJob)."""

    progress_percentage: Annotated[int, Field(ge=0, le=100)] | None = None
    """Share of the planned steps that is done."""
    estimated_remaining_seconds: Count | None = None
    """Time left at the present pace."""
    metrics: Annotated[list[MetricValue], Field(max_length=256)] = []
    """Latest metrics."""
    last_updated_time: Time | None = None
    """When the trainer reported."""


class Evaluation(Model):
    """One evaluation on the validation data. Written once."""

    examples: Count
    """Training examples seen."""
    step: Count
    """Optimizer steps done."""
    metrics: Annotated[list[MetricValue], Field(max_length=16)]
    """The metrics."""


class CheckpointStatus(Model):
    """The newest durable checkpoint."""

    step: Count
    """Optimizer steps it contains."""
    uri: Annotated[str, StringConstraints(max_length=2048)]
    """Where it is."""
    time: Time
    """When the training state in it was taken: a crash loses what was done since."""
    size_bytes: Count
    """Size of all its files."""


class ChildStatus(Model):
    """Pods of the current attempt's Job, counted (the shape of Kubeflow's TrainJob)."""

    name: Annotated[str, StringConstraints(max_length=63)]
    """Name of the Job."""
    uid: Annotated[str, StringConstraints(max_length=64)] | None = None
    """Its uid: the pods that it made are the attempt's, also when the Job is gone and they still save."""
    ready: int = 0
    """Pods that are ready."""
    active: int = 0
    """Pods that are pending or running."""
    succeeded: int = 0
    """Pods that ended well."""
    failed: int = 0
    """Pods that ended badly."""
    suspended: int = 0
    """1 while the Job is suspended (by a queue)."""


class Result(Model):
    """What the training produced."""

    model_uri: Annotated[str, StringConstraints(max_length=2048)] | None = None
    """Where the model is; transformers' from_pretrained loads it."""
    metrics: Annotated[list[MetricValue], Field(max_length=64)] = []
    """Metrics of the best model on validation data and, where given, on test data."""
    best_step: Count | None = None
    """Optimizer step of the best model."""


class FineTuneJobStatus(Model):
    """What happens now, how far, why it failed, where the model is. Bounded: no list grows with time."""

    observed_generation: int | None = None
    """Generation of the spec that this status is about."""
    state: Annotated[str, StringConstraints(max_length=32)] | None = None
    """One word for people: Pending, Queued, Running, Restarting, Suspending, Suspended, Stopping, Complete or Failed.
    Programs read the conditions."""
    conditions: Annotated[list[StatusCondition], Field(max_length=16), EachOnce("type")] = []
    """Running, Progressing, Checkpointed, Suspended, Complete and Failed; set on first sight."""
    start_time: AwareDatetime | None = None
    """When the first pod ran."""
    completion_time: AwareDatetime | None = None
    """When the job became Complete or Failed."""
    active_seconds: Annotated[int, Field(ge=0)] | None = None
    """Seconds that pods ran, over all attempts that have ended."""
    gpu_seconds: Annotated[int, Field(ge=0)] | None = None
    """activeSeconds times the GPUs of a pod."""
    attempt: Annotated[int, Field(ge=0)] | None = None
    """Number of the current attempt; the child Job is <name>-<attempt>. Grows with every restart and resume."""
    restarts: Annotated[int, Field(ge=0)] | None = None
    """Restarts after a failure or disruption."""
    restart_time: AwareDatetime | None = None
    """When the next attempt begins, while the state is Restarting and the pods of the last one are gone."""
    restarts_count_towards_max: Annotated[int, Field(ge=0)] | None = None
    """Restarts that used up failurePolicy.maxRestarts."""
    disruptions_in_a_row: Annotated[int, Field(ge=0)] | None = None
    """Disruptions since the last checkpoint of a new step. From the third on they use up failurePolicy.maxRestarts."""
    trainer_status: TrainerStatus | None = None
    """Progress as last reported."""
    evaluations: Annotated[list[Evaluation], Field(max_length=64), EachOnce("examples")] = []
    """Evaluations on the validation data, at most 64: when full, every second one is dropped, the first and last stay."""
    checkpoint: CheckpointStatus | None = None
    """The newest durable checkpoint."""
    resumed_from: CheckpointStatus | None = None
    """The checkpoint that the current attempt went on from."""
    lost_work_seconds: Annotated[int, Field(ge=0)] | None = None
    """Training time done after the last durable checkpoint and lost by restarts, over all attempts."""
    jobs_status: Annotated[list[ChildStatus], Field(max_length=8), EachOnce("name")] = []
    """The current attempt's Job."""
    result: Result | None = None
    """What the training produced."""


class FineTuneJob(Model):
    """Fine-tunes a model on Kubernetes: this model, this data, these hyperparameters, these GPUs."""

    api_version: Literal["finetune.dev/v1alpha1"] = API_VERSION  # type: ignore[assignment]
    """Group and version of this schema."""
    kind: Literal["FineTuneJob"] = KIND_JOB  # type: ignore[assignment]
    """FineTuneJob."""
    metadata: dict[str, Any]
    """Name, namespace, labels and annotations. A label kueue.x-k8s.io/queue-name sends the job through that queue."""
    spec: FineTuneJobSpec
    """What to train, where it runs."""
    status: FineTuneJobStatus | None = None
    """What happens now, how far, why it failed, where the model is."""

    cel: ClassVar[tuple[Cel, ...]] = (
        Cel(
            f"self.metadata.name.size() <= {MAX_NAME_LENGTH} && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
            f"metadata.name must be at most {MAX_NAME_LENGTH} characters: lower-case letters, digits and '-', "
            "beginning with a letter",
        ),
    )

    @field_validator("metadata")
    @classmethod
    def _name(cls, metadata: dict[str, Any]) -> dict[str, Any]:
        name = metadata.get("name")
        if not isinstance(name, str) or not re.match(NAME, name):
            raise ValueError(
                f"name: {name!r} is not allowed: at most {MAX_NAME_LENGTH} characters: lower-case letters, digits and '-', "
                "beginning with a letter"
            )
        return metadata
