"""The tasks: each learns, is scored as others score it, and leaves a stock model; adapters; the twelve architectures."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from seqeval.metrics import classification_report
from seqeval.metrics import f1_score as span_f1
from seqeval.metrics.sequence_labeling import get_entities
from sklearn import metrics as sk
from trainer_kit import FILLERS, LABELS, WORDS, Job, Killed, merged, rows

from finetune_api.recipe import Dataset, Recipe
from finetune_api.tasks import METRICS, Task
from finetune_trainer import inference, metrics, model
from finetune_trainer.data import collate
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.tasks import IGNORED, Encoded, Examples, kind_of
from finetune_trainer.tasks.completion import chat, pair

CPU = torch.device("cpu")
TAGS = ["O", "B-BAD", "I-BAD", "B-GOOD"]
TEMPLATE = (
    "{% for m in messages %}[CLS] {{ m['role'] }} {{ m['content'] }} [SEP] {% endfor %}"
    "{% if add_generation_prompt %}[CLS] assistant {% endif %}"
)


# ---------------------------------------------------------------------------------------------------------- metrics ----
@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from(["O", "B-A", "I-A", "B-B", "I-B", "E-A", "S-B"]), min_size=1, max_size=12), min_size=1))
def test_spans_are_those_of_seqeval(sentences: list[list[str]]) -> None:
    for tags in sentences:
        assert metrics.spans_of(tags) == get_entities(tags)


@settings(deadline=None)
@given(
    st.lists(st.lists(st.tuples(*[st.sampled_from(["O", "B-A", "I-A", "B-B", "I-B"])] * 2), min_size=1), min_size=1, max_size=8)
)
def test_span_scores_are_those_of_seqeval(sentences: list[list[tuple[str, str]]]) -> None:
    truth, predicted = [[a for a, _ in s] for s in sentences], [[b for _, b in s] for s in sentences]
    overall, by_type = metrics.spans(truth, predicted)
    assert overall["f1"] == pytest.approx(float(span_f1(truth, predicted, zero_division=0)))
    theirs = classification_report(truth, predicted, output_dict=True, zero_division=0) if by_type else {}
    for row in by_type:
        assert row["f1"] == pytest.approx(theirs[row["label"]]["f1-score"])
        assert row["support"] == theirs[row["label"]]["support"]


def test_tags_without_a_prefix_are_spans_of_one_word() -> None:
    assert metrics.spans_of(["NOUN", "NOUN", "O", "VERB"]) == [("NOUN", 0, 0), ("NOUN", 1, 1), ("VERB", 3, 3)]


FLOATS = st.floats(-100, 100, allow_nan=False).map(lambda v: round(v, 1))


@settings(deadline=None)
@given(st.lists(st.tuples(FLOATS, FLOATS), min_size=3, max_size=40))
def test_correlations_are_those_of_scipy(pairs: list[tuple[float, float]]) -> None:
    a, b = (np.array(side) for side in zip(*pairs, strict=True))
    if np.ptp(a) < 0.05 or np.ptp(b) < 0.05:
        assert np.isnan(metrics.pearson(np.ones(3), b[:3]))
        return
    assert metrics.pearson(a, b) == pytest.approx(stats.pearsonr(a, b).statistic, abs=1e-9)
    assert metrics.pearson(metrics.ranks(a), metrics.ranks(b)) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-9)


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), FLOATS, FLOATS), min_size=2, max_size=40))
def test_scores_of_several_labels_are_those_of_scikit_learn(given_rows: list[tuple[bool, bool, float, float]]) -> None:
    truth, scores = np.array([r[:2] for r in given_rows]), np.array([r[2:] for r in given_rows])
    both = [i for i in range(2) if 0 < truth[:, i].sum() < len(truth)]
    area = metrics.macro_auroc(truth, scores)
    if both:
        assert area == pytest.approx(np.mean([sk.roc_auc_score(truth[:, i], scores[:, i]) for i in both]))
    else:
        assert np.isnan(area)
    predicted = scores > 0
    rows_ = metrics.per_label(truth, predicted, ["a", "b"])
    theirs = sk.precision_recall_fscore_support(truth, predicted, zero_division=0)
    for i, row in enumerate(rows_):
        assert [row["precision"], row["recall"], row["f1"], row["support"]] == pytest.approx([t[i] for t in theirs])


# ------------------------------------------------------------------------------------------------------------- data ----
def _write(folder: Path, name: str, examples: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(json.dumps(row) for row in examples) + "\n")


def _files(folder: Path, make: Any) -> Path:
    for name, count, offset in (("train", 44, 0), ("validation", 18, 100), ("test", 15, 300)):
        _write(folder, f"{name}.jsonl", [make(row) for row in rows(count, offset)])
    return folder


def _mood(row: dict[str, str]) -> int:
    return sum((word in WORDS["positive"]) - (word in WORDS["negative"]) for word in row["text"].split())


def _tagged(row: dict[str, str]) -> dict[str, Any]:
    words = row["text"].split()
    tag = dict.fromkeys(WORDS["negative"], "B-BAD") | dict.fromkeys(WORDS["positive"], "B-GOOD")
    tags = [tag.get(word, "O") for word in words]
    return {"text": words, "label": ["I-BAD" if i and t == "B-BAD" == tags[i - 1] else t for i, t in enumerate(tags)]}


MAKERS: dict[str, Any] = {
    "multi": lambda r: {"text": r["text"], "label": [n for n in LABELS if set(WORDS[n]) & set(r["text"].split())]},
    "regression": lambda r: {"text": r["text"], "label": _mood(r)},
    "pair": lambda r: {"text": r["text"], "other": "it was " + r["label"], "label": r["label"]},
    "tagging": _tagged,
    "completion": lambda r: {"prompt": r["text"], "completion": WORDS[r["label"]][0]},
    "chat": lambda r: {
        "messages": [{"role": "user", "content": r["text"]}, {"role": "assistant", "content": WORDS[r["label"]][0]}]
    },
}
ANY = {"train": "train.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"}
SPECS: dict[str, dict[str, Any]] = {
    "multi": {"dataset": {**ANY, "multiLabel": {"threshold": 0.4}}},
    "regression": {"task": "Regression", "dataset": {**ANY, "labels": None}},
    "pair": {"dataset": {**ANY, "textPairColumn": "other"}},
    "tagging": {"task": "TokenClassification", "dataset": {**ANY, "labels": ["O", "B-BAD", "B-GOOD"]}},
    "completion": {
        "task": "CausalLM",
        "dataset": {**ANY, "labels": None, "promptColumn": "prompt", "completionColumn": "completion"},
    },
    "chat": {"task": "CausalLM", "dataset": {**ANY, "labels": None, "messagesColumn": "messages"}},
}
TASKS = list(SPECS)


@pytest.fixture(scope="session")
def decoder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny tokenizer with a chat template, and a Llama."""
    folder = tmp_path_factory.mktemp("decoder")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder)
    _architecture("llama", len(tokenizer), folder)
    return folder


