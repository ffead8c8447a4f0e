"""SequenceClassification as a cloze (PET: Schick and Schuetze, 2021): a masked language model fills a word into a template, one for each label.

What the model learned in pretraining answers, so that a few examples, or none, say a lot. The model stays a stock masked language model.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from finetune_api.recipe import Dataset
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.tasks.base import Examples
from finetune_trainer.tasks.classification import SingleLabel
from finetune_trainer.tasks.encoded import Encoded

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class Cloze(SingleLabel):
    """Cross entropy over the words of the labels, at the mask."""

    auto_class = "AutoModelForMaskedLM"

    def __init__(self, dataset: Dataset) -> None:
        super().__init__(dataset)
        assert dataset.prompt is not None
        assert dataset.prompt.verbalizers is not None
        assert self.template is not None
        self.words = [dataset.prompt.verbalizers[label] for label in self.labels]
        self.word_ids: list[int] = []

    def encode(self, examples: Examples, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> Encoded:
        if tokenizer.mask_token is None:
            raise TrainingFailure(
                "RecipeInvalid", "dataset.prompt.verbalizers: the model's tokenizer has no mask; take a masked language model"
            )
        self.find_words(tokenizer)
        return self.encode_template(examples, tokenizer, max_length, tokenizer.mask_token)

    def find_words(self, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """Token id of each label's word, as it is written where the mask stands."""
        assert self.template is not None
        space = " " if self.template.before_mask.isspace() else ""
        ids = []
        for word in self.words:
            tokens = tokenizer(space + word, add_special_tokens=False)["input_ids"]
            if len(tokens) != 1 or tokens[0] == tokenizer.unk_token_id:
                pieces = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(tokens)))
                raise TrainingFailure(
                    "RecipeInvalid",
                    f"dataset.prompt.verbalizers: {word!r} is not one token of the model's tokenizer but {pieces}",
                )
            ids.append(int(tokens[0]))
        double = next((word for word, token in zip(self.words, ids, strict=True) if ids.count(token) > 1), None)
        if double is not None:
            raise TrainingFailure(
                "RecipeInvalid", f"dataset.prompt.verbalizers: {double!r} is the same token as the word of another label"
            )
        return ids

    # ------------------------------------------------------------------------------------------------------- model -----
    def configure(self, config: "PretrainedConfig") -> None:
        """Everything stays as it was pretrained."""

    def keeps_head(self, config: "PretrainedConfig") -> bool:  # noqa: ARG002
        return True

    def check_head(self, missing: Collection[str]) -> None:
        if missing:
            raise TrainingFailure(
                "RecipeInvalid",
                f"dataset.prompt.verbalizers: model.uri has no trained head that fills in words (there is no {min(missing)}); "
                "take a masked language model",
            )

    def attach(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        """From now on the model's head sees the mask's state only and answers (rows, 1, vocabulary): all else would be thrown away, and a
        vocabulary is wide."""
        import torch

        self.word_ids, mask = self.find_words(tokenizer), tokenizer.mask_token_id

        def only_the_mask(_: Any, args: tuple[Any, ...], given: dict[str, Any], answer: Any) -> Any:
            ids = given["input_ids"] if "input_ids" in given else args[0]
            rows = torch.arange(len(ids), device=ids.device)
            answer.last_hidden_state = answer.last_hidden_state[rows, (ids == mask).int().argmax(dim=1)][:, None]
            return answer

        model.base_model.register_forward_hook(only_the_mask, with_kwargs=True)

    def _by_label(self, logits: "torch.Tensor") -> "torch.Tensor":
        return logits[:, 0, self.word_ids]

    def loss(self, logits: "torch.Tensor", labels: "torch.Tensor", smoothing: float) -> "torch.Tensor":
        return super().loss(self._by_label(logits), labels, smoothing)

    def outputs(self, logits: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        return super().outputs(self._by_label(logits), labels)
