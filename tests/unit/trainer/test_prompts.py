"""Prompt templates: columns in their places, cut to length, the same text in training and prediction."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from few_shot_kit import refused, scores
from hypothesis import given
from hypothesis import strategies as st
from trainer_kit import Job, merged, rows

from finetune_api.few_shot import Prompt
from finetune_trainer import inference
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.tasks.template import Template


def template(text: str) -> Template:
    words = {"a": "x", "b": "y"} if "{mask}" in text.replace("{{", "") else None
    return Template.of(Prompt.model_validate({"template": text, "verbalizers": words}))


def test_columns_take_their_places() -> None:
    made = template("{{{title}}}: {text} ({title}) {{}}")
    assert made.columns == ("title", "text")
    text, spans = made.render(["T", "some {text}"])
    assert text == "{T}: some {text} (T) {}"
    assert [text[a:b] for a, b in spans] == ["T", "some {text}", "T"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("no column", "must hold the {name} of a column"),
        ("{text} {", "a brace that stands for itself is written twice"),
        ("{} {text}", "a brace that stands for itself is written twice"),
        ("{text}}", "a brace that stands for itself is written twice"),
        ("{text} {mask}", "once with verbalizers, and never without"),
    ],
)
def test_a_template_that_cannot_be_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match="template") as told:
        Prompt.model_validate({"template": text})
    assert says in str(told.value)


WORD = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)


@given(st.lists(st.tuples(WORD, WORD), min_size=1, max_size=3), st.integers(24, 60))
def test_what_is_too_long_loses_its_columns_ends_and_nothing_else(byte_level: Any, cells: Any, length: int) -> None:
    made = template("Title: {title} Text: {text} It was {mask}.")
    values = [(" ".join([a] * 9), " ".join([b] * 3)) for a, b in cells]
    encoded, cut = made.encode(values, byte_level, length, "<mask>")
    ids = [row.tolist() for row in encoded]
    whole = [byte_level(made.render(row, "<mask>")[0])["input_ids"] for row in values]
    assert cut == sum(len(tokens) > length for tokens in whole)
    for row, tokens in zip(ids, whole, strict=True):
        assert len(row) == min(length, len(tokens))
        assert row.count(byte_level.mask_token_id) == 1
        if len(tokens) <= length:
            assert row == tokens
        said = byte_level.decode(row)
        assert said.startswith("<s>Title: ")
        assert said.endswith("It was<mask>.</s>")
        rest = iter(tokens)
        assert all(token in rest for token in row), "nothing is new, nothing moves"


def test_the_longest_column_is_cut_first_and_from_its_end(byte_level: Any) -> None:
    made = template("{title}|{text}|")
    text = " ".join(f"good{i} " for i in range(40))
    assert byte_level.decode(made.encode([("kind", text)], byte_level, 4, "")[0][0]) == "<s>||</s>", "columns may go, no more"
    for length in range(8, 20):
        [row], _ = made.encode([("kind", text)], byte_level, length, "")
        assert len(row) == length
        said = byte_level.decode(row).removeprefix("<s>").removesuffix("</s>")
        title, kept, nothing = said.split("|")
        assert (title, nothing) == ("kind", "")
        assert kept
        assert text.startswith(kept), "the beginning of the text, without a gap"


def test_a_mask_in_the_data_is_no_mask(byte_level: Any) -> None:
    [row], _ = template("{text} It was {mask}.").encode([("<mask> bad <mask>",)], byte_level, 40, "<mask>")
    assert row.tolist().count(byte_level.mask_token_id) == 1
    assert byte_level.decode(row).endswith("It was<mask>.</s>")


def templated(job: Job, text: str, name: str = "templated", **changes: Any) -> Job:
    return replace(job, home=job.home / name, changes=merged({"dataset": {"prompt": {"template": text}}}, changes), runs=[])


@pytest.fixture
def columns(job: Job, tmp_path: Path) -> Job:
    """The kit's data with what it says in two columns: the first words, and the rest."""
    for split in ("train", "validation", "test"):
        count, offset = {"train": (44, 0), "validation": (18, 100), "test": (15, 300)}[split]
        lines = []
        for row in rows(count, offset):
            words = row["text"].split()
            lines.append(json.dumps({"head": words[0], "rest": " ".join(words[1:] or ["it"]), "stars": 3, "label": row["label"]}))
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    files = {split: f"{split}.jsonl" for split in ("train", "validation", "test")}
    return replace(job, data=tmp_path, changes={"dataset": files})


def test_training_and_prediction_read_the_same_text(columns: Job) -> None:
    done = replace(
        columns, changes=merged(columns.changes, {"dataset": {"prompt": {"template": "the {rest} was {stars} {head}"}}})
    )
    done.run()
    card = json.loads((done.output / "model/finetune.json").read_text())
    assert card["dataset"]["prompt"] == {"template": "the {rest} was {stars} {head}"}
    data = [json.loads(line) for line in (done.data / "test.jsonl").read_text().splitlines()]
    predictor = inference.load(done.output / "model")
    for name, value in predictor.evaluate(data).values.items():
        assert value == pytest.approx(scores(done)[f"test/{name}"], rel=1e-3, abs=1e-5), name
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(done.output / "model").eval()
    for row, answer in zip(data, predictor.predict(inference.read_inputs(predictor.kind, data)), strict=True):
        text = f"the {row['rest']} was {row['stars']} {row['head']}"
        with torch.inference_mode():
            odds = torch.softmax(stock(**predictor.tokenizer([text], return_tensors="pt")).logits, dim=1)[0]
        np.testing.assert_allclose(list(answer["probabilities"].values()), odds.numpy(), atol=1e-5)


def test_a_template_of_one_column_takes_plain_texts(job: Job) -> None:
    done = templated(job, "it was {text}")
    done.run()
    plain = templated(job, "{text}", "plain")
    assert inference.load(done.output / "model").predict(["great"]) != []
    plain.run()
    job.run()
    assert scores(plain) == scores(job)
    assert scores(done) != scores(job)


def test_a_column_that_is_not_there_is_told(job: Job) -> None:
    with pytest.raises(TrainingFailure, match=r"train\.csv: there is no column 'title'; the columns are 'text', 'label'"):
        templated(job, "{title} {text}").run()


def test_a_template_that_fills_everything_is_told(job: Job) -> None:
    message = refused(templated(job, "the a it was is and very my " * 2 + "{text}", dataset={"maxLength": 16}))
    assert "dataset.prompt.template: it has 18 tokens without any column; dataset.maxLength is 16" in message
