"""What tests of checkpoints share: a folder with checkpoints, and processes that look at it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_trainer.checkpoint import MANIFEST, Checkpoint, Checkpoints
from finetune_trainer.lineage import Lineage
from finetune_trainer.manifests import sealed
from finetune_trainer.store import FolderStore

DIGEST = "d" * 64


class Place:
    """One checkpoint place; `execution` gives a new process that looks at it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = FolderStore(folder / "store")
        self.log: list[str] = []
        self.done: list[int] = []
        self.count = 0

    def execution(self, parent: int | None = 0, *, digest: str = DIGEST, keep: int = 10, overwrite: bool = False) -> Checkpoints:
        self.count += 1
        made = Checkpoints(
            self.store,
            self.folder / f"scratch{self.count}",
            Lineage(digest),
            keep_last=keep,
            overwrite=overwrite,
            log=self.log.append,
        )
        if parent is not None:
            made.begin(parent)
        return made

    def save(self, checkpoints: Checkpoints, *steps: int) -> None:
        for step in steps:
            checkpoints.save(step, lambda step=step: lambda folder: stage(folder, step), self._done)
        checkpoints.wait()

    def _done(self, checkpoint: Checkpoint) -> None:
        self.done.append(checkpoint.step)

    def folders(self) -> list[str]:
        return sorted(p.parent.name for p in (self.folder / "store").glob(f"*/{MANIFEST}"))


def stage(folder: Path, step: int) -> None:
    (folder / "model").mkdir(parents=True)
    (folder / "trainer").mkdir()
    (folder / "model/model.safetensors").write_bytes(bytes(range(256)) * 8)
    (folder / "trainer/state.json").write_text(json.dumps({"step": step}))


def restored_step(checkpoints: Checkpoints) -> int | None:
    found = checkpoints.restore()
    if found is None:
        return None
    assert json.loads((found[1] / "trainer/state.json").read_text())["step"] == found[0].step
    return found[0].step


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def garble(path: Path) -> None:
    path.write_text("{ no manifest")


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The manifest as somebody would forge it: what it says of its files is true, and it is sealed."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(sealed(manifest)))
