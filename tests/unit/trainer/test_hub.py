"""hf:// names a folder of the mirror, else a repository of the hub; where neither is, a sentence says how to go on.

There is no hub where tests run: a small HTTP server speaks as much of its API as the client asks for.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub.constants
import pytest
from trainer_kit import Job, make_model, write_data

from finetune_trainer import model
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.splits import Splits, read_splits

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(kind: str, name: str, folder: Path, revision: str = "main") -> Iterator[tuple[str, list[str]]]:
    """A hub with one repository that has one revision; its address, and the files that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            prefix = f"/{name}/resolve/{COMMIT}/" if kind == "model" else f"/{kind}s/{name}/resolve/{COMMIT}/"
            if path == f"/api/{kind}s/{name}/revision/{revision}":
                self._answer(200, json.dumps({"id": name, "sha": COMMIT}).encode())
            elif path == f"/api/{kind}s/{name}/tree/{COMMIT}":
                files = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in folder.iterdir()]
                self._answer(200, json.dumps(files).encode())
            elif path.startswith(prefix):
                file = path.removeprefix(prefix)
                asked.append(file)
                self._answer(200, (folder / file).read_bytes())
            else:
                self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET  # noqa: N815  (the name is http.server's)

        def _answer(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(code)
            for key, value in {"ETag": f'"{hash(body)}"', "X-Repo-Commit": COMMIT, **(headers or {})}.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def point_to(address: str, patch: pytest.MonkeyPatch) -> None:
    """As HF_ENDPOINT does before the client is imported."""
    patch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture(autouse=True)
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and a hub that does not answer until a test has one."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    point_to("http://127.0.0.1:9", monkeypatch)


def read(job: Job, uri: str = "hf://org/feedback", **dataset: str) -> Splits:
    return read_splits(job.recipe(dataset={"uri": uri, **dataset}), job.runtime(), lambda _: None)[0]


def test_a_data_set_is_looked_up_in_the_mirror(job: Job, tmp_path: Path) -> None:
    shutil.copytree(job.data, tmp_path / "mirror/org/feedback")
    job.dataset_mirror = str(tmp_path / "mirror/")
    assert len(read(job)["train"]) == 44
    shutil.copytree(job.data, tmp_path / "mirror/org/feedback@v1")
    (tmp_path / "mirror/org/feedback@v1/test.csv").write_text("text,label\ngood,positive\n")
    assert len(read(job, "hf://org/feedback@v1")["test"]) == 1
    with pytest.raises(TrainingFailure, match=r"has org/feedback/, which may be any revision, and not org/feedback@v2/"):
        read(job, "hf://org/feedback@v2")
    with pytest.raises(
        TrainingFailure, match=r"dataset\.test: there is no tset\.csv in hf://org/feedback; it has test\.csv, train"
    ):
        read(job, test="tset.csv")


def test_a_mirror_may_be_in_s3(job: Job, tmp_path: Path) -> None:
    shutil.copytree(job.data, tmp_path / "s3/mirrors/data/org/feedback")
    job.s3_root, job.dataset_mirror = tmp_path / "s3", "s3://mirrors/data/"
    assert len(read(job)["validation"]) == 18


@pytest.mark.parametrize("mirror", [None, "folder", "s3://mirrors/data"])
def test_what_neither_mirror_nor_hub_has_is_told(job: Job, tmp_path: Path, mirror: str | None) -> None:
    (tmp_path / "s3/mirrors/data/org").mkdir(parents=True)
    job.s3_root, job.dataset_mirror = tmp_path / "s3", mirror
    with pytest.raises(TrainingFailure) as failed:
        read(job)
    assert failed.value.failure.reason == "DataInvalid"
    assert failed.value.message == (
        f"dataset.uri hf://org/feedback: it is not in the data set mirror ({mirror or 'none is set'}) and the hub cannot be reached: "
        "set the mirror (FINETUNE_DATASET_MIRROR, --dataset-mirror) or use s3:// or file://"
    )
    job.mirror = mirror
    with pytest.raises(TrainingFailure, match=r"set the mirror \(FINETUNE_MODEL_MIRROR, --model-mirror\)") as failed:
        model.fetch("hf://org/tiny", job.runtime())
    assert failed.value.failure.reason == "ModelNotFound"


def test_from_the_hub_come_the_files_that_are_named(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_data(tmp_path / "hub")
    (folder / "huge.parquet").write_bytes(b"x")
    with hub("dataset", "org/feedback", folder, revision="v1") as (address, asked):
        point_to(address, monkeypatch)
        assert [len(examples) for examples in read(job, "hf://org/feedback@v1").values()] == [44, 18, 15]
        assert set(asked) == {"train.csv", "validation.csv", "test.csv"}
        with pytest.raises(TrainingFailure, match=r"dataset\.train: there is no nope\.csv in hf://org/feedback@v1$"):
            read(job, "hf://org/feedback@v1", train="nope.csv")
        for other in ("hf://org/feedback@v2", "hf://org/other", "hf://org/a--b"):
            with pytest.raises(
                TrainingFailure, match=f"dataset.uri {other}: the hub has no such data set or revision, or it needs"
            ):
                read(job, other)


def test_a_model_of_the_hub_comes_without_other_formats(tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path / "hub")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with hub("model", "org/tiny", folder) as (address, asked):
        point_to(address, monkeypatch)
        fetched = model.fetch("hf://org/tiny", job.runtime())
    assert (fetched / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert "pytorch_model.bin" not in asked
