"""From files to examples, in the order of work: read, hold validation out, drop from train what would leak, take a few, tell.

`read_splits` is that order; training and `finetune validate` both go through it. The splits are a pure function of files and recipe.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune_api import Recipe
from finetune_api.recipe import Dataset
from finetune_api.report import DataCounts
from finetune_trainer import hub, tables
from finetune_trainer.config import Runtime
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.fetch import fetch_files
from finetune_trainer.few_shot import few_shot
from finetune_trainer.store import Missing, Store, is_plain
from finetune_trainer.tables import BadRow
from finetune_trainer.tasks import BadRowError, Examples, TaskKind, kind_of

Splits = dict[str, Examples]
"""train and validation, and test where there is one."""
Log = Callable[[str], None]

DRAWS = 100
"""How often whole groups are drawn; the draw that is nearest to all proportions is taken."""
MAX_NAMES = 20
MAX_NAME_LENGTH = 40


def read_splits(recipe: Recipe, runtime: Runtime, log: Log) -> tuple[Splits, DataCounts]:
    """The examples to train on and to score with; what they are is told in lines. Raises TrainingFailure."""
    dataset, kind = recipe.dataset, kind_of(recipe.task, recipe.dataset)
    splits, clusters, bad = _read(dataset, kind, runtime, log)
    if dataset.validation_fraction is not None:
        splits = _held_out(splits, clusters, dataset, kind, recipe.hyperparameters.seed)
    splits, duplicates = _without_leaks(splits, kind, log)
    _check_labels(splits["train"], kind)
    if dataset.few_shot is not None:
        splits["train"] = _few(splits["train"], kind, dataset.few_shot.examples_per_class, recipe.hyperparameters.seed, log)
    _tell(splits, kind, dataset, log)
    counts = {split: len(examples) for split, examples in splits.items()}
    return splits, DataCounts(examples=counts, bad_rows=bad, duplicates=duplicates)


def _few(examples: Examples, kind: TaskKind, k: int, seed: int, log: Log) -> Examples:
    taken = few_shot(examples, k, seed)
    there = {label: int((taken.labels == i).sum()) for label, i in kind.ids.items()}
    if scarce := ", ".join(f"{label} has {count}" for label, count in there.items() if count < k):
        log(f"data: dataset.fewShot: fewer than {k} examples, all are taken: {scarce}")
    return taken


# -------------------------------------------------------------------------------------------------------------- read ----
@dataclass(frozen=True)
class Read:
    """One file."""

    examples: Examples
    clusters: list[str]
    """Of each row what splitGroupColumn says; empty where that is not asked for."""
    bad: list[BadRow]


def read_file(path: Path, kind: TaskKind, *, name: str, split_by: str | None = None) -> Read:
    """One file's examples, with the rows that are none. Raises TrainingFailure(DataInvalid)."""
    group_by = kind.dataset.group_column
    columns = dict.fromkeys((*kind.columns, *(c for c in (group_by, split_by) if c)))  # each once
    texts: list[Any] = []
    targets: list[Any] = []
    groups: list[str] = []
    clusters: list[str] = []
    places: list[str] = []
    bad: list[BadRow] = []
    for item in tables.read(path, name, tuple(columns)):
        if isinstance(item, BadRow):
            bad.append(item)
            continue
        where, row = item
        try:
            text, target = kind.input(row), kind.target(row)
            cluster = _cluster(row, split_by) if split_by else None
        except BadRowError as error:
            bad.append(BadRow(f"{where}: {error}"))
            continue
        places.append(where)
        texts.append(text)
        targets.append(target)
        if group_by:
            groups.append(_word(row[group_by]))
        if cluster is not None:
            clusters.append(cluster)
    examples = Examples(name, texts, kind.collect(targets), groups if group_by else None, places)
    return Read(examples, clusters, bad)


