# SPDX-License-Identifier: Apache-2.0
"""Random batches of a training set, each of which is what one step of the optimizer takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from ..errors import UnmeasurableError
from .batches import Batch
from .pool import Rows
from .probe_set import dataset_of, num_examples, probe_indices


class StepBatches:
    """Batches of one optimizer step, collated when they are asked for and not held; the same ones each time.

    Rows are drawn as the loader's sampler draws them in an epoch, without running the loader; where that takes them in
    order, the steps are random ones of the epoch.

    Args:
        loader: Its data set, its collator, its batch size and its sampler's way to draw are used.
        parts: Batches of the loader in one step: gradient accumulation times processes.
        number: How many steps to draw, if an epoch has as many.
        seed: Seed of the draw, and of augmentation.

    Raises:
        UnmeasurableError: If it is not known how training draws its batches: from a stream, or by a sampler or batch
            sampler that is not torch's own.

    Example:
        >>> steps = StepBatches(DataLoader([{"x": float(i)} for i in range(9)], batch_size=2), parts=2, seed=0)
        >>> with steps.reading():
        ...     [[part["x"].tolist() for part in parts] for parts in steps]
        [[[0.0, 1.0], [2.0, 3.0]], [[4.0, 5.0], [6.0, 7.0]]]
    """

    def __init__(self, loader: DataLoader, *, parts: int = 1, number: int = 30, seed: int):
        sampler = loader.batch_sampler
        if num_examples(dataset_of(loader)) is None or type(sampler) is not BatchSampler:
            raise UnmeasurableError("batches_of_another_kind")
        self._size, self._parts = sampler.batch_size, parts
        self._drawn = _drawn_rows(sampler.sampler, number, self.examples, seed=seed)
        self._rows = Rows(loader, seed=seed)

    @property
    def examples(self) -> int:
        """The number of examples of a step."""
        return self._parts * self._size

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self._drawn) // self.examples

    def reading(self) -> AbstractContextManager[None]:
        """Hold around the loop: random states, data set and collator come back as they were."""
        return self._rows.reading()

    def __iter__(self) -> Iterator[list[Batch]]:
        """Yield the batches of each step; inside `reading`.

        Raises:
            MeasurementError: If a row can't be read, or the collator refuses them.
        """
        for start in range(0, len(self) * self.examples, self.examples):
            first = range(start, start + self.examples, self._size)
            yield [self._rows.batch(self._drawn[at : at + self._size], draw=at) for at in first]


def _drawn_rows(sampler: Any, steps: int, examples: int, *, seed: int) -> list[int]:
    """Return the rows of so many steps, or of those that an epoch has, one step after the other."""
    generator, number = torch.Generator().manual_seed(seed), steps * examples
    if type(sampler) is SequentialSampler:
        of_epoch = len(sampler) // examples
        starts = [examples * step for step in probe_indices(of_epoch, steps, seed=seed)]
        return [row for start in starts for row in range(start, start + examples)]
    rows: Any
    if type(sampler) in (RandomSampler, SeedableRandomSampler):
        length = number if sampler.replacement else sampler.num_samples
        rows = RandomSampler(sampler.data_source, sampler.replacement, length, generator)
    elif type(sampler) is WeightedRandomSampler:
        length = number if sampler.replacement else sampler.num_samples
        rows = WeightedRandomSampler(sampler.weights.tolist(), length, sampler.replacement, generator)
    elif type(sampler) is SubsetRandomSampler:
        rows = SubsetRandomSampler(sampler.indices, generator)
    else:
        raise UnmeasurableError("sampler_unknown", sampler=type(sampler).__name__)
    return list(islice(rows, number))
