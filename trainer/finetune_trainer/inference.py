"""Uses a trained model: `finetune predict`, `finetune evaluate`, and tests. Applies what finetune.json says."""

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from finetune_api.model_source import Pooling
from finetune_api.names import MODEL_CARD_FILE
from finetune_api.recipe import Dataset
from finetune_api.tasks import Task
from finetune_trainer import adapters, config, model
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.evaluation import evaluate, outputs
from finetune_trainer.tasks import BadRowError, Evaluated, Examples, TaskKind, kind_of
from finetune_trainer.tasks.base import Predicting
from finetune_trainer.tasks.completion import prompt_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = Mapping[str, Any]
MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class Card:
    """finetune.json: what the model was trained to do, and how its data are read."""

    task: Task
    model: str
    dataset: Dataset
    pooling: Pooling = Pooling.AUTO

    @classmethod
    def read(cls, folder: Path) -> "Card":
        """Raises TrainingFailure(ModelNotFound)."""
        file = folder / MODEL_CARD_FILE
        try:
            card = json.loads(file.read_text(encoding="utf-8"))
            dataset, pooling = Dataset.model_validate(card["dataset"]), Pooling(card.get("pooling", Pooling.AUTO))
            return cls(Task(card["task"]), str(card["model"]), dataset, pooling)
        except FileNotFoundError as error:
            message = f"{folder}: there is no {file.name}; it is not a model of `finetune run`"
            raise TrainingFailure("ModelNotFound", message) from error
        except json.JSONDecodeError as error:
            raise TrainingFailure("ModelNotFound", f"{file}: is not JSON: train again, or restore it") from error
        except (KeyError, TypeError, ValueError, ValidationError) as error:
            message = f"{file}: does not say task, model and dataset: train again, or restore it"
            raise TrainingFailure("ModelNotFound", message) from error

    @property
    def kind(self) -> TaskKind:
        return kind_of(self.task, self.dataset)


