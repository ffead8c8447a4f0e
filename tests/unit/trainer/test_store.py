"""Where bytes live: what a folder promises, and what an S3 server may answer (tests/integration has a real one).

The faults come over the wire, from a server of this file, because a real server gives none of them on request.
"""

import errno
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.awsrequest import AWSResponse
from urllib3 import HTTPResponse
from wire import Wire, serve

from finetune_trainer.checkpoint import Checkpoints
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.fetch import FETCHED, fetch_files, fetch_folder
from finetune_trainer.lineage import Lineage
from finetune_trainer.partfile import PartFile
from finetune_trainer.s3 import S3Store
from finetune_trainer.store import FolderStore, open_store, sweep


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    with serve(monkeypatch) as running:
        yield running


def checkpoints(uri: str, scratch: Path) -> Checkpoints:
    return Checkpoints(open_store(uri), scratch, Lineage("d" * 64), keep_last=1, overwrite=False)


# ------------------------------------------------------------------------------------------------------------- folders --
def test_deleting_removes_empty_folders_below_the_root_only(tmp_path: Path) -> None:
    # It went on above: an output that was still empty took the folders of its team with it.
    store = FolderStore(tmp_path / "team/bucket/out")
    store.check(writable=True)
    store.delete("result.json")
    assert store.root.is_dir()
    store.put("a/b/c", b"")
    store.put("a/d", b"")
    store.delete("a/b/c")
    assert [p.name for p in (store.root / "a").iterdir()] == ["d"]
    store.delete("a/d")
    assert list(store.root.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_hard_links_does_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    # A mounted bucket or a share of Windows; it was told as a missing permission.
    def link(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    store = FolderStore(tmp_path)
    assert store.put_if_absent("a/key", b"first")
    assert not store.put_if_absent("a/key", b"second")
    assert store.get("a/key") == b"first"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["key"]
    won: list[int] = []

    def write(number: int) -> None:
        if store.put_if_absent("race", bytes([number])):
            won.append(number)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [store.get("race")] == [bytes(won)]
    fsync = os.fsync

    def broken(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == "half":
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(TrainingFailure, match="No space left"):
        store.put_if_absent("half", b"half")
    assert store.list() == ["a/key", "race"], "else nobody could ever write it"


def test_what_is_written_outlives_a_loss_of_power(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The name of a file is in its folder: until that is written too, the file may be gone after a crash of the machine.
    synced: list[str] = []
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    store = FolderStore(tmp_path / "new/store")
    (tmp_path / "file").write_bytes(b"x")
    uses = [
        lambda: store.put("step/deep/put", b"x"),
        lambda: store.put_if_absent("step/once", b"x"),
        lambda: store.upload(tmp_path / "file", "step/uploaded"),
    ]
    for use in uses:
        synced.clear()
        use()
        folder = tmp_path / ("new/store/step/deep" if use is uses[0] else "new/store/step")
        assert synced[-1] == str(folder)
        assert Path(synced[0]).suffix == ".part" or use is uses[0]
        if use is uses[0]:  # folders that are new are names in theirs
            assert {str(p) for p in (tmp_path, tmp_path / "new", store.root, store.root / "step")} <= set(synced)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """One MiB of room, of a file system of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_full_disk_is_told_and_loses_nothing(tiny_disk: Path, tmp_path: Path) -> None:
    store = FolderStore(tiny_disk)
    large = tmp_path / "large"
    large.write_bytes(os.urandom(2 << 20))
    store.put("key", b"as it was")
    uses: list[Callable[[], object]] = [
        lambda: store.put("key", large.read_bytes()),
        lambda: store.put_if_absent("new", large.read_bytes()),
        lambda: store.upload(large, "key"),
        lambda: FolderStore(tmp_path).download("large", tiny_disk / "key"),
    ]
    for use in uses:
        with pytest.raises(TrainingFailure, match=rf"no room on the disk of {tiny_disk}/") as failed:
            use()
        assert failed.value.failure.reason == "StorageUnavailable"
        assert left(tiny_disk) == ["key"]
        assert store.get("key") == b"as it was"


def test_a_full_disk_under_a_download(wire: Wire, tiny_disk: Path) -> None:
    wire.objects |= {"large": os.urandom(2 << 20), "key": b"small"}
    store = open_store("s3://bucket")
    store.download("key", tiny_disk / "key")
    with pytest.raises(TrainingFailure, match=rf"s3://bucket: no room on the disk of {tiny_disk}/"):
        store.download("large", tiny_disk / "key")
    assert left(tiny_disk) == ["key"], "what is half there would take the room from others"
    assert (tiny_disk / "key").read_bytes() == b"small"


def test_a_folder_s_file_is_there_with_all_of_it_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FolderStore(tmp_path / "store")
    store.put("key", b"new")
    (tmp_path / "key").write_bytes(b"old")

    def half(source: Path, target: Path) -> None:
        target.write_bytes(b"n")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", half)
        with pytest.raises(TrainingFailure, match=f"no room on the disk of {tmp_path}/key"):
            store.download("key", tmp_path / "key")
    assert (tmp_path / "key").read_bytes() == b"old"
    assert not (tmp_path / "key.part").exists()
    store.download("key", tmp_path / "key")
    assert (tmp_path / "key").read_bytes() == b"new"


# --------------------------------------------------------------------------------------------------------------- fetching --
def test_too_little_room_is_told_before_the_first_byte(wire: Wire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wire.objects |= {"m/weights": bytes(3 << 20), "m/config.json": b"{}"}
    folder, store = tmp_path / "model", open_store("s3://bucket/m")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 1 << 40, 2 << 20))
    with pytest.raises(TrainingFailure) as failed:
        fetch_folder(store, folder)
    assert failed.value.failure.reason == "StorageUnavailable"
    assert failed.value.message == (
        f"model: s3://bucket/m needs 3.0 MiB more in {folder}, where 2.0 MiB are free: give the trainer a larger volume"
    )
    assert left(folder) == []
    assert not any("weights" in asked for asked in wire.asked)
    # What is there already, in part, needs no room again.
    monkeypatch.setattr(PartFile, "commit", lambda self: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40))
        with pytest.raises(TrainingFailure, match="broken"):
            fetch_files(store, {"weights": store.stat("weights")}, folder, "model")
    with pytest.raises(TrainingFailure, match="broken"):
        fetch_files(store, {"weights": store.stat("weights")}, folder, "model")


def test_progress_is_told_now_and_then(wire: Wire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wire.objects |= {"m/a": bytes(2 << 20), "m/b": bytes(5 << 19)}
    lines: list[str] = []
    fetch_folder(open_store("s3://bucket/m"), tmp_path / "quick", log=lines.append)
    assert lines == [], "nothing to say of a moment"
    monkeypatch.setattr("finetune_trainer.fetch.EVERY", 0.0)
    fetch_folder(open_store("s3://bucket/m"), tmp_path / "slow", "data", lines.append)
    assert lines[-1] == "data: 4.5 MiB of 4.5 MiB"
    assert "data: 1.0 MiB of 4.5 MiB" in lines


def test_a_file_of_a_folder_is_copied_once(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "data")
    store.put("train.csv", b"old")
    copied: list[str] = []

    def fetch(folder: Path = tmp_path / "data") -> bytes:
        place = FolderStore(folder)
        fetch_files(place, {"train.csv": place.stat("train.csv")}, tmp_path / "work", "data", copied.append)
        return (tmp_path / "work/train.csv").read_bytes()

    assert fetch() == b"old"
    (tmp_path / "work/train.csv").write_bytes(b"OLD")  # of the same size: it would be copied over
    assert fetch() == b"OLD"
    times = (store.root / "train.csv").stat()
    (store.root / "train.csv").write_bytes(b"new")
    os.utime(store.root / "train.csv", ns=(times.st_atime_ns, times.st_mtime_ns))  # as copies that keep the time
    assert fetch() == b"new"
    (tmp_path / "work" / FETCHED).write_text("half a fi")
    assert fetch() == b"new"
    shutil.copytree(store.root, tmp_path / "other")
    (tmp_path / "other/train.csv").write_bytes(b"two")
    assert fetch(tmp_path / "other") == b"two"


def test_what_was_written_before_the_machine_stopped_is_fetched_again(
    wire: Wire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire.objects["m/a"] = b"content"
    store = open_store("s3://bucket/m")

    def fetch() -> int:
        before = wire.asked.count("GET m/a")
        fetch_files(store, {"a": store.stat("a")}, tmp_path, "model")
        return wire.asked.count("GET m/a") - before

    assert [fetch(), fetch()] == [1, 0]
    monkeypatch.setattr("finetune_trainer.fetch.boot", lambda: "another")
    assert [fetch(), fetch()] == [1, 0]


# ------------------------------------------------------------------------------------------------------------------ s3 --
def test_what_consoles_leave_for_a_folder_is_no_file(wire: Wire, tmp_path: Path) -> None:
    # "'' is no name of a file", or a file where a folder was to be.
    wire.objects |= {"models/": b"", "models/sub/": b"", "models/sub/x": b"1", "models/config.json": b"{}"}
    store = open_store("s3://bucket/models")
    assert store.list() == ["config.json", "sub/x"]
    assert fetch_folder(store, tmp_path / "model") == 2
    assert (tmp_path / "model/sub/x").read_bytes() == b"1"


def test_strangers_among_the_executions_are_passed_over(wire: Wire, tmp_path: Path) -> None:
    # int("") was told as UserCodeError, and the job restarted until it failed.
    wire.objects |= {f"out/executions/{name}": b"" for name in ("", "0001.json.bak", ".json", "notes.json")}
    wire.objects["out/executions/0006.json"] = (
        b'{"par'  # a death in the middle of it, where a store allows that: it has never begun
    )
    made = checkpoints("s3://bucket/out", tmp_path)
    assert made.restore() is None
    made.begin(0)
    assert made.execution == 7
    made.check_not_replaced()


CONFLICT = (409, "ConditionalRequestConflict")


def test_two_conditional_writes_at_once_are_tried_again(wire: Wire) -> None:
    # It looked for the object of the other writer, which was not there yet either; that was told as UserCodeError.
    wire.faults["PUT key"] = [CONFLICT, CONFLICT]
    assert open_store("s3://bucket").put_if_absent("key", b"mine")
    assert wire.objects["key"] == b"mine"
    wire.faults["PUT key"] = [CONFLICT]
    assert not open_store("s3://bucket").put_if_absent("key", b"late")


def test_what_is_deleted_while_it_is_looked_at_is_tried_again(wire: Wire) -> None:
    wire.faults["PUT key"] = [(412, "PreconditionFailed")]
    assert open_store("s3://bucket").put_if_absent("key", b"mine")


def test_conflicts_without_end_are_told(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_trainer.s3.CONFLICT_WAIT", 0.001)
    wire.faults["PUT key"] = [CONFLICT] * 100
    with pytest.raises(TrainingFailure, match="the storage answered ConditionalRequestConflict") as failed:
        open_store("s3://bucket").put_if_absent("key", b"mine")
    assert failed.value.failure.reason == "StorageUnavailable"
    assert len(wire.asked) < 10


def test_settings_that_cannot_be_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value, said in (
        ("AWS_S3_ADDRESSING_STYLE", "sideways", "AWS_S3_ADDRESSING_STYLE: 'sideways' is none of path, virtual, auto"),
        ("AWS_ENDPOINT_URL", "minio:9000", "Invalid endpoint: minio:9000"),
        ("AWS_CA_BUNDLE", "/none/ca.crt", "AWS_CA_BUNDLE: there is no file /none/ca.crt"),
        ("AWS_REQUEST_CHECKSUM_CALCULATION", "never", "request_checksum_calculation"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(boto3, "DEFAULT_SESSION", None)
            patch.setenv(name, value)
            with pytest.raises(TrainingFailure, match=said) as failed:
                open_store("s3://bucket/out")
            assert failed.value.failure.reason == "RecipeInvalid"


@pytest.mark.parametrize(
    ("variables", "url"),
    [
        ({}, "https://bucket.s3.eu-north-1.amazonaws.com/x"),
        ({"AWS_S3_ADDRESSING_STYLE": "path"}, "https://s3.eu-north-1.amazonaws.com/bucket/x"),
        ({"AWS_ENDPOINT_URL": "http://minio:9000"}, "http://minio:9000/bucket/x"),
        ({"AWS_ENDPOINT_URL": "http://other", "AWS_ENDPOINT_URL_S3": "http://minio:9000"}, "http://minio:9000/bucket/x"),
        ({"AWS_ENDPOINT_URL_S3": "http://s3.lan", "AWS_S3_ADDRESSING_STYLE": "virtual"}, "http://bucket.s3.lan/x"),
    ],
)
def test_where_the_bucket_is(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], url: str) -> None:
    for name, value in {
        "AWS_REGION": "eu-north-1",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
    }.items() | variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    store = open_store("s3://bucket/x")
    assert isinstance(store, S3Store)
    asked: list[str] = []

    def note(request: Any, **_: object) -> AWSResponse:
        asked.append(request.url)
        return AWSResponse(
            request.url, 200, {"Content-Length": "0", "ETag": '""'}, HTTPResponse(BytesIO(), preload_content=False)
        )

    store.client.meta.events.register("before-send.s3", note)
    store.client.head_object(Bucket="bucket", Key="x")
    assert asked == [url]


# ------------------------------------------------------------------------------------------------------------ tidying --
def stage(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "state").write_bytes(b"x")


def save(made: Checkpoints, *steps: int) -> None:
    for step in steps:
        made.save(step, lambda: stage, lambda _: None)
    made.wait()


@pytest.mark.parametrize("answer", [(501, "NotImplemented"), (400, "TryLater")])
def test_an_old_checkpoint_that_cannot_be_deleted_stops_no_training(wire: Wire, tmp_path: Path, answer: tuple[int, str]) -> None:
    # One answer of a busy server failed the training, with the newer checkpoint committed.
    lines: list[str] = []
    made = Checkpoints(open_store("s3://bucket/out"), tmp_path, Lineage("d" * 64), keep_last=1, overwrite=False, log=lines.append)
    made.begin(0)
    names = [made.name(step) for step in (1, 2, 3, 4)]
    wire.faults[f"DELETE out/{names[0]}/MANIFEST.json"] = [answer] * 2
    wire.faults[f"DELETE out/{names[1]}/state"] = [answer]
    save(made, 1, 2, 3)
    assert all(f"out/{name}/MANIFEST.json" in wire.objects for name in names[:3]), "the oldest cannot be deleted"
    said = [line for line in lines if "old checkpoints" in line and answer[1] in line]
    assert len(said) == 2, lines
    save(made, 4)
    assert f"out/{names[1]}/MANIFEST.json" not in wire.objects
    assert f"out/{names[1]}/state" in wire.objects
    save(made, 5)
    assert sorted(wire.objects) == [
        "out/LATEST.json",
        "out/executions/0001.json",
        *(f"out/{made.name(5)}/{n}" for n in ("MANIFEST.json", "state")),
    ]


def test_what_earlier_executions_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    root = tmp_path / "store"

    def execution(parent: int | None, **changes: object) -> Checkpoints:
        made = Checkpoints(
            FolderStore(root), tmp_path / "scratch", **{"lineage": Lineage("d" * 64), "keep_last": 9, "overwrite": True} | changes
        )  # type: ignore[arg-type]
        if parent is not None:
            made.begin(parent)
        return made

    def steps() -> set[str]:
        return {path.name for path in root.glob("step-*")}

    save(execution(0, lineage=Lineage("e" * 64)), 50)  # 0001, another recipe's
    first = execution(0)  # 0002
    save(first, 10, 20)
    first.best = first.name(20)
    save(first, 30, 40)
    (root / "step-00000060-0002").mkdir()
    (root / "step-00000060-0002/state").write_bytes(b"half")  # died in the upload
    (root / "step-00000099-0009").mkdir()
    (root / "step-00000099-0009/state").write_bytes(b"newer")  # on its way
    (root / "step-notes").mkdir()
    (root / "step-notes/mine.txt").write_bytes(b"a person's")
    parts = [root / f"step-00000010-0002/state.{'a' * 16}.part", root / f"step-00000020-0002/state.{'b' * 16}.part"]
    mine = root / "step-notes/film.part"
    for path in (*parts, mine):
        path.write_bytes(b"")
    for path in (parts[0], mine):
        os.utime(path, (0, 0))

    execution(30)  # 0003: 40 could not be read, or was not there yet
    assert steps() == {
        "step-00000050-0001",
        *(f"step-000000{step}-0002" for step in (10, 20, 30)),
        "step-00000099-0009",
        "step-notes",
    }
    assert [path.exists() for path in (*parts, mine)] == [False, True, True], "one that is a day old and ours"
    restored = execution(None).restore()
    assert restored is not None
    assert restored[0].name == "step-00000030-0002"


def test_uploads_that_nobody_finished_are_aborted(wire: Wire, tmp_path: Path) -> None:
    now = datetime.now(UTC).isoformat()
    wire.uploads |= {"out/step-1/old": "2020-01-01T00:00:00Z", "out/step-1/new": now, "else/step-1/old": "2020-01-01T00:00:00Z"}
    checkpoints("s3://bucket/out", tmp_path).begin(0)
    assert set(wire.uploads) == {"out/step-1/new", "else/step-1/old"}


@pytest.mark.parametrize("answer", [(403, "AccessDenied"), (501, "NotImplemented")])
def test_a_store_that_lists_no_uploads_is_told_and_trained_on(wire: Wire, tmp_path: Path, answer: tuple[int, str]) -> None:
    wire.faults["GET ?uploads"] = [answer] * 9
    lines: list[str] = []
    sweep(open_store("s3://bucket/out"), "model/", lines.append)
    assert [answer[1] in line for line in lines] == [True]
