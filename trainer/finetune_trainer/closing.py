"""`python -m finetune_trainer.closing`: the Job that ends a sweep. It writes the history, and scores and copies the winner.

The operator never speaks S3, so that what must be done there at the end of a sweep is done by this, with the trainer's image and the trials'
credentials. It is told everything by its environment (finetune_operator/domain/closing.py), and may run any number of times.
"""

import base64
import gzip
import json
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from finetune_api import Recipe, names
from finetune_api.finetunejob import Result
from finetune_api.report import EndReport, Outcome, ResultFile
from finetune_trainer import config, inference
from finetune_trainer.config import Runtime
from finetune_trainer.dist import ALONE
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.evaluation import evaluate
from finetune_trainer.fetch import fetch_folder
from finetune_trainer.process import told
from finetune_trainer.run import replace_model, thin
from finetune_trainer.splits import read_splits
from finetune_trainer.store import LONG_PATIENCE, Missing, open_store


def close(env: Mapping[str, str] = os.environ) -> EndReport:
    """Writes the history; where there is a winner, promotes it. Raises TrainingFailure."""
    runtime = config.load_runtime(env)
    runtime.workdir.mkdir(parents=True, exist_ok=True)
    if not env.get(names.ENV_SWEEP_HISTORY_URI):
        raise TrainingFailure("RecipeInvalid", f"{names.ENV_SWEEP_HISTORY_URI} is not set: it says where the history goes")
    folder = open_store(env[names.ENV_SWEEP_HISTORY_URI], runtime.s3_root, patience=LONG_PATIENCE)
    folder.check(writable=True)
    folder.put(names.HISTORY_FILE, json.dumps(unpack(env), indent=1).encode())
    _say(f"history: {folder.uri}/{names.HISTORY_FILE}")
    if names.ENV_SWEEP_WINNER not in env:
        return EndReport(outcome=Outcome.COMPLETE)
    recipe, runtime = config.load(env)
    return promote(recipe, runtime, env[names.ENV_SWEEP_WINNER])


def unpack(env: Mapping[str, str]) -> dict[str, Any]:
    """The history, out of its pieces. Raises TrainingFailure(RecipeInvalid) where they are not whole."""
    pieces: list[str] = []
    while (piece := env.get(f"{names.ENV_SWEEP_HISTORY}{len(pieces)}")) is not None:
        pieces.append(piece)
    try:
        document: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode("".join(pieces), validate=True)))
    except (ValueError, OSError, EOFError) as error:
        raise TrainingFailure(
            "RecipeInvalid", f"{names.ENV_SWEEP_HISTORY}0 and those behind it hold no history: {error}"
        ) from error
    return document


def promote(recipe: Recipe, runtime: Runtime, winner: str) -> EndReport:
    """Scores the winner's model on validation and test, and copies it to the recipe's output; result.json comes last."""
    began = datetime.now(UTC)
    output = open_store(recipe.output.storage_uri, runtime.s3_root, patience=LONG_PATIENCE)
    output.check(writable=True)
    if (done := _done(output.uri, recipe, runtime)) is not None:
        return done
    trial = _trial(winner, runtime)
    splits, counts = read_splits(recipe, runtime, _say)
    # Not as a model to train from is fetched: adapters alone are no model of transformers, and what is copied is all of it.
    folder = runtime.workdir / "winner"
    store = open_store(winner, runtime.s3_root, patience=LONG_PATIENCE)
    fetch_folder(store, folder, log=_say)
    trained = inference.load(folder)
    device = ALONE.device()
    trained.model.to(device)
    scores = {}
    for split, examples in splits.items():
        if split != "train":
            data = trained.kind.encode(examples, trained.tokenizer, recipe.dataset.max_length)
            scores[split] = evaluate(trained.model, trained.kind, data, trained.tokenizer.pad_token_id, device)
            _say(f"{split}: " + "  ".join(f"{name} {value:.4f}" for name, value in scores[split].values.items()))
    replace_model(output, {key: folder / key for key in store.entries()})
    result = Result(
        model_uri=f"{output.uri}/{names.MODEL_DIR}",
        metrics=[m for split, score in scores.items() for m in score.named(split)],
        best_step=trial.result.best_step,
    )
    file = trial.model_copy(
        update={
            "recipe_digest": recipe.digest(),
            "result": result,
            "recipe": recipe.model_dump(mode="json", by_alias=True, exclude_none=True),
            "data": counts,
            "per_class": {split: score.per_class for split, score in scores.items() if score.per_class},
            "started": began,
            "finished": datetime.now(UTC),
        }
    )
    output.put(names.RESULT_FILE, file.model_dump_json(by_alias=True, exclude_none=True, indent=1).encode())
    return EndReport(outcome=Outcome.COMPLETE, step=trial.steps, result=result, evaluations=thin(trial.evaluations))


def _done(uri: str, recipe: Recipe, runtime: Runtime) -> EndReport | None:
    """How it ended before, if it did."""
    try:
        file = ResultFile.model_validate_json(open_store(uri, runtime.s3_root).get(names.RESULT_FILE))
    except Missing:
        return None
    except ValueError as error:
        if recipe.output.overwrite:
            return None
        raise TrainingFailure("OutputExists", f"{uri}/{names.RESULT_FILE} is not a result of this trainer; {_OTHER}") from error
    if file.recipe_digest == recipe.digest():
        return EndReport(outcome=Outcome.ALREADY_COMPLETED, result=file.result)
    if not recipe.output.overwrite:
        raise TrainingFailure("OutputExists", f"{uri}/{names.RESULT_FILE} is the result of another recipe; {_OTHER}")
    return None


_OTHER = "change promote.storageUri, or set trialTemplate.spec.output.overwrite: true to replace it"


def _trial(winner: str, runtime: Runtime) -> ResultFile:
    """What the winner's own training has written down."""
    place = winner.removesuffix(f"/{names.MODEL_DIR}")
    try:
        return ResultFile.model_validate_json(open_store(place, runtime.s3_root).get(names.RESULT_FILE))
    except (Missing, ValueError) as error:
        raise TrainingFailure("ModelNotFound", f"{place}/{names.RESULT_FILE} is not there or cannot be read: {error}") from error


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(told(close))
