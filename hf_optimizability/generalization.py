# SPDX-License-Identifier: Apache-2.0
"""Train and eval loss measured alike, for the generalization gap."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from .configuration import OptimizabilityConfig
from .curvature.ranks import ALONE, Ranks
from .measurement import PREFIX, TaskMeasurement
from .model_state import eval_mode
from .objective import Objective
from .probe import LEAST_EXAMPLES, num_examples, probe_batches, probe_indices
from .safety import measuring, preserved_rng
from .trainer_loss import trainer_loss


if TYPE_CHECKING:
    from transformers import Trainer

GAP_EXAMPLES = 512
"""Most examples of each set. Losses that spread by 1 among examples then give a mean that is known to ±0.044."""

LEAST_BATCHES = 8
"""Batches to cut a small sample into: the standard error comes from the spread between them."""

_NO_METRICS = ("_loss", "_runtime", "_per_second", "_preparation_time")
"""Endings of what `Trainer.predict` adds to the metrics."""


def measure_gap(trainer: Trainer, config: OptimizabilityConfig, *, ranks: Ranks = ALONE) -> dict[str, float]:
    """Loss, and the metrics of `compute_metrics`, on equally many training and evaluation examples, both in eval mode.

    Args:
        trainer: Its data, loss and metrics are used.
        config: Seed and batch size.
        ranks: Processes that train together: they share the examples.

    Returns:
        What to log: `train_loss`, `eval_loss`, each with `_std_error` (over batches), `gap_examples`, and
        `train_<metric>`, `eval_<metric>`, all behind the common prefix. Empty where no equal samples can be drawn: if
        a data set is streamed, or if there is not exactly one evaluation set.
    """
    if trainer.eval_dataset is None or isinstance(trainer.eval_dataset, dict):
        return {}
    # `predict` leaves the model in eval mode.
    with preserved_rng(config.probe_seed), eval_mode(cast(nn.Module, trainer.model)):
        loaders = {"train": trainer.get_train_dataloader(), "eval": trainer.get_eval_dataloader()}
        sizes = {split: num_examples(loader.dataset) or 0 for split, loader in loaders.items()}
        examples = min(GAP_EXAMPLES, *sizes.values())
        if examples == 0:
            return {}
        numbers: dict[str, float] = {f"{PREFIX}gap_examples": examples}
        for split, loader in loaders.items():
            numbers |= _mean_loss(trainer, split, loader, examples, config, ranks)
            if trainer.compute_metrics is not None:
                sample = Subset(loader.dataset, probe_indices(sizes[split], examples, seed=config.probe_seed))
                metrics = trainer.predict(sample, metric_key_prefix=PREFIX + split).metrics or {}
                numbers |= {key: value for key, value in metrics.items() if not key.endswith(_NO_METRICS)}
    return numbers


def measure_task_gaps(
    trainer: Trainer, tasks: Mapping[str, TaskMeasurement], config: OptimizabilityConfig, *, ranks: Ranks = ALONE
) -> dict[str, float]:
    """Loss of each task on the evaluation set of its name, in eval mode, beside that on its probe examples.

    Args:
        trainer: Its evaluation sets and loss are used.
        tasks: What was measured with the same weights.
        config: Seed and batch size.
        ranks: Processes that train together: they share the examples.

    Returns:
        What to log, behind the common prefix and `task/<name>/`: `train_loss` and `eval_loss`, each with `_std_error`.
        Empty where the Trainer has no evaluation sets by name; none that are streamed or have another name.
    """
    numbers: dict[str, float] = {}
    sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {}
    with preserved_rng(config.probe_seed), eval_mode(cast(nn.Module, trainer.model)):
        for name in [name for name in tasks if name in sets]:
            loader, split = trainer.get_eval_dataloader(name), f"task/{name}/"
            examples = min(GAP_EXAMPLES, num_examples(loader.dataset) or 0)
            if examples < LEAST_EXAMPLES:
                continue
            numbers |= _mean_loss(trainer, f"{split}eval", loader, examples, config, ranks)
            loss = tasks[name].loss
            numbers[f"{PREFIX}{split}train_loss"] = loss.value
            if loss.std_error is not None:
                numbers[f"{PREFIX}{split}train_loss_std_error"] = loss.std_error
    return numbers


def _mean_loss(
    trainer: Trainer, split: str, loader: DataLoader, examples: int, config: OptimizabilityConfig, ranks: Ranks
) -> dict[str, float]:
    """Mean loss over a sample, and its standard error from the spread between batches (that of a ratio of sums)."""
    batch_size = min(config.probe_batch_size, -(-examples // LEAST_BATCHES))
    batches = probe_batches(loader, examples=examples, batch_size=batch_size, seed=config.probe_seed, ranks=ranks)
    model = cast(nn.Module, trainer.model)
    objective = Objective(
        model, batches, loss_fn=trainer_loss(trainer), seed=config.probe_seed, preserved=(trainer,)
    ).shared(ranks)
    with measuring(model, seed=config.probe_seed, state=objective.state), torch.no_grad():
        found = ranks.gather([(float(loss), count) for loss, count in objective.losses()])
    sums, items = np.array(found).T
    number, mean = len(sums), sums.sum() / items.sum()
    numbers = {f"{PREFIX}{split}_loss": float(mean)}
    if number > 1:
        spread = np.sum((sums - mean * items) ** 2) * number / (number - 1)
        numbers[f"{PREFIX}{split}_loss_std_error"] = math.sqrt(spread) / float(items.sum())
    return numbers
