"""Micro-batches change where sums are rounded and nothing else; out of memory, a training goes on in smaller ones."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from trainer_kit import Job, Killed

from finetune_trainer.data import collate
from finetune_trainer.dist import ALONE, Group
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.feed import Feed
from finetune_trainer.tasks import Encoded, Ragged
from support.models import TAGS, tiny_decoder, write_tasks
from support.out_of_memory import rows_that_fit

EVERY_STEP: dict[str, Any] = {"checkpoint": {"everySteps": 1, "keepLast": 100}}
NO_DROPOUT: dict[str, Any] = {"dropout": {"hidden": 0.0, "attention": 0.0, "classifier": 0.0}, "precision": "FP32"}


def fresh(job: Job, name: str, hyperparameters: dict[str, Any], **more: Any) -> Job:
    return replace(job, home=job.home / name, changes={**EVERY_STEP, "hyperparameters": hyperparameters, **more}, runs=[])


def resolved(job: Job) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((job.output / "result.json").read_text())["resolved"]
    return found


def state(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "trainer/state.json").read_text())
    return found


def same_bits(a: Job, b: Job) -> None:
    assert (a.output / "model/model.safetensors").read_bytes() == (b.output / "model/model.safetensors").read_bytes()
    for file in ("model/model.safetensors", "trainer/optimizer.safetensors", "trainer/random.safetensors"):
        assert (a.newest() / file).read_bytes() == (b.newest() / file).read_bytes(), file


def close(a: Path, b: Path, relative: float) -> None:
    """Weights, or an optimizer's first moments: the distance over the norm, of all of them together."""
    one, other = load_file(a), load_file(b)
    assert one.keys() == other.keys()
    names = [name for name in sorted(one) if not name.endswith((".step", "exp_avg_sq"))]
    flat = [torch.cat([of[name].flatten().double() for name in names]) for of in (one, other)]
    assert torch.linalg.norm(flat[0] - flat[1]) <= relative * torch.linalg.norm(flat[0])


def first(job: Job) -> Path:
    return next(job.checkpoints.glob("step-00000001-*")) / "trainer/optimizer.safetensors"


