"""A storage that refuses: wrong credentials are told at once, a refusal now and then costs a wait, and one without end is told as what it is.

The answers come over the wire, from a server of these tests (wire.py): no real one refuses on request.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from wire import Wire, serve

from finetune_trainer.checkpoint import Checkpoints
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.lineage import Lineage
from finetune_trainer.s3 import REFUSALS
from finetune_trainer.store import open_store

DENIED = (403, "AccessDenied")
CODES = [DENIED, (403, "InvalidAccessKeyId"), (401, "Unauthorized"), (403, "RequestTimeTooSkewed")]


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    monkeypatch.setattr("finetune_trainer.s3.MAX_WAIT", 0.01)
    with serve(monkeypatch) as running:
        yield running


@pytest.mark.parametrize("answer", CODES)
def test_a_refusal_of_what_was_allowed_before_passes(wire: Wire, tmp_path: Path, answer: tuple[int, str]) -> None:
    # One such answer of a busy server ended the job for good: StorageDenied is not tried again.
    store = open_store("s3://bucket")
    (tmp_path / "file").write_bytes(b"uploaded")
    uses = {
        "PUT a": lambda: store.put("a", b"a"),
        "PUT b": lambda: store.put_if_absent("b", b"b"),
        "PUT c": lambda: store.upload(tmp_path / "file", "c"),
        "GET a": lambda: store.get("a"),
        "HEAD a": lambda: store.stat("a"),
        "GET ": store.list,
        "DELETE c": lambda: store.delete("c"),
    }
    for use in uses.values():
        use()
    wire.objects.pop("b")
    for asked, use in uses.items():
        wire.faults[asked] = [answer] * 3 * REFUSALS
        use()
        assert wire.faults[asked] == []
    assert wire.objects == {"a": b"a", "b": b"b"}


def test_a_first_answer_that_refuses_is_doubted_where_it_does_not_say_that_the_credentials_are_wrong(wire: Wire) -> None:
    wire.faults["GET "] = [DENIED] * (REFUSALS - 1)
    open_store("s3://bucket").check()
    assert len(wire.asked) == REFUSALS


@pytest.mark.parametrize("code", ["SignatureDoesNotMatch", "InvalidAccessKeyId", "ExpiredToken"])
def test_wrong_credentials_are_told_at_once(wire: Wire, code: str) -> None:
    wire.faults["GET "] = [(403, code)] * 9
    with pytest.raises(TrainingFailure, match=rf"refused the credentials \({code}\)") as failed:
        open_store("s3://bucket", patience=600.0).check()
    assert failed.value.failure.reason == "StorageDenied"
    assert len(wire.asked) == 1


def test_credentials_that_are_revoked_end_it_as_denied_when_patience_is_over(wire: Wire) -> None:
    store = open_store("s3://bucket", patience=1.0)
    store.put("key", b"")
    wire.faults["PUT key"] = [(403, "InvalidAccessKeyId")] * 100_000
    began = time.monotonic()
    with pytest.raises(TrainingFailure, match=r"refused the credentials \(InvalidAccessKeyId\).*AWS_.*tried for 1 s") as failed:
        store.put("key", b"")
    assert 1 <= time.monotonic() - began < 5
    assert failed.value.failure.reason == "StorageDenied"


def test_what_an_account_may_never_do_is_told_soon(wire: Wire) -> None:
    store = open_store("s3://bucket", patience=600.0)
    store.check()
    wire.faults["DELETE key"] = [DENIED] * 100
    with pytest.raises(TrainingFailure, match="refused the credentials") as failed:
        store.delete("key")
    assert failed.value.failure.reason == "StorageDenied"
    assert wire.asked.count("DELETE key") == REFUSALS


def test_an_account_that_may_not_delete_trains_and_that_is_told_once(wire: Wire, tmp_path: Path) -> None:
    def stage(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "state").write_bytes(b"x")

    lines: list[str] = []
    made = Checkpoints(open_store("s3://bucket/out"), tmp_path, Lineage("d" * 64), keep_last=1, overwrite=False, log=lines.append)
    made.begin(0)
    names = [made.name(step) for step in (1, 2, 3)]
    wire.faults = {f"DELETE out/{name}/MANIFEST.json": [DENIED] * 100 for name in names}
    for step in (1, 2, 3):
        made.save(step, lambda: stage, lambda _: None)
    made.wait()
    assert all(f"out/{name}/MANIFEST.json" in wire.objects for name in names)
    assert ["old checkpoints" in line and DENIED[1] in line for line in lines] == [True]
