"""All that a training must remember, as files: the model, the optimizer, random states, the loss scale, progress. No pickle.

`gather` and `Buffers.hold` take a consistent copy between two steps, `write` makes files of it that checkpoint.py commits; `restore` reads
them back. What is not here is a pure function of the recipe.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from finetune_trainer import adapters, layers, sharding, vocabulary
from finetune_trainer.dist import Group
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.sharding import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


ROWS = "rows"
"""Of a narrow embedding's state in the optimizer's file: the words it is about."""


@dataclass
class TrainState:
    """Progress. `batch` is the next batch of `epoch`; `examples` counts training examples seen."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    examples: int = 0
    best_metric: float | None = None
    best_step: int | None = None
    best_checkpoint: str | None = None
    bad_evaluations: int = 0
    plateaus: int = 0
    plateau_evaluations: int = 0
    precision: str = ""
    """As resolved at the first step: a resume on other hardware goes on in the same format."""
    data: str = ""
    """Digest of the training examples as the model reads them."""
    base: str = ""
    """Digest of the model beside which the rest trains, where checkpoints do not hold it (adapters, a head on a frozen encoder)."""
    threads: int = 0
    """Of each process on a CPU: sums are split among them, and another number would round otherwise."""
    micro_batch: int | None = None
    """Rows at once that a process was found to have memory for; None while all of its share fits."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------------- save ----
@dataclass(frozen=True)
class Tensors:
    """What a checkpoint holds beside progress, of all processes."""

    model: Weights
    optimizer: Weights
    random: Weights
    frozen: frozenset[str]
    """Names of the model's weights that do not train (now)."""


def weights(model: "PreTrainedModel", group: Group) -> Weights:
    """The weights that a model folder holds: all of a stock model, or what trains beside one. To be called by all; the leader has them."""
    found = model.state_dict(keep_vars=True)  # sharded ones are known by their identity
    if any(layers.of_addition(name) for name in found):
        found = {name: tensor for name, tensor in found.items() if layers.of_addition(name)}
    whole = {name: tensor.detach() for name, tensor in sharding.whole(found, group).items()}
    if getattr(model, "peft_config", None):
        return adapters.named(model, whole) if group.leads else {}
    return vocabulary.whole_weights(model, whole)


def gather(model: "PreTrainedModel", optimizer: torch.optim.Optimizer, group: Group) -> Tensors:
    """To be called by all processes; the leader has it all. What is not sharded are the tensors themselves, which training changes."""
    flat = {f"{i}.{k}": v for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
    flat |= {f"{i}.{ROWS}": rows for i, rows in _rows(model, optimizer).items() if f"{i}.exp_avg" in flat}
    random = {kind: group.collect(state) for kind, state in own_random(group.device()).items()}
    by_rank = {f"{kind}.{rank}": value for kind, values in random.items() for rank, value in enumerate(values)}
    frozen = frozenset(name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad)
    return Tensors(weights(model, group), sharding.whole(flat, group), by_rank, frozen)


class Buffers:
    """Memory for one checkpoint, reused from save to save: files are written from it while training goes on."""

    def __init__(self) -> None:
        self._made: dict[str, torch.Tensor] = {}

    def hold(self, tensors: Tensors) -> Tensors:
        """Copies of all tensors, in the memory of the CPU. This is what training waits for."""
        model, optimizer = self._copies("model", tensors.model, tensors.frozen), self._copies("optimizer", tensors.optimizer)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return replace(tensors, model=model, optimizer=optimizer)

    def _copies(self, part: str, tensors: Weights, unchanged: frozenset[str] = frozenset()) -> Weights:
        held: dict[tuple[int, torch.Size], torch.Tensor] = {}
        for name, tensor in tensors.items():
            # One tensor with two names (tied weights) stays one.
            if (same := (tensor.data_ptr(), tensor.shape)) in held and tensor.numel():
                continue
            buffer = self._made.get(key := f"{part}.{name}")
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = self._made[key] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            elif name in unchanged:  # frozen weights thaw, but never freeze: these were copied when they were what they are
                held[same] = buffer
                continue
            held[same] = buffer.copy_(tensor, non_blocking=True)
        return {name: held[tensor.data_ptr(), tensor.shape] for name, tensor in tensors.items()}


def write(
    folder: Path, state: dict[str, Any], tensors: Tensors, save_model: Callable[[Path, Weights, frozenset[str]], None]
) -> None:
    """Writes model/ and trainer/ below the folder."""
    save_model(folder / "model", tensors.model, tensors.frozen)
    trainer = folder / "trainer"
    trainer.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.optimizer.items()}, trainer / "optimizer.safetensors")
    save_file(tensors.random, trainer / "random.safetensors")
    (trainer / "state.json").write_text(json.dumps(state))


