"""What a trainer process is told, built in one place: the operator puts it into the pod, `finetune run` into a local process.

Pure, and without what only a cluster has (pod uid, progress server, caches on volumes): the operator adds that.
"""

from finetune_api import names
from finetune_api.finetunejob import FineTuneJob


def trainer_environment(
    job: FineTuneJob,
    attempt: int,
    *,
    workdir: str,
    termination_log: str,
    model_mirror: str | None = None,
    dataset_mirror: str | None = None,
) -> dict[str, str]:
    """The variables of one attempt (counted from 1). `workdir` and `termination_log` are absolute paths as the process sees them;
    a mirror is a folder or an s3:// prefix."""
    environment = {
        names.ENV_JOB_NAME: job.metadata["name"],
        names.ENV_NAMESPACE: job.metadata.get("namespace") or "default",
        names.ENV_ATTEMPT: str(attempt),
        names.ENV_WORKDIR: workdir,
        names.ENV_TERMINATION_LOG: termination_log,
        "PYTHONUNBUFFERED": "1",
    }
    if job.spec.has_recipe:
        environment[names.ENV_JOB] = job.spec.recipe().model_dump_json(by_alias=True, exclude_none=True)
    if model_mirror:
        environment[names.ENV_MODEL_MIRROR] = model_mirror
    if dataset_mirror:
        environment[names.ENV_DATASET_MIRROR] = dataset_mirror
    return environment
