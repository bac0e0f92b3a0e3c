# SPDX-License-Identifier: Apache-2.0
"""The factor by which training scales the loss: many heads ignore the number of items in a step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..model_state.measuring import measuring
from ..model_state.state import ModelState
from ..objective.batches import copy_batch
from ..objective.objective import Batch
from .trainer_loss import trainer_loss
from .unfused_losses import unfused_losses


if TYPE_CHECKING:
    from transformers import Trainer

TOLERANCE = 0.01
"""Relative deviation from 1 that counts as rounding."""


def loss_scale(trainer: Trainer, batch: Batch, *, seed: int) -> float:
    """Return the Trainer's loss, and so its gradients, as a multiple of the mean over a step's items.

    A Trainer counts the items of a step, over accumulation steps and processes, and passes the number to the model.
    Heads that accept `num_items_in_batch` but divide by the items of each batch then return a loss that is
    `gradient_accumulation_steps` times `num_processes` too large (transformers issue 47688; BERT, RoBERTa, ResNet and
    some 240 others). And where the Trainer counts other items than the loss does, each step is off by the ratio: for
    GPT-2 it counts the first label of each row, which nothing predicts. So the Trainer itself counts the items of a
    step of as many such batches, and the loss by that count is compared with the mean over the batch.

    Args:
        trainer: The Trainer, with its model.
        batch: One batch of its training data, the same on all processes.
        seed: Seed for whatever the model draws.

    Returns:
        The factor, 1 for a loss that is the mean.
    """
    model, steps = cast(nn.Module, trainer.model), trainer.args.gradient_accumulation_steps
    _, items = trainer.get_batch_samples(iter([batch] * steps), steps, trainer.args.device)
    state = ModelState(model, others=[trainer])
    with measuring(model, seed=seed, state=state), torch.no_grad():
        mean = float(cast(Tensor, trainer_loss(trainer)(model, copy_batch(batch))))
    with measuring(model, seed=seed, state=state), torch.no_grad(), unfused_losses(), _in_a_step(trainer, steps):
        loss = cast(Tensor, trainer.compute_loss(model, copy_batch(batch), **_step_arguments(trainer, items)))
    if mean == 0 or not math.isfinite(mean):
        return 1.0
    factor = float(loss.mean()) / mean * (steps if _is_scaled(trainer, items) else 1)
    return 1.0 if abs(factor - 1) <= TOLERANCE else factor


@contextmanager
def _in_a_step(trainer: Trainer, steps: int) -> Iterator[None]:
    """Set the current number of accumulation steps, which TRL's losses read and a Trainer sets at its first step."""
    attributes = vars(trainer).copy()
    trainer.current_gradient_accumulation_steps = steps
    try:
        yield
    finally:
        if "current_gradient_accumulation_steps" in attributes:
            trainer.current_gradient_accumulation_steps = attributes["current_gradient_accumulation_steps"]
        else:
            del trainer.current_gradient_accumulation_steps


def _step_arguments(trainer: Trainer, items: Any) -> dict[str, Any]:
    """Return the number of items as an argument of `compute_loss`, if it accepts that."""
    arguments = inspect.signature(trainer.compute_loss).parameters.values()
    accepts = any(each.name == "num_items_in_batch" or each.kind is each.VAR_KEYWORD for each in arguments)
    return {"num_items_in_batch": items} if accepts else {}


def _is_scaled(trainer: Trainer, items: Any) -> bool:
    """Return whether the loss has to divide by the accumulation steps itself, as `training_step` decides."""
    if trainer.loss_is_scaled_for_ga is not None:
        return trainer.loss_is_scaled_for_ga
    return (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None


def explanation(model_class: str, factor: float) -> str:
    """Return a warning that explains the effect of a factor on training."""
    cause = "it averages over each micro-batch and ignores `num_items_in_batch`"
    if factor < 1:
        cause = "the Trainer counts more items than the loss averages over"
    return (
        f"{model_class} returns a loss (and gradients) of {factor:.3g} times the mean over a step's items: {cause}. "
        f"`max_grad_norm` clips as if it were {1 / factor:.3g} times as large, and SGD learns at "
        f"{factor:.3g} times its learning rate; Adam is affected only by the clipping. The optimizability report "
        "is about the mean."
    )
