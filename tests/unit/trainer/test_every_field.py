"""Every field of the recipe changes training in the way it says: which test shows it, and a test that no field is without one.

A new field is a line in EVIDENCE. What counts is a test that fails when the trainer ignores the field; that it is accepted shows nothing.
Tests that a field has to itself alone and that fit nowhere else stand below the table.
"""

import ast
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainer_kit import LABELS, Job, make_model, merged

from finetune_api.base import Model
from finetune_api.hyperparameters import Freeze, Hyperparameters, Unfreeze
from finetune_api.recipe import Recipe
from finetune_trainer import layers, model, optim
from finetune_trainer.splits import read_splits
from finetune_trainer.tasks import Encoded, Examples, Ragged, kind_of

UNIT = Path(__file__).parents[1]
HERE = "test_every_field"

EVIDENCE: dict[str, str] = {
    # field: module::function below tests/unit/trainer (or folder/module below tests/unit)
    "task": "test_tasks::test_the_loss_is_the_stock_models_own",
    "model.uri": f"{HERE}::test_training_starts_from_the_model_that_is_named",
    "model.pooling": "test_pooling::test_the_result_is_the_encoder_as_it_was_and_a_head_that_has_learned",
    "model.lora": "test_tasks::test_adapters_learn_and_are_merged_into_a_stock_model",
    "model.lora.rank": f"{HERE}::test_an_adapter_is_what_its_fields_say",
    "model.lora.alpha": f"{HERE}::test_an_adapter_is_what_its_fields_say",
    "model.lora.dropout": f"{HERE}::test_the_dropout_of_adapters_is_theirs_alone",
    "model.lora.targetModules": f"{HERE}::test_an_adapter_is_what_its_fields_say",
    "model.lora.merge": "test_tasks::test_an_adapter_alone_is_small_and_is_put_on_its_model",
    "dataset.uri": f"{HERE}::test_examples_are_read_from_where_the_recipe_says",
    "dataset.train": f"{HERE}::test_examples_are_read_from_where_the_recipe_says",
    "dataset.validation": f"{HERE}::test_examples_are_read_from_where_the_recipe_says",
    "dataset.test": f"{HERE}::test_examples_are_read_from_where_the_recipe_says",
    "dataset.textColumn": f"{HERE}::test_examples_are_read_from_where_the_recipe_says",
    "dataset.textPairColumn": f"{HERE}::test_the_model_reads_both_texts_of_a_pair",
    "dataset.labelColumn": f"{HERE}::test_examples_are_read_from_where_the_recipe_says",
    "dataset.labels": "test_model::test_the_head_is_the_stock_one_with_the_labels_in_order",
    "dataset.multiLabel": f"{HERE}::test_examples_are_read_from_where_the_recipe_says",
    "dataset.multiLabel.separator": f"{HERE}::test_examples_are_read_from_where_the_recipe_says",
    "dataset.multiLabel.threshold": f"{HERE}::test_a_label_is_predicted_from_its_threshold_on",
    "dataset.promptColumn": f"{HERE}::test_examples_are_read_from_where_the_recipe_says",
    "dataset.completionColumn": f"{HERE}::test_examples_are_read_from_where_the_recipe_says",
    "dataset.messagesColumn": f"{HERE}::test_examples_are_read_from_where_the_recipe_says",
    "dataset.validationFraction": "test_splits::test_validation_is_held_out_of_train",
    "dataset.splitGroupColumn": "test_splits::test_whole_customers_are_held_out",
    "dataset.groupColumn": "test_splits::test_what_is_told_of_groups_is_bounded",
    "dataset.maxBadRows": "test_splits::test_bad_rows_are_borne_up_to_a_number_over_all_files",
    "dataset.fewShot": "test_few_shot::test_a_run_trains_on_the_sample_and_scores_on_everything",
    "dataset.fewShot.examplesPerClass": "test_few_shot::test_a_run_trains_on_the_sample_and_scores_on_everything",
    "dataset.prompt": "test_prompts::test_training_and_prediction_read_the_same_text",
    "dataset.prompt.template": "test_prompts::test_training_and_prediction_read_the_same_text",
    "dataset.prompt.verbalizers": "test_cloze::test_a_masked_language_model_learns_to_fill_in_the_labels_word",
    "dataset.maxLength": f"{HERE}::test_no_text_is_longer_than_max_length",
    "hyperparameters.learningRate": f"{HERE}::test_the_first_step_is_as_long_as_the_rate_and_the_schedule_say",
    "hyperparameters.batchSize": f"{HERE}::test_steps_follow_from_batch_size_and_epochs",
    "hyperparameters.epochs": f"{HERE}::test_steps_follow_from_batch_size_and_epochs",
    "hyperparameters.maxSteps": "test_levers::test_max_steps_end_training_and_the_schedule",
    "hyperparameters.microBatchSize": "test_memory::test_the_gradient_is_that_of_the_whole_batch",
    "hyperparameters.strategy": "test_sharding::test_it_learns_what_one_process_does",
    "hyperparameters.compile": "test_compiling::test_compiled_it_learns_the_same",
    "hyperparameters.deterministic": "test_compiling::test_deterministic_is_said_to_torch_and_changes_nothing_on_a_cpu",
    "hyperparameters.weightDecay": f"{HERE}::test_weights_decay_beside_the_gradient",
    "hyperparameters.layerwiseDecay": "test_levers::test_the_rate_decays_layer_by_layer",
    "hyperparameters.freeze.embeddings": "test_levers::test_what_is_frozen_keeps_its_weights",
    "hyperparameters.freeze.layers": "test_levers::test_what_is_frozen_keeps_its_weights",
    "hyperparameters.freeze.patterns": "test_levers::test_what_is_frozen_keeps_its_weights",
    "hyperparameters.unfreeze": "test_levers::test_layers_thaw_from_the_top_and_a_resume_goes_on",
    "hyperparameters.unfreeze.everyEpochs": f"{HERE}::test_layers_thaw_every_so_many_epochs",
    "hyperparameters.labelSmoothing": "test_levers::test_labels_are_smoothed",
    "hyperparameters.adversarial": "test_levers::test_fgm_adds_the_gradient_of_the_moved_batch",
    "hyperparameters.adversarial.method": "test_levers::test_fgm_adds_the_gradient_of_the_moved_batch",
    "hyperparameters.adversarial.epsilon": "test_levers::test_fgm_adds_the_gradient_of_the_moved_batch",
    "hyperparameters.precision": "test_levers::test_sixteen_bits_train_and_go_on_bit_for_bit",
    "hyperparameters.gradientCheckpointing": f"{HERE}::test_gradient_checkpointing_computes_layers_again",
    "hyperparameters.maxGradNorm": f"{HERE}::test_gradients_are_scaled_down_to_their_limit",
    "hyperparameters.dropout.hidden": "test_model::test_dropout_reaches_the_layers_of_the_model_that_is_trained",
    "hyperparameters.dropout.attention": "test_model::test_dropout_reaches_the_layers_of_the_model_that_is_trained",
    "hyperparameters.dropout.classifier": "test_model::test_dropout_reaches_the_layers_of_the_model_that_is_trained",
    "hyperparameters.schedule.type": f"{HERE}::test_the_rate_of_every_step_is_the_schedules",
    "hyperparameters.schedule.warmup": f"{HERE}::test_the_rate_of_every_step_is_the_schedules",
    "hyperparameters.schedule.minFactor": "test_levers::test_it_does_not_fall_below_min_factor",
    "hyperparameters.schedule.cycles": "test_levers::test_schedules_are_those_of_transformers",
    "hyperparameters.schedule.power": "test_levers::test_schedules_are_those_of_transformers",
    "hyperparameters.schedule.decay": "test_levers::test_inverse_sqrt_and_stable_decay_are_those_of_transformers",
    "hyperparameters.schedule.factor": "test_levers::test_the_rate_falls_when_the_metric_stands_still",
    "hyperparameters.schedule.patience": "test_levers::test_the_rate_falls_when_the_metric_stands_still",
    "hyperparameters.earlyStopping": "test_outcomes::test_early_stopping_ends_training",
    "hyperparameters.earlyStopping.patience": "test_outcomes::test_early_stopping_ends_training",
    "hyperparameters.earlyStopping.minDelta": f"{HERE}::test_a_small_improvement_is_none",
    "hyperparameters.seed": f"{HERE}::test_the_seed_draws_head_order_and_dropout",
    "evaluation.everyEpochs": "test_outcomes::test_evaluations_come_every_so_many_epochs_and_at_the_end",
    "evaluation.everySteps": f"{HERE}::test_evaluations_and_checkpoints_come_every_so_many_steps",
    "evaluation.atExamples": "trainer/test_rungs::test_it_evaluates_at_the_first_step_behind_each_rung",
    "evaluation.bestMetric": "test_outcomes::test_the_best_model_is_restored_and_not_the_last",
    "checkpoint.storageUri": f"{HERE}::test_evaluations_and_checkpoints_come_every_so_many_steps",
    "checkpoint.everySteps": f"{HERE}::test_evaluations_and_checkpoints_come_every_so_many_steps",
    "checkpoint.everySeconds": "trainer/test_saving::test_saves_by_the_clock",
    "checkpoint.whenBusy": "trainer/test_saving::test_a_save_that_is_due_while_one_is_uploading_waits_or_is_skipped",
    "checkpoint.onSuspend": "operator/test_suspending::test_a_suspension_that_discards_ends_the_pods_at_once",
    "checkpoint.onStop": "operator/test_suspending::test_a_stop_that_discards_ends_the_pods_at_once",
    "checkpoint.keepLast": f"{HERE}::test_evaluations_and_checkpoints_come_every_so_many_steps",
    "checkpoint.saveDeadlineSeconds": "operator/test_child::test_the_pod_has_as_long_to_save_as_the_recipe_says",
    "output.storageUri": f"{HERE}::test_results_go_where_the_recipe_says",
    "output.overwrite": "test_outcomes::test_another_recipes_result_is_kept_unless_told_otherwise",
}


