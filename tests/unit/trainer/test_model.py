"""Finding the model, dropout by role, and a stock head."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_kit import LABELS, Job, make_model
from transformers import AutoConfig, AutoModelForSequenceClassification

from finetune_api.hyperparameters import Dropout
from finetune_api.recipe import Dataset
from finetune_api.tasks import Task
from finetune_trainer import model
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.fetch import fetch_folder
from finetune_trainer.store import FolderStore, Stored, nobody
from finetune_trainer.tasks import kind_of
from testcluster.processes import free_port

KIND = kind_of(Task.SEQUENCE_CLASSIFICATION, Dataset.model_validate({"uri": "file:///data", "labels": LABELS}))
ROLES: list[tuple[str, dict[str, set[str]]]] = [
    # What research/trainer.md 1.1 found in transformers' own configurations.
    (
        "bert",
        {"hidden": {"hidden_dropout_prob"}, "attention": {"attention_probs_dropout_prob"}, "classifier": {"classifier_dropout"}},
    ),
    ("roberta", {"hidden": {"hidden_dropout_prob"}, "classifier": {"classifier_dropout"}}),
    ("distilbert", {"hidden": {"dropout"}, "attention": {"attention_dropout"}, "classifier": {"seq_classif_dropout"}}),
    ("albert", {"classifier": {"classifier_dropout_prob"}}),
    (
        "modernbert",
        {
            "hidden": {"mlp_dropout", "embedding_dropout"},
            "attention": {"attention_dropout"},
            "classifier": {"classifier_dropout"},
        },
    ),
    ("gpt2", {"hidden": {"resid_pdrop", "embd_pdrop"}, "attention": {"attn_pdrop"}, "classifier": {"summary_first_dropout"}}),
    ("t5", {"hidden": {"dropout_rate"}, "classifier": {"classifier_dropout"}}),
    ("bart", {"hidden": {"dropout"}, "attention": {"attention_dropout"}, "classifier": {"classifier_dropout"}}),
    ("llama", {"attention": {"attention_dropout"}}),
]


@pytest.mark.parametrize(("kind", "expected"), ROLES, ids=[kind for kind, _ in ROLES])
def test_each_role_sets_the_fields_of_the_architecture(kind: str, expected: dict[str, set[str]]) -> None:
    for role, fields in expected.items():
        config = AutoConfig.for_model(kind)
        before = config.to_dict()
        model.set_dropout(config, Dropout.model_validate({role: 0.37}))
        changed = {k for k, v in config.to_dict().items() if v != before.get(k)}
        assert changed == fields, role
        assert all(getattr(config, f) == 0.37 for f in fields)


def test_a_role_that_the_model_does_not_have_is_told_with_those_it_has() -> None:
    with pytest.raises(
        TrainingFailure, match=r"hyperparameters\.dropout\.hidden: llama has no such dropout, only: attention"
    ) as e:
        model.set_dropout(AutoConfig.for_model("llama"), Dropout(hidden=0.1))
    assert e.value.failure.reason == "RecipeInvalid"


def test_dropout_reaches_the_layers_of_the_model_that_is_trained(job: Job) -> None:
    recipe = job.recipe(hyperparameters={"dropout": {"hidden": 0.31, "attention": 0.0, "classifier": 0.42}})
    built = model.build(job.model, recipe, KIND, model.load_tokenizer(job.model, job.recipe()))
    rates = {name: m.p for name, m in built.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert rates["dropout"] == 0.42
    assert rates["bert.embeddings.dropout"] == 0.31
    assert {p for name, p in rates.items() if "attention.self" in name} <= {0.0}


def test_the_head_is_the_stock_one_with_the_labels_in_order(job: Job) -> None:
    built = model.build(job.model, job.recipe(), KIND, model.load_tokenizer(job.model, job.recipe()))
    assert type(built).__name__ == "BertForSequenceClassification"
    assert built.config.id2label == dict(enumerate(LABELS))
    assert built.config.label2id == {label: i for i, label in enumerate(LABELS)}
    assert {p.dtype for p in built.parameters()} == {torch.float32}


def test_a_head_for_other_labels_is_replaced(job: Job, tmp_path: Path) -> None:
    five = AutoModelForSequenceClassification.from_pretrained(job.model, num_labels=5)
    shutil.copytree(job.model, tmp_path / "five")
    five.save_pretrained(tmp_path / "five")
    built = model.build(tmp_path / "five", job.recipe(), KIND, model.load_tokenizer(job.model, job.recipe()))
    assert built.classifier.out_features == 3


def _fetch(job: Job, uri: str) -> Path:
    return model.fetch(uri, job.runtime())


def test_hub_names_are_looked_up_in_the_mirror(job: Job, tmp_path: Path) -> None:
    mirror = tmp_path / "mirror"
    shutil.copytree(job.model, mirror / "org/tiny")
    job.mirror = str(mirror)
    assert _fetch(job, "hf://org/tiny") == mirror / "org/tiny"


def test_a_mirror_may_be_in_s3(job: Job, tmp_path: Path) -> None:
    shutil.copytree(job.model, tmp_path / "s3/models/mirror/org/tiny")
    job.s3_root, job.mirror = tmp_path / "s3", "s3://models/mirror"
    assert (_fetch(job, "hf://org/tiny") / "model.safetensors").is_file()
    assert (_fetch(job, "s3://models/mirror/org/tiny") / "model.safetensors").is_file()


@pytest.fixture(params=["folder", "s3"])
def mirror(request: pytest.FixtureRequest, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a mirror of either kind that has org/tiny and, pinned, org/tiny@abc; the hub does not answer."""
    import huggingface_hub

    job.s3_root, folder = tmp_path / "s3", tmp_path / "s3/models/mirror"
    job.mirror = str(folder) if request.param == "folder" else "s3://models/mirror"
    for name in ("tiny", "tiny@abc"):
        shutil.copytree(job.model, folder / "org" / name)
        (folder / "org" / name / "which").write_text(name)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    return folder


