"""The gradient of one global batch: forward, loss, backward, in the precision that the recipe asks for and the hardware gains from.

A batch may be cut into micro-batches (feed.py): what each adds is a sum over a denominator that is the whole batch's.
"""

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from finetune_api.hyperparameters import Adversarial, Hyperparameters, Precision
from finetune_trainer import compiling
from finetune_trainer.dist import Group
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.feed import Feed, MicroBatch
from finetune_trainer.tasks import Encoded, TaskKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}


def resolve(precision: Precision, device: torch.device) -> Precision:
    """What Auto means on this device."""
    if precision is not Precision.AUTO:
        return precision
    if device.type == "cuda":
        return Precision.BF16 if torch.cuda.get_device_capability(device) >= (8, 0) else Precision.FP16
    # Emulated, bf16 is several times slower than fp32.
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return Precision.BF16 if fast else Precision.FP32


def later(values: torch.Tensor) -> Callable[[], list[float]]:
    """Reads the numbers when it is called, without waiting for what an accelerator was given to do after them."""
    if not values.is_cuda:
        return values.tolist
    # `tolist` would copy them when it is called: behind all kernels that are queued by then.
    here = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()

    def read() -> list[float]:
        arrived.synchronize()
        numbers: list[float] = here.tolist()
        return numbers

    return read


class Gradient:
    """Adds the gradient of a batch to the model's parameters; `scaler` is at work in FP16 only."""

    def __init__(
        self,
        model: "PreTrainedModel",
        hyperparameters: Hyperparameters,
        precision: Precision,
        kind: TaskKind,
        data: Encoded,
        pad: int,
        group: Group,
    ) -> None:
        self.model, self.hyper, self.group = model, hyperparameters, group
        self.kind, self.weights = kind, kind.weights(data)
        self.device = next(model.parameters()).device
        self.dtype = DTYPES.get(precision)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision is Precision.FP16)
        self.feed = Feed(data, pad, self.device, group)
        self.bare: Any = compiling.compiled(model, self.device) if hyperparameters.compile else model
        self.wrapped: Any = self.bare

    def wrap(self) -> None:
        """Before the first batch, and whenever other parameters train."""
        self.wrapped = None  # the one before ends before the next begins: both would answer the same gradients
        self.wrapped = self.group.wrap(self.bare)

    def __call__(self, rows: Any, at_once: int | None = None, following: Any = None) -> torch.Tensor:
        """This process's part of the global batch's mean loss, shape (); computed in passes of at most `at_once` rows (None: all).

        `following` are the rows that come next, which an accelerator gets while it computes these.
        """
        batches = self.feed(rows, at_once or len(rows))
        denominator = max(1.0, float(self.weights[rows].sum()))
        with compiling.explained() if self.hyper.compile else contextlib.nullcontext():
            loss = self._accumulate(batches, denominator)
            if self.hyper.adversarial is not None:
                self._adversarial(batches, denominator, self.hyper.adversarial)
        self.feed.prepare(following, at_once or len(rows))
        return loss

    def _accumulate(self, batches: list[MicroBatch], denominator: float) -> torch.Tensor:
        """Only with the last one do the processes exchange what they have; sharded ones always do, as none has room for all gradients."""
        *first, last = batches
        losses = [self._backward(self.bare, batch, denominator) for batch in first]
        return torch.stack([*losses, self._backward(self.wrapped, last, denominator)]).sum()

    def _backward(self, model: Any, batch: MicroBatch, denominator: float) -> torch.Tensor:
        with torch.autocast(self.device.type, self.dtype) if self.dtype else contextlib.nullcontext():
            logits = model(**batch.inputs, **self.kind.options).logits
        # Summed loss over a global denominator: the gradient does not depend on how a batch is cut up. Without a row of its own a
        # process takes part with one that counts nothing.
        summed = self.kind.loss(logits, batch.labels, self.hyper.label_smoothing)
        loss = summed * batch.counts / denominator
        # What comes back is a mean over the processes.
        self.scaler.scale(loss * self.group.size).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _adversarial(self, batches: list[MicroBatch], denominator: float, adversarial: Adversarial) -> None:
        """FGM (Miyato et al., 2017): the gradient at the word embeddings moved along theirs is added."""
        words = self.model.get_input_embeddings().weight
        if words.grad is None:
            raise TrainingFailure(
                "RecipeInvalid",
                "hyperparameters.adversarial: needs the embeddings to train; they are frozen (hyperparameters.freeze)",
            )
        kept, norm = words.detach().clone(), words.grad.norm()
        with torch.no_grad():
            # A gradient of zero or one that overflowed moves nothing; the step itself judges it.
            words.add_(torch.nan_to_num(words.grad * (adversarial.epsilon / norm), 0.0, 0.0, 0.0))
        try:
            self._accumulate(batches, denominator)
        finally:
            with torch.no_grad():
                words.copy_(kept)
