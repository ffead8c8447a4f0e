"""Learning from few examples: samples of the data, and the examples that do it."""

import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from few_shot_kit import result
from hypothesis import given
from hypothesis import strategies as st
from trainer_kit import Job, ScriptedConsole, make_model

from finetune_api.manifest import load_job_file
from finetune_trainer import inference
from finetune_trainer.few_shot import few_shot
from finetune_trainer.run import Run
from finetune_trainer.tasks import Examples

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


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
