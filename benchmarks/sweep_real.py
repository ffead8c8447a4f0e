"""A real search: 24 configurations of a real model on real data, trained to their end once; then ASHA on these curves in random orders.

What is recorded is the trainer's own: its evaluations at the rungs, and the processor time until each. Replayed is the engine's own `judge`,
with four workers whose time is the recorded time. One live run of the same sweep (`finetune run`, two trials at a time, real processes that
are really stopped) shows that the replay tells the truth. `make bench-sweep` takes this as its part `real`; about 40 CPU-minutes the first
time: curves that are recorded in build/bench/sweep-curves.json are not trained again.
"""

import heapq
import io
import json
import math
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import LABELS, RESULTS, ROOT, Corpus, load_airline_or_feedback, print_table

from finetune_api.manifest import parse_sweep
from finetune_api.report import EndReport
from finetune_operator.search.finished import best
from finetune_operator.search.judge import judge, rungs_of
from finetune_operator.search.suggest import suggest
from finetune_operator.search.types import Outcome, Reading, Study, Trial
from finetune_trainer.config import Runtime
from finetune_trainer.report import Console
from finetune_trainer.run import Run

sys.path.append(str(ROOT / "hack"))
import minilm

CONFIGURATIONS = 24
ORDERS = 1000
WORKERS = 4
ROWS, VALIDATION, EPOCHS = 1200, 1000, 3
METRIC = "validation/macro_f1"
CURVES = RESULTS / "sweep-curves.json"
SEED = 7


