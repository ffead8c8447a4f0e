"""Paths, columns and tables of the command line, without a process."""

import io
import json
import sys
from pathlib import Path

import pytest

from finetune_api.recipe import Dataset
from finetune_api.tasks import Task
from finetune_cli import inference, inputs, run, show
from finetune_cli.errors import UserError
from finetune_trainer.inference import Card

CARD = Card(Task.SEQUENCE_CLASSIFICATION, "hf://a/b", Dataset.model_validate({"uri": "file:///data", "labels": ["a", "b"]}))


def test_uris_on_this_machine() -> None:
    root = Path("/buckets")
    assert inputs.local_path("s3://bucket/a/b", root) == Path("/buckets/bucket/a/b")
    assert inputs.local_path("file:///models/x", None) == Path("/models/x")
    assert inputs.local_path("s3://bucket/a", None) is None


def test_attempts_grow_and_a_broken_count_is_told(tmp_path: Path) -> None:
    assert [run._next_attempt(tmp_path) for _ in range(3)] == [1, 2, 3]
    (tmp_path / run.STATE_FILE).write_text("[")
    with pytest.raises(UserError, match="delete it"):
        run._next_attempt(tmp_path)


def test_a_row_without_a_text_is_named_by_its_number(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "secret words"}\n{"text": 3}\n')
    with pytest.raises(UserError, match="row 2") as error:
        inference._texts_of(file, CARD)
    assert "secret" not in error.value.message
    with pytest.raises(UserError, match=r"\.txt"):
        inference._texts_of(tmp_path / "rows.xlsx", CARD)


def test_a_template_of_several_columns_needs_rows(tmp_path: Path) -> None:
    dataset = {"uri": "file:///data", "labels": ["a", "b"], "prompt": {"template": "{title}: {body}"}}
    card = {"task": "SequenceClassification", "model": "hf://a/b", "dataset": dataset}
    (tmp_path / "finetune.json").write_text(json.dumps(card))

    def predict(texts: list[str], text_column: str | None = None) -> None:
        inference.predict(str(tmp_path), texts, file=None, text_column=text_column, as_json=True, s3_root=None)

    with pytest.raises(UserError, match="the model reads title, body of a row: give a .csv or .jsonl file with --file"):
        predict(["x"])
    with pytest.raises(UserError, match="--text-column other: the model's template reads title, body"):
        predict(["x"], "other")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"title": "a", "body": 3}\n')
    assert inference._texts_of(rows, Card.read(tmp_path)) == [("a", "3")]


def test_text_files_are_one_text_a_line(tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("\ufeffone\n\ntwo\n", encoding="utf-8")
    assert inference._texts_of(file, CARD) == ["one", "two"]
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        inference._texts_of(file, CARD)


def test_standard_input_is_read_as_a_text_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(data: bytes) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        return inference._texts_to_label(None, CARD)

    assert read("\ufeffone\n\ncafé\n".encode()) == ["one", "café"]
    with pytest.raises(UserError, match="^standard input: is not UTF-8: save the file as UTF-8"):
        read(b"one\ncaf\xe9\n")


@pytest.mark.parametrize(("wrong", "told"), [("", "is empty"), (" ", "is empty"), ("caf\udce9", "holds half a surrogate pair")])
def test_a_text_that_no_table_may_hold_is_named_by_its_number(tmp_path: Path, wrong: str, told: str) -> None:
    card = {"task": "CausalLM", "model": "hf://a/b", "dataset": {"uri": "file:///data", "messagesColumn": "messages"}}
    (tmp_path / "finetune.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match=f"^text 2 {told}"):
        inference.predict(str(tmp_path), ["good", wrong], file=None, text_column=None, as_json=True, s3_root=None)


@pytest.mark.parametrize("card", ["[]", "{", '{"labels": []}'])
def test_a_broken_model_card_is_told(tmp_path: Path, card: str) -> None:
    (tmp_path / "finetune.json").write_text(card)
    with pytest.raises(UserError, match=r"finetune\.json") as error:
        inference.predict(str(tmp_path), ["x"], file=None, text_column=None, as_json=True, s3_root=None)
    assert error.value.exit_code == 12


def test_labels_are_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    show.table("counts [x]", ("[bold]label", "n"), [("[red]bad[/red]", "1")], words=("[bold]label",))
    printed = capsys.readouterr().out
    for text in ("counts [x]", "[bold]label", "[red]bad[/red]"):
        assert text in printed
