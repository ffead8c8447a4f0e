"""A model that is cut up among processes (FSDP) learns what a whole one does, and they go on from one another's checkpoints."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from processes_kit import Training, bits, make_recipe
from safetensors import safe_open
from safetensors.torch import load_file
from trainer_kit import merged
from transformers import AutoConfig, AutoModelForSequenceClassification

from finetune_trainer import sharding
from finetune_trainer.dist import Group
from finetune_trainer.errors import TrainingFailure
from support import warm
from support.models import tiny_decoder
from support.sharded_models import ARCHITECTURES, TIED, build
from testcluster.processes import free_port

TESTS = Path(__file__).resolve().parents[2]
PATH = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
SHARDED = {"hyperparameters": {"strategy": "FSDP"}}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    base = make_recipe(tmp_path_factory.mktemp("sharding"))
    return merged(base, {"hyperparameters": {"epochs": 3, "maxSteps": 20}})


@pytest.fixture(scope="module")
def alone(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Training:
    one = Training(recipe, tmp_path_factory.mktemp("alone"), 1)
    one.run()
    return one


def evaluations(result: dict[str, Any]) -> list[float]:
    return [float(m["value"]) for e in result["evaluations"] for m in e["metrics"]]


def layout(folder: Path) -> dict[str, Any]:
    """Every file of a checkpoint, and of those of tensors what is in them."""
    found: dict[str, Any] = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(file.relative_to(folder))
        found[name] = None
        if file.suffix == ".safetensors" and "random" not in name:
            with safe_open(file, "pt") as tensors:
                slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
                found[name] = {key: (s.get_dtype(), s.get_shape()) for key, s in slices.items()}
        elif name == "model/config.json":
            found[name] = json.loads(file.read_text())
    return found


@pytest.fixture(scope="module")
def four(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Training:
    """The head of 3 labels has no row for the last of them."""
    several = Training(merged(recipe, SHARDED), tmp_path_factory.mktemp("four"), 4)
    several.run()
    return several


@pytest.mark.parametrize("processes", [2, 4])
def test_it_learns_what_one_process_does(
    recipe: dict[str, Any], alone: Training, four: Training, tmp_path: Path, processes: int
) -> None:
    several = four if processes == 4 else Training(merged(recipe, SHARDED), tmp_path, processes)
    told, expected = several.run() if processes != 4 else four.result(), alone.result()
    assert (told["resolved"]["strategy"], told["resolved"]["processes"]) == ("FSDP", processes)
    assert told["recipeDigest"] == expected["recipeDigest"], "how the model is shared is no part of what is learned"
    gradient = alone.first_gradient()
    assert torch.linalg.norm(several.first_gradient() - gradient) <= 1e-6 * torch.linalg.norm(gradient)
    assert len(several.losses()) == 19  # the first is told with the second
    assert several.losses() == pytest.approx(alone.losses(), rel=1e-4)
    assert evaluations(told) == pytest.approx(evaluations(expected), rel=1e-4)
    assert layout(several.checkpoint(20)) == layout(alone.checkpoint(20))
    for name, value in several.weights().items():
        torch.testing.assert_close(value, alone.weights()[name], rtol=1e-3, atol=1e-5)


def test_any_number_of_processes_goes_on_from_any_checkpoint(alone: Training, four: Training) -> None:
    run, whole = four, bits(four.checkpoint(20))
    # The same processes: bit for bit. Then from a part of it each to all of it each, to one, and back.
    for at, processes, strategy in ((11, 4, "FSDP"), (16, 2, "DDP"), (12, 1, "Auto"), (8, 2, "FSDP")):
        run.cut(at)
        run = run.changed(processes, strategy=strategy)
        assert run.run()["steps"] == 20
        if processes == 4:
            assert bits(run.checkpoint(20)) == whole
        for name, value in run.weights().items():
            torch.testing.assert_close(value, alone.weights()[name], rtol=1e-3, atol=1e-5)
    executions = [json.loads(p.read_text())["parent"] for p in sorted((run.output / "checkpoints/executions").iterdir())]
    assert executions == [0, 11, 16, 12, 8]


def test_every_lever_works_on_parts(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Thawing, FGM, micro-batches, gradient checkpointing; and the best model, which is not the last, is put back."""
    levers = {
        "epochs": 4,
        "maxSteps": None,
        "freeze": {"embeddings": False, "layers": 2},
        "unfreeze": {"everyEpochs": 1},
        "adversarial": {"epsilon": 0.1},
        "labelSmoothing": 0.1,
        "layerwiseDecay": 0.8,
        "microBatchSize": 3,
        "gradientCheckpointing": True,
        "learningRate": 3e-2,
        "schedule": {"type": "Constant", "warmup": 36},  # it rises until it wrecks what was learned
    }
    changed = merged(recipe, {"hyperparameters": levers, "evaluation": {"bestMetric": "loss", "everySteps": 3}})
    one, two = Training(changed, tmp_path / "1", 1), Training(merged(changed, SHARDED), tmp_path / "2", 2)
    alone, together = one.run(), two.run()
    assert together["result"]["bestStep"] == alone["result"]["bestStep"] < 36
    before = next(i for i, loss in enumerate(one.losses()) if i > alone["result"]["bestStep"])
    assert two.losses()[:before] == pytest.approx(one.losses()[:before], rel=1e-3)
    assert [float(m["value"]) for m in together["result"]["metrics"]] == pytest.approx(
        [float(m["value"]) for m in alone["result"]["metrics"]], rel=1e-3
    )
    flat = [torch.cat([w.flatten() for _, w in sorted(each.weights().items())]) for each in (one, two)]
    assert torch.linalg.norm(flat[0] - flat[1]) < 1e-2 * torch.linalg.norm(flat[0])
    best = next(two.output.glob(f"checkpoints/step-{together['result']['bestStep']:08d}-*")) / "model/model.safetensors"
    assert best.read_bytes() == (two.output / "model/model.safetensors").read_bytes()


