"""`finetune checkpoints` on a folder: what is listed, what verifies, what is written for from_pretrained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_api.manifest import load_job
from finetune_cli.__main__ import main
from finetune_trainer.checkpoint import MANIFEST, Checkpoints
from finetune_trainer.inspect_checkpoints import Inspection
from finetune_trainer.lineage import Lineage
from finetune_trainer.store import FolderStore, Missing

DIGEST = "d" * 64
WEIGHTS = bytes(range(256)) * 8

Execution = Callable[..., None]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Step 20 is the best; execution 1, thought dead, goes on to step 40 when execution 2 has begun from step 20."""
    first = execution(tmp_path, "first")
    first.begin(0)
    save(first, 10, 20, best=20)
    second = execution(tmp_path, "second")
    second.best = first.best
    second.begin(20)
    save(second, 30)
    (tmp_path / "at/executions/0002.json").rename(tmp_path / "hidden")  # so that it does not notice
    save(first, 40)
    (tmp_path / "hidden").rename(tmp_path / "at/executions/0002.json")
    return tmp_path / "at"


def execution(folder: Path, name: str, digest: str = DIGEST) -> Checkpoints:
    return Checkpoints(
        FolderStore(folder / "at"), folder / name, Lineage(digest), keep_last=10, overwrite=True, log=lambda _: None
    )


def save(checkpoints: Checkpoints, *steps: int, best: int | None = None) -> None:
    def stage(folder: Path) -> None:
        (folder / "model").mkdir(parents=True)
        (folder / "trainer").mkdir()
        (folder / "model/config.json").write_text("{}")
        (folder / "model/model.safetensors").write_bytes(WEIGHTS)
        (folder / "trainer/state.json").write_text("{}")

    for step in steps:
        if step == best:
            checkpoints.best = checkpoints.name(step)
        checkpoints.save(step, lambda: stage, lambda _: None)
    checkpoints.wait()


def listed(place: Path, capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> list[dict[str, Any]]:
    assert main(["checkpoints", f"file://{place}", "-o", "json", *arguments]) == code
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_every_checkpoint_is_listed_with_its_standing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(r["step"], r["execution"], r["best"], r["standing"]) for r in listed(place, capsys)]
    assert rows == [
        (40, 1, False, "overtaken"),
        (30, 2, False, "counts"),
        (20, 1, True, "counts"),
        (10, 1, False, "counts"),
    ]
    row = listed(place, capsys)[2]
    assert row["uri"] == f"file://{place}/step-00000020-0001"
    assert row["sizeBytes"] == len(WEIGHTS) + 4
    assert main(["checkpoints", f"file://{place}"]) == 0
    table = capsys.readouterr().out
    assert all(word in table for word in ("overtaken", "2.0 KiB", "best", "checkpoints at"))


def test_verify_names_the_file_that_is_not_what_the_manifest_says(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {r["whole"] for r in listed(place, capsys, "--verify")} == {True}
    weights = place / "step-00000030-0002/model/model.safetensors"
    weights.write_bytes(WEIGHTS[:-1] + b"x")  # as long as before
    (place / "step-00000010-0001/trainer/state.json").unlink()
    rows = {r["step"]: r for r in listed(place, capsys, "--verify", code=17)}
    assert [step for step, row in rows.items() if not row["whole"]] == [30, 10]
    assert "model/model.safetensors differs" in rows[30]["problem"]
    assert "trainer/state.json is missing" in rows[10]["problem"]


def test_a_manifest_that_cannot_be_read_is_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "step-00000030-0002" / MANIFEST).write_text("{")
    assert main(["checkpoints", f"file://{place}"]) == 0
    assert "step-00000030-0002" in capsys.readouterr().err
    assert main(["checkpoints", f"file://{place}", "--verify"]) == 17


