"""Several processes are one training: torchrun's processes on gloo, against the run of one process.

Dropout is off: each process draws its own, so that only without it the numbers can agree.
"""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes_kit import Training, bits, make_recipe
from safetensors.torch import load_file
from trainer_kit import merged

from finetune_trainer.dist import Group

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
