"""Finds the pretrained model, sets dropout, builds it with a stock head for the task."""

import hashlib
import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api.hyperparameters import Dropout
from finetune_api.model_source import Pooling
from finetune_api.recipe import Recipe
from finetune_api.tasks import Task
from finetune_trainer import adapters, hub
from finetune_trainer.config import Runtime
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.fetch import Log, fetch_folder, to_stderr
from finetune_trainer.store import FolderStore
from finetune_trainer.tasks import TaskKind

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DROPOUT_FIELDS: dict[str, tuple[tuple[str, ...], ...]] = {
    # Role -> groups of config fields; the first group with a field that the config has is set, all of its present fields.
    # Order matters: deberta also has `hidden_dropout_prob`, t5 only `dropout_rate`, gpt2 two fields for one role.
    "hidden": (
        ("hidden_dropout_prob",),
        ("resid_pdrop", "embd_pdrop", "emb_pdrop"),
        ("resid_dropout", "embed_dropout"),
        ("mlp_dropout", "embedding_dropout"),
        ("residual_dropout", "embedding_dropout"),
        ("hidden_dropout",),
        ("dropout_rate",),
        ("dropout",),
    ),
    "attention": (
        ("attention_probs_dropout_prob",),
        ("attn_pdrop",),
        ("attention_dropout",),
        ("lsh_attention_probs_dropout_prob", "local_attention_probs_dropout_prob"),
    ),
    "classifier": (
        ("classifier_dropout",),
        ("classifier_dropout_prob",),
        ("seq_classif_dropout",),
        ("pooler_dropout", "cls_dropout"),
        ("summary_last_dropout",),
        ("summary_first_dropout",),
    ),
}

OTHER_FORMATS = ["*.bin", "*.h5", "*.onnx", "*.msgpack", "*.ot"]
"""Weights that are not read."""


def make_deterministic() -> None:
    """Of this process, from here on: operations that give the same bits each time, or an error where a GPU has none (RuntimeError)."""
    import torch

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when the first product is computed
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def fetch(uri: str, runtime: Runtime, log: Log = to_stderr) -> Path:
    """A local folder with the model's files. Raises TrainingFailure(ModelNotFound)."""
    store = hub.MODELS.open(uri, runtime.model_mirror, runtime.s3_root, only=None, without=OTHER_FORMATS)
    if isinstance(store, FolderStore) and store.root.is_dir():
        return _checked(store.root, uri)
    # `finetune run` and a container that starts again keep the work folder: files of another model must not mix in.
    folder = runtime.workdir / "model" / hashlib.sha256(store.uri.encode()).hexdigest()[:16]
    if fetch_folder(store, folder, log=log) == 0:
        raise TrainingFailure("ModelNotFound", f"model.uri {uri}: there are no files under {store.uri}")
    return _checked(folder, uri)


def _checked(folder: Path, uri: str) -> Path:
    if not (folder / "config.json").is_file():
        raise TrainingFailure(
            "ModelNotFound", f"model.uri {uri}: there is no config.json in {folder}; it is not a transformers model"
        )
    return folder


def set_dropout(config: "PretrainedConfig", dropout: Dropout) -> None:
    """Sets the rates on the configuration, before the model is built: some architectures leave out layers whose rate is 0."""
    for role, groups in DROPOUT_FIELDS.items():
        rate = getattr(dropout, role)
        if rate is None:
            continue
        present = [[f for f in group if hasattr(config, f)] for group in groups]
        fields = next((fields for fields in present if fields), None)
        if fields is None:
            possible = [r for r, gs in DROPOUT_FIELDS.items() if any(hasattr(config, f) for g in gs for f in g)]
            raise TrainingFailure(
                "RecipeInvalid",
                f"hyperparameters.dropout.{role}: {config.model_type} has no such dropout, only: {', '.join(possible)}",
            )
        for field in fields:
            setattr(config, field, rate)


