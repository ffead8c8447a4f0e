"""Several processes are one training: torchrun's processes on gloo, against the run of one process.

Dropout is off: each process draws its own, so that only without it the numbers can agree.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from finetune_api import names
from finetune_api.report import EndReport, Outcome
from finetune_trainer.config import Runtime
from finetune_trainer.dist import Group
from finetune_trainer.report import write_end
from support.models import tiny_classifier, write_split
from testcluster.processes import free_port

NO_DROPOUT = {"hidden": 0.0, "attention": 0.0, "classifier": 0.0}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("processes")
    for split, rows in (("train", 67), ("validation", 21)):  # the last batch has 3 rows, the split an odd number
        write_split(folder / f"{split}.csv", rows, seed=rows)
    return {
        "task": "SequenceClassification",
        "model": {"uri": f"file://{tiny_classifier(folder / 'model')}"},
        "dataset": {"uri": f"file://{folder}", "labels": ["negative", "neutral", "positive"], "maxLength": 16},
        "hyperparameters": {"epochs": 2, "batchSize": 8, "learningRate": 1e-3, "dropout": NO_DROPOUT, "precision": "FP32"},
        "checkpoint": {"everySteps": 1, "keepLast": 100},
    }


class Training:
    """One training in a folder, by one or more processes."""

    def __init__(self, recipe: dict[str, object], folder: Path, processes: int) -> None:
        self.output, self.work = folder / "out", folder / "work"
        self.log = folder / "termination-log"
        job = {**recipe, "output": {"storageUri": f"file://{self.output}"}}
        self.env = {
            **os.environ,
            names.ENV_JOB: json.dumps(job),
            names.ENV_WORKDIR: str(self.work),
            names.ENV_TERMINATION_LOG: str(self.log),
            "OMP_NUM_THREADS": "1",
        }
        torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={free_port()}", "--module"]
        self.command = [sys.executable, *(torchrun if processes > 1 else ["-m"]), "finetune_trainer"]

    def start(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(self.command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self) -> dict[str, object]:
        process = self.start()
        said, _ = process.communicate(timeout=200)
        assert process.returncode == 0, said
        found: dict[str, object] = json.loads((self.output / "result.json").read_text())
        return found

    def first_gradient(self) -> torch.Tensor:
        """AdamW's first moment after one step from zero is the gradient times 1 - beta1."""
        saved = load_file(next(self.output.glob("checkpoints/step-00000001-*")) / "trainer/optimizer.safetensors")
        return torch.cat([saved[name].flatten().double() for name in sorted(saved) if name.endswith("exp_avg")])

    def losses(self) -> list[float]:
        events = EventAccumulator(str(next((self.output / "logs").iterdir())))
        events.Reload()
        return [event.value for event in events.Scalars("train/loss")]

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.output / "model/model.safetensors")


def test_two_and_three_processes_learn_what_one_does(recipe: dict[str, object], tmp_path: Path) -> None:
    one = Training(recipe, tmp_path / "1", 1)
    alone = one.run()
    for processes in (2, 3):  # 3 rows in the last batch of an epoch; with 3 processes 8 rows do not divide
        several = Training(recipe, tmp_path / str(processes), processes)
        together = several.run()
        assert together["resolved"]["processes"] == processes  # type: ignore[index]
        assert together["steps"] == alone["steps"]
        for mine, theirs in zip(alone["evaluations"], together["evaluations"], strict=True):  # type: ignore[call-overload]
            loss, other = (next(float(m["value"]) for m in e["metrics"] if m["name"].endswith("loss")) for e in (mine, theirs))
            assert other == pytest.approx(loss, rel=1e-4)
        expected = one.first_gradient()
        assert torch.linalg.norm(several.first_gradient() - expected) <= 1e-6 * torch.linalg.norm(expected)
        assert several.losses() == pytest.approx(one.losses(), rel=1e-4)
        for name, value in several.weights().items():
            torch.testing.assert_close(value, one.weights()[name], rtol=1e-3, atol=1e-5)


def test_two_processes_thaw_and_fight_as_one_does(recipe: dict[str, object], tmp_path: Path) -> None:
    """Gradual unfreezing changes which gradients are shared; FGM and gradient checkpointing run the model more than once a step."""
    levers = {
        "epochs": 3,
        "freeze": {"embeddings": False, "layers": 1},
        "unfreeze": {"everyEpochs": 1},
        "adversarial": {"epsilon": 0.1},
        "labelSmoothing": 0.1,
        "layerwiseDecay": 0.8,
    }
    changed = {**recipe, "hyperparameters": {**recipe["hyperparameters"], **levers}}  # type: ignore[dict-item]
    one, two = Training(changed, tmp_path / "1", 1), Training(changed, tmp_path / "2", 2)
    one.run()
    two.run()
    assert two.losses() == pytest.approx(one.losses(), rel=1e-4)
    for name, value in two.weights().items():
        torch.testing.assert_close(value, one.weights()[name], rtol=1e-3, atol=1e-5)


