"""TokenClassification: a tag for every word. A word of several tokens has its tag on the first; the others have none."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_trainer import metrics
from finetune_trainer.tasks.base import IGNORED, BadRowError, Evaluated, Examples, Floats, Predicting, Row, text_of
from finetune_trainer.tasks.encoded import Encoded, Ragged

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


class Tagging(Predicting):
    """Cross entropy over the tags of all words."""

    auto_class = "AutoModelForTokenClassification"

    def input(self, row: Row) -> list[str]:
        words = _items(row, self.dataset.text_column)
        return [text_of({self.dataset.text_column: word}, self.dataset.text_column) for word in words]

    def target(self, row: Row) -> list[int]:
        column = self.dataset.label_column
        tags = _items(row, column)
        if len(tags) != len(_items(row, self.dataset.text_column)):
            raise BadRowError(f"{column} has not as many tags as {self.dataset.text_column} has words")
        if any(tag not in self.ids for tag in tags):
            raise BadRowError(f"{column} has a tag that is not one of dataset.labels ({', '.join(self.labels)})")
        return [self.ids[tag] for tag in tags]

    def counts(self, labels: Any) -> dict[str, int]:
        found = Counter(tag for row in labels for tag in row)
        return {label: found[i] for label, i in self.ids.items()}

    def encode(self, examples: Examples, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> Encoded:
        made = tokenizer(
            examples.texts, is_split_into_words=True, truncation=True, max_length=max_length, return_attention_mask=False
        )
        labels, tagged, cut = [], [], 0
        for i, tags in enumerate(examples.labels):
            words = made.word_ids(i)
            first = [w is not None and (k == 0 or words[k - 1] != w) for k, w in enumerate(words)]
            labels.append([tags[w] if starts else IGNORED for w, starts in zip(words, first, strict=True)])
            tagged.append([w for w, starts in zip(words, first, strict=True) if starts])
            # Not by how many there are: a word of nothing but, say, a zero-width space has no token at all.
            cut += not {*words} >= {w for rest in made[i].overflowing for w in rest.word_ids if w is not None}
        return Encoded(Ragged.of(made["input_ids"]), Ragged.of(labels), cut, words=Ragged.of(tagged))

    def weights(self, data: Encoded) -> Floats:
        return np.array([np.count_nonzero(row != IGNORED) for row in data.labels], dtype=np.float64)

    def loss(self, logits: "torch.Tensor", labels: "torch.Tensor", smoothing: float) -> "torch.Tensor":
        from torch.nn.functional import cross_entropy

        flat = logits.flatten(0, 1).float()
        return cross_entropy(flat, labels.flatten(), reduction="sum", ignore_index=IGNORED, label_smoothing=smoothing)

    def width(self, data: Encoded) -> int:
        """The row's loss, and a tag for each token."""
        return 1 + int(data.lengths.max())

    def outputs(self, logits: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        import torch
        from torch.nn.functional import cross_entropy

        losses = cross_entropy(logits.float().transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
        return torch.cat([losses.sum(dim=1, keepdim=True), logits.argmax(dim=-1).float()], dim=1)

    def score(self, outputs: Floats, data: Encoded) -> Evaluated:
        truth, predicted = [], []
        for row, labels in zip(outputs, data.labels, strict=True):
            at = np.flatnonzero(labels != IGNORED)
            truth.append([self.labels[labels[k]] for k in at])
            predicted.append([self.labels[int(row[1 + k])] for k in at])
        right = sum(a == b for t, p in zip(truth, predicted, strict=True) for a, b in zip(t, p, strict=True))
        count = max(1.0, float(self.weights(data).sum()))
        overall, rows = metrics.spans(truth, predicted)
        return Evaluated(overall | {"accuracy": right / count, "loss": float(outputs[:, 0].sum() / count)}, rows)

    def answer(self, outputs: Floats, data: Encoded, texts: Sequence[Any]) -> list[dict[str, Any]]:
        assert data.words is not None
        answers = []
        for row, labels, tagged, words in zip(outputs, data.labels, data.words, texts, strict=True):
            tags: list[str | None] = [None] * len(words)  # of a word without tokens, or behind maxLength
            for word, k in zip(tagged, np.flatnonzero(labels != IGNORED), strict=True):
                tags[word] = self.labels[int(row[1 + k])]
            answers.append({"words": words, "tags": tags})
        return answers


def _items(row: Row, column: str) -> list[str]:
    value = row[column]
    items = [str(item) for item in value] if isinstance(value, list) else str(value or "").split()
    if not items or (isinstance(value, list) and None in value):
        raise BadRowError(f"{column} is empty or no text")
    return items
