"""Learning from few examples: samples of the data, mean pooling on a frozen encoder, prompt templates, cloze questions."""

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from trainer_kit import LABELS, WORDS, Job, Killed, ScriptedConsole, make_model, merged, rows

from finetune_api.few_shot import Prompt
from finetune_api.manifest import load_job_file
from finetune_api.recipe import Dataset
from finetune_api.tasks import Task
from finetune_trainer import inference, layers, model, pooling
from finetune_trainer.data import collate
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.few_shot import few_shot
from finetune_trainer.run import Run
from finetune_trainer.tasks import Encoded, Examples, kind_of
from finetune_trainer.tasks.cloze import Cloze
from finetune_trainer.tasks.template import Template

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
CPU = torch.device("cpu")
ENCODERS = ("bert", "roberta", "distilbert", "deberta-v2", "electra", "albert", "modernbert", "mpnet", "xlm-roberta")


def result(job: Job) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((job.output / "result.json").read_text())
    return found


def scores(job: Job) -> dict[str, float]:
    return {m["name"]: float(m["value"]) for m in result(job)["result"]["metrics"]}


def refused(job: Job) -> str:
    """The message of a run that says what is wrong with its recipe."""
    with pytest.raises(TrainingFailure) as failed:
        job.run()
    assert failed.value.failure.reason == "RecipeInvalid"
    return failed.value.message


def tiny(kind: str, auto: Any, vocabulary: int) -> Any:
    """A small model of an architecture, the same at every call."""
    own: dict[str, dict[str, Any]] = {
        "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
        "electra": {"embedding_size": 16},
        "albert": {"embedding_size": 16},
        "modernbert": {"layer_types": ["full_attention", "sliding_attention"]},
    }
    usual = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "pad_token_id": 0}
    sizes = {} if kind == "distilbert" else {**usual, "max_position_embeddings": 66}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return auto.from_config(
            transformers.AutoConfig.for_model(kind, vocab_size=vocabulary, **sizes, **own.get(kind, {}))
        ).eval()


# ---------------------------------------------------------------------------------------------------------- few shot ----
@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 10), st.integers(0, 2**31 - 1))
def test_a_sample_has_k_of_each_class_in_the_order_of_the_file(ids: list[int], k: int, seed: int) -> None:
    texts = [str(row) for row in range(len(ids))]
    taken = few_shot(Examples("train.csv", texts, np.array(ids)), k, seed)
    assert [int(text) for text in taken.texts] == sorted({int(text) for text in taken.texts})
    assert [ids[int(text)] for text in taken.texts] == taken.labels.tolist()
    for label in set(ids):
        assert taken.labels.tolist().count(label) == min(k, ids.count(label))
    more = few_shot(Examples("train.csv", texts, np.array(ids)), k + 1, seed)
    assert set(taken.texts) <= set(more.texts)


def test_the_draw_is_the_seeds_and_no_other_classs() -> None:
    ids = np.array([0, 1, 2] * 40)
    texts = [f"{i}" for i in range(len(ids))]

    def drawn(seed: int, labels: Any, of: int, last: int = len(texts)) -> list[str]:
        taken = few_shot(Examples("x", texts[:last], labels[:last]), 5, seed)
        return [text for text, label in zip(taken.texts, taken.labels, strict=True) if label == of]

    assert drawn(1, ids, 0) == drawn(1, ids, 0)
    assert drawn(1, ids, 0) != drawn(2, ids, 0)
    assert drawn(1, ids, 0) == drawn(1, np.where(ids == 2, 1, ids), 0)
    assert drawn(1, ids, 0) == drawn(1, ids, 0, last=118), "without the last row of each other class"
    assert drawn(1, ids, 0)[:3] != [text for text in texts if ids[int(text)] == 0][:3], "not simply the first"


