"""The whole path, all parts real but the kubelet: kubectl apply -> operator -> child Job -> the pod's own command as a process, with exactly
the env and volumes of the pod spec -> progress in the status -> checkpoints and result in S3 -> a model that predicts.

And the same with SIGKILL of the trainer and of the operator in the middle.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from integration.jobs import Jobs, Object, manifest, wait
from support.models import tiny_classifier, write_split
from testcluster import Cluster, PodRunner, S3Server, run_process
from testcluster.operator import Operator

BUCKET = "whole-path"
LABELS = ["negative", "neutral", "positive"]
NEVER = 1_000_000
"""Steps; more than any of these runs has."""


@pytest.fixture(scope="module")
def bucket(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bucket with a tiny pretrained model and learnable data."""
    folder = tmp_path_factory.mktemp("whole-path")
    s3.create_bucket(BUCKET)
    client = s3.client()
    for path in tiny_classifier(folder / "model").rglob("*"):
        client.upload_file(str(path), BUCKET, f"model/{path.name}")
    for split, rows in (("train", 600), ("validation", 60), ("test", 60)):
        client.upload_file(str(write_split(folder / f"{split}.csv", rows, seed=rows)), BUCKET, f"data/{split}.csv")
    return BUCKET


@pytest.fixture(scope="module")
def processes(cluster: Cluster) -> Iterator[PodRunner]:
    """Runs every pod's own command."""
    with PodRunner(cluster.kubeconfig, run_process, image_commands={"finetune-trainer": [sys.executable]}) as running:
        yield running


@pytest.fixture
def jobs(cluster: Cluster, operator: Operator, processes: PodRunner, namespace: str, s3: S3Server) -> Jobs:
    credentials = [f"--from-literal={name}={value}" for name, value in s3.environment().items()]
    cluster.kubectl("-n", namespace, "create", "secret", "generic", "s3-credentials", *credentials)
    return Jobs(cluster, namespace)


def job(name: str, *, epochs: int = 2, data: str = "data", secret: str = "s3-credentials", **dataset: object) -> Object:
    return manifest(
        name,
        model={"uri": f"s3://{BUCKET}/model"},
        dataset={"uri": f"s3://{BUCKET}/{data}", "test": "test.csv", "labels": LABELS, "maxLength": 32, **dataset},
        hyperparameters={"epochs": epochs, "batchSize": 4, "learningRate": 1e-3},
        checkpoint={"everySteps": 25},
        output={"storageUri": f"s3://{BUCKET}/out/{name}"},
        trainer={"envFrom": [{"secretRef": {"name": secret}}], "env": [{"name": "OMP_NUM_THREADS", "value": "1"}]},
    )


def result_of(s3: S3Server, name: str) -> Object:
    body: Object = json.loads(s3.client().get_object(Bucket=BUCKET, Key=f"out/{name}/result.json")["Body"].read())
    return body


def download_model(s3: S3Server, name: str, folder: Path) -> Path:
    bucket = boto3.resource(
        "s3",
        endpoint_url=s3.endpoint,
        aws_access_key_id=s3.access_key,
        aws_secret_access_key=s3.secret_key,
        region_name=s3.region,
    ).Bucket(BUCKET)
    folder.mkdir(parents=True)
    for item in bucket.objects.filter(Prefix=f"out/{name}/model/"):
        bucket.download_file(item.key, str(folder / Path(item.key).name))
    return folder


def test_from_kubectl_apply_to_a_model_that_predicts(jobs: Jobs, bucket: str, s3: S3Server, tmp_path: Path) -> None:
    from finetune_trainer.inference import load

    jobs.apply(job("whole", epochs=4))
    seen = wait(lambda: (jobs.status("whole").get("trainerStatus") or {}).get("progressPercentage"), "progress")
    assert seen > 0
    status = jobs.wait_state("whole", "Complete")
    assert status["trainerStatus"]["progressPercentage"] == 100
    assert status["checkpoint"]["uri"].startswith(f"s3://{bucket}/out/whole/checkpoints/step-")
    assert jobs.condition("whole", "Checkpointed")["status"] == "True"
    assert [e["examples"] for e in status["evaluations"]] == [600, 1200, 1800, 2400]
    metrics = {m["name"]: float(m["value"]) for m in status["result"]["metrics"]}
    assert metrics["test/macro_f1"] > 0.9, "the data can be learned; this model did not"
    assert status["result"]["modelUri"] == f"s3://{bucket}/out/whole/model"
    predictor = load(download_model(s3, "whole", tmp_path / "model"))
    assert [p["label"] for p in predictor.predict(["good good fine", "bad awful bad"])] == ["positive", "negative"]
    assert result_of(s3, "whole")["result"]["metrics"] == status["result"]["metrics"]


def test_sigkill_of_trainer_and_of_operator_in_the_middle(
    jobs: Jobs, bucket: str, s3: S3Server, operator: Operator, processes: PodRunner
) -> None:
    jobs.apply(job("killed", epochs=4), job("unharmed", epochs=4))
    wait(lambda: jobs.status("killed").get("checkpoint"), "a checkpoint in the status")
    os.kill(processes.process_of(jobs.wait_pod("killed-1")), signal.SIGKILL)
    jobs.wait_pod("killed-2")
    operator.kill()
    operator.start()
    status = jobs.wait_state("killed", "Complete")
    assert (status["attempt"], status["restartsCountTowardsMax"]) == (2, 1)
    assert status["resumedFrom"]["step"] >= 25
    jobs.wait_state("unharmed", "Complete")
    killed, unharmed = result_of(s3, "killed"), result_of(s3, "unharmed")
    assert killed["evaluations"] == unharmed["evaluations"], "the continued run is not the run that was never interrupted"
    assert killed["result"]["metrics"] == unharmed["result"]["metrics"]


