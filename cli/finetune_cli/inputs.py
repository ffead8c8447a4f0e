"""Turns what the user named (a manifest, a folder, a model) into what the commands work on, or into a sentence."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune_api import FineTuneJob, names
from finetune_api.manifest import ManifestError, load_job_file, load_sweep, load_yaml, read_file
from finetune_api.sweep import HyperparameterSweep
from finetune_cli.errors import UserError


def is_sweep(file: Path) -> bool:
    """Whether the manifest is of a HyperparameterSweep, and of no FineTuneJob. Raises UserError where it is no YAML."""
    with _told(file):
        kinds = [doc.get("kind") for doc in load_yaml(read_file(file)) if isinstance(doc, dict)]
    return names.KIND_SWEEP in kinds and names.KIND_JOB not in kinds


def job(file: Path, overrides: list[str]) -> FineTuneJob:
    """The FineTuneJob of the manifest. Raises UserError that lists every problem."""
    with _told(file):
        return load_job_file(file, overrides)


def sweep(file: Path, overrides: list[str]) -> HyperparameterSweep:
    """The HyperparameterSweep of the manifest. Raises UserError that lists every problem."""
    with _told(file):
        return load_sweep(read_file(file), overrides)


@contextmanager
def _told(file: Path) -> Iterator[None]:
    """Tells the user what is wrong with the manifest."""
    try:
        yield
    except ManifestError as error:
        if len(error.problems) == 1:
            raise UserError(f"{file}: {error.problems[0]}") from error
        listed = "".join(f"\n  {problem}" for problem in error.problems)
        raise UserError(f"{file} has {len(error.problems)} problems:{listed}") from error


def s3_root(folder: Path | None) -> Path | None:
    """The folder of --s3-root as an absolute path; it must be there, because a typo would look like empty buckets."""
    if folder is None:
        return None
    if not folder.is_dir():
        raise UserError(f"--s3-root {folder}: there is no such folder; s3://bucket/key is looked up as {folder}/bucket/key")
    return folder.resolve()


def mirror(flag: str, named: str | None) -> str | None:
    """A folder as an absolute path, or an s3:// prefix as it is."""
    if not named or named.startswith("s3://"):
        return named or None
    if not Path(named).is_dir():
        raise UserError(f"{flag} {named}: there is no such folder; below it are folders org/name/")
    return str(Path(named).resolve())


def local_path(uri: str, root: Path | None) -> Path | None:
    """Where the uri is on this machine; None where it is in S3."""
    if uri.startswith("file://"):
        return Path(uri.removeprefix("file://"))
    if root is not None and uri.startswith("s3://"):
        return root / uri.removeprefix("s3://")
    return None


@contextmanager
def model_folder(model: str, root: Path | None) -> Iterator[Path]:
    """A local folder with the model: the one named, or a download of s3://... that is removed afterwards."""
    if not model.startswith(("s3://", "file://")):
        yield _existing(Path(model), model)
    elif (local := local_path(model, root)) is not None:
        yield _existing(local, model)
    else:
        from finetune_trainer.fetch import fetch_folder
        from finetune_trainer.store import open_store

        with tempfile.TemporaryDirectory(prefix="finetune-model-") as scratch:
            store = open_store(model)
            store.check()  # told in seconds
            if fetch_folder(store, Path(scratch)) == 0:
                raise UserError(f"--model {model}: there are no files")
            yield Path(scratch)


def _existing(folder: Path, named: str) -> Path:
    if not folder.is_dir():
        raise UserError(f"--model {named}: there is no such folder")
    return folder
