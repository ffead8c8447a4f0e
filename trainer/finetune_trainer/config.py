"""What the trainer is told: the recipe and the circumstances of this run, both from the environment."""

import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune_api import Recipe, names
from finetune_api.sentences import explain
from finetune_trainer.errors import TrainingFailure


@dataclass(frozen=True)
class Runtime:
    """Circumstances of this run; none of them changes what is trained."""

    job_name: str
    workdir: Path
    attempt: int = 1
    execution: str = "local"
    """Unique id of this process: the pod's uid, or a random one."""
    model_mirror: str | None = None
    dataset_mirror: str | None = None
    s3_root: Path | None = None
    termination_log: Path | None = None
    progress_url: str | None = None
    progress_ca: str | None = None
    progress_token: Path | None = None


def load(env: Mapping[str, str] = os.environ) -> tuple[Recipe, Runtime]:
    """Recipe and runtime of this process. Raises TrainingFailure(RecipeInvalid) with every problem at once."""
    runtime = load_runtime(env)
    try:
        recipe = Recipe.model_validate(json.loads(env[names.ENV_JOB]))
    except KeyError as error:
        raise TrainingFailure("RecipeInvalid", f"{names.ENV_JOB} is not set: it holds the recipe as JSON") from error
    except json.JSONDecodeError as error:
        raise TrainingFailure("RecipeInvalid", f"{names.ENV_JOB} is not JSON: {error}") from error
    except ValidationError as error:
        raise TrainingFailure("RecipeInvalid", "; ".join(explain(error))) from error
    return recipe, runtime


def load_runtime(env: Mapping[str, str] = os.environ) -> Runtime:
    """The circumstances alone; they must be readable even where the recipe is not, so that the failure can be told."""

    def path(name: str) -> Path | None:
        return Path(env[name]) if env.get(name) else None

    return Runtime(
        **places(env),
        job_name=env.get(names.ENV_JOB_NAME, "finetune"),
        workdir=Path(env.get(names.ENV_WORKDIR, ".")),
        attempt=int(attempt) if (attempt := env.get(names.ENV_ATTEMPT, "1")).isdecimal() else 1,
        execution=env.get(names.ENV_POD_UID) or uuid.uuid4().hex,
        termination_log=path(names.ENV_TERMINATION_LOG),
        progress_url=env.get(names.ENV_PROGRESS_URL) or None,
        progress_ca=env.get(names.ENV_PROGRESS_CA) or None,
        progress_token=path(names.ENV_PROGRESS_TOKEN),
    )


def places(env: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Where hf:// and s3:// are found, as fields of Runtime."""
    root = env.get(names.ENV_S3_ROOT)
    return {
        "model_mirror": env.get(names.ENV_MODEL_MIRROR) or None,
        "dataset_mirror": env.get(names.ENV_DATASET_MIRROR) or None,
        "s3_root": Path(root) if root else None,
    }
