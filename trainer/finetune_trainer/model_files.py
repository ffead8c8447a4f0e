"""A model as files: a stock folder that from_pretrained loads, or what trained beside a stock model: its adapters, its head.

In a checkpoint the weights that do not train are a file of their own: it is the same in every checkpoint, and goes to the storage once.
"""

import hashlib
import json
import shutil
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_api import Recipe, names
from finetune_api.model_source import Pooling
from finetune_trainer import adapters

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from finetune_trainer.sharding import Weights

ONE_FILE = "1000GB"
"""Of weights, whatever their size."""
WHOLE = "model.safetensors"
FROZEN, TRAINED = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
"""Names that transformers' index knows."""


def save(
    trained: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    recipe: Recipe,
    folder: Path,
    weights: "Weights",
    frozen: AbstractSet[str] = frozenset(),
) -> None:
    """Writes `weights` (snapshot.weights) as a model folder, with our card. `frozen`: names of those to keep in a file of their own."""
    if recipe.model.pooling is Pooling.MEAN:
        from finetune_trainer import pooling

        pooling.save_head(weights, folder)
    elif getattr(trained, "peft_config", None):
        adapters.save(trained, folder, weights)
    elif frozen and frozen != weights.keys():
        _save_in_two(trained, folder, weights, frozen)
    else:
        trained.save_pretrained(folder, state_dict=dict(weights), max_shard_size=ONE_FILE)
    tokenizer.save_pretrained(folder)
    card = {
        "task": recipe.task,
        "model": recipe.model.uri,
        "pooling": recipe.model.pooling,
        "dataset": recipe.dataset.model_dump(mode="json", by_alias=True, exclude_none=True),
        "recipeDigest": recipe.digest(),
    }
    (folder / names.MODEL_CARD_FILE).write_text(json.dumps(card, indent=1))


def _save_in_two(trained: "PreTrainedModel", folder: Path, weights: "Weights", frozen: AbstractSet[str]) -> None:
    from safetensors import safe_open
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

    beside = folder.with_name(f"{folder.name}-frozen")  # where transformers saves, it removes other files of weights
    trained.save_pretrained(beside, state_dict={k: t for k, t in weights.items() if k in frozen}, max_shard_size=ONE_FILE)
    trained.save_pretrained(folder, state_dict={k: t for k, t in weights.items() if k not in frozen}, max_shard_size=ONE_FILE)
    (folder / WHOLE).rename(folder / TRAINED)
    (beside / WHOLE).rename(folder / FROZEN)
    shutil.rmtree(beside)
    places: dict[str, str] = {}
    for name in (FROZEN, TRAINED):
        with safe_open(folder / name, "pt") as file:
            places |= dict.fromkeys(file.keys(), name)
    size = sum((folder / name).stat().st_size for name in (FROZEN, TRAINED))
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=1, sort_keys=True))


def digest(folder: Path) -> str:
    """sha256 (hex) of a model's weights."""
    made = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        made.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            made.update(hashlib.file_digest(file, "sha256").digest())
    return made.hexdigest()
