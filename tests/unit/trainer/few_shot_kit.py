"""What the tests of learning from few examples share."""

import json
from typing import Any

import pytest
import torch
import transformers
from trainer_kit import Job

from finetune_trainer.errors import TrainingFailure

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
