"""The placement: where and how the training runs. The operator reads it; the trainer never sees it."""

import re
from typing import Annotated, Any, ClassVar, Self, cast

from pydantic import (
    AfterValidator,
    Field,
    PlainValidator,
    StringConstraints,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from finetune_api.base import Cel, EachOnce, Model, Shape
from finetune_api.names import RESERVED_ENV_PREFIXES

QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$"
_DNS = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
LABEL_VALUE = r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$"
RESERVED_VOLUME_PREFIX = "finetune-"
_VOLUME_SENTENCE = (
    f"the name of a volume has lower-case letters, digits and '-', and does not begin with {RESERVED_VOLUME_PREFIX}"
)


def _quantity(value: Any) -> int | str:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if whole or (isinstance(value, str) and len(value) <= 32 and re.fullmatch(QUANTITY[1:-1], value)):
        return cast("int | str", value)
    raise PydanticCustomError("quantity", 'must be a whole number, or a quantity in quotes such as "500m" or "16Gi"')


Quantity = Annotated[
    int | str,
    PlainValidator(_quantity),
    WithJsonSchema({"x-kubernetes-int-or-string": True, "pattern": QUANTITY, "maxLength": 32, "minimum": 0}),
]
"""A Kubernetes quantity such as 4, "500m" or "16Gi"."""

FreeForm = Annotated[dict[str, Any], WithJsonSchema({"type": "object", "x-kubernetes-preserve-unknown-fields": True})]
"""An object of the core API that is passed through; the API server checks it when the pod is made."""


def _named_volume(value: dict[str, Any]) -> dict[str, Any]:
    name = value.get("name")
    if not isinstance(name, str) or not re.fullmatch(_DNS, name) or len(name) > 63 or name.startswith(RESERVED_VOLUME_PREFIX):
        raise PydanticCustomError("volume", "{sentence}", {"sentence": _VOLUME_SENTENCE})
    return value


Volume = Annotated[
    dict[str, Any],
    AfterValidator(_named_volume),
    WithJsonSchema(
        {
            "type": "object",
            "description": "A volume of the pod (core/v1 Volume); the API server checks it when the pod is made.",
            "required": ["name"],
            "properties": {"name": {"type": "string", "maxLength": 63, "description": "Name of the volume."}},
            "x-kubernetes-preserve-unknown-fields": True,
            "x-kubernetes-validations": [
                {
                    "rule": f"self.name.matches('^{_DNS}$') && !self.name.startsWith('{RESERVED_VOLUME_PREFIX}')",
                    "message": _VOLUME_SENTENCE,
                    "fieldPath": ".name",
                }
            ],
        }
    ),
]

DnsName = Annotated[
    str,
    StringConstraints(max_length=253),
    Shape(rf"^{_DNS}(\.{_DNS})*$", "must be the name of an object: lower-case letters, digits, '-' and '.'"),
]
EnvName = Annotated[
    str,
    StringConstraints(max_length=253),
    Shape(r"^[-._a-zA-Z][-._a-zA-Z0-9]*$", "must be letters, digits, '_', '-' and '.', not beginning with a digit"),
]
LabelValue = Annotated[
    str,
    StringConstraints(max_length=63),
    Shape(LABEL_VALUE, "must be letters, digits, '-', '_' and '.', with a letter or digit at both ends"),
]


Argument = Annotated[str, StringConstraints(max_length=32768)]


class KeySelector(Model):
    """One key of a Secret or ConfigMap in the job's namespace."""

    name: DnsName
    """Name of the object."""
    key: Annotated[str, StringConstraints(min_length=1, max_length=253)]
    """Key within it."""


class EnvVarSource(Model):
    """Where the value comes from; exactly one."""

    secret_key_ref: KeySelector | None = None
    """A key of a Secret."""
    config_map_key_ref: KeySelector | None = None
    """A key of a ConfigMap."""

    cel: ClassVar[tuple[Cel, ...]] = (
        Cel("has(self.secretKeyRef) != has(self.configMapKeyRef)", "set exactly one of secretKeyRef and configMapKeyRef"),
    )

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.secret_key_ref is None) == (self.config_map_key_ref is None):
            raise ValueError("set exactly one of secretKeyRef and configMapKeyRef")
        return self


