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

from finetune_trainer.dist import Group
from finetune_trainer.errors import TrainingFailure

if TYPE_CHECKING:
    pass


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
    evaluations: list[dict[str, Any]] = field(default_factory=list)


Random = dict[str, list[torch.Tensor]]


def random_state(device: torch.device, group: Group) -> Random:
    """Of every process, by kind; to be called by all of them."""
    random = {"cpu": group.collect(torch.get_rng_state())}
    if device.type == "cuda":
        random["cuda"] = group.collect(torch.cuda.get_rng_state(device))
    return random


def stage(
    folder: Path,
    state: TrainState,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    random: Random,
    save_model: Callable[[Path], None],
) -> None:
    """Writes model/ and trainer/ below the folder."""
    save_model(folder / "model")
    trainer = folder / "trainer"
    trainer.mkdir(parents=True, exist_ok=True)
    flat = {f"{i}.{k}": v for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
    save_file({k: v.contiguous() for k, v in flat.items()}, trainer / "optimizer.safetensors")
    by_rank = {f"{kind}.{rank}": value for kind, values in random.items() for rank, value in enumerate(values)}
    save_file(by_rank, trainer / "random.safetensors")
    (trainer / "state.json").write_text(json.dumps({**asdict(state), "scaler": scaler.state_dict()}))


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
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(folder / "trainer/optimizer.safetensors").items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def restore_random(folder: Path, device: torch.device, group: Group) -> None:
    """A process that was not there when this was saved keeps the state that its seed gave it."""
    random = load_file(folder / "trainer/random.safetensors")
    if (cpu := random.get(f"cpu.{group.rank}")) is not None:
        torch.set_rng_state(cpu)
    if (cuda := random.get(f"cuda.{group.rank}")) is not None and device.type == "cuda":
        torch.cuda.set_rng_state(cuda, device)
