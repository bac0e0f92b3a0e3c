# SPDX-License-Identifier: Apache-2.0
"""From scores to ranks, with the probability that one candidate is better than another.

A score is a number per evaluation example and seed: 1 or 0 for a right or wrong prediction, or a loss. All candidates
are scored on the same examples after trainings with the same seeds, so that hard examples and lucky seeds cancel when
two of them are compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm


Array = NDArray[np.float64]

CONFIDENCE = 0.95
"""Probability from which one candidate counts as significantly better than another."""

RESAMPLES = 4000
"""Draws of the bootstrap: probabilities near 0.95 then have a standard error of 0.0035."""

_CHUNK = 500
"""Resamples in memory at a time."""


@dataclass(frozen=True)
class Ranking:
    """Candidates in the order of their values, best first.

    Attributes:
        names: The candidates.
        values: What they are ranked by.
        low: Lower bounds of the 95 % intervals of the values.
        high: Upper bounds.
        ranks: 1 + how many others are better with a probability of at least 0.95; equal for ties.
        best: Probability of being the best of all.
        better: `better[i][j]` is the probability that `i` is better than `j`; ½ on the diagonal.
        differences: `differences[i][j]` is the value of `i` less that of `j`, with its 95 % interval.
    """

    names: tuple[str, ...]
    values: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    ranks: tuple[int, ...]
    best: tuple[float, ...]
    better: tuple[tuple[float, ...], ...]
    differences: tuple[tuple[tuple[float, float, float], ...], ...]

    def differs_significantly(self, first: int, second: int) -> bool:
        """Return whether one of the two is significantly better."""
        return max(self.better[first][second], self.better[second][first]) >= CONFIDENCE

    def kept(self, number: int) -> tuple[str, ...]:
        """Return the first `number` candidates, and those statistically tied with the first one.

        Example:
            >>> draws = normal_draws([0.9, 0.89, 0.5], [0.02, 0.02, 0.02])
            >>> rank(["a", "b", "c"], [0.9, 0.89, 0.5], draws).kept(1)
            ('a', 'b')
        """
        at = range(len(self.names))
        return tuple(self.names[i] for i in at if i < number or not self.differs_significantly(0, i))


def rank(
    names: Sequence[str],
    values: Sequence[float],
    draws: Array,
    *,
    greater_is_better: bool = True,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Ranking:
    """Rank candidates by their values and draws of what the values may be.

    Args:
        names: The candidates.
        values: Their values.
        draws: (draws, candidates); rows are drawn jointly, so that what the candidates share cancels.
        greater_is_better: `False` for a loss.
        bounds: Range of values, to which intervals are clipped.

    Example:
        >>> ranking = rank(["a", "b"], [0.5, 0.9], normal_draws([0.5, 0.9], [0.02, 0.02]))
        >>> ranking.names, ranking.ranks, ranking.better[0][1]
        (('b', 'a'), (1, 2), 1.0)
    """
    sign = 1 if greater_is_better else -1
    order = np.argsort(-sign * np.asarray(values, dtype=float), kind="stable")
    ordered, numbers = draws[:, order], np.asarray(values, dtype=float)[order]
    gains = sign * (ordered[:, :, None] - ordered[:, None, :])
    better = np.mean(gains > 0, axis=0) + np.mean(gains == 0, axis=0) / 2
    top = (sign * ordered) == (sign * ordered).max(axis=1, keepdims=True)
    low, high = np.quantile(ordered, [0.025, 0.975], axis=0).clip(*bounds)
    intervals = np.quantile(ordered[:, :, None] - ordered[:, None, :], [0.025, 0.975], axis=0)
    differences = np.stack([numbers[:, None] - numbers[None, :], *intervals], axis=-1)
    return Ranking(
        names=tuple(names[i] for i in order),
        values=tuple(numbers.tolist()),
        low=tuple(low.tolist()),
        high=tuple(high.tolist()),
        ranks=tuple(int(n) for n in 1 + np.sum(better >= CONFIDENCE, axis=0)),
        best=tuple(np.mean(top / top.sum(axis=1, keepdims=True), axis=0).tolist()),
        better=tuple(map(tuple, better.tolist())),
        differences=tuple(tuple(map(tuple, row)) for row in differences.tolist()),
    )


def paired_bootstrap(scores: Array, *, resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """Draw the candidates' mean scores, over the examples and over the seeds.

    Examples are resampled, the same ones for every candidate (Efron and Tibshirani 1993, chapter 6). Seeds are too few
    for that: three give ten resamples, and an interval that is a third too short. A multiplier bootstrap replaces
    them, whose draws are the seeds' deviations with random weights, the same for every candidate. Its multipliers are
    normal, divided by the root of a χ² variable, so that a difference of two candidates is drawn from Student's t with
    one degree of freedom less than there are seeds: exact if the seeds' differences are normal.

    What differs by seed *and* by example is in both parts, so that intervals err on the wide side. With one seed the
    seed part is missing: the intervals then say nothing about other seeds.

    Args:
        scores: (candidates, seeds, examples).
        resamples: Number of draws.
        seed: Seed of the bootstrap.

    Returns:
        (resamples, candidates).

    Raises:
        ValueError: If there is no example, or a score is not finite.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> easy = rng.normal(size=(1, 1, 400))
        >>> draws = paired_bootstrap(np.concatenate([easy, easy + 0.01]))  # better by a little, on every example
        >>> float(draws[:, 0].std().round(2)), float(np.mean(draws[:, 1] > draws[:, 0]))
        (0.05, 1.0)
    """
    _, seeds, examples = scores.shape
    if examples == 0 or not np.isfinite(scores).all():
        raise ValueError("Scores must be finite numbers of at least one example and seed.")
    rng = np.random.default_rng(seed)
    by_example, by_seed = scores.mean(axis=1).T, scores.mean(axis=2).T
    uniform = np.full(examples, 1 / examples)
    parts = []
    for start in range(0, resamples, _CHUNK):
        counts = rng.multinomial(examples, uniform, size=min(_CHUNK, resamples - start))
        parts.append(counts @ by_example / examples)
    draws = np.concatenate(parts)
    if seeds > 1:
        weights = rng.normal(size=(resamples, seeds)) / math.sqrt(seeds * (seeds - 1))
        weights *= np.sqrt((seeds - 1) / rng.chisquare(seeds - 1, size=(resamples, 1)))
        draws += weights @ (by_seed - by_seed.mean(axis=0))
    return draws


def normal_draws(values: Sequence[float], std_errors: Sequence[float], *, draws: int = RESAMPLES) -> Array:
    """Draw values that have independent normal errors: no example or seed is shared.

    The draws are deterministic: normal quantiles, shuffled separately for each value.

    Returns:
        (draws, values).
    """
    rng = np.random.default_rng(0)
    quantiles = norm.ppf((np.arange(draws) + 0.5) / draws)
    shuffled = rng.permuted(np.tile(quantiles, (len(values), 1)), axis=1).T
    return np.asarray(values) + np.asarray(std_errors) * shuffled
