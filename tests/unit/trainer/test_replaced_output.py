"""A new model in the place of another one, with output.overwrite: what is under model/ is all of the new one and nothing else."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from trainer_kit import Job, Killed, merged

from finetune_trainer import closing, inference
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.store import FolderStore

ADAPTERS: dict[str, Any] = {"model": {"lora": {"rank": 2, "alpha": 4, "merge": False}}}
WHOLE: dict[str, Any] = {"hyperparameters": {"epochs": 1}, "output": {"overwrite": True}}
MEAN: dict[str, Any] = merged(WHOLE, {"model": {"pooling": "Mean"}, "hyperparameters": {"learningRate": None}})


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fresh(job: Job, name: str, **changes: Any) -> Job:
    return replace(job, home=job.home / name, changes=changes, runs=[])


@pytest.mark.parametrize("changes", [WHOLE, MEAN], ids=["whole", "pooled"])
@pytest.mark.parametrize("kept", [False, True], ids=["new pod", "kept work folder"])
def test_nothing_of_the_model_before_is_left(
    job: Job, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], *, kept: bool
) -> None:
    # A whole model was written beside the adapters of the one before, which whoever loaded it put on it.
    alone = fresh(job, "alone", **changes)
    alone.run()
    if kept:  # as `finetune run` does
        runtime = job.runtime()
        monkeypatch.setattr(Job, "runtime", lambda _: runtime)
    job.run(**ADAPTERS)
    assert "adapter_config.json" in files(job.output / "model")
    job.run(**changes)
    assert files(job.output / "model") == files(alone.output / "model")
    texts = ["it was great", "awful and slow"]
    assert inference.load(job.output / "model").predict(texts) == inference.load(alone.output / "model").predict(texts)


def test_a_death_while_it_is_replaced_leaves_no_result_and_the_next_attempt_repairs_it(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = fresh(job, "alone", **WHOLE)
    alone.run()
    job.run(**ADAPTERS)
    upload, uploads = FolderStore.upload, iter(range(3))

    def dying(self: FolderStore, path: Path, key: str) -> None:
        if key.startswith("model/") and next(uploads) == 2:
            raise Killed
        upload(self, path, key)

    monkeypatch.setattr(FolderStore, "upload", dying)
    with pytest.raises(Killed):
        job.run(**WHOLE)
    monkeypatch.undo()
    assert not (job.output / "result.json").exists()
    assert files(job.output / "model").keys() <= files(alone.output / "model").keys()
    job.run(**WHOLE)
    done, expected = (files(j.output / "model") for j in (job, alone))
    assert done.keys() == expected.keys()
    assert done["model.safetensors"] == expected["model.safetensors"]


def test_a_winner_replaces_all_of_the_one_before(job: Job) -> None:
    adapters, whole = fresh(job, "adapters", **ADAPTERS), fresh(job, "whole")
    promoted = job.home / "promoted"
    for trial in (adapters, whole, adapters):
        trial.run()
        recipe = trial.recipe(output={"storageUri": f"file://{promoted}", "overwrite": True})
        closing.promote(recipe, trial.runtime(), f"file://{trial.output}/model")
        assert files(promoted / "model") == files(trial.output / "model")


@pytest.mark.parametrize("slash", ["", "/"])
def test_adapters_do_not_replace_the_model_that_they_need(job: Job, slash: str) -> None:
    job.run()
    before = files(job.output / "model")
    on_it = merged(ADAPTERS, {"model": {"uri": f"file://{job.output}/model{slash}"}, "output": {"overwrite": True}})
    with pytest.raises(TrainingFailure, match=r"would be replaced by the adapters.*output\.storageUri") as failed:
        job.run(**on_it)
    assert failed.value.failure.reason == "RecipeInvalid"
    assert files(job.output / "model") == before
