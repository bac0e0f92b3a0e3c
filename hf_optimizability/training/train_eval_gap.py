# SPDX-License-Identifier: Apache-2.0
"""Train and eval loss on equal samples, for the generalization gap."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..config import OptimizabilityConfig
from ..linalg.communicator import SINGLE_PROCESS, ProcessGroup
from ..log_keys import PREFIX
from ..measurement.results import TaskMeasurement
from ..model_state.measuring import measuring, preserved_rng, pretrained
from ..model_state.state import eval_mode
from ..objective.batches import Unit
from ..objective.objective import Objective
from ..objective.probe_set import MIN_EXAMPLES, ProbeSpec, draw_probe_set, num_examples
from .provenance import describe_task
from .trainer_loss import trainer_loss


if TYPE_CHECKING:
    from transformers import Trainer

GAP_EXAMPLES = 512
"""Maximum number of examples of each set. Losses with a standard deviation of 1 then give a mean within ±0.044."""

MIN_BATCHES = 8
"""Batches to divide a small sample into: the standard error comes from the spread between them."""

_ONE_LABEL_EACH = ("text-classification", "image-classification")
"""Tasks with one label per example, whose accuracy follows from the logits."""


def measure_gap(
    trainer: Trainer, config: OptimizabilityConfig, *, group: ProcessGroup = SINGLE_PROCESS, unit: Unit = "items"
) -> dict[str, float]:
    """Return the loss on equally many training and evaluation examples, both in eval mode.

    The user's `compute_metrics`, `prediction_step` and `predict` are not called: what they compute is in the Trainer's
    own evaluations, and may cost many times the loss (`predict_with_generate`).

    Args:
        trainer: Its data and loss are used.
        config: Seed and batch size.
        group: Processes that train together: they share the examples.
        unit: What the mean loss of a batch is over, as found by the self-check.

    Returns:
        What to log: `train_loss`, `eval_loss`, each with `_std_error` (over batches), `gap_examples`, and for models
        that classify texts or images `train_accuracy` and `eval_accuracy`, all with the common prefix. Empty if no
        equal samples can be drawn: if a data set is streamed, or if there is not exactly one evaluation set.
    """
    if trainer.eval_dataset is None or isinstance(trainer.eval_dataset, dict):
        return {}
    with preserved_rng(config.probe_seed), eval_mode(cast(nn.Module, trainer.model)):
        loaders = {"train": trainer.get_train_dataloader(), "eval": trainer.get_eval_dataloader()}
        sizes = {split: num_examples(loader.dataset) or 0 for split, loader in loaders.items()}
        examples = min(GAP_EXAMPLES, *sizes.values())
        if examples == 0:
            return {}
        numbers: dict[str, float] = {f"{PREFIX}gap_examples": examples}
        for split, loader in loaders.items():
            numbers |= _mean_loss(trainer, split, loader, examples, config, group, unit)
    return numbers


def measure_task_gaps(
    trainer: Trainer,
    tasks: Mapping[str, TaskMeasurement],
    config: OptimizabilityConfig,
    *,
    group: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, float]:
    """Return each task's loss on the evaluation set of its name, in eval mode, with that on its probe examples.

    Args:
        trainer: Its evaluation sets and loss are used.
        tasks: What was measured with the same weights.
        config: Seed and batch size.
        group: Processes that train together: they share the examples.

    Returns:
        What to log, with the common prefix and `task/<name>/`: `train_loss` and `eval_loss`, each with `_std_error`.
        Only for tasks whose evaluation set has their name and is not streamed.
    """
    numbers: dict[str, float] = {}
    sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {}
    with preserved_rng(config.probe_seed), eval_mode(cast(nn.Module, trainer.model)):
        for name in [name for name in tasks if name in sets]:
            loader, split = trainer.get_eval_dataloader(name), f"task/{name}/"
            examples = min(GAP_EXAMPLES, num_examples(loader.dataset) or 0)
            if examples < MIN_EXAMPLES:
                continue
            numbers |= _mean_loss(trainer, f"{split}eval", loader, examples, config, group)
            loss = tasks[name].loss
            numbers[f"{PREFIX}{split}train_loss"] = loss.value
            if loss.std_error is not None:
                numbers[f"{PREFIX}{split}train_loss_std_error"] = loss.std_error
    return numbers


def _mean_loss(
    trainer: Trainer,
    split: str,
    loader: DataLoader,
    examples: int,
    config: OptimizabilityConfig,
    group: ProcessGroup,
    unit: Unit = "items",
) -> dict[str, float]:
    """Return the mean loss over a sample with its standard error over batches (that of a ratio of sums)."""
    batch_size = min(config.probe_batch_size, -(-examples // MIN_BATCHES))
    spec = ProbeSpec(examples, batch_size=batch_size, seed=config.probe_seed, group=group)
    batches = draw_probe_set(loader, spec).batches
    model = cast(nn.Module, trainer.model)
    objective = Objective(model, batches, loss_fn=trainer_loss(trainer), seed=config.probe_seed, preserved=(trainer,))
    objective = objective.counted_by(unit).shard(group)
    with measuring(model, seed=config.probe_seed, state=objective.state), torch.no_grad():
        sums, items, correct = np.array(group.all_gather_interleaved(_passes(objective))).T
    number, mean = len(sums), sums.sum() / items.sum()
    numbers = {f"{PREFIX}{split}_loss": float(mean)}
    if number > 1:
        spread = np.sum((sums - mean * items) ** 2) * number / (number - 1)
        numbers[f"{PREFIX}{split}_loss_std_error"] = math.sqrt(spread) / float(items.sum())
    if np.isfinite(correct).all():
        numbers[f"{PREFIX}{split}_accuracy"] = float(correct.sum() / items.sum())
    return numbers


def _passes(objective: Objective) -> list[tuple[float, float, float]]:
    """Return each batch's sum of losses, its number of items, and of correctly classified ones (or NaN)."""
    if not _is_classified(objective):
        return [(float(loss), count, math.nan) for loss, count in objective.losses()]
    passes = zip(objective.batches, objective.outputs_and_losses(), strict=True)
    return [
        (float(loss), count, float((outputs[0].argmax(-1) == batch["labels"]).sum()))
        for batch, (outputs, loss, count) in passes
    ]


def _is_classified(objective: Objective) -> bool:
    """Return whether the logits give the accuracy: each example has one label, which is a class of the model."""
    model = pretrained(objective.model)
    if model is None or describe_task(model, own_loss=True).task not in _ONE_LABEL_EACH:
        return False
    labels = [batch.get("labels") for batch in objective.unsharded().batches if isinstance(batch, Mapping)]
    return (model.config.num_labels or 0) > 1 and all(
        isinstance(row, Tensor) and row.ndim == 1 and not row.is_floating_point() and bool((row >= 0).all())
        for row in labels
    )
