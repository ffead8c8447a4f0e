"""What a decoder writes: the most probable token each time, after as much of the prompt as training would keep."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from trainer_kit import rows

from finetune_trainer import inference
from finetune_trainer.tasks.completion import prompt_tokens

LONG = " ".join(row["text"] for row in rows(60))
"""More than 200 words."""


def saved(
    folder: Path, tokenizer: Path, *, positions: int = 512, max_length: int = 256, eos: str | None = None, **brought: Any
) -> inference.Predictor:
    """A GPT-2 with weights large enough that what it writes depends on all that it reads, loaded as a trained one."""
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": positions, "initializer_range": 0.5}
    ends = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    transformers.AutoTokenizer.from_pretrained(tokenizer, eos_token=eos).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model("gpt2", vocab_size=27, **sizes, **ends)
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.generation_config.update(**brought)
    model.save_pretrained(folder)
    dataset = {"uri": "file:///d", "promptColumn": "prompt", "completionColumn": "completion", "maxLength": max_length}
    (folder / "finetune.json").write_text(json.dumps({"task": "CausalLM", "model": "hf://a/b", "dataset": dataset}))
    return inference.load(folder)


def most_probable(predictor: inference.Predictor, ids: list[int], count: int) -> list[int]:
    made = torch.tensor([ids])
    with torch.inference_mode():
        for _ in range(count):
            made = torch.cat([made, predictor.model(made).logits[:, -1:].argmax(dim=-1)], dim=1)
    return made[0, len(ids) :].tolist()


def test_the_ways_of_generating_that_a_model_brings_are_not_used(tiny_model: Path, tmp_path: Path) -> None:
    # Qwen2.5, for one, brings a repetition_penalty of 1.1.
    plain = saved(tmp_path / "plain", tiny_model)
    ids = prompt_tokens("it was good", plain.tokenizer)
    written = most_probable(plain, ids, inference.MAX_NEW_TOKENS)
    last = max(set(written), key=written.index)  # late: a penalty shows only in tokens that come again
    until = written[: 1 + min(written.index(t) for t in (1, last) if t in written)]
    brought = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "num_beams": 3, "min_new_tokens": 80, "guidance_scale": 1.5}
    for name, value in brought.items():
        other = saved(tmp_path / name, tiny_model, **{name: value}, eos_token_id=[1, last])
        assert other.predict(["it was good"]) == [{"completion": plain.tokenizer.decode(until, skip_special_tokens=True)}], name


@pytest.mark.parametrize("ends", [None, 1, [1, 2]])
def test_a_completion_ends_where_those_of_the_training_did(tiny_model: Path, tmp_path: Path, ends: Any) -> None:
    plain = saved(tmp_path / "plain", tiny_model)
    written = most_probable(plain, prompt_tokens("it was good", plain.tokenizer), inference.MAX_NEW_TOKENS)
    end = max(set(written), key=written.index)
    other = saved(tmp_path / "other", tiny_model, eos=plain.tokenizer.convert_ids_to_tokens(end), eos_token_id=ends)
    until = [t for t in written[: written.index(end)] if t not in other.tokenizer.all_special_ids]
    assert other.predict(["it was good"]) == [{"completion": plain.tokenizer.decode(until, skip_special_tokens=True)}]


@pytest.mark.parametrize(
    ("prompt", "positions", "max_length", "kept", "new"),
    [
        pytest.param(LONG, 300, 256, 172, 128, id="of-the-positions"),
        pytest.param(LONG, 64, 64, 32, 32, id="of-few-positions"),
        pytest.param("it was " * 20, 160, 16, 16, 128, id="of-maxLength"),
        pytest.param("it was " * 20, 512, 256, 41, 128, id="whole"),
        pytest.param("it was good", 64, 64, 4, 60, id="whole-and-few-positions"),
    ],
)
def test_a_long_prompt_loses_its_beginning(
    tiny_model: Path, tmp_path: Path, prompt: str, positions: int, max_length: int, kept: int, new: int
) -> None:
    # It ran past the model's positions: an IndexError. And maxLength was nothing to it.
    predictor = saved(tmp_path / "model", tiny_model, positions=positions, max_length=max_length)
    ids = prompt_tokens(prompt, predictor.tokenizer)
    expected = most_probable(predictor, ids[-kept:], new)
    assert predictor.predict([prompt]) == [{"completion": predictor.tokenizer.decode(expected, skip_special_tokens=True)}]
