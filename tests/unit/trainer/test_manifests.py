"""Manifests that are damaged, forged or of somebody else: none is used, and none leads out of its folder."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_kit import Place, garble, restored_step, rewritten, truncate

from finetune_trainer.checkpoint import MANIFEST
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.manifests import sealed


@pytest.mark.parametrize("damage", [truncate, garble, Path.unlink], ids=["truncated", "garbled", "missing"])
def test_without_a_whole_manifest_a_step_does_not_exist(place: Place, damage: Callable[[Path], None]) -> None:
    place.save(place.execution(), 10, 20)
    damage(place.folder / "store/step-00000020-0001" / MANIFEST)
    reader = place.execution(None)
    assert restored_step(reader) == 10
    assert [r.checkpoint for r in reader.refused] == ([] if damage is Path.unlink else ["step-00000020-0001"])


def test_manifests_that_cannot_be_read_are_not_trained_over(place: Place) -> None:
    """A single one may be a first save that was cut off; with more of them there was a training."""
    place.save(place.execution(), 10, 20)
    garble(place.folder / "store/step-00000010-0001" / MANIFEST)
    garble(place.folder / "store/step-00000020-0001" / MANIFEST)
    with pytest.raises(TrainingFailure, match="2 checkpoints and none of them can be read") as failed:
        place.execution(None).restore()
    assert failed.value.failure.reason == "CheckpointCorrupt"
    shutil.rmtree(place.folder / "store/step-00000020-0001")
    reader = place.execution(None)
    assert reader.restore() is None
    assert [r.checkpoint for r in reader.refused] == ["step-00000010-0001"]


def test_every_byte_of_a_manifest_counts(place: Place) -> None:
    place.save(place.execution(), 10)
    file = place.folder / "store/step-00000010-0001" / MANIFEST
    whole, reader = file.read_bytes(), place.execution(None)
    assert len(reader.committed()) == 1
    for position, bit in itertools.product(range(len(whole)), (0, 5)):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1 :])
        assert reader.committed() == [], (position, bit)


def test_a_folder_that_leads_out_of_the_store_is_none(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket may hold keys with `..`; the folder was made, and its files fetched, where the key leads."""
    place.save(place.execution(), 10, 20)
    hostile = "step-00000030-0001/../../../outside"
    newest = json.loads(place.store.get("step-00000020-0001/MANIFEST.json"))
    keys, get = [*place.store.list(), f"{hostile}/MANIFEST.json"], place.store.get
    forged = json.dumps(sealed({**newest, "step": 30})).encode()
    monkeypatch.setattr(place.store, "list", lambda prefix="": [key for key in keys if key.startswith(prefix)])
    monkeypatch.setattr(place.store, "get", lambda key: forged if key.startswith(hostile) else get(key))
    assert restored_step(place.execution(None)) == 20


HOSTILE: list[Callable[[dict[str, Any]], object]] = [
    lambda manifest: manifest["files"][0].update(size=float("inf")),
    lambda manifest: manifest["files"][0].update(size=-1),
    lambda manifest: manifest["files"][0].update(path=5),
    lambda manifest: manifest["files"][0].update(path=None),
    lambda manifest: manifest.update(best=[]),
    lambda manifest: manifest.update(best="../outside"),
    lambda manifest: manifest.update(step=21),
    lambda manifest: manifest.update(execution=2),
    lambda manifest: manifest.update(step=10**30),
    lambda manifest: manifest.update(files={}),
    lambda manifest: manifest.update(time="2026-01-01T00:00:00"),
    lambda manifest: manifest.pop("recipe"),
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_a_manifest_that_is_sealed_and_makes_no_sense_is_refused(place: Place, number: int) -> None:
    place.save(place.execution(), 10, 20)
    rewritten(place.folder / "store/step-00000020-0001", HOSTILE[number])
    assert restored_step(place.execution(None)) == 10


@pytest.mark.parametrize("text", ["[" * 100_000, '{"parent": 1e999}', '{"parent": null}', "7"])
def test_rubbish_beside_the_checkpoints_ends_nothing(place: Place, text: str) -> None:
    place.save(place.execution(), 10, 20)
    (place.folder / "store/step-00000020-0001" / MANIFEST).write_text(text)
    (place.folder / "store/executions/0002.json").write_text(text)
    (place.folder / "store/micro-batch.json").write_text(text.replace("parent", "rows"))
    reader = place.execution(None)
    assert restored_step(reader) == 10
    assert reader.micro_batch() is None


@pytest.mark.parametrize("path", ["../../outside", "model/../../../outside"])
def test_a_manifest_cannot_name_files_outside_its_folder(place: Place, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """A bucket may hold keys with `..`: the file is there, with the size and the sha256 that the manifest says."""
    place.save(place.execution(), 10, 20)
    name, entries, download = "step-00000020-0001", place.store.entries, place.store.download
    true = json.loads(place.store.get(f"{name}/{MANIFEST}"))["files"][0]["path"]
    rewritten(place.store.root / name, lambda manifest: manifest["files"][0].update(path=path))
    hostile, honest = f"{name}/{path}", f"{name}/{true}"
    monkeypatch.setattr(
        place.store, "entries", lambda prefix="": (e := entries(prefix)) | ({hostile: e[honest]} if honest in e else {})
    )
    monkeypatch.setattr(place.store, "download", lambda key, to: download(honest if key == hostile else key, to))
    assert restored_step(place.execution(None)) == 10


def test_absurd_sizes_are_refused_before_anything_is_fetched(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.save(place.execution(), 10, 20)
    rewritten(place.store.root / "step-00000020-0001", lambda manifest: manifest["files"][0].update(size=10**18))
    fetched: list[str] = []
    download = place.store.download
    monkeypatch.setattr(place.store, "download", lambda key, path: (fetched.append(key), download(key, path)))
    assert restored_step(place.execution(None)) == 10
    assert not any("step-00000020" in key for key in fetched)
