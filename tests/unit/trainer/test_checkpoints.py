"""Checkpoints over a folder: half of one never counts, a bad one is passed over, and a replaced execution cannot interfere."""

import hashlib
import itertools
import json
import os
import pickle
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_kit import Place, flip, restored_step, rewritten, stage, truncate
from safetensors.numpy import save_file
from trainer_kit import Job, Killed, ScriptedConsole

from finetune_trainer import checkpoint
from finetune_trainer.checkpoint import MANIFEST, Checkpoints
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.lineage import Lineage
from finetune_trainer.run import Run
from finetune_trainer.store import FolderStore


def test_the_newest_is_restored_with_its_content(place: Place) -> None:
    place.save(place.execution(), 10, 20)
    assert place.done == [10, 20]
    checkpoint, folder = place.execution(None).restore() or pytest.fail("nothing restored")
    assert (folder / "model/model.safetensors").read_bytes() == bytes(range(256)) * 8
    assert json.loads((folder / "trainer/state.json").read_text()) == {"step": 20}
    status = checkpoint.status(place.store)
    assert status.uri == f"{place.store.uri}/step-00000020-0001"
    assert status.size_bytes == 2048 + len('{"step": 20}')


def test_nothing_there_is_a_fresh_start(place: Place) -> None:
    assert place.execution(None).restore() is None


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink], ids=["truncated", "one-bit-flipped", "missing"])
@pytest.mark.parametrize("file", ["model/model.safetensors", "trainer/state.json"])
def test_a_damaged_file_makes_readers_fall_back(place: Place, damage: Callable[[Path], None], file: str) -> None:
    place.save(place.execution(), 10, 20)
    damage(place.folder / "store/step-00000020-0001" / file)
    assert restored_step(place.execution(None)) == 10
    assert any("step-00000020-0001 is not used" in line and file in line for line in place.log)


def test_a_checkpoint_whose_best_model_is_damaged_is_passed_over(place: Place) -> None:
    first = place.execution()
    for step, best in ((10, 10), (20, 20), (30, 20)):
        first.best = first.name(best)
        place.save(first, step)
    flip(place.folder / "store/step-00000020-0001/model/model.safetensors")
    assert restored_step(place.execution(None)) == 10
    assert any("step-00000030-0001 is not used: step-00000020-0001, its best model" in line for line in place.log)


def test_the_best_model_of_an_older_checkpoint_that_is_kept_is_kept_too(place: Place) -> None:
    """Whoever falls back to it goes on to its end with it."""
    first = place.execution(keep=2)
    for step, best in ((10, 10), (20, 10), (30, 30)):
        first.best = first.name(best)
        place.save(first, step)
    flip(place.folder / "store/step-00000030-0001/model/model.safetensors")
    assert restored_step(place.execution(None)) == 20


def test_none_that_can_be_read_is_told_and_not_trained_over(place: Place) -> None:
    place.save(place.execution(), 10, 20)
    for folder in place.folders():
        flip(place.folder / "store" / folder / "model/model.safetensors")
    with pytest.raises(TrainingFailure, match="2 checkpoints and none of them can be read") as failed:
        place.execution(None).restore()
    assert failed.value.failure.reason == "CheckpointCorrupt"


