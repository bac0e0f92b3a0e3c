# SPDX-License-Identifier: Apache-2.0
"""To which task an example belongs, and batches that hold one task each."""

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
from .objective import Batch


MAX_TASKS = 16
"""Each holds a gradient as long as the parameters; a column with more values is hardly one of tasks."""

BATCHES = 8
"""Batches to cut a task's part of the probe set into: the errors come from the spread between them."""


def task_name(value: Any) -> str:
    """Return a task's name: a string as it is, the digits of a whole number.

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
    """Refuses what are no tasks.

    Raises:
        ValueError: If there is one task only, or more than `MAX_TASKS`.
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
            f"{', '.join(map(repr, names[:3]))}; at most {MAX_TASKS} tasks can be told apart. Name a column of tasks."
        )


def tasks_of_rows(dataset: Dataset | None, column: str, *, rows: int | None) -> Callable[[int], str]:
    """Tells the task of a row by its index, in the data set as it is before the Trainer takes unused columns away.

    Args:
        dataset: Holds the column.
        column: Its name. One of `ClassLabel`s names the tasks by their classes.
        rows: The length of the data set that is trained on.

    Raises:
        ValueError: If the data set is streamed or another one, or a row lacks the column.
    """
    import datasets

    if dataset is None or rows is None or isinstance(dataset, IterableDataset):
        raise ValueError(
            "The training set is streamed; `task_column` needs one whose rows can be looked up. Load it whole, or "
            "leave `task_column` unset."
        )
    held: Any = dataset
    if len(held) != rows:
        raise ValueError(
            f"The training set has {len(held)} rows, but the data loader goes over {rows}: which `task_column` "
            "belongs to which of them is not known."
        )
    feature = held.features.get(column) if isinstance(held, datasets.Dataset) else None
    named = feature.int2str if isinstance(feature, datasets.ClassLabel) else task_name

    def task(index: int) -> str:
        row = held[index]
        if not isinstance(row, Mapping) or column not in row:
            columns = ", ".join(map(repr, row)) if isinstance(row, Mapping) else f"a {type(row).__name__}"
            raise ValueError(
                f"There is no column {column!r} in the training set, only {columns}. Name one that is there as "
                "`task_column`. If the Trainer has taken it away, use `OptimizabilityTrainer`, or set "
                "`remove_unused_columns=False`."
            )
        return named(row[column])

    return task


def assign_tasks(
    model: nn.Module, batches: Iterable[Batch], column: str, *, drop: bool
) -> tuple[list[Batch], list[str]]:
    """Cuts batches into ones that hold a single task.

    Args:
        model: What takes the batches.
        batches: Mappings with an entry for each example under `column`, or one for all of a batch.
        column: The key.
        drop: Whether to take the key away where the model's `forward` does not name it.

    Returns:
        The batches, and the task of each.

    Raises:
        ValueError: If a batch is no mapping or lacks the key, or can't be cut.
    """
    dropped = drop and column not in inspect.signature((pretrained(model) or model).forward).parameters
    found: list[tuple[Batch, str]] = []
    for batch in batches:
        if not isinstance(batch, Mapping) or column not in batch:
            held = f"has the keys {', '.join(map(repr, batch))}" if isinstance(batch, Mapping) else "is no mapping"
            raise ValueError(f"A batch {held}, but `task_column` is {column!r}. Add the task of each example to it.")
        values = batch[column]
        own = [values] if isinstance(values, str) or np.ndim(values) == 0 else list(values)
        names = [task_name(value) for value in own]
        rest: Any = {key: value for key, value in batch.items() if not (dropped and key == column)}
        for name in dict.fromkeys(names):
            places = [place for place, other in enumerate(names) if other == name]
            found.append((rest if len(places) == len(names) else _chosen(rest, places, len(names)), name))
    return [batch for batch, _ in found], [name for _, name in found]


def _chosen(batch: Mapping[str, Any], places: Sequence[int], size: int) -> dict[str, Any]:
    """Return the examples of a batch at some places."""
    chosen: dict[str, Any] = {}
    for key, value in batch.items():
        whole = (isinstance(value, Tensor) and value.ndim > 0) or isinstance(value, (list, tuple))
        if whole and len(value) != size:
            raise ValueError(
                f"A batch mixes tasks and can't be cut: {key!r} has {len(value)} entries for {size} examples. Pass "
                "batches of one task each."
            )
        if isinstance(value, Tensor) and whole:
            value = value[torch.tensor(places, device=value.device)]
        elif whole:
            value = type(value)(value[place] for place in places)
        chosen[key] = value
    return chosen


def smaller_batches(examples: int, batch_size: int) -> int:
    """Return the size of a task's batches: at most `batch_size`, and small enough for a spread between them.

    Example:
        >>> smaller_batches(32, 16), smaller_batches(400, 16)
        (4, 16)
    """
    return min(batch_size, max(1, examples // max(BATCHES, MIN_PARTS)))
