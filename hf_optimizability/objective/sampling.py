# SPDX-License-Identifier: Apache-2.0
"""Samples whose examples are drawn with unequal, known probabilities, and the errors that they make."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


Array = NDArray[np.float64]

FLOOR = 0.2
"""Share of the sample that is drawn without regard to size: what a size does not know has a chance, too."""


def inclusion_probabilities(sizes: Array, number: int, *, floor: float = FLOOR) -> Array:
    """Return the probability of each example to be in a sample of that many, in proportion to its size.

    Examples whose share of the sizes is more than one in `number` are certain to be drawn.

    Args:
        sizes: Not negative, of shape (N,).
        number: How many examples to draw.
        floor: Share of the sizes' mean that is added to each size.

    Returns:
        Probabilities that sum to `number`; all 1 if there are no more examples than that.

    Example:
        >>> inclusion_probabilities(np.array([8.0, 1.0, 1.0, 0.0]), 2, floor=0.0).tolist()
        [1.0, 0.5, 0.5, 0.0]
    """
    if number >= len(sizes):
        return np.ones(len(sizes))
    mean = float(sizes.mean())
    floored = (1 - floor) * sizes + floor * mean if mean > 0 else np.ones(len(sizes))
    probabilities, certain = np.zeros(len(sizes)), np.zeros(len(sizes), dtype=bool)
    while True:
        rest = number - certain.sum()
        probabilities = np.where(certain, 1.0, rest * floored / floored[~certain].sum())
        above = ~certain & (probabilities >= 1)
        if not above.any():
            return probabilities
        certain |= above


@dataclass(frozen=True, eq=False)
class Sample:
    """Examples drawn from a pool.

    Attributes:
        certain: Indices of those that any draw would hold, each once.
        groups: Indices of the others, in groups at random: each is an independent sample of what is not certain.
        probabilities: The inclusion probability of each example of the pool.
    """

    certain: NDArray[np.int64]
    groups: tuple[NDArray[np.int64], ...]
    probabilities: Array

    @property
    def indices(self) -> NDArray[np.int64]:
        """All examples drawn, the certain ones first."""
        return np.concatenate([self.certain, *self.groups])


def draw_sample(probabilities: Array, *, groups: int, generator: np.random.Generator) -> Sample:
    """Draw a sample of fixed size with these inclusion probabilities.

    Pareto sampling (Rosén 1997, "On sampling with probability proportional to size"): the examples with the smallest
    `U(1 − π)/((1 − U)π)`, U uniform. The true inclusion probabilities differ from π by less than 1 % where the sum of
    π(1 − π) is above 2 or so.

    Args:
        probabilities: Of shape (N,); their sum is the number to draw.
        groups: Number of groups to distribute the uncertain examples to.
        generator: Source of random numbers.

    Example:
        >>> sample = draw_sample(np.array([1.0, 0.5, 0.5]), groups=1, generator=np.random.default_rng(0))
        >>> sample.certain.tolist(), len(sample.groups[0])
        ([0], 1)
    """
    certain = np.flatnonzero(probabilities >= 1)
    possible = np.flatnonzero((probabilities > 0) & (probabilities < 1))
    number = round(float(probabilities.sum())) - len(certain)
    uniform, chance = generator.random(len(possible)), probabilities[possible]
    order = np.argsort(uniform * (1 - chance) / ((1 - uniform) * chance))
    drawn = generator.permutation(possible[order[:number]])
    return Sample(certain, tuple(part for part in np.array_split(drawn, groups) if len(part)), probabilities)


def design_std_error(values: Array, probabilities: Array) -> float:
    """Return the standard error of the sum of values over a pool, estimated from samples of this design.

    Hájek's approximation for samples of fixed size (Hájek 1964; Särndal, Swensson & Wretman 1992, section 3.6), from
    the values of the whole pool.

    Args:
        values: The value of each example of the pool.
        probabilities: Its inclusion probability, above 0 where the value is not 0.

    Example:
        >>> design_std_error(np.array([2.0, 1.0, 1.0]), np.array([1.0, 0.5, 0.5]))  # values in proportion to size
        0.0
        >>> round(design_std_error(np.array([3.0, 1.0, 1.0, 1.0]), np.full(4, 0.5)), 3)  # 2 of 4
        2.0
    """
    drawn = (probabilities > 0) & (probabilities < 1)
    value, chance = values[drawn], probabilities[drawn]
    if not drawn.any():
        return 0.0
    weight = 1 - chance
    slope = (weight * value).sum() / (weight * chance).sum()
    correction = len(value) / max(len(value) - 1, 1)
    return math.sqrt(correction * float(((1 / chance - 1) * (value - slope * chance) ** 2).sum()))


class NoisyVariance(NamedTuple):
    """The design's variance of the mean of noisy values over a sample.

    Attributes:
        whole: Of the values as they are.
        noise: The part of it that is noise.
    """

    whole: float
    noise: float

    @property
    def signal(self) -> float:
        """That of the values without their noise."""
        return max(self.whole - self.noise, 0.0)

    @property
    def reliability(self) -> float:
        """The factor that noisy values get before samples are corrected by them: it leaves the least variance."""
        return self.signal / self.whole if self.whole else 0.0


def noisy_variance(probes: Array, probabilities: Array) -> NoisyVariance:
    """Return the design's variance of the sum over a pool of values that are known with noise.

    Args:
        probes: Independent estimates of the value of each example of the pool, of shape (estimates, N).
        probabilities: Inclusion probabilities.

    Example:
        >>> values, half = np.array([3.0, 1.0, 1.0, 1.0]), np.full(4, 0.5)
        >>> noisy_variance(np.stack([values, values]), half).reliability
        1.0
        >>> noisy_variance(np.stack([values, -values]), half).reliability
        0.0
    """
    number, mean = len(probes), probes.mean(axis=0)
    apart = math.fsum(design_std_error(probe - mean, probabilities) ** 2 for probe in probes)
    return NoisyVariance(design_std_error(mean, probabilities) ** 2, noise=apart / (number * (number - 1)))