# --------------------------------------------------------------------------------------------------- micro-batches ----
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_the_gradient_is_that_of_the_whole_batch(job: Job, rows: int) -> None:
    whole, cut = fresh(job, "whole", NO_DROPOUT), fresh(job, "cut", {**NO_DROPOUT, "microBatchSize": rows})
    whole.run()
    with rows_that_fit(rows) as tried:
        cut.run()
    # 3 epochs of 5 batches of 8 and one of 4 rows, in pieces of about the same size; two layers.
    assert len(tried) == 2 * 3 * (5 * -(-8 // rows) + -(-4 // rows))
    assert max(tried) <= rows
    close(first(whole), first(cut), 1e-6)
    close(whole.output / "model/model.safetensors", cut.output / "model/model.safetensors", 1e-4)
    assert (resolved(whole)["microBatchSize"], resolved(cut)["microBatchSize"]) == (8, rows)


def test_by_token_too(job: Job, tmp_path: Path) -> None:
    """Rows count by their tokens: a mean of means would be another gradient."""
    for split in ("train", "validation"):
        write_tasks(tmp_path / f"{split}.jsonl", 24, seed=len(split))
    tags = ["O", *(f"B-{tag}" for tag in TAGS.values())]
    tasks: dict[str, dict[str, Any]] = {
        "TokenClassification": {"dataset": {"textColumn": "words", "labelColumn": "tags", "labels": tags}},
        "CausalLM": {"dataset": {"promptColumn": "prompt", "completionColumn": "completion", "labels": None}},
    }
    for task, changes in tasks.items():
        files = {"train": "train.jsonl", "validation": "validation.jsonl", "test": None, "uri": f"file://{tmp_path}"}
        jobs = []
        for rows in (8, 3):
            made = fresh(job, f"{task}-{rows}", {"precision": "FP32", "maxSteps": 2, "microBatchSize": rows}, task=task)
            made.changes["dataset"] = {**changes["dataset"], **files}
            if task == "CausalLM":
                made.model = tmp_path / "decoder"
                tiny_decoder(made.model)
            else:
                made.changes["hyperparameters"] |= NO_DROPOUT
            made.run()
            jobs.append(made)
        close(first(jobs[0]), first(jobs[1]), 1e-6)


def test_fgm_moves_along_the_gradient_of_the_whole_batch(job: Job) -> None:
    fgm = {**NO_DROPOUT, "adversarial": {"epsilon": 0.5}, "maxGradNorm": 100.0}
    whole, cut = fresh(job, "whole", fgm), fresh(job, "cut", {**fgm, "microBatchSize": 3})
    plain = fresh(job, "plain", {**NO_DROPOUT, "maxGradNorm": 100.0})
    for each in (whole, cut, plain):
        each.run()
    close(first(whole), first(cut), 1e-5)
    with pytest.raises(AssertionError):
        close(first(whole), first(plain), 1e-1)


# --------------------------------------------------------------------------------------------------- out of memory ----
@pytest.mark.parametrize("backward", [False, True])
def test_what_did_not_fit_is_done_again_in_smaller_ones(job: Job, *, backward: bool) -> None:
    """Dropout is on: the same is drawn again, and no gradient of the failed pass is left."""
    known, found = fresh(job, "known", {"microBatchSize": 2}), fresh(job, "found", {})
    known.run()
    with rows_that_fit(3, backward=backward) as tried:
        found.run()
    assert [n for i, n in enumerate(tried) if n not in tried[:i]][:3] == [8, 4, 2]
    assert max(tried[4:]) == 2, "what was found to fit is kept"
    same_bits(known, found)
    assert resolved(found)["microBatchSize"] == 2
    assert "out of memory with 8 examples at once: step 1 is done again in micro-batches of 4" in found.runs[0].text
    assert found.runs[0].text.count("out of memory") == 2


def test_a_resume_goes_on_with_what_was_found_to_fit(job: Job) -> None:
    whole, cut = fresh(job, "whole", {}), fresh(job, "cut", {})
    with rows_that_fit(4):
        whole.run()
        with pytest.raises(Killed):
            cut.run(kill_at=9)
    assert state(cut.newest())["micro_batch"] == 4
    with rows_that_fit(10**6) as tried:
        cut.run()
    assert max(tried) == 4
    same_bits(whole, cut)


def test_a_step_half_way_is_done_again_and_those_before_are_not(job: Job) -> None:
    # Before the first checkpoint that knows of it; it is found out again.
    whole, cut = fresh(job, "whole", {}), fresh(job, "cut", {})
    for each, kill_at in ((whole, None), (cut, 9)):
        each.changes = {"checkpoint": {"everySteps": 6}, "hyperparameters": {}}
        with rows_that_fit(8), pytest.raises(Killed):
            each.run(kill_at=7)
        with rows_that_fit(5):
            if kill_at:
                with pytest.raises(Killed):
                    each.run(kill_at=kill_at)
            each.run()
    assert state(whole.newest())["micro_batch"] == 4
    assert "step 7 is done again in micro-batches of 4" in whole.runs[1].text
    same_bits(whole, cut)


def test_not_even_one_example_fits(job: Job) -> None:
    with rows_that_fit(0) as tried, pytest.raises(TrainingFailure, match=r"a single example.*dataset\.maxLength") as failed:
        job.run()
    assert failed.value.failure.reason == "CudaOutOfMemory"
    assert tried == [8, 4, 2, 1]
    assert not (job.checkpoints / "micro-batch.json").exists(), "there is nothing smaller to try"


def test_an_evaluation_goes_on_with_fewer_rows(job: Job) -> None:
    whole, cut = fresh(job, "whole", {}), fresh(job, "cut", {})
    whole.run()
    with rows_that_fit(5, training=False) as tried:
        cut.run()
    assert tried[:5] == [18, 9, 4, 4, 4]
    one, other = ([e["metrics"] for e in json.loads((j.output / "result.json").read_text())["evaluations"]] for j in (whole, cut))
    for mine, theirs in zip(one, other, strict=True):
        assert [float(m["value"]) for m in mine] == pytest.approx([float(m["value"]) for m in theirs], rel=1e-5)
    with rows_that_fit(0, training=False), pytest.raises(TrainingFailure) as failed:
        fresh(job, "none", {}).run()
    assert failed.value.failure.reason == "CudaOutOfMemory"


def test_what_another_recipe_or_somebody_else_left_is_no_word_for_us(job: Job) -> None:
    for said, at_once in (
        ({"rows": 2, "recipe": job.recipe().digest()}, 2),
        ({"rows": 2, "recipe": "another"}, 8),
        ({"rows": 0, "recipe": job.recipe().digest()}, 8),
        ([1], 8),
    ):
        each = fresh(job, f"said-{at_once}-{len(json.dumps(said))}", {})
        each.checkpoints.mkdir(parents=True)
        (each.checkpoints / "micro-batch.json").write_text(json.dumps(said))
        each.run()
        assert resolved(each)["microBatchSize"] == at_once, said


# ------------------------------------------------------------------------------------------------------------ feed ----
DATA = Encoded(Ragged.of([[2, 5, 3], [2, 5, 6, 3], [2, 3], [2, 7, 8, 9, 3], [2, 4, 3]]), np.arange(5), 0)
CPU = torch.device("cpu")


def test_every_process_has_as_many_micro_batches() -> None:
    rows = np.arange(5)
    for size in (1, 2, 3, 7):
        feeds = [Feed(DATA, 0, CPU, Group(rank, size))(rows, 1) for rank in range(size)]
        assert {len(made) for made in feeds} == {-(-5 // size)}
        assert sorted(int(m.labels) for made in feeds for m in made if m.counts) == [0, 1, 2, 3, 4]


def test_what_was_made_ahead_is_what_is_asked_for() -> None:
    feed = Feed(DATA, 0, CPU, ALONE)
    rows, others = np.array([3, 1, 0]), np.array([4, 2])
    feed.prepare(rows, 2)
    assert feed._ready is None, "a CPU makes nothing ahead"
    feed.ahead = True
    feed.prepare(None, 2)
    assert feed._ready is None
    for asked, at_once, ahead in ((rows, 2, True), (others, 2, False), (rows, 1, False)):
        feed.prepare(rows, 2)
        assert feed._ready is not None
        made = feed._ready[2]
        got = feed(asked, at_once)
        assert (got is made) is ahead
        expected = [collate(DATA, piece, 0, CPU) for piece in np.array_split(asked, -(-len(asked) // at_once))]
        for batch, tensors in zip(got, expected, strict=True):
            assert torch.equal(batch.labels, tensors.pop("labels"))
            assert batch.inputs.keys() == tensors.keys()
            assert all(torch.equal(batch.inputs[name], tensors[name]) for name in tensors)
