"""Low-rank adapters (peft) inside a model that stays what it is: a class of transformers with its own names of layers.

Their files in a checkpoint are peft's own. The pretrained weights are not in it; they are fetched again.
"""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_api.model_source import Lora
from finetune_trainer.errors import TrainingFailure

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

NAME = "default"
_PREFIX = "base_model.model."
"""What the files say before each name: peft's own wrapper, which there is none of around our model."""
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def add(model: "PreTrainedModel", lora: Lora, uri: str, trained: Path | None, missing: Collection[str]) -> None:
    """Puts fresh adapters into the model, or those in the folder. What was not pretrained trains as a whole: the head, and what holds the
    weights that are `missing` in the model's files. Consumes the global RNG."""
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules or _linear(model),
        modules_to_save=[*_heads(model), *_new(model, missing)] or None,
        fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in model.modules()),
    )
    try:
        model.add_adapter(config, NAME)
    except ValueError as error:
        raise TrainingFailure(
            "RecipeInvalid", f"model.lora.targetModules: {error}; this model has: {', '.join(_linear(model))}"
        ) from error
    # Whoever loads the adapter from a hub finds the model there.
    config.base_model_name_or_path = uri.removeprefix("hf://").partition("@")[0] if uri.startswith("hf://") else uri
    if trained is not None:
        weights = {name.removeprefix(_PREFIX): weight for name, weight in load_file(trained / WEIGHTS_FILE).items()}
        try:
            set_peft_model_state_dict(model, weights, adapter_name=NAME)
        except KeyError as error:  # its hash fits: another version wrote it, which did not train this part
            raise TrainingFailure(
                "CheckpointCorrupt",
                f"{trained / WEIGHTS_FILE} has no {error.args[0]}: choose another output.storageUri to train from the start",
            ) from error


def _linear(model: "PreTrainedModel") -> list[str]:
    """Names of all linear modules as they are called within a layer."""
    from torch import nn

    from finetune_trainer import layers

    stack = layers.parts(model).stack
    inside = [
        name[len(stack) + 1 :].partition(".")[2]
        for name, module in model.named_modules()
        if name.startswith(f"{stack}.") and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
    ]
    return sorted(set(inside))


def _heads(model: "PreTrainedModel") -> list[str]:
    """What is not in the body: without it a new head would never train. A decoder's head is part of what was pretrained."""
    if model.get_output_embeddings() is not None:
        return []
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]


def _new(model: "PreTrainedModel", missing: Collection[str]) -> list[str]:
    """Modules of the body with missing weights (BERT's pooler, where a masked language model was pretrained): each time the model is built
    they are drawn anew, so that adapters trained beside them are worth nothing without them."""
    body = f"{model.base_model_prefix}."
    return sorted({name.rpartition(".")[0] for name, _ in model.named_parameters() if name in missing and name.startswith(body)})


def named(model: "PreTrainedModel", weights: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """Of the model's weights the adapters alone, under the names that peft's files have. Not while the model computes: peft asks its modules
    for their state, and that changes what is cut up (sharding.py)."""
    from peft import get_peft_model_state_dict

    # Asked to find out about the embeddings by itself, peft looks for the model at the hub, at every save.
    found = get_peft_model_state_dict(model, weights, adapter_name=NAME, save_embedding_layers=False)
    return {_PREFIX + name: tensor for name, tensor in found.items()}


def save(model: "PreTrainedModel", folder: Path, weights: "dict[str, torch.Tensor]") -> None:
    """The adapters alone, as peft has them; `weights` are `named`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: w.contiguous() for name, w in weights.items()}, folder / WEIGHTS_FILE, {"format": "pt"})
    model.peft_config[NAME].save_pretrained(folder)


def merge(model: "PreTrainedModel") -> None:
    """Adds the adapters to the weights and takes them out: what is left is a stock model."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    wrapped = [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer | ModulesToSaveWrapper)]
    for name, module in wrapped:
        path, _, attribute = name.rpartition(".")
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            plain = module.get_base_layer()
        else:
            plain = module.modules_to_save[NAME]
        setattr(model.get_submodule(path), attribute, plain)
    del model.peft_config
    model._hf_peft_config_loaded = False
