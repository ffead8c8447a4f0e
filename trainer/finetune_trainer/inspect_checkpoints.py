"""What lies at a place for checkpoints, for people: reads only, whatever recipe it is of, also while a training writes there.

It sees the layout through checkpoint.py, which alone knows it; `finetune checkpoints` prints what is found here.
"""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from finetune_trainer.checkpoint import MANIFEST, Checkpoint, Checkpoints
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.lineage import Lineage
from finetune_trainer.store import Missing, Store

LOOKS = 5
"""How often a place is listed anew because a training deleted what had just been listed."""


class Standing(StrEnum):
    """Whether a run that begins now would look at a checkpoint."""

    COUNTS = "counts"
    OVERTAKEN = "overtaken"
    """A newer execution began before this step: it was written by one that was only thought dead."""
    OTHER_RECIPE = "other recipe"


@dataclass(frozen=True)
class Found:
    """A committed checkpoint. `best`: its model is the best one that the newest checkpoint that counts knows of."""

    checkpoint: Checkpoint
    standing: Standing
    best: bool

    @property
    def size_bytes(self) -> int:
        return sum(int(file["size"]) for file in self.checkpoint.manifest["files"])


class Inspection:
    """One look at a place. With `lineage`, checkpoints that its recipe cannot go on from do not count."""

    def __init__(self, store: Store, scratch: Path, lineage: Lineage | None = None) -> None:
        self.store = store
        self.lineage = lineage
        self.scratch = scratch
        self._said: list[str] = []
        self._place = Checkpoints(store, scratch, lineage or Lineage(""), keep_last=1, overwrite=False, log=self._said.append)

    def look(self) -> tuple[list[Found], list[str]]:
        """All committed checkpoints, newest first; and a sentence for each manifest or entry that cannot be read."""
        for _ in range(LOOKS):
            self._said.clear()
            with contextlib.suppress(Missing):
                counting, overtaken = self._place._found(self.store.list())
                return self._sorted(counting, overtaken), list(self._said)
        raise TrainingFailure("StorageUnavailable", f"{self.store.uri} changes faster than it can be read: try again")

    def _sorted(self, counting: list[Checkpoint], overtaken: list[Checkpoint]) -> list[Found]:
        def order(checkpoint: Checkpoint) -> tuple[int, int]:
            return checkpoint.step, checkpoint.manifest["execution"]

        def standing(checkpoint: Checkpoint) -> Standing:
            if self.lineage is not None and self.lineage.differences(checkpoint.manifest):
                return Standing.OTHER_RECIPE
            return Standing.COUNTS if checkpoint in counting else Standing.OVERTAKEN

        newest = max((c for c in counting if standing(c) is Standing.COUNTS), key=order, default=None)
        best = newest.manifest.get("best") if newest else None
        every = sorted([*counting, *overtaken], key=order, reverse=True)
        return [Found(c, standing(c), c.name == best) for c in every]

    @contextlib.contextmanager
    def fetched(self, checkpoint: Checkpoint) -> Iterator[Path | str | None]:
        """The folder with all its files, each of which has the size and sha256 of the manifest; or a sentence that says which has not.
        None: it was deleted while it was read. What was downloaded is removed in the end."""
        self._said.clear()
        try:
            yield self._fetch(checkpoint)
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)

    def _fetch(self, checkpoint: Checkpoint) -> Path | str | None:
        with contextlib.suppress(Missing):  # a folder that goes while it is listed
            if (folder := self._place.fetch(checkpoint)) is not None:
                return folder
            if f"{checkpoint.name}/{MANIFEST}" in self.store.list(f"{checkpoint.name}/"):
                return "; ".join(self._said)
        return None
