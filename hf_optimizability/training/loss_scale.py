# SPDX-License-Identifier: Apache-2.0
"""The factor that training puts on the loss: many heads ignore how many items a step is over."""

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
"""Relative deviation from 1 that is rounding, and no factor."""


def loss_scale(trainer: Trainer, batch: Batch, *, seed: int) -> float:
    """Return how many times the mean over a step's items the Trainer's loss is, and its gradients are.

    A Trainer counts the items of a step, over accumulation steps and processes, and tells the model. Heads that take
    `num_items_in_batch` among their keywords but divide by the items of the batch at hand then return a loss that is
    `gradient_accumulation_steps` times `num_processes` too large (transformers issue 47688; BERT, RoBERTa, ResNet and
    some 240 others). And where the Trainer counts other items than the loss is over, each step is off by the ratio:
    for GPT-2 it counts the first label of each row, which nothing predicts. So the Trainer itself counts the items of
    a step of as many such batches, and the loss by that count is compared with the mean over the batch.

    Args:
        trainer: The Trainer, with its model in place.
        batch: One batch of its training data. All processes call this together, with the same one.
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
    """Set the number of accumulation steps under way, which TRL's losses read and a Trainer sets at its first step."""
    held = vars(trainer).copy()
    trainer.current_gradient_accumulation_steps = steps
    try:
        yield
    finally:
        if "current_gradient_accumulation_steps" in held:
            trainer.current_gradient_accumulation_steps = held["current_gradient_accumulation_steps"]
        else:
            del trainer.current_gradient_accumulation_steps


def _step_arguments(trainer: Trainer, items: Any) -> dict[str, Any]:
    """Return the number of items as an argument of `compute_loss`, if it takes one."""
    arguments = inspect.signature(trainer.compute_loss).parameters.values()
    takes = any(each.name == "num_items_in_batch" or each.kind is each.VAR_KEYWORD for each in arguments)
    return {"num_items_in_batch": items} if takes else {}


def _is_scaled(trainer: Trainer, items: Any) -> bool:
    """Return whether the loss is left to divide by the accumulation steps itself, as `training_step` finds out."""
    if trainer.loss_is_scaled_for_ga is not None:
        return trainer.loss_is_scaled_for_ga
    return (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None


def explanation(model_class: str, factor: float) -> str:
    """Return what a factor does to training, for a warning."""
    cause = "it does not divide by their number over all accumulation steps and processes"
    if factor < 1:
        cause = "the Trainer counts more items than the loss is a mean over"
    return (
        f"The loss of {model_class} comes out {factor:.3g} times the mean over a step's items, and its gradients with "
        f"it: {cause}. `max_grad_norm` clips as if it were {1 / factor:.3g} times as large, and SGD learns at "
        f"{factor:.3g} times its learning rate; Adam hardly notices but for the clipping. The optimizability report "
        "is about the mean."
    )
