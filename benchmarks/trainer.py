"""`make bench-trainer`: how fast the trainer is, beside Hugging Face's Trainer, at the same model, data, batch size and number of epochs.

Every measurement is a process of its own with one thread; the cases take turns, so that a noisy minute hits all of them. Tokenisation,
evaluation and saving are outside the clock for all. Ours is the product as it is (`finetune_trainer.run.Run`); only the class of its loop is
replaced by one that looks at the clock. The Hugging Face cases are what a user would write:

- hf default: TrainingArguments as they are (fp32, random batches padded to their longest row, fused AdamW, rate 5e-5);
- hf tuned: what an expert sets: bf16, batches of like length, our learning rate;
- hf tuned, frozen: the same with embeddings and the three lowest layers frozen by hand;
- ours: no hyperparameter said but epochs;
- ours, freeze: the same with `freeze: {embeddings: true, layers: 3}`.

Each repeat has a seed of its own, the same for all cases, and trains to the end: speed and macro-F1 are of the same runs.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import common

ROOT = common.ROOT
BATCH_SIZE, EPOCHS, MAX_LENGTH = 32, 1, 128
FROZEN_LAYERS = 3
CASES = ("hf default", "hf tuned", "hf tuned, frozen", "ours", "ours, freeze")


@dataclass
class Measured:
    """One run of one case."""

    cpu_seconds: float
    seconds: float
    samples: int
    peak_mib: float
    macro_f1: float
    padding_efficiency: float
    matmul_share: float | None = None


class Clock:
    """CPU seconds (of all threads) and seconds of the clock between `start` and `stop`."""

    def start(self) -> None:
        self.began = time.process_time(), time.perf_counter()

    def stop(self) -> None:
        self.cpu, self.wall = time.process_time() - self.began[0], time.perf_counter() - self.began[1]


# ---------------------------------------------------------------------------------------------------------------- ours ----
def ours(folder: Path, seed: int, *, freeze: bool) -> Measured:
    """The product, from recipe to result."""
    import threading

    from finetune_api import Recipe
    from finetune_trainer import data, loop
    from finetune_trainer.config import Runtime
    from finetune_trainer.run import Run

    clock, seen = Clock(), {}

    class Timed(loop.Loop):
        def train(self) -> None:
            tell = self.on_step

            def on_step(loss: float, rate: float) -> None:
                if self.state.step == self.total_steps:
                    clock.stop()
                tell(loss, rate)

            self.on_step = on_step
            seen["lengths"], seen["model"], seen["dtype"] = self.train_data.lengths, self.model, self.gradient.dtype
            clock.start()
            super().train()

    loop.Loop = Timed  # type: ignore[misc]
    hyper: dict[str, Any] = {"epochs": EPOCHS, "batchSize": BATCH_SIZE, "seed": seed}
    if freeze:
        hyper["freeze"] = {"embeddings": True, "layers": FROZEN_LAYERS}
    recipe = Recipe.model_validate(
        {
            "task": "SequenceClassification",
            "model": {"uri": "hf://sentence-transformers/all-MiniLM-L6-v2"},
            "dataset": {"uri": f"file://{folder}/data", "labels": common.LABELS, "maxLength": MAX_LENGTH},
            "hyperparameters": hyper,
            "output": {"storageUri": f"file://{folder}/{os.getpid()}/out"},
        }
    )
    runtime = Runtime("bench", folder / f"{os.getpid()}/work", model_mirror=os.environ["FINETUNE_MODEL_MIRROR"])
    runtime.workdir.mkdir(parents=True)
    end = Run(recipe, runtime, threading.Event())()
    assert end.result is not None
    f1 = next(float(m.value) for m in end.result.metrics if m.name == "validation/macro_f1")
    batches = [seen["lengths"][rows] for epoch in range(EPOCHS) for rows in data.plan(seed, epoch, BATCH_SIZE, seen["lengths"])]
    tokens = [int(b.max()) * len(b) for b in batches]
    return Measured(
        clock.cpu,
        clock.wall,
        sum(len(b) for b in batches),
        _peak_mib(),
        f1,
        sum(int(b.sum()) for b in batches) / sum(tokens),
        None if freeze else matmul_seconds(seen["model"], tokens, seen["dtype"]) / clock.cpu,
    )


def matmul_seconds(model: Any, tokens: list[int], dtype: Any) -> float:
    """CPU seconds of the bare matrix products of all linear layers, forward and backward, for batches of so many tokens."""
    import torch

    shapes = [tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layer." in name]
    typical = sorted(tokens)[len(tokens) // 2]
    total = 0.0
    for out, into in set(shapes):
        x = torch.randn(typical, into, dtype=dtype or torch.float32)
        w, g = torch.randn(out, into, dtype=x.dtype), torch.randn(typical, out, dtype=x.dtype)
        best = math.inf
        for _ in range(5):
            began = time.process_time()
            for _ in range(10):
                x @ w.T, g @ w, g.T @ x
            best = min(best, (time.process_time() - began) / 10)
        total += best * shapes.count((out, into))
    return total * sum(tokens) / typical


# -------------------------------------------------------------------------------------------------------- Hugging Face ----
def hugging_face(folder: Path, seed: int, *, tuned: bool, freeze: bool = False) -> Measured:
    """Trainer, with its own arguments' defaults or with those that an expert sets."""
    import numpy as np
    import torch
    import transformers
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, TrainingArguments

    from finetune_trainer import metrics

    source = Path(os.environ["FINETUNE_MODEL_MIRROR"]) / "sentence-transformers/all-MiniLM-L6-v2"
    tokenizer = AutoTokenizer.from_pretrained(source)
    transformers.set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(common.LABELS), dtype=torch.float32)
    if freeze:
        for part in (model.bert.embeddings, *model.bert.encoder.layer[:FROZEN_LAYERS]):
            part.requires_grad_(False)

    def encoded(split: str) -> list[dict[str, Any]]:
        rows = common.read_csv(folder / f"data/{split}.csv")
        ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=MAX_LENGTH)["input_ids"]
        return [
            {"input_ids": i, "attention_mask": [1] * len(i), "labels": common.LABELS.index(row["label"])}
            for i, row in zip(ids, rows, strict=True)
        ]

    pad, counted, clock = DataCollatorWithPadding(tokenizer), [0, 0], Clock()

    def collate(rows: list[dict[str, Any]]) -> Any:
        batch = pad(rows)
        if model.training:
            counted[0] += sum(len(row["input_ids"]) for row in rows)
            counted[1] += batch["input_ids"].numel()
        return batch

    class Timing(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            clock.stop()

    expert: dict[str, Any] = {"bf16": True, "train_sampling_strategy": "group_by_length", "learning_rate": 2e-4} if tuned else {}
    arguments = TrainingArguments(
        output_dir=str(folder / f"{os.getpid()}"),
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=64,
        num_train_epochs=EPOCHS,
        seed=seed,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **expert,
    )
    train, validation = encoded("train"), encoded("validation")
    trainer = transformers.Trainer(model, arguments, collate, train, callbacks=[Timing()])
    trainer.train()
    model.eval()
    answer = trainer.predict(validation)
    matrix = metrics.confusion(np.array(answer.label_ids), answer.predictions.argmax(axis=1), len(common.LABELS))
    f1 = metrics.summary(matrix)["macro_f1"]
    return Measured(clock.cpu, clock.wall, len(train) * EPOCHS, _peak_mib(), f1, counted[0] / counted[1])


RUN: dict[str, Callable[[Path, int], Measured]] = {
    "hf default": lambda folder, seed: hugging_face(folder, seed, tuned=False),
    "hf tuned": lambda folder, seed: hugging_face(folder, seed, tuned=True),
    "hf tuned, frozen": lambda folder, seed: hugging_face(folder, seed, tuned=True, freeze=True),
    "ours": lambda folder, seed: ours(folder, seed, freeze=False),
    "ours, freeze": lambda folder, seed: ours(folder, seed, freeze=True),
}


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ------------------------------------------------------------------------------------------------------------- compare ----
def measure(folder: Path, case: str, seed: int, mirror: str) -> Measured:
    """One run in a process of its own."""
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    quiet = {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, __file__, "--case", case, "--seed", str(seed), "--folder", str(folder)],
        env={**os.environ, **one_thread, **quiet, "FINETUNE_MODEL_MIRROR": mirror},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3000, help="training rows")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each case, each with a seed of its own")
    parser.add_argument("--only", nargs="*", choices=CASES, default=CASES, help="cases to run")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.case:
        print(json.dumps(asdict(RUN[said.case](said.folder, said.seed))))
        return 0
    mirror = subprocess.run(
        [sys.executable, ROOT / "hack/minilm.py"], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()
    corpus = common.load_airline_or_feedback()
    corpus = replace(corpus, train=corpus.train[: said.rows], validation=corpus.held_out)
    runs: dict[str, list[Measured]] = {case: [] for case in said.only}
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as scratch:
        corpus.write(Path(scratch) / "data")
        for repeat in range(said.repeats):
            turn = repeat % len(said.only)
            for case in (*said.only[turn:], *said.only[:turn]):  # nobody is always first
                found = measure(Path(scratch), case, repeat, mirror)
                runs[case].append(found)
                print(
                    f"{case:18} seed {repeat}: {found.samples / found.cpu_seconds:6.1f} samples per CPU-second  macro-F1 {found.macro_f1:.4f}",
                    flush=True,
                )
    return report(corpus, runs)


def report(corpus: common.Corpus, runs: dict[str, list[Measured]]) -> int:
    """The table and build/bench/trainer.json."""
    rate = {case: [m.samples / m.cpu_seconds for m in measured] for case, measured in runs.items()}
    rows = [
        {
            "name": case,
            "samples_per_cpu_second": statistics.fmean(rate[case]),
            "samples_per_second": statistics.fmean(m.samples / m.seconds for m in measured),
            "peak_mib": max(m.peak_mib for m in measured),
            "macro_f1": statistics.fmean(m.macro_f1 for m in measured),
            "macro_f1_all": [m.macro_f1 for m in measured],
            "padding_efficiency": statistics.fmean(m.padding_efficiency for m in measured),
            "matmul_share": statistics.fmean(m.matmul_share for m in measured) if measured[0].matmul_share else None,
        }
        for case, measured in runs.items()
    ]
    common.print_table(
        f"MiniLM (22.7M parameters), {len(corpus.train)} {corpus.name}, batch {BATCH_SIZE}, {EPOCHS} epoch, 1 thread, "
        f"{len(next(iter(runs.values())))} repeats",
        ("", "samples/CPU-s", "samples/s", "peak MiB", "macro-F1", "real tokens", "of bare matmul"),
        [
            (
                str(row["name"]),
                f"{row['samples_per_cpu_second']:.1f}",
                f"{row['samples_per_second']:.1f}",
                f"{row['peak_mib']:.0f}",
                f"{row['macro_f1']:.4f}",
                f"{row['padding_efficiency']:.3f}",
                f"{row['matmul_share']:.2f}" if row["matmul_share"] else "",
            )
            for row in rows
        ],
    )
    result: dict[str, Any] = {"data": corpus.name, "rows": rows, "ratios": {}}
    for name, ours_, theirs in (
        ("ours_vs_hf_default", "ours", "hf default"),
        ("ours_vs_hf_tuned", "ours", "hf tuned"),
        ("freeze_vs_hf_default", "ours, freeze", "hf default"),
        ("freeze_vs_hf_tuned_frozen", "ours, freeze", "hf tuned, frozen"),
    ):
        if ours_ in rate and theirs in rate:
            mean, bound = common.ratio(rate[ours_], rate[theirs])
            result["ratios"] |= {name: mean, f"{name}_lower_95": bound}
            print(f"{name}: {mean:.2f} (lower 95 % bound {bound:.2f})")
    if "ours" in runs and "hf tuned" in runs:
        mean, bound = common.lower([a.macro_f1 - b.macro_f1 for a, b in zip(runs["ours"], runs["hf tuned"], strict=True)])
        result["macro_f1_ours_minus_hf_tuned"] = {"mean": mean, "lower_95": bound}
        print(f"macro-F1 of ours minus hf tuned, paired by seed: {mean:+.4f} (lower 95 % bound {bound:+.4f})")
    print(common.write_json("trainer", result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
