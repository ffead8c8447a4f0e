"""The trainer's storage when it fails: a real S3 server behind a proxy that breaks off, answers with errors, or is gone for a while."""

import hashlib
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

from finetune_trainer.checkpoint import Checkpoint, Checkpoints
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.fetch import FETCHED, fetch_folder
from finetune_trainer.lineage import Lineage
from finetune_trainer.partfile import RANGE
from finetune_trainer.s3 import PART, S3Store
from finetune_trainer.store import Missing, open_store
from support.faulty_s3 import Faulty
from testcluster import S3Server
from testcluster.pki import Authority

MiB = 1 << 20


@pytest.fixture(autouse=True)
def _in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what would go in one request."""
    monkeypatch.setattr("finetune_trainer.s3.AT_ONCE", PART)


@pytest.fixture
def store(faulty: Faulty, bucket: str) -> S3Store:
    opened = open_store(f"s3://{bucket}/out")
    assert isinstance(opened, S3Store)
    return opened


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Of three ranges, the last a short one."""
    path = tmp_path / "large"
    path.write_bytes(os.urandom(2 * RANGE + 5 * MiB + 7))
    return path


# -------------------------------------------------------------------------------------------------------------- faults --
def test_a_fifth_of_all_requests_fails_and_every_byte_is_right(
    faulty: Faulty, store: S3Store, tmp_path: Path, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_trainer.s3.MAX_WAIT", 1.0)  # the same tries in less time
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    faulty.share, faulty.dice, mine = 0.2, random.Random(seed), random.Random(seed + 1)
    truth: dict[str, bytes] = {}
    for number in range(300):
        if number % 10 == 0:
            store.check()
        key = f"a/{mine.randrange(40)}"
        match mine.choice(["put", "once", "get", "upload", "download", "delete", "list"]):
            case "put":
                truth[key] = mine.randbytes(mine.randrange(2000))
                store.put(key, truth[key])
            case "once":
                data = f"{number}".encode()
                assert store.put_if_absent(key, data) == (key not in truth)
                truth.setdefault(key, data)
            case "upload":
                truth[key] = mine.randbytes(mine.randrange(200_000))
                (tmp_path / "file").write_bytes(truth[key])
                store.upload(tmp_path / "file", key)
            case "delete":
                store.delete(key)
                truth.pop(key, None)
            case "list":
                assert store.list() == sorted(truth)
            case "get" if key in truth:
                assert store.get(key) == truth[key]
            case "download" if key in truth:
                store.download(key, tmp_path / "back")
                assert (tmp_path / "back").read_bytes() == truth[key]
            case _:
                with pytest.raises(Missing):
                    store.get(key)
    for number in range(3):
        store.upload(large, f"large-{number}")
        store.download(f"large-{number}", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == large.read_bytes()
    print(f"{len(faulty.faults)} of {len(faulty.asked)} requests failed")
    assert len(faulty.faults) > 50


def test_a_checkpoint_outlives_a_storage_that_is_gone(
    faulty: Faulty, bucket: str, tmp_path: Path, large: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = Checkpoints(open_store(f"s3://{bucket}/out"), tmp_path, Lineage("d" * 64), keep_last=1, overwrite=False)
    made.begin(0)
    done: list[Checkpoint] = []

    def stage(folder: Path) -> None:
        folder.mkdir(parents=True)
        large.rename(folder / "weights")

    digest = hashlib.sha256(large.read_bytes()).hexdigest()
    faulty.gone(9)
    began = time.monotonic()
    made.save(1, lambda: stage, done.append)
    made.wait()
    assert 9 <= time.monotonic() - began < 30
    assert [f["sha256"] for f in done[0].manifest["files"]] == [digest]
    assert caplog.text.count("trying again for") in (1, 2), "that it waits is told, and not by each part"


def test_a_wrong_endpoint_is_told_in_seconds_and_a_refusal_at_once(
    faulty: Faulty, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(f"s3://{bucket}/out", patience=600.0)
    faulty.gone(3600)
    began = time.monotonic()
    with pytest.raises(TrainingFailure, match=r"does not answer .*AWS_ENDPOINT_URL.*tried for 10 s"):
        store.check()
    assert time.monotonic() - began < 15
    faulty.gone(0)
    for use in (lambda: store.get("nothing"), lambda: store.stat("nothing")):
        faulty.asked.clear()
        with pytest.raises(Missing):
            use()
        assert len(faulty.asked) == 1
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    denied = open_store(f"s3://{bucket}/out", patience=600.0)
    faulty.asked.clear()
    with pytest.raises(TrainingFailure, match="refused the credentials"):
        denied.put("key", b"")
    assert len(faulty.asked) == 1


def test_patience_ends(faulty: Faulty, bucket: str) -> None:
    store = open_store(f"s3://{bucket}/out", patience=1.0)
    faulty.gone(3600)
    began = time.monotonic()
    with pytest.raises(TrainingFailure, match="tried for 1 s") as failed:
        store.put("key", b"")
    assert failed.value.failure.reason == "StorageUnavailable"
    assert 1 <= time.monotonic() - began < 5


# ----------------------------------------------------------------------------------------------------------- downloads --
def test_a_download_that_is_cut_goes_on_from_there(faulty: Faulty, store: S3Store, large: Path, tmp_path: Path) -> None:
    store.upload(large, "large")
    faulty.cuts = [15 * MiB, 9 * MiB, 3 * MiB, 100, 0]
    told: list[int] = []
    store.download("large", tmp_path / "back", told.append)
    assert (tmp_path / "back").read_bytes() == large.read_bytes()
    size = large.stat().st_size
    assert faulty.sent < 1.2 * size, "what had arrived was not sent again"
    assert sum(told) == size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "large"]


def test_what_comes_on_slowly_needs_no_patience(faulty: Faulty, store: S3Store, large: Path, tmp_path: Path) -> None:
    store.upload(large, "large")
    store.patience = 0.0
    faulty.cuts = [2 * MiB] * 15
    store.download("large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == large.read_bytes()


def test_bytes_that_changed_on_their_way_are_fetched_again(faulty: Faulty, store: S3Store, tmp_path: Path) -> None:
    data = os.urandom(3 * MiB)
    store.put("key", data)
    faulty.flips = 2
    told: list[int] = []
    store.download("key", tmp_path / "back", told.append)
    assert (tmp_path / "back").read_bytes() == data
    assert sum(told) == len(data)
    faulty.flips = 2
    assert store.get("key") == data


def test_a_process_that_is_killed_leaves_what_had_arrived(
    faulty: Faulty, store: S3Store, bucket: str, large: Path, tmp_path: Path
) -> None:
    store.upload(large, "large")
    program = (
        "import sys, pathlib, finetune_trainer.s3 as s3; from finetune_trainer.store import open_store; s3.THREADS = 1;"
        "open_store(sys.argv[1]).download('large', pathlib.Path(sys.argv[2]))"
    )
    stop = threading.Event()
    faulty.before[3] = lambda: (stop.set(), time.sleep(3600))  # two ranges are there
    process = subprocess.Popen([sys.executable, "-c", program, f"s3://{bucket}/out", str(tmp_path / "back")])
    assert stop.wait(60)
    process.kill()
    process.wait()
    assert not (tmp_path / "back").exists(), "never half a file under its name"
    faulty.sent = 0
    store.download("large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == large.read_bytes()
    assert faulty.sent == large.stat().st_size - 2 * RANGE


def test_what_is_left_of_another_object_is_not_used(
    faulty: Faulty, store: S3Store, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_trainer.s3.THREADS", 1)
    store.upload(large, "large")
    store.patience = 0.0
    faulty.before[2] = lambda: faulty.gone(3600)  # one range is there
    with pytest.raises(TrainingFailure, match="does not answer"):
        store.download("large", tmp_path / "back")
    assert (tmp_path / "back.part").exists()
    faulty.gone(0)
    large.write_bytes(os.urandom(large.stat().st_size))
    store.upload(large, "large")
    store.download("large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == large.read_bytes()


@pytest.mark.parametrize("ignores_if_match", [False, True])
@pytest.mark.parametrize("size", [RANGE // 2, 2 * RANGE + 5 * MiB + 7])
def test_an_object_that_is_replaced_midway_is_not_mixed(
    faulty: Faulty, bucket: str, store: S3Store, s3: S3Server, tmp_path: Path, size: int, ignores_if_match: bool
) -> None:
    old, new = os.urandom(size), os.urandom(size)
    client = s3.client()
    client.put_object(Bucket=bucket, Key="out/large", Body=old)
    faulty.before[2] = lambda: client.put_object(Bucket=bucket, Key="out/large", Body=new)
    faulty.cuts = [100]
    get = store.client.get_object
    if ignores_if_match:  # as simple servers do
        store.client.get_object = lambda IfMatch, **arguments: get(**arguments)  # type: ignore[method-assign]  # noqa: N803
    told: list[int] = []
    store.download("large", tmp_path / "back", told.append)
    assert (tmp_path / "back").read_bytes() == new
    assert sum(told) == size


def test_a_folder_is_fetched_once(faulty: Faulty, store: S3Store, large: Path, tmp_path: Path) -> None:
    contents = {"config.json": b"{}", "empty": b"", "sub/weights": large.read_bytes()}
    store.upload(large, "sub/weights")
    for key in ("config.json", "empty"):
        store.put(key, contents[key])

    def fetch() -> list[str]:
        faulty.asked.clear()
        assert fetch_folder(store, tmp_path / "model") == len(contents)
        there = {p.relative_to(tmp_path / "model").as_posix(): p for p in (tmp_path / "model").rglob("*") if p.is_file()}
        assert there.pop(FETCHED)
        assert {key: path.read_bytes() for key, path in there.items()} == contents
        return sorted({asked.partition("?")[0].partition("/out/")[2] for asked in faulty.asked} - {""})

    assert fetch() == ["config.json", "empty", "sub/weights"]
    assert fetch() == []
    contents["config.json"] = b"[]"  # the same size
    store.put("config.json", b"[]")
    (tmp_path / "model/sub/weights").write_bytes(b"short")
    assert fetch() == ["config.json", "sub/weights"]
    store.delete("sub/weights")
    store.put("sub", b"a file now")
    del contents["sub/weights"]
    contents["sub"] = b"a file now"
    assert fetch() == ["sub"]


def test_a_listing_of_several_pages_outlives_a_fault_on_each(faulty: Faulty, store: S3Store) -> None:
    for number in range(7):
        store.put(f"{number} &ü", bytes(number))
    page, pages = store.client.list_objects_v2, []

    def two(**arguments: Any) -> Any:
        if len(pages) == 2:
            faulty.gone(2)  # longer than one request is tried
        pages.append(arguments.get("ContinuationToken"))
        return page(**arguments, MaxKeys=2)

    store.client.list_objects_v2 = two  # type: ignore[method-assign]
    assert {key: stored.size for key, stored in store.entries().items()} == {f"{n} &ü": n for n in range(7)}
    assert pages.count(None) == 1, "it never began anew"


# ------------------------------------------------------------------------------------------------------------- uploads --
def test_parts_that_fail_are_sent_again_and_the_others_are_not(
    faulty: Faulty, store: S3Store, large: Path, tmp_path: Path
) -> None:
    part, tried = store.client.upload_part, []

    def send(**arguments: Any) -> Any:
        tried.append(arguments["PartNumber"])
        if len(tried) == 2:
            faulty.gone(2)  # longer than one request is tried
        return part(**arguments)

    store.client.upload_part = send  # type: ignore[method-assign]
    store.upload(large, "large")
    assert store.get("large") == large.read_bytes()
    used = {a.partition("uploadId=")[2].partition("&")[0] for a in faulty.asked if "partNumber" in a}
    assert len(used) == 1, "one upload from its first part to its last"


def test_an_upload_whose_last_answer_is_lost_is_there(faulty: Faulty, store: S3Store, large: Path) -> None:
    complete = store.client.complete_multipart_upload

    def twice(**arguments: Any) -> Any:
        complete(**arguments)
        gone = {"Error": {"Code": "NoSuchUpload"}, "ResponseMetadata": {"HTTPStatusCode": 404}}
        raise ClientError(gone, "CompleteMultipartUpload")  # what the retried request gets

    store.client.complete_multipart_upload = twice  # type: ignore[method-assign]
    store.upload(large, "large")
    assert store.stat("large").size == large.stat().st_size
    assert sum("partNumber" in asked for asked in faulty.asked) == -(-large.stat().st_size // PART), "it was not sent again"


def test_an_upload_that_fails_leaves_no_parts(faulty: Faulty, store: S3Store, bucket: str, s3: S3Server, large: Path) -> None:
    store.patience = 0.0

    def broken(**_: Any) -> Any:
        faulty.gone(3600)
        raise TrainingFailure("StorageUnavailable", "broken")

    store.client.upload_part = broken  # type: ignore[method-assign]
    with pytest.raises(TrainingFailure, match="broken"):
        store.upload(large, "large")
    faulty.gone(0)
    store.client.upload_part = lambda **_: (_ for _ in ()).throw(TrainingFailure("StorageUnavailable", "broken"))  # type: ignore[method-assign]
    with pytest.raises(TrainingFailure, match="broken"):
        store.upload(large, "large")
    left = s3.client().list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    assert len(left) == 1, "of the first, while it was gone"


def test_when_required_means_no_checksum_at_all(
    faulty: Faulty, bucket: str, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty.refuses_checksums = True
    with pytest.raises(TrainingFailure, match="InvalidArgument"):
        open_store(f"s3://{bucket}/out").put("key", b"1")
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    store = open_store(f"s3://{bucket}/out")
    store.put("key", b"1")
    assert store.put_if_absent("once", b"1")
    store.upload(large, "large")
    small = tmp_path / "small"
    small.write_bytes(b"small")
    store.upload(small, "small")
    store.download("large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == large.read_bytes()
    assert store.get("small") == b"small"
    store.delete("small")
    store.discard_unfinished("")
    assert store.list() == ["key", "large", "once"]


def test_an_address_for_s3_alone_and_either_style(faulty: Faulty, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", faulty.endpoint)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    open_store(f"s3://{bucket}/out").check()
    assert all(asked.startswith(f"GET /{bucket}?") for asked in faulty.asked)
    monkeypatch.setenv("AWS_S3_ADDRESSING_STYLE", "virtual")
    store = open_store(f"s3://{bucket}/out")
    assert isinstance(store, S3Store)
    url = store.client.generate_presigned_url("get_object", {"Bucket": bucket, "Key": "x"})
    assert f"//{bucket}." in url or faulty.endpoint.startswith("http://127."), "an address has no names below it"
    monkeypatch.setenv("AWS_S3_ADDRESSING_STYLE", "sideways")
    with pytest.raises(TrainingFailure, match=r"AWS_S3_ADDRESSING_STYLE: 'sideways' is none of path, virtual, auto"):
        open_store(f"s3://{bucket}/out")


@pytest.mark.parametrize("checksums", ["when_supported", "when_required"])
def test_over_tls(tmp_path: Path, large: Path, monkeypatch: pytest.MonkeyPatch, checksums: str) -> None:
    authority = Authority(tmp_path / "ca")
    with S3Server(authority=authority) as server:
        server.create_bucket("bucket")
        monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        began = time.monotonic()
        with pytest.raises(TrainingFailure, match="certificate is not trusted: name the file of your CA in AWS_CA_BUNDLE"):
            open_store("s3://bucket/out").check()
        assert time.monotonic() - began < 5
        monkeypatch.setenv("AWS_CA_BUNDLE", str(authority.ca_file))
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", checksums)
        monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
        store = open_store("s3://bucket/out")
        store.check()
        store.upload(large, "large")  # each part with its checksum behind it, where it has one
        store.download("large", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == large.read_bytes()
        assert store.put_if_absent("once", b"1")
        assert not store.put_if_absent("once", b"2")
