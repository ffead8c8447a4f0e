"""A sweep of tiny trainings on this machine: a manifest, its model and data, and the command as a user types it."""

import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from finetune_api import names
from finetune_api.manifest import load_sweep
from finetune_cli.sweep_objects import Objects
from finetune_cli.sweep_run import SETTINGS, take_over
from finetune_operator.domain import trials as t
from finetune_operator.domain.status import is_finished
from finetune_operator.domain.sweep import decide_sweep
from finetune_operator.domain.sweep_types import CreateTrial, PatchTrial, SweepObserved
from finetune_operator.domain.types import CreateJob
from support.models import tiny_classifier, write_split

METRIC = "validation/macro_f1"
RUNGS = (480, 960, 1920)
Object = dict[str, Any]
QUIET = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "FINETUNE_"))} | {"OMP_NUM_THREADS": "1"}


class Place:
    """A folder with a bucket and a model."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bucket, self.work = folder, folder / "s3/bucket", folder / "work"

    def fill(self) -> "Place":
        tiny_classifier(self.folder / "model")
        for split, count in (("train", 120), ("validation", 30), ("test", 30)):
            write_split(self.bucket / f"data/{split}.csv", count, seed=count)
        return self

    def manifest(self, **spec: Any) -> Path:
        """Four trials of 30 epochs of 120 examples, two at a time; `spec` replaces fields."""
        recipe = {
            "task": "SequenceClassification",
            "model": {"uri": f"file://{self.folder / 'model'}"},
            "dataset": {
                "uri": "s3://bucket/data", "test": "test.csv", "labels": ["negative", "neutral", "positive"], "maxLength": 32,
            },
            "hyperparameters": {"epochs": 30, "batchSize": 8},
            "evaluation": {"everyEpochs": 10},
            "checkpoint": {"everySteps": 50},
            "output": {"storageUri": "s3://bucket/out"},
        }  # fmt: skip
        space = {"logUniform": {"min": 1e-6, "max": 1e-2}}
        document = {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "HyperparameterSweep",
            "metadata": {"name": "tiny"},
            "spec": {
                "objective": {"metric": METRIC, "direction": "Maximize"},
                "parameters": [{"name": "lr", "path": "hyperparameters.learningRate", "searchSpace": space}],
                "searchAlgorithm": {"tpe": {"startupTrials": 2}},
                "pruneAlgorithm": {"asha": {"minExamples": 480, "reductionFactor": 2, "maxRungs": 3}},
                "numTrials": 4,
                "parallelTrials": 2,
                "trialTemplate": {"spec": recipe},
                **spec,
            },
        }
        file = self.folder / "tiny.yaml"
        file.write_text(yaml.safe_dump(document))
        return file

    def arguments(self, file: Path) -> list[str]:
        places = ("-f", file, "--s3-root", self.folder / "s3", "--workdir", self.work)
        return [sys.executable, "-m", "finetune_cli", "run", *map(str, places)]

    def start(self, file: Path) -> "subprocess.Popen[str]":
        return subprocess.Popen(self.arguments(file), env=QUIET, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finetune(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "finetune_cli", *map(str, arguments)]
    return subprocess.run(command, env=QUIET, capture_output=True, text=True, timeout=300)


# ------------------------------------------------------------------------------------------ played ----
def _end(job: Object, value: float | None, reason: str) -> Object:
    kind = "Complete" if reason in ("Trained", "Stopped") else "Failed"
    conditions = [{"type": kind, "status": "True", "reason": reason, "message": ""}]
    metrics = [{"name": METRIC, "value": f"{value:.6g}"}] if value is not None else []
    return {**job, "status": {**(job.get("status") or {}), "conditions": conditions, "result": {"metrics": metrics}}}


def _advance(job: Object) -> Object:
    """What its trainer does next: an evaluation at a rung, then its end. One fails, and one is not a number."""
    said = t.chosen(job)
    assert said is not None
    status = job.get("status") or {}
    if job["spec"].get("stop"):
        return _end(job, None, "Stopped")
    seen = len(status.get("evaluations") or [])
    value = float(said.parameters["lr"]) * 100 + seen / 10
    if said.index == 3 and seen == 1:
        return _end(job, None, "NonFiniteLoss")
    if seen == len(RUNGS):
        return _end(job, value, "Trained")
    shown = "nan" if said.index == 5 else f"{value:.6g}"
    told = {"examples": RUNGS[seen], "step": 1, "metrics": [{"name": METRIC, "value": shown}]}
    return {**job, "status": {**status, "evaluations": [*(status.get("evaluations") or []), told]}}


def play(folder: Path, **spec: Any) -> Objects:
    """A sweep up to its last process, with trials that come forward in turn."""
    objects = Objects(folder / "work")
    objects.load()
    manifest = Place(folder).manifest(numTrials=14, parallelTrials=3, **spec)
    take_over(objects, load_sweep(manifest.read_text()))
    for turn in range(500):
        sweep = objects.need("tiny")
        jobs = objects.all(names.KIND_JOB)
        by_index = {said.index: job for job in jobs if (said := t.chosen(job))}
        decision = decide_sweep(SweepObserved(sweep, by_index), datetime.now(UTC), SETTINGS)
        for action in decision.actions:
            if isinstance(action, CreateTrial):
                objects.create(action.manifest)
            elif isinstance(action, PatchTrial):
                objects.patch(action.name, action.uid, action.patch)
        objects.put({**sweep, "status": decision.status})
        if any(isinstance(action, CreateJob) for action in decision.actions):
            return objects
        going = [job for job in objects.all(names.KIND_JOB) if not is_finished(job.get("status") or {})]
        if going:
            objects.put(_advance(going[turn % len(going)]))
    raise AssertionError("it does not end")
