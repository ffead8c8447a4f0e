"""Chats as the model's template has them: what of one is learned, and what becomes of one that the template refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from few_shot_kit import tiny
from trainer_kit import Job

from finetune_api.recipe import Dataset
from finetune_api.tasks import Task
from finetune_trainer import inference, token_cache
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.tasks import IGNORED, Examples, TaskKind, kind_of
from finetune_trainer.tasks.completion import chat

STRICT = (
    "{% if messages[0]['role'] != 'system' %}[CLS] it is my box [SEP] {% endif %}{% for m in messages %}"
    "{% if loop.index0 and m.role == messages[loop.index0 - 1].role %}{{ raise_exception('two at once: ' + m.content) }}{% endif %}"
    "[CLS] {{ m.role }} {{ m.content }} [SEP] {% endfor %}{% if add_generation_prompt %}[CLS] assistant {% endif %}"
)
"""As many have it: with a system prompt of its own, and for roles that alternate."""
BARE = "{% for m in messages %}{{ m.content }} [SEP] {% endfor %}"


def said(*messages: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in messages]


GOOD = said(("user", "it was good"), ("assistant", "kind"))
REFUSED = said(("user", "the order"), ("user", "secret"), ("assistant", "late"))


def kind(**changes: Any) -> TaskKind:
    return kind_of(Task.CAUSAL_LM, Dataset.model_validate({"uri": "file:///d", "messagesColumn": "messages", **changes}))


def split(name: str, *chats: Any) -> Examples:
    return Examples(name, list(chats), [""] * len(chats), places=[f"line {3 * n}" for n in range(1, len(chats) + 1)])


@pytest.fixture(scope="module")
def decoder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template, tokenizer.eos_token = STRICT, "[SEP]"
    tokenizer.save_pretrained(folder)
    tiny("llama", transformers.AutoModelForCausalLM, len(tokenizer)).save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(decoder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(decoder)


@pytest.fixture
def chats(job: Job, decoder: Path, tmp_path: Path) -> Job:
    """A job whose third chat is refused."""
    data = tmp_path / "chats"
    data.mkdir()
    for name, rows in (("train", [GOOD, GOOD, REFUSED]), ("validation", [said(("user", "slow"), ("assistant", "bad"))])):
        (data / f"{name}.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    dataset = {
        "train": "train.jsonl",
        "validation": "validation.jsonl",
        "test": None,
        "labels": None,
        "messagesColumn": "messages",
    }
    return replace(job, model=decoder, data=data, changes={"task": "CausalLM", "dataset": dataset})


# ----------------------------------------------------------------------------------------------------- what is learned --
def test_of_a_chat_that_the_assistant_begins_only_what_it_says_is_learned(tokenizer: Any) -> None:
    # The header was learned as well, and the system prompt that the template brings.
    ids, labels = chat(said(("assistant", "very kind"), ("user", "slow"), ("assistant", "bad")), tokenizer)
    assert tokenizer.decode(ids).startswith("[CLS] it is my box [SEP] [CLS]")
    assert tokenizer.decode([t for t in labels if t != IGNORED]) == "very kind [SEP] bad [SEP]"


@pytest.mark.parametrize("template", [STRICT, BARE])
def test_a_long_chat_that_the_assistant_begins_is_cut_and_learned(tokenizer: Any, template: str) -> None:
    # It became a row without tokens: nothing to learn from, and a batch of them could not be computed.
    tokenizer.chat_template = template
    long = said(("assistant", "good " * 20), ("user", "slow"), ("assistant", "bad " * 20))
    encoded = kind().encode(split("x", long), tokenizer, 8)
    assert encoded.ids.lengths.tolist() == [8]
    assert kind().weights(encoded).tolist() == [7]
    assert encoded.truncated == 1


def test_a_plain_text_is_what_the_user_says(decoder: Path, tokenizer: Any) -> None:
    # It went to the model as it was: without the template, and without the header of an answer.
    predictor = inference.load(decoder, inference.Card(Task.CAUSAL_LM, "hf://a/b", kind().dataset))
    assert predictor.predict(["slow", "good box"]) == predictor.predict([said(("user", "slow")), said(("user", "good box"))])
    predictor.tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(TrainingFailure, match="^row 1: the model's chat template refuses the messages"):
        predictor.predict(["slow"])


# ------------------------------------------------------------------------------------------------------ what is refused --
def test_a_chat_that_the_template_refuses_is_a_bad_row(chats: Job) -> None:
    # It ended as UserCodeError: unnamed, and tried again and again.
    with pytest.raises(TrainingFailure, match=r"train\.jsonl: line 3: the model's chat template refuses the mess") as failed:
        chats.run()
    assert failed.value.failure.reason == "DataInvalid"
    assert "secret" not in failed.value.message
    chats.run(dataset={"maxBadRows": 1})
    assert "data: 1 rows cannot be used and are left out: train.jsonl: " in chats.runs[-1].text
    assert (chats.output / "model/model.safetensors").exists()


def test_refused_chats_of_all_splits_count_together_and_each_time(tokenizer: Any, tmp_path: Path) -> None:
    splits = {"train": split("a", GOOD, REFUSED, GOOD), "validation": split("a", GOOD), "test": split("b", REFUSED, GOOD)}
    for _ in range(2):  # what was kept of the first time does not hide them
        with pytest.raises(TrainingFailure, match=r"^a: line 6: .*; b: line 3: .*; 2 bad rows are more than .*maxBadRows \(1\)"):
            token_cache.encode(splits, kind(maxBadRows=1), tokenizer, tmp_path / "tokens", lambda _: None)
    for _ in range(2):
        lines: list[str] = []
        made = token_cache.encode(splits, kind(maxBadRows=2), tokenizer, tmp_path / "tokens", lines.append)
        assert [len(encoded) for encoded in made.values()] == [2, 1, 1]
        assert lines[-1].startswith("data: 2 rows cannot be used and are left out: a: line 6: ")
    with pytest.raises(TrainingFailure, match="^a: no row of train can be used: a: line 3: the model's chat template refuses"):
        token_cache.encode({"train": split("a", REFUSED)}, kind(maxBadRows=9), tokenizer, tmp_path / "tokens", lambda _: None)


def test_a_chat_that_the_template_rewrites_later_is_a_bad_row(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}[CLS] {% if loop.last %}late {% endif %}{{ m.content }} [SEP] {% endfor %}"
    examples = split("x", GOOD, said(("user", "box"), ("assistant", "good"), ("user", "box")))
    encoded = kind().encode(examples.take(np.array([1])), tokenizer, 32)
    assert [row.said for row in encoded.bad] == [
        "line 6: the model's chat template writes a message in another way when others follow"
    ]


def test_prediction_and_evaluation_name_a_chat_that_the_template_refuses(chats: Job) -> None:
    chats.run(dataset={"maxBadRows": 1})
    predictor = inference.load(chats.output / "model")
    assert len(predictor.predict([GOOD[:1]])) == 1
    for use in (
        lambda: predictor.predict([GOOD[:1], REFUSED[:2]]),
        lambda: predictor.evaluate([{"messages": GOOD}, {"messages": REFUSED}]),
    ):
        with pytest.raises(TrainingFailure, match="^row 2: the model's chat template refuses the messages") as failed:
            use()
        assert failed.value.failure.reason == "DataInvalid"
