"""`finetune run` tells the trainer what the pod tells it: the variables are compared with those of the operator's child Job."""

from pathlib import Path

from finetune_api import names
from finetune_api.environment import trainer_environment
from finetune_api.manifest import load_job_file
from finetune_cli import __main__ as command_line
from finetune_operator.domain.child import build_child
from finetune_operator.domain.types import Settings
from finetune_trainer import config

MANIFEST = Path(__file__).resolve().parents[3] / "examples/customer-feedback/finetunejob.yaml"


def test_the_pod_and_the_local_process_are_told_the_same() -> None:
    job = load_job_file(MANIFEST)
    placed = job.model_copy(update={"metadata": {**job.metadata, "namespace": "team", "uid": "1"}})
    mirrors = {"model_mirror": "s3://mirror/models", "dataset_mirror": "s3://mirror/datasets"}
    settings = Settings(trainer_image="trainer", progress_url="https://operator:8443", progress_ca="", **mirrors)
    child = build_child(placed, 3, settings)
    (container,) = child["spec"]["template"]["spec"]["containers"]
    pod = {e["name"]: e["value"] for e in container["env"] if "value" in e}
    local = trainer_environment(placed, 3, workdir=names.WORKDIR, termination_log=names.TERMINATION_LOG, **mirrors)
    assert {name: pod[name] for name in local} == local
    runtime = config.load_runtime(local)
    assert (runtime.model_mirror, runtime.dataset_mirror) == tuple(mirrors.values())
    assert container["command"][1:] == ["-m", "finetune_trainer"]


def test_the_trainer_reads_it_back() -> None:
    job = load_job_file(MANIFEST)
    environment = trainer_environment(job, 2, workdir="/w", termination_log="/w/log")
    recipe, runtime = config.load(environment)
    assert recipe == job.spec.recipe()
    assert (runtime.job_name, runtime.attempt) == ("customer-feedback", 2)
    assert (runtime.workdir, runtime.termination_log, runtime.model_mirror) == (Path("/w"), Path("/w/log"), None)
    assert environment[names.ENV_NAMESPACE] == "default"


def test_names_that_the_command_line_spells_itself() -> None:
    assert command_line.ENV_S3_ROOT == names.ENV_S3_ROOT
    assert command_line.ENV_MODEL_MIRROR == names.ENV_MODEL_MIRROR
    assert command_line.ENV_DATASET_MIRROR == names.ENV_DATASET_MIRROR