# ---------------------------------------------------------------------------------------------------------- restore ----
def progress(folder: Path, now: TrainState) -> TrainState:
    """How far it was. Raises TrainingFailure where that was with other training data or beside another model than there are now."""
    try:
        known = json.loads((folder / "trainer/state.json").read_text())
        state = TrainState(**{key: value for key, value in known.items() if key != "scaler"})
    except (ValueError, TypeError, AttributeError) as error:  # its hash fits: another version wrote it, or somebody
        raise TrainingFailure("CheckpointCorrupt", f"{folder.name}/trainer/state.json is not one of this version's") from error
    if state.base != now.base:
        raise TrainingFailure(
            "ModelNotFound",
            f"model.uri: its weights are not those that the checkpoint of step {state.step} was trained beside: bring them back (a model of "
            "the hub can be pinned as hf://org/name@revision), or choose another output.storageUri to train from the start",
        )
    if state.data != now.data:
        raise TrainingFailure(
            "DataInvalid",
            f"dataset.train: its examples are not those that the checkpoint of step {state.step} was trained with: bring them back, or "
            "choose another output.storageUri to train with the new ones from the start",
        )
    return state


def restore(folder: Path, model: "PreTrainedModel", optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """Optimizer and loss scale; the model's weights were loaded from model/, the random state comes last."""
    if scaled := json.loads((folder / "trainer/state.json").read_text()).get("scaler"):
        scaler.load_state_dict(scaled)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    saved, now = load_file(folder / "trainer/optimizer.safetensors"), _rows(model, optimizer)
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in saved.items():
        index, _, name = key.partition(".")
        if name != ROWS:
            number = int(index)
            fitting = _for_rows(value, saved.get(f"{index}.{ROWS}"), now.get(number), model.get_input_embeddings())
            state.setdefault(number, {})[name] = sharding.part(fitting, parameters[number])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _rows(model: "PreTrainedModel", optimizer: torch.optim.Optimizer) -> dict[int, torch.Tensor]:
    """The words that the state of a narrow embedding is about, by the number of its parameter."""
    narrow = {id(module.weight): module.used for _, module in vocabulary.narrowed(model)}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {i: narrow[id(p)] for i, p in enumerate(parameters) if id(p) in narrow}


def _for_rows(value: torch.Tensor, saved: torch.Tensor | None, now: torch.Tensor | None, embedding: Any) -> torch.Tensor:
    """State of an embedding with these rows, or all, for one with those: what no example has touched is zero."""
    if value.ndim == 0 or (saved is None and now is None):
        return value
    if saved is not None:
        if now is not None and torch.equal(saved, now.cpu()):
            return value
        everything = value.new_zeros(embedding.num_embeddings if now is None else embedding.pretrained.shape[0], value.shape[1])
        everything[saved] = value
        value = everything
    return value if now is None else value[now.cpu()]


def restore_random(folder: Path, device: torch.device, group: Group) -> None:
    """A process that was not there when this was saved keeps the state that its seed gave it."""
    random = load_file(folder / "trainer/random.safetensors")
    own = {kind: random[key] for kind in ("cpu", "cuda") if (key := f"{kind}.{group.rank}") in random}
    set_own_random(own, device)


def agree_on_threads(state: TrainState, device: torch.device) -> None:
    """On a CPU a sum is split among threads, and another number of them rounds otherwise: a resume takes as many as it began with."""
    if device.type == "cpu":
        if state.threads and state.threads != torch.get_num_threads():
            torch.set_num_threads(state.threads)
        state.threads = torch.get_num_threads()


# ----------------------------------------------------------------------------------------------------- random state ----
def own_random(device: torch.device) -> Weights:
    """What this process draws dropout from, by kind of device."""
    random = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(device)
    return random


def set_own_random(random: Weights, device: torch.device) -> None:
    """Back to that state."""
    if "cpu" in random:
        torch.set_rng_state(random["cpu"])
    if "cuda" in random and device.type == "cuda":
        torch.cuda.set_rng_state(random["cuda"], device)
