"""Uses a trained model: `finetune predict`, `finetune evaluate`, and tests. Applies what finetune.json says."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_api.names import MODEL_CARD_FILE
from finetune_trainer.data import Encoded
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.evaluation import Evaluated, evaluate, logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prediction:
    """The most probable label, and the probability of each."""

    label: str
    probabilities: dict[str, float]


class Predictor:
    """A trained classifier with its tokenizer and card."""

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", card: dict[str, Any]) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.card = card
        self.labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
        self.device = next(model.parameters()).device

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        """One prediction per text, in order."""
        if not texts:
            return []
        scores = logits(self.model, self._encode(texts, [0] * len(texts)), self.tokenizer.pad_token_id, self.device)
        shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
        probabilities = shifted / shifted.sum(axis=1, keepdims=True)
        return [
            Prediction(self.labels[int(row.argmax())], {n: float(p) for n, p in zip(self.labels, row, strict=True)})
            for row in probabilities
        ]

    def evaluate(self, texts: Sequence[str], labels: Sequence[str]) -> Evaluated:
        """Scores of texts whose labels are known. Raises TrainingFailure(DataInvalid) for a label the model does not have."""
        ids = {label: i for i, label in enumerate(self.labels)}
        unknown = [i for i, label in enumerate(labels, start=1) if label not in ids]
        if unknown or not labels:
            where = f"row {unknown[0]} has a label that the model does not know" if unknown else "there are no rows"
            raise TrainingFailure("DataInvalid", f"{where}; its labels are {', '.join(self.labels)}")
        encoded = self._encode(texts, [ids[label] for label in labels])
        return evaluate(self.model, encoded, self.tokenizer.pad_token_id, self.device)

    def _encode(self, texts: Sequence[str], labels: Sequence[int]) -> Encoded:
        limit = int(self.card["maxLength"])
        ids = self.tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
        return Encoded(ids, np.array(labels, dtype=np.int64), sum(len(row) >= limit for row in ids))


def load(model_dir: Path) -> Predictor:
    """The model in this folder. Raises TrainingFailure(ModelNotFound)."""
    card = model_dir / MODEL_CARD_FILE
    if not card.is_file():
        raise TrainingFailure("ModelNotFound", f"{model_dir}: there is no {MODEL_CARD_FILE}; it is not a model of this trainer")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        model = AutoModelForSequenceClassification.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise TrainingFailure(
            "ModelNotFound", f"{model_dir}: the model cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
    return Predictor(model, tokenizer, json.loads(card.read_text()))
