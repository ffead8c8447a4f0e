"""Whether a training may go on from a checkpoint of another recipe: only where the other recipe would have done the same so far.

A manifest tells the recipe's digest, and for people and for this module the fields that it is made of and the schedule's horizon.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from finetune_api import Recipe

LENGTHS = ("hyperparameters.epochs", "hyperparameters.maxSteps")
SHOWN = 3
"""Differing fields that a message names."""


@dataclass(frozen=True)
class Lineage:
    """What the checkpoints of this training have in common. `steps_per_epoch` is 0 until the data is known."""

    digest: str
    recipe: Recipe | None = None
    steps_per_epoch: int = 0

    @classmethod
    def of(cls, recipe: Recipe, examples: int) -> "Lineage":
        return cls(recipe.digest(), recipe, math.ceil(examples / recipe.hyperparameters.batch_size))

    @property
    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        known = {"fields": self.recipe.deciding(), "stepsPerEpoch": self.steps_per_epoch} if self.recipe else {}
        return {"recipe": self.digest, **known}

    def differences(self, manifest: Mapping[str, Any]) -> str:
        """In words, why this training cannot go on from there; empty where it can."""
        if manifest["recipe"] == self.digest:
            return ""
        fields = manifest.get("fields")
        if self.recipe is None or not isinstance(fields, Mapping):
            return "its digest differs"
        changed = dict(_changed(fields, self.recipe.deciding()))
        if changed and changed.keys() <= set(LENGTHS):
            return self._other_length(manifest, changed)
        return _told(changed)

    def _other_length(self, manifest: Mapping[str, Any], changed: Mapping[str, tuple[Any, Any]]) -> str:
        """Longer or shorter is the same training as long as the schedule had the same rates so far."""
        from finetune_trainer.optim import factor

        assert self.recipe is not None
        try:
            there = Recipe.model_validate({**manifest["fields"], "output": {"storageUri": "file:///any"}}).hyperparameters
            per_epoch = int(manifest.get("stepsPerEpoch") or 0)
        except (ValueError, TypeError, OverflowError):  # a manifest may hold anything
            return "its fields are not those of a recipe"
        here, step = self.recipe.hyperparameters, int(manifest["step"])
        totals = [min(per_epoch * h.epochs, h.max_steps or per_epoch * h.epochs) for h in (there, here)]
        if step > totals[1]:
            return f"{_told(changed)}: its step {step} is beyond the end"
        if per_epoch and all(factor(here.schedule, s, totals[0]) == factor(here.schedule, s, totals[1]) for s in range(step)):
            return ""
        return f"{_told(changed)}: the schedule {here.schedule.type} had other rates with that length"


def same_but_length(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes differ in how long they train, and in nothing else."""
    return dict(_changed(one.deciding(), other.deciding())).keys() <= set(LENGTHS)


def _changed(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    for key in sorted(there.keys() | here.keys()):
        one, other = there.get(key), here.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _changed(one, other, f"{prefix}{key}.")
        elif one != other:
            yield f"{prefix}{key}", (one, other)


def _told(changed: Mapping[str, tuple[Any, Any]]) -> str:
    shown = [f"{name} is {_short(one)} there and {_short(other)} here" for name, (one, other) in list(changed.items())[:SHOWN]]
    more = len(changed) - len(shown)
    return ", ".join(shown) + (f", and {more} more" if more else "")


def _short(value: Any) -> str:
    if value is None:  # Recipe.deciding leaves defaults out
        return "the default"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
