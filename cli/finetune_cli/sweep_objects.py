"""The folder that is a local sweep's API server: one JSON file for each object, whole at any moment, whatever dies.

The objects are those of the cluster, so that everything that reads a sweep there reads it here.
"""

import json
import os
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune_api import names
from finetune_cli.errors import UserError
from finetune_operator.domain.status import stamp

Object = dict[str, Any]
FOLDER = "objects"
PART = ".part"


def merge(target: Any, patch: Any) -> Any:
    """The target with a JSON merge patch applied (RFC 7386, section 2); neither is changed."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge(merged.get(key), value)
    return merged


class Objects:
    """Objects by name. One process writes (the folder's lock sees to that), from one thread."""

    def __init__(self, workdir: Path) -> None:
        self.folder = workdir / FOLDER
        self._known: dict[str, Object] = {}

    def load(self) -> None:
        """Reads all. Raises UserError where one is no object of ours."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f"*{PART}"):
            left.unlink()  # its writer died before it was whole: what it was to replace is there
        self._known = read(self.folder)

    def get(self, name: str) -> Object | None:
        """The object of this name. It must not be changed in place."""
        return self._known.get(name)

    def need(self, name: str) -> Object:
        """The object of this name, which is there."""
        return self._known[name]

    def all(self, kind: str) -> list[Object]:
        """Those of a kind, by name."""
        return [self._known[name] for name in sorted(self._known) if self._known[name]["kind"] == kind]

    def create(self, manifest: Object) -> Object:
        """Adds what an API server adds, and keeps it."""
        added = {"uid": str(uuid.uuid4()), "creationTimestamp": stamp(datetime.now(UTC)), "generation": 1}
        namespace = manifest["metadata"].get("namespace") or "default"
        return self.put({**manifest, "metadata": {**manifest["metadata"], "namespace": namespace, **added}})

    def patch(self, name: str, uid: str, patch: Object) -> Object | None:
        """Merges into the object, if it is still the same one; None where it is not."""
        before = self._known.get(name)
        if before is None or before["metadata"]["uid"] != uid:
            return None
        after: Object = merge(before, patch)
        if after["spec"] != before["spec"]:
            after["metadata"] = {**after["metadata"], "generation": int(before["metadata"].get("generation", 1)) + 1}
        return self.put(after)

    def put(self, found: Object) -> Object:
        """Keeps the object: it is on the disk, whole, when this returns."""
        name = found["metadata"]["name"]
        file = self.folder / f"{name}.json"
        part = file.with_suffix(PART)
        with part.open("w", encoding="utf-8") as out:
            json.dump(found, out, indent=1)
            out.flush()
            os.fsync(out.fileno())
        part.replace(file)
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # the name too
        finally:
            os.close(descriptor)
        self._known[name] = found
        return found


def read(folder: Path) -> dict[str, Object]:
    """All objects of a folder by name, also while a sweep runs in it. Raises UserError."""
    found = {}
    # The sweep, whose name is the shortest, before its trials: once it has ended no trial changes any more.
    for file in sorted(folder.glob("*.json"), key=lambda file: (len(file.name), file.name)):
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
            known = document["kind"] in (names.KIND_SWEEP, names.KIND_JOB)
            found[str(document["metadata"]["name"])] = document
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} cannot be read ({error}): put it back as it was, or give another --workdir", 1) from error
        if not known:
            raise UserError(f"{file}: kind {document['kind']!r} is none of a sweep's", 1)
    return found