def sweep(data: str, output: str) -> dict[str, Any]:
    """The manifest: what the live run applies, and what the replay judges by."""
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "HyperparameterSweep",
        "metadata": {"name": "tweets"},
        "spec": {
            "objective": {"metric": METRIC, "direction": "Maximize"},
            "parameters": [
                {
                    "name": "rate",
                    "path": "hyperparameters.learningRate",
                    "searchSpace": {"logUniform": {"min": 1e-5, "max": 3e-3}},
                },
                {"name": "batch", "path": "hyperparameters.batchSize", "searchSpace": {"categorical": {"values": [8, 16, 32]}}},
                {"name": "decay", "path": "hyperparameters.weightDecay", "searchSpace": {"uniform": {"min": 0, "max": 0.1}}},
                {"name": "dropout", "path": "hyperparameters.dropout.hidden", "searchSpace": {"uniform": {"min": 0, "max": 0.3}}},
            ],
            "searchAlgorithm": {"random": {}},
            "pruneAlgorithm": {"asha": {"minExamples": ROWS * EPOCHS // 9, "reductionFactor": 3, "maxRungs": 2}},
            "seed": SEED,
            "numTrials": CONFIGURATIONS,
            "parallelTrials": 2,
            "trialTemplate": {
                "spec": {
                    "task": "SequenceClassification",
                    "model": {"uri": f"hf://{minilm.REPOSITORY}"},
                    "dataset": {"uri": data, "labels": LABELS, "maxLength": 64},
                    "hyperparameters": {"epochs": EPOCHS},
                    "output": {"storageUri": output},
                    "checkpoint": {"everySteps": 1_000_000},
                }
            },
        },
    }


@dataclass(frozen=True)
class Curve:
    """One configuration, trained to its end."""

    parameters: dict[str, Any]
    readings: list[tuple[int, float, float]]
    """(examples seen, macro-F1, processor seconds since the start of the process's work) of each evaluation."""
    value: float
    """Of its best model."""
    seconds: float


class Clocked(Run):
    """The trainer, with a clock beside its evaluations."""

    def __call__(self) -> EndReport:
        self.times: list[float] = []
        self.began = time.process_time()
        return super().__call__()

    def _loop(self, *args: Any, **kwargs: Any) -> Any:
        loop = super()._loop(*args, **kwargs)
        told = loop.on_evaluation

        def on_evaluation(scores: Any) -> None:
            self.times.append(time.process_time() - self.began)
            told(scores)

        loop.on_evaluation = on_evaluation
        return loop


def smaller(corpus: Corpus) -> Corpus:
    """Rows drawn once, so that a machine of two cores is done in minutes."""
    draw = random.Random(SEED)
    held = corpus.held_out[:VALIDATION]
    return replace(corpus, train=draw.sample(corpus.train, min(ROWS, len(corpus.train))), validation=held, held_out=held[:10])


def record(corpus: Corpus, mirror: str) -> list[Curve]:
    """Trains all configurations to their end; what is recorded already is taken from the file."""
    known = [Curve(**row) for row in json.loads(CURVES.read_text())["curves"]] if CURVES.is_file() else []
    with tempfile.TemporaryDirectory(prefix="sweep-real-") as scratch:
        folder = Path(scratch)
        corpus.write(folder / "data")
        manifest = parse_sweep(sweep(f"file://{folder}/data", f"file://{folder}/out"))
        study = Study(manifest.spec)
        for index in range(len(known), CONFIGURATIONS):
            suggestion = suggest(study, [], index)
            assert suggestion is not None
            known.append(train(manifest, index, dict(suggestion.parameters), folder, mirror))
            CURVES.parent.mkdir(parents=True, exist_ok=True)
            CURVES.write_text(json.dumps({"corpus": corpus.name, "curves": [vars(c) for c in known]}))
            print(
                f"{index + 1}/{CONFIGURATIONS}: {known[-1].value:.4f} in {known[-1].seconds:.0f} s {known[-1].parameters}",
                flush=True,
            )
    return known


def train(manifest: Any, index: int, parameters: dict[str, Any], folder: Path, mirror: str) -> Curve:
    from finetune_api import FineTuneJobSpec
    from finetune_operator.domain.trials import trial_name, trial_spec

    sized = manifest.model_copy(update={"metadata": {**manifest.metadata, "uid": "0"}})
    spec = FineTuneJobSpec.model_validate(trial_spec(sized, trial_name("tweets", index), parameters))
    run = Clocked(
        spec.recipe(),
        Runtime("tweets", folder / f"work-{index}", model_mirror=mirror),
        threading.Event(),
        console=Console(io.StringIO()),
    )
    end = run()
    assert end.result is not None
    value = next(float(m.value) for m in end.result.metrics if m.name == METRIC)
    values = [next(float(m.value) for m in e.metrics if m.name == METRIC) for e in end.evaluations]
    readings = [(e.examples, v, t) for e, v, t in zip(end.evaluations, values, run.times, strict=True)]
    return Curve(parameters, readings, value, time.process_time() - run.began)


def replay(study: Study, curves: list[Curve], order: list[int]) -> tuple[float, float]:
    """Processor seconds of the search with ASHA in this order, and the value of the best trial that it finished."""
    trials = [Trial(n, curves[c].parameters) for n, c in enumerate(order)]
    rungs, spent = study.spec.prune_algorithm.rungs, 0.0
    # (time, trial, how many of its rungs are judged)
    queue: list[tuple[float, int, int]] = []
    waiting = iter(range(len(order)))

    def begin(now: float) -> None:
        if (number := next(waiting, None)) is not None:
            heapq.heappush(queue, (now + when(curves[order[number]], rungs, 0), number, 0))

    for _ in range(WORKERS):
        begin(0.0)
    while queue:
        now, number, judged = heapq.heappop(queue)
        curve, trial = curves[order[number]], trials[number]
        if judged == len(rungs):
            told = rungs_of([(e, v) for e, v, _ in curve.readings], rungs, study.spec.objective.direction, complete=True)
            trials[number] = replace(trial, outcome=Outcome.COMPLETE, readings=told, value=curve.value)
            spent += curve.seconds
            begin(now)
            continue
        reading = next(Reading(rungs[judged], v) for e, v, _ in curve.readings if e >= rungs[judged])
        verdict = judge(study, trials, number, reading.examples, reading.value)
        trials[number] = replace(
            trial, readings=(*trial.readings, reading), outcome=Outcome.PRUNED if verdict.stop else Outcome.OPEN
        )
        if verdict.stop:
            spent += when(curve, rungs, judged)
            begin(now)
        else:
            step = when(curve, rungs, judged + 1) - when(curve, rungs, judged)
            heapq.heappush(queue, (now + step, number, judged + 1))
    found = best(study, trials)
    return spent, found[0].value or 0.0


def when(curve: Curve, rungs: tuple[int, ...], judged: int) -> float:
    """Processor seconds until the rung of this number, or the end."""
    if judged == len(rungs):
        return curve.seconds
    return next(seconds for examples, _, seconds in curve.readings if examples >= rungs[judged])


def live(curves: list[Curve], corpus: Corpus, mirror: str) -> dict[str, Any]:
    """The sweep as a user runs it: its processor time (starts of processes included), its best, and whether its readings are the recorded ones.

    A pruned trial must have what was recorded of it up to where it was stopped; the command itself replays its verdicts.
    """
    finetune = [sys.executable, "-m", "finetune_cli"]
    with tempfile.TemporaryDirectory(prefix="sweep-live-") as scratch:
        folder = Path(scratch)
        corpus.write(folder / "data")
        (folder / "sweep.yaml").write_text(json.dumps(sweep(f"file://{folder}/data", f"file://{folder}/out")))
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run = [*finetune, "run", "-f", folder / "sweep.yaml", "--workdir", folder / "work", "--model-mirror", mirror]
        subprocess.run(run, stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*finetune, "sweep", "replay", folder / "work"], stdout=subprocess.DEVNULL, check=True)
        trials = json.loads((folder / "work/sweep.json").read_text())["trials"]
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    same = 0
    for trial in trials:
        recorded = {examples: value for examples, value, _ in curves[trial["index"]].readings}
        same += all(math.isclose(recorded[examples], value, rel_tol=1e-5) for examples, value in trial["evaluations"])
    values = [curves[trial["index"]].value for trial in trials if trial["outcome"] == "Complete"]
    return {
        "live_cpu_share": round(seconds / sum(c.seconds for c in curves), 4),
        "live_best": max(values),
        "live_pruned": sum(trial["outcome"] == "Pruned" for trial in trials),
        "live_same_readings": same,
    }


