"""A model whose files lack a part of its body: BERT's pooler, where a masked language model was pretrained. It is as new as a head is."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from few_shot_kit import scores, tiny
from safetensors.torch import load_file, save_file
from test_best_model import LORA, WRECKING
from test_resume import EVERY_STEP
from trainer_kit import Job, Killed, merged, rows

from finetune_trainer import inference, model
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.tasks import kind_of

ALONE: dict[str, Any] = {"model": {"lora": {**LORA, "merge": False}}}
BASES = [
    ("bert", transformers.AutoModelForMaskedLM),
    ("bert", transformers.AutoModelForQuestionAnswering),  # whose head is for two labels, so that its body alone is taken over
    ("albert", transformers.AutoModelForMaskedLM),
]


@pytest.fixture(params=BASES, ids=lambda base: f"{base[0]}-{base[1].__name__.removeprefix('AutoModelFor')}")
def poolerless(request: pytest.FixtureRequest, job: Job, tmp_path: Path) -> Job:
    """A job whose model has no pooler in its files."""
    folder, (kind, auto) = tmp_path / "base", request.param
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.model)
    tokenizer.save_pretrained(folder)
    tiny(kind, auto, len(tokenizer)).save_pretrained(folder)
    assert not any("pooler" in name for name in load_file(folder / "model.safetensors"))
    return replace(job, model=folder)


@pytest.mark.parametrize(
    "poolerless", [BASES[0], BASES[2]], ids=["bert", "albert"], indirect=True
)  # which learn, and are wrecked
@pytest.mark.parametrize("changes", [ALONE, {"model": {"lora": LORA}}], ids=["adapters", "merged adapters"])
def test_it_comes_back_with_the_adapters_that_were_trained_beside_it(poolerless: Job, changes: dict[str, Any]) -> None:
    # It was drawn anew for the best model, and again for each prediction.
    end = poolerless.run(**merged(WRECKING, changes), evaluation={"bestMetric": "loss"})
    assert end.result is not None
    assert end.result.best_step != end.step, "otherwise this test shows nothing"
    told = {name: value for name, value in scores(poolerless).items() if name.startswith("validation/")}
    then = next(e for e in end.evaluations if e.step == end.result.best_step)
    assert told == pytest.approx({m.name: float(m.value) for m in then.metrics}, abs=1e-4)
    found = inference.load(poolerless.output / "model").evaluate(rows(15, offset=300)).values
    assert {f"test/{name}": value for name, value in found.items()} == pytest.approx(
        {name: value for name, value in scores(poolerless).items() if name.startswith("test/")}, rel=1e-3
    )
    if changes is ALONE:
        file = "adapter_model.safetensors"
        best = next(poolerless.checkpoints.glob(f"step-{end.result.best_step:08d}-*")) / "model" / file
        assert best.read_bytes() == (poolerless.output / "model" / file).read_bytes()


def test_it_trains_and_goes_on_bit_for_bit(poolerless: Job) -> None:
    whole, cut = (replace(poolerless, home=poolerless.home / name, changes=merged(EVERY_STEP, ALONE), runs=[]) for name in "ab")
    whole.run()
    with pytest.raises(Killed):
        cut.run(kill_at=9)
    cut.run()
    assert "going on from step" in cut.runs[-1].text
    file, steps = "adapter_model.safetensors", sorted(whole.checkpoints.glob("step-*"))
    assert (whole.output / "model" / file).read_bytes() == (cut.output / "model" / file).read_bytes()
    first, last = (load_file(step / "model" / file) for step in (steps[0], steps[-1]))
    poolers = [name for name in last if "pooler" in name]
    assert poolers
    assert all((first[name] != last[name]).any() for name in poolers)
    saved = json.loads((whole.output / "model/adapter_config.json").read_text())["modules_to_save"]
    assert any("pooler" in name for name in saved), "whoever puts them on the model with peft finds them"


def test_adapters_of_a_version_that_did_not_train_it_are_told(poolerless: Job) -> None:
    poolerless.run(**ALONE)
    folder, recipe = poolerless.output / "model", poolerless.recipe(**ALONE)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: weight for name, weight in weights.items() if "pooler" not in name}, folder / "adapter_model.safetensors")
    tokenizer = model.load_tokenizer(folder, recipe)
    with pytest.raises(TrainingFailure, match=r"adapter_model\.safetensors has no .*pooler.*output\.storageUri") as failed:
        model.build(poolerless.model, recipe, kind_of(recipe.task, recipe.dataset), tokenizer, folder)
    assert failed.value.failure.reason == "CheckpointCorrupt"