class Predictor:
    """A trained model with its tokenizer and card."""

    def __init__(self, trained: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", card: Card) -> None:
        self.model, self.tokenizer, self.card, self.kind = trained, tokenizer, card, card.kind
        self.device = next(trained.parameters()).device
        self.kind.attach(trained, tokenizer)
        if card.task is Task.CAUSAL_LM:
            from transformers import GenerationConfig

            # Many models bring penalties, beams and the like with them: only how an answer ends is kept. Training ends its
            # completions as the tokenizer says, which may be something else.
            ends = trained.generation_config.eos_token_id
            known = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
            trained.generation_config = GenerationConfig(eos_token_id=sorted(known) or None)

    def predict(self, texts: Sequence[Any]) -> list[dict[str, Any]]:
        """One answer per text, in order: label, labels or value with what they rest on, tags of words, or a completion.

        A text is what TaskKind.input makes of a row. A plain text will do for tags, where it is cut into words at its spaces, and for
        chats, where it is what the user says.
        """
        if not texts:
            return []
        if self.card.task is Task.CAUSAL_LM:
            if self.card.dataset.messages_column is not None:
                texts = [[{"role": "user", "content": text}] if isinstance(text, str) else text for text in texts]
            prompts = _of_each(texts, lambda text: prompt_tokens(text, self.tokenizer))
            return [{"completion": self._complete(ids)} for ids in prompts]
        if self.card.task is Task.TOKEN_CLASSIFICATION:
            texts = [text.split() if isinstance(text, str) else text for text in texts]
        data = self.kind.encode(self._unlabelled(texts), self.tokenizer, self.card.dataset.max_length)
        scores = outputs(self.model, self.kind, data, self.tokenizer.pad_token_id, self.device)
        assert isinstance(self.kind, Predicting)
        return self.kind.answer(scores, data, texts)

    def _unlabelled(self, texts: Sequence[Any]) -> Examples:
        if self.card.task is Task.TOKEN_CLASSIFICATION:
            return Examples("texts", list(texts), [[0] * len(words) for words in texts])
        blank = {self.kind.columns[-1]: 0.0 if self.card.task is Task.REGRESSION else "".join(self.kind.labels[:1])}
        return Examples("texts", list(texts), self.kind.collect([self.kind.target(blank)] * len(texts)))

    def _complete(self, ids: list[int]) -> str:
        import torch

        positions = getattr(self.model.config, "max_position_embeddings", None) or sys.maxsize
        # Cut as in training, where the end of a prompt stays; what is written needs positions too, in a small model half of them.
        ids = ids[-min(self.card.dataset.max_length, positions - min(MAX_NEW_TOKENS, positions // 2)) :]
        given = torch.tensor([ids], device=self.device)
        with torch.inference_mode():
            made = self.model.generate(
                given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=min(MAX_NEW_TOKENS, positions - len(ids)),
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        return str(self.tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)).strip()

    def evaluate(self, rows: Sequence[Row]) -> Evaluated:
        """Scores of rows with the columns of the training data. Raises TrainingFailure(DataInvalid) that names the first bad one."""
        if not rows:
            raise TrainingFailure("DataInvalid", "there are no rows")
        texts = read_inputs(self.kind, rows)
        targets = _of_each(rows, lambda row: self.kind.target(dict(row)))
        examples = Examples("rows", texts, self.kind.collect(targets))
        data = self.kind.encode(examples, self.tokenizer, self.card.dataset.max_length)
        if data.bad:
            raise TrainingFailure("DataInvalid", data.bad[0].said)
        return evaluate(self.model, self.kind, data, self.tokenizer.pad_token_id, self.device)


def read_inputs(kind: TaskKind, rows: Sequence[Row]) -> list[Any]:
    """What the model reads of each row. Raises TrainingFailure(DataInvalid) that names the first bad one."""
    return _of_each(rows, lambda row: kind.input(dict(row)))


def _of_each(items: Sequence[Any], read: Callable[[Any], Any]) -> list[Any]:
    made = []
    for number, item in enumerate(items, start=1):
        try:
            made.append(read(item))
        except BadRowError as error:
            raise TrainingFailure("DataInvalid", f"row {number}: {error}") from error
    return made


def load(model_dir: Path, card: Card | None = None) -> Predictor:
    """The model in this folder; with adapters alone, also the model they belong to. Raises TrainingFailure(ModelNotFound)."""
    import torch
    import transformers

    card = card or Card.read(model_dir)
    auto = getattr(transformers, card.kind.auto_class)
    try:
        if card.pooling is Pooling.MEAN:
            from finetune_trainer import pooling

            trained = pooling.load(model_dir, pooling.load_encoder(model_dir))
        elif (model_dir / adapters.CONFIG_FILE).is_file():
            with tempfile.TemporaryDirectory(prefix="finetune-model-") as scratch:
                runtime = config.Runtime("predict", Path(scratch), **config.places())
                base = model.fetch(card.model, runtime)
                # As in training, whatever the base was saved in. A head for other labels gives way to the adapters' own.
                as_trained = {"dtype": torch.float32, "use_safetensors": True, "ignore_mismatched_sizes": True}
                trained = auto.from_pretrained(base, config=_configuration(base, card), **as_trained, **_LOCAL)
                trained.load_adapter(str(model_dir))
        else:
            trained = auto.from_pretrained(model_dir, **_LOCAL)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir, **_LOCAL)
        if card.pooling is not Pooling.MEAN:
            model.agree_on_padding(trained.config, tokenizer)  # beside adapters alone it is as its model was pretrained
    except (OSError, ValueError, RuntimeError) as error:
        raise TrainingFailure(
            "ModelNotFound", f"{model_dir}: the model cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
    return Predictor(trained, tokenizer, card)


def _configuration(base: Path, card: Card) -> Any:
    from transformers import AutoConfig

    found = AutoConfig.from_pretrained(base, **_LOCAL)
    card.kind.configure(found)
    return found


_LOCAL = {"local_files_only": True, "trust_remote_code": False}