def _word(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _cluster(row: dict[str, Any], column: str) -> str:
    # Rows of nobody in particular would all be one group.
    if not (word := _word(row[column])):
        raise BadRowError(f"{column} is empty")
    return word


def _read(dataset: Dataset, kind: TaskKind, runtime: Runtime, log: Log) -> tuple[Splits, list[str], int]:
    """The splits as the files have them, the clusters of train, and how many bad rows were left out."""
    files = {"train": dataset.train, "validation": dataset.validation_file, "test": dataset.test}
    named = {split: file for split, file in files.items() if file}
    store = hub.DATASETS.open(dataset.uri, runtime.dataset_mirror, runtime.s3_root, only=list(named.values()), without=[])
    store.check()
    splits: Splits = {}
    clusters: list[str] = []
    bad: dict[str, list[BadRow]] = {}
    for split, file in named.items():
        path = _fetch(store, split, file, dataset.uri, runtime.workdir / "data", log)
        read = read_file(path, kind, name=file, split_by=dataset.split_group_column if split == "train" else None)
        bad[file] = read.bad
        # File by file: what is wrong with the first is told before the second is fetched.
        tables.check(bad, dataset.max_bad_rows)
        if not len(read.examples):
            raise TrainingFailure("DataInvalid", f"{file}: the file holds no examples")
        splits[split] = read.examples
        clusters = clusters or read.clusters
    left_out = tables.count(bad)
    if left_out:
        log(f"data: {left_out} rows cannot be used and are left out: {tables.listed(bad)}")
    return splits, clusters, left_out


def _fetch(store: Store, split: str, file: str, uri: str, folder: Path, log: Log) -> Path:
    if not is_plain(file):
        raise TrainingFailure("DataInvalid", f"dataset.{split}: {file} is no name of a file below dataset.uri")
    try:
        fetch_files(store, {file: store.stat(file)}, folder, f"data: {file}", log)
    except Missing as error:
        there = ""
        if not store.uri.startswith("hf://"):  # from the hub comes only what was asked for
            present = [key for key in store.list() if key.endswith(tables.SUFFIXES)][:10]
            there = f"; it has {', '.join(present)}" if present else " and it has no .csv, .jsonl or .parquet file"
        raise TrainingFailure("DataInvalid", f"dataset.{split}: there is no {file} in {uri}{there}") from error
    return folder / file


# ---------------------------------------------------------------------------------------------------------- hold out ----
def _held_out(splits: Splits, clusters: list[str], dataset: Dataset, kind: TaskKind, seed: int) -> Splits:
    train, fraction = splits["train"], dataset.validation_fraction or 0.0
    strata = kind.strata(train.labels)
    held = hold_out_groups(strata, clusters, fraction, seed) if clusters else hold_out(strata, fraction, seed)
    if not held.any():
        raise TrainingFailure(
            "DataInvalid",
            f"dataset.validationFraction: {fraction:g} of the {len(train)} rows of {train.name} is not one row: raise it, "
            "or name a file in dataset.validation",
        )
    return {"train": train.take(np.flatnonzero(~held)), "validation": train.take(np.flatnonzero(held))} | {
        split: examples for split, examples in splits.items() if split != "train"
    }


def _generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(1,))))  # not that of any epoch


