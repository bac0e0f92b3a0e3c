# SPDX-License-Identifier: Apache-2.0
"""Random batches of a training set, each of which is what one step of the optimizer takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from .batches import Batch
from .pool import Pool
from .probe_set import dataset_of, num_examples


class StepBatches:
    """Batches of one optimizer step, collated when they are asked for and not held; the same ones each time.

    Rows are drawn without replacement, as in an epoch, from the data set, without running the loader.

    Args:
        loader: Its data set, its collator and its batch size are used.
        parts: Batches of the loader in one step: gradient accumulation times processes.
        number: How many steps to draw, if the data set has enough examples.
        seed: Seed of the draw, and of augmentation.

    Raises:
        ValueError: If training draws its batches in another way: from a stream, by a batch sampler of its own, or by
            weight.

    Example:
        >>> steps = StepBatches(DataLoader([{"x": float(i)} for i in range(9)], batch_size=2), parts=2, seed=0)
        >>> with steps.reading():
        ...     [[part["x"].tolist() for part in parts] for parts in steps]
        [[[8.0, 0.0], [2.0, 3.0]], [[7.0, 1.0], [4.0, 5.0]]]
    """

    def __init__(self, loader: DataLoader, *, parts: int = 1, number: int = 30, seed: int):
        sampler = loader.batch_sampler
        if num_examples(dataset_of(loader)) is None or type(sampler) is not BatchSampler:
            raise ValueError("The training set is a stream, or a batch sampler decides what may share a batch.")
        rows = sampler.sampler
        if not isinstance(rows, (RandomSampler, SequentialSampler)):
            raise ValueError(f"{type(rows).__name__} does not draw each row of the training set alike.")
        self._size, self._parts = sampler.batch_size, parts
        self._pool = Pool(loader, examples=number * self.examples, seed=seed)

    @property
    def examples(self) -> int:
        """The number of examples of a step."""
        return self._parts * self._size

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self._pool) // self.examples

    def reading(self) -> AbstractContextManager[None]:
        """Hold around the loop: random states, data set and collator come back as they were."""
        return self._pool.reading()

    def __iter__(self) -> Iterator[list[Batch]]:
        """Yield the batches of each step; inside `reading`.

        Raises:
            MeasurementError: If a row can't be read, or the collator refuses them.
        """
        for start in range(0, len(self) * self.examples, self.examples):
            first = range(start, start + self.examples, self._size)
            yield [self._pool.collate(range(at, at + self._size), draw=at) for at in first]