# -------------------------------------------------------------------------------------------------------- the table ----
def models_in(annotation: Any) -> list[type[Model]]:
    if isinstance(annotation, type) and issubclass(annotation, Model):
        return [annotation]
    return [found for inner in get_args(annotation) for found in models_in(inner)]


def fields(of: type[Model], path: str = "") -> list[str]:
    """Dotted names of all that can be written: values, and parts that may be there or not."""
    found: list[str] = []
    for name, field in of.model_fields.items():
        here, inner = f"{path}{field.alias or name}", models_in(field.annotation)
        found += [] if inner == [field.annotation] else [here]
        found += [deeper for part in inner for deeper in fields(part, f"{here}.")]
    return found


def test_every_field_has_evidence() -> None:
    known = fields(Recipe)
    assert len(known) > 60
    assert [f for f in known if f not in EVIDENCE] == [], "which test fails when the trainer ignores it? A line in EVIDENCE"
    assert [f for f in EVIDENCE if f not in known] == [], "no field of the recipe any more"


def test_the_evidence_is_there() -> None:
    functions: dict[str, set[str]] = {}
    for where in EVIDENCE.values():
        module, _, function = where.partition("::")
        path = UNIT / f"{module if '/' in module else f'trainer/{module}'}.py"
        if module not in functions:
            tree = ast.parse(path.read_text())
            functions[module] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert function in functions[module], f"{path.relative_to(UNIT)} has no {function}"


