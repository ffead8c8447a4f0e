"""Builds the child Job of one attempt. Pure: the same resource, attempt and settings give the same Job.

A Job is created once and never edited; whatever changes, changes with the next attempt. Its semantics (why each field is set) are
in docs/architecture.md.
"""

from typing import Any

from finetune_api import FineTuneJob, names
from finetune_api.failures import BY_EXIT_CODE, BY_REASON
from finetune_operator.domain.types import Object, Settings

TOKEN_FILE = f"{names.PROGRESS_DIR}/token"
CA_FILE = f"{names.PROGRESS_DIR}/ca.crt"
TOKEN_SECONDS = 3600
MASTER_PORT = 29500


def child_name(job_name: str, attempt: int) -> str:
    """Name of the Job of one attempt."""
    return f"{job_name}-{attempt}"


def owned_by(child: Object, job_uid: str) -> bool:
    """Whether our resource is the controller of this object."""
    refs = child.get("metadata", {}).get("ownerReferences") or []
    return any(r.get("controller") and r.get("uid") == job_uid for r in refs)


def is_trainers(pod: Object, job_name: str) -> bool:
    """Whether the pod is of one of the job's attempts, be its Job deleted or of an earlier resource of that name. Labels do not count:
    anybody may set them, while a pod whose controller was never there is removed by the garbage collector."""
    refs = pod["metadata"].get("ownerReferences") or []
    kinds = [str(r.get("name")).rpartition("-") for r in refs if r.get("controller") and r.get("kind") == "Job"]
    return any(name == job_name and attempt.isdigit() for name, _, attempt in kinds)


def gpus_per_pod(job: FineTuneJob) -> int:
    """GPUs that one pod asks for, of any vendor (nvidia.com/gpu, amd.com/gpu, ...)."""
    resources = job.spec.trainer.resources_per_node
    asked = {**resources.requests, **resources.limits}
    return sum(int(n) for name, n in asked.items() if name.endswith("/gpu") and str(n).isdigit())


def processes_per_pod(job: FineTuneJob) -> int:
    """As given, else one for each GPU."""
    return job.spec.trainer.num_proc_per_node or max(1, gpus_per_pod(job))


def build_service(job: FineTuneJob) -> Object | None:
    """The headless Service that gives each of several pods a name; None for one pod."""
    if job.spec.trainer.num_nodes == 1:
        return None
    meta = job.metadata
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": service_name(meta["name"]),
            "namespace": meta["namespace"],
            "labels": {names.LABEL_MANAGED_BY: names.MANAGER, names.LABEL_JOB: meta["name"]},
            "ownerReferences": [_owner(meta)],
        },
        "spec": {
            "clusterIP": "None",
            "selector": {names.LABEL_JOB: meta["name"]},
            # They look for each other before any of them is ready.
            "publishNotReadyAddresses": True,
        },
    }


def service_name(job_name: str) -> str:
    """Name of the headless Service of a job with several pods."""
    return f"{job_name}-nodes"


def _owner(meta: Object) -> Object:
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND_JOB,
        "name": meta["name"],
        "uid": meta["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def build_child(job: FineTuneJob, attempt: int, settings: Settings) -> Object:
    """The batch/v1 Job of this attempt, ready to be created."""
    meta = job.metadata
    ours = {
        names.LABEL_MANAGED_BY: names.MANAGER,
        names.LABEL_JOB: meta["name"],
        names.LABEL_ATTEMPT: str(attempt),
    }
    queue = {k: v for k, v in (meta.get("labels") or {}).items() if k in names.QUEUE_LABELS}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": child_name(meta["name"], attempt),
            "namespace": meta["namespace"],
            "labels": {**queue, **ours},
            "ownerReferences": [_owner(meta)],
        },
        "spec": {
            # No pod of an attempt is replaced: we decide on restarts, so that disruptions do not use up the user's budget.
            "backoffLimit": 0,
            "completions": job.spec.trainer.num_nodes,
            "parallelism": job.spec.trainer.num_nodes,
            **({"completionMode": "Indexed"} if job.spec.trainer.num_nodes > 1 else {}),
            # A second pod of the same attempt must never overlap the first: it would write the same checkpoints.
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": _failure_rules()},
            "template": _pod_template(job, attempt, settings, ours),
        },
    }