@pytest.mark.parametrize(("wanted", "step"), [("best", 20), ("latest", 30), ("10", 10), ("40", 40)])
def test_export_writes_the_model_and_nothing_else(
    place: Path, wanted: str, step: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "new/model"
    assert main(["checkpoints", f"file://{place}", "--export", wanted, "--to", str(to)]) == 0
    assert f"model of step {step} " in capsys.readouterr().out
    assert sorted(p.name for p in to.iterdir()) == ["config.json", "model.safetensors"]
    assert (to / "model.safetensors").read_bytes() == WEIGHTS
    assert [p.name for p in to.parent.iterdir()] == ["model"], "nothing is left beside it"


def test_export_of_a_corrupt_checkpoint_writes_nothing(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "step-00000020-0001/trainer/state.json").write_text("[]")
    assert main(["checkpoints", f"file://{place}", "--export", "best", "--to", str(tmp_path / "to")]) == 17
    assert "trainer/state.json differs" in capsys.readouterr().err
    assert not (tmp_path / "to").exists()


def manifest_of(folder: Path, checkpoints: Path, hyperparameters: str = "{}") -> Path:
    """A job whose checkpoints are there."""
    manifest = folder / "job.yaml"
    manifest.write_text(
        f"""
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {{name: a}}
spec:
  task: SequenceClassification
  model: {{uri: "hf://a/b"}}
  dataset: {{uri: "s3://data/x", labels: [a, b]}}
  hyperparameters: {hyperparameters}
  checkpoint: {{storageUri: "file://{checkpoints}"}}
  output: {{storageUri: "file://{folder}/out"}}
"""
    )
    return manifest


def test_with_a_manifest_other_recipes_do_not_count(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = manifest_of(tmp_path, place)
    assert main(["checkpoints", "-f", str(manifest), "-o", "json"]) == 0
    assert {r["standing"] for r in json.loads(capsys.readouterr().out)} == {"other recipe"}
    assert main(["checkpoints", "-f", str(manifest), "--export", "latest", "--to", str(tmp_path / "to")]) == 2
    assert "steps that count: none" in capsys.readouterr().err


@pytest.mark.parametrize(("schedule", "standing"), [("Constant", "counts"), ("Linear", "other recipe")])
def test_a_longer_recipe_that_would_go_on_from_it_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], schedule: str, standing: str
) -> None:
    manifest = manifest_of(tmp_path, tmp_path / "at", f"{{epochs: 3, schedule: {{type: {schedule}}}}}")
    recipe = load_job(manifest.read_text()).spec.recipe()
    lineage = Lineage.of(recipe, 100)
    made = Checkpoints(FolderStore(tmp_path / "at"), tmp_path / "s", lineage, keep_last=2, overwrite=False, log=lambda _: None)
    made.begin(0)
    save(made, 2)
    for epochs, expected in ((3, "counts"), (5, standing)):
        assert main(["checkpoints", "-f", str(manifest), "--set", f"spec.hyperparameters.epochs={epochs}", "-o", "json"]) == 0
        assert {r["standing"] for r in json.loads(capsys.readouterr().out)} == {expected}


def test_mistakes_are_sentences(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"file://{place}"
    for arguments, said in (
        ([], "one of the two"),
        ([uri, "--export", "best"], "belong together"),
        ([uri, "--export", "11", "--to", str(tmp_path / "to")], "steps that count: 30, 20, 10"),
        ([uri, "--export", "newest", "--to", str(tmp_path / "to")], "a step, best or latest"),
        ([uri, "--export", "best", "--to", str(place)], "not an empty folder"),
        (["/checkpoints"], "must be s3://bucket/prefix"),
    ):
        assert main(["checkpoints", *arguments]) == 2
        assert said in capsys.readouterr().err
    assert main(["checkpoints", f"file://{tmp_path}/nowhere"]) == 15
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["checkpoints", f"file://{tmp_path}/empty"]) == 0
    assert "there are no checkpoints" in capsys.readouterr().out


def test_one_that_is_deleted_while_it_is_listed_is_no_error(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inspection = Inspection(FolderStore(place), tmp_path / "look")
    found, _ = inspection.look()

    def gone(*_: object) -> None:
        raise Missing("step-00000030-0002")

    monkeypatch.setattr(inspection.store, "entries", gone)
    with inspection.fetched(found[0].checkpoint) as folder:
        assert folder is None