def test_a_decoder_in_sixteen_bits(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Weights are gathered in 16 bits, where autocast rounds them when it needs them: near, and not the same."""
    folder = tmp_path / "model"
    tiny_decoder(folder)
    for split, words in (("train", ["my", "so"] * 12), ("validation", ["the", "is"])):
        rows = [{"prompt": f"it was {word}", "completion": "good quick" if i % 2 else "late"} for i, word in enumerate(words)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": "train.jsonl", "validation": "validation.jsonl", "uri": f"file://{tmp_path}", "maxLength": 16}
    decoder = {
        "task": "CausalLM",
        "model": {"uri": f"file://{folder}"},
        "dataset": {**data, "promptColumn": "prompt", "completionColumn": "completion"},
        "hyperparameters": {"epochs": 4, "batchSize": 8, "learningRate": 3e-3, "precision": "BF16", "microBatchSize": 2},
    }
    one, two = Training(decoder, tmp_path / "1", 1), Training(merged(decoder, SHARDED), tmp_path / "2", 2)
    one.run()
    told = two.run()
    assert told["resolved"]["precision"] == "BF16"
    assert two.losses() == pytest.approx(one.losses(), rel=3e-2)
    assert two.losses()[-1] < 0.8 * two.losses()[0]
    assert {w.dtype for w in two.weights().values()} == {torch.float32}


@pytest.mark.parametrize("merge", [True, False])
def test_adapters_go_with_it(recipe: dict[str, Any], tmp_path: Path, *, merge: bool) -> None:
    """Whole models in the output, or the adapters alone; a run that goes on from a checkpoint of either kind."""
    lora = {"model": {"lora": {"rank": 2, "alpha": 4, "dropout": 0.0, "merge": merge}}, "hyperparameters": {"maxSteps": 12}}
    changed = merged(recipe, lora)
    one, two = Training(changed, tmp_path / "1", 1), Training(merged(changed, SHARDED), tmp_path / "2", 2)
    alone, together = one.run(), two.run()
    assert evaluations(together) == pytest.approx(evaluations(alone), rel=1e-4)
    assert layout(two.output / "model") == layout(one.output / "model")
    assert layout(two.checkpoint(12)) == layout(one.checkpoint(12))
    file = next((one.output / "model").glob("*.safetensors")).name
    for name, value in load_file(two.output / "model" / file).items():
        torch.testing.assert_close(value, load_file(one.output / "model" / file)[name], rtol=1e-3, atol=1e-5)
    two.cut(7)
    assert two.changed(1, strategy="Auto").run()["steps"] == 12


def test_an_evaluation_out_of_memory_leaves_word_for_the_next_attempt(recipe: dict[str, Any], tmp_path: Path) -> None:
    """The others wait for this very pass: it cannot be done again with fewer rows."""
    memory = {"module": "support.out_of_memory", "PYTHONPATH": PATH, "FULL_RANK": "1", "ROWS_THAT_FIT": "3", "IN": "evaluation"}
    short = merged(recipe, {"hyperparameters": {"strategy": "FSDP", "maxSteps": 2}})
    full = Training(short, tmp_path, 2, **memory)
    end = full.fails()
    assert end["reason"] == "CudaOutOfMemory", end["said"]
    assert "with 4 examples at once: the next attempt computes 2" in end["message"]
    assert full.run()["resolved"]["microBatchSize"] == 2


def test_with_one_process_there_is_nothing_to_cut_up(recipe: dict[str, Any], alone: Training, tmp_path: Path) -> None:
    one = Training(merged(recipe, {"hyperparameters": {"strategy": "FSDP", "maxSteps": 3}}), tmp_path, 1)
    assert "strategy" not in one.run()["resolved"]
    assert bits(one.checkpoint(1)) == bits(alone.checkpoint(1))


# ------------------------------------------------------------------------------------------------------ architectures --
def test_every_architecture_can_be_cut_up() -> None:
    """Frozen layers, tied weights and a layer that comes several times among them."""
    command = [
        "torch.distributed.run",
        "--nproc-per-node=2",
        f"--master-port={free_port()}",
        "--module",
        "support.sharded_models",
    ]
    env = os.environ | {"PYTHONPATH": PATH, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run([warm.python(), "-m", *command], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [(f["name"], f["decoder"]) for f in found] == [
        (name, decoder) for name in ARCHITECTURES for decoder in ((False, True) if name in TIED else (False,))
    ]
    for each in found:
        assert each["gradients"] < 2e-6, each
        assert each["answers"] < 2e-6, each
        assert each["weights"], each
        assert each["trained"], each
        assert each["tied"] is each["decoder"], each
        assert each["share"] < 0.51, each


def test_what_cannot_be_cut_up_is_told() -> None:
    two = Group(0, 2, 0, sharded=True)
    plain = build("bert", decoder=False)
    with pytest.raises(
        TrainingFailure, match=r"hyperparameters\.strategy: FSDP computes in BF16 or FP32, and this GPU has no BF16"
    ):
        sharding.place(plain, two, torch.float16)  # type: ignore[arg-type]
    across = build("bert", decoder=False)
    lower, upper = across.bert.encoder.layer
    upper.intermediate.dense.weight = lower.intermediate.dense.weight
    with pytest.raises(TrainingFailure, match=r"FSDP cannot cut up bert\.encoder\.layer\.0\.intermediate\.dense\.weight"):
        sharding.place(across, two, None)  # type: ignore[arg-type]
    scaled = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", **ARCHITECTURES["bert"]))
    scaled.scale = torch.nn.Parameter(torch.tensor(1.0))
    with pytest.raises(TrainingFailure, match="FSDP cannot cut up scale, which is a single number"):
        sharding.place(scaled, two, None)