def _failure_rules() -> list[Object]:
    # Rules that match put the cause into the Job's condition, where it stays when the pod is gone. A pod that was asked to end is none of
    # them: it is one that Kueue ends by suspending the Job, and the Job controller would fail the Job for it.
    codes = sorted(BY_EXIT_CODE.keys() - {BY_REASON["Interrupted"].exit_code})
    return [
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": names.CONTAINER, "operator": "In", "values": codes},
        },
    ]


def _pod_template(job: FineTuneJob, attempt: int, settings: Settings, labels: dict[str, str]) -> Object:
    trainer = job.spec.trainer
    extra = trainer.pod_template
    spec: Object = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.spec.checkpoint.save_deadline_seconds,
        # The trainer has no business with the API server: its one token is the projected one for progress.
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [_container(job, attempt, settings)],
        "volumes": [*_volumes(), *extra.spec.volumes],
    }
    optional: Object = {
        "serviceAccountName": trainer.service_account_name,
        "nodeSelector": extra.spec.node_selector,
        "tolerations": extra.spec.tolerations,
        "affinity": extra.spec.affinity,
        "priorityClassName": extra.spec.priority_class_name,
        "imagePullSecrets": [{"name": s.name} for s in extra.spec.image_pull_secrets],
        "subdomain": service_name(job.metadata["name"]) if trainer.num_nodes > 1 else None,
    }
    spec.update({k: v for k, v in optional.items() if v})
    return {
        "metadata": {
            "labels": {**extra.metadata.labels, **labels},
            "annotations": {**extra.metadata.annotations, names.ANNOTATION_PROGRESS_CA: settings.progress_ca},
        },
        "spec": spec,
    }


def _container(job: FineTuneJob, attempt: int, settings: Settings) -> Object:
    trainer = job.spec.trainer
    container: Object = {
        "name": names.CONTAINER,
        "image": trainer.image or settings.trainer_image,
        "command": trainer.command or _trainer_command(job),
        **({"args": trainer.args} if trainer.args else {}),
        "env": _env(job, attempt, settings),
        "envFrom": _dump(trainer.env_from),
        "resources": trainer.resources_per_node.model_dump(mode="json", by_alias=True),
        "terminationMessagePath": names.TERMINATION_LOG,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "workingDir": names.WORKDIR,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": [
            {"name": "finetune-workspace", "mountPath": names.WORKDIR},
            {"name": "finetune-cache", "mountPath": names.CACHE_DIR},
            {"name": "finetune-tmp", "mountPath": "/tmp"},  # noqa: S108  (an emptyDir of this pod alone)
            {"name": "finetune-shm", "mountPath": "/dev/shm"},  # noqa: S108
            {"name": "finetune-progress", "mountPath": names.PROGRESS_DIR, "readOnly": True},
            *_dump(trainer.pod_template.spec.volume_mounts),
        ],
    }
    return container


def _trainer_command(job: FineTuneJob) -> list[str]:
    if job.spec.trainer.num_nodes * processes_per_pod(job) == 1:
        return ["python", "-m", "finetune_trainer"]
    return ["python", "-m", "torch.distributed.run", "--module", "finetune_trainer"]  # torchrun; the rest is in PET_*


