# SPDX-License-Identifier: Apache-2.0
"""The probe set: fixed, seeded examples of a data set, collated once, on which every measurement is made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sized
from itertools import islice
from typing import Any, cast

import torch
from accelerate.data_loader import IterableDatasetShard
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .curvature.ranks import ALONE, Ranks
from .safety import preserved_rng
from .task_split import require_several, smaller_batches, tasks_of_rows


LEAST_EXAMPLES = 2


def num_examples(dataset: Dataset) -> int | None:
    """Size of a data set; `None` if it is streamed."""
    return len(dataset) if isinstance(dataset, Sized) and not isinstance(dataset, IterableDataset) else None


def probe_indices(total: int, examples: int, *, seed: int) -> list[int]:
    """`examples` different indices below `total`, ascending, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(total, generator=generator)[:examples].sort().values.tolist()


def probe_batches(
    dataloader: DataLoader,
    *,
    examples: int,
    batch_size: int,
    seed: int,
    required: bool = False,
    ranks: Ranks = ALONE,
) -> list[Any]:
    """Draws the probe set from a data loader's data set, without running the loader.

    Args:
        dataloader: Its data set and collator are used.
        examples: How many examples to draw. Of a streamed data set, the first ones are taken.
        batch_size: Examples to collate at a time.
        seed: Seed of the draw, and of whatever augmentation or masking does to the examples.
        required: Whether fewer examples are an error; otherwise all there are are taken.
        ranks: Processes that train together: the first one draws for all.

    Returns:
        The collated batches, on the CPU.

    Raises:
        ValueError: If the data set is empty or too small, or can be read only once.
    """
    return [batch for batch, _ in _drawn_for_all(dataloader, examples, batch_size, seed, required, None, ranks)]


def probe_batches_by_task(
    dataloader: DataLoader,
    rows: Dataset | None,
    column: str,
    *,
    examples: int,
    batch_size: int,
    seed: int,
    required: bool = False,
    ranks: Ranks = ALONE,
) -> tuple[list[Any], list[str]]:
    """Draws the same probe set, and collates the examples of each task by themselves.

    Args:
        dataloader: As above.
        rows: The loader's data set as it was before columns were taken away.
        column: The column of `rows` that holds the tasks.
        examples: As above.
        batch_size: Most examples to collate at a time; fewer where a task would have too few batches to show a spread.
        seed: As above.
        required: As above.
        ranks: As above.

    Returns:
        The collated batches, on the CPU, and the task of each.

    Raises:
        ValueError: As above; if there is no such column; if it tells one task only, or too many.
    """
    total = num_examples(_undealt(dataloader))

    def split(indices: list[int]) -> list[tuple[str, list[int]]]:
        task = tasks_of_rows(rows, column, rows=total)
        names = [task(index) for index in indices]
        require_several(names, column)
        places = {name: [place for place, own in enumerate(names) if own == name] for name in sorted(set(names))}
        return list(places.items())

    found = _drawn_for_all(dataloader, examples, batch_size, seed, required, split, ranks)
    return [batch for batch, _ in found], [task for _, task in found]


Split = Callable[[list[int]], list[tuple[str, list[int]]]]
"""From the indices of rows to the places in them that belong to each task."""


def _drawn_for_all(
    dataloader: DataLoader,
    examples: int,
    batch_size: int,
    seed: int,
    required: bool,
    split: Split | None,
    ranks: Ranks,
) -> list[tuple[Any, str]]:
    with ranks.agreed():
        found = _drawn(dataloader, examples, batch_size, seed, required, split) if ranks.index == 0 else []
    return ranks.gather(found)


def _undealt(dataloader: DataLoader) -> Dataset:
    """A loader's data set, of all ranks."""
    dataset = dataloader.dataset
    return dataset.dataset if isinstance(dataset, IterableDatasetShard) else dataset


def _drawn(
    dataloader: DataLoader, examples: int, batch_size: int, seed: int, required: bool, split: Split | None
) -> list[tuple[Any, str]]:
    dataset = _undealt(dataloader)
    with preserved_rng(seed):
        total, indices = num_examples(dataset), list(range(examples))
        if total is None:
            stream = cast(IterableDataset, dataset)
            if iter(stream) is iter(stream):
                raise ValueError(
                    "The training set is a stream that can be read once only: measuring would take its first examples "
                    "away from training. Pass one whose `__iter__` begins anew, as `datasets.IterableDataset` does."
                )
            rows = list(islice(stream, examples))
        else:
            indices = probe_indices(total, examples, seed=seed)
            rows = [dataset[index] for index in indices]
        if len(rows) < (examples if required else LEAST_EXAMPLES):
            least = f"`probe_examples` is {examples}" if required else f"a probe set needs at least {LEAST_EXAMPLES}"
            raise ValueError(
                f"The data set to measure on has only {len(rows)} examples, but {least}. "
                "Pass a larger training set, or lower `probe_examples`."
            )
        groups = [("", list(range(len(rows))))] if split is None else split(indices)
        found = []
        for task, places in groups:
            size = batch_size if split is None else smaller_batches(len(places), batch_size)
            for start in range(0, len(places), size):
                found.append((dataloader.collate_fn([rows[place] for place in places[start : start + size]]), task))
        return found


def fingerprint(batches: Iterable[Any]) -> str:
    """SHA-256 (first 16 hex digits) of all tensors of all batches: the same probe set, the same fingerprint."""
    digest = hashlib.sha256()
    for batch in batches:
        items = sorted(batch.items()) if isinstance(batch, Mapping) else enumerate(batch)
        for name, value in items:
            if isinstance(value, Tensor):
                digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
