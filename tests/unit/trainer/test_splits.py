"""From files to splits: what is held out, what leaves train, how many bad rows are borne, and what is told of all that."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from trainer_kit import LABELS, Job, rows, write_csv

from finetune_api.recipe import Dataset
from finetune_api.report import DataCounts
from finetune_api.tasks import Task
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.splits import MAX_NAMES, Splits, hold_out, hold_out_groups, read_splits
from finetune_trainer.tasks import kind_of

SEEDS = st.integers(0, 2**31 - 1)
FRACTIONS = st.floats(0.01, 0.99)
STRATA = st.lists(st.integers(0, 6), min_size=1, max_size=300).map(lambda ids: np.array(ids, dtype=np.int64))


# ---------------------------------------------------------------------------------------------------------- hold out ----
@given(STRATA, FRACTIONS, SEEDS)
def test_each_label_is_held_out_in_proportion_to_within_a_row(strata: Any, fraction: float, seed: int) -> None:
    held = hold_out(strata, fraction, seed)
    assert held.shape == strata.shape
    for label, count in Counter(strata.tolist()).items():
        taken = int(held[strata == label].sum())
        assert abs(taken - fraction * count) < 1 + 1e-9
        assert taken < count, "a label left train"
    assert held.sum() <= round(fraction * len(strata))
    assert (held == hold_out(strata, fraction, seed)).all(), "the same seed gave another split"


@given(st.integers(2, 400), FRACTIONS, SEEDS)
def test_without_labels_the_share_is_exact(count: int, fraction: float, seed: int) -> None:
    assert hold_out(np.zeros(count, dtype=np.int64), fraction, seed).sum() == min(round(fraction * count), count - 1)


def test_rows_that_rounding_leaves_over_are_not_lost() -> None:
    # 100 labels of 3 rows: a tenth of each is no row, a tenth of all is 30.
    strata = np.repeat(np.arange(100), 3)
    assert hold_out(strata, 0.1, 0).sum() == 30
    assert (hold_out(strata, 0.1, 0) != hold_out(strata, 0.1, 1)).any()
    chosen = {label for seed in range(40) for label in strata[hold_out(strata, 0.1, seed)]}
    assert len(chosen) > 90, "it is always the same labels that are held out"


@st.composite
def grouped(draw: st.DrawFn) -> tuple[Any, list[str]]:
    """Labels, and a group of each row; no label has all its rows in one group."""
    pairs = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 12)), min_size=0, max_size=120))
    pairs += [(label, group) for label in range(3) for group in (20, 21, 22)]
    pairs = draw(st.permutations(pairs))
    return np.array([label for label, _ in pairs], dtype=np.int64), [f"g{group}" for _, group in pairs]


@given(grouped(), st.floats(0.05, 0.6), SEEDS)
def test_groups_are_never_divided(data: Any, fraction: float, seed: int) -> None:
    strata, groups = data
    held = hold_out_groups(strata, groups, fraction, seed)
    sides: dict[str, set[bool]] = {}
    for group, side in zip(groups, held.tolist(), strict=True):
        sides.setdefault(group, set()).add(side)
    assert all(len(side) == 1 for side in sides.values())
    assert 0 < held.sum() < len(held)
    assert set(strata[~held]) == set(strata), "a label left train"
    assert abs(held.sum() - fraction * len(held)) <= max(Counter(groups).values()), "more than a group away from the share"
    assert (held == hold_out_groups(strata, groups, fraction, seed)).all(), "the same seed gave another split"


def test_groups_keep_labels_nearly_in_proportion() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 200, size=1000)
    strata = (rng.random(1000) < np.where(groups % 2, 0.9, 0.1)).astype(np.int64)  # the group says much about the label
    for seed in range(5):
        held = hold_out_groups(strata, groups.astype(str).tolist(), 0.2, seed)
        assert abs(np.bincount(strata[held]) - 0.2 * np.bincount(strata)).max() <= 3, "one random draw is away by 12"


@pytest.mark.parametrize("groups", [["a"] * 6, ["a"] * 3 + ["b"] * 3], ids=["one-group", "a-label-in-one-group"])
def test_groups_that_cannot_be_split_are_told(groups: list[str]) -> None:
    with pytest.raises(TrainingFailure, match=r"dataset\.splitGroupColumn: no way was found to hold out 0\.5 of the rows"):
        hold_out_groups(np.array([0, 0, 0, 1, 1, 1]), groups, 0.5, 0)


# ---------------------------------------------------------------------------------------------------------- pipeline ----
def read(job: Job, **changes: Any) -> tuple[Splits, DataCounts, list[str]]:
    lines: list[str] = []
    recipe = job.recipe(**changes)
    splits, counts = read_splits(recipe, job.runtime(), lines.append)
    assert counts.examples == {split: len(examples) for split, examples in splits.items()}
    return splits, counts, lines


def write(path: Path, examples: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(examples), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in examples))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(examples[0]))
            writer.writeheader()
            writer.writerows(examples)


@pytest.fixture
def own(job: Job, tmp_path: Path) -> Job:
    """A job whose files the test writes."""
    job.data = tmp_path / "own"
    job.changes = {"dataset": {"test": None}}
    return job


def test_the_files_are_the_splits_where_nothing_else_is_said(job: Job) -> None:
    splits, counts, lines = read(job)
    assert {split: (e.name, len(e)) for split, e in splits.items()} == {
        "train": ("train.csv", 44),
        "validation": ("validation.csv", 18),
        "test": ("test.csv", 15),
    }
    assert (counts.bad_rows, counts.duplicates) == (0, 0)
    assert lines == [
        f"data: 44 train, 18 validation, 15 test examples from file://{job.data}",
        "data: train by label: negative 15, neutral 15, positive 14",
        "data: validation by label: negative 6, neutral 6, positive 6",
        "data: test by label: negative 5, neutral 5, positive 5",
    ]


def test_all_formats_train_the_same(own: Job) -> None:
    taught = []
    for suffix in ("csv", "jsonl", "parquet"):
        files = {"train": f"train.{suffix}", "validation": f"validation.{suffix}"}
        write(own.data / files["train"], rows(44))
        write(own.data / files["validation"], rows(18, offset=100))
        splits, *_ = read(own, dataset=files)
        taught.append([(e.texts, e.labels.tolist()) for e in splits.values()])
    assert taught[0] == taught[1] == taught[2]


def test_validation_is_held_out_of_train(own: Job) -> None:
    write(own.data / "train.csv", rows(60))
    write(own.data / "test.csv", rows(15, offset=300))
    splits, _, lines = read(own, dataset={"validationFraction": 0.2, "test": "test.csv"})
    assert {split: len(e) for split, e in splits.items()} == {"train": 48, "validation": 12, "test": 15}
    assert list(splits) == ["train", "validation", "test"]
    texts = [*splits["train"].texts, *splits["validation"].texts]
    assert sorted(texts) == sorted(row["text"] for row in rows(60))
    truth = {row["text"]: LABELS.index(row["label"]) for row in rows(60)}
    assert [truth[t] for t in splits["train"].texts] == splits["train"].labels.tolist()
    assert Counter(splits["validation"].labels.tolist()) == {0: 4, 1: 4, 2: 4}
    assert "data: validation by label: negative 4, neutral 4, positive 4" in lines
    again, *_ = read(own, dataset={"validationFraction": 0.2})
    assert again["validation"].texts == splits["validation"].texts
    other, *_ = read(own, dataset={"validationFraction": 0.2}, hyperparameters={"seed": 7})
    assert other["validation"].texts != splits["validation"].texts


def test_whole_customers_are_held_out(own: Job) -> None:
    made = [{**row, "customer": f"c{i // 4}", "channel": ["web", "app", ""][i % 3]} for i, row in enumerate(rows(80))]
    write(own.data / "train.jsonl", made)
    dataset = {"train": "train.jsonl", "validationFraction": 0.25, "splitGroupColumn": "customer", "groupColumn": "channel"}
    splits, _, lines = read(own, dataset=dataset)
    customer = {row["text"]: row["customer"] for row in made}
    sides = [{customer[text] for text in splits[split].texts} for split in ("train", "validation")]
    assert not sides[0] & sides[1]
    assert len(splits["validation"]) == 20
    channel = {row["text"]: row["channel"] for row in made}
    for split, examples in splits.items():
        assert examples.groups == [channel[text] for text in examples.texts]
        counts = Counter(examples.groups)
        told = next(line for line in lines if line.startswith(f"data: {split} by channel: "))
        assert {f"{name or '(none)'} {count}" for name, count in counts.items()} == set(
            told.partition("channel: ")[2].split(", ")
        )


def test_a_row_of_nobody_in_particular_is_bad_where_customers_are_held_out(own: Job) -> None:
    write(own.data / "train.csv", [{**row, "customer": "" if i == 5 else f"c{i}"} for i, row in enumerate(rows(30))])
    dataset = {"validationFraction": 0.2, "splitGroupColumn": "customer"}
    with pytest.raises(TrainingFailure, match=r"^train\.csv: line 7: customer is empty$"):
        read(own, dataset=dataset)
    assert sum(read(own, dataset={**dataset, "maxBadRows": 1})[1].examples.values()) == 29


def test_a_share_that_is_no_row_is_told(own: Job) -> None:
    write(own.data / "train.csv", rows(20))
    with pytest.raises(TrainingFailure, match=r"validationFraction: 0\.01 of the 20 rows of train\.csv is not one row"):
        read(own, dataset={"validationFraction": 0.01})


# ------------------------------------------------------------------------------------------------------------- leaks ----
def test_texts_of_validation_and_test_leave_train(own: Job) -> None:
    write(
        own.data / "validation.csv", [{"text": "caf\u00e9  was\tgood ", "label": "positive"}, {"text": "B", "label": "neutral"}]
    )
    write(own.data / "test.csv", [{"text": "tested", "label": "neutral"}])
    extra = ["cafe\u0301 was good", "cafe was good", "tested", " tested", "b", "Tested"]
    write(own.data / "train.csv", [*rows(6), *({"text": text, "label": "negative"} for text in extra)])
    splits, counts, lines = read(own, dataset={"test": "test.csv"})
    assert splits["train"].texts[6:] == ["cafe was good", "b", "Tested"]
    assert len(splits["train"].labels) == 9
    assert counts.duplicates == 3
    assert lines[0] == "data: 3 of 12 rows of train are left out: their text is also in validation or test"


def test_a_label_that_leaves_train_with_its_texts_is_told(own: Job) -> None:
    write(own.data / "train.csv", [*(row for row in rows(9) if row["label"] != "positive"), {"text": "x", "label": "positive"}])
    write(own.data / "validation.csv", [{"text": "x", "label": "positive"}])
    with pytest.raises(TrainingFailure, match=r"train\.csv: no row has the label 'positive' of dataset\.labels"):
        read(own)
    write(own.data / "validation.csv", rows(9))
    write(own.data / "train.csv", rows(6))
    with pytest.raises(TrainingFailure, match=r"train\.csv: every text of it is also in validation"):
        read(own)


KEYS: list[tuple[str, dict[str, Any], Any, Any, bool]] = [
    ("pair", {"textPairColumn": "other"}, (("a b", "c"), 0), (("a", "b c"), 0), False),
    ("pair-spaces", {"textPairColumn": "other"}, (("a b", "c"), 0), (("a  b", "c"), 1), True),
    ("prompt", {"promptColumn": "p", "completionColumn": "c"}, ("Write", "x"), ("Write", "y"), False),
    ("completion", {"promptColumn": "p", "completionColumn": "c"}, ("Write", "x"), ("Write ", " x"), True),
    ("chat", {"messagesColumn": "m"}, ([{"role": "user", "content": "a"}], ""), ([{"role": "user", "content": "a "}], ""), True),
    ("roles", {"messagesColumn": "m"}, ([{"role": "user", "content": "a"}], ""), ([{"role": "tool", "content": "a"}], ""), False),
]


@pytest.mark.parametrize(("changes", "a", "b", "same"), [case[1:] for case in KEYS], ids=[case[0] for case in KEYS])
def test_what_counts_as_the_same_text(changes: dict[str, Any], a: Any, b: Any, same: bool) -> None:
    labels = {"labels": ["x", "y"]} if "textPairColumn" in changes else {}
    task = Task.SEQUENCE_CLASSIFICATION if labels else Task.CAUSAL_LM
    kind = kind_of(task, Dataset.model_validate({"uri": "file:///d", **labels, **changes}))
    assert (kind.key(*a) == kind.key(*b)) is same


# ---------------------------------------------------------------------------------------------------------- bad rows ----
def test_bad_rows_are_borne_up_to_a_number_over_all_files(own: Job) -> None:
    write(own.data / "train.csv", rows(30))
    write(own.data / "validation.csv", rows(9, offset=100))
    for split, bad in (("train", b"no label\nx,ugly\n"), ("validation", b"caf\xe9,positive\n")):
        with (own.data / f"{split}.csv").open("ab") as file:
            file.write(bad)
    splits, counts, lines = read(own, dataset={"maxBadRows": 3})
    assert (len(splits["train"]), len(splits["validation"]), counts.bad_rows) == (30, 9, 3)
    said = (
        "train.csv: line 32 has 1 fields, the header has 2: quote texts that hold a comma; line 33: its label is not one of "
        "dataset.labels (negative, neutral, positive); validation.csv: line 11 is not UTF-8: save the file as UTF-8"
    )
    assert lines[0] == f"data: 3 rows cannot be used and are left out: {said}"
    with pytest.raises(TrainingFailure) as failed:
        read(own, dataset={"maxBadRows": 2})
    assert failed.value.failure.reason == "DataInvalid"
    assert failed.value.message == f"{said}; 3 bad rows are more than dataset.maxBadRows (2)"


def test_without_leave_the_first_bad_row_is_the_end(own: Job) -> None:
    write(own.data / "train.csv", [{"text": "x", "label": "ugly"}] * 9)
    with pytest.raises(TrainingFailure, match=r"^train\.csv: line 2: .*line 6: .* and 4 more rows$"):
        read(own)  # though there is no validation.csv


def test_a_file_without_examples_is_told(own: Job) -> None:
    (own.data).mkdir()
    for content, allowed in (("text,label\n", 0), ("text,label\nx,ugly\n", 1)):
        (own.data / "train.csv").write_text(content)
        with pytest.raises(TrainingFailure, match=r"^train\.csv: the file holds no examples"):
            read(own, dataset={"maxBadRows": allowed})


def test_a_label_without_training_rows_is_told(own: Job) -> None:
    write(own.data / "train.csv", [row for row in rows(30) if row["label"] != "neutral"])
    write(own.data / "validation.csv", rows(9, offset=100))
    with pytest.raises(TrainingFailure, match=r"no row has the label 'neutral' of dataset\.labels"):
        read(own)
    write(own.data / "train.csv", rows(30))
    write(own.data / "validation.csv", [row for row in rows(9, offset=100) if row["label"] != "neutral"])
    assert len(read(own)[0]["validation"]) == 6, "validation data need not have every label"


def test_a_name_that_leads_out_of_the_folder_is_refused(job: Job) -> None:
    with pytest.raises(TrainingFailure, match=r"dataset\.test: a/\.\./\.\./x\.csv is no name of a file below dataset\.uri"):
        read(job, dataset={"test": "a/../../x.csv"})


# -------------------------------------------------------------------------------------------------------------- told ----
def test_what_is_told_of_groups_is_bounded(own: Job) -> None:
    names = [f"group {i:02}" for i in range(MAX_NAMES + 5)]
    names[3] = "two\nlines " + "x" * 100
    write(own.data / "train.jsonl", [{**row, "g": names[min(i, len(names) - 1)]} for i, row in enumerate(rows(40))])
    write(own.data / "validation.jsonl", [{**row, "g": None} for row in rows(9, offset=100)])
    files = {"train": "train.jsonl", "validation": "validation.jsonl", "groupColumn": "g"}
    lines = read(own, dataset=files)[2]
    train, validation = (next(line for line in lines if f"{split} by g" in line) for split in ("train", "validation"))
    assert train.startswith("data: train by g: group 24 16, group 00 1, ")
    assert train.endswith(" and 5 more")
    assert train.count(",") == MAX_NAMES - 1
    assert all("\n" not in line and "x" * 50 not in line for line in lines)
    assert validation == "data: validation by g: (none) 9"
    write(own.data / "train.csv", rows(9))
    with pytest.raises(TrainingFailure, match="train.csv: there is no column 'g'"):
        read(own, dataset={"groupColumn": "g"})


def test_several_labels_and_tags_are_counted(own: Job) -> None:
    several = ["negative|neutral", "neutral|negative", "positive"]
    write(own.data / "train.csv", [{"text": f"t{i}", "label": label} for i, label in enumerate(several)])
    write(own.data / "validation.csv", [{"text": "v", "label": ""}])
    lines = read(own, dataset={"multiLabel": {}})[2]
    assert "data: train by label: negative 2, neutral 2, positive 1" in lines
    assert "data: validation by label: negative 0, neutral 0, positive 0" in lines
    write(own.data / "train.csv", [{"text": "a b c", "label": "O B-X O"}])
    write(own.data / "validation.csv", [{"text": "a", "label": "O"}])
    lines = read(own, task="TokenClassification", dataset={"labels": ["O", "B-X"]})[2]
    assert "data: train by label: O 2, B-X 1" in lines
    assert "data: validation by label: O 1, B-X 0" in lines


def test_the_result_tells_what_was_left_out(job: Job, tmp_path: Path) -> None:
    job.data = tmp_path / "own"
    write_csv(job.data / "train.csv", [*rows(44), *rows(2, offset=100), {"text": "x", "label": "ugly"}])
    write_csv(job.data / "validation.csv", rows(18, offset=100))
    write_csv(job.data / "test.csv", rows(15, offset=300))
    job.run(dataset={"maxBadRows": 1}, hyperparameters={"epochs": 1})
    told = json.loads((job.output / "result.json").read_text())["data"]
    assert told == {"examples": {"train": 44, "validation": 18, "test": 15}, "badRows": 1, "duplicates": 2}
    assert "data: 2 of 46 rows of train are left out" in job.runs[0].text
