"""Whole trainings whose storage fails: a real S3 server behind a proxy, as in test_store_faults.py, where the store's own tests are."""

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from finetune_api.report import EndReport, Outcome
from finetune_trainer.run import Run
from finetune_trainer.store import open_store
from support.faulty_s3 import Faulty
from testcluster import S3Server

sys.path.insert(0, str(Path(__file__).parents[1] / "unit/trainer"))
from trainer_kit import Job, ScriptedConsole, make_model, write_data


def test_a_training_behind_such_a_storage_is_the_same_training(faulty: Faulty, bucket: str, tmp_path: Path) -> None:
    data, model = write_data(tmp_path / "data"), make_model(tmp_path / "model")
    for folder, prefix in ((data, "data"), (model, "model")):
        for path in folder.iterdir():
            open_store(f"s3://{bucket}/{prefix}").upload(path, path.name)
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    weights = []
    for share in (0.0, 0.2):
        faulty.share, faulty.dice = share, random.Random(seed)
        job = Job(tmp_path / f"job-{share}", model, data)
        job.changes = {
            "model": {"uri": f"s3://{bucket}/model"},
            "dataset": {"uri": f"s3://{bucket}/data"},
            "output": {"storageUri": f"s3://{bucket}/out-{share}"},
        }
        done = subprocess.run(
            [sys.executable, "-m", "finetune_trainer"], env=job.environment() | os.environ, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        faulty.share = 0.0
        weights.append(open_store(f"s3://{bucket}/out-{share}").get("model/model.safetensors"))
    assert {"500", "503", "403", "reset", "slow"} <= {*faulty.faults}, "of a fifth of some hundred calls none drew one of these"
    assert weights[0] == weights[1]


def test_a_training_outlives_a_minute_without_its_storage(faulty: Faulty, bucket: str, s3: S3Server, tmp_path: Path) -> None:
    """Steps go on, the save arrives later, and the model is that of a training whose storage was always there."""
    data, model = write_data(tmp_path / "data"), make_model(tmp_path / "model")
    # A model that is the best so far is waited for, so that none is lost: not before the end here.
    changes: dict[str, Any] = {
        "hyperparameters": {"epochs": 10},
        "evaluation": {"everyEpochs": 10},
        "checkpoint": {"everySteps": 5, "whenBusy": "Skip"},
    }
    undisturbed = Job(tmp_path / "undisturbed", model, data, changes)
    undisturbed.run()
    job = Job(tmp_path / "job", model, data, {**changes, "output": {"storageUri": f"s3://{bucket}/out"}})
    left: list[float] = []

    def committed() -> list[str]:
        """Asked past the proxy."""
        listed = s3.client().list_objects_v2(Bucket=bucket, Prefix="out/checkpoints/step-").get("Contents", [])
        return [item["Key"].split("/")[2] for item in listed if item["Key"].endswith("MANIFEST.json")]

    def wait_for_the_save() -> None:
        left.append(faulty.gone_until - time.monotonic())
        assert committed() == []
        while not committed():
            assert time.monotonic() < faulty.gone_until + 60, "the save of step 5"
            time.sleep(0.2)
        assert committed() == ["step-00000005-0001"]
        left.append(faulty.gone_until - time.monotonic())

    console = ScriptedConsole({5: lambda: faulty.gone(60), 40: wait_for_the_save})
    Run(job.recipe(), job.runtime(), threading.Event(), console=console)()
    assert left[0] > 20, "35 steps of a tiny model take seconds: they did not wait"
    assert left[1] < 0
    weights = open_store(f"s3://{bucket}/out").get("model/model.safetensors")
    assert weights == (undisturbed.output / "model/model.safetensors").read_bytes()


def test_asked_to_end_with_the_storage_gone_it_says_so_in_time(faulty: Faulty, bucket: str, s3: S3Server, tmp_path: Path) -> None:
    """It waited for the storage until it was killed, and left no word."""
    job = Job(tmp_path / "job", make_model(tmp_path / "model"), write_data(tmp_path / "data"))
    job.changes = {
        "hyperparameters": {"epochs": 900, "maxSteps": None},
        "checkpoint": {"everySteps": 5, "saveDeadlineSeconds": 10},
        "output": {"storageUri": f"s3://{bucket}/out"},
    }
    environment = job.environment() | s3.environment() | {"AWS_ENDPOINT_URL": faulty.endpoint}
    training = subprocess.Popen([sys.executable, "-m", "finetune_trainer"], env=environment)
    try:
        before = s3.client()
        while not before.list_objects_v2(Bucket=bucket, Prefix="out/checkpoints/step-").get("Contents"):
            assert training.poll() is None
            time.sleep(0.2)
        faulty.gone(3600)
        training.terminate()
        assert training.wait(60) == 19
    finally:
        training.kill()
    end = EndReport.model_validate_json((job.home / "termination-log").read_text())
    assert (end.outcome, end.reason) == (Outcome.FAILED, "StorageUnavailable")
    assert "saveDeadlineSeconds" in end.message