def test_the_manifest_is_written_after_everything_it_names(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = place.execution()
    written: list[str] = []
    upload, commit = place.store.upload, place.store.put_if_absent

    def uploading(path: Path, key: str) -> None:
        upload(path, key)
        written.append(key)

    def committing(key: str, data: bytes) -> bool:
        named = {f"step-00000010-0001/{f['path']}" for f in json.loads(data)["files"]}
        assert named == set(written)
        return commit(key, data)

    monkeypatch.setattr(place.store, "upload", uploading)
    monkeypatch.setattr(place.store, "put_if_absent", committing)
    place.save(checkpoints, 10)
    assert place.folders() == ["step-00000010-0001"]


def test_a_death_in_any_upload_leaves_the_older_checkpoint(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.save(place.execution(), 10)
    upload = place.store.upload
    for survivors in range(2):
        second, left = place.execution(10), [survivors]

        def dying(path: Path, key: str, left: list[int] = left) -> None:
            if not left[0]:
                raise TrainingFailure("StorageUnavailable", "gone")
            left[0] -= 1
            upload(path, key)

        monkeypatch.setattr(place.store, "upload", dying)
        with pytest.raises(TrainingFailure, match="gone"):
            place.save(second, 20)
        monkeypatch.setattr(place.store, "upload", upload)
        assert restored_step(place.execution(None)) == 10
    assert place.done == [10]


def test_a_failed_save_is_told_by_the_next_one(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = place.execution()

    def full(path: Path, key: str) -> None:
        raise TrainingFailure("StorageUnavailable", "no space left")

    monkeypatch.setattr(place.store, "upload", full)
    checkpoints.save(10, lambda: lambda folder: stage(folder, 10), place._done)
    with pytest.raises(TrainingFailure, match="no space left"):
        checkpoints.save(20, lambda: lambda folder: stage(folder, 20), place._done)


def test_files_go_up_at_the_same_time(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    upload, together = place.store.upload, threading.Barrier(2, timeout=10)

    def meeting(path: Path, key: str) -> None:
        together.wait()
        upload(path, key)

    checkpoints = place.execution()
    monkeypatch.setattr(place.store, "upload", meeting)
    place.save(checkpoints, 10)
    assert restored_step(place.execution(None)) == 10


def test_a_training_that_fails_lets_its_save_come_through(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = FolderStore.upload

    def slow(store: FolderStore, path: Path, key: str) -> None:
        time.sleep(0.1)
        upload(store, path, key)

    def fail() -> None:
        raise RuntimeError("anything")

    monkeypatch.setattr(FolderStore, "upload", slow)
    recipe = job.recipe(checkpoint={"everySteps": 2})
    with pytest.raises(RuntimeError, match="anything"):
        Run(recipe, job.runtime(), threading.Event(), console=ScriptedConsole({3: fail}))()
    assert job.steps() == [2]


def test_asked_to_end_it_waits_for_its_save_as_long_as_there_is_time(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = FolderStore.upload

    def slow(store: FolderStore, path: Path, key: str) -> None:
        if "model.safetensors" in key:
            time.sleep(5)
        upload(store, path, key)

    monkeypatch.setattr(FolderStore, "upload", slow)
    with pytest.raises(TrainingFailure, match=r"did not arrive within 4 s \(checkpoint\.saveDeadlineSeconds\)") as failed:
        job.run(stop_at=3, checkpoint={"saveDeadlineSeconds": 5})
    assert failed.value.failure.reason == "StorageUnavailable"


def test_keep_last_keeps_the_newest_and_the_best(place: Place) -> None:
    checkpoints = place.execution(keep=2)
    checkpoints.best = checkpoints.name(10)
    place.save(checkpoints, 10, 20, 30, 40)
    assert place.folders() == ["step-00000010-0001", "step-00000030-0001", "step-00000040-0001"]
    assert not (place.folder / "store/step-00000020-0001/model/model.safetensors").exists()


def test_hints_name_the_newest_and_the_best(place: Place) -> None:
    checkpoints = place.execution()
    checkpoints.best = checkpoints.name(10)
    place.save(checkpoints, 10, 20)
    hints = [json.loads(place.store.get(name))["checkpoint"] for name in ("LATEST.json", "BEST.json")]
    assert hints == ["step-00000020-0001", "step-00000010-0001"]
    place.store.put("LATEST.json", b"rubbish")
    assert restored_step(place.execution(None)) == 20, "they are for people"


def test_what_did_not_change_is_sent_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "WORTH_A_COPY", 1)
    sent: list[str] = []
    upload, copy = place.store.upload, place.store.copy
    monkeypatch.setattr(place.store, "upload", lambda path, key: (sent.append(key), upload(path, key)))
    monkeypatch.setattr(place.store, "copy", lambda source, key: FolderStore(place.store.root).copy(source, key))
    first = place.execution()
    place.save(first, 10, 20)
    model, state = "model/model.safetensors", "trainer/state.json"
    assert sorted(sent) == [f"{first.name(10)}/{model}", f"{first.name(10)}/{state}", f"{first.name(20)}/{state}"]
    assert first.saving.uploaded_bytes == 2048 + 2 * len('{"step": 10}')
    # An execution that goes on knows it as well; and what somebody has deleted is sent again.
    second = place.execution(None)
    assert second.restore()
    second.begin(20)
    sent.clear()
    place.save(second, 30)
    assert f"{second.name(30)}/{model}" not in sent
    monkeypatch.setattr(place.store, "copy", copy)
    (place.store.root / second.name(30) / model).unlink()
    sent.clear()
    place.save(second, 40)
    assert f"{second.name(40)}/{model}" in sent
    assert restored_step(place.execution(None)) == 40


def test_what_arrived_short_is_not_committed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = place.execution()
    upload = place.store.upload

    def short(path: Path, key: str) -> None:
        upload(path, key)
        truncate(place.store.root / key)

    monkeypatch.setattr(place.store, "upload", short)
    with pytest.raises(TrainingFailure, match=r"model\.safetensors arrived with 2047 of 2048 bytes"):
        place.save(checkpoints, 10)
    assert place.folders() == []


def test_saves_are_counted(place: Place) -> None:
    checkpoints = place.execution()
    place.save(checkpoints, 10, 20)
    saving = checkpoints.saving
    assert (saving.saves, saving.skipped, saving.uploaded_bytes) == (2, 0, 2 * (2048 + len('{"step": 10}')))
    assert saving.blocking_seconds > 0
    assert saving.upload_seconds > 0


def test_checkpoints_that_were_refused_are_told(place: Place) -> None:
    place.save(place.execution(), 10, 20, 30)
    flip(place.store.root / "step-00000030-0001/trainer/state.json")
    (place.store.root / "step-00000020-0001/model/model.safetensors").unlink()
    reader = place.execution(None)
    assert restored_step(reader) == 10
    assert [(r.checkpoint, r.message) for r in reader.refused] == [
        ("step-00000030-0001", "trainer/state.json differs from its manifest"),
        ("step-00000020-0001", "model/model.safetensors is missing"),
    ]


def test_a_run_tells_which_checkpoints_it_refused(job: Job) -> None:
    with pytest.raises(Killed):
        job.run(kill_at=15)
    newest = job.newest()
    flip(newest / "trainer/optimizer.safetensors")
    end = job.run()
    assert [(r.checkpoint, r.message) for r in end.corrupt] == [
        (newest.name, "trainer/optimizer.safetensors differs from its manifest")
    ]
    assert end.resumed_from is not None
    assert end.resumed_from.step == 6 < int(newest.name.split("-")[1])
    assert end.saving is not None
    assert end.saving.saves > 0


def empty(path: Path) -> None:
    path.write_bytes(b"")


def test_damage_to_any_file_is_found_before_it_is_used(job: Job, tmp_path: Path) -> None:
    """Of a real checkpoint, one file and one kind of damage after the other."""
    with pytest.raises(Killed):
        job.run(kill_at=15, checkpoint={"everySteps": 7})
    older, newest = sorted(p.parent for p in job.checkpoints.glob("step-*/MANIFEST.json"))[-2:]
    files = sorted(p.relative_to(newest) for p in newest.rglob("*") if p.is_file())
    assert len(files) >= 8
    for number, (file, damage) in enumerate(itertools.product(files, (flip, truncate, empty, Path.unlink))):
        place = tmp_path / str(number)
        shutil.copytree(job.checkpoints, place)
        damage(place / newest.name / file)
        lineage = Lineage.of(job.recipe(), 44)
        reader = Checkpoints(FolderStore(place), tmp_path / "scratch", lineage, keep_last=1, overwrite=False, log=lambda _: None)
        restored = reader.restore()
        assert restored is not None
        assert restored[0].name == older.name, (file, damage)


def test_a_pickle_in_a_checkpoint_is_not_run(job: Job) -> None:
    with pytest.raises(Killed):
        job.run(kill_at=9)
    trap, folder = job.home / "sprung", job.newest()

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (trap,)

    for path in (folder / "model").glob("*.safetensors"):
        path.unlink()
    (folder / "model/pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))

    def name_it(manifest: dict[str, Any]) -> None:
        data = (folder / "model/pytorch_model.bin").read_bytes()
        entry = {"path": "model/pytorch_model.bin", "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest["files"] = [f for f in manifest["files"] if not f["path"].endswith("model.safetensors")] + [entry]

    rewritten(folder, name_it)
    with pytest.raises(TrainingFailure) as failed:
        job.run()
    assert failed.value.failure.reason == "ModelNotFound"
    assert not trap.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk can be mounted by root only")
def test_a_full_disk_is_told_and_the_older_checkpoint_stays(place: Place, tmp_path: Path) -> None:
    place.save(place.execution(), 10)
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], check=True)
    try:
        second = place.execution(10)
        second.scratch = small
        big = {"weights": np.zeros(100_000, dtype=np.uint8)}
        for write in (lambda f: (f / "big").write_bytes(bytes(100_000)), lambda f: save_file(big, f / "big.safetensors")):

            def stage(folder: Path, write: Callable[[Path], object] = write) -> None:
                folder.mkdir(parents=True)
                write(folder)

            second.save(20, lambda stage=stage: stage, place._done)
            with pytest.raises(TrainingFailure, match=r"the disk of .* is full.*podTemplate") as failed:
                second.wait()
            assert failed.value.failure.reason == "StorageUnavailable"
    finally:
        subprocess.run(["umount", small], check=True)
    assert restored_step(place.execution(None)) == 10


def test_deleting_takes_the_manifest_first(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    deleted: list[str] = []
    delete = place.store.delete
    monkeypatch.setattr(place.store, "delete", lambda key: (deleted.append(key), delete(key)))
    place.save(place.execution(keep=1), 10, 20)
    assert deleted[0] == f"step-00000010-0001/{MANIFEST}"
    assert len(deleted) == 3


# ------------------------------------------------------------------------------------------------------------ fencing --
def test_each_execution_has_its_own_number(place: Place) -> None:
    assert [place.execution(0).execution for _ in range(3)] == [1, 2, 3]


def test_what_a_replaced_execution_goes_on_writing_does_not_count(place: Place) -> None:
    first = place.execution()
    place.save(first, 10)
    second = place.execution(10)
    with pytest.raises(TrainingFailure, match="has taken over"):
        place.save(first, 20)  # only thought dead: it commits, and learns that it was replaced
    assert "step-00000020-0001" in place.folders()
    assert restored_step(place.execution(None)) == 10
    place.save(second, 20)
    checkpoint, _ = place.execution(None).restore() or pytest.fail("nothing restored")
    assert checkpoint.name == "step-00000020-0002"
    assert checkpoint.manifest["execution"] == 2


def test_steps_before_the_point_where_a_newer_execution_began_still_count(place: Place) -> None:
    place.save(place.execution(), 10, 20)
    place.execution(20)
    assert restored_step(place.execution(None)) == 20


def test_a_newer_execution_that_began_further_back_hides_the_rest(place: Place) -> None:
    place.save(place.execution(), 10, 20, 30)
    place.execution(10)  # fell back to 10: 20 and 30 are another history
    assert restored_step(place.execution(None)) == 10


# ------------------------------------------------------------------------------------------------------ other recipes --
def test_checkpoints_of_another_recipe_are_refused_or_with_overwrite_ignored(place: Place) -> None:
    place.save(place.execution(), 10)
    with pytest.raises(TrainingFailure, match=r"another recipe.*output\.storageUri.*output\.overwrite") as failed:
        place.execution(None, digest="e" * 64).restore()
    assert failed.value.failure.reason == "OutputExists"
    assert place.execution(None, digest="e" * 64, overwrite=True).restore() is None


def test_no_checkpoint_holds_a_pickle(job: Job) -> None:
    job.run()
    files = [p for p in job.checkpoints.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".json", ".safetensors"}
    assert job.steps() == [12, 18] or len(job.steps()) == 3, "keepLast 2, and the best one"


def test_who_begins_from_what_is_gone_leaves_the_newer_steps_alone(place: Place) -> None:
    """The older execution, only thought dead, goes on while the newer one tokenises: step 10 makes room for 20 and 30."""
    old, new = place.execution(keep=2), place.execution(None, keep=2)
    place.save(old, 10)
    found = new.restore()
    assert found is not None
    place.save(old, 20, 30)
    with pytest.raises(TrainingFailure, match="was deleted meanwhile") as failed:
        new.begin(10, (found[0].name, None))
    assert (failed.value.failure.reason, failed.value.failure.retriable) == ("Superseded", True)
    again = place.execution(None, keep=2)
    found = again.restore()
    assert found is not None
    assert found[0].step == 30
    again.begin(30, (found[0].name, found[0].manifest["best"]))
    assert again.execution == 2
