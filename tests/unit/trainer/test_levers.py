"""Every lever of the recipe changes training in the way it says: seen in weights, rates and gradients of real runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from trainer_kit import Job, Killed

from finetune_api.hyperparameters import Freeze, Hyperparameters, Precision, Schedule, Unfreeze
from finetune_api.recipe import Dataset
from finetune_api.tasks import Task
from finetune_trainer import layers, optim
from finetune_trainer.data import collate
from finetune_trainer.dist import ALONE
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.gradient import Gradient, resolve
from finetune_trainer.tasks import Encoded, Ragged, kind_of

KIND = kind_of(Task.SEQUENCE_CLASSIFICATION, Dataset.model_validate({"uri": "file:///data", "labels": ["a", "b", "c"]}))
NO_DROPOUT = {"hidden": 0.0, "attention": 0.0, "classifier": 0.0}
EMBEDDINGS, LOWEST, HIGHEST, HEAD = "bert.embeddings.", "bert.encoder.layer.0.", "bert.encoder.layer.1.", "classifier."


def run(job: Job, name: str, hyperparameters: dict[str, Any], **more: Any) -> Job:
    done = replace(job, home=job.home / name, changes={"hyperparameters": hyperparameters, **more}, runs=[])
    done.run()
    return done


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """What does not train is a file of its own in a checkpoint."""
    return {name: tensor for file in (folder / "model").glob("*.safetensors") for name, tensor in load_file(file).items()}


def result(job: Job) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((job.output / "result.json").read_text())
    return found


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Which parts have other weights."""
    prefixes = (EMBEDDINGS, LOWEST, HIGHEST, HEAD)
    return {p for n, w in after.items() for p in prefixes if n.startswith(p) and not torch.equal(w, before.get(n, w[:0]))}


# ------------------------------------------------------------------------------------------------------- schedules ----
def rates(total: int, **schedule: Any) -> list[float]:
    made = Schedule.model_validate(schedule)
    return [optim.factor(made, step, total) for step in range(total)]


