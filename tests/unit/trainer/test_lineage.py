"""Going on with another recipe: longer where the schedule had the same rates so far, and that is then the longer run; else a sentence."""

import json
from dataclasses import replace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from test_resume import same
from trainer_kit import Job, Killed, make_model, merged, write_csv, write_data
from trainer_kit import rows as examples

from finetune_api import Recipe
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.lineage import Lineage


def fresh(job: Job, name: str) -> Job:
    return replace(job, home=job.home / name, runs=[])


def length(epochs: int, **schedule: Any) -> dict[str, Any]:
    return {"hyperparameters": {"epochs": epochs, "schedule": schedule}, "evaluation": {"bestMetric": "loss"}}


CONSTANT = {"type": "Constant", "warmup": 3}


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "killed"])
def test_a_longer_training_goes_on_where_the_rate_is_constant(job: Job, *, finished: bool) -> None:
    long, grown = fresh(job, "long"), fresh(job, "grown")
    long.run(**length(4, **CONSTANT))
    if finished:
        assert grown.run(**length(2, **CONSTANT)).step == 12
    else:
        with pytest.raises(Killed):
            grown.run(kill_at=8, **length(2, **CONSTANT))
    end = grown.run(**length(4, **CONSTANT))
    assert end.resumed_from is not None
    assert end.resumed_from.step == (12 if finished else 6)
    same(long, grown)


def test_before_the_decay_of_warmup_stable_decay_it_goes_on_and_in_it_not(job: Job) -> None:
    schedule = {"type": "WarmupStableDecay", "warmup": 2}
    long, grown = fresh(job, "long"), fresh(job, "grown")
    long.run(**length(6, **schedule))
    with pytest.raises(Killed):
        grown.run(kill_at=14, **length(3, **schedule))  # 18 steps, the last of them decay
    assert grown.steps()[-1] == 12
    end = grown.run(**length(6, **schedule))
    assert end.resumed_from is not None
    same(long, grown)
    done = fresh(job, "done")
    done.run(**length(3, **schedule))
    with pytest.raises(
        TrainingFailure, match=r"hyperparameters\.epochs is the default there and 6 here: the schedule WarmupStableDecay"
    ):
        done.run(**length(6, **schedule))


def test_what_is_finished_and_has_no_checkpoints_is_not_trained_over(job: Job) -> None:
    job.run(**length(2, **CONSTANT))
    job.checkpoints.rename(job.home / "elsewhere")
    with pytest.raises(TrainingFailure, match="with another length, and its checkpoints are not there") as failed:
        job.run(**length(4, **CONSTANT))
    assert failed.value.failure.reason == "OutputExists"
    assert json.loads((job.output / "result.json").read_text())["steps"] == 12


@pytest.mark.parametrize(
    ("there", "here", "said"),
    [
        (length(2), length(4), r"hyperparameters\.epochs is 2 there and 4 here: the schedule Linear had other rates"),
        (
            length(4, **CONSTANT),
            merged(length(4, **CONSTANT), {"hyperparameters": {"maxSteps": 3}}),
            r"maxSteps is .* its step 6 is beyond",
        ),
        ({}, {"hyperparameters": {"learningRate": 1e-3}}, r"hyperparameters\.learningRate is 0\.005 there and 0\.001 here"),
        (
            {},
            {"dataset": {"maxLength": 16}, "evaluation": {"bestMetric": "loss"}},
            r"dataset\.maxLength is 32 there and 16 here, ev",
        ),
    ],
    ids=["decaying", "shorter", "rate", "several"],
)
def test_anything_else_says_which_field_differs(job: Job, there: dict[str, Any], here: dict[str, Any], said: str) -> None:
    with pytest.raises(Killed):
        job.run(kill_at=9, **there)
    with pytest.raises(TrainingFailure, match=said) as failed:
        job.run(**here)
    assert failed.value.failure.reason == "OutputExists"
    assert "output.overwrite: true" in failed.value.message


def test_the_checkpoint_policy_may_always_change(job: Job) -> None:
    with pytest.raises(Killed):
        job.run(kill_at=9)
    end = job.run(checkpoint={"everySteps": 1, "keepLast": 5, "saveDeadlineSeconds": 90})
    assert end.resumed_from is not None
    assert len(job.steps()) >= 5


def test_other_examples_under_the_same_name_are_told(job: Job) -> None:
    moved = replace(job, data=write_data(job.home / "data"), runs=[])
    with pytest.raises(Killed):
        moved.run(kill_at=9)
    changed = examples(44)
    changed[0], changed[1] = changed[1], changed[0]  # the same words and rows, in another order: other batches
    write_csv(moved.data / "train.csv", changed)
    with pytest.raises(TrainingFailure, match=r"dataset\.train: its examples are not those that .* step 6") as failed:
        moved.run()
    assert failed.value.failure.reason == "DataInvalid"


@pytest.mark.parametrize("part", [{"lora": {"rank": 2, "alpha": 4}}, {"pooling": "Mean"}], ids=["adapters", "pooled"])
def test_another_model_under_the_same_name_is_told(job: Job, part: dict[str, Any]) -> None:
    """Where a checkpoint does not hold all of it."""
    moved = replace(job, model=make_model(job.home / "model"), changes={"model": part}, runs=[])
    with pytest.raises(Killed):
        moved.run(kill_at=9)
    file = moved.model / "model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(TrainingFailure, match=r"model\.uri: its weights are not those .* step 6 .*@revision") as failed:
        moved.run()
    assert failed.value.failure.reason == "ModelNotFound"


def test_a_later_version_with_more_fields_knows_its_own(job: Job) -> None:
    recipe = job.recipe()
    assert "labelSmoothing" not in recipe.deciding()["hyperparameters"], "what has its default is left out"
    written = recipe.model_dump(mode="json", by_alias=True)
    assert Recipe.model_validate(written).digest() == recipe.digest(), "as the API server stores it, with all defaults"


@pytest.mark.parametrize("fields", [None, 3, {}, {"hyperparameters": {"epochs": "many"}}, {"task": "SequenceClassification"}])
def test_rubbish_in_a_manifest_is_another_recipe(job: Job, fields: Any) -> None:
    lineage = Lineage.of(job.recipe(), 44)
    assert lineage.differences({"recipe": "d" * 64, "fields": fields, "step": 3, "stepsPerEpoch": "x"})
    assert not lineage.differences({"recipe": lineage.digest, "fields": fields, "step": 3})
