"""The shipped customer feedback is what its data card says: labels, counts, balance, splits that share nothing, no near copies.

Messages were written one by one; the similarity test keeps it so when somebody adds more.
"""

import csv
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from finetune_api.manifest import load_job_file

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/customer-feedback"
SPLITS = ("train", "validation", "test")
LABELS = ("negative", "neutral", "positive")
CHANNELS = {"email", "chat", "review", "social", "survey", "phone"}
LINES = {
    "banking and insurance",
    "food delivery",
    "online retail",
    "software as a service",
    "telecom and internet",
    "travel and hotels",
    "utilities and public transport",
}
Row = dict[str, str]


def read(split: str) -> list[Row]:
    with (EXAMPLE / f"data/{split}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, strict=True))


@pytest.fixture(scope="module")
def data() -> dict[str, list[Row]]:
    return {split: read(split) for split in SPLITS}


@pytest.fixture(scope="module")
def everything(data: dict[str, list[Row]]) -> list[Row]:
    return [row for split in SPLITS for row in data[split]]


def test_every_row_is_whole(everything: list[Row]) -> None:
    for row in everything:
        assert list(row) == ["text", "label", "channel", "line"]
        assert row["label"] in LABELS
        assert row["channel"] in CHANNELS
        assert row["line"] in LINES
        assert row["text"] == row["text"].strip() != ""
        assert row["text"].isprintable()


def test_there_is_enough_and_the_data_card_says_how_much(data: dict[str, list[Row]], everything: list[Row]) -> None:
    assert len(everything) >= 900
    assert len(data["test"]) >= 150
    card = (EXAMPLE / "DATA_CARD.md").read_text(encoding="utf-8")
    for split, rows in data.items():
        counts = Counter(row["label"] for row in rows)
        assert f"| {split} | {len(rows)} | {' | '.join(str(counts[label]) for label in LABELS)} |" in card
    for line, count in Counter(row["line"] for row in everything).items():
        assert f"| {line} | {count} |" in card
    assert "CC0" in card


def test_no_text_is_in_the_data_twice(everything: list[Row]) -> None:
    doubles = [text for text, count in Counter(" ".join(row["text"].lower().split()) for row in everything).items() if count > 1]
    assert doubles == []


def test_labels_channels_and_lines_are_balanced(data: dict[str, list[Row]], everything: list[Row]) -> None:
    for split, rows in data.items():
        for label in LABELS:
            assert 0.30 <= sum(row["label"] == label for row in rows) / len(rows) <= 0.37, (split, label)
    for column, values in (("channel", CHANNELS), ("line", LINES)):
        for value in values:
            labels = Counter(row["label"] for row in everything if row[column] == value)
            share = labels.total() / len(everything)
            assert 0.5 / len(values) <= share <= 1.9 / len(values), (value, share)
            # Neither the channel nor the line of business gives the label away.
            assert max(labels.values()) <= 1.3 * min(labels[label] for label in LABELS), (value, labels)
    for line in LINES:
        assert {row["label"] for row in data["test"] if row["line"] == line} == set(LABELS)


def test_the_channel_shows_in_the_style_and_lengths_vary(everything: list[Row]) -> None:
    lengths = sorted(len(row["text"]) for row in everything)
    assert lengths[0] < 25
    assert lengths[-1] > 300
    assert sum(any(ord(c) > 0x1F000 for c in row["text"]) for row in everything) >= 10, "some write emojis"


def test_no_two_messages_are_alike(everything: list[Row]) -> None:
    """Jaccard similarity of character 5-grams below 0.5 for every pair; pairs that share none are never looked at."""
    grams = [five_grams(row["text"]) for row in everything]
    holders: dict[str, list[int]] = {}
    for number, own in enumerate(grams):
        for gram in own:
            holders.setdefault(gram, []).append(number)
    shared: Counter[tuple[int, int]] = Counter()
    for numbers in holders.values():
        shared.update(combinations(numbers, 2))
    alike = [
        (everything[a]["text"], everything[b]["text"])
        for (a, b), count in shared.items()
        if count / (len(grams[a]) + len(grams[b]) - count) >= 0.5
    ]
    assert alike == []


def five_grams(text: str) -> set[str]:
    plain = re.sub(r"\s+", " ", text.lower())
    return {plain[i : i + 5] for i in range(max(1, len(plain) - 4))}


def test_five_grams_tell_copies_from_others() -> None:
    a, b = five_grams("Where is my parcel?"), five_grams("where is  my parcel!")
    assert len(a & b) / len(a | b) > 0.8
    assert not five_grams("water is back") & five_grams("no delays")


def test_the_manifest_fits_the_data(data: dict[str, list[Row]]) -> None:
    recipe = load_job_file(EXAMPLE / "finetunejob.yaml").spec.recipe()
    assert tuple(recipe.dataset.labels) == LABELS
    assert {recipe.dataset.text_column, recipe.dataset.label_column} <= set(data["train"][0])
    for file in (recipe.dataset.train, recipe.dataset.validation_file, recipe.dataset.test):
        assert file is not None
        assert (EXAMPLE / "data" / file).is_file()