def theirs(name: str, total: int, warmup: int, **more: Any) -> list[float]:
    """The same of transformers, whose warm-up begins at zero: compared after it."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = transformers.get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=more or None)
    return [schedule.lr_lambdas[0](step) for step in range(total)]


@pytest.mark.parametrize("warmup", [0, 7, 30])
@pytest.mark.parametrize(
    ("ours", "name", "more"),
    [
        ({"type": "Linear"}, "linear", {}),
        ({"type": "Cosine"}, "cosine", {}),
        ({"type": "CosineRestarts", "cycles": 4}, "cosine_with_restarts", {"num_cycles": 4}),
        ({"type": "Polynomial", "power": 3}, "polynomial", {"power": 3.0, "lr_end": 0.0}),
        ({"type": "Constant"}, "constant_with_warmup", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_schedules_are_those_of_transformers(warmup: int, ours: dict[str, Any], name: str, more: dict[str, Any]) -> None:
    got = rates(100, warmup=warmup, **ours)
    assert got[warmup:] == pytest.approx(theirs(name, 100, warmup, **more)[warmup:])
    assert got[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])


def test_inverse_sqrt_and_stable_decay_are_those_of_transformers() -> None:
    assert rates(100, type="InverseSqrt", warmup=10)[10:] == pytest.approx(theirs("inverse_sqrt", 100, 10)[10:])
    assert rates(50, type="InverseSqrt", warmup=0)[3] == pytest.approx(0.5)
    expected = theirs("warmup_stable_decay", 100, 20, num_decay_steps=40, decay_type="linear")
    assert rates(100, type="WarmupStableDecay", warmup=20, decay=0.5)[20:] == pytest.approx(expected[20:])


def test_one_cycle_is_that_of_torch() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=100, pct_start=0.3)
    expected = []
    for _ in range(100):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        if len(expected) < 100:
            schedule.step()
    assert rates(100, type="OneCycle", warmup=30) == pytest.approx(expected, abs=1e-9)


def test_slanted_triangular_is_that_of_the_paper() -> None:
    cut, ratio = 10, 32
    expected = []
    for step in range(100):
        height = step / cut if step < cut else 1 - (step - cut) / (cut * (100 / cut - 1))
        expected.append((1 + height * (ratio - 1)) / ratio)
    assert rates(100, type="SlantedTriangular", warmup=10) == pytest.approx(expected)


def test_it_does_not_fall_below_min_factor() -> None:
    for kind in ("Linear", "Cosine", "CosineRestarts", "Polynomial", "WarmupStableDecay"):
        got = rates(1000, type=kind, minFactor=0.25, warmup=0)
        assert min(got) == pytest.approx(0.25, abs=1e-2), kind
        assert min(got) >= 0.25
        assert got[0] == 1.0


def test_the_rate_falls_when_the_metric_stands_still(job: Job) -> None:
    plateau = {"type": "ReduceOnPlateau", "factor": 0.1, "patience": 2, "minFactor": 0.005, "warmup": 0}
    still = {"epochs": 2, "learningRate": 1e-9, "schedule": plateau}  # nothing is learned: only the first evaluation improves
    policy = {"evaluation": {"everySteps": 1, "bestMetric": "accuracy"}, "checkpoint": {"everySteps": 1}}
    done = run(job, "plateau", still, **policy)
    state = json.loads((done.newest() / "trainer/state.json").read_text())
    assert state["plateaus"] == 5  # of 12 evaluations the first is the best; five pairs stand still
    schedule = Schedule.model_validate(plateau)
    assert [optim.factor(schedule, 5, 12, n) for n in (0, 1, 2, 3)] == pytest.approx([1, 0.1, 0.01, 0.005])


def test_an_option_of_another_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="cycles is for CosineRestarts only"):
        Schedule.model_validate({"type": "Linear", "cycles": 2})


# ------------------------------------------------------------------------------------------- freezing and unfreezing ----
@pytest.mark.parametrize(
    ("freeze", "trained"),
    [
        ({}, {EMBEDDINGS, LOWEST, HIGHEST, HEAD}),
        ({"embeddings": True}, {LOWEST, HIGHEST, HEAD}),
        ({"layers": 1}, {EMBEDDINGS, HIGHEST, HEAD}),
        ({"embeddings": True, "layers": 2}, {HEAD}),
        ({"patterns": ["bert.encoder.*", "*embeddings*"]}, {HEAD}),
    ],
)
def test_what_is_frozen_keeps_its_weights(job: Job, freeze: dict[str, Any], trained: set[str]) -> None:
    done = run(job, "frozen", {"epochs": 1, "weightDecay": 0.1, "freeze": freeze})
    before = {f"bert.{name}": value for name, value in load_file(job.model / "model.safetensors").items()}
    assert moved(before, weights(done.output)) == trained


def test_layers_thaw_from_the_top_and_a_resume_goes_on(job: Job) -> None:
    recipe = {"epochs": 4, "freeze": {"embeddings": True, "layers": 2}, "unfreeze": {"everyEpochs": 1}}
    saves = {"checkpoint": {"everySteps": 6, "keepLast": 10}}
    whole = run(job, "whole", recipe, **saves)
    before = {f"bert.{name}": value for name, value in load_file(job.model / "model.safetensors").items()}
    after: list[set[str]] = []
    for epoch in range(1, 5):
        [folder] = whole.checkpoints.glob(f"step-{6 * epoch:08d}-*")
        after.append(moved(before, weights(folder)))
    assert after == [{HEAD}, {HEAD, HIGHEST}, {HEAD, HIGHEST, LOWEST}, {HEAD, HIGHEST, LOWEST, EMBEDDINGS}]
    cut = replace(whole, home=job.home / "cut", runs=[])
    with pytest.raises(Killed):
        cut.run(kill_at=15)
    cut.run()
    assert (cut.output / "model/model.safetensors").read_bytes() == (whole.output / "model/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("freeze", "says"),
    [
        ({"layers": 3}, "3 is more than the model's 2 layers"),
        ({"patterns": ["encoder.*"]}, "no parameter is named 'encoder.*'"),
        ({"patterns": ["*"]}, "nothing is left to train"),
    ],
)
def test_what_cannot_be_frozen_is_told(job: Job, freeze: dict[str, Any], says: str) -> None:
    with pytest.raises(TrainingFailure, match="RecipeInvalid|freeze") as told:
        run(job, "wrong", {"freeze": freeze})
    assert told.value.failure.reason == "RecipeInvalid"
    assert says in told.value.message


C = transformers
TINY: list[tuple[str, Any, dict[str, Any]]] = [
    ("bert", C.BertConfig, {}),
    ("roberta", C.RobertaConfig, {}),
    ("xlm-roberta", C.XLMRobertaConfig, {}),
    ("distilbert", C.DistilBertConfig, {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2}),
    ("deberta-v2", C.DebertaV2Config, {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 8}),
    ("electra", C.ElectraConfig, {"embedding_size": 8}),
    ("albert", C.AlbertConfig, {"embedding_size": 8, "num_hidden_groups": 2}),
    ("modernbert", C.ModernBertConfig, {"pad_token_id": 0, "global_attn_every_n_layers": 2}),
    ("mpnet", C.MPNetConfig, {}),
    ("gpt2", C.GPT2Config, {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "pad_token_id": 0}),
    ("llama", C.LlamaConfig, {"num_key_value_heads": 2, "pad_token_id": 0}),
    ("qwen2", C.Qwen2Config, {"num_key_value_heads": 2, "pad_token_id": 0}),
]
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(("name", "config", "more"), TINY, ids=[name for name, _, _ in TINY])
def test_every_architecture_has_its_parts(name: str, config: Any, more: dict[str, Any]) -> None:
    sizes = {"vocab_size": 40} if name in ("distilbert", "gpt2") else SIZES
    made = config(num_labels=3, **(sizes | more))
    model = transformers.AutoModelForSequenceClassification.from_config(made)
    found = layers.parts(model)
    assert found.layers == 2
    by_depth = {depth: [n for n, d in found.depth.items() if d == depth] for depth in range(4)}
    assert all(by_depth.values()), by_depth
    words = next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    assert found.depth[words] == layers.EMBEDDINGS
    heads = [n for n, _ in model.named_parameters() if not n.startswith(f"{model.base_model_prefix}.")]
    assert heads
    assert {found.depth[n] for n in heads} == {found.top}
    layers.set_trainable(model, Hyperparameters(freeze=Freeze(embeddings=True, layers=1)), 0)
    ids = torch.randint(1, 40, (2, 6))
    model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
    learned = {found.depth[n] for n, p in model.named_parameters() if p.grad is not None}
    assert learned == {2, 3}


def test_the_rate_decays_layer_by_layer(job: Job) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(job.model, num_labels=3)
    optimizer = optim.build(model, Hyperparameters(layerwise_decay=0.5, weight_decay=0.1), 1.0)
    optim.set_rate(optimizer, 0.8)
    rate = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    expected = {HEAD: 0.8, HIGHEST: 0.4, LOWEST: 0.2, EMBEDDINGS: 0.1}
    for name, parameter in model.named_parameters():
        for prefix, value in expected.items():
            if name.startswith(prefix):
                assert rate[id(parameter)] == pytest.approx(value), name
        assert decay[id(parameter)] == (0.1 if parameter.ndim > 1 else 0.0)


# -------------------------------------------------------------------------------------------------------- gradient ----
@pytest.fixture
def batch(job: Job) -> tuple[Any, Encoded, np.ndarray]:
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(job.model, num_labels=3).eval()
    data = Encoded(Ragged.of([[2, 5, 6, 3], [2, 7, 3], [2, 9, 10, 11, 3]]), np.array([0, 1, 2]), 0)
    return model, data, np.arange(3)


def gradient(batch: tuple[Any, Encoded, np.ndarray], precision: Precision = Precision.FP32, **hyper: Any) -> Gradient:
    model, data, rows = batch
    model.zero_grad()
    made = Gradient(model, Hyperparameters.model_validate(hyper), precision, KIND, data, 0, ALONE)
    made.wrap()
    made.loss = made(rows)  # type: ignore[attr-defined]
    return made


def test_labels_are_smoothed(batch: Any) -> None:
    model, data, rows = batch
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([2.0, 0.0, -1.0]))  # a model that is sure is one that smoothing changes
    tensors = collate(data, rows, 0, torch.device("cpu"))
    logits = model(input_ids=tensors["input_ids"], attention_mask=tensors["attention_mask"]).logits
    labels = tensors["labels"].clamp(max=1)  # each label once would cancel out
    expected = [cross_entropy(logits, labels, label_smoothing=share).item() for share in (0.0, 0.2)]
    assert abs(expected[0] - expected[1]) > 0.01, "otherwise this test shows nothing"
    unbalanced = (model, replace(data, labels=labels.numpy()), rows)
    got = [gradient(unbalanced, labelSmoothing=share).loss for share in (0.0, 0.2)]  # type: ignore[attr-defined]
    assert got == pytest.approx(expected, rel=1e-5)


def test_fgm_adds_the_gradient_of_the_moved_batch(batch: Any) -> None:
    model, _, rows = batch
    words = model.get_input_embeddings().weight
    before = words.detach().clone()
    plain = gradient(batch)
    clean = {n: p.grad.clone() for n, p in model.named_parameters()}
    move = 0.5 * clean["bert.embeddings.word_embeddings.weight"] / clean["bert.embeddings.word_embeddings.weight"].norm()
    with torch.no_grad():
        words.add_(move)
    gradient(batch)
    at_moved = {n: p.grad.clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        words.copy_(before)
    fgm = gradient(batch, adversarial={"epsilon": 0.5})
    assert fgm.loss == plain.loss  # type: ignore[attr-defined]
    assert torch.equal(words, before), "the embeddings are where they were"
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, clean[name] + at_moved[name], rtol=1e-4, atol=1e-6), name
    assert len(rows) == 3


def test_fgm_without_trained_words_is_told(job: Job) -> None:
    with pytest.raises(TrainingFailure, match="adversarial"):
        run(job, "fgm", {"adversarial": {}, "freeze": {"patterns": ["*word_embeddings*"]}})


@pytest.mark.parametrize("precision", ["BF16", "FP16"])
def test_sixteen_bits_train_and_go_on_bit_for_bit(job: Job, precision: str) -> None:
    hyper, saves = {"epochs": 2, "precision": precision}, {"checkpoint": {"everySteps": 1}}
    whole = run(job, "whole", hyper, **saves)
    assert result(whole)["resolved"]["precision"] == precision
    assert all(w.dtype is torch.float32 for w in weights(whole.output).values() if w.is_floating_point())
    exact = run(job, "exact", hyper | {"precision": "FP32"}, **saves)
    one, other = weights(whole.output), weights(exact.output)
    assert any(not torch.equal(one[n], other[n]) for n in one)
    cut = replace(whole, home=job.home / "cut", runs=[])
    with pytest.raises(Killed):
        cut.run(kill_at=5)
    cut.run()
    assert (cut.output / "model/model.safetensors").read_bytes() == (whole.output / "model/model.safetensors").read_bytes()
    if precision == "FP16":
        assert json.loads((whole.newest() / "trainer/state.json").read_text())["scaler"]["scale"] > 1


def test_auto_takes_what_the_hardware_has(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    for has, expected in ((True, Precision.BF16), (False, Precision.FP32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert resolve(Precision.AUTO, cpu) is expected
    for capability, expected in (((9, 0), Precision.BF16), ((8, 0), Precision.BF16), ((7, 5), Precision.FP16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert resolve(Precision.AUTO, gpu) is expected
    assert resolve(Precision.FP32, gpu) is Precision.FP32


def test_gradient_checkpointing_changes_memory_and_not_the_model(job: Job) -> None:
    one = run(job, "one", {"epochs": 1, "precision": "FP32"})
    other = run(job, "other", {"epochs": 1, "precision": "FP32", "gradientCheckpointing": True})
    a, b = weights(one.output), weights(other.output)
    assert all(torch.allclose(a[n], b[n], atol=1e-6) for n in a)


def test_max_steps_end_training_and_the_schedule(job: Job) -> None:
    done = run(job, "short", {"epochs": 10, "maxSteps": 8})
    assert (result(done)["steps"], result(done)["resolved"]["steps"]) == (8, 8)
    assert [e["step"] for e in result(done)["evaluations"]] == [6, 8], "after the epoch, and at the end"
    assert result(run(job, "long", {"epochs": 1, "maxSteps": 1000}))["steps"] == 6


def test_unfreezing_needs_something_frozen() -> None:
    with pytest.raises(ValueError, match="unfreeze needs freeze"):
        Hyperparameters(unfreeze=Unfreeze())