SMALL: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16},
    "llama": {"num_key_value_heads": 1},
    "qwen2": {"num_key_value_heads": 1, "layer_types": ["full_attention"] * 2},
    "modernbert": {"layer_types": ["full_attention", "sliding_attention"], "pad_token_id": 0},
}
ARCHITECTURES = (
    *("bert", "roberta", "distilbert", "deberta-v2", "electra", "albert", "modernbert", "mpnet", "xlm-roberta"),
    *("gpt2", "llama", "qwen2"),
)


def _architecture(kind: str, vocabulary: int, folder: Path) -> None:
    usual = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    own = SMALL.get(kind, {})
    config = transformers.AutoConfig.for_model(
        kind,
        **({} if kind in ("distilbert", "gpt2") else {**usual, "max_position_embeddings": 66}),
        **{**special, **own},
        vocab_size=vocabulary,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = kind in ("gpt2", "llama", "qwen2")
        (transformers.AutoModelForCausalLM if decoder else transformers.AutoModel).from_config(config).save_pretrained(folder)


@pytest.fixture
def make(job: Job, decoder: Path, tmp_path: Path) -> Any:
    """A job of a task."""

    def made(task: str, name: str = "job", **changes: Any) -> Job:
        data = tmp_path / task
        if not data.exists():
            _files(data, MAKERS[task])
        source = decoder if task in ("completion", "chat") else job.model
        return replace(job, home=tmp_path / name, data=data, model=source, changes=merged(SPECS[task], changes), runs=[])

    return made


def result(job: Job) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((job.output / "result.json").read_text())
    return found


def scores(job: Job) -> dict[str, float]:
    return {m["name"]: float(m["value"]) for m in result(job)["result"]["metrics"]}


LONG = {"epochs": 12, "learningRate": 0.01}


# --------------------------------------------------------------------------------------------------- each task learns --
@pytest.mark.parametrize("task", TASKS)
def test_a_task_learns_and_tells_its_metrics(make: Any, task: str) -> None:
    job = make(task, hyperparameters=LONG)
    job.run()
    recipe = job.recipe()
    told = {name.removeprefix("test/") for name in scores(job) if name.startswith("test/")}
    expected = {m.value for m in METRICS[recipe.task]} - ({"mcc"} if task == "multi" else set())
    assert told == expected
    first, last = (e["metrics"] for e in (result(job)["evaluations"][0], result(job)["evaluations"][-1]))
    loss = [next(float(m["value"]) for m in ms if m["name"] == "validation/loss") for ms in (first, last)]
    assert loss[1] < 0.95 * loss[0], "it learns nothing"


def _stock(job: Job, kind: str) -> Any:
    return getattr(transformers, kind).from_pretrained(job.output / "model").eval()


@pytest.mark.parametrize("task", TASKS)
def test_the_loss_is_the_stock_models_own(make: Any, task: str) -> None:
    job = make(task)
    recipe = job.recipe()
    kind = kind_of(recipe.task, recipe.dataset)
    tokenizer = model.load_tokenizer(job.model, recipe)
    torch.manual_seed(1)
    built = model.build(job.model, recipe, kind, tokenizer).eval()
    from finetune_trainer.splits import read_file

    examples = read_file(job.data / "train.jsonl", kind, name="train.jsonl").examples
    encoded = kind.encode(Examples("some", examples.texts[:7], examples.labels[:7]), tokenizer, 32)
    batch = collate(encoded, np.arange(7), int(tokenizer.pad_token_id), CPU)
    with torch.inference_mode():
        stock = built(**batch)
        mine = kind.loss(stock.logits, batch["labels"], 0.0) / kind.weights(encoded).sum()
        outputs = kind.outputs(stock.logits, batch["labels"]).double().numpy()
    assert float(mine) == pytest.approx(float(stock.loss), rel=1e-5)
    if outputs.shape[1] < kind.width(encoded):
        outputs = np.pad(outputs, ((0, 0), (0, kind.width(encoded) - outputs.shape[1])))
    assert kind.score(outputs, encoded).values["loss"] == pytest.approx(float(stock.loss), rel=1e-4)


@pytest.mark.parametrize("task", ["regression", "tagging", "chat", "multi"])
def test_a_killed_run_goes_on_bit_for_bit(make: Any, task: str) -> None:
    whole, cut = make(task, "whole"), make(task, "cut")
    whole.run()
    with pytest.raises(Killed):
        cut.run(kill_at=9)
    cut.run()
    assert (whole.output / "model/model.safetensors").read_bytes() == (cut.output / "model/model.safetensors").read_bytes()


# -------------------------------------------------------------------------------------------------------- prediction ----
def test_predictions_in_words(make: Any) -> None:
    answers = {}
    for task in TASKS:
        job = make(task, f"predict-{task}", hyperparameters=LONG)
        job.run()
        predictor = inference.load(job.output / "model")
        data = [json.loads(line) for line in (job.data / "test.jsonl").read_text().splitlines()]
        texts = inference.read_inputs(predictor.kind, data)
        answers[task] = predictor.predict(texts)
        assert len(answers[task]) == len(data)
        told, again = scores(job), predictor.evaluate(data).values
        for name, value in again.items():
            assert value == pytest.approx(told[f"test/{name}"], rel=1e-3, abs=1e-5), (task, name)
    assert set(answers["multi"][0]) == {"labels", "probabilities"}
    assert all(set(a["labels"]) == {n for n, p in a["probabilities"].items() if p >= 0.4} for a in answers["multi"])
    assert all(isinstance(a["value"], float) for a in answers["regression"])
    assert all(len(a["tags"]) == len(a["words"]) and set(a["tags"]) <= {*TAGS, None} for a in answers["tagging"])
    assert any("B-GOOD" in a["tags"] for a in answers["tagging"])
    guessed = [a["completion"].split() for a in answers["completion"]]
    assert any(words and words[0] in ("bad", "box", "good") for words in guessed)


# ----------------------------------------------------------------------------------------------------- tokens, labels --
def test_only_the_completion_is_learned(decoder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(decoder)
    ids, labels = pair("it was good", "very kind", tokenizer)
    assert tokenizer.decode(ids) == "[CLS] it was good very kind [SEP]"
    assert tokenizer.decode([t for t in labels if t != IGNORED]) == "very kind [SEP]"


def test_only_the_assistant_is_learned(decoder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(decoder)
    said = [("system", "the box"), ("user", "it was good"), ("assistant", "very kind"), ("user", "slow"), ("assistant", "bad")]
    ids, labels = chat([{"role": role, "content": content} for role, content in said], tokenizer)
    assert len(ids) == len(labels)
    assert tokenizer.decode([t for t in labels if t != IGNORED]) == "very kind [SEP] bad [SEP]"


def test_a_long_prompt_is_cut_at_its_beginning(decoder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(decoder)
    kind = kind_of(
        Task.CAUSAL_LM, Dataset.model_validate({"uri": "file:///d", "promptColumn": "prompt", "completionColumn": "completion"})
    )
    encoded = kind.encode(Examples("x", ["good " * 30, "good"], ["very kind", "bad " * 40]), tokenizer, 12)
    assert [len(row) for row in encoded.ids] == [12, 12]
    assert encoded.truncated == 2
    assert tokenizer.decode([t for t in encoded.labels[0] if t != IGNORED]) == "very kind [SEP]"
    assert kind.weights(encoded).tolist() == [3, 11]


def test_without_a_chat_template_it_is_told(make: Any, job: Job) -> None:
    failing = replace(make("chat"), model=job.model)
    with pytest.raises(TrainingFailure, match="has no chat template; use promptColumn"):
        failing.run()


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "number": ("regression", {"text": "x", "label": "much"}, "line 1: its label is no number"),
    "infinite": ("regression", {"text": "x", "label": "inf"}, "no finite number"),
    "tag": ("tagging", {"text": ["a", "b"], "label": ["O", "B-SECRET"]}, "label has a tag that is not one of dataset.labels"),
    "count": ("tagging", {"text": "a b c", "label": "O O"}, "has not as many tags as text has words"),
    "words": ("tagging", {"text": [], "label": []}, "text is empty"),
    "labels": ("multi", {"text": "x", "label": "positive|secret"}, "a label that is not one of dataset.labels"),
    "other": ("pair", {"text": "x", "other": " ", "label": "neutral"}, "other is empty"),
    "completion": ("completion", {"prompt": "x", "completion": ""}, "completion is empty"),
    "role": ("chat", {"messages": [{"role": "secret", "content": "x"}]}, "whose role is none of system, user"),
    "silent": ("chat", {"messages": [{"role": "user", "content": "x"}]}, "messages has no message of the assistant"),
    "list": ("chat", {"messages": "secret"}, "messages is no list of messages"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_by_its_line(make: Any, case: str) -> None:
    task, row, said = BAD[case]
    job = make(task)
    _write(job.data, "train.jsonl", [row])
    with pytest.raises(TrainingFailure, match=said) as failed:
        job.run()
    assert failed.value.failure.reason == "DataInvalid"
    assert "secret" not in failed.value.message.lower()


# -------------------------------------------------------------------------------------------------------------- head ----
def test_a_head_is_kept_only_when_it_says_the_same_labels(job: Job) -> None:
    job.run()
    trained = job.output / "model"
    before = transformers.AutoModelForSequenceClassification.from_pretrained(trained)
    for labels, kept in ((LABELS, True), (LABELS[::-1], False), (["a", "b", "c"], False)):
        recipe = Recipe.model_validate(
            merged(job.recipe().model_dump(by_alias=True, exclude_none=True), {"dataset": {"labels": labels}})
        )
        kind = kind_of(recipe.task, recipe.dataset)
        built = model.build(trained, recipe, kind, model.load_tokenizer(trained, recipe))
        assert torch.equal(built.classifier.weight, before.classifier.weight) is kept, labels
        assert torch.equal(built.bert.embeddings.word_embeddings.weight, before.bert.embeddings.word_embeddings.weight)


# ------------------------------------------------------------------------------------------------------------ adapters --
LORA = {"model": {"lora": {"rank": 4}}, "hyperparameters": LONG}


def _changed(before: Any, after: Any) -> set[str]:
    theirs = before.state_dict()
    return {n for n, w in after.state_dict().items() if n in theirs and not torch.equal(w, theirs[n])}


@pytest.mark.parametrize("task", ["multi", "tagging", "completion"])
def test_adapters_learn_and_are_merged_into_a_stock_model(make: Any, task: str) -> None:
    job = make(task, **LORA)
    job.run()
    recipe = job.recipe()
    stock = _stock(job, kind_of(recipe.task, recipe.dataset).auto_class)
    assert not [name for name, _ in stock.named_parameters() if "lora" in name]
    base = transformers.AutoModel.from_pretrained(job.model)
    changed = _changed(base, stock.base_model)
    assert changed
    assert not [name for name in changed if "embed" in name or "norm" in name.lower() or name.endswith("bias")]
    data = [json.loads(line) for line in (job.data / "test.jsonl").read_text().splitlines()]
    again = inference.load(job.output / "model").evaluate(data).values["loss"]
    assert again == pytest.approx(scores(job)["test/loss"], rel=1e-3)


def test_an_adapter_alone_is_small_and_is_put_on_its_model(make: Any) -> None:
    merged_job = make("multi", "merged", **LORA)
    alone = make("multi", "alone", **merged(LORA, {"model": {"lora": {"merge": False}}}))
    for job in (merged_job, alone):
        job.run()
    folder = alone.output / "model"
    assert not (folder / "model.safetensors").exists()
    told = json.loads((folder / "adapter_config.json").read_text())
    assert (told["r"], told["base_model_name_or_path"]) == (4, f"file://{alone.model}")
    assert scores(alone)["test/loss"] == pytest.approx(scores(merged_job)["test/loss"], rel=1e-3)
    texts = ["it was great", "the box"]
    mine, whole = (inference.load(j.output / "model").predict(texts) for j in (alone, merged_job))
    for a, b in zip(mine, whole, strict=True):
        assert a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-4)


def test_saving_adapters_asks_no_hub(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def asked(*_: Any, **__: Any) -> None:
        pytest.fail("a hub was asked")

    monkeypatch.setattr(huggingface_hub.HfApi, "file_exists", asked)
    (tmp_path / "mirror/org").mkdir(parents=True)
    (tmp_path / "mirror/org/tiny@v1").symlink_to(job.model)
    mine = replace(job, mirror=str(tmp_path / "mirror"), changes={"model": {"uri": "hf://org/tiny@v1", "lora": {"merge": False}}})
    mine.run()
    assert json.loads((mine.output / "model/adapter_config.json").read_text())["base_model_name_or_path"] == "org/tiny"


def test_adapters_go_on_bit_for_bit(make: Any) -> None:
    whole, cut = (make("multi", name, **merged(LORA, {"hyperparameters": {"epochs": 3}})) for name in ("whole", "cut"))
    whole.run()
    with pytest.raises(Killed):
        cut.run(kill_at=9)
    cut.run()
    assert "going on from step" in cut.runs[-1].text
    assert (whole.output / "model/model.safetensors").read_bytes() == (cut.output / "model/model.safetensors").read_bytes()


def test_a_module_that_is_not_there_is_told_with_those_that_are(make: Any) -> None:
    with pytest.raises(TrainingFailure, match=r"lora\.targetModules.*attention\.self\.query") as failed:
        make("multi", model={"lora": {"targetModules": ["q_proj"]}}).run()
    assert failed.value.failure.reason == "RecipeInvalid"


@pytest.mark.parametrize(("field", "value"), [("rank", 2), ("alpha", 4), ("dropout", 0.5), ("targetModules", ["query"])])
def test_every_field_of_the_adapters_changes_what_is_learned(make: Any, field: str, value: Any) -> None:
    short = {"hyperparameters": {"epochs": 1}, "model": {"lora": {"rank": 4}}}
    plain = make("multi", "plain", **short)
    other = make("multi", "other", **merged(short, {"model": {"lora": {field: value}}}))
    for job in (plain, other):
        job.run()
    read = [_stock(job, "AutoModelForSequenceClassification") for job in (plain, other)]
    assert _changed(*read)


# ------------------------------------------------------------------------------------------------------ architectures --
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_an_architecture_trains_freezes_is_saved_and_predicts(job: Job, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / kind
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.model)
    tokenizer.save_pretrained(folder)
    _architecture(kind, len(tokenizer), folder)
    before = transformers.AutoModel.from_pretrained(folder)
    role = "attention"  # the one that all of them have
    mine = replace(job, model=folder, home=tmp_path / "job")
    mine.changes = {"hyperparameters": {"epochs": 2, "freeze": {"embeddings": True}, "dropout": {role: 0.2}}}
    mine.run()
    stock = _stock(mine, "AutoModelForSequenceClassification")
    changed = _changed(before, stock.base_model)
    assert changed
    assert not [n for n in changed if "embeddings" in n or "embed_tokens" in n or n.startswith(("wte", "wpe"))]
    tokenizer = transformers.AutoTokenizer.from_pretrained(mine.output / "model")
    texts = [" ".join(FILLERS), "it was great", "box"]
    with torch.inference_mode():
        alone = [torch.softmax(stock(**tokenizer([text], return_tensors="pt")).logits, 1)[0] for text in texts]
    # Together they are padded: what a text says does not depend on its neighbours.
    for expected, got in zip(alone, inference.load(mine.output / "model").predict(texts), strict=True):
        np.testing.assert_allclose(list(got["probabilities"].values()), expected.numpy(), atol=1e-5)


def test_padding_changes_no_loss_of_a_decoder(decoder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(decoder)
    llama = transformers.AutoModelForCausalLM.from_pretrained(decoder).eval()
    kind = kind_of(
        Task.CAUSAL_LM, Dataset.model_validate({"uri": "file:///d", "promptColumn": "prompt", "completionColumn": "completion"})
    )
    data = kind.encode(Examples("x", ["good", "it was very slow and late"], ["kind", "bad box"]), tokenizer, 32)
    pad = int(tokenizer.pad_token_id)

    def losses(chosen: Encoded, rows_: list[int]) -> float:
        batch = collate(chosen, np.array(rows_), pad, CPU)
        labels = batch.pop("labels")
        with torch.inference_mode():
            return float(kind.loss(llama(**batch).logits, labels, 0.0))

    assert losses(data, [0, 1]) == pytest.approx(losses(data, [0]) + losses(data, [1]), rel=1e-5)
