"""Where bytes live: what a folder promises, and what an S3 server may answer (tests/integration has a real one).

The faults come over the wire, from a server of this file, because a real server gives none of them on request.
"""

from pathlib import Path

from finetune_trainer.store import FolderStore


# ------------------------------------------------------------------------------------------------------------- folders --
def test_deleting_removes_empty_folders_below_the_root_only(tmp_path: Path) -> None:
    # It went on above: an output that was still empty took the folders of its team with it.
    store = FolderStore(tmp_path / "team/bucket/out")
    store.check(writable=True)
    store.delete("result.json")
    assert store.root.is_dir()
    store.put("a/b/c", b"")
    store.put("a/d", b"")
    store.delete("a/b/c")
    assert [p.name for p in (store.root / "a").iterdir()] == ["d"]
    store.delete("a/d")
    assert list(store.root.iterdir()) == []
