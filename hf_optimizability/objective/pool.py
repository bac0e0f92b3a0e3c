# SPDX-License-Identifier: Apache-2.0
"""The pool: the examples of a training set that a sample is drawn from, and each of which is looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from ..errors import MeasurementError, UnmeasurableError
from ..model_state.measuring import preserved_rng, seed_all
from .batches import Batch
from .probe_set import (
    copied_row,
    dataset_of,
    num_examples,
    preserved_loader,
    probe_indices,
    readable_rows,
    require_readable,
    uneven_sampler,
)


class Rows:
    """Rows of a data set, collated when they are asked for and not held.

    What augmentation draws for a row depends on the seed and the row alone.

    Args:
        loader: Its data set and its collator are used.
        seed: Seed of augmentation.
    """

    def __init__(self, loader: DataLoader, *, seed: int):
        self._loader, self._seed = loader, seed

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Hold around whatever reads rows: random states, data set and collator come back as they were."""
        with preserved_rng(self._seed), preserved_loader(self._loader):
            yield

    def batch(self, indices: Sequence[int], *, draw: int = 0) -> Batch:
        """Return the rows with these indices as one batch; inside `reading`.

        Args:
            indices: Their places in the data set.
            draw: Which of the collator's random draws (masks) to take.

        Raises:
            MeasurementError: If a row can't be read, or the collator refuses them.
        """
        rows = []
        for index in indices:
            try:
                rows.append(self._row(index))
            except Exception as error:
                raise MeasurementError("rows_unreadable", error=error) from error
        return self._collated(rows, draw=draw)

    def _collated(self, rows: list[Any], *, draw: int = 0) -> Batch:
        seed_all(self._seed + draw)
        try:
            return self._loader.collate_fn(rows)
        except Exception as error:
            raise MeasurementError("rows_refused", error=error) from error

    def _row(self, index: int) -> Any:
        seed_all(self._seed + index)
        return copied_row(self._loader.dataset[index])


class Pool(Rows):
    """Rows of a data set that examples are drawn from.

    Rows that can't be read are found by the first pass over all, and do not belong to the pool from then on.

    Args:
        loader: Its data set and its collator are used.
        examples: How many rows to take, at random if the data set has more.
        seed: Seed of the choice of rows, and of augmentation.

    Attributes:
        indices: Their places in the data set, in random order, so that batches of neighbours are as in training.
        total: How many examples the data set has, without those that can't be read.

    Raises:
        UnmeasurableError: If the loader has no data set with a length, that is empty, or a sampler may draw its rows
            unevenly.

    Example:
        >>> pool = Pool(DataLoader([{"x": 1.0}, {"x": 2.0}, {"x": 3.0}]), examples=2, seed=0)
        >>> with pool.reading():
        ...     [sorted(batch["x"].tolist()) for batch in pool.batches(2)], pool.total
        ([[1.0, 3.0]], 3)
    """

    def __init__(self, loader: DataLoader, *, examples: int, seed: int):
        super().__init__(loader, seed=seed)
        total = num_examples(dataset_of(loader))
        if total is None:
            raise UnmeasurableError("pool_no_rows")
        if total == 0:
            raise UnmeasurableError("pool_empty")
        if (sampler := uneven_sampler(loader)) is not None:
            raise UnmeasurableError("pool_sampler", sampler=type(sampler).__name__)
        self.total = total
        self.indices = np.array(probe_indices(total, examples, seed=seed), dtype=np.int64)
        self._all_read = False

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.indices)

    def batches(self, size: int) -> Iterator[Batch]:
        """Yield all examples in batches, in order; inside `reading`.

        Raises:
            MeasurementError: If hardly a row can be read, or one that could be can't any more.
        """
        kept: list[int] = []
        failures: list[Exception] = []
        for start in range(0, len(self), size):
            rows, failed = readable_rows(self._row, self.indices[start : start + size].tolist())
            if failed and self._all_read:
                raise MeasurementError("rows_unreadable", error=failed[0]) from failed[0]
            kept += rows
            failures += failed
            if rows:
                yield self._collated(list(rows.values()))
        require_readable(kept, failures, drawn_for="the pool")
        self.indices, self.total = np.array(kept, dtype=np.int64), self.total - len(failures)
        self._all_read = True

    def random_batches(self, examples: int, *, batch_size: int) -> list[Batch]:
        """Return batches of random examples, as many examples as that if they can be read.

        Raises:
            MeasurementError: If none can be read.
        """
        with self.reading():
            found, failures = readable_rows(self._row, self.indices[:examples].tolist())
            if not found:
                raise MeasurementError("rows_unreadable", error=failures[0]) from failures[0]
            rows = list(found.values())
            return [self._collated(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]

    def collate(self, positions: Sequence[int] | NDArray[np.int64]) -> Batch:
        """Return the examples at these positions of the pool as one batch; inside `reading`.

        Raises:
            MeasurementError: As `batch`.
        """
        return self.batch(self.indices[list(positions)].tolist())
