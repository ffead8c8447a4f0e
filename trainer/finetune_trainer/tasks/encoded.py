"""Token ids as the loop holds them: one flat array, which needs an eighth of the memory of lists and is padded faster."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune_trainer.tables import BadRow


@dataclass(frozen=True, eq=False)
class Ragged:
    """Rows of ids of different lengths: row i is values[offsets[i] : offsets[i + 1]]."""

    values: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]]) -> "Ragged":
        rows = list(rows)
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        return cls(np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=offsets[-1]), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> npt.NDArray[np.int32]:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[npt.NDArray[np.int32]]:
        return (self[row] for row in range(len(self)))

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.diff(self.offsets)

    def padded(self, rows: npt.NDArray[np.int64], value: int) -> npt.NDArray[np.int64]:
        """These rows, filled up on the right: (rows, longest)."""
        starts, ends = self.offsets[rows], self.offsets[rows + 1]
        out = np.full((len(rows), (ends - starts).max()), value, dtype=np.int64)
        for i, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            out[i, : end - start] = self.values[start:end]
        return out


@dataclass(frozen=True, eq=False)
class Encoded:
    """One split as token ids; row i has ids[i] and labels[i]. `truncated` rows were longer than maxLength."""

    ids: Ragged
    labels: Any
    """An array (rows, ...), or a Ragged with one label id for each token of each row."""
    truncated: int
    types: Ragged | None = None
    """Which of two texts a token is of, for models that want to know."""
    features: npt.NDArray[np.float32] | None = None
    """What a frozen encoder makes of each row, (rows, width): read in place of the tokens where it is there."""
    words: Ragged | None = None
    """Of tags: the number of the word that each token with a label begins, in order. Some words have no token."""
    bad: tuple[BadRow, ...] = ()
    """Rows that the model cannot read: they are left out here."""

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of what the model reads, and of the labels."""
        labels = [self.labels.values, self.labels.offsets] if isinstance(self.labels, Ragged) else [np.asarray(self.labels)]
        types = [] if self.types is None else [self.types.values]
        made = hashlib.sha256()
        for array in (self.ids.values, self.ids.offsets, *types, *labels):
            made.update(np.ascontiguousarray(array).data)
        return made.hexdigest()

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row, for batches with little padding; features have one length."""
        return self.ids.lengths if self.features is None else np.ones(len(self), dtype=np.int64)
