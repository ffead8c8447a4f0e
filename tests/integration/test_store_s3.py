"""The trainer's storage on a real S3 server: conditional writes, checksums, every refusal as its failure class, and a whole run."""

import itertools
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import boto3
import pytest

from finetune_api.report import EndReport, Outcome
from finetune_trainer.checkpoint import Checkpoints
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.lineage import Lineage
from finetune_trainer.store import Missing, Store, open_store
from support.crashes import survives
from testcluster import S3Server

sys.path.insert(0, str(Path(__file__).parents[1] / "unit/trainer"))
from trainer_kit import Job, make_model, write_data


@pytest.fixture
def bucket(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket of the test's own; the environment has the credentials for it."""
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    # The session that boto3 shares within a process keeps the credentials it saw first; the trainer has one process a run.
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    return s3.create_bucket(f"trainer-{uuid.uuid4().hex[:12]}")


@pytest.fixture
def store(bucket: str) -> Store:
    return open_store(f"s3://{bucket}/some/prefix")


# ------------------------------------------------------------------------------------------------------------- objects --
def test_objects_come_back_as_they_went(store: Store, tmp_path: Path) -> None:
    store.put("a/one", b"1")
    store.put("a/one", b"2")
    (tmp_path / "file").write_bytes(os.urandom(1000))
    store.upload(tmp_path / "file", "b/with space #?&+ü")
    assert store.get("a/one") == b"2"
    assert store.list() == ["a/one", "b/with space #?&+ü"]
    assert store.list("a/") == ["a/one"]
    store.download("b/with space #?&+ü", tmp_path / "deep/er/back")
    assert (tmp_path / "deep/er/back").read_bytes() == (tmp_path / "file").read_bytes()
    store.delete("a/one")
    store.delete("a/one")
    assert store.list() == ["b/with space #?&+ü"]
    for use in (lambda: store.get("a/one"), lambda: store.download("a/one", tmp_path / "none")):
        with pytest.raises(Missing):
            use()


def test_a_prefix_sees_only_its_own(bucket: str) -> None:
    open_store(f"s3://{bucket}/one").put("x", b"")
    open_store(f"s3://{bucket}/one-more").put("y", b"")
    assert open_store(f"s3://{bucket}/one").list() == ["x"]


def test_a_large_file_goes_in_parts_with_one_checksum(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import finetune_trainer.s3 as module

    for size in ("AT_ONCE", "PART"):
        monkeypatch.setattr(module, size, 8 << 20)
    content = os.urandom(20 * 1024 * 1024 + 7)
    (tmp_path / "file").write_bytes(content)
    store.upload(tmp_path / "file", "large")
    store.download("large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content


def test_a_file_that_changes_on_its_way_is_refused(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import finetune_trainer.s3 as module

    (tmp_path / "file").write_bytes(b"as it was")
    monkeypatch.setattr(module, "_crc32", lambda path: "AAAAAA==")
    with pytest.raises(TrainingFailure, match="the storage answered") as failed:
        store.upload(tmp_path / "file", "key")
    assert failed.value.failure.reason == "StorageUnavailable"
    assert store.list() == []


def test_folders_that_a_console_made_are_no_files(bucket: str, s3: S3Server, store: Store) -> None:
    for key in ("some/prefix/", "some/prefix/sub/"):
        s3.client().put_object(Bucket=bucket, Key=key)
    store.put("sub/x", b"1")
    assert store.list() == ["sub/x"]


def test_uploads_that_nobody_finished_are_aborted(bucket: str, s3: S3Server, store: Store) -> None:
    client = s3.client()
    for key in ("some/prefix/step-1/weights", "some/prefix/other", "elsewhere/step-1/weights"):
        begun = client.create_multipart_upload(Bucket=bucket, Key=key)
        client.upload_part(Bucket=bucket, Key=key, UploadId=begun["UploadId"], PartNumber=1, Body=b"half")

    def left() -> list[str]:
        return sorted(u["Key"] for u in client.list_multipart_uploads(Bucket=bucket)["Uploads"])

    store.discard_unfinished("step-")
    assert len(left()) == 3, "they may still have a writer"
    store.discard_unfinished("step-", timedelta(seconds=-5))
    assert left() == ["elsewhere/step-1/weights", "some/prefix/other"]


# -------------------------------------------------------------------------------------------------- conditional writes --
def test_what_is_there_is_not_replaced(store: Store) -> None:
    assert store.put_if_absent("key", b"first")
    assert not store.put_if_absent("key", b"second")
    assert store.get("key") == b"first"
    assert store.put_if_absent("key", b"first"), "the answer to a try that was sent twice"


def test_of_many_writers_one_wins(store: Store) -> None:
    won: list[int] = []
    gate = threading.Barrier(8)

    def write(number: int) -> None:
        gate.wait()
        if store.put_if_absent("key", f"writer {number}".encode()):
            won.append(number)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.get("key") == f"writer {won[0]}".encode()


def test_executions_that_begin_together_get_different_numbers(store: Store, tmp_path: Path) -> None:
    made = [Checkpoints(store, tmp_path / str(n), Lineage("d" * 64), keep_last=1, overwrite=False) for n in range(4)]
    threads = [threading.Thread(target=c.begin, args=(step,)) for step, c in enumerate(made)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(c.execution for c in made) == [1, 2, 3, 4]


# ------------------------------------------------------------------------------------------------------------ refusals --
def test_a_missing_bucket(bucket: str, tmp_path: Path) -> None:
    store = open_store("s3://no-such-bucket-here/out")
    uses: list[Callable[[], object]] = [store.check, store.list, lambda: store.put("x", b""), lambda: store.get("x")]
    (tmp_path / "file").write_bytes(b"x")
    uses.append(lambda: store.upload(tmp_path / "file", "x"))
    for use in uses:
        with pytest.raises(
            TrainingFailure, match=r"s3://no-such-bucket-here/out: the bucket .* does not exist: create it"
        ) as failed:
            use()
        assert failed.value.failure.reason == "StorageNotFound"


@pytest.mark.parametrize(
    ("variable", "value", "code"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong", "SignatureDoesNotMatch"),
        ("AWS_ACCESS_KEY_ID", "nobody", "XAdminUserNotFound"),  # versitygw's own code, with HTTP 404; AWS: InvalidAccessKeyId
    ],
)
def test_wrong_keys(bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, value: str, code: str) -> None:
    monkeypatch.setenv(variable, value)
    store = open_store(f"s3://{bucket}/out")
    (tmp_path / "file").write_bytes(b"x")
    uses: list[Callable[[], object]] = [store.check, lambda: store.put("x", b""), lambda: store.upload(tmp_path / "file", "x")]
    for use in uses:
        began = time.monotonic()
        with pytest.raises(TrainingFailure, match=rf"refused the credentials \({code}\).*AWS_SECRET_ACCESS_KEY") as failed:
            use()
        assert failed.value.failure.reason == "StorageDenied"
        assert "wrong" not in failed.value.message, "a key is never repeated"
        assert time.monotonic() - began < 5, "a refusal is not tried again"


def test_no_keys(bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(TrainingFailure, match=r"no S3 credentials were given.*trainer\.envFrom") as failed:
        open_store(f"s3://{bucket}/out").check()
    assert failed.value.failure.reason == "StorageDenied"


def test_a_server_that_does_not_answer(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # the discard port: refused
    with pytest.raises(TrainingFailure, match=r"does not answer .*AWS_ENDPOINT_URL") as failed:
        open_store(f"s3://{bucket}/out").check()
    assert failed.value.failure.reason == "StorageUnavailable"


# ----------------------------------------------------------------------------------------------------------- whole run --
def run_trainer(s3: S3Server, job: Job, **extra: str) -> tuple[int, EndReport]:
    """The trainer as a process, with nothing but its environment."""
    environment = job.environment() | s3.environment() | extra
    done = subprocess.run(
        [sys.executable, "-m", "finetune_trainer"], env=environment, capture_output=True, text=True, timeout=400
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, EndReport.model_validate_json((job.home / "termination-log").read_text())


def test_a_training_from_bucket_to_bucket(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    data, model = write_data(tmp_path / "data"), make_model(tmp_path / "model")
    for folder, prefix in ((data, "data"), (model, "models/org/tiny")):
        place = open_store(f"s3://{bucket}/{prefix}")
        for path in folder.iterdir():
            place.upload(path, path.name)
    job = Job(tmp_path / "job", model, data)
    job.changes = {
        "model": {"uri": "hf://org/tiny"},
        "dataset": {"uri": f"s3://{bucket}/data"},
        "output": {"storageUri": f"s3://{bucket}/out"},
    }
    mirror = {"FINETUNE_MODEL_MIRROR": f"s3://{bucket}/models"}

    code, end = run_trainer(s3, job, **mirror)
    assert (code, end.outcome, end.step) == (0, Outcome.COMPLETE, 18)
    assert end.result is not None
    assert end.result.model_uri == f"s3://{bucket}/out/model"
    assert end.checkpoint is not None
    out = open_store(f"s3://{bucket}/out")
    keys = out.list()
    for expected in ("result.json", "model/model.safetensors", "model/finetune.json", "checkpoints/executions/0001.json"):
        assert expected in keys
    manifest = json.loads(out.get(f"{end.checkpoint.uri.removeprefix(f's3://{bucket}/out/')}/MANIFEST.json"))
    assert sum(f["size"] for f in manifest["files"]) == end.checkpoint.size_bytes

    code, again = run_trainer(s3, job, **mirror)
    assert (code, again.outcome, again.result) == (0, Outcome.ALREADY_COMPLETED, end.result)
    assert out.list() == keys


@pytest.mark.parametrize(
    ("change", "extra", "code", "reason"),
    [
        ("s3://no-such-bucket-here/out", {}, 15, "StorageNotFound"),
        (None, {"AWS_SECRET_ACCESS_KEY": "wrong"}, 14, "StorageDenied"),
    ],
    ids=["missing-bucket", "wrong-key"],
)
def test_a_storage_that_refuses_ends_the_process_in_seconds(
    s3: S3Server, bucket: str, tmp_path: Path, change: str | None, extra: dict[str, str], code: int, reason: str
) -> None:
    job = Job(tmp_path / "job", tmp_path / "no-model", tmp_path / "no-data")
    job.changes = {"output": {"storageUri": change or f"s3://{bucket}/out"}}
    began = time.monotonic()
    got, end = run_trainer(s3, job, **extra)
    assert (got, end.outcome, end.reason) == (code, Outcome.FAILED, reason)
    assert (change or f"s3://{bucket}/out") in end.message
    assert time.monotonic() - began < 15


# --------------------------------------------------------------------------------------------------------- checkpoints --
def test_what_did_not_change_is_copied_where_it_is(store: Store, s3: S3Server, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(os.urandom(3 << 20))
    store.upload(tmp_path / "weights", "step-1/weights")
    store.copy("step-1/weights", "step-2/weights")
    store.delete("step-1/weights")
    store.download("step-2/weights", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "weights").read_bytes()
    with pytest.raises(Missing):
        store.copy("step-1/weights", "step-3/weights")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_death_at_any_operation_loses_nothing_durable(s3: S3Server, bucket: str, tmp_path: Path, *, after: bool) -> None:
    """Every fifth operation, beginning anew for each; those of a folder are all in tests/unit/trainer/test_crashes.py."""
    for at in itertools.count(2 * after, 5):
        folder = tmp_path / str(at)
        folder.mkdir()
        if not survives(lambda at=at: open_store(f"s3://{bucket}/{at}"), folder, at, after=after):
            break
    assert at > 50, "operations that it died at"