def hold_out(strata: npt.NDArray[np.int64], fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Which rows to hold out, shape (rows,): of each stratum its share to within one row, and never all of it."""
    rng, sizes = _generator(seed), np.bincount(strata)
    held = np.floor(fraction * sizes).astype(np.int64)
    # The rows that rounding down has left over go to the strata that lack most, equal ones in random order.
    lack = np.where(held + 1 < sizes, fraction * sizes - held, 0.0)
    order = rng.permutation(len(sizes))
    order = order[np.argsort(-lack[order], kind="stable")]
    left_over = max(0, round(fraction * len(strata)) - int(held.sum()))
    held[order[lack[order] > 0][:left_over]] += 1
    # Row by row in random order within each stratum: the first ones are held out.
    rows = rng.permutation(len(strata))
    rows = rows[np.argsort(strata[rows], kind="stable")]
    place = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    chosen = np.zeros(len(strata), dtype=np.bool_)
    chosen[rows[place < np.repeat(held, sizes)]] = True
    return chosen


def hold_out_groups(strata: npt.NDArray[np.int64], groups: list[str], fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Which rows to hold out, shape (rows,), all of a group or none.

    Of DRAWS random orders of the groups the one counts whose first groups, up to the wanted number of rows, are nearest to the
    proportions of all strata. No stratum is held out as a whole. Raises TrainingFailure(DataInvalid) where there is no such way.
    """
    rng, wanted = _generator(seed), fraction * len(strata)
    _, group = np.unique(groups, return_inverse=True)
    sizes, whole = np.bincount(group), np.bincount(strata)
    best, least = np.zeros(len(strata), dtype=np.bool_), np.inf
    for _ in range(DRAWS if len(sizes) > 1 else 0):
        order = rng.permutation(len(sizes))
        count = 1 + np.argmin(abs(np.cumsum(sizes[order])[:-1] - wanted))
        taken = np.zeros(len(sizes), dtype=np.bool_)
        taken[order[:count]] = True
        held = np.bincount(strata[taken[group]], minlength=len(whole))
        distance = ((held - fraction * whole) ** 2).sum()
        if distance < least and (held < whole)[whole > 0].all():
            best, least = taken[group], distance
    if np.isinf(least):
        raise TrainingFailure(
            "DataInvalid",
            f"dataset.splitGroupColumn: no way was found to hold out {fraction:g} of the rows in whole groups (there are {len(sizes)}) "
            "and to leave rows of every label in train: use another column, or name a file in dataset.validation",
        )
    return best


# ------------------------------------------------------------------------------------------------------------- leaks ----
def _without_leaks(splits: Splits, kind: TaskKind, log: Log) -> tuple[Splits, int]:
    """Train without the texts that are also in another split, and how many rows those were."""

    def keys(examples: Examples) -> list[str]:
        return [kind.key(text, target) for text, target in zip(examples.texts, examples.labels, strict=True)]

    train = splits["train"]
    elsewhere = {key for split, examples in splits.items() if split != "train" for key in keys(examples)}
    clean = np.array([key not in elsewhere for key in keys(train)])
    if duplicates := int((~clean).sum()):
        log(f"data: {duplicates} of {len(train)} rows of train are left out: their text is also in {_or(splits)}")
    if not clean.any():
        raise TrainingFailure("DataInvalid", f"{train.name}: every text of it is also in {_or(splits)}")
    return {**splits, "train": train.take(np.flatnonzero(clean))}, duplicates


def _or(splits: Splits) -> str:
    return " or ".join(split for split in splits if split != "train")


# ----------------------------------------------------------------------------------------------------- check and tell ----
def _check_labels(train: Examples, kind: TaskKind) -> None:
    # One that no row has would never be learned.
    if absent := [label for label, count in kind.counts(train.labels).items() if not count]:
        raise TrainingFailure(
            "DataInvalid",
            f"{train.name}: no row has the label {', '.join(map(repr, absent))} of dataset.labels: correct dataset.labels or the data",
        )


def _tell(splits: Splits, kind: TaskKind, dataset: Dataset, log: Log) -> None:
    counts = ", ".join(f"{len(examples)} {split}" for split, examples in splits.items())
    log(f"data: {counts} examples from {dataset.uri}")
    for split, examples in splits.items():
        if labels := kind.counts(examples.labels):
            log(f"data: {split} by label: {_bounded(labels)}")
        if examples.groups is not None:
            groups = sorted(Counter(examples.groups).items(), key=lambda item: (-item[1], item[0]))
            log(f"data: {split} by {dataset.group_column}: {_bounded(dict(groups))}")


def _bounded(counts: dict[str, int]) -> str:
    shown = ", ".join(f"{_short(name)} {count}" for name, count in list(counts.items())[:MAX_NAMES])
    return shown + (f" and {len(counts) - MAX_NAMES} more" if len(counts) > MAX_NAMES else "")


def _short(name: str) -> str:
    flat = " ".join(name.split()) or "(none)"
    return flat if len(flat) <= MAX_NAME_LENGTH else f"{flat[: MAX_NAME_LENGTH - 1]}…"