def test_a_revision_is_a_folder_of_the_mirror(job: Job, mirror: Path) -> None:
    assert (_fetch(job, "hf://org/tiny@abc") / "which").read_text() == "tiny@abc"
    assert (_fetch(job, "hf://org/tiny") / "which").read_text() == "tiny"


def test_a_revision_that_the_mirror_lacks_is_not_replaced_by_another(job: Job, mirror: Path) -> None:
    # It was left out without a word: whoever had pinned a model got what was there.
    with pytest.raises(TrainingFailure, match=r"has org/tiny/, .* and not org/tiny@main/: .* leave out @main") as failed:
        _fetch(job, "hf://org/tiny@main")
    assert failed.value.failure.reason == "ModelNotFound"


@pytest.mark.parametrize("uri", ["hf://org/other", "hf://org/other@abc"])
def test_what_the_mirror_lacks_is_looked_up_at_the_hub(job: Job, mirror: Path, uri: str) -> None:
    # A mirror in S3 ended the search.
    with pytest.raises(TrainingFailure, match="not in the model mirror .* and the hub cannot be reached") as failed:
        _fetch(job, uri)
    assert failed.value.failure.reason == "ModelNotFound"


def test_two_models_in_one_work_folder_do_not_mix(job: Job, tmp_path: Path) -> None:
    for name, extra in (("one", "adapter_config.json"), ("two", "other.json")):
        shutil.copytree(job.model, tmp_path / "s3/models" / name)
        (tmp_path / "s3/models" / name / extra).write_text("{}")
    job.s3_root = tmp_path / "s3"
    runtime = job.runtime()  # as `finetune run` has it, run after run
    model.fetch("s3://models/one", runtime)
    found = {path.name for path in model.fetch("s3://models/two", runtime).iterdir()}
    assert found == {path.name for path in (tmp_path / "s3/models/two").iterdir()}
    (tmp_path / "s3/models/two/other.json").unlink()
    assert "other.json" not in {path.name for path in model.fetch("s3://models/two", runtime).iterdir()}


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _other_kind(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "no-such-architecture"}')


@pytest.mark.parametrize("spoil", [shutil.rmtree, _no_config, _no_weights, _other_kind])
def test_what_is_no_model_is_told(job: Job, tmp_path: Path, spoil: Any) -> None:
    folder = make_model(tmp_path / "spoilt")
    spoil(folder)
    job.model = folder
    with pytest.raises(TrainingFailure, match="model.uri file://") as failed:
        job.run()
    assert failed.value.failure.reason == "ModelNotFound"


def test_a_missing_prefix_in_s3_is_told(job: Job, tmp_path: Path) -> None:
    (tmp_path / "s3/models").mkdir(parents=True)
    job.s3_root = tmp_path / "s3"
    with pytest.raises(TrainingFailure, match="there are no files under s3://models/nothing") as failed:
        _fetch(job, "s3://models/nothing")
    assert failed.value.failure.reason == "ModelNotFound"


def test_more_tokens_than_the_model_has_positions_is_told(job: Job) -> None:
    with pytest.raises(TrainingFailure, match=r"dataset\.maxLength: 65 is more than the model's 64 positions") as failed:
        job.run(dataset={"maxLength": 65})
    assert failed.value.failure.reason == "RecipeInvalid"


@pytest.mark.parametrize("key", ["../../outside", "/etc/outside", "a/../../outside", "a\\..\\outside"])
def test_names_in_a_bucket_cannot_lead_out_of_the_folder(tmp_path: Path, key: str) -> None:
    class Bucket(FolderStore):
        def entries(self, prefix: str = "") -> dict[str, Stored]:
            return {"config.json": Stored(2, "1"), key: Stored(2, "1")}

        def download(self, key: str, path: Path, tell: Callable[[int], None] = nobody) -> None:
            raise AssertionError(f"{key} is written to {path}")

    with pytest.raises(TrainingFailure, match="is no name of a file below it"):
        fetch_folder(Bucket(tmp_path), tmp_path / "model")
