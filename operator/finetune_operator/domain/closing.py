"""The Job that ends a sweep: with the trainer's image and the trials' credentials it writes the history and promotes the winner.

The operator itself never speaks S3. What the Job does is in finetune_trainer/closing.py; this says with what, and reads how it ended.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from finetune_api import FineTuneJob, names
from finetune_api.defaults import with_defaults
from finetune_api.manifest import parse_job
from finetune_api.sweep import HyperparameterSweep
from finetune_operator.domain import trials as t
from finetune_operator.domain.child import build_child, owned_by
from finetune_operator.domain.history import pack
from finetune_operator.domain.outcome import end_report, true_condition
from finetune_operator.domain.types import Object, Settings
from finetune_operator.search.types import Trial

BACKOFF_LIMIT = 3


def closing_name(sweep: str) -> str:
    """Name of the Job."""
    return f"{sweep}-closing"


def build_closing(
    sweep: HyperparameterSweep, history: Object, winner: Trial | None, run: Object | None, settings: Settings
) -> Object | None:
    """The batch/v1 Job; None where there is no storage that it could write to. `run` is the winner's FineTuneJob."""
    job = _job(sweep, winner, run)
    if job is None:
        return None
    job = with_defaults(job, settings.defaults)  # as for the trials: credentials, pull secrets, queue
    name = closing_name(sweep.metadata["name"])
    labels = {names.LABEL_MANAGED_BY: names.MANAGER, names.LABEL_SWEEP: sweep.metadata["name"]}
    manifest = build_child(job, 1, settings)
    pod = manifest["spec"]["template"]
    pod["metadata"]["labels"] = {**job.spec.trainer.pod_template.metadata.labels, **labels}
    container = pod["spec"]["containers"][0]
    container["command"] = ["python", "-m", "finetune_trainer.closing"]
    container["env"] = [*(v for v in container["env"] if not v["name"].startswith("KUBEFLOW_")), *_env(sweep, history, run)]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": name,
            "namespace": sweep.metadata["namespace"],
            "labels": {**{k: v for k, v in manifest["metadata"]["labels"].items() if k in names.QUEUE_LABELS}, **labels},
            "ownerReferences": [t.owner(sweep)],
        },
        # Never two of its pods at once: they write the same files.
        "spec": {"backoffLimit": BACKOFF_LIMIT, "podReplacementPolicy": "Failed", "template": pod},
    }


def _job(sweep: HyperparameterSweep, winner: Trial | None, run: Object | None) -> FineTuneJob | None:
    """A FineTuneJob that says what the Job's pod is like; for a promotion the winner's recipe, with the test split and its new place."""
    template = sweep.spec.trial_template.spec
    if template.output is None:
        return None
    spec = t.trial_spec(sweep, "closing", winner.parameters if winner else {})
    spec["trainer"].update({"numNodes": 1, "numProcPerNode": 1, "command": [], "args": []})
    spec["evaluation"].pop("atExamples", None)
    if winner is not None and run is not None and sweep.spec.promote is not None:
        spec["output"] = {**spec["output"], "storageUri": sweep.spec.promote.storage_uri}
        spec["hyperparameters"]["seed"] = run["spec"]["hyperparameters"]["seed"]
        if template.dataset is not None and template.dataset.test:
            spec["dataset"]["test"] = template.dataset.test
    else:
        # Writing a file needs no accelerator.
        resources = spec["trainer"].get("resourcesPerNode") or {}
        for part in ("requests", "limits"):
            resources[part] = {k: v for k, v in (resources.get(part) or {}).items() if not k.endswith("/gpu")}
    queue = {k: v for k, v in (sweep.metadata.get("labels") or {}).items() if k in names.QUEUE_LABELS}
    labels = {**queue, **sweep.spec.trial_template.metadata.labels}
    meta = {"name": "closing", "namespace": sweep.metadata["namespace"], "uid": sweep.metadata["uid"], "labels": labels}
    return parse_job({"apiVersion": names.API_VERSION, "kind": names.KIND_JOB, "metadata": meta, "spec": spec})


def _env(sweep: HyperparameterSweep, history: Object, run: Object | None) -> list[Object]:
    output = sweep.spec.trial_template.spec.output
    if output is None:
        raise ValueError("there is no storage to write to")
    values = {f"{names.ENV_SWEEP_HISTORY}{number}": piece for number, piece in enumerate(pack(history))}
    values[names.ENV_SWEEP_HISTORY_URI] = output.storage_uri
    if run is not None:
        values[names.ENV_SWEEP_WINNER] = run["status"]["result"]["modelUri"]
    return [{"name": name, "value": value} for name, value in values.items()]


@dataclass(frozen=True)
class Closed:
    """How the Job ended."""

    well: bool
    message: str
    result: Object | None = None


def closing_end(job: Object, pods: Sequence[Object]) -> Closed | None:
    """How it ended; None while it has not."""
    mine = [pod for pod in pods if owned_by(pod, job["metadata"]["uid"])]
    reports = [report for pod in mine if (report := end_report(pod))]
    if true_condition(job, "Complete"):
        result = next((r.result for r in reports if r.result), None)
        return Closed(True, "", result.model_dump(mode="json", by_alias=True, exclude_none=True) if result else None)
    if failed := true_condition(job, "Failed"):
        said = next((r.message for r in reports if r.message), "") or failed.get("message", "")
        return Closed(False, said)
    return None
