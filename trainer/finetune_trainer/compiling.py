"""hyperparameters.compile: the model as torch.compile makes it, for training; evaluation and saving use the model itself."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from finetune_trainer.errors import TrainingFailure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COMPILERS = {"cuda": ("CC", ("gcc", "clang")), "cpu": ("CXX", ("g++", "clang++"))}
"""What turns generated code into machine code: Triton has a C compiler build its launchers, CPUs run C++. A variable names another."""


def compiled(model: "PreTrainedModel", device: torch.device) -> Any:
    """Shares all weights with the model. Compiles when it is first called, and again for what is new. Raises TrainingFailure."""
    variable, programs = COMPILERS.get(device.type, COMPILERS["cpu"])
    candidates = [os.environ[variable]] if os.environ.get(variable) else programs
    if not any(shutil.which(program) for program in candidates):
        raise TrainingFailure(
            "RecipeInvalid",
            f"hyperparameters.compile: this image has no {' or '.join(candidates)}, which torch.compile needs: install one in an image "
            "of your own (trainer.image), or set compile to false",
        )
    # Batches differ in rows and length: one program for all of them.
    return torch.compile(model, dynamic=True)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """What the compiler says of the model's code goes to the log; people get a sentence."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        raise TrainingFailure(
            "RecipeInvalid",
            f"hyperparameters.compile: torch.compile cannot compile this model here ({type(error).__name__}; the log says more): "
            "set compile to false",
        ) from error
