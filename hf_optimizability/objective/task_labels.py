# SPDX-License-Identifier: Apache-2.0
"""The task of each example, and batches of one task each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from ..model_state.measuring import pretrained
from ..quantities.noise_scale import MIN_PARTS
from .batches import Batch


MAX_TASKS = 16
"""Each task takes a gradient as long as the parameters; a column with more values is hardly one of tasks."""

BATCHES_PER_TASK = 8
"""Batches of a task's part of the probe set: the standard errors come from the spread between them."""


def task_name(value: Any) -> str:
    """Return a task's name: a string as it is, or the digits of a whole number.

    Raises:
        ValueError: If the value is neither.

    Example:
        >>> task_name("polarity"), task_name(torch.tensor(3)), task_name(True)
        ('polarity', '3', '1')
    """
    if isinstance(value, (Tensor, np.ndarray, np.generic)) and np.ndim(value) == 0:
        value = value.item()
    if isinstance(value, str):
        return value
    if not isinstance(value, int):
        raise ValueError(f"`task_column` holds {value!r}; a task is named by a string or a whole number.")
    return str(int(value))


def require_several(tasks: Iterable[str], column: str) -> None:
    """Raise if there are too few or too many tasks.

    Raises:
        ValueError: If there is only one task, or more than `MAX_TASKS`.
    """
    names = sorted(set(tasks))
    if len(names) == 1:
        raise ValueError(
            f"All probe examples belong to one task, {names[0]!r}, by `task_column` {column!r}. Leave it unset, or "
            "raise `probe_examples` if others are rare."
        )
    if len(names) > MAX_TASKS:
        raise ValueError(
            f"The probe set has {len(names)} different values of `task_column` {column!r}, such as "
            f"{', '.join(map(repr, names[:3]))}; at most {MAX_TASKS} tasks are supported. Name a column of tasks."
        )


def tasks_of_rows(dataset: Dataset | None, column: str, *, rows: int | None) -> Callable[[int], str]:
    """Return a function from a row's index to its task; the Trainer may have removed the column for training.

    Args:
        dataset: The data set with the column, before the Trainer removes unused ones.
        column: Its name. A column of `ClassLabel`s names the tasks by their classes.
        rows: The length of the data set that is trained on.

    Raises:
        ValueError: If the data set is streamed or has another length, or a row lacks the column.
    """
    import datasets

    if dataset is None or rows is None or isinstance(dataset, IterableDataset):
        raise ValueError(
            "The training set is streamed; `task_column` needs one whose rows can be looked up. Load it whole, or "
            "leave `task_column` unset."
        )
    table: Any = dataset
    if len(table) != rows:
        raise ValueError(
            f"The training set has {len(table)} rows, but the data loader iterates over {rows}, so that the "
            "`task_column` of each is unknown."
        )
    feature = table.features.get(column) if isinstance(table, datasets.Dataset) else None
    named = feature.int2str if isinstance(feature, datasets.ClassLabel) else task_name

    def task(index: int) -> str:
        row = table[index]
        if not isinstance(row, Mapping) or column not in row:
            columns = ", ".join(map(repr, row)) if isinstance(row, Mapping) else f"a {type(row).__name__}"
            raise ValueError(
                f"There is no column {column!r} in the training set, only {columns}. Name one of these as "
                "`task_column`. If the Trainer has removed it, use `OptimizabilityTrainer`, or set "
                "`remove_unused_columns=False`."
            )
        return named(row[column])

    return task


def assign_tasks(
    model: nn.Module, batches: Iterable[Batch], column: str, *, drop: bool
) -> tuple[list[Batch], list[str]]:
    """Cut batches into ones of a single task.

    Args:
        model: The model that takes the batches.
        batches: Mappings with an entry for each example under `column`, or one for all of a batch.
        column: The key.
        drop: Whether to remove the key if the model's `forward` does not name it.

    Returns:
        The batches, and the task of each.

    Raises:
        ValueError: If a batch is not a mapping, lacks the key, or can't be cut.
    """
    dropped = drop and column not in inspect.signature((pretrained(model) or model).forward).parameters
    pieces: list[tuple[Batch, str]] = []
    for batch in batches:
        if not isinstance(batch, Mapping) or column not in batch:
            description = (
                f"has the keys {', '.join(map(repr, batch))}" if isinstance(batch, Mapping) else "is not a mapping"
            )
            raise ValueError(
                f"A batch {description}, but `task_column` is {column!r}. Add the task of each example to it."
            )
        values = batch[column]
        per_example = [values] if isinstance(values, str) or np.ndim(values) == 0 else list(values)
        names = [task_name(value) for value in per_example]
        inputs: Any = {key: value for key, value in batch.items() if not (dropped and key == column)}
        for name in dict.fromkeys(names):
            members = [index for index, other in enumerate(names) if other == name]
            pieces.append((inputs if len(members) == len(names) else _subset(inputs, members, len(names)), name))
    return [batch for batch, _ in pieces], [name for _, name in pieces]


def _subset(batch: Mapping[str, Any], indices: Sequence[int], size: int) -> dict[str, Any]:
    """Return some examples of a batch."""
    subset: dict[str, Any] = {}
    for key, value in batch.items():
        per_example = (isinstance(value, Tensor) and value.ndim > 0) or isinstance(value, (list, tuple))
        if per_example and len(value) != size:
            raise ValueError(
                f"A batch mixes tasks and can't be cut: {key!r} has {len(value)} entries for {size} examples. Pass "
                "batches of one task each."
            )
        if isinstance(value, Tensor) and per_example:
            value = value[torch.tensor(indices, device=value.device)]
        elif per_example:
            value = type(value)(value[index] for index in indices)
        subset[key] = value
    return subset


def smaller_batches(examples: int, batch_size: int) -> int:
    """Return the size of a task's batches: at most `batch_size`, and small enough for a spread between them.

    Example:
        >>> smaller_batches(32, 16), smaller_batches(400, 16)
        (4, 16)
    """
    return min(batch_size, max(1, examples // max(BATCHES_PER_TASK, MIN_PARTS)))
