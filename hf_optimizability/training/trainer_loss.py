# SPDX-License-Identifier: Apache-2.0
"""The loss that a Trainer minimizes, as a function of its model and a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.trainer_pt_utils import LabelSmoother

from ..errors import MeasurementError
from ..objective.batches import Batch, count_items
from ..objective.objective import LossFunction
from .unfused_losses import unfused_losses


if TYPE_CHECKING:
    from transformers import Trainer


ONLINE_TRAINERS = (
    "A2POTrainer", "AsyncDistillationTrainer", "AsyncGRPOTrainer", "DistillationTrainer", "GKDTrainer", "GOLDTrainer",
    "GRPOTrainer", "IWOPDTrainer", "NashMDTrainer", "OnlineDPOTrainer", "PPOTrainer", "RLOOTrainer", "SDFTTrainer",
    "SDPOTrainer", "XPOTrainer",
)  # fmt: skip
"""TRL's Trainers whose batches hold prompts: they generate the inputs of their loss during training."""


def trainer_loss(trainer: Trainer) -> LossFunction:
    """Return the loss that a Trainer minimizes, as the plain mean over each batch.

    Includes label smoothing, `compute_loss_func` and an overridden `compute_loss`, but not the scaling for gradient
    accumulation and several processes. Fused losses without a second derivative (TRL's LM head, gradient caches of
    sentence-transformers) are computed in their plain form, which gives the same number; and label smoothing by one
    call of torch's `cross_entropy`, out of which the losses of single examples can be read.

    Raises:
        MeasurementError: If the Trainer generates the inputs of its loss; see `require_measurable_loss`.
    """
    require_measurable_loss(trainer)

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        inputs = copy(batch)  # `compute_loss` pops the labels
        loss: Any
        with unfused_losses(), _smoothing_in_one_call(trainer):
            if trainer.compute_loss_func is None:
                loss = trainer.compute_loss(model, inputs)
            else:
                # Such functions expect the number of items; one that divides by it gives the batch's mean.
                items = items_argument(model, batch)
                loss = trainer.compute_loss(model, inputs, num_items_in_batch=items)
                if items is not None and trainer.args.average_tokens_across_devices:
                    loss = loss / trainer.accelerator.num_processes
        _require_connected(loss)
        return loss

    return loss_fn


class CrossEntropySmoother(LabelSmoother):
    """Transformers' label smoothing, by one call of torch's `cross_entropy`."""

    def __call__(
        self,
        model_output: Any,
        labels: Tensor,
        shift_labels: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the smoothed loss, with the arguments of the class above."""
        logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
        if shift_labels:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        labels = torch.where(labels == self.ignore_index, labels, labels.clamp(min=0)).flatten()
        loss = nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]),
            labels,
            ignore_index=self.ignore_index,
            reduction="mean" if num_items_in_batch is None else "sum",
            label_smoothing=self.epsilon,
        )
        return loss if num_items_in_batch is None else loss / torch.as_tensor(num_items_in_batch, device=loss.device)


@contextmanager
def _smoothing_in_one_call(trainer: Trainer) -> Iterator[None]:
    """Let a Trainer smooth labels by `cross_entropy` inside, if it does so by Transformers' own class."""
    smoother = vars(trainer).get("label_smoother")
    if type(smoother) is not LabelSmoother:
        yield
        return
    trainer.label_smoother = CrossEntropySmoother(smoother.epsilon, smoother.ignore_index)
    try:
        yield
    finally:
        trainer.label_smoother = smoother


def require_measurable_loss(trainer: Trainer) -> None:
    """Raise for a Trainer that has no loss over its training set.

    Raises:
        MeasurementError: If it generates the inputs of its loss, as GRPO and other online methods do.
    """
    for kind in type(trainer).__mro__:
        if kind.__name__ in ONLINE_TRAINERS and kind.__module__.partition(".")[0] == "trl":
            raise MeasurementError("completions_generated", trainer=kind.__name__)


def items_argument(model: nn.Module, batch: Batch) -> Tensor | None:
    """Return the number of items that a Trainer passes for one batch alone; `None` where it passes none."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor):
        return None
    return (labels != -100).sum() if labels.is_floating_point() else torch.tensor(count_items(model, batch))


def _require_connected(loss: Any) -> None:
    """Raise for a loss whose gradient comes from a hook: differentiated here, it would be 0 everywhere."""
    if isinstance(loss, Tensor) and loss.is_leaf and loss.requires_grad:
        raise MeasurementError("loss_not_connected")