def load_tokenizer(folder: Path, recipe: Recipe) -> "PreTrainedTokenizerBase":
    """The model's tokenizer, with a padding token."""
    from transformers import AutoTokenizer

    def load(**options: bool) -> "PreTrainedTokenizerBase":
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)

    try:
        tokenizer = load()
        if recipe.task is Task.TOKEN_CLASSIFICATION and getattr(tokenizer, "add_prefix_space", None) is False:
            tokenizer = load(add_prefix_space=True)  # byte-level ones read words that are given one by one only so
    except (OSError, ValueError) as error:
        raise TrainingFailure(
            "ModelNotFound", f"model.uri {recipe.model.uri}: its tokenizer cannot be loaded: {_first_line(error)}"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build(
    folder: Path, recipe: Recipe, kind: TaskKind, tokenizer: "PreTrainedTokenizerBase", trained: Path | None = None
) -> "PreTrainedModel":
    """The model in fp32: pretrained body, stock head for the task; with model.lora its adapters, with model.pooling Mean its head, new or
    from the folder `trained`.

    A checkpoint's head is kept when it says the same labels. Consumes the global RNG (a new head).
    """
    try:
        if recipe.model.pooling is Pooling.MEAN:
            return _mean_pooled(folder, recipe, kind, tokenizer, trained)
        model, missing = _load(folder, recipe, kind, tokenizer)
    except (OSError, ValueError, RuntimeError) as error:
        raise TrainingFailure(
            "ModelNotFound", f"model.uri {recipe.model.uri}: it cannot be loaded: {_first_line(error)}"
        ) from error
    kind.attach(model, tokenizer)
    if recipe.hyperparameters.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise TrainingFailure("RecipeInvalid", f"hyperparameters.gradientCheckpointing: {model.config.model_type} has none")
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if recipe.model.lora is not None:
        adapters.add(model, recipe.model.lora, recipe.model.uri, trained, missing)
    from finetune_trainer import shortcuts

    fields = [f for group in DROPOUT_FIELDS["attention"] for f in group]
    shortcuts.take(model, attention_dropout=any(getattr(model.config, f, None) for f in fields))
    return model


def _config(folder: Path, recipe: Recipe, tokenizer: "PreTrainedTokenizerBase") -> "PretrainedConfig":
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    agree_on_padding(config, tokenizer)
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and recipe.dataset.max_length > limit:
        raise TrainingFailure(
            "RecipeInvalid", f"dataset.maxLength: {recipe.dataset.max_length} is more than the model's {limit} positions"
        )
    return config


def agree_on_padding(config: "PretrainedConfig", tokenizer: "PreTrainedTokenizerBase") -> None:
    """A decoder's head reads the last token that is no padding, as the configuration has it: rows are padded as the tokenizer has it.

    Encoders are told by a mask what is padding, and some count their positions from its id on: theirs stays what it is.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

    kind = config.model_type
    decoder = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if decoder or getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id


def _mean_pooled(
    folder: Path, recipe: Recipe, kind: TaskKind, tokenizer: "PreTrainedTokenizerBase", trained: Path | None
) -> "PreTrainedModel":
    from finetune_trainer import pooling

    encoder = pooling.load_encoder(folder, config=_config(folder, recipe, tokenizer))
    dropout = recipe.hyperparameters.dropout.classifier or 0.0
    if trained is not None:
        return pooling.load(trained, encoder, dropout)
    return pooling.MeanPooled(encoder, pooling.Head(encoder.config.hidden_size, len(kind.labels) or 1, dropout))


def _load(
    folder: Path, recipe: Recipe, kind: TaskKind, tokenizer: "PreTrainedTokenizerBase"
) -> tuple["PreTrainedModel", Collection[str]]:
    """The model, and the names of its weights that are not in the files: they are new."""
    import torch
    import transformers

    config = _config(folder, recipe, tokenizer)
    keeps = kind.keeps_head(config)
    kind.configure(config)
    set_dropout(config, recipe.hyperparameters.dropout)
    options = {
        "local_files_only": True,
        "trust_remote_code": False,
        "dtype": torch.float32,
        "use_safetensors": True,
        "output_loading_info": True,
    }
    auto = getattr(transformers, kind.auto_class)
    if keeps or not _has_head(config):
        model, found = auto.from_pretrained(folder, config=config, ignore_mismatched_sizes=True, **options)
        kind.check_head(found["missing_keys"])
        return model, found["missing_keys"]
    # Its head says other labels: the body alone is taken over.
    model = auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
    body, found = transformers.AutoModel.from_pretrained(folder, config=config, **options)
    model.base_model.load_state_dict(body.state_dict(), strict=False)
    return model, {f"{model.base_model_prefix}.{name}" for name in found["missing_keys"]}


def _has_head(config: "PretrainedConfig") -> bool:
    return any("For" in name and "MaskedLM" not in name for name in config.architectures or [])


def _first_line(error: Exception) -> Any:
    return str(error).strip().split("\n", 1)[0]
