# SPDX-License-Identifier: Apache-2.0
"""What the measured examples are a sample of, and what is known of all the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .pool import Pool
from .sampling import Sample


Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Drawn:
    """How the examples of a batch were drawn.

    Attributes:
        positions: Their positions in the pool.
        probabilities: Their inclusion probabilities; their losses are weighted by the inverse.
        share: How many of the pool's items the batch stands for.
        certain: Whether any draw would hold them, so that they have no error over the data.
    """

    positions: NDArray[np.int64]
    probabilities: Array
    share: float
    certain: bool

    def split(self, examples: Sequence[int]) -> list[Drawn]:
        """Return the parts of a batch that is cut into so many examples each."""
        places = np.split(np.arange(len(self.positions)), np.cumsum(examples)[:-1])
        return [
            replace(
                self,
                positions=self.positions[place],
                probabilities=self.probabilities[place],
                share=self.share * len(place) / len(self.positions),
            )
            for place in places
        ]


@dataclass(frozen=True, eq=False)
class Population:
    """A pool that a forward pass has looked at, and the sample drawn from it.

    Attributes:
        pool: The examples.
        losses: The sum of each example's losses, of shape (N,).
        items: How many items the mean over the pool is over.
        sizes: What each example was drawn in proportion to, of shape (N,).
        sample: The examples drawn.
    """

    pool: Pool
    losses: Array
    items: int
    sizes: Array
    sample: Sample

    def pool_std_error(self, values: Array) -> float:
        """Return how far the mean over the pool may be from that over the data set: 0 where the pool is all of it.

        Args:
            values: The sum over the items of each example of the pool.
        """
        number, total = len(values), self.pool.total
        if number == total:
            return 0.0
        return float(values.std(ddof=1)) * math.sqrt(number * (1 - number / total)) / self.items

    @property
    def mean_loss(self) -> float:
        """The mean loss over the pool."""
        return float(self.losses.sum()) / self.items
