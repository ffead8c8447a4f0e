"""The loader: kubectl's reading of YAML, the API server's strictness, and sentences that say what to change."""

import json
from pathlib import Path

import pytest
import yaml

from bad_finetunejobs import GOOD, edited
from finetune_api import FineTuneJob, Recipe
from finetune_api.manifest import ManifestError, load_job, load_job_file, load_yaml
from scalars import SCALARS

TEXT = yaml.safe_dump(GOOD, sort_keys=False)


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ManifestError) as error:
        load_job(text, list(overrides))
    return error.value.problems


# ------------------------------------------------------------------------------------------------------------ YAML --
@pytest.mark.parametrize(("word", "value"), SCALARS.items(), ids=SCALARS.keys())
def test_words_mean_what_they_mean_to_kubectl(word: str, value: object) -> None:
    [doc] = load_yaml(f"v: {word}")
    assert repr(doc["v"]) == repr(value)


def test_a_learning_rate_of_5e_minus_5_is_a_number() -> None:
    job = load_job(TEXT + "  hyperparameters:\n    learningRate: 5e-5\n    epochs: 1e1\n")
    assert job.spec.hyperparameters.learning_rate == 5e-5
    assert job.spec.hyperparameters.epochs == 10


def test_merge_keys_and_anchors_work() -> None:
    [doc] = load_yaml("a: &a {x: 1, z: 2}\nb:\n  <<: *a\n  z: 3\n")
    assert doc["b"] == {"x": 1, "z": 3}


def test_a_key_twice_is_an_error_with_its_line() -> None:
    [problem] = problems("kind: FineTuneJob\nspec:\n  task: A\n  task: B\n")
    assert "'task' is there twice" in problem
    assert "line 4" in problem


def test_broken_yaml_says_where() -> None:
    [problem] = problems("spec: [1, 2")
    assert "not valid YAML" in problem
    assert "line 1" in problem


def test_a_tag_that_would_run_code_is_refused() -> None:
    [problem] = problems("a: !!python/object/apply:os.getcwd []")
    assert "not valid YAML" in problem


# ------------------------------------------------------------------------------------------------------- documents --
def test_other_kinds_in_the_file_are_passed_over() -> None:
    secret = "apiVersion: v1\nkind: Secret\nmetadata: {name: s3}\n---\n"
    assert load_job(secret + TEXT).metadata["name"] == "good"


@pytest.mark.parametrize("text", ["", "kind: Pod", f"{TEXT}---\n{TEXT}"], ids=["empty", "other", "two"])
def test_there_must_be_exactly_one_job(text: str) -> None:
    [problem] = problems(text)
    assert "exactly one FineTuneJob" in problem


def test_a_file_that_is_not_there_or_not_text_is_named(tmp_path: Path) -> None:
    binary = tmp_path / "job.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none.yaml", binary):
        with pytest.raises(ManifestError, match=path.name):
            load_job_file(path)


# ------------------------------------------------------------------------------------------------------- sentences --
@pytest.mark.parametrize(
    ("edits", "sentence"),
    [
        ({"spec.datasets": {}}, "spec.datasets: unknown field"),
        ({"spec.model": {}}, "spec.model.uri: required, but not set"),
        (
            {"spec.hyperparameters.learningRate": -0.1},
            "spec.hyperparameters.learningRate: -0.1 is not allowed: input should be greater than 0",
        ),
        (
            {"spec.task": "Chat"},
            "spec.task: 'Chat' is not allowed: input should be 'SequenceClassification', 'Regression', 'TokenClassification' or 'CausalLM'",
        ),
        (
            {"spec.model.uri": "bert"},
            "spec.model.uri: 'bert' is not allowed: must be hf://org/name[@revision], s3://bucket/prefix or file:///path",
        ),
        (
            {"spec.dataset.labels": ["a", "b", "a"]},
            "spec.dataset.labels: each item may be listed once, 'a' is there twice",
        ),
        (
            {"spec.evaluation": {"everyEpochs": 1, "everySteps": 2}},
            "spec.evaluation.everySteps: set everyEpochs or everySteps, not both",
        ),
        (
            {"spec.trainer.env": [{"name": "A"}, {"name": "FINETUNE_X"}]},
            "spec.trainer.env[1].name: names that begin with FINETUNE_, KUBEFLOW_TRAINER_, PET_ are set by the operator",
        ),
        (
            {"spec.trainer.resourcesPerNode.limits": {"cpu": 0.5}},
            (
                "spec.trainer.resourcesPerNode.limits.cpu: 0.5 is not allowed: must be a whole number, or a quantity in quotes such as "
                '"500m" or "16Gi"'
            ),
        ),
        (
            {"metadata.name": "My.Job"},
            (
                "metadata.name: 'My.Job' is not allowed: at most 52 characters: lower-case letters, digits and '-', beginning with a "
                "letter"
            ),
        ),
        (
            {"spec.dataset.labels": ["a", False]},
            (
                "spec.dataset.labels[1]: False is not allowed: input should be a valid string; YAML reads yes, no, on, off, y and n as "
                "booleans: put the word in quotes"
            ),
        ),
    ],
)
def test_sentences_name_the_field_the_value_and_what_is_allowed(edits: dict[str, object], sentence: str) -> None:
    assert problems(json.dumps(edited(GOOD, edits))) == [sentence]


def test_all_problems_are_told_at_once() -> None:
    bad = edited(GOOD, {"spec.taks": "x", "spec.hyperparameters.epochs": 0, "spec.model.uri": "x"})
    assert len(problems(json.dumps(bad))) == 3


def test_values_of_variables_are_not_shown() -> None:
    bad = edited(GOOD, {"spec.trainer.env": [{"name": "A", "value": "hunter2"}, {"name": "A", "value": "hunter2"}]})
    assert "hunter2" not in str(problems(json.dumps(bad)))


# ------------------------------------------------------------------------------------------------------- overrides --
def test_overrides_are_read_like_the_manifest() -> None:
    job = load_job(
        TEXT, ["hyperparameters.learningRate=5e-5", "spec.hyperparameters.epochs=2", "dataset.labels=[a, b]", "trainer.image="]
    )
    assert job.spec.hyperparameters.learning_rate == 5e-5
    assert job.spec.hyperparameters.epochs == 2
    assert job.spec.dataset.labels == ["a", "b"]
    assert job.spec.trainer.image is None


@pytest.mark.parametrize("override", ["epochs", "=3", "task.x=1", "hyperparameters.epoch=3", "hyperparameters.epochs=many"])
def test_bad_overrides_are_refused(override: str) -> None:
    assert problems(TEXT, override)


# --------------------------------------------------------------------------------------------------------- meaning --
def test_null_means_the_default() -> None:
    nulls = {"spec.hyperparameters": {"epochs": None, "schedule": None, "earlyStopping": None}, "spec.dataset.test": None}
    assert load_job(json.dumps(edited(GOOD, nulls))).spec == load_job(TEXT).spec


def test_null_for_a_required_field_is_refused() -> None:
    [problem] = problems(json.dumps(edited(GOOD, {"spec.task": None})))
    assert problem.startswith("spec.task: ")


def test_a_job_survives_the_way_through_json() -> None:
    job = load_job(TEXT)
    assert FineTuneJob.model_validate_json(job.model_dump_json(by_alias=True)) == job
    assert Recipe.model_validate_json(job.spec.recipe().model_dump_json(by_alias=True, exclude_none=True)) == job.spec.recipe()