def _torchrun(job: FineTuneJob, attempt: int) -> list[Object]:
    """torchrun's settings; https://docs.pytorch.org/docs/stable/elastic/run.html: each option can be a variable PET_<OPTION>."""
    nodes, processes = job.spec.trainer.num_nodes, processes_per_pod(job)
    if nodes * processes == 1:
        return []
    values = {
        "PET_NNODES": str(nodes),
        "PET_NPROC_PER_NODE": str(processes),
        "PET_MASTER_PORT": str(MASTER_PORT),
        "PET_MAX_RESTARTS": "0",
        # Between SIGTERM and SIGKILL of the processes: the time that they have for saving.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(job.spec.checkpoint.save_deadline_seconds),
    }
    if nodes == 1:
        values |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_NODE_RANK": "0"}
        return [{"name": k, "value": v} for k, v in values.items()]
    name = job.metadata["name"]
    values["PET_MASTER_ADDR"] = f"{child_name(name, attempt)}-0.{service_name(name)}"
    index = {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
    return [*({"name": k, "value": v} for k, v in values.items()), {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": index}}]


def _env(job: FineTuneJob, attempt: int, settings: Settings) -> list[Object]:
    meta = job.metadata
    path = f"/v1/namespaces/{meta['namespace']}/{names.PLURAL_JOB}/{meta['name']}/attempts/{attempt}/progress"
    values = {
        names.ENV_JOB_NAME: meta["name"],
        names.ENV_NAMESPACE: meta["namespace"],
        names.ENV_ATTEMPT: str(attempt),
        names.ENV_WORKDIR: names.WORKDIR,
        names.ENV_TERMINATION_LOG: names.TERMINATION_LOG,
        names.ENV_PROGRESS_URL: f"{settings.progress_url.rstrip('/')}{path}",
        names.ENV_PROGRESS_CA: CA_FILE,
        names.ENV_PROGRESS_TOKEN: TOKEN_FILE,
        # Everything that libraries cache goes to the writable volume: the root file system is read-only.
        "HOME": names.WORKDIR,
        # A uid that the platform made up has no name, and libraries ask for one.
        "USER": "finetune",
        "HF_HOME": f"{names.CACHE_DIR}/huggingface",
        "XDG_CACHE_HOME": names.CACHE_DIR,
        "TORCHINDUCTOR_CACHE_DIR": f"{names.CACHE_DIR}/inductor",
        "PYTHONUNBUFFERED": "1",
    }
    if job.spec.has_recipe:
        recipe = job.spec.recipe().model_dump_json(by_alias=True, exclude_none=True)
        # "$(" would be expanded by the kubelet as a reference to another variable; "$$(" is a literal "$(".
        values[names.ENV_JOB] = recipe.replace("$(", "$$(")
    if settings.model_mirror:
        values[names.ENV_MODEL_MIRROR] = settings.model_mirror
    if settings.dataset_mirror:
        values[names.ENV_DATASET_MIRROR] = settings.dataset_mirror
    env: list[Object] = [{"name": k, "value": v} for k, v in values.items()]
    env += _torchrun(job, attempt)
    env.append({"name": names.ENV_POD_UID, "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}})
    # The user cannot name what the trainer relies on (RESERVED_ENV_PREFIXES). Where ours is a mere default, theirs wins.
    theirs = _dump(job.spec.trainer.env)
    named = {variable["name"] for variable in theirs}
    return [*theirs, *(variable for variable in env if variable["name"] not in named)]


def _volumes() -> list[Object]:
    annotation = f"metadata.annotations['{names.ANNOTATION_PROGRESS_CA}']"
    token = {"audience": names.PROGRESS_AUDIENCE, "expirationSeconds": TOKEN_SECONDS, "path": "token"}
    return [
        {"name": "finetune-workspace", "emptyDir": {}},
        {"name": "finetune-cache", "emptyDir": {}},
        {"name": "finetune-tmp", "emptyDir": {}},
        # The container runtime gives 64 MiB; data loader workers share batches through it.
        {"name": "finetune-shm", "emptyDir": {"medium": "Memory"}},
        {
            "name": "finetune-progress",
            "projected": {
                "sources": [
                    {"serviceAccountToken": token},
                    {"downwardAPI": {"items": [{"path": "ca.crt", "fieldRef": {"fieldPath": annotation}}]}},
                ]
            },
        },
    ]


def _dump(models: list[Any]) -> list[Object]:
    return [m.model_dump(mode="json", by_alias=True, exclude_none=True) for m in models]
