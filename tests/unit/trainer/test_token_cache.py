"""Token ids are kept for the next run: the same ones, for the same data only, and never damaged ones."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from trainer_kit import LABELS, Job, Killed, make_model

from finetune_api.recipe import Dataset
from finetune_api.tasks import Task
from finetune_trainer import token_cache
from finetune_trainer.tasks import Encoded, Examples, Ragged, TaskKind, kind_of

TEXTS = ["it was good", "bad and slow", "the box"]
DATA: dict[str, tuple[Task, dict[str, Any], Examples]] = {
    "single": (Task.SEQUENCE_CLASSIFICATION, {"labels": LABELS}, Examples("x", TEXTS, np.array([0, 1, 2]))),
    "pair": (
        Task.SEQUENCE_CLASSIFICATION,
        {"labels": LABELS, "textPairColumn": "other"},
        Examples("x", [(text, "the order") for text in TEXTS], np.array([0, 1, 2])),
    ),
    "regression": (Task.REGRESSION, {}, Examples("x", TEXTS, np.array([0.5, -1, 2], dtype=np.float32))),
    "tagging": (
        Task.TOKEN_CLASSIFICATION,
        {"labels": ["O", "X"]},
        Examples("x", [text.split() for text in TEXTS], [[0, 0, 1], [1, 0, 1], [0, 0]]),
    ),
    "completion": (
        Task.CAUSAL_LM,
        {"promptColumn": "p", "completionColumn": "c"},
        Examples("x", TEXTS, ["fast", "late today", "number"]),
    ),
}


def kind_for(task: Task, dataset: dict[str, Any]) -> TaskKind:
    return kind_of(task, Dataset.model_validate({"uri": "file:///d", "maxLength": 16, **dataset}))


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    found = transformers.AutoTokenizer.from_pretrained(tiny_model)
    found.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return found


class Told(list[str]):
    """Lines, as `log`."""

    def __call__(self, line: str) -> None:
        self.append(line)

    @property
    def hits(self) -> int:
        return sum("those of an earlier run" in line for line in self)


def parts(encoded: Encoded) -> list[Any]:
    made: list[Any] = [encoded.truncated]
    for part in (encoded.ids, encoded.labels, encoded.types, encoded.words):
        made.append([row.tolist() for row in part] if isinstance(part, Ragged) else part if part is None else part.tolist())
        made.append(getattr(part, "dtype", None))
    return made


@pytest.mark.parametrize("task", DATA)
def test_what_is_kept_is_what_was_made(tokenizer: Any, tmp_path: Path, task: str) -> None:
    kind, examples = kind_for(*DATA[task][:2]), DATA[task][2]
    told = Told()
    first, again = (
        token_cache.encode({"train": examples}, kind, tokenizer, tmp_path / "tokens", told)["train"] for _ in range(2)
    )
    assert told == [f"data: the tokens of train are those of an earlier run ({tmp_path / 'tokens'})"]
    assert parts(first) == parts(again) == parts(kind.encode(examples, tokenizer, 16))
    assert (again.types is not None) is (task == "pair")


def _other_texts(kind: TaskKind, examples: Examples, tokenizer: Any, folder: Path) -> Any:
    return kind, Examples("x", [*examples.texts[:-1], "a box"], examples.labels), tokenizer


def _other_labels(kind: TaskKind, examples: Examples, tokenizer: Any, folder: Path) -> Any:
    return kind, Examples("x", examples.texts, examples.labels[::-1].copy()), tokenizer


def _other_length(kind: TaskKind, examples: Examples, tokenizer: Any, folder: Path) -> Any:
    return kind_for(Task.SEQUENCE_CLASSIFICATION, {"labels": LABELS, "maxLength": 8}), examples, tokenizer


def _other_task(kind: TaskKind, examples: Examples, tokenizer: Any, folder: Path) -> Any:
    return kind_for(Task.REGRESSION, {"labels": LABELS}), examples, tokenizer


def _other_tokenizer(kind: TaskKind, examples: Examples, tokenizer: Any, folder: Path) -> Any:
    file = make_model(folder / "other") / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["bad"], vocabulary["good"] = vocabulary["good"], vocabulary["bad"]
    file.write_text(json.dumps(content))
    return kind, examples, transformers.AutoTokenizer.from_pretrained(folder / "other")


@pytest.mark.parametrize("change", [_other_texts, _other_labels, _other_length, _other_task, _other_tokenizer])
def test_what_would_give_other_tokens_is_made_anew(tokenizer: Any, tmp_path: Path, change: Any) -> None:
    kind, examples, told = kind_for(*DATA["single"][:2]), DATA["single"][2], Told()
    folder = tmp_path / "tokens"
    token_cache.encode({"train": examples}, kind, tokenizer, folder, told)
    (before,) = folder.iterdir()
    kind, examples, other = change(kind, examples, tokenizer, tmp_path)
    encoded = token_cache.encode({"train": examples}, kind, other, folder, told)["train"]
    assert told == []
    assert parts(encoded) == parts(kind.encode(examples, other, kind.dataset.max_length))
    assert before not in folder.iterdir(), "what is of no use any more is left behind"


def test_a_tokenizer_that_was_used_and_saved_is_the_same(tokenizer: Any, tmp_path: Path) -> None:
    kind, examples, told = kind_for(*DATA["single"][:2]), DATA["single"][2], Told()
    token_cache.encode({"train": examples}, kind, tokenizer, tmp_path / "tokens", told)
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    saved = json.loads((tmp_path / "checkpoint/tokenizer.json").read_text())
    assert saved["truncation"]["max_length"] == 16, "otherwise this test shows nothing"
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    again.backend_tokenizer.no_truncation()
    token_cache.encode({"train": examples}, kind, again, tmp_path / "tokens", told)
    assert told.hits == 1
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/tokenizer.json").read_text()) == saved, (
        "what is saved depends on whether there was a cache"
    )


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-4])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("spoil", [_flip, _cut, _empty])
def test_damaged_tokens_are_made_again_and_that_is_said(tokenizer: Any, tmp_path: Path, spoil: Any) -> None:
    kind, examples, told = kind_for(*DATA["tagging"][:2]), DATA["tagging"][2], Told()
    folder = tmp_path / "tokens"
    first = token_cache.encode({"train": examples}, kind, tokenizer, folder, told)["train"]
    (file,) = folder.iterdir()
    spoil(file)
    again = token_cache.encode({"train": examples}, kind, tokenizer, folder, told)["train"]
    assert told == [f"data: the tokens of train that an earlier run left in {file} are damaged; they are made again"]
    assert parts(again) == parts(first)
    token_cache.encode({"train": examples}, kind, tokenizer, folder, told)
    assert told.hits == 1, "they were not written again"


def test_a_folder_that_cannot_be_written_is_no_reason_not_to_train(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("a file is in the way")
    kind, examples, told = kind_for(*DATA["single"][:2]), DATA["single"][2], Told()
    encoded = token_cache.encode({"train": examples}, kind, tokenizer, tmp_path / "tokens", told)["train"]
    assert len(encoded) == 3
    assert len(told) == 1
    assert told[0].startswith(f"data: the tokens cannot be kept for the next run in {tmp_path / 'tokens'}: ")


def test_what_is_in_the_way_stays(tokenizer: Any, tmp_path: Path) -> None:
    kind, examples, told = kind_for(*DATA["single"][:2]), DATA["single"][2], Told()
    token_cache.encode({"train": examples}, kind, tokenizer, tmp_path / "tokens", told)
    (file,) = (tmp_path / "tokens").iterdir()
    file.unlink()
    file.mkdir()
    (tmp_path / "tokens/other").mkdir()
    assert len(token_cache.encode({"train": examples}, kind, tokenizer, tmp_path / "tokens", told)["train"]) == 3
    for line, said in zip(told, ("are damaged", "cannot be kept", "cannot be removed"), strict=True):
        assert said in line


def test_a_job_that_goes_on_where_it_was_takes_its_tokens_and_learns_the_same(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Job(tmp_path / "whole", job.model, job.data)
    whole.run()
    runtime = job.runtime()
    monkeypatch.setattr(job, "runtime", lambda: runtime)
    with pytest.raises(Killed):
        job.run(kill_at=9)
    job.run()
    assert [run.text.count("are those of an earlier run") for run in job.runs] == [0, 3]
    for name in ("model.safetensors", "tokenizer.json"):
        assert (job.output / "model" / name).read_bytes() == (whole.output / "model" / name).read_bytes()