def test_suspend_saves_first_and_resume_goes_on(jobs: Jobs, bucket: str, s3: S3Server) -> None:
    made = job("paused", epochs=8)
    # Nothing but SIGTERM makes a checkpoint in the middle of this run.
    made["spec"] |= {"checkpoint": {"everySteps": NEVER}, "evaluation": {"everySteps": NEVER}}
    jobs.apply(made)
    wait(lambda: jobs.status("paused").get("trainerStatus"), "progress")
    assert "checkpoint" not in jobs.status("paused")
    jobs.patch("paused", {"suspend": True})
    saved = jobs.wait_state("paused", "Suspended")["checkpoint"]
    assert 0 < saved["step"] < 8 * 150
    listed = s3.client().list_objects_v2(Bucket=BUCKET, Prefix="out/paused/checkpoints/")["Contents"]
    manifests = [
        f"s3://{BUCKET}/{o['Key'].removesuffix('/MANIFEST.json')}" for o in listed if o["Key"].endswith("/MANIFEST.json")
    ]
    assert manifests == [saved["uri"]]
    jobs.patch("paused", {"suspend": False})
    status = jobs.wait_state("paused", "Complete")
    assert status["resumedFrom"]["step"] == saved["step"], "what SIGTERM saved is where it goes on"
    assert status["restarts"] == 0


def test_a_failed_job_goes_on_when_it_is_deleted_and_applied_again(jobs: Jobs, bucket: str, processes: PodRunner) -> None:
    made = job("again", epochs=8)
    made["spec"]["failurePolicy"] = {"maxRestarts": 0}
    jobs.apply(made)
    saved = wait(lambda: jobs.status("again").get("checkpoint"), "a checkpoint in the status")
    os.kill(processes.process_of(jobs.wait_pod("again-1")), signal.SIGKILL)
    jobs.wait_state("again", "Failed")
    jobs.cluster.kubectl("-n", jobs.namespace, "delete", "ftj", "again")
    wait(lambda: not jobs.list("pods"), "pods gone")
    jobs.apply(made)
    status = jobs.wait_state("again", "Complete")
    assert status["resumedFrom"]["step"] >= saved["step"]
    assert (status["attempt"], status["restarts"]) == (1, 0)


def test_a_recreated_job_completes_without_training(jobs: Jobs, bucket: str) -> None:
    jobs.apply(job("twice", epochs=1))
    jobs.wait_state("twice", "Complete")
    jobs.cluster.kubectl("-n", jobs.namespace, "delete", "ftj", "twice")
    wait(lambda: not jobs.list("pods"), "pods gone")
    jobs.apply(job("twice", epochs=1))
    jobs.wait_state("twice", "Complete")
    assert jobs.condition("twice", "Complete")["reason"] == "AlreadyCompleted"
    jobs.cluster.kubectl("-n", jobs.namespace, "delete", "ftj", "twice")
    wait(lambda: not jobs.list("pods"), "pods gone")
    jobs.apply(job("twice", epochs=2))
    jobs.wait_state("twice", "Failed")
    assert jobs.condition("twice", "Failed")["reason"] == "OutputExists"
    assert "output.overwrite" in jobs.condition("twice", "Failed")["message"]


@pytest.mark.parametrize(
    ("name", "change", "reason", "says"),
    [
        (
            "foreign-labels",
            {"labels": ["bad", "good"]},
            "DataInvalid",
            "line 2: its label is not one of dataset.labels (bad, good)",
        ),
        ("unused-label", {"labels": [*LABELS, "mixed"]}, "DataInvalid", "no row has the label 'mixed'"),
        ("no-column", {"textColumn": "message"}, "DataInvalid", "there is no column 'message'"),
        ("empty-file", {"train": "empty.csv"}, "DataInvalid", "empty.csv: the file is empty"),
        ("no-file", {"validation": "dev.csv"}, "DataInvalid", "there is no dev.csv"),
        ("no-bucket", {"uri": "s3://no-such-bucket/data"}, "StorageNotFound", "the bucket 'no-such-bucket' does not exist"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(
    jobs: Jobs, bucket: str, s3: S3Server, name: str, change: Object, reason: str, says: str
) -> None:
    s3.client().put_object(Bucket=BUCKET, Key="data/empty.csv", Body=b"")
    wrong = job(name)
    wrong["spec"]["dataset"].update(change)
    jobs.apply(wrong)
    jobs.wait_state(name, "Failed")
    failed = jobs.condition(name, "Failed")
    assert failed["reason"] == reason
    assert says in failed["message"]


def test_wrong_credentials_are_said_in_a_sentence_and_the_operator_goes_on(
    jobs: Jobs, bucket: str, s3: S3Server, operator: Operator
) -> None:
    wrong = {**s3.environment(), "AWS_SECRET_ACCESS_KEY": "wrong"}
    literals = [f"--from-literal={name}={value}" for name, value in wrong.items()]
    jobs.cluster.kubectl("-n", jobs.namespace, "create", "secret", "generic", "wrong", *literals)
    jobs.apply(job("denied", secret="wrong"))
    jobs.wait_state("denied", "Failed")
    failed = jobs.condition("denied", "Failed")
    assert failed["reason"] == "StorageDenied"
    assert "AWS_SECRET_ACCESS_KEY" in failed["message"]
    assert operator.http("healthz")[0] == 200
    assert operator.tracebacks() == []