def test_a_run_trains_on_the_sample_and_scores_on_everything(job: Job) -> None:
    job.changes = {"dataset": {"fewShot": {"examplesPerClass": 4}}}
    job.run()
    assert "data: 12 train, 18 validation, 15 test examples" in job.runs[0].text
    assert result(job)["examples"] == 3 * 12
    assert "fewer than" not in job.runs[0].text


def test_a_class_with_fewer_examples_is_told(job: Job) -> None:
    job.changes = {"dataset": {"fewShot": {"examplesPerClass": 15}}}
    job.run()
    assert "fewer than 15 examples, all are taken: positive has 14\n" in job.runs[0].text
    assert "data: 44 train" in job.runs[0].text


# ------------------------------------------------------------------------------------------------------ mean pooling ----
MEAN: dict[str, Any] = {"model": {"pooling": "Mean"}, "hyperparameters": {"learningRate": None, "epochs": 3}}
EVERY: dict[str, Any] = {"checkpoint": {"everySteps": 1}}


def mean(job: Job, name: str = "mean", **changes: Any) -> Job:
    return replace(job, home=job.home / name, changes=merged(MEAN, changes), runs=[])


def features_of(folder: Path, texts: list[str]) -> Any:
    """Attention-masked means, text by text."""
    encoder, tokenizer = (auto.from_pretrained(folder) for auto in (transformers.AutoModel, transformers.AutoTokenizer))
    with torch.inference_mode():
        return np.stack([encoder.eval()(**tokenizer([t], return_tensors="pt")).last_hidden_state[0].mean(dim=0) for t in texts])


