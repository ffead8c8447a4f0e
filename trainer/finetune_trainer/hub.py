"""Finds the place that a uri names. `hf://org/name[@revision]` is looked up in a mirror first and then at the hub.

A mirror is a folder or an s3:// prefix laid out as org/name/ and, for pinned
ones, org/name@revision/. Models and data sets are found in the same way.
"""

from dataclasses import dataclass
from pathlib import Path

from finetune_api.names import ENV_DATASET_MIRROR, ENV_MODEL_MIRROR
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.store import FolderStore, Store, open_store


@dataclass(frozen=True)
class Repositories:
    """One kind of repositories, and what it is called in sentences."""

    kind: str
    """As the hub's API has it."""
    word: str
    field: str
    """Of the recipe."""
    reason: str
    """Failure class where one cannot be found."""
    advice: str
    """How its mirror is set."""

    def open(self, uri: str, mirror: str | None, s3_root: Path | None, *, only: list[str] | None, without: list[str]) -> Store:
        """Where the files are. From the hub come those files alone that match a pattern of `only` and none of `without`.

        Raises TrainingFailure.
        """
        scheme, _, name = uri.partition("://")
        if scheme != "hf":
            return open_store(uri, s3_root)
        repository, _, revision = name.partition("@")
        if mirror:
            if (store := self._mirrored(mirror, name, s3_root)).list():
                return store
            if revision and self._mirrored(mirror, repository, s3_root).list():
                raise TrainingFailure(
                    self.reason,
                    f"{self.field} {uri}: the {self.word} mirror ({mirror}) has {repository}/, which may be any revision, and not "
                    f"{name}/: name the folder so if that is what it holds, or leave out @{revision}",
                )
        return FolderStore(self._download(repository, revision or None, only, without, uri, mirror), uri)

    def _mirrored(self, mirror: str, name: str, s3_root: Path | None) -> Store:
        place = f"{mirror.rstrip('/')}/{name}"
        return open_store(place if place.startswith("s3://") else f"file://{place}", s3_root)

    def _download(
        self, repository: str, revision: str | None, only: list[str] | None, without: list[str], uri: str, mirror: str | None
    ) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

        try:
            folder = snapshot_download(
                repository, repo_type=self.kind, revision=revision, allow_patterns=only, ignore_patterns=without
            )
        except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
            message = f"{self.field} {uri}: the hub has no such {self.word} or revision, or it needs a token"
            raise TrainingFailure(self.reason, message) from error
        except OSError as error:  # of which the hub's errors are a kind
            raise TrainingFailure(
                self.reason,
                f"{self.field} {uri}: it is not in the {self.word} mirror ({mirror or 'none is set'}) and the hub "
                f"cannot be reached: set the mirror ({self.advice}) or use s3:// or file://",
            ) from error
        return Path(folder)


MODELS = Repositories("model", "model", "model.uri", "ModelNotFound", f"{ENV_MODEL_MIRROR}, --model-mirror")
DATASETS = Repositories("dataset", "data set", "dataset.uri", "DataInvalid", f"{ENV_DATASET_MIRROR}, --dataset-mirror")
