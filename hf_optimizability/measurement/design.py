# SPDX-License-Identifier: Apache-2.0
"""The batches of a sample as draws: what their spread says about the population."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..linalg.operator import SymmetricOperator
from ..linalg.statistics import jackknife
from ..objective.objective import Objective
from ..objective.population import Drawn


Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Design:
    """How the batches of an objective were drawn.

    Attributes:
        batches: How the examples of each were drawn.
        correction: Share of the variance between groups that a draw without replacement has.
    """

    batches: tuple[Drawn, ...]
    correction: float

    @classmethod
    def of(cls, objective: Objective) -> Design:
        """Return the design of an objective over a population."""
        batches = tuple(batch.drawn for batch in objective.local_batches if batch.drawn is not None)
        chances = np.concatenate([np.ones(0), *(batch.probabilities for batch in batches if not batch.certain)])
        # Most of the variance is that of examples which are unlikely and weigh much: each counts by its weight.
        return cls(batches, 1 - len(chances) / float((1 / chances).sum()) if len(chances) else 0.0)

    @property
    def shares(self) -> Array:
        """The items that each batch stands for."""
        return np.array([batch.share for batch in self.batches])

    @property
    def freedom(self) -> float:
        """Degrees of freedom of a standard error."""
        groups = sum(not batch.certain for batch in self.batches)
        return math.inf if groups == 0 else max(groups - 1, 1)

    def mean(self, values: Array) -> float:
        """Return the mean over the population, from the means of the batches."""
        return float(np.average(values, weights=self.shares))

    def std_error(self, values: Array) -> float:
        """Return its standard error: 0 where every example is certain, infinite from a single group."""
        drawn = np.array([not batch.certain for batch in self.batches])
        if drawn.sum() < 2:
            return math.inf if drawn.any() else 0.0
        shares = self.shares[drawn]
        error = jackknife(values[drawn], shares) * shares.sum() / self.shares.sum()
        return math.sqrt(self.correction) * error

    def by_batch(self, sums: Array) -> Array:
        """Return the mean of each batch from the sums of all examples of the pool."""
        weighted = [float((sums[batch.positions] / batch.probabilities).sum()) for batch in self.batches]
        return np.array(weighted) / self.shares

    def forms(self, operator: SymmetricOperator, vectors: Sequence[Tensor]) -> Array:
        """Return `vᵀH_bv` of each batch for each vector, of shape (batches, vectors)."""
        _, forms, _ = operator.matmat_per_batch(torch.stack(list(vectors), dim=1), [[slice(0, len(vectors[0]))]])
        return forms[:, :, 0]