class EnvVar(Model):
    """One environment variable of the trainer."""

    name: EnvName
    """Name of the variable."""
    value: Annotated[str, StringConstraints(max_length=32768)] | None = None
    """Its value."""
    value_from: EnvVarSource | None = None
    """Where its value comes from."""

    cel: ClassVar[tuple[Cel, ...]] = (
        Cel("!(has(self.value) && has(self.valueFrom))", "set value or valueFrom, not both"),
        Cel(
            " && ".join(f"!self.name.startsWith('{p}')" for p in RESERVED_ENV_PREFIXES),
            f"names that begin with {', '.join(RESERVED_ENV_PREFIXES)} are set by the operator",
            ".name",
        ),
    )

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if self.value is not None and self.value_from is not None:
            raise ValueError("set value or valueFrom, not both")
        return self

    @field_validator("name")
    @classmethod
    def _not_reserved(cls, name: str) -> str:
        if name.startswith(RESERVED_ENV_PREFIXES):
            raise ValueError(f"names that begin with {', '.join(RESERVED_ENV_PREFIXES)} are set by the operator")
        return name


class ObjectName(Model):
    """A reference by name within the job's namespace."""

    name: DnsName
    """Name of the object."""


class EnvFromSource(Model):
    """All keys of a Secret or ConfigMap as environment variables; exactly one of the two."""

    secret_ref: ObjectName | None = None
    """The Secret, for example one with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."""
    config_map_ref: ObjectName | None = None
    """The ConfigMap."""

    cel: ClassVar[tuple[Cel, ...]] = (
        Cel("has(self.secretRef) != has(self.configMapRef)", "set exactly one of secretRef and configMapRef"),
    )

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.secret_ref is None) == (self.config_map_ref is None):
            raise ValueError("set exactly one of secretRef and configMapRef")
        return self


class Resources(Model):
    """Compute resources of one pod."""

    requests: Annotated[dict[str, Quantity], Field(max_length=32)] = {}
    """What the scheduler reserves, for example cpu: 4, memory: 16Gi."""
    limits: Annotated[dict[str, Quantity], Field(max_length=32)] = {}
    """What the pod may use, for example nvidia.com/gpu: 1."""


class PodMetadata(Model):
    """Labels and annotations that are added to the pod."""

    labels: Annotated[dict[str, LabelValue], Field(max_length=64)] = {}
    """Labels to add. Those of the operator win."""
    annotations: Annotated[dict[str, Annotated[str, StringConstraints(max_length=65536)]], Field(max_length=64)] = {}
    """Annotations to add. Those of the operator win."""


class VolumeMount(Model):
    """Where a volume of podTemplate.spec.volumes appears in the trainer's container."""

    name: DnsName
    """Name of the volume."""
    mount_path: Annotated[str, StringConstraints(max_length=1024), Shape(r"^/[^:]+$", "must be an absolute path without ':'")]
    """Absolute path in the container."""
    read_only: bool = False
    """Whether writing is refused."""
    sub_path: Annotated[str, StringConstraints(max_length=1024)] | None = None
    """Path within the volume."""


class PodSpecPatch(Model):
    """What a job may say about its pod's spec. The rest is the operator's."""

    node_selector: Annotated[dict[str, LabelValue], Field(max_length=64)] = {}
    """Labels that the node must have."""
    tolerations: Annotated[list[FreeForm], Field(max_length=64)] = []
    """Taints that the pod tolerates (core/v1 Toleration)."""
    affinity: FreeForm | None = None
    """Scheduling constraints (core/v1 Affinity)."""
    priority_class_name: DnsName | None = None
    """PriorityClass of the pod."""
    image_pull_secrets: Annotated[list[ObjectName], Field(max_length=16), EachOnce("name")] = []
    """Secrets to pull the image with."""
    volumes: Annotated[list[Volume], Field(max_length=32), EachOnce("name")] = []
    """Volumes to add (core/v1 Volume)."""
    volume_mounts: Annotated[list[VolumeMount], Field(max_length=32), EachOnce("mountPath")] = []
    """Where those volumes appear in the trainer's container."""

    cel: ClassVar[tuple[Cel, ...]] = (
        Cel(
            "!has(self.volumeMounts) || self.volumeMounts.all(m, has(self.volumes) && self.volumes.exists(v, v.name == m.name))",
            "each of volumeMounts must name one of volumes",
            ".volumeMounts",
        ),
    )

    @model_validator(mode="after")
    def _mounts_have_volumes(self) -> Self:
        names = {v["name"] for v in self.volumes}
        for mount in self.volume_mounts:
            if mount.name not in names:
                raise ValueError(f"volumeMounts: each of volumeMounts must name one of volumes; none is named {mount.name!r}")
        return self


