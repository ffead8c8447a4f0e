"""Trackers: the same run goes on after a death, what is not there or does not answer ends no training, and nothing changes the weights.

The real clients: MLflow over a folder (a server is in tests/integration/test_mlflow.py), wandb offline, and both against ports that are
closed or accept and never answer.
"""

import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainer_kit import Job, Killed

from finetune_api.report import Outcome
from finetune_trainer import trackers
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.trackers import Background, Point, Trackers, Training, flatten, open_trackers
from support import warm
from testcluster.processes import free_port

STEPS = list(range(2, 19))
"""Those whose loss is told: the first one's is read with the second."""


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """The clients' defaults are set in the environment of the process."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def mute_port() -> Iterator[int]:
    """A port that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        taken: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    taken.append(server.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in taken:
            connection.close()


def weights(job: Job) -> bytes:
    return (job.output / "model/model.safetensors").read_bytes()


# ----------------------------------------------------------------------------------------------------------- MLflow ----
@pytest.fixture
def mlflow_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    uri = f"file://{tmp_path}/mlruns"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "feedback")
    return uri


def mlflow_runs() -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("feedback")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def history(run: Any, name: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    return sorted((m.step, m.value) for m in MlflowClient().get_metric_history(run.info.run_id, name))


def test_mlflow_has_one_run_whatever_happens_to_the_process(job: Job, mlflow_folder: str) -> None:
    with pytest.raises(Killed):
        job.run(kill_at=9)
    (first,) = mlflow_runs()
    assert first.info.status == "FAILED"
    with pytest.raises(TrainingFailure):
        job.run(stop_at=14)
    (stopped,) = mlflow_runs()
    assert stopped.info.status == "KILLED"
    job.run()
    (run,) = mlflow_runs()
    assert (run.info.run_id, run.info.run_name, run.info.status) == (first.info.run_id, "tiny", "FINISHED")
    assert run.data.tags["finetune.dev/job"] == "tiny"
    losses = history(run, "train/loss")
    assert sorted({step for step, _ in losses}) == [step for step in STEPS if step != 15], "the first one after 14"
    assert len(set(losses)) == len(STEPS) - 1, "what is done again after a death gives the same values"
    assert [step for step, _ in history(run, "validation/macro_f1")] == [6, 12, 18]
    assert run.data.metrics["final/test/macro_f1"] >= 0
    params = run.data.params
    assert params["hyperparameters.batchSize"] == "8"
    assert params["hyperparameters.schedule.type"] == "Linear"
    assert params["dataset.labels"] == '["negative", "neutral", "positive"]'
    assert (params["resolved.steps"], params["resolved.device"], params["resolved.processes"]) == ("18", "cpu", "1")


def test_a_training_that_begins_anew_is_another_run(job: Job, mlflow_folder: str) -> None:
    job.run(hyperparameters={"epochs": 1})
    shutil.rmtree(job.output)
    job.run(hyperparameters={"epochs": 1})
    assert len(mlflow_runs()) == 2
    job.run(hyperparameters={"epochs": 1, "seed": 7}, output={"overwrite": True})
    assert len({run.data.tags["finetune.dev/run"] for run in mlflow_runs()}) == 3


def test_many_and_long_params_and_odd_names_fit(tmp_path: Path, mlflow_folder: str) -> None:
    training = Training.of("job", "d" * 64, "origin", tmp_path)
    with open_trackers(training, print) as opened:
        opened.params(dataset={"labels": [f"label {i}" for i in range(1000)]}, more={f"field{i}": i for i in range(250)})
        opened.scalars({"group/é=a, b/f1": 0.5, "undefined": float("nan")}, 3)
        for step in range(3000):
            opened.scalars({"train/loss": 1.0 / (step + 1)}, step)
    (run,) = mlflow_runs()
    assert len(run.data.params) == 251
    assert len(run.data.params["dataset.labels"]) == 500
    assert run.data.params["more.field249"] == "249"
    assert run.data.metrics.keys() == {"group/é_a_ b/f1", "train/loss"}
    assert len(history(run, "train/loss")) == 3000


def test_what_another_execution_said_first_stays(tmp_path: Path, mlflow_folder: str) -> None:
    training = Training.of("job", "d" * 64, "origin", tmp_path)
    said: list[str] = []
    for device in ("cuda", "cpu"):
        with open_trackers(training, said.append) as opened:
            opened.params(resolved={"device": device})
            opened.scalars({"x": 1.0}, 1)
    (run,) = mlflow_runs()
    assert (run.data.params, run.info.status) == ({"resolved.device": "cuda"}, "FINISHED")
    assert not said


# ------------------------------------------------------------------------------------------------------------ wandb ----
def records(file: Path) -> list[Any]:
    """What is in a .wandb file: protobuf messages in LevelDB's log format, 32 KiB blocks of fragments, after 7 bytes of its own."""
    from wandb.proto import wandb_internal_pb2

    data, found, whole, at = file.read_bytes(), [], b"", 7
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last fragment of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


def rows(found: Sequence[Any]) -> list[dict[str, Any]]:
    return [
        {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item}
        for r in found
        if r.WhichOneof("record_type") == "history"
    ]


def test_wandb_offline_leaves_files_to_sync_with_one_id(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "feedback")
    with pytest.raises(Killed):
        job.run(kill_at=9)
    job.run()
    first, second = sorted((job.output / "logs").glob("*/wandb/offline-run-*/run-*.wandb"))
    assert first.name == second.name
    assert re.fullmatch(r"run-tiny-[0-9a-f]{11}\.wandb", first.name)
    assert not [p for p in (job.output / "logs").rglob("*") if p.is_symlink() or p.suffix == ".py"]
    found = records(second)
    runs = [r.run for r in found if r.WhichOneof("record_type") == "run"]
    assert (runs[0].project, runs[0].display_name, list(runs[0].tags)) == ("feedback", "tiny", ["tiny"])
    updates = [u for r in found if r.WhichOneof("record_type") == "config" for u in r.config.update]
    config = {u.key or "/".join(u.nested_key): u.value_json for u in updates}
    assert (config["hyperparameters.batchSize"], config["resolved.steps"]) == ("8", "18")
    losses = {row["step"]: row["train/loss"] for row in rows(found) if "train/loss" in row}
    assert list(losses) == list(range(8, 19))
    before = {row["step"]: row["train/loss"] for row in rows(records(first)) if "train/loss" in row}
    assert before[8] == losses[8]
    assert any("final/test/macro_f1" in row for row in rows(found))
    assert not [r for r in found if r.WhichOneof("record_type") in ("output", "output_raw")], "nothing that was printed"


# ---------------------------------------------------------------------------------------------------- only the leader ----
def test_only_the_leading_process_has_trackers(job: Job, mlflow_folder: str) -> None:
    job.changes = {"hyperparameters": {"epochs": 1}}
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", "--module"]
    environment = job.environment() | {"MLFLOW_TRACKING_URI": mlflow_folder}
    done = subprocess.run([warm.python(), *torchrun, "finetune_trainer"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    (run,) = mlflow_runs()
    assert run.data.params["resolved.processes"] == "2"
    assert len(list(job.home.rglob("work-*/**/events.out.tfevents.*"))) == 1


# ------------------------------------------------------------------------------------------------------ unreachable ----
def start(job: Job, port: int) -> "subprocess.Popen[str]":
    both = {
        "MLFLOW_TRACKING_URI": f"http://user:secret-word@127.0.0.1:{port}",
        "WANDB_BASE_URL": f"http://127.0.0.1:{port}",
        "WANDB_API_KEY": "0" * 40,
    }
    command = [warm.python(), "-m", "finetune_trainer"]
    environment = job.environment() | both
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("kind", ["closed", "mute"])
def test_servers_that_do_not_answer_end_and_change_nothing(job: Job, tmp_path: Path, mute_port: int, kind: str) -> None:
    whole = Job(tmp_path / "whole", job.model, job.data)
    whole.run()
    process = start(job, free_port() if kind == "closed" else mute_port)
    assert process.stdout is not None
    lines, last = [], 0.0
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 18: validation"):
            last = time.monotonic()
    assert process.wait(timeout=60) == 0, "".join(lines)
    # END_SECONDS, what scoring and saving take, and a busy machine; a client's own patience is minutes.
    assert time.monotonic() - last < trackers.END_SECONDS + 25
    assert weights(job) == weights(whole)
    said = "".join(lines)
    assert len(re.findall("MLflow cannot be reached", said)) == 1, said
    assert re.search("Weights & Biases (cannot be reached|does not answer)", said), said
    assert "secret-word" not in said


def test_asked_to_end_it_does_not_wait_for_servers(job: Job, mute_port: int) -> None:
    job.changes = {"hyperparameters": {"epochs": 2000}, "checkpoint": {"everySteps": 5}}
    process = start(job, mute_port)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 600/"):
            break
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 20, said
    assert time.monotonic() - asked < trackers.INTERRUPTED_END_SECONDS + 10
    assert '"Interrupted"' in (job.home / "termination-log").read_text()


# --------------------------------------------------------------------------------------------------- not installed ----
@pytest.mark.parametrize(("variable", "package"), [("MLFLOW_TRACKING_URI", "mlflow"), ("WANDB_API_KEY", "wandb")])
def test_a_client_that_is_not_installed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, package: str
) -> None:
    monkeypatch.setenv(variable, "x")
    monkeypatch.setitem(sys.modules, package, None)
    said: list[str] = []
    with open_trackers(Training.of("job", "d" * 64, "origin", tmp_path), said.append) as opened:
        opened.scalars({"x": 1.0}, 1)
    (line,) = said
    assert line.startswith(f"{variable} is set, but {package} is not installed: nothing is told to ")
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_nothing_is_asked_for_and_nothing_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with open_trackers(Training.of("job", "d" * 64, "origin", tmp_path), pytest.fail) as opened:
        opened.params(recipe={"a": 1, "none": None})
        opened.scalars({"train/loss": 0.5, "undefined": float("nan")}, 7)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(7, 0.5)]
    assert events.Tags()["scalars"] == ["train/loss"]
    assert b"recipe.a" in events.Tensors("params/text_summary")[0].tensor_proto.string_val[0]


def test_what_a_user_sets_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    with open_trackers(Training.of("job", "d" * 64, "origin", tmp_path), print):
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
        assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
        assert os.environ["WANDB_ERROR_REPORTING"] == "false"


# ------------------------------------------------------------------------------------------------------- background ----
class Flaky:
    """A tracker whose server is down until `up` is set."""

    address = ""

    def __init__(self) -> None:
        self.up = threading.Event()
        self.told: list[Any] = []

    def connect(self) -> "Flaky":
        return self

    def params(self, values: Any) -> None:
        self._tell(values)

    def scalars(self, points: Sequence[Point]) -> None:
        self._tell(*[p.step for p in points])

    def end(self, outcome: Outcome) -> None:
        self._tell(outcome)

    def _tell(self, *what: Any) -> None:
        if not self.up.is_set():
            raise ConnectionError("refused by http://me:secret-word@server/")
        self.told.extend(what)


def test_the_newest_points_wait_for_a_server_and_an_outage_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(trackers, "INTERVAL_SECONDS", 0.01)
    monkeypatch.setattr(trackers, "KEPT_POINTS", 5)
    server, said = Flaky(), []
    background = Background("It", server.connect, said.append)
    background.params({"a": 1})
    for step in range(20):
        background.scalars([Point(step, {"x": 1.0}, 0.0)])
        time.sleep(0.01)
    server.up.set()
    background.end(Outcome.COMPLETE)
    background.wait(30)
    assert server.told == [{"a": 1}, *range(15, 20), Outcome.COMPLETE]
    assert said[0] == "It cannot be reached (refused by http://server/); training goes on"
    assert said[1:] == ["It is reached again"]


def test_a_server_that_is_never_there_is_told_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    server, said = Flaky(), []
    background = Background("It", server.connect, said.append)
    with Trackers(remote=[background]) as all_of_them:
        all_of_them.scalars({"x": 1.0}, 1)
    assert said[-1] == "It was not reached to the end: 1 points are missing there"
    assert len(said) == 2
    assert not trackers.left_behind()


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(None, Outcome.COMPLETE), (TrainingFailure("Interrupted", "x"), Outcome.INTERRUPTED), (ValueError(), Outcome.FAILED)],
)
def test_how_a_run_ends_is_told(error: Exception | None, outcome: Outcome) -> None:
    server = Flaky()
    server.up.set()

    def ends() -> None:
        with Trackers(remote=[Background("It", server.connect, print)]):
            if error is not None:
                raise error

    if error is None:
        ends()
    else:
        with pytest.raises(type(error)):
            ends()
    assert server.told == [outcome]


def test_nested_values_become_dotted_names() -> None:
    value = {"a": {"b": 1, "none": None, "list": ["x", 2]}, "c": True, "empty": {}}
    assert flatten(value) == [("a.b", 1), ("a.list", '["x", 2]'), ("c", True)]