# ----------------------------------------------------------------------------------------------------------- helpers ----
PLAIN: dict[str, Any] = {"precision": "FP32", "dropout": {"hidden": 0.0, "attention": 0.0, "classifier": 0.0}}


def after(job: Job, name: str, hyperparameters: dict[str, Any] | None = None, **more: Any) -> Job:
    """A whole run without dropout, in 32 bits."""
    changes = merged({"hyperparameters": merged(PLAIN, hyperparameters or {})}, more)
    done = replace(job, home=job.home / name, changes=changes, runs=[])
    done.run()
    return done


def weights(job: Job) -> dict[str, torch.Tensor]:
    return {n.removeprefix("bert."): w.double() for n, w in load_file(job.output / "model/model.safetensors").items()}


def pretrained(job: Job) -> dict[str, torch.Tensor]:
    return {name: w.double() for name, w in load_file(job.model / "model.safetensors").items()}


def result(job: Job) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((job.output / "result.json").read_text())
    return found


# ------------------------------------------------------------------------------------------------------------- model ----
def test_training_starts_from_the_model_that_is_named(job: Job, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other")
    table = load_file(other / "model.safetensors")
    save_file(
        {n: w + 1 if "word_embeddings" in n else w for n, w in table.items()}, other / "model.safetensors", {"format": "pt"}
    )
    done = after(replace(job, model=other), "other", {"learningRate": 1e-9, "maxSteps": 1})
    name = "embeddings.word_embeddings.weight"
    assert torch.allclose(weights(done)[name], pretrained(job)[name] + 1, atol=1e-6)


def test_an_adapter_is_what_its_fields_say(job: Job) -> None:
    short = {"epochs": 1, "learningRate": 0.01}
    lora = {"rank": 4, "alpha": 12, "targetModules": ["query"]}
    alone = after(job, "alone", short, model={"lora": lora | {"merge": False}})
    whole = after(job, "whole", short, model={"lora": lora})
    adapter = load_file(alone.output / "model/adapter_model.safetensors")
    names = sorted({name.partition(".lora_")[0] for name in adapter if ".lora_" in name})
    assert names == [f"base_model.model.bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)]
    for name in names:
        a, b = (adapter[f"{name}.lora_{side}.weight"].double() for side in "AB")
        assert (a.shape, b.shape) == ((4, 16), (16, 4))
        plain = f"{name.removeprefix('base_model.model.bert.')}.weight"
        added = weights(whole)[plain] - pretrained(job)[plain]
        assert added.norm() > 1e-4
        assert torch.allclose(added, 12 / 4 * b @ a, atol=1e-6)


def test_the_dropout_of_adapters_is_theirs_alone(job: Job) -> None:
    recipe = job.recipe(model={"lora": {"dropout": 0.37}})
    kind = kind_of(recipe.task, recipe.dataset)
    built = model.build(job.model, recipe, kind, model.load_tokenizer(job.model, recipe))
    rates = {name: m.p for name, m in built.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert {rate for name, rate in rates.items() if "lora_dropout" in name} == {0.37}
    assert {rate for name, rate in rates.items() if "lora_dropout" not in name} == {0.1}


# -------------------------------------------------------------------------------------------------------------- data ----
ROW = {
    "text": "it was good",
    "words": "my box",
    "label": "positive",
    "mood": "negative",
    "many": "negative;positive",
    "talk": [{"role": "user", "content": "slow"}, {"role": "assistant", "content": "bad"}],
}
CAUSAL = {"task": "CausalLM", "dataset": {"labels": None, "promptColumn": "words", "completionColumn": "mood"}}
READ: dict[str, tuple[dict[str, Any], Any, Any]] = {
    # what is changed: text and label of the first example
    "nothing": ({}, "it was good", 2),
    "textColumn": ({"dataset": {"textColumn": "words"}}, "my box", 2),
    "labelColumn": ({"dataset": {"labelColumn": "mood"}}, "it was good", 0),
    "labels": ({"dataset": {"labels": LABELS[::-1]}}, "it was good", 0),
    "textPairColumn": ({"dataset": {"textPairColumn": "words"}}, ("it was good", "my box"), 2),
    "multiLabel": ({"dataset": {"multiLabel": {}, "labelColumn": "label"}}, "it was good", [0, 0, 1]),
    "separator": ({"dataset": {"multiLabel": {"separator": ";"}, "labelColumn": "many"}}, "it was good", [1, 0, 1]),
    "promptColumn": (CAUSAL, "my box", "negative"),
    "completionColumn": (merged(CAUSAL, {"dataset": {"completionColumn": "label"}}), "my box", "positive"),
    "messagesColumn": ({"task": "CausalLM", "dataset": {"labels": None, "messagesColumn": "talk"}}, ROW["talk"], ""),
}


@pytest.mark.parametrize("case", READ)
def test_examples_are_read_from_where_the_recipe_says(job: Job, tmp_path: Path, case: str) -> None:
    changes, text, label = READ[case]
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "validation.csv").write_text("text,label\nnot this one,neutral\n")
    others = [dict(ROW, label=name, mood=name, many=name) for name in LABELS]
    for name, count in (("learn", 3), ("judge", 2), ("prove", 1)):
        # Its own texts in each split: what validation and test have leaves train.
        own = {} if name == "learn" else {"text": name, "words": name, "talk": [{"role": "assistant", "content": name}]}
        lines = [json.dumps(row | own) for row in (ROW, *others, *others)[: count + 1]]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    files = {"uri": f"file://{folder}", "train": "learn.jsonl", "validation": "judge.jsonl", "test": "prove.jsonl"}
    splits, _ = read_splits(job.recipe(**merged({"dataset": files}, changes)), job.runtime(), lambda _: None)
    assert {name: len(split) for name, split in splits.items()} == {"train": 4, "validation": 3, "test": 2}
    assert splits["train"].texts[0] == text
    assert np.array_equal(np.asarray(splits["train"].labels[0]), np.asarray(label))


def encoded(job: Job, texts: list[Any], **dataset: Any) -> tuple[Encoded, Any]:
    recipe = job.recipe(dataset=dataset)
    kind = kind_of(recipe.task, recipe.dataset)
    tokenizer = model.load_tokenizer(job.model, recipe)
    return kind.encode(Examples("some", texts, np.zeros(len(texts), int)), tokenizer, recipe.dataset.max_length), tokenizer


def test_the_model_reads_both_texts_of_a_pair(job: Job) -> None:
    pair, tokenizer = encoded(job, [("it was good", "my box")], textPairColumn="words")
    read = tokenizer.decode(pair.ids[0])
    assert read.index("it was good") < read.index("my box")


def test_no_text_is_longer_than_max_length(job: Job) -> None:
    for length in (8, 12):
        cut, _ = encoded(job, ["good " * 20, "bad"], maxLength=length)
        assert ([len(row) for row in cut.ids], cut.truncated) == ([length, 3], 1)


def test_a_label_is_predicted_from_its_threshold_on(job: Job) -> None:
    outputs = np.log(np.array([[0.6, 0.3, 0.1]]) / (1 - np.array([[0.6, 0.3, 0.1]])))
    found = {}
    for threshold in (0.2, 0.5, 0.8):
        recipe = job.recipe(dataset={"multiLabel": {"threshold": threshold}})
        kind = kind_of(recipe.task, recipe.dataset)
        data = Encoded(Ragged.of([[2, 3]]), np.array([[1, 0, 0]], dtype=np.float32), 0)
        found[threshold] = (kind.answer(outputs, data, ["x"])[0]["labels"], kind.score(outputs, data).values["accuracy"])
    assert found == {0.2: (["negative", "neutral"], 0), 0.5: (["negative"], 1), 0.8: ([], 0)}


# --------------------------------------------------------------------------------------------------- hyperparameters ----
def test_steps_follow_from_batch_size_and_epochs(job: Job) -> None:
    for size, epochs in ((8, 1), (8, 2), (11, 2), (64, 3)):
        done = result(after(job, f"{size}-{epochs}", {"batchSize": size, "epochs": epochs}))
        assert (done["steps"], done["examples"]) == (epochs * -(-44 // size), epochs * 44)


def test_the_first_step_is_as_long_as_the_rate_and_the_schedule_say(job: Job) -> None:
    # From zero moments AdamW moves each weight by the rate, in the direction of its gradient; biases do not decay.
    for rate, warmup in ((1e-3, 0), (4e-3, 0), (4e-3, 4)):
        hyper = {"learningRate": rate, "maxSteps": 1, "schedule": {"type": "Constant", "warmup": warmup}}
        done = after(job, f"{rate}-{warmup}", hyper)
        moves = [(w - pretrained(job)[n]).abs().max() for n, w in weights(done).items() if n.endswith("output.dense.bias")]
        assert max(moves).item() == pytest.approx(rate / max(1, warmup), rel=1e-2)


def test_the_rate_of_every_step_is_the_schedules(job: Job) -> None:
    for schedule in ({"type": "Cosine", "warmup": 0.25}, {"type": "WarmupStableDecay", "warmup": 2, "decay": 0.5}):
        done = after(job, str(schedule["type"]), {"learningRate": 2e-3, "epochs": 2, "schedule": schedule})
        events = EventAccumulator(str(next((done.output / "logs").iterdir())))
        events.Reload()
        rates = {event.step: event.value for event in events.Scalars("train/learning_rate")}
        asked = done.recipe().hyperparameters.schedule
        assert rates == {step: pytest.approx(2e-3 * optim.factor(asked, step - 1, 12), rel=1e-5) for step in range(2, 13)}


def test_weights_decay_beside_the_gradient(job: Job) -> None:
    hyper = {"learningRate": 0.01, "maxSteps": 1, "schedule": {"type": "Constant", "warmup": 0}}
    without, decayed = (weights(after(job, f"{d}", hyper | {"weightDecay": d})) for d in (0.0, 0.5))
    for name, before in pretrained(job).items():
        expected = 0.01 * 0.5 * before if before.ndim > 1 else torch.zeros_like(before)
        assert torch.allclose(without[name] - decayed[name], expected, atol=1e-6), name


def first_gradient(job: Job, name: str, hyperparameters: dict[str, Any]) -> torch.Tensor:
    """AdamW's first moment after one step from zero is the gradient times 1 - beta1."""
    done = after(job, name, {"maxSteps": 1, **hyperparameters})
    moments = load_file(done.newest() / "trainer/optimizer.safetensors")
    return torch.cat([moments[n].flatten().double() for n in sorted(moments) if n.endswith("exp_avg")]) / 0.1


def test_gradients_are_scaled_down_to_their_limit(job: Job) -> None:
    norms = {x: first_gradient(job, f"{x}", {"maxGradNorm": x}).norm().item() for x in (1e-3, 1e-2, 1e6)}
    assert (norms[1e-3], norms[1e-2]) == (pytest.approx(1e-3, rel=1e-3), pytest.approx(1e-2, rel=1e-3))
    assert norms[1e6] > 0.1, "otherwise this test shows nothing"


def test_the_seed_draws_head_order_and_dropout(job: Job) -> None:
    fresh = [weights(after(job, f"head-{seed}", {"seed": seed, "learningRate": 1e-9, "maxSteps": 1})) for seed in (1, 2)]
    assert not torch.allclose(fresh[0]["classifier.weight"], fresh[1]["classifier.weight"], atol=1e-3)
    trained = replace(job, model=after(job, "trained").output / "model")  # its head is kept, so that it is not drawn

    def difference(name: str, **hyper: Any) -> float:
        a, b = (first_gradient(trained, f"{name}-{seed}", {"seed": seed, **hyper}) for seed in (1, 2))
        return float((a - b).norm() / a.norm())

    assert difference("nothing", batchSize=64) < 1e-4, "all rows in one batch, and nothing drawn"
    assert difference("dropout", batchSize=64, dropout={"hidden": 0.3}) > 0.01
    assert difference("order", batchSize=8) > 0.01


def test_layers_thaw_every_so_many_epochs(job: Job) -> None:
    recipe = job.recipe()
    built = model.build(job.model, recipe, kind_of(recipe.task, recipe.dataset), model.load_tokenizer(job.model, recipe))
    for every in (1, 2):
        hyper = Hyperparameters(freeze=Freeze(embeddings=True, layers=2), unfreeze=Unfreeze(every_epochs=every))
        trained = [layers.trainable(built, hyper, epoch) for epoch in range(8)]
        since = [
            next(epoch for epoch, names in enumerate(trained) if any(on for n, on in names.items() if n.startswith(part)))
            for part in ("classifier.", "bert.encoder.layer.1.", "bert.encoder.layer.0.", "bert.embeddings.")
        ]
        assert since == [0, every, 2 * every, 3 * every]


def test_gradient_checkpointing_computes_layers_again(job: Job) -> None:
    calls = {}
    for wanted in (False, True):
        recipe = job.recipe(hyperparameters={"gradientCheckpointing": wanted})
        kind = kind_of(recipe.task, recipe.dataset)
        built = model.build(job.model, recipe, kind, model.load_tokenizer(job.model, recipe)).train()
        count = []
        built.bert.encoder.layer[0].attention.self.register_forward_hook(lambda *_, count=count: count.append(1))
        ids = torch.randint(4, 20, (2, 6))
        built(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
        calls[wanted] = len(count)
    assert calls == {False: 1, True: 2}


def test_a_small_improvement_is_none(job: Job) -> None:
    hyper = {"epochs": 8, "learningRate": 0.01}
    losses = {"evaluation": {"bestMetric": "loss"}}
    patient = after(job, "patient", hyper | {"earlyStopping": {"patience": 2}}, **losses)
    strict = after(job, "strict", hyper | {"earlyStopping": {"patience": 2, "minDelta": 100.0}}, **losses)
    assert result(patient)["steps"] > 18, "otherwise this test shows nothing"
    assert result(strict)["steps"] == 18, "the first evaluation is the mark, two more do not improve enough"


# ----------------------------------------------------------------------------------------------- when, where, how many ----
def test_evaluations_and_checkpoints_come_every_so_many_steps(job: Job, tmp_path: Path) -> None:
    def steps(every: int, keep: int, evaluate: int) -> tuple[list[int], list[int]]:
        place = tmp_path / f"{every}-{keep}"
        policy = {"everySteps": every, "keepLast": keep, "storageUri": f"file://{place}"}
        done = after(job, place.name, checkpoint=policy, evaluation={"everySteps": evaluate})
        assert not done.checkpoints.exists()
        saved = {int(p.parent.name.split("-")[1]) for p in place.glob("step-*/MANIFEST.json")}
        # An evaluation that is the best so far is saved as well.
        return [e["step"] for e in result(done)["evaluations"]], sorted(step for step in saved if step % every == 0)

    assert steps(4, 2, 18) == ([18], [16]), "18 is the other one"
    assert steps(4, 3, 18) == ([18], [12, 16])
    assert steps(5, 10, 7) == ([7, 14, 18], [5, 10, 15])


def test_results_go_where_the_recipe_says(job: Job, tmp_path: Path) -> None:
    end = job.run(output={"storageUri": f"file://{tmp_path}/there"})
    assert end.result is not None
    assert end.result.model_uri == f"file://{tmp_path}/there/model"
    assert {p.name for p in (tmp_path / "there").iterdir()} == {"model", "result.json", "logs", "checkpoints"}
    assert not job.output.exists()
