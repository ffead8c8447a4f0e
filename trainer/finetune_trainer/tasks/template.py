"""dataset.prompt.template: one text made of a row's columns. Rendered here, so that training and prediction read the same.

Too long a text loses the ends of its columns, token by token, and never a token of the template: what it asks stays, the mask above all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune_api.few_shot import MASK, PLACEHOLDER, Prompt
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.tasks.encoded import Ragged

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""First character, and the one behind the last."""


@dataclass(frozen=True)
class Template:
    """The template cut into pieces, and the columns that it reads, each once."""

    pieces: tuple[tuple[str, bool], ...]
    """Text that stands for itself, or (true) a placeholder's name."""
    columns: tuple[str, ...]

    @classmethod
    def of(cls, prompt: Prompt) -> "Template":
        pieces, at = [], 0
        for found in PLACEHOLDER.finditer(prompt.template):
            pieces.append((prompt.template[at : found.start()], False))
            name = found[3]
            pieces.append((name, True) if name else (found[0][0], False))
            at = found.end()
        pieces.append((prompt.template[at:], False))
        return cls(tuple(piece for piece in pieces if piece[0]), prompt.columns)

    @property
    def before_mask(self) -> str:
        """The character before the mask; none at the beginning."""
        at = self.pieces.index((MASK, True))
        text, placeholder = self.pieces[at - 1] if at else ("", False)
        return "" if placeholder else text[-1:]

    def render(self, values: Sequence[str], mask: str = "") -> tuple[str, list[Span]]:
        """The text, and where in it columns stand. `values` are those of `columns`; one that holds the mask's own text loses it."""
        by_name = dict(zip(self.columns, values, strict=True))
        text, spans = "", []
        for piece, placeholder in self.pieces:
            if not placeholder:
                text += piece
            elif piece == MASK:
                text += mask
            else:
                value = by_name[piece].replace(mask, " ") if mask else by_name[piece]
                spans.append((len(text), len(text) + len(value)))
                text += value
        return text, spans

    def encode(
        self, rows: Sequence[Sequence[str]], tokenizer: "PreTrainedTokenizerBase", max_length: int, mask: str = ""
    ) -> tuple[Ragged, int]:
        """Token ids of each row, at most max_length, and how many rows were cut. Raises TrainingFailure where the template alone is longer."""
        rendered = [self.render(values, mask) for values in rows]
        made = tokenizer([text for text, _ in rendered], return_offsets_mapping=True)
        ids, cut = [], 0
        for tokens, offsets, (_, spans) in zip(made["input_ids"], made["offset_mapping"], rendered, strict=True):
            if len(tokens) > max_length:
                cut += 1
                ids.append(_shortened(tokens, offsets, spans, max_length))
            else:
                ids.append(tokens)
        return Ragged.of(ids), cut


def _shortened(tokens: list[int], offsets: Sequence[Span], spans: list[Span], length: int) -> list[int]:
    """Takes tokens from the end of whatever column has most of them."""
    # A token whose end lies in a column is the column's, also where it begins with a space of the template.
    own = [[k for k, (_, end) in enumerate(offsets) if first < end <= last] for first, last in spans]
    gone: set[int] = set()
    while len(tokens) - len(gone) > length:
        longest = max(own, key=len)
        if not longest:
            raise TrainingFailure(
                "RecipeInvalid",
                f"dataset.prompt.template: it has {len(tokens) - len(gone)} tokens without any column; "
                f"dataset.maxLength is {length}",
            )
        gone.add(longest.pop())
    return [token for k, token in enumerate(tokens) if k not in gone]
