"""Keeps token ids in the work folder: who runs a job again there, or goes on with it, does not wait for the tokenizer a second time.

A file is named by a hash of all that decides what is in it, and holds a hash of what is in it. safetensors, no pickle.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from finetune_trainer import tables
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.tables import BadRow
from finetune_trainer.tasks import Encoded, Examples, Ragged, TaskKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Arrays = dict[str, npt.NDArray[Any]]
PACKAGES = ("finetune-operator", "transformers", "tokenizers")
"""Another version may make other tokens."""
PASSING = (
    *("truncation", "padding"),  # in tokenizer.json: of the last call
    *("max_length", "stride", "truncation_side", "truncation_strategy", "is_local", "local_files_only"),  # of the last loading
)


def encode(
    splits: dict[str, Examples], kind: TaskKind, tokenizer: "PreTrainedTokenizerBase", folder: Path, log: Callable[[str], None]
) -> dict[str, Encoded]:
    """All splits as token ids, made or taken from the folder, which afterwards holds these and no others.

    Raises TrainingFailure(DataInvalid) where the model cannot read more rows than dataset.maxBadRows; they are told as those of splits.py.
    """
    state, used, encoded = _state(tokenizer), set(), {}
    bad: dict[str, list[BadRow]] = {}
    for split, examples in splits.items():
        file = folder / f"{_key(examples, kind, state)}.safetensors"
        found = _load(file, split, log)
        if found is None:
            found = kind.encode(examples, tokenizer, kind.dataset.max_length)
            bad.setdefault(examples.name, []).extend(found.bad)
            tables.check(bad, kind.dataset.max_bad_rows)
            if not len(found):
                raise TrainingFailure("DataInvalid", f"{examples.name}: no row of {split} can be used: {tables.listed(bad)}")
            if not found.bad:  # which are to be told the next time too
                _save(file, found, log)
        else:
            log(f"data: the tokens of {split} are those of an earlier run ({folder})")
            # A tokenizer is saved with the truncation of its last call: that must not depend on whether there was a cache.
            kind.encode(examples.take(np.arange(1)), tokenizer, kind.dataset.max_length)
        encoded[split] = found
        used.add(file)
    if any(bad.values()):
        log(f"data: {sum(map(len, bad.values()))} rows cannot be used and are left out: {tables.listed(bad)}")
    _sweep(folder, used, log)
    return encoded


def _state(tokenizer: "PreTrainedTokenizerBase") -> bytes:
    """A hash of all that it would save, but for what loading and calls leave in it: its copy in a checkpoint has the same."""
    digest = hashlib.sha256(tokenizer.truncation_side.encode())
    with tempfile.TemporaryDirectory(prefix="finetune-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*.*")):
            content = path.read_bytes()
            if path.name in ("tokenizer.json", "tokenizer_config.json"):
                kept = {key: value for key, value in json.loads(content).items() if key not in PASSING}
                content = json.dumps(kept, sort_keys=True).encode()
            digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.digest()


def _key(examples: Examples, kind: TaskKind, state: bytes) -> str:
    labels = examples.labels.tolist() if isinstance(examples.labels, np.ndarray) else examples.labels
    what = [
        [version(package) for package in PACKAGES],
        type(kind).__name__,
        kind.dataset.model_dump(mode="json"),
        examples.texts,
        labels,
    ]
    return hashlib.sha256(state + json.dumps(what).encode()).hexdigest()[:40]


# ------------------------------------------------------------------------------------------------------------- files ----
def _save(file: Path, encoded: Encoded, log: Callable[[str], None]) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    arrays = _arrays(encoded)
    part = file.with_suffix(".part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, part, metadata={"sha256": _hash(arrays)})
        part.replace(file)
    except (OSError, SafetensorError) as error:
        # A full disk is no reason not to train: the next run tokenises again.
        log(f"data: the tokens cannot be kept for the next run in {file.parent}: {error}")


def _sweep(folder: Path, used: set[Path], log: Callable[[str], None]) -> None:
    try:
        for file in folder.glob("*"):
            if file not in used:
                file.unlink()
    except OSError as error:
        log(f"data: tokens of earlier runs cannot be removed from {folder}: {error}")


def _load(file: Path, split: str, log: Callable[[str], None]) -> Encoded | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as stored:
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  (it is no dict)
            if (stored.metadata() or {}).get("sha256") == _hash(arrays):
                return _encoded(arrays)
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError):
        pass
    log(f"data: the tokens of {split} that an earlier run left in {file} are damaged; they are made again")
    return None


def _hash(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    return digest.hexdigest()


def _arrays(encoded: Encoded) -> Arrays:
    arrays: Arrays = {"truncated": np.array(encoded.truncated)}
    for name in ("ids", "types", "labels", "words"):
        part = getattr(encoded, name)
        if isinstance(part, Ragged):
            arrays |= {f"{name}.values": part.values, f"{name}.offsets": part.offsets}
        elif part is not None:
            arrays[name] = part
    return arrays


def _encoded(arrays: Arrays) -> Encoded:
    def part(name: str) -> Any:
        if f"{name}.values" in arrays:
            return Ragged(arrays[f"{name}.values"], arrays[f"{name}.offsets"])
        return arrays.get(name)

    return Encoded(part("ids"), part("labels"), int(arrays["truncated"]), part("types"), words=part("words"))
