"""Several processes are one training: torchrun's processes on gloo, against the run of one process.

Dropout is off: each process draws its own, so that only without it the numbers can agree.
"""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes_kit import Training, bits, make_recipe
from safetensors.torch import load_file
from trainer_kit import merged

from finetune_api.report import EndReport, Outcome
from finetune_trainer.config import Runtime
from finetune_trainer.dist import Group
from finetune_trainer.report import write_end

TESTS = str(Path(__file__).resolve().parents[2])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_recipe(tmp_path_factory.mktemp("processes"))


def test_two_and_three_processes_learn_what_one_does(recipe: dict[str, Any], tmp_path: Path) -> None:
    one = Training(recipe, tmp_path / "1", 1)
    alone = one.run()
    for processes in (2, 3):  # 3 rows in the last batch of an epoch; with 3 processes 8 rows do not divide
        several = Training(recipe, tmp_path / str(processes), processes)
        together = several.run()
        assert together["resolved"]["processes"] == processes
        assert together["steps"] == alone["steps"]
        for mine, theirs in zip(alone["evaluations"], together["evaluations"], strict=True):
            loss, other = (next(float(m["value"]) for m in e["metrics"] if m["name"].endswith("loss")) for e in (mine, theirs))
            assert other == pytest.approx(loss, rel=1e-4)
        expected = one.first_gradient()
        assert torch.linalg.norm(several.first_gradient() - expected) <= 1e-6 * torch.linalg.norm(expected)
        assert several.losses() == pytest.approx(one.losses(), rel=1e-4)
        for name, value in several.weights().items():
            torch.testing.assert_close(value, one.weights()[name], rtol=1e-3, atol=1e-5)


def test_two_processes_thaw_and_fight_as_one_does(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Gradual unfreezing changes which gradients are shared; FGM, micro-batches and gradient checkpointing run the model more than once a
    step."""
    levers = {
        "epochs": 3,
        "microBatchSize": 3,
        "gradientCheckpointing": True,
        "freeze": {"embeddings": False, "layers": 1},
        "unfreeze": {"everyEpochs": 1},
        "adversarial": {"epsilon": 0.1},
        "labelSmoothing": 0.1,
        "layerwiseDecay": 0.8,
    }
    changed = merged(recipe, {"hyperparameters": levers})
    one, two = Training(changed, tmp_path / "1", 1), Training(changed, tmp_path / "2", 2)
    one.run()
    together = two.run()
    assert together["resolved"]["strategy"] == "DDP"
    assert together["resolved"]["microBatchSize"] == 3
    assert two.losses() == pytest.approx(one.losses(), rel=1e-4)
    for name, value in two.weights().items():
        torch.testing.assert_close(value, one.weights()[name], rtol=1e-3, atol=1e-5)


def test_two_processes_pool_what_one_does(recipe: dict[str, Any], tmp_path: Path) -> None:
    """The encoder's work is shared out; the head trains on all of it."""
    changed = {**recipe, "model": {**recipe["model"], "pooling": "Mean"}, "hyperparameters": {"epochs": 2, "batchSize": 8}}
    one, two = Training(changed, tmp_path / "1", 1), Training(changed, tmp_path / "2", 2)
    one.run()
    two.run()
    assert two.losses() == pytest.approx(one.losses(), rel=1e-4)
    heads = [load_file(training.output / "model/head.safetensors") for training in (one, two)]
    for name, value in heads[0].items():
        torch.testing.assert_close(value, heads[1][name], rtol=1e-3, atol=1e-5)


def test_asked_to_end_all_end_and_go_on_together(recipe: dict[str, Any], tmp_path: Path) -> None:
    long = merged(recipe, {"hyperparameters": {"epochs": 200}})
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


def test_three_processes_go_on_bit_for_bit(recipe: dict[str, Any], tmp_path: Path) -> None:
    """With three, the order in which gradients are added up shows: it must not depend on when the processes began. Dropout is on."""
    on = {"hidden": None, "attention": None, "classifier": None}
    three = Training(merged(recipe, {"hyperparameters": {"epochs": 1, "microBatchSize": 2, "dropout": on}}), tmp_path, 3)
    three.run()
    whole = bits(three.checkpoint(9))
    three.cut(4)
    assert three.run()["steps"] == 9
    assert three.checkpoint(9).name.endswith("-0002")
    assert bits(three.checkpoint(9)) == whole


def test_one_is_out_of_memory_and_the_next_attempt_takes_half(recipe: dict[str, Any], tmp_path: Path) -> None:
    short = merged(recipe, {"hyperparameters": {"epochs": 1}})
    path = os.pathsep.join([TESTS, os.environ.get("PYTHONPATH", "")])
    memory = {"module": "support.out_of_memory", "PYTHONPATH": path, "FULL_RANK": "1", "ROWS_THAT_FIT": "3"}
    full = Training(short, tmp_path / "full", 2, **memory)
    end = full.fails()
    assert (end["outcome"], end["reason"]) == ("Failed", "CudaOutOfMemory"), end["said"]
    assert "process 1 was out of memory with 4 examples at once: the next attempt computes 2" in end["message"]
    assert full.run()["resolved"]["microBatchSize"] == 2
    known = Training(merged(short, {"hyperparameters": {"microBatchSize": 2}}), tmp_path / "known", 2)
    known.run()
    assert bits(full.checkpoint(9)) == bits(known.checkpoint(9))


def test_rows_are_shared_out_whole() -> None:
    rows = list(range(7))
    shares = [Group(rank, 3).share(rows) for rank in range(3)]
    assert sorted(row for share in shares for row in share) == rows
    assert Group(2, 3).share([5, 6]) == []
