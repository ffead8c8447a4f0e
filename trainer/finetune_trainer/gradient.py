"""The gradient of one global batch: forward, loss, backward, in the precision that the recipe asks for and the hardware gains from."""

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from finetune_api.recipe import Adversarial, Hyperparameters, Precision
from finetune_trainer.data import collate
from finetune_trainer.dist import Group
from finetune_trainer.errors import TrainingFailure
from finetune_trainer.tasks import Encoded, TaskKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPES = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}


def resolve(precision: Precision, device: torch.device) -> Precision:
    """What Auto means on this device."""
    if precision is not Precision.AUTO:
        return precision
    if device.type == "cuda":
        return Precision.BF16 if torch.cuda.get_device_capability(device) >= (8, 0) else Precision.FP16
    # Emulated, bf16 is several times slower than fp32.
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return Precision.BF16 if fast else Precision.FP32


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
        self.model, self.hyper, self.pad, self.group = model, hyperparameters, pad, group
        self.kind, self.data, self.weights = kind, data, kind.weights(data)
        self.device = next(model.parameters()).device
        self.dtype = _DTYPES.get(precision)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision is Precision.FP16)
        self.wrapped: Any = model

    def wrap(self) -> None:
        """Before the first batch, and whenever other parameters train."""
        self.wrapped = None  # the one before ends before the next begins: both would answer the same gradients
        self.wrapped = self.group.wrap(self.model)

    def __call__(self, rows: Any) -> torch.Tensor:
        """This process's part of the global batch's mean loss, shape ()."""
        loss = self._backward(rows)
        if self.hyper.adversarial is not None:
            self._adversarial(rows, self.hyper.adversarial)
        return loss

    def _backward(self, rows: Any) -> torch.Tensor:
        mine = self.group.share(rows)
        batch = collate(self.data, mine if len(mine) else rows[:1], self.pad, self.device)
        labels = batch.pop("labels")
        with torch.autocast(self.device.type, self.dtype) if self.dtype else contextlib.nullcontext():
            logits = self.wrapped(**batch, **self.kind.options).logits
        # Summed loss over a global denominator: the gradient does not depend on how a batch is cut up. Without a row of its own a
        # process takes part with one that counts nothing.
        summed = self.kind.loss(logits, labels, self.hyper.label_smoothing)
        loss = summed * (len(mine) > 0) / max(1.0, float(self.weights[rows].sum()))
        # What comes back is a mean over the processes.
        self.scaler.scale(loss * self.group.size).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _adversarial(self, rows: Any, adversarial: Adversarial) -> None:
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
        self._backward(rows)
        with torch.no_grad():
            words.copy_(kept)
