# SPDX-License-Identifier: Apache-2.0
"""The loss that a Trainer minimizes, as a function of its model and a batch."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

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
    sentence-transformers) are computed in their plain form, which gives the same number.

    Raises:
        MeasurementError: If the Trainer generates the inputs of its loss; see `require_measurable_loss`.
    """
    require_measurable_loss(trainer)

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        inputs = copy(batch)  # `compute_loss` pops the labels
        loss: Any
        with unfused_losses():
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
