"""All that a training must remember, as files: the model, the optimizer, random states, the loss scale, progress. No pickle.

`stage` writes them into a folder that checkpoint.py commits; `restore` reads them back. What is not here is a pure function of the recipe.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from finetune_trainer import sharding
from finetune_trainer.dist import Group
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.sharding import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    vocabulary: str = ""
    """Digest of the words that the optimizer's state is about (vocabulary.py)."""
    micro_batch: int | None = None
    """Rows at once that a process was found to have memory for; None while all of its share fits."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------------- save ----
@dataclass(frozen=True)
class Tensors:
    """What a checkpoint holds beside progress, of all processes."""

    model: Weights | None
    optimizer: Weights
    random: Weights


def gather(model: "PreTrainedModel", optimizer: torch.optim.Optimizer, device: torch.device, group: Group) -> Tensors:
    """To be called by all processes; the leader has it all."""
    flat = {f"{i}.{k}": v for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
    random = {kind: group.collect(state) for kind, state in own_random(device).items()}
    by_rank = {f"{kind}.{rank}": value for kind, values in random.items() for rank, value in enumerate(values)}
    return Tensors(sharding.weights(model, group), sharding.whole(flat, group), by_rank)


def stage(
    folder: Path,
    state: TrainState,
    scaler: torch.amp.GradScaler,
    tensors: Tensors,
    save_model: Callable[[Path, Weights | None], None],
) -> None:
    """Writes model/ and trainer/ below the folder."""
    save_model(folder / "model", tensors.model)
    trainer = folder / "trainer"
    trainer.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.optimizer.items()}, trainer / "optimizer.safetensors")
    save_file(tensors.random, trainer / "random.safetensors")
    (trainer / "state.json").write_text(json.dumps({**asdict(state), "scaler": scaler.state_dict()}))


# ---------------------------------------------------------------------------------------------------------- restore ----
def progress(folder: Path, vocabulary: str) -> TrainState:
    """How far it was. Raises TrainingFailure(DataInvalid) where it was about other words."""
    known = json.loads((folder / "trainer/state.json").read_text())
    state = TrainState(**{key: value for key, value in known.items() if key != "scaler"})
    if state.vocabulary != vocabulary:
        raise TrainingFailure(
            "DataInvalid",
            f"dataset.train: it has other words than when the checkpoint of step {state.step} was written: bring that data back, or "
            "choose another output.storageUri",
        )
    return state


def restore(folder: Path, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """Optimizer and loss scale; the model's weights were loaded from model/, the random state comes last."""
    if scaled := json.loads((folder / "trainer/state.json").read_text()).get("scaler"):
        scaler.load_state_dict(scaled)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(folder / "trainer/optimizer.safetensors").items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = sharding.part(value, parameters[int(index)])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def restore_random(folder: Path, device: torch.device, group: Group) -> None:
    """A process that was not there when this was saved keeps the state that its seed gave it."""
    random = load_file(folder / "trainer/random.safetensors")
    own = {kind: random[key] for kind in ("cpu", "cuda") if (key := f"{kind}.{group.rank}") in random}
    set_own_random(own, device)


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
