"""One process from its environment to its exit code: trains what FINETUNE_JOB says and tells how that ended.

0 is Complete (or AlreadyCompleted); the others are in finetune_api.failures. The last words go to the termination message.
"""

import argparse
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from finetune_api import names
from finetune_api.failures import BY_REASON
from finetune_api.report import EndReport, Outcome
from finetune_trainer import config
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.report import write_end
from finetune_trainer.run import Run


def _parse() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m finetune_trainer",
        description="Fine-tunes what the recipe says. It is told everything by its environment and takes no arguments.",
        epilog=f"{names.ENV_JOB}: the recipe as JSON. {names.ENV_WORKDIR}: a writable folder. {names.ENV_MODEL_MIRROR}: where "
        "hf:// models are looked up first. AWS_*: the object store. `finetune run -f job.yaml` sets them from a manifest.",
    )
    parser.parse_args()


def run(stopping: threading.Event) -> int:
    """Runs and reports; the exit code. `stopping` is set by a signal, at any time."""
    _parse()
    current: list[Run] = []

    def train() -> EndReport:
        recipe, runtime = config.load()
        runtime.workdir.mkdir(parents=True, exist_ok=True)
        current.append(Run(recipe, runtime, stopping))
        return current[0]()

    return told(train, lambda: current[0].facts if current else {})


def told(work: Callable[[], EndReport], facts: Callable[[], dict[str, Any]] = dict) -> int:
    """Does the work and tells how it ended, with the facts that are known by then; the exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    runtime = config.load_runtime()
    try:
        end = work()
    except TrainingFailure as failure:
        interrupted = failure.failure.reason == "Interrupted"
        end = EndReport(
            outcome=Outcome.INTERRUPTED if interrupted else Outcome.FAILED,
            reason=failure.failure.reason,
            message=failure.message,
            **facts(),
        )
    except Exception as error:  # noqa: BLE001  (the last line of defence: told to the operator, and the traceback to the log)
        traceback.print_exc()
        end = _unexpected(error)
    # Of several processes in one pod the first one speaks; another one only where it fails, and none over a better witness.
    if end.outcome is Outcome.FAILED or os.environ.get("LOCAL_RANK", "0") == "0":
        write_end(runtime, end, alone=os.environ.get("LOCAL_WORLD_SIZE", "1") == "1")
    if end.outcome in (Outcome.COMPLETE, Outcome.ALREADY_COMPLETED):
        return 0
    sys.stderr.write(f"{end.reason}: {end.message}\n")
    return BY_REASON[end.reason].exit_code or 1


def _unexpected(error: Exception) -> EndReport:
    # By name: importing torch here would cost seconds in runs that end before it is needed.
    if type(error).__name__ in ("OutOfMemoryError", "CudaOutOfMemoryError"):
        # Not in a pass over examples, which are fewer then (memory.py): weights, gradients and the optimizer's state do not fit.
        message = (
            "the accelerator's memory does not hold the model with its gradients and the optimizer's state: freeze layers, set "
            "model.lora, or share the model among GPUs with hyperparameters.strategy FSDP"
        )
        return EndReport(outcome=Outcome.FAILED, reason="CudaOutOfMemory", message=message)
    if "deterministic" in (said := str(error)) and "implementation" in said:
        # Torch's own sentence, which names the operation.
        message = f"hyperparameters.deterministic: {said.partition(',')[0]}: set it to false"
        return EndReport(outcome=Outcome.FAILED, reason="RecipeInvalid", message=message)
    # The error's text may hold text of the data; its type does not.
    return EndReport(outcome=Outcome.FAILED, reason="UserCodeError", message=f"unexpected {type(error).__name__}; see the log")