def test_two_processes_pool_what_one_does(recipe: dict[str, object], tmp_path: Path) -> None:
    """The encoder's work is shared out; the head trains on all of it."""
    hyper = {"epochs": 2, "batchSize": 8}
    changed = {**recipe, "model": {**recipe["model"], "pooling": "Mean"}, "hyperparameters": hyper}  # type: ignore[dict-item]
    one, two = Training(changed, tmp_path / "1", 1), Training(changed, tmp_path / "2", 2)
    one.run()
    two.run()
    assert two.losses() == pytest.approx(one.losses(), rel=1e-4)
    heads = [load_file(training.output / "model/head.safetensors") for training in (one, two)]
    for name, value in heads[0].items():
        torch.testing.assert_close(value, heads[1][name], rtol=1e-3, atol=1e-5)


def test_asked_to_end_all_end_and_go_on_together(recipe: dict[str, object], tmp_path: Path) -> None:
    long = {**recipe, "hyperparameters": {**recipe["hyperparameters"], "epochs": 200}}  # type: ignore[dict-item]
    several = Training(long, tmp_path, 2)
    process = several.start()
    deadline = time.monotonic() + 100
    while not list(several.output.glob("checkpoints/step-*/MANIFEST.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    end = json.loads(several.log.read_text())
    assert (end["outcome"], end["reason"]) == ("Interrupted", "Interrupted"), said
    saved = json.loads((Path(end["checkpoint"]["uri"].removeprefix("file://")) / "MANIFEST.json").read_text())
    assert saved["step"] == end["checkpoint"]["step"]
    states = load_file(several.output / "checkpoints" / f"step-{saved['step']:08d}-0001" / "trainer/random.safetensors")
    assert set(states) == {"cpu.0", "cpu.1"}


def test_the_cause_is_told_whoever_ends_last(recipe: dict[str, object], tmp_path: Path) -> None:
    # Rank 0 refuses the output; rank 1 then loses its connection to rank 0, and wrote that over it.
    several = Training(recipe, tmp_path, 2)
    several.output.mkdir()
    (several.output / "result.json").write_text('{"mine": true}')
    process = several.start()
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 1, said  # torchrun's, whatever the processes' own are
    assert "RuntimeError" in said, "otherwise rank 1 lost nothing, and this test shows nothing"
    end = json.loads(several.log.read_text())
    assert (end["outcome"], end["reason"]) == ("Failed", "OutputExists"), said


REPORTS = {
    "cause": EndReport(outcome=Outcome.FAILED, reason="OutputExists", message="why"),
    "other cause": EndReport(outcome=Outcome.FAILED, reason="CudaOutOfMemory", message="why"),
    "broken": EndReport(outcome=Outcome.FAILED, reason="UserCodeError", message="unexpected RuntimeError; see the log"),
    "stopped": EndReport(outcome=Outcome.INTERRUPTED, reason="Interrupted", message="asked to end"),
    "done": EndReport(outcome=Outcome.COMPLETE),
}


@pytest.mark.parametrize(
    ("said", "stays"),
    [
        (["cause", "broken"], "cause"),
        (["broken", "cause"], "cause"),
        (["cause", "stopped"], "cause"),  # torchrun ends the others with a SIGTERM
        (["cause", "other cause"], "cause"),
        (["broken", "stopped"], "broken"),  # else a bug would be restarted for ever, as a stop is not counted
        (["stopped", "broken"], "stopped"),
        (["broken", "done"], "done"),
        (["done", "broken"], "done"),
    ],
)
def test_of_several_processes_the_best_witness_is_heard(tmp_path: Path, said: list[str], stays: str) -> None:
    log = tmp_path / "log"
    log.touch()
    inode = log.stat().st_ino
    for name in said:
        write_end(Runtime("x", tmp_path, termination_log=log), REPORTS[name], alone=False)
    assert EndReport.model_validate_json(log.read_text()) == REPORTS[stays]
    assert log.stat().st_ino == inode, "the kubelet has mounted this file"


def test_processes_that_end_at_once_do_not_mix_their_reports(tmp_path: Path) -> None:
    log = tmp_path / "log"
    runtime = Runtime("x", tmp_path, termination_log=log)
    for _ in range(20):
        log.write_text("left by nobody " * 100)  # longer than what comes
        threads = [threading.Thread(target=write_end, args=(runtime, end), kwargs={"alone": False}) for end in REPORTS.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert EndReport.model_validate_json(log.read_text()) == REPORTS["done"]


def test_rows_are_shared_out_whole() -> None:
    rows = list(range(7))
    shares = [Group(rank, 3).share(rows) for rank in range(3)]
    assert sorted(row for share in shares for row in share) == rows
    assert Group(2, 3).share([5, 6]) == []
