"""What the trainer's tests share: a tiny real model and tokenizer, a data set, and runs of the trainer in this process.

The model is a BERT of 7,000 parameters, made here, so that a whole training takes a fraction of a second. Everything else is the
real thing: files, tokenizer, transformers' classes, checkpoints.
"""

import csv
import io
import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api import Recipe
from finetune_api.report import EndReport
from finetune_trainer.config import Runtime
from finetune_trainer.report import Console
from finetune_trainer.run import Run

LABELS = ["negative", "neutral", "positive"]
WORDS = {
    "negative": ["bad", "broken", "late", "awful", "slow"],
    "neutral": ["box", "order", "today", "page", "number"],
    "positive": ["good", "great", "fast", "lovely", "kind"],
}
FILLERS = ["the", "a", "it", "was", "is", "and", "very", "my"]


def make_model(folder: Path, *, positions: int = 64, spare_words: int = 0) -> Path:
    """A pretrained model as people have them: a BERT body without a head, and its tokenizer. No text has a spare word."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLERS, *(word for words in WORDS.values() for word in words)]
    vocabulary += [f"spare{i}" for i in range(spare_words)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=positions,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return folder


def rows(count: int, offset: int = 0) -> list[dict[str, str]]:
    """Examples of different lengths with all labels in turn; the same for the same arguments."""
    made = []
    for i in range(offset, offset + count):
        label = LABELS[i % 3]
        words = [FILLERS[(i * 5 + k) % len(FILLERS)] for k in range(i % 7)] + [WORDS[label][(i * 3 + 1) % 5]]
        if i % 4 == 0:
            words.append(WORDS[LABELS[(i + 1) % 3]][i % 5])  # some noise, so that scores move
        made.append({"text": " ".join(words), "label": label})
    return made


def write_csv(path: Path, examples: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(examples[0]))
        writer.writeheader()
        writer.writerows(examples)


def write_data(folder: Path) -> Path:
    """train.csv (44 rows: 6 steps an epoch at 8 a batch, the last one of 4), validation.csv, test.csv."""
    write_csv(folder / "train.csv", rows(44))
    write_csv(folder / "validation.csv", rows(18, offset=100))
    write_csv(folder / "test.csv", rows(15, offset=300))
    return folder


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, level by level."""
    result = dict(base)
    for key, value in changes.items():
        result[key] = merged(result.get(key, {}), value) if isinstance(value, dict) else value
    return result


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the trainer catches it."""


class ScriptedConsole(Console):
    """A console that does something right after a step's arithmetic, before anything of that step is evaluated or saved."""

    def __init__(self, at: dict[int, Callable[[], None]]) -> None:
        super().__init__(io.StringIO())
        self.at = at

    def step(self, step: int, total: int, loss: float, rate: float) -> float:
        left = super().step(step, total, loss, rate)
        if action := self.at.pop(step, None):
            action()
        return left

    @property
    def text(self) -> str:
        assert isinstance(self.out, io.StringIO)
        return self.out.getvalue()


def _kill() -> None:
    raise Killed


@dataclass
class Job:
    """One job: a recipe over a folder, and how to run it. `runs` holds the console of every run."""

    home: Path
    model: Path
    data: Path
    changes: dict[str, Any] = field(default_factory=dict)
    runs: list[ScriptedConsole] = field(default_factory=list)
    s3_root: Path | None = None
    mirror: str | None = None
    dataset_mirror: str | None = None

    @property
    def output(self) -> Path:
        return self.home / "out"

    @property
    def checkpoints(self) -> Path:
        return self.output / "checkpoints"

    def recipe(self, **changes: Any) -> Recipe:
        base = {
            "task": "SequenceClassification",
            "model": {"uri": f"file://{self.model}"},
            "dataset": {"uri": f"file://{self.data}", "test": "test.csv", "labels": LABELS, "maxLength": 32},
            "hyperparameters": {"batchSize": 8, "epochs": 3, "learningRate": 5e-3},
            "output": {"storageUri": f"file://{self.output}"},
        }
        return Recipe.model_validate(merged(merged(base, self.changes), changes))

    def runtime(self) -> Runtime:
        self.home.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="work-", dir=self.home))  # each run a fresh pod: nothing local survives
        return Runtime(
            job_name="tiny", workdir=work, s3_root=self.s3_root, model_mirror=self.mirror, dataset_mirror=self.dataset_mirror
        )

    def run(self, *, kill_at: int | None = None, stop_at: int | None = None, **changes: Any) -> EndReport:
        """Runs to the end, or until it is killed (raises Killed) or told to stop after that step (raises TrainingFailure)."""
        stopping = threading.Event()
        at: dict[int, Callable[[], None]] = {}
        if kill_at is not None:
            at[kill_at] = _kill
        if stop_at is not None:
            at[stop_at] = stopping.set
        runtime, console = self.runtime(), ScriptedConsole(at)
        self.runs.append(console)
        try:
            return Run(self.recipe(**changes), runtime, stopping, console=console)()
        finally:
            for thread in threading.enumerate():
                if thread.name == "checkpoint":
                    thread.join()  # so that tests know what is committed

    def environment(self) -> dict[str, str]:
        """For a run as a process of its own."""
        runtime = self.runtime()
        return os.environ | {
            "FINETUNE_JOB": self.recipe().model_dump_json(by_alias=True, exclude_none=True),
            "FINETUNE_JOB_NAME": "tiny",
            "FINETUNE_ATTEMPT": "1",
            "FINETUNE_WORKDIR": str(runtime.workdir),
            "FINETUNE_TERMINATION_LOG": str(self.home / "termination-log"),
            "OMP_NUM_THREADS": "1",
        }

    def steps(self) -> list[int]:
        """Steps with a manifest."""
        return sorted(int(p.parent.name.split("-")[1]) for p in self.checkpoints.glob("step-*/MANIFEST.json"))

    def newest(self) -> Path:
        """Folder of the newest committed checkpoint."""
        return max(p.parent for p in self.checkpoints.glob("step-*/MANIFEST.json"))
