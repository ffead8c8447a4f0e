"""A real MLflow server: the trainer's client is the small one (mlflow-skinny), the server here the whole of MLflow in a venv of its own."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_api import names
from finetune_trainer import trackers
from finetune_trainer.trackers import Training, open_trackers
from support.models import tiny_classifier, write_split
from testcluster import binaries
from testcluster.processes import Child, free_port, wait_until
from testcluster.readiness import answers_ok

pytestmark = pytest.mark.timeout(900)  # the venv is made and the server started within the first test

REQUIREMENTS = Path(__file__).parents[2] / "requirements/mlflow.txt"


def python_with_mlflow() -> Path:
    """Of a venv in the cache, made the first time (600 MB, from the package index)."""
    folder = binaries.cache_dir() / f"mlflow-{hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:  # renamed when whole
            fresh = Path(scratch) / "venv"
            subprocess.run([uv, "venv", "--quiet", "--relocatable", "--python", sys.executable, fresh], check=True)
            install = [uv, "pip", "install", "--quiet", "--python", fresh / "bin/python", "--require-hashes", "-r", REQUIREMENTS]
            subprocess.run(install, check=True)
            fresh.rename(folder)
    return folder / "bin/python"


class Server:
    """An MLflow server over SQLite; stopped and started again it has the same port and the same runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._child: Child | None = None

    def start(self) -> None:
        places = [f"--backend-store-uri=sqlite:///{self.folder}/mlflow.db", f"--default-artifact-root={self.folder}/artifacts"]
        command = [str(python_with_mlflow()), "-m", "mlflow", "server", f"--port={self.port}", "--workers=1", *places]
        environment = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        plain = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self._child = Child.start("mlflow", command, log=self.folder / "log", environment=plain | environment)
        wait_until(lambda: answers_ok(f"{self.url}/health"), [self._child], 200, "MLflow answers")

    def stop(self) -> None:
        if self._child is not None:
            self._child.stop(0)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("mlflow"))
    made.start()
    yield made
    made.stop()


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Server:
    """The server, and an experiment of this test's own."""
    for name, value in trackers.DEFAULTS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", running.url)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", request.node.name)
    return running


def the_run() -> tuple[str, str, dict[str, str], list[int]]:
    """Id, status, params and the steps of the loss, of the only run."""
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name(os.environ["MLFLOW_EXPERIMENT_NAME"])
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    return run.info.run_id, run.info.status, run.data.params, sorted({m.step for m in history})


def test_a_killed_training_goes_on_with_its_run(server: Server, tmp_path: Path) -> None:
    for split, rows in (("train", 80), ("validation", 20)):
        write_split(tmp_path / f"{split}.csv", rows, seed=rows)
    labels = '["negative", "neutral", "positive"]'
    recipe = (
        f'{{"task": "SequenceClassification", "model": {{"uri": "file://{tiny_classifier(tmp_path / "model")}"}},'
        f'"dataset": {{"uri": "file://{tmp_path}", "labels": {labels}, "maxLength": 16}},'
        '"hyperparameters": {"epochs": 20, "batchSize": 8}, "evaluation": {"everyEpochs": 10}, "checkpoint": {"everySteps": 20},'
        f'"output": {{"storageUri": "file://{tmp_path}/out"}}}}'
    )
    told = {names.ENV_JOB: recipe, names.ENV_JOB_NAME: "feedback", names.ENV_WORKDIR: str(tmp_path / "work")}
    command = [sys.executable, "-m", "finetune_trainer"]

    def start() -> "subprocess.Popen[str]":
        return subprocess.Popen(
            command, env=os.environ | told, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
        )

    process = start()
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 110/200"):
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before, status, _, steps = the_run()
    assert status == "RUNNING", "nobody could tell it"
    process = start()
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert f"MLflow: {server.url}/#/experiments/1/runs/{before}" in said
    after, status, params, steps = the_run()
    assert (after, status) == (before, "FINISHED")
    assert params["hyperparameters.batchSize"] == "8"
    assert steps[-1] == 200
    assert len(steps) >= 98, "from the checkpoint on none is missing; those before wait for the next 5 seconds when it is killed"


def test_points_wait_for_a_server_that_comes_back(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "INTERVAL_SECONDS", 0.05)
    monkeypatch.setattr(trackers, "RETRY_SECONDS", 0.5)
    monkeypatch.setattr(trackers, "END_SECONDS", 60.0)
    said: list[str] = []

    def heard(word: str) -> None:
        wait_until(lambda: any(word in line for line in said), [], 60, word)

    with open_trackers(Training.of("feedback", "d" * 64, "origin", tmp_path / "logs"), said.append) as opened:
        opened.params(hyperparameters={"batchSize": 8})
        opened.scalars({"train/loss": 1.0}, 1)
        heard(f"MLflow: {server.url}")
        server.stop()
        for step in range(2, 11):
            opened.scalars({"train/loss": 1.0 / step}, step)
        heard("MLflow cannot be reached")
        server.start()
        heard("MLflow is reached again")
        opened.scalars({"train/loss": 0.0}, 11)
    _, status, params, steps = the_run()
    assert (status, params, steps) == ("FINISHED", {"hyperparameters.batchSize": "8"}, list(range(1, 12)))
    assert len(said) == 3, said