def test_the_result_is_the_encoder_as_it_was_and_a_head_that_has_learned(job: Job) -> None:
    done = mean(job)
    done.run()
    folder = done.output / "model"
    before, after = (transformers.AutoModel.from_pretrained(f).state_dict() for f in (job.model, folder))
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert json.loads((folder / "finetune.json").read_text())["pooling"] == "Mean"
    head = load_file(folder / "head.safetensors")
    texts = [row["text"] for row in rows(44)]
    inputs = features_of(job.model, texts)
    np.testing.assert_allclose(head["center"], inputs.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(head["scale"], np.sqrt(((inputs - inputs.mean(axis=0)) ** 2).mean()), atol=1e-5)
    logits = (inputs - head["center"].numpy()) / head["scale"].numpy() @ head["weight"].numpy().T + head["bias"].numpy()
    odds = torch.softmax(torch.from_numpy(logits), dim=1).numpy()
    answers = inference.load(folder).predict(texts)
    np.testing.assert_allclose([list(a["probabilities"].values()) for a in answers], odds, atol=1e-5)
    told = result(done)
    assert (told["resolved"]["learningRate"], told["resolved"]["precision"]) == (0.01, "FP32")
    losses = [float(m["value"]) for e in told["evaluations"] for m in e["metrics"] if m["name"] == "validation/loss"]
    assert losses[-1] < losses[0] < np.log(3)
    assert "the encoder has read 77 texts" in done.runs[0].text


def test_the_encoder_reads_every_text_once(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    pooled = pooling.MeanPooled.pooled

    def counted(self: Any, attention_mask: Any, **tokens: Any) -> Any:
        seen.append(len(attention_mask))
        return pooled(self, attention_mask, **tokens)

    monkeypatch.setattr(pooling.MeanPooled, "pooled", counted)
    mean(job, hyperparameters={"epochs": 20}).run()
    assert sum(seen) == 44 + 18 + 15


def test_a_checkpoint_holds_the_head_alone(job: Job) -> None:
    done = mean(job)
    done.run()
    assert (done.newest() / "model/head.safetensors").exists()
    assert not list(done.newest().rglob("model.safetensors"))


@pytest.mark.parametrize("kill_at", [1, 8, 13])
def test_a_killed_run_goes_on_bit_for_bit(job: Job, kill_at: int) -> None:
    changes = merged(EVERY, {"hyperparameters": {"dropout": {"classifier": 0.3}}})
    whole, cut = mean(job, "whole", **changes), mean(job, "cut", **changes)
    whole.run()
    with pytest.raises(Killed):
        cut.run(kill_at=kill_at)
    cut.run()
    for file in ("model/head.safetensors", "model/model.safetensors"):
        assert (whole.output / file).read_bytes() == (cut.output / file).read_bytes()
    assert (whole.newest() / "trainer/optimizer.safetensors").read_bytes() == (
        cut.newest() / "trainer/optimizer.safetensors"
    ).read_bytes()
    for key in ("evaluations", "perClass", "resolved"):
        assert result(whole)[key] == result(cut)[key]


def test_early_stopping_restores_the_best_head(job: Job) -> None:
    policy = {"learningRate": 10.0, "epochs": 30, "earlyStopping": {"patience": 3}}
    done = mean(job, hyperparameters=policy, evaluation={"bestMetric": "loss"})
    done.run()
    told = result(done)
    losses = {e["step"]: float(m["value"]) for e in told["evaluations"] for m in e["metrics"] if m["name"] == "validation/loss"}
    assert len(losses) < 30
    assert told["result"]["bestStep"] == min(losses, key=losses.__getitem__) != max(losses)
    assert scores(done)["validation/loss"] == pytest.approx(min(losses.values()), rel=1e-4)


def test_it_says_the_same_of_a_file_later(job: Job) -> None:
    done = mean(job)
    done.run()
    again = inference.load(done.output / "model").evaluate(rows(15, offset=300)).values
    for name, value in again.items():
        assert value == pytest.approx(scores(done)[f"test/{name}"], rel=1e-4), name


@pytest.mark.parametrize("task", ["Regression", "multi"])
def test_numbers_and_several_labels_are_learned_too(job: Job, tmp_path: Path, task: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name, count, offset in (("train", 44, 0), ("validation", 18, 100), ("test", 15, 300)):
        lines = []
        for row in rows(count, offset):
            said = [n for n in LABELS if set(WORDS[n]) & set(row["text"].split())]
            score = 2000.0 + 300 * ("positive" in said) - 300 * ("negative" in said)
            lines.append(json.dumps({"text": row["text"], "label": said if task == "multi" else score}))
        (data / f"{name}.jsonl").write_text("\n".join(lines))
    files = {split: f"{split}.jsonl" for split in ("train", "validation", "test")}
    own = {"dataset": {"multiLabel": {}}} if task == "multi" else {"task": task, "dataset": {"labels": None}}
    done = mean(replace(job, data=data), **merged({"dataset": files, "hyperparameters": {"epochs": 40}}, own))
    done.run()
    if task == "multi":
        assert scores(done)["validation/auroc"] > 0.75
    else:
        assert scores(done)["validation/pearson"] > 0.4
        assert scores(done)["validation/mse"] < 200**2, "whatever the unit: the deviation is 220, the mean 2000"


def test_it_is_as_good_as_logistic_regression(job: Job) -> None:
    done = mean(job, hyperparameters={"epochs": 200, "weightDecay": 0, "learningRate": 0.3}, evaluation={"everyEpochs": 200})
    done.run()
    head = load_file(done.output / "model/head.safetensors")
    train = rows(44)
    inputs = (features_of(job.model, [row["text"] for row in train]) - head["center"].numpy()) / head["scale"].numpy()
    targets = np.array([LABELS.index(row["label"]) for row in train])

    def loss(logits: Any) -> float:
        return float(torch.nn.functional.cross_entropy(torch.as_tensor(logits).float(), torch.from_numpy(targets)))

    theirs = LogisticRegression(C=10, max_iter=10_000).fit(inputs, targets)
    assert loss(inputs @ head["weight"].numpy().T + head["bias"].numpy()) < loss(theirs.decision_function(inputs)) + 0.05


@pytest.mark.parametrize("kind", ENCODERS)
def test_every_encoder_is_pooled_and_frozen(job: Job, tmp_path: Path, kind: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.model)
    tokenizer.save_pretrained(tmp_path / kind)
    tiny(kind, transformers.AutoModel, len(tokenizer)).save_pretrained(tmp_path / kind)
    done = mean(replace(job, model=tmp_path / kind), hyperparameters={"epochs": 1})
    recipe = done.recipe()
    made = model.build(tmp_path / kind, recipe, kind_of(recipe.task, recipe.dataset), tokenizer).train()
    assert {n for n, trains in layers.trainable(made, recipe.hyperparameters, 0).items() if trains} == {
        "linear_head.weight",
        "linear_head.bias",
    }
    assert not made.encoder.training
    done.run()
    texts = ["it was great", "box"]
    alone = inference.load(done.output / "model")
    together = alone.model.pooled(**_tokens(alone.tokenizer, texts)).detach().numpy()
    np.testing.assert_allclose(together, features_of(tmp_path / kind, texts), atol=1e-5)


def _tokens(tokenizer: Any, texts: list[str]) -> dict[str, torch.Tensor]:
    made = tokenizer(texts, padding=True, return_tensors="pt")
    return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}


def test_what_never_changes_divides_by_nothing() -> None:
    head = pooling.Head(2, 3)
    head.standardise(np.array([[1.0, 5.0], [1.0, 5.0]], dtype=np.float32), np.array([7.0, 7.0], dtype=np.float32))
    assert (head.center.tolist(), head.scale.tolist()) == ([1, 5], [1])
    assert (head.output_center.tolist(), head.output_scale.tolist()) == ([7], [1])


def test_an_encoder_with_a_decoder_is_refused(job: Job, tmp_path: Path) -> None:
    shutil.copytree(job.model, tmp_path / "t5")
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformers.T5Model(config).save_pretrained(tmp_path / "t5")
    assert "model.pooling: t5 is an encoder with a decoder" in refused(mean(replace(job, model=tmp_path / "t5")))


@pytest.mark.parametrize("damage", ["absent", "torn"])
def test_a_damaged_head_is_told(job: Job, damage: str) -> None:
    done = mean(job)
    done.run()
    head = done.output / "model/head.safetensors"
    head.unlink() if damage == "absent" else head.write_bytes(head.read_bytes()[:100])
    with pytest.raises(TrainingFailure, match=r"head\.safetensors") as failed:
        inference.load(done.output / "model")
    assert failed.value.failure.reason == "ModelNotFound"


def test_asked_to_end_while_the_encoder_reads_it_ends(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    done = mean(job)
    pooled = pooling.MeanPooled.pooled
    stop: Any = []

    def stopping(self: Any, attention_mask: Any, **tokens: Any) -> Any:
        stop[0].set()
        return pooled(self, attention_mask, **tokens)

    monkeypatch.setattr(pooling.MeanPooled, "pooled", stopping)
    stop.append(threading.Event())
    with pytest.raises(TrainingFailure, match="before the first step"):
        Run(done.recipe(), done.runtime(), stop[0])()


# --------------------------------------------------------------------------------------------------------- templates ----
def template(text: str) -> Template:
    words = {"a": "x", "b": "y"} if "{mask}" in text.replace("{{", "") else None
    return Template.of(Prompt.model_validate({"template": text, "verbalizers": words}))


def test_columns_take_their_places() -> None:
    made = template("{{{title}}}: {text} ({title}) {{}}")
    assert made.columns == ("title", "text")
    text, spans = made.render(["T", "some {text}"])
    assert text == "{T}: some {text} (T) {}"
    assert [text[a:b] for a, b in spans] == ["T", "some {text}", "T"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("no column", "must hold the {name} of a column"),
        ("{text} {", "a brace that stands for itself is written twice"),
        ("{} {text}", "a brace that stands for itself is written twice"),
        ("{text}}", "a brace that stands for itself is written twice"),
        ("{text} {mask}", "once with verbalizers, and never without"),
    ],
)
def test_a_template_that_cannot_be_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match="template") as told:
        Prompt.model_validate({"template": text})
    assert says in str(told.value)


@pytest.fixture(scope="session")
def byte_level() -> Any:
    """A byte-level tokenizer as RoBERTa has: words begin with the space before them."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    corpus = [row["text"] + " great terrible. Title: Text:" for row in rows(200)] * 3
    made.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=420, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), special, strict=True))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, cls_token="<s>", sep_token="</s>", **names)
    fast.add_special_tokens({"mask_token": transformers.AddedToken("<mask>", lstrip=True, special=True)})
    return fast


WORD = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)


@given(st.lists(st.tuples(WORD, WORD), min_size=1, max_size=3), st.integers(24, 60))
def test_what_is_too_long_loses_its_columns_ends_and_nothing_else(byte_level: Any, cells: Any, length: int) -> None:
    made = template("Title: {title} Text: {text} It was {mask}.")
    values = [(" ".join([a] * 9), " ".join([b] * 3)) for a, b in cells]
    encoded, cut = made.encode(values, byte_level, length, "<mask>")
    ids = [row.tolist() for row in encoded]
    whole = [byte_level(made.render(row, "<mask>")[0])["input_ids"] for row in values]
    assert cut == sum(len(tokens) > length for tokens in whole)
    for row, tokens in zip(ids, whole, strict=True):
        assert len(row) == min(length, len(tokens))
        assert row.count(byte_level.mask_token_id) == 1
        if len(tokens) <= length:
            assert row == tokens
        said = byte_level.decode(row)
        assert said.startswith("<s>Title: ")
        assert said.endswith("It was<mask>.</s>")
        rest = iter(tokens)
        assert all(token in rest for token in row), "nothing is new, nothing moves"


def test_the_longest_column_is_cut_first_and_from_its_end(byte_level: Any) -> None:
    made = template("{title}|{text}|")
    text = " ".join(f"good{i} " for i in range(40))
    assert byte_level.decode(made.encode([("kind", text)], byte_level, 4, "")[0][0]) == "<s>||</s>", "columns may go, no more"
    for length in range(8, 20):
        [row], _ = made.encode([("kind", text)], byte_level, length, "")
        assert len(row) == length
        said = byte_level.decode(row).removeprefix("<s>").removesuffix("</s>")
        title, kept, nothing = said.split("|")
        assert (title, nothing) == ("kind", "")
        assert kept
        assert text.startswith(kept), "the beginning of the text, without a gap"


def test_a_mask_in_the_data_is_no_mask(byte_level: Any) -> None:
    [row], _ = template("{text} It was {mask}.").encode([("<mask> bad <mask>",)], byte_level, 40, "<mask>")
    assert row.tolist().count(byte_level.mask_token_id) == 1
    assert byte_level.decode(row).endswith("It was<mask>.</s>")


def templated(job: Job, text: str, name: str = "templated", **changes: Any) -> Job:
    return replace(job, home=job.home / name, changes=merged({"dataset": {"prompt": {"template": text}}}, changes), runs=[])


@pytest.fixture
def columns(job: Job, tmp_path: Path) -> Job:
    """The kit's data with what it says in two columns: the first words, and the rest."""
    for split in ("train", "validation", "test"):
        count, offset = {"train": (44, 0), "validation": (18, 100), "test": (15, 300)}[split]
        lines = []
        for row in rows(count, offset):
            words = row["text"].split()
            lines.append(json.dumps({"head": words[0], "rest": " ".join(words[1:] or ["it"]), "stars": 3, "label": row["label"]}))
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    files = {split: f"{split}.jsonl" for split in ("train", "validation", "test")}
    return replace(job, data=tmp_path, changes={"dataset": files})


def test_training_and_prediction_read_the_same_text(columns: Job) -> None:
    done = replace(
        columns, changes=merged(columns.changes, {"dataset": {"prompt": {"template": "the {rest} was {stars} {head}"}}})
    )
    done.run()
    card = json.loads((done.output / "model/finetune.json").read_text())
    assert card["dataset"]["prompt"] == {"template": "the {rest} was {stars} {head}"}
    data = [json.loads(line) for line in (done.data / "test.jsonl").read_text().splitlines()]
    predictor = inference.load(done.output / "model")
    for name, value in predictor.evaluate(data).values.items():
        assert value == pytest.approx(scores(done)[f"test/{name}"], rel=1e-3, abs=1e-5), name
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(done.output / "model").eval()
    for row, answer in zip(data, predictor.predict(inference.read_inputs(predictor.kind, data)), strict=True):
        text = f"the {row['rest']} was {row['stars']} {row['head']}"
        with torch.inference_mode():
            odds = torch.softmax(stock(**predictor.tokenizer([text], return_tensors="pt")).logits, dim=1)[0]
        np.testing.assert_allclose(list(answer["probabilities"].values()), odds.numpy(), atol=1e-5)


def test_a_template_of_one_column_takes_plain_texts(job: Job) -> None:
    done = templated(job, "it was {text}")
    done.run()
    plain = templated(job, "{text}", "plain")
    assert inference.load(done.output / "model").predict(["great"]) != []
    plain.run()
    job.run()
    assert scores(plain) == scores(job)
    assert scores(done) != scores(job)


def test_a_column_that_is_not_there_is_told(job: Job) -> None:
    with pytest.raises(TrainingFailure, match=r"train\.csv: there is no column 'title'; the columns are 'text', 'label'"):
        templated(job, "{title} {text}").run()


def test_a_template_that_fills_everything_is_told(job: Job) -> None:
    message = refused(templated(job, "the a it was is and very my " * 2 + "{text}", dataset={"maxLength": 16}))
    assert "dataset.prompt.template: it has 18 tokens without any column; dataset.maxLength is 16" in message


def test_pairs_of_features_and_templates_go_together(job: Job) -> None:
    done = mean(job, dataset={"prompt": {"template": "it was {text}"}})
    done.run()
    again = inference.load(done.output / "model").evaluate(rows(15, offset=300)).values
    assert again["loss"] == pytest.approx(scores(done)["test/loss"], rel=1e-4)


# ------------------------------------------------------------------------------------------------------------- cloze ----
CLOZE: dict[str, Any] = {
    "prompt": {"template": "{text} it was {mask}", "verbalizers": {"negative": "bad", "neutral": "box", "positive": "good"}}
}


@pytest.fixture(scope="session")
def masked(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny tokenizer with a mask, and a BERT that fills it in."""
    folder = tmp_path_factory.mktemp("masked")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer.save_pretrained(folder)
    tiny("bert", transformers.AutoModelForMaskedLM, len(tokenizer)).save_pretrained(folder)
    return folder


@pytest.fixture
def cloze(job: Job, masked: Path) -> Job:
    return replace(job, model=masked, changes={"dataset": CLOZE, "hyperparameters": {"epochs": 30, "learningRate": 5e-3}})


def asked(job: Job, **prompt: Any) -> Job:
    return replace(job, changes=merged(job.changes, {"dataset": {"prompt": prompt}}))


def test_a_masked_language_model_learns_to_fill_in_the_labels_word(cloze: Job) -> None:
    cloze.run()
    assert scores(cloze)["validation/macro_f1"] > 0.8
    folder = cloze.output / "model"
    stock = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    before = transformers.AutoModelForMaskedLM.from_pretrained(cloze.model).state_dict()
    changed = {n for n, w in stock.state_dict().items() if not torch.equal(w, before[n])}
    assert any("embeddings" in n for n in changed)
    assert any(n.startswith("cls.") for n in changed)
    predictor = inference.load(folder)
    words = [predictor.tokenizer.convert_tokens_to_ids(w) for w in ("bad", "box", "good")]
    texts = [row["text"] for row in rows(15, offset=300)]
    for text, answer in zip(texts, predictor.predict(texts), strict=True):
        given = predictor.tokenizer([f"{text} it was [MASK]"], return_tensors="pt")
        with torch.inference_mode():
            at = stock(**given).logits[0, (given["input_ids"][0] == predictor.tokenizer.mask_token_id).nonzero()[0, 0]]
        np.testing.assert_allclose(list(answer["probabilities"].values()), torch.softmax(at[words], 0).numpy(), atol=1e-5)
    told = scores(cloze)
    for name, value in predictor.evaluate(rows(15, offset=300)).values.items():
        assert value == pytest.approx(told[f"test/{name}"], rel=1e-3), name


def test_a_killed_cloze_goes_on_bit_for_bit(cloze: Job) -> None:
    short = merged(cloze.changes, {"hyperparameters": {"epochs": 3}})
    whole, cut = (replace(cloze, home=cloze.home / name, changes=short, runs=[]) for name in ("whole", "cut"))
    whole.run()
    with pytest.raises(Killed):
        cut.run(kill_at=9)
    cut.run()
    assert (whole.output / "model/model.safetensors").read_bytes() == (cut.output / "model/model.safetensors").read_bytes()


def test_adapters_learn_a_cloze(cloze: Job) -> None:
    alone = replace(cloze, changes=merged(cloze.changes, {"model": {"lora": {"rank": 4, "merge": False}}}))
    alone.run()
    assert not (alone.output / "model/model.safetensors").exists()
    again = inference.load(alone.output / "model").evaluate(rows(15, offset=300)).values
    assert again["loss"] == pytest.approx(scores(alone)["test/loss"], rel=1e-3)


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_head_reads_the_mask_alone_and_says_what_it_always_said(masked: Path, kind: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(masked)
    stock = tiny(kind, transformers.AutoModelForMaskedLM, len(tokenizer))
    mine = tiny(kind, transformers.AutoModelForMaskedLM, len(tokenizer))
    task = kind_of(Task.SEQUENCE_CLASSIFICATION, Dataset.model_validate({"uri": "file:///d", "labels": LABELS, **CLOZE}))
    assert isinstance(task, Cloze)
    task.attach(mine, tokenizer)
    data = task.encode(Examples("x", ["good", "the box was very slow"], np.array([2, 0])), tokenizer, 32)
    batch = collate(data, np.arange(2), 0, CPU)
    labels = batch.pop("labels")
    with torch.inference_mode():
        logits = mine(**batch).logits
        whole = stock(**batch).logits
    assert logits.shape == (2, 1, whole.shape[-1])
    at = whole[batch["input_ids"] == tokenizer.mask_token_id]
    torch.testing.assert_close(logits[:, 0], at)
    by_hand = torch.nn.functional.cross_entropy(at[:, task.word_ids], labels, reduction="sum")
    assert float(task.loss(logits, labels, 0.0)) == pytest.approx(float(by_hand), rel=1e-5)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"negative": "bad slow"}, "'bad slow' is not one token of the model's tokenizer but 'bad', 'slow'"),
        ({"negative": "dreadful"}, "'dreadful' is not one token of the model's tokenizer but '[UNK]'"),
    ],
)
def test_a_word_that_is_no_token_is_told(cloze: Job, words: dict[str, str], says: str) -> None:
    assert says in refused(asked(cloze, verbalizers=words))


def test_words_are_those_that_stand_behind_what_is_before_the_mask(byte_level: Any) -> None:
    def ids(text: str, **words: str) -> list[int]:
        data = {"uri": "file:///d", "labels": list(words), "prompt": {"template": text, "verbalizers": words}}
        task = kind_of(Task.SEQUENCE_CLASSIFICATION, Dataset.model_validate(data))
        assert isinstance(task, Cloze)
        return task.find_words(byte_level)

    behind = ids("{text} It was {mask}.", a="great", b="slow")
    assert byte_level.convert_ids_to_tokens(behind) == ["Ġgreat", "Ġslow"]
    assert byte_level.convert_ids_to_tokens(ids("{text}:{mask}", a="great", b="slow")) == ["great", "slow"]


def test_two_words_of_one_token_are_told(cloze: Job, tmp_path: Path) -> None:
    shutil.copytree(cloze.model, tmp_path / "uncased")
    file = tmp_path / "uncased/tokenizer.json"
    made = json.loads(file.read_text())
    file.write_text(json.dumps({**made, "normalizer": {"type": "Lowercase"}}))
    same = asked(replace(cloze, model=tmp_path / "uncased"), verbalizers={"negative": "Good"})
    assert "'Good' is the same token as the word of another label" in refused(same)


def test_a_model_without_a_head_for_words_is_told(cloze: Job, job: Job, tmp_path: Path) -> None:
    assert "the model's tokenizer has no mask" in refused(replace(cloze, model=job.model))
    shutil.copytree(cloze.model, tmp_path / "body")
    transformers.AutoModel.from_pretrained(cloze.model).save_pretrained(tmp_path / "body")
    assert "no trained head that fills in words" in refused(replace(cloze, model=tmp_path / "body"))


def test_long_texts_keep_their_question(masked: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(masked)
    task = kind_of(Task.SEQUENCE_CLASSIFICATION, Dataset.model_validate({"uri": "file:///d", "labels": LABELS, **CLOZE}))
    data: Encoded = task.encode(Examples("x", ["good " * 50, "bad [MASK]"], np.array([2, 0])), tokenizer, 16)
    assert [tokenizer.decode(row) for row in data.ids] == [
        "[CLS] " + "good " * 11 + "it was [MASK] [SEP]",
        "[CLS] bad it was [MASK] [SEP]",
    ]
    assert data.truncated == 1


# ---------------------------------------------------------------------------------------------------------- examples ----
@pytest.mark.parametrize("name", ["finetunejob", "template", "cloze"])
def test_the_examples_run_as_they_are(job: Job, masked: Path, tmp_path: Path, name: str) -> None:
    """On the shipped data; tiny models stand in for theirs."""
    spec = load_job_file(EXAMPLES / f"few-shot/{name}.yaml").spec
    (tmp_path / "s3/customer-feedback").mkdir(parents=True)
    (tmp_path / "s3/customer-feedback/data").symlink_to(EXAMPLES / "customer-feedback/data")
    stand_in = tmp_path / "mirror" / str(spec.recipe().model.uri).removeprefix("hf://")
    stand_in.parent.mkdir(parents=True)
    shutil.copytree(masked if name == "cloze" else job.model, stand_in)
    if name == "cloze":
        tokenizer = transformers.AutoTokenizer.from_pretrained(stand_in)
        tokenizer.add_tokens(["terrible", "okay", "great"])
        tokenizer.save_pretrained(stand_in)
        config = transformers.AutoConfig.from_pretrained(stand_in)
        config.update({"vocab_size": len(tokenizer), "max_position_embeddings": 128})
        transformers.AutoModelForMaskedLM.from_config(config).save_pretrained(stand_in)
    else:
        make_model(stand_in, positions=128)
    runtime = replace(job.runtime(), s3_root=tmp_path / "s3", model_mirror=str(tmp_path / "mirror"))
    console = ScriptedConsole({})
    Run(spec.recipe(), runtime, threading.Event(), console=console)()
    assert f"data: {959 if name == 'template' else 96} train, 113 validation" in console.text
    row = {"text": "very kind", "channel": "chat", "line": "telecom", "label": "positive"}
    folder = tmp_path / "s3/customer-feedback/models" / {"finetunejob": "few-shot"}.get(name, name) / "model"
    assert set(inference.load(folder).evaluate([row]).values) >= {"macro_f1", "loss"}
