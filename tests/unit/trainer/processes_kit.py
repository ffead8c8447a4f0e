"""What the tests of several processes share: a recipe that numbers can be compared with, and runs under torchrun."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainer_kit import merged

from finetune_api import names
from support import warm
from support.models import tiny_classifier, write_split
from testcluster.processes import free_port

NO_DROPOUT = {"hidden": 0.0, "attention": 0.0, "classifier": 0.0}
"""Each process draws its own, so that only without it the numbers can agree."""


def make_recipe(folder: Path) -> dict[str, Any]:
    """Batches of 8 of 67 rows: the last one has 3. The validation split has an odd number of rows."""
    for split, rows in (("train", 67), ("validation", 21)):
        write_split(folder / f"{split}.csv", rows, seed=rows)
    return {
        "task": "SequenceClassification",
        "model": {"uri": f"file://{tiny_classifier(folder / 'model')}"},
        "dataset": {"uri": f"file://{folder}", "labels": ["negative", "neutral", "positive"], "maxLength": 16},
        "hyperparameters": {"epochs": 2, "batchSize": 8, "learningRate": 1e-3, "dropout": NO_DROPOUT, "precision": "FP32"},
        "checkpoint": {"everySteps": 1, "keepLast": 100},
    }


class Training:
    """One training in a folder, by one or more processes; `module` runs in each of them, with `env` in its environment."""

    def __init__(
        self, recipe: dict[str, Any], folder: Path, processes: int, *, module: str = "finetune_trainer", **env: str
    ) -> None:
        self.recipe, self.folder, self.processes, self.module, self.more = recipe, folder, processes, module, env
        self.output, self.log = folder / "out", folder / "termination-log"

    def changed(self, processes: int, **hyperparameters: Any) -> "Training":
        """Another run in the same folder, which goes on from what is there."""
        recipe = merged(self.recipe, {"hyperparameters": hyperparameters})
        return Training(recipe, self.folder, processes, module=self.module, **self.more)

    def start(self) -> "subprocess.Popen[str]":
        job = {**self.recipe, "output": {"storageUri": f"file://{self.output}"}}
        env = {
            **os.environ,
            names.ENV_JOB: json.dumps(job),
            names.ENV_WORKDIR: str(self.folder / "work"),
            names.ENV_TERMINATION_LOG: str(self.log),
            "OMP_NUM_THREADS": "1",
            **self.more,
        }
        torchrun = ["torch.distributed.run", f"--nproc-per-node={self.processes}", f"--master-port={free_port()}", "--module"]
        command = [warm.python(), "-m", *(torchrun if self.processes > 1 else []), self.module]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self) -> dict[str, Any]:
        """To its end: what result.json says."""
        process = self.start()
        said, _ = process.communicate(timeout=280)
        assert process.returncode == 0, said
        return self.result()

    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.output / "result.json").read_text())
        return found

    def fails(self) -> dict[str, Any]:
        """It must; what the termination message says."""
        process = self.start()
        said, _ = process.communicate(timeout=280)
        assert process.returncode != 0, said
        end: dict[str, Any] = json.loads(self.log.read_text())
        return {**end, "said": said}

    def checkpoint(self, step: int) -> Path:
        return max(self.output.glob(f"checkpoints/step-{step:08d}-*"))

    def cut(self, step: int) -> None:
        """As if it had been killed after this step."""
        (self.output / "result.json").unlink(missing_ok=True)
        for folder in self.output.glob("checkpoints/step-*"):
            if int(folder.name.split("-")[1]) > step:
                shutil.rmtree(folder)

    def first_gradient(self) -> torch.Tensor:
        """AdamW's first moment after one step from zero is the gradient times 1 - beta1."""
        saved = load_file(self.checkpoint(1) / "trainer/optimizer.safetensors")
        return torch.cat([saved[name].flatten().double() for name in sorted(saved) if name.endswith("exp_avg")])

    def losses(self) -> list[float]:
        """Of the first execution."""
        events = EventAccumulator(str(min((self.output / "logs").iterdir())))
        events.Reload()
        return [event.value for event in events.Scalars("train/loss")]

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.output / "model/model.safetensors")


def bits(folder: Path) -> dict[str, bytes]:
    """Weights and optimizer of a checkpoint."""
    return {name: (folder / name).read_bytes() for name in ("model/model.safetensors", "trainer/optimizer.safetensors")}
