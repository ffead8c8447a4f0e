"""What the benchmarks share: the data they run on, how runs are compared, and how their numbers are shown and kept."""

import csv
import json
import math
import os
import platform
import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "build/bench"
FEEDBACK = ROOT / "examples/customer-feedback/data"
AIRLINE = Path(os.environ.get("FINETUNE_AIRLINE_TWEETS") or ROOT.parent / "shared/data/airline-tweets")
"""Tweets under a licence that keeps them out of this repository (CC BY-NC-SA 4.0); FINETUNE_AIRLINE_TWEETS names another place."""
LABELS = ["negative", "neutral", "positive"]
VALIDATION_SHARE = 0.1
# Student's t, one side 95 %, by degrees of freedom.
T95 = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 7: 1.895, 8: 1.860, 9: 1.833}

Rows = list[dict[str, str]]
"""Each with text and label."""


@dataclass(frozen=True)
class Corpus:
    """Labelled texts. `validation` selects the best model of a training; `held_out` is for the table and nothing else."""

    name: str
    train: Rows
    validation: Rows
    held_out: Rows
    labels: list[str]

    def write(self, folder: Path) -> Path:
        """As train.csv, validation.csv and test.csv (the held-out rows), for a recipe's dataset.uri."""
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in (("train", self.train), ("validation", self.validation), ("test", self.held_out)):
            with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, ["text", "label"], extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)
        return folder


def load_airline_or_feedback() -> Corpus:
    """The airline tweets where they are at hand, else the shipped customer feedback."""
    if not AIRLINE.is_dir():
        train, validation, test = (read_csv(FEEDBACK / f"{split}.csv") for split in ("train", "validation", "test"))
        return Corpus("customer feedback", train, validation, test, LABELS)
    train = read_csv(AIRLINE / "train.csv")
    # Their validation file is the one that is held out: a tenth of the rest selects.
    random.Random(0).shuffle(train)
    count = round(len(train) * VALIDATION_SHARE)
    return Corpus("airline tweets", train[count:], train[:count], read_csv(AIRLINE / "validation.csv"), LABELS)


def read_csv(path: Path) -> Rows:
    """Rows of a csv file with a header."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def ratio(of: list[float], to: list[float]) -> tuple[float, float]:
    """Geometric mean of the paired ratios, and its lower 95 % bound (one side, Student's t on their logarithms)."""
    logs = [math.log(a / b) for a, b in zip(of, to, strict=True)]
    mean, bound = lower(logs)
    return math.exp(mean), math.exp(bound)


def lower(values: list[float]) -> tuple[float, float]:
    """Mean and its lower 95 % bound (one side, Student's t)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, -math.inf
    return mean, mean - T95.get(len(values) - 1, 1.8) * statistics.stdev(values) / math.sqrt(len(values))


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """First column to the left, numbers to the right."""
    table = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    print(f"\n{title}")
    for row in table:
        cells = [f"{row[0]:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())


def write_json(name: str, result: dict[str, Any]) -> Path:
    """build/bench/NAME.json: the result, and what machine it is of."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
    return path


def machine() -> str:
    """Kind of processor, and how many of them."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{os.cpu_count()} x {model or platform.machine()}"
