"""`make bench-checkpoint`: what checkpoints cost a training, beside Hugging Face's Trainer and beside plain boto3.

all-MiniLM-L6-v2 (22.7M parameters) with AdamW's state, one thread, a real S3 server (versitygw) on the same machine; cases take turns, so
that a noisy minute hits all of them:

- stop: how long a save stops training, ours (`Saves.save`) beside Trainer's `_save_checkpoint` of the same model and the same optimizer into
  a folder of the same disk. Ours goes to S3 in the background afterwards; Trainer's ends with files on the local disk;
- beside: how much slower steps are while a save is being written and uploaded, beside the same steps without one;
- upload: a checkpoint's files through `Checkpoints`, hashes and all, beside `upload_file` of boto3 with its own settings;
- restore: from nothing to a model and an optimizer in memory;
- training: the product (`finetune_trainer.run.Run`) with `checkpoint.everySteps: 50`.
"""

import argparse
import contextlib
import io
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import common

sys.path.insert(0, str(common.ROOT / "hack"))

BATCH_SIZE, LENGTH, EVERY_STEPS, VALIDATION_ROWS = 32, 32, 50, 200
MIB = 1 << 20
CASES = ("ours stops", "hf stops", "steps beside", "upload ours", "upload boto3", "restore")


@dataclass
class Bench:
    """What is saved, and where to. The model, its optimizer and the storage are the same for all cases."""

    scratch: Path
    bucket: str
    mirror: str
    server: int
    """Process id of the storage's server."""
    found: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        import boto3
        import torch
        import transformers

        from finetune_api.recipe import CheckpointPolicy
        from finetune_trainer import model_files, optim
        from finetune_trainer.dist import ALONE
        from finetune_trainer.saving import Saves

        self.recipe = recipe(self.bucket, "parts", self.scratch)
        self.model, self.tokenizer = self.built(None)
        self.optimizer = optim.build(self.model, self.recipe.hyperparameters, 2e-4)
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1000, 30_000, (BATCH_SIZE, LENGTH), generator=generator)
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % len(common.LABELS)}
        self.step()
        self.checkpoints = self.fresh(self.scratch / "ours")
        self.checkpoints.begin(0)

        def save_model(trained: Any, folder: Path, weights: Any, frozen: frozenset[str]) -> None:
            model_files.save(trained, self.tokenizer, self.recipe, folder, weights, frozen)

        self.saves = Saves(CheckpointPolicy(), self.checkpoints, ALONE, save_model, lambda _: None)
        arguments = transformers.TrainingArguments(str(self.scratch / "hf"), use_cpu=True, report_to=[], disable_tqdm=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _: 1.0)
        self.trainer = transformers.Trainer(
            self.model, arguments, processing_class=self.tokenizer, optimizers=(self.optimizer, scheduler)
        )
        self.client = boto3.client("s3")
        self.steps = 0

    def fresh(self, scratch: Path) -> Any:
        """The job's checkpoints as another execution sees them."""
        from finetune_trainer.checkpoint import Checkpoints
        from finetune_trainer.lineage import Lineage
        from finetune_trainer.store import open_store

        store = open_store(self.recipe.checkpoint_uri)
        return Checkpoints(store, scratch, Lineage.of(self.recipe, 1000), keep_last=2, overwrite=False)

    def built(self, trained: Path | None) -> Any:
        """The pretrained model, or the one of a checkpoint, with its tokenizer."""
        from finetune_trainer import model
        from finetune_trainer.tasks import kind_of

        source = trained or Path(self.mirror) / "sentence-transformers/all-MiniLM-L6-v2"
        tokenizer = model.load_tokenizer(source, self.recipe)
        return model.build(source, self.recipe, kind_of(self.recipe.task, self.recipe.dataset), tokenizer), tokenizer

    def step(self) -> None:
        """One of training."""
        import torch

        self.model.train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.model(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def note(self, **values: float) -> None:
        for name, value in values.items():
            self.found.setdefault(name, []).append(value)

    # ---------------------------------------------------------------------------------------------------------- cases --
    def ours_stops(self) -> None:
        self.step()
        with settled(), timed() as clock:
            self._save()
        self.note(ours_ms=clock["wall"] * 1e3, ours_cpu_ms=clock["thread"] * 1e3)
        self.checkpoints.wait()

    def _save(self) -> None:
        from finetune_trainer.snapshot import TrainState

        self.steps += 1
        self.saves.save(TrainState(step=self.steps), self.model, self.optimizer, self.scaler)

    def hf_stops(self) -> None:
        self.step()
        self.trainer.state.global_step += 1
        with settled(), timed() as clock:
            self.trainer._save_checkpoint(self.model, None)
        self.note(hf_ms=clock["wall"] * 1e3, hf_cpu_ms=clock["thread"] * 1e3)
        self.hf_bytes = size(self.scratch / "hf")
        shutil.rmtree(self.scratch / "hf")

    def steps_beside(self) -> None:
        """Steps until a save is durable and all is tidied up, as many without one, and a save without steps."""
        durable: list[float] = []

        def watch() -> None:
            self.checkpoints._thread.join()
            durable.append(time.perf_counter())

        with settled():
            self._save()
            began = time.perf_counter()
            watching = threading.Thread(target=watch)
            watching.start()
            beside = self._steps_while(lambda _: self.checkpoints.busy)
        watching.join()
        with settled():
            quiet = self._steps_while(lambda done: done < len(beside))
        served = cpu_seconds(self.server)
        with settled(), timed() as alone:
            self._save()
            self.checkpoints.wait()
        self.note(durable_seconds=durable[0] - began, beside_seconds=sum(beside), quiet_seconds=sum(quiet))
        self.note(beside_steps=len(beside), save_cpu_seconds=alone["process"])
        self.note(server_cpu_seconds=cpu_seconds(self.server) - served)

    def _steps_while(self, more: Callable[[int], bool]) -> list[float]:
        took: list[float] = []
        while more(len(took)) or not took:
            with timed() as clock:
                self.step()
            took.append(clock["wall"])
        return took

    def upload_ours(self) -> None:
        files, fresh = self._files(), self.fresh(self.scratch / "none")  # knows no file that could be copied
        with settled(), timed() as clock:
            fresh._upload("upload-ours", files)
        self.note(upload_ours=self._mib() / clock["wall"], upload_ours_cpu=self._mib() / clock["process"])
        for key in self.checkpoints.store.list("upload-ours/"):
            self.checkpoints.store.delete(key)

    def upload_boto3(self) -> None:
        files = sorted(p for p in self._files().rglob("*") if p.is_file())
        with settled(), timed() as clock:
            for path in files:
                self.client.upload_file(str(path), self.bucket, f"upload-boto3/{path.relative_to(self._files())}")
        self.note(upload_boto3=self._mib() / clock["wall"], upload_boto3_cpu=self._mib() / clock["process"])
        for path in files:
            self.client.delete_object(Bucket=self.bucket, Key=f"upload-boto3/{path.relative_to(self._files())}")

    def _files(self) -> Path:
        """A checkpoint's, as they are before they are uploaded: the folder that a restore has downloaded."""
        if not (folder := self.scratch / "files").is_dir():
            restored = self.fresh(self.scratch / "fetched").restore()
            assert restored is not None
            restored[1].rename(folder)
        return folder

    def _mib(self) -> float:
        return size(self._files()) / MIB

    def restore(self) -> None:
        from finetune_trainer import optim, snapshot

        place = self.scratch / "restored"
        with settled(), timed() as fetch:
            restored = self.fresh(place).restore()
        assert restored is not None
        with timed() as load:
            model, _ = self.built(restored[1] / "model")
            optimizer = optim.build(model, self.recipe.hyperparameters, 2e-4)
            snapshot.restore(restored[1], model, optimizer, self.scaler)
        self.note(fetch_seconds=fetch["wall"], load_seconds=load["wall"])
        shutil.rmtree(place)


# ------------------------------------------------------------------------------------------------------------- training ----
def recipe(bucket: str, name: str, scratch: Path, **hyperparameters: Any) -> Any:
    """Batches of 32, a save every 50 steps, an evaluation at the end."""
    from finetune_api import Recipe

    return Recipe.model_validate(
        {
            "task": "SequenceClassification",
            "model": {"uri": "hf://sentence-transformers/all-MiniLM-L6-v2"},
            "dataset": {"uri": f"file://{scratch}/data", "labels": common.LABELS, "maxLength": 128},
            "hyperparameters": {"epochs": 1000, "batchSize": BATCH_SIZE, **hyperparameters},
            "evaluation": {"everySteps": 1_000_000},
            "checkpoint": {"everySteps": EVERY_STEPS},
            "output": {"storageUri": f"s3://{bucket}/{name}"},
        }
    )


@dataclass
class Trained:
    """One training. Seconds are those of the steps and of the saves between them; evaluation and scoring are outside."""

    seconds: float
    blocking_seconds: float
    saves: int
    uploaded_bytes: int


def train(bucket: str, name: str, scratch: Path, mirror: str, steps: int) -> Trained:
    """The product, from recipe to result."""
    from finetune_trainer import loop
    from finetune_trainer.config import Runtime
    from finetune_trainer.report import Console
    from finetune_trainer.run import Run

    seen: dict[str, Any] = {}

    class Timed(loop.Loop):
        def train(self) -> None:
            tell = self.on_step

            def on_step(loss: float, rate: float) -> None:
                seen["steps_end"] = time.perf_counter()
                tell(loss, rate)

            self.on_step = on_step
            began = time.perf_counter()
            super().train()
            seen["seconds"], seen["saving"] = seen["steps_end"] - began, self.checkpoints.saving

    plain, loop.Loop = loop.Loop, Timed  # type: ignore[misc]
    workdir = scratch / name
    workdir.mkdir()
    try:
        runtime = Runtime("bench", workdir, model_mirror=mirror)
        Run(recipe(bucket, name, scratch, maxSteps=steps), runtime, threading.Event(), Console(io.StringIO()))()
    finally:
        loop.Loop = plain  # type: ignore[misc]
        shutil.rmtree(workdir)
    saving = seen["saving"]
    return Trained(seen["seconds"], saving.blocking_seconds, saving.saves, saving.uploaded_bytes)


# -------------------------------------------------------------------------------------------------------------- measure ----
@contextlib.contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Seconds of the clock, and of the CPU for this thread and for all of them."""
    took: dict[str, float] = {}
    began = time.perf_counter(), time.thread_time(), time.process_time()
    yield took
    ended = time.perf_counter(), time.thread_time(), time.process_time()
    took.update(zip(("wall", "thread", "process"), (e - b for e, b in zip(ended, began, strict=True)), strict=True))


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Nobody pays for what the one before left the disk to write."""
    os.sync()
    yield


def cpu_seconds(pid: int) -> float:
    """That another process has used so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def size(folder: Path) -> int:
    """Bytes of all its files."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="of each case that is no training")
    parser.add_argument("--trainings", type=int, default=2, help="trainings that save every 50 steps")
    parser.add_argument("--steps", type=int, default=200, help="of a training")
    said = parser.parse_args()
    # Before torch and transformers are loaded.
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import minilm
    import torch
    import transformers

    from testcluster import S3Server

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    mirror = str(minilm.ensure())
    # Both on the same disk.
    with S3Server() as s3, tempfile.TemporaryDirectory(prefix="finetune-bench-") as scratch:
        os.environ |= s3.environment()
        corpus = common.load_airline_or_feedback()
        corpus.validation[VALIDATION_ROWS:], corpus.held_out[VALIDATION_ROWS:] = [], []  # they are no part of this
        corpus.write(Path(scratch) / "data")
        bench = Bench(Path(scratch), s3.create_bucket("bench"), mirror, s3.pid)
        for first in (bench.ours_stops, bench.hf_stops):
            first()
        firsts, bench.found = bench.found, {}
        trained = []
        for repeat in range(said.repeats):
            turn = repeat % len(CASES)
            for case in (*CASES[turn:], *CASES[:turn]):  # nobody is always first
                getattr(bench, case.replace(" ", "_"))()
            print(f"repeat {repeat}: " + "  ".join(f"{k} {v[-1]:.4g}" for k, v in bench.found.items()), flush=True)
            if repeat < said.trainings:
                trained.append(train(bench.bucket, f"training-{repeat}", Path(scratch), mirror, said.steps))
                print(f"training {repeat}: {trained[-1]}", flush=True)
        facts = {"saved_mib": bench._mib(), "hf_saved_mib": bench.hf_bytes / MIB}
    return report(corpus.name, {k: v[0] for k, v in firsts.items()}, bench.found, trained, facts)


def background(found: dict[str, list[float]]) -> tuple[float, float]:
    """How many times as long steps take while a save is on its way, and the seconds that training loses to each save by that.

    Sums over the repeats: a save lasts a few steps only. Of the steps beside it, the last ends when the save is over.
    """
    durable, lost = sum(found["durable_seconds"]), sum(found["beside_seconds"]) - sum(found["quiet_seconds"])
    return durable / (durable - lost), lost / len(found["durable_seconds"])


def report(
    data: str, first: dict[str, float], found: dict[str, list[float]], trained: list[Trained], facts: dict[str, float]
) -> int:
    """The table and build/bench/checkpoint.json."""
    of = {name: statistics.median(values) for name, values in found.items()}
    blocking, upload = (common.ratio(found[a], found[b]) for a, b in (("ours_ms", "hf_ms"), ("upload_ours", "upload_boto3")))
    slower, lost = background(found)
    step = sum(found["quiet_seconds"]) / sum(found["beside_steps"])
    seconds, stood = sum(t.seconds for t in trained), sum(t.blocking_seconds for t in trained)
    result = {
        "data": data,
        "repeats": len(found["ours_ms"]),
        "load_average": os.getloadavg()[0],
        "blocking_ms_per_save": of["ours_ms"],
        "hf_blocking_ms_per_save": of["hf_ms"],
        "blocking_ratio": blocking[0],
        "blocking_cpu_ms_per_save": of["ours_cpu_ms"],
        "hf_blocking_cpu_ms_per_save": of["hf_cpu_ms"],
        "first_blocking_ms": first["ours_ms"],
        "hf_first_blocking_ms": first["hf_ms"],
        "durable_seconds": of["durable_seconds"],
        "background_slowdown_percent": (slower - 1) * 100,
        "background_seconds_lost_per_save": lost,
        "background_percent_every_50_steps": lost / (EVERY_STEPS * step) * 100,
        "background_cpu_seconds_per_save": of["save_cpu_seconds"],
        "server_cpu_seconds_per_save": of["server_cpu_seconds"],
        "upload_mib_per_second": of["upload_ours"],
        "boto3_upload_mib_per_second": of["upload_boto3"],
        "upload_ratio": upload[0],
        "upload_ratio_lower_95": upload[1],
        "upload_mib_per_cpu_second": of["upload_ours_cpu"],
        "boto3_upload_mib_per_cpu_second": of["upload_boto3_cpu"],
        "blocking_percent_every_50_steps": stood / seconds * 100 if trained else None,
        "trainings": [asdict(t) for t in trained],
        "restore_seconds": of["fetch_seconds"] + of["load_seconds"],
        "restore_fetch_seconds": of["fetch_seconds"],
        "restore_load_seconds": of["load_seconds"],
        **facts,
        "all": found,
    }
    each = [f"{t.blocking_seconds / t.saves * 1e3:.0f}" for t in trained]
    common.print_table(
        f"MiniLM (22.7M parameters) and AdamW's state, {facts['saved_mib']:.0f} MiB, 1 thread, medians of {result['repeats']} repeats",
        ("", "ours", "beside"),
        [
            ("a save stops training, ms (beside: Trainer)", f"{of['ours_ms']:.0f}", f"{of['hf_ms']:.0f}"),
            ("of that on the CPU, ms", f"{of['ours_cpu_ms']:.0f}", f"{of['hf_cpu_ms']:.0f}"),
            ("the first save, ms", f"{first['ours_ms']:.0f}", f"{first['hf_ms']:.0f}"),
            ("until it is durable, s", f"{of['durable_seconds']:.1f}", ""),
            ("steps are slower meanwhile by, %", f"{(slower - 1) * 100:.0f}", ""),
            (
                "CPU-seconds of a save (beside: of the storage's server)",
                f"{of['save_cpu_seconds']:.2f}",
                f"{of['server_cpu_seconds']:.2f}",
            ),
            ("upload, MiB/s (beside: boto3)", f"{of['upload_ours']:.0f}", f"{of['upload_boto3']:.0f}"),
            ("upload, MiB per CPU-second", f"{of['upload_ours_cpu']:.0f}", f"{of['upload_boto3_cpu']:.0f}"),
            ("restore, s", f"{of['fetch_seconds'] + of['load_seconds']:.2f}", ""),
        ],
    )
    print(
        f"blocking, ours to Trainer's, paired: {blocking[0]:.2f}; upload, ours to boto3's: {upload[0]:.2f} (lower {upload[1]:.2f})"
    )
    print(
        f"every {EVERY_STEPS} steps saves slow the steps by {result['background_percent_every_50_steps']:.1f} % beside themselves"
    )
    if trained:
        print(
            f"a training that saves every {EVERY_STEPS} steps stands still for {stood / seconds:.2%} ({', '.join(each)} ms a save)"
        )
    print(common.write_json("checkpoint", result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