def run() -> dict[str, Any]:
    """Records, replays, runs it live, and shows; for build/bench/sweep.json."""
    import torch

    torch.set_num_threads(1)
    corpus = smaller(load_airline_or_feedback())
    mirror = str(minilm.ensure())
    curves = record(corpus, mirror)
    study = Study(parse_sweep(sweep("file:///data", "file:///out")).spec)
    full, top = sum(c.seconds for c in curves), max(c.value for c in curves)
    results = []
    for seed in range(ORDERS):
        order = list(range(len(curves)))
        random.Random(seed).shuffle(order)
        results.append(replay(study, curves, order))
    shares = sorted(spent / full for spent, _ in results)
    near = sum(value >= top - 0.005 for _, value in results) / len(results)
    row = {
        "corpus": corpus.name,
        "configurations": len(curves),
        "orders": ORDERS,
        "full_cpu_seconds": round(full, 1),
        "best": top,
        "median_cpu_share": round(statistics.median(shares), 4),
        "cpu_share_90": round(shares[int(0.9 * len(shares))], 4),
        "within_0.005": round(near, 4),
        **live(curves, corpus, mirror),
    }
    print_table(
        f"ASHA on {len(curves)} recorded trainings ({corpus.name}), {ORDERS} orders",
        ("CPU of the full search", "best", "median share", "90 % below", "within 0.005 of the best"),
        [(f"{full:.0f} s", f"{top:.4f}", f"{row['median_cpu_share']:.2f}", f"{row['cpu_share_90']:.2f}", f"{near:.0%}")],
    )
    print(
        f"live: {row['live_cpu_share']:.2f} of that CPU, {row['live_pruned']} stopped, best {row['live_best']:.4f}, "
        f"{row['live_same_readings']} of {len(curves)} with the recorded readings"
    )
    return row