class PodTemplate(Model):
    """Additions to the pod."""

    metadata: PodMetadata = PodMetadata()
    """Labels and annotations."""
    spec: PodSpecPatch = PodSpecPatch()
    """Scheduling, volumes and pull secrets."""


class TrainerPlacement(Model):
    """The trainer's container."""

    image: Annotated[str, StringConstraints(min_length=1, max_length=1024)] | None = None
    """Image with the trainer. Default: the operator's (chart value jobDefaults.image)."""
    command: Annotated[list[Argument], Field(max_length=64)] = []
    """Runs this in place of our trainer: a script of yours, in an image of yours. It may report progress as Kubeflow's TrainJob
    does (Hugging Face's Trainer does so by itself); an exit code of 0 is success. SIGTERM asks it to save and end."""
    args: Annotated[list[Argument], Field(max_length=256)] = []
    """Arguments of command."""
    env: Annotated[list[EnvVar], Field(max_length=128), EachOnce("name")] = []
    """Environment variables, for example AWS_ENDPOINT_URL. HOME, HF_HOME and others that the pod has by default may be among them;
    FINETUNE_*, KUBEFLOW_TRAINER_* and PET_* may not."""
    env_from: Annotated[list[EnvFromSource], Field(max_length=32)] = []
    """Secrets and ConfigMaps whose keys become environment variables. Credentials belong here, never into the manifest."""
    num_nodes: Annotated[int, Field(ge=1, le=1000)] = 1
    """Pods that train together. batchSize stays what it is: they share each batch out."""
    num_proc_per_node: Annotated[int, Field(ge=1, le=64)] | None = None
    """Processes in each pod. Default: one for each GPU of the pod, else 1. torchrun starts them where there is more than one
    in all; a command of yours finds torchrun's settings in PET_NNODES, PET_NPROC_PER_NODE, PET_NODE_RANK, PET_MASTER_ADDR and
    PET_MASTER_PORT."""
    resources_per_node: Resources = Resources()
    """Compute resources of each pod."""
    service_account_name: DnsName | None = None
    """ServiceAccount of the pod, for workload identity. Its token is not mounted."""
    pod_template: PodTemplate = PodTemplate()
    """Additions to the pod: labels, node selection, volumes."""

    cel: ClassVar[tuple[Cel, ...]] = (Cel("!has(self.args) || has(self.command)", "args needs command", ".args"),)

    @model_validator(mode="after")
    def _args_need_command(self) -> Self:
        if self.args and not self.command:
            raise ValueError("args: args needs command")
        return self


class FailurePolicy(Model):
    """What happens when the training ends badly."""

    max_restarts: Annotated[int, Field(ge=0, le=1000)] = 3
    """Restarts for failures of the training itself. Disruptions (drain, preemption, lost node) are not counted before the
    third in a row without a checkpoint of a new step. Bad data and other failures that a restart cannot cure are never retried."""


class Placement(Model):
    """Where and how a FineTuneJob runs: the part of its spec that the operator reads."""

    trainer: TrainerPlacement = TrainerPlacement()
    """The trainer's container."""
    suspend: bool = False
    """True saves a checkpoint and removes the pods; false continues from it."""
    stop: bool = False
    """True saves a checkpoint and ends the job as Complete with reason Stopped. It cannot be taken back."""
    failure_policy: FailurePolicy = FailurePolicy()
    """What happens when the training ends badly."""
