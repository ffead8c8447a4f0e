"""Learning from few examples: a sample of the data, and prompts. Parts of the recipe's data set."""

import re
from typing import Annotated, ClassVar, Self

from pydantic import Field, StringConstraints, model_validator

from finetune_api.base import Cel, Model, Shape

TEMPLATE = r"^([^{}]|\{\{|\}\}|\{[^{}]+\})*$"
PLACEHOLDER = re.compile(r"(\{\{)|(\}\})|\{([^{}]+)\}")
"""A brace that stands for itself, in one of two ways, or the name between two."""
MASK = "mask"
"""The placeholder that is no column: where the model fills in a word."""
PLAIN = "self{}.template.replace('{{{{', '').replace('}}}}', '')"
"""CEL of a template without the braces that stand for themselves; to be formatted with the path of the prompt."""


class FewShot(Model):
    """A sample of the training data; the other splits stay whole."""

    examples_per_class: Annotated[int, Field(ge=1, le=1_000_000)]
    """Examples of each label, drawn without replacement by hyperparameters.seed; all of a label that has fewer. A larger number draws
    the same examples and more."""


class Prompt(Model):
    """The text that the model reads, made of a row's columns."""

    template: Annotated[
        str,
        StringConstraints(min_length=1, max_length=4096),
        Shape(TEMPLATE, "must be text with {column} in braces; a brace that stands for itself is written twice"),
    ]
    """Text with {column} for what stands in a column; {{ and }} for braces. It takes the place of dataset.textColumn. A text that is too
    long loses the end of its longest column; the template stays."""
    verbalizers: (
        Annotated[dict[str, Annotated[str, StringConstraints(min_length=1, max_length=64)]], Field(min_length=2, max_length=100)]
        | None
    ) = None
    """A word for each label, to be filled in at {mask} by a masked language model (Schick and Schuetze, 2021), whose head for that
    is trained in place of a new one. Each must be one token of the model's tokenizer. For SequenceClassification."""

    cel: ClassVar[tuple[Cel, ...]] = (
        Cel(
            f"{PLAIN.format('')}.split('{{mask}}').size() == (has(self.verbalizers) ? 2 : 1)",
            "template must hold {mask} once with verbalizers, and never without",
            ".template",
        ),
        Cel(
            f"{PLAIN.format('')}.replace('{{mask}}', '').contains('{{')",
            "template must hold the {name} of a column",
            ".template",
        ),
        Cel(
            "!has(self.verbalizers) || self.verbalizers.all(a, self.verbalizers.all(b, a == b || self.verbalizers[a] != "
            "self.verbalizers[b]))",
            "verbalizers must be different words",
            ".verbalizers",
        ),
    )

    @model_validator(mode="after")
    def _fills(self) -> Self:
        if self.placeholders.count(MASK) != (self.verbalizers is not None):
            raise ValueError("template: must hold {mask} once with verbalizers, and never without")
        if not self.columns:
            raise ValueError("template: must hold the {name} of a column")
        if self.verbalizers and len(set(self.verbalizers.values())) != len(self.verbalizers):
            raise ValueError("verbalizers: must be different words")
        return self

    @property
    def placeholders(self) -> list[str]:
        """Names in braces, in order."""
        return [name for _, _, name in PLACEHOLDER.findall(self.template) if name]

    @property
    def columns(self) -> tuple[str, ...]:
        """That a row must have, each once."""
        return tuple(dict.fromkeys(name for name in self.placeholders if name != MASK))
