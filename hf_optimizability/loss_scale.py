# SPDX-License-Identifier: Apache-2.0
"""The factor that training puts on the loss: many heads ignore how many items a step is over."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from .objective import Batch, count_items, trainer_loss
from .safety import measuring


if TYPE_CHECKING:
    from transformers import Trainer

TOLERANCE = 0.01
"""Relative deviation from 1 that is rounding, and no factor."""


def loss_scale(trainer: Trainer, batch: Batch, *, seed: int) -> float:
    """How many times the mean over a step's items the Trainer's loss is, and its gradients are.

    A Trainer tells the model over how many items a step is, summed over accumulation steps and processes. Heads that
    take `num_items_in_batch` among their keywords but divide by the items of the batch at hand then return a loss that
    is `gradient_accumulation_steps` times `num_processes` too large (transformers issue 47688; BERT, RoBERTa, ResNet
    and some 240 others). The loss of one batch is asked for twice: as in a step of as many such batches, and alone.

    Args:
        trainer: The Trainer, with its model in place.
        batch: One batch of its training data.
        seed: Seed for whatever the model draws.

    Returns:
        The factor, 1 for a loss that is the mean.
    """
    args, model = trainer.args, cast(nn.Module, trainer.model)
    counts = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
    items = None
    if counts and "labels" in batch:
        processes = trainer.accelerator.num_processes if args.average_tokens_across_devices else 1
        items = torch.tensor(count_items(model, batch) * args.gradient_accumulation_steps * processes)
    divided = trainer.loss_is_scaled_for_ga
    if divided is None:
        divided = (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None
    with measuring(model, seed=seed), torch.no_grad():
        told = cast(Tensor, trainer.compute_loss(model, dict(batch), num_items_in_batch=items))
        mean = cast(Tensor, trainer_loss(trainer)(model, batch))
    factor = float(told) / float(mean) * (args.gradient_accumulation_steps if divided else 1)
    return 1.0 if abs(factor - 1) <= TOLERANCE else factor


def explanation(model_class: str, factor: float) -> str:
    """What a factor does to training, for a warning."""
    return (
        f"The loss of {model_class} comes out {factor:.3g} times the mean over a step's items, and its gradients with "
        "it: it does not divide by their number over all accumulation steps and processes. `max_grad_norm` clips as "
        f"if it were {1 / factor:.3g} times as large, and SGD learns at {factor:.3g} times its learning rate; Adam "
        "hardly notices but for the clipping. The optimizability report is about the mean."
    )
