# SPDX-License-Identifier: Apache-2.0
"""What the measured examples are a sample of, and what is known of all the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..linalg.vectors import dot
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
class Look:
    """What passes over a pool have seen of each of its N examples.

    Attributes:
        losses: The sum of its losses, of shape (N,).
        items: How many items the mean over the pool is over.
        size_probes: Its part of the Gauss-Newton matrix along each of a few random vectors, of shape (vectors, N).
        bend_probes: Its part of the rest of the Hessian along each, likewise.
        gradient: The gradient of the mean loss, shaped like the parameters.
        batch_squares: `‖S‖²/b` of each batch of b items, S the gradient of the sum of its losses; of shape (batches,).
    """

    losses: Array
    items: int
    size_probes: Array
    bend_probes: Array
    gradient: tuple[Tensor, ...]
    batch_squares: Array

    @property
    def sizes(self) -> Array:
        """Estimates of each example's part of the trace of the Gauss-Newton matrix, of shape (N,)."""
        return np.asarray(self.size_probes.mean(axis=0))

    @property
    def bends(self) -> Array:
        """Estimates of each example's part of the trace of the rest of the Hessian, of shape (N,)."""
        return np.asarray(self.bend_probes.mean(axis=0))

    @property
    def gradient_scale(self) -> float:
        """Root mean square of the norms of the gradients of batches, which rounding is relative to."""
        return math.sqrt(float(self.batch_squares.sum()) / self.items)

    @property
    def trace_covariance(self) -> float:
        """Estimate of tr Σ, the variance of the gradient of one item; 0 from a single batch."""
        square = sum(float(dot(piece.flatten(), piece.flatten())) for piece in self.gradient)
        spread = float(self.batch_squares.sum()) - self.items * square
        return max(spread, 0.0) / max(len(self.batch_squares) - 1, 1)

    @property
    def covariance_error(self) -> float:
        """Standard error of `trace_covariance`, relative to it; 1 from a few batches, which don't tell."""
        batches, trace = len(self.batch_squares), self.trace_covariance
        if batches < 3 or not trace:
            return 1.0
        return float(self.batch_squares.std(ddof=1)) * math.sqrt(batches) / (batches - 1) / trace


@dataclass(frozen=True, eq=False)
class Population:
    """A pool that was looked at, and the sample drawn from it.

    Attributes:
        pool: The examples.
        look: What is known of each.
        sample: The examples drawn.
    """

    pool: Pool
    look: Look
    sample: Sample

    def pool_std_error(self, values: Array) -> float:
        """Return how far the mean over the pool may be from that over the data set: 0 where the pool is all of it.

        Args:
            values: The sum over the items of each example of the pool.
        """
        number, total = len(values), self.pool.total
        if number == total:
            return 0.0
        return float(values.std(ddof=1)) * math.sqrt(number * (1 - number / total)) / self.look.items

    def mean(self, values: Array) -> float:
        """Return the mean over the pool's items, from the sums over those of each example."""
        return float(values.sum()) / self.look.items

    @property
    def gradient_variance(self) -> float:
        """By how much `‖gradient‖²` of the pool is, in the mean, above that of the data set."""
        return self.look.trace_covariance * (1 - len(self.pool) / self.pool.total) / self.look.items

    @property
    def mean_loss(self) -> float:
        """The mean loss over the pool."""
        return self.mean(self.look.losses)
