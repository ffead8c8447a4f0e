"""Faults that were found once; each test names what went wrong."""

import io
import json
import math
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from trainer_kit import Job

from finetune_trainer import config
from finetune_trainer.checkpoint import Checkpoints
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.lineage import Lineage
from finetune_trainer.report import Console, write_end
from finetune_trainer.store import FolderStore


def test_a_data_set_is_only_read(job: Job, tmp_path: Path) -> None:
    # The check of the place wrote a file into it: a read-only volume was refused, and a folder with a typo was made.
    with pytest.raises(TrainingFailure, match="does not exist") as failed:
        job.run(dataset={"uri": f"file://{tmp_path}/typo"})
    assert failed.value.failure.reason == "StorageNotFound"
    assert not (tmp_path / "typo").exists()


def test_written_files_are_readable_as_the_umask_says(tmp_path: Path) -> None:
    # mkstemp's 0600 stayed on every model file.
    (tmp_path / "file").write_bytes(b"x")
    store = FolderStore(tmp_path / "store")
    store.upload(tmp_path / "file", "uploaded")
    store.put("put", b"x")
    store.put_if_absent("once", b"x")
    expected = stat.S_IMODE((tmp_path / "file").stat().st_mode)
    assert {stat.S_IMODE((tmp_path / "store" / n).stat().st_mode) for n in ("uploaded", "put", "once")} == {expected}


def checkpoints(tmp_path: Path, name: str, **kwargs: int) -> Checkpoints:
    return Checkpoints(
        FolderStore(tmp_path / "store"), tmp_path / name, Lineage("d" * 64), keep_last=kwargs.get("keep", 1), overwrite=False
    )


def stage(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "state").write_bytes(os.urandom(8))


class S3Like(FolderStore):
    """As S3Store: what is there already is ours if it is the same (the answer to a request that was sent twice)."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return super().put_if_absent(key, data) or self.get(key) == data


def test_two_executions_of_the_same_second_get_two_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = S3Like(tmp_path / "store")
    both = [Checkpoints(store, tmp_path / n, Lineage("d" * 64), keep_last=1, overwrite=False) for n in "ab"]
    monkeypatch.setattr(store, "list", lambda prefix="": [])  # both look before either has written
    for one in both:
        one.begin(0)
    assert sorted(c.execution for c in both) == [1, 2]


def test_a_replaced_execution_ends_and_deletes_nothing(tmp_path: Path) -> None:
    old, new = checkpoints(tmp_path, "old"), checkpoints(tmp_path, "new")
    old.begin(0)
    new.begin(0)
    new.best = new.name(10)
    for step in (10, 20):
        new.save(step, lambda: stage, lambda _: None)
    new.wait()
    before = FolderStore(tmp_path / "store").list()
    old.save(5, lambda: stage, lambda _: pytest.fail("told as durable"))
    with pytest.raises(TrainingFailure, match=r"execution 2 has taken over .*output\.storageUri of its own") as failed:
        old.wait()
    # As Interrupted, which is not counted, two jobs with one recipe and one output took it from each other without end.
    assert (failed.value.failure.reason, failed.value.failure.retriable, failed.value.failure.counted) == (
        "Superseded",
        True,
        True,
    )
    assert set(before) <= set(FolderStore(tmp_path / "store").list())


def test_a_checkpoint_whose_best_model_is_gone_is_not_gone_on_from(tmp_path: Path) -> None:
    # It would be found out after the last step only.
    first = checkpoints(tmp_path, "first", keep=2)
    first.begin(0)
    first.save(10, lambda: stage, lambda _: None)
    first.wait()
    first.best = first.name(20)
    for step in (20, 30):
        first.save(step, lambda: stage, lambda _: None)
    first.wait()
    store = tmp_path / "store"
    assert (store / "step-00000020-0001/MANIFEST.json").exists()
    (store / "step-00000020-0001/state").write_bytes(b"spoilt")
    with pytest.raises(TrainingFailure) as failed:
        checkpoints(tmp_path, "second").restore()
    assert failed.value.failure.reason == "CheckpointCorrupt"


def test_the_origin_is_that_of_the_first_execution_that_is_one(tmp_path: Path) -> None:
    # A file of somebody else, or half a one of ours, before it: every later attempt ended as UserCodeError.
    folder = tmp_path / "store/executions"
    folder.mkdir(parents=True)
    (folder / "!notes.txt").write_text("mine")
    for number, content in enumerate(('{"par', "", "[]", '"id"', "null", '{"parent": 0}', "\\xff"), start=1):
        (folder / f"{number:04d}.json").write_text(content)
    first, second = checkpoints(tmp_path, "first"), checkpoints(tmp_path, "second")
    first.begin(0)
    mine = json.loads((folder / f"{first.execution:04d}.json").read_text())["id"]
    second.begin(0)
    assert first.origin == second.origin == mine


def test_a_gradient_that_is_not_finite_is_never_saved(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    # The loss of the step that spoils the weights is fine; the checkpoint after it held NaN.
    clip, calls = torch.nn.utils.clip_grad_norm_, [0]

    def overflow(parameters: object, limit: float) -> torch.Tensor:
        parameters = list(parameters)  # type: ignore[call-overload]
        calls[0] += 1
        if calls[0] == 3:
            parameters[0].grad[0, 0] = math.inf
        return clip(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflow)
    with pytest.raises(TrainingFailure) as failed:
        job.run(checkpoint={"everySteps": 1})
    assert failed.value.failure.reason == "NonFiniteLoss"
    assert job.steps()[-1] == 2


def test_half_a_surrogate_is_bad_data_and_no_crash(job: Job, tmp_path: Path) -> None:
    job.data = Path(shutil.copytree(job.data, tmp_path / "data"))
    (job.data / "train.jsonl").write_text(json.dumps({"text": "\ud800", "label": "neutral"}))
    with pytest.raises(TrainingFailure, match=r"train\.jsonl: line 1: text holds half a surrogate") as failed:
        job.run(dataset={"train": "train.jsonl"})
    assert failed.value.failure.reason == "DataInvalid"


def test_an_attempt_that_is_no_number_still_gets_a_termination_message() -> None:
    assert config.load_runtime({"FINETUNE_ATTEMPT": "x"}).attempt == 1


def test_the_first_line_shows_no_nan_and_the_time_left_is_of_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("finetune_trainer.report.time.monotonic", lambda: float(next(clock)))
    console = Console(io.StringIO())
    lefts = [console.step(step, 10, math.nan if step == 1 else 1.0, 0.1) for step in range(1, 11)]
    assert "nan" not in console.out.getvalue()  # type: ignore[attr-defined]
    assert lefts[1:] == [float(10 - step) for step in range(2, 11)], "one second a step"


def test_a_termination_log_that_cannot_be_written_loses_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from finetune_api.report import EndReport, Outcome

    runtime = config.Runtime("x", tmp_path, termination_log=tmp_path / "no-folder/log")
    write_end(runtime, EndReport(outcome=Outcome.COMPLETE))
    assert "cannot be written" in capsys.readouterr().err
