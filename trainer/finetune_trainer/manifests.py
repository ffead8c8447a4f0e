"""What the manifest of a checkpoint is: read strictly, as whoever can write to the bucket may have written anything.

checkpoint.py, which alone knows the layout around it, writes and reads manifests through this module.
"""

import hashlib
import json
from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from finetune_trainer.store import is_plain

NAME = "step-[0-9]{8,18}-([0-9]{4,18})"
"""Of a checkpoint's folder, as a regular expression; its group is the execution."""


class _File(BaseModel):
    model_config = ConfigDict(strict=True)

    path: str
    size: Annotated[int, Field(ge=0, lt=1 << 60)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Manifest(BaseModel):
    """What every manifest has; lineage.py adds more."""

    model_config = ConfigDict(strict=True)

    step: Annotated[int, Field(ge=0, lt=1 << 60)]
    execution: Annotated[int, Field(ge=0, lt=1 << 60)]
    recipe: Annotated[str, Field(min_length=1)]
    time: AwareDatetime
    best: Annotated[str, Field(pattern=f"^{NAME}$")] | None
    files: list[_File]
    sha256: str


def folder_name(step: int, execution: int) -> str:
    """Of a checkpoint."""
    return f"step-{step:08d}-{execution:04d}"


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """With the sha256 of all that it says."""
    said = {key: value for key, value in manifest.items() if key != "sha256"}
    return {**said, "sha256": hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()}


def read(data: bytes, folder: str) -> dict[str, Any] | None:
    """The manifest of this folder; None where it is none of ours, of another folder, or changed since it was written."""
    try:
        told, manifest = _Manifest.model_validate_json(data), json.loads(data)
    except (ValueError, RecursionError):  # pydantic's own error is a ValueError
        return None
    ours = folder == folder_name(told.step, told.execution) and all(is_plain(file.path) for file in told.files)
    return dict(manifest) if ours and manifest == sealed(manifest) else None
