"""What the operator fills in where a FineTuneJob says nothing: the chart's value `jobDefaults`, the operator's --job-defaults.

It speaks of the placement only. A default of the recipe would give one manifest two meanings in two clusters.
"""

from typing import Annotated

from pydantic import Field

from finetune_api import names
from finetune_api.base import EachOnce, Model
from finetune_api.finetunejob import FineTuneJob
from finetune_api.placement import DnsName, EnvFromSource, EnvVar, LabelValue, PodMetadata, PodSpecPatch, PodTemplate


class JobDefaults(Model):
    """Defaults of the operator for every job it serves. What a job says itself wins."""

    queue_name: LabelValue | None = None
    """Kueue LocalQueue of jobs that name none, in the job's namespace."""
    env: Annotated[list[EnvVar], Field(max_length=128), EachOnce("name")] = []
    """Environment variables of the trainer, for example AWS_ENDPOINT_URL."""
    env_from: Annotated[list[EnvFromSource], Field(max_length=32)] = []
    """Secrets and ConfigMaps of the job's namespace whose keys become environment variables. They must exist in each such namespace."""
    service_account_name: DnsName | None = None
    """ServiceAccount of the trainer's pods, in the job's namespace."""
    pod_template: PodTemplate = PodTemplate()
    """Additions to every trainer pod: labels, tolerations, volumes, pull secrets."""


def with_defaults(job: FineTuneJob, defaults: JobDefaults) -> FineTuneJob:
    """The job with the defaults filled in. Maps are merged by key, lists by the name of their items; the job's own win."""
    trainer = job.spec.trainer
    own = {variable.name for variable in trainer.env}
    filled = trainer.model_copy(
        update={
            "env": [*(variable for variable in defaults.env if variable.name not in own), *trainer.env],
            # Of two that have a key, the later one counts.
            "env_from": [*defaults.env_from, *trainer.env_from],
            "service_account_name": trainer.service_account_name or defaults.service_account_name,
            "pod_template": _pod_template(defaults.pod_template, trainer.pod_template),
        }
    )
    metadata = job.metadata
    labels = metadata.get("labels") or {}
    if defaults.queue_name and names.LABEL_QUEUE not in labels:
        metadata = {**metadata, "labels": {**labels, names.LABEL_QUEUE: defaults.queue_name}}
    return job.model_copy(update={"metadata": metadata, "spec": job.spec.model_copy(update={"trainer": filled})})


def _pod_template(defaults: PodTemplate, own: PodTemplate) -> PodTemplate:
    metadata = PodMetadata(
        labels={**defaults.metadata.labels, **own.metadata.labels},
        annotations={**defaults.metadata.annotations, **own.metadata.annotations},
    )
    a, b = defaults.spec, own.spec
    pull, volumes, mounts = (
        {s.name for s in b.image_pull_secrets},
        {v["name"] for v in b.volumes},
        {m.mount_path for m in b.volume_mounts},
    )
    spec = PodSpecPatch.model_construct(
        node_selector={**a.node_selector, **b.node_selector},
        tolerations=[*a.tolerations, *b.tolerations],
        affinity=b.affinity or a.affinity,
        priority_class_name=b.priority_class_name or a.priority_class_name,
        image_pull_secrets=[*(s for s in a.image_pull_secrets if s.name not in pull), *b.image_pull_secrets],
        volumes=[*(v for v in a.volumes if v["name"] not in volumes), *b.volumes],
        volume_mounts=[*(m for m in a.volume_mounts if m.mount_path not in mounts), *b.volume_mounts],
    )
    return PodTemplate.model_construct(metadata=metadata, spec=spec)
