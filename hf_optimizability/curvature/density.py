# SPDX-License-Identifier: Apache-2.0
"""The spectral density of an operator, and what follows from it, by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .estimates import Estimate


@dataclass(frozen=True, kw_only=True)
class Density:
    """How the eigenvalues of an n × n matrix are distributed; all masses are shares of the n eigenvalues.

    Attributes:
        grid: Where the smoothed density is given, ascending, evenly spaced.
        density: The smoothed density there, per unit of eigenvalue; its integral is 1.
        width: Standard deviation of the Gaussian kernel that smoothed it, in units of eigenvalues.
        nodes: Nodes of the quadrature, ascending.
        weights: The mass that each node stands for, averaged over the starts; they sum to 1.
        negative_mass: Share of negative eigenvalues. Sums weights: Ritz values gather at the ends, and counting them
            says nothing. Its interval also holds the mass of the nodes next to zero, whose side is not known.
        moments: Mean eigenvalue (trace / n), and mean squared eigenvalue (‖A‖_F² / n).
        frobenius_norm: ‖A‖_F.
        effective_rank: (tr A)² / ‖A‖_F²: n for a multiple of the identity, 1 for a positive matrix of rank 1.
    """

    grid: tuple[float, ...]
    density: tuple[float, ...]
    width: float
    nodes: tuple[float, ...]
    weights: tuple[float, ...]
    negative_mass: Estimate
    moments: tuple[Estimate, Estimate]
    frobenius_norm: Estimate
    effective_rank: Estimate

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Density:
        """Rebuilds a density from `dataclasses.asdict`."""
        first, second = (Estimate.from_dict(moment) for moment in data["moments"])
        return cls(
            grid=tuple(data["grid"]),
            density=tuple(data["density"]),
            width=data["width"],
            nodes=tuple(data["nodes"]),
            weights=tuple(data["weights"]),
            negative_mass=Estimate.from_dict(data["negative_mass"]),
            moments=(first, second),
            frobenius_norm=Estimate.from_dict(data["frobenius_norm"]),
            effective_rank=Estimate.from_dict(data["effective_rank"]),
        )


def density(
    nodes: np.ndarray, weights: np.ndarray, *, size: int, hvps: int, tolerance: float, width: float | None = None
) -> Density:
    """Estimates the spectral density from the quadratures of a Lanczos run.

    Stochastic Lanczos quadrature (Lin, Saad & Yang 2016, SIAM Review 58; Ghorbani et al. 2019, arXiv 1901.10159,
    section 2; Yao et al. 2020, arXiv 1912.07145): for a random start v of norm √n, `vᵀf(A)v / n` has the mean
    `tr f(A) / n`, and its Gauss quadrature is had from the run's Ritz values and the squared first components of the
    projected matrix's eigenvectors. Every quantity is a function of the average quadrature; its standard error is the
    jackknife over the starts (Efron & Stein 1981), its interval Student's t at 95 %.

    Args:
        nodes: `LanczosRun.nodes`, of shape (m,).
        weights: `LanczosRun.weights`, of shape (starts, m). With one start there is no standard error (`None`), and
            the intervals are infinite.
        size: n.
        hvps: Products spent, to be stated with the estimates.
        tolerance: Standard error up to which an estimate has converged: relative to its value, but for the negative
            mass, where it is a mass.
        width: Standard deviation of the smoothing kernel, in units of eigenvalues; by default 1 % of the range of the
            nodes.

    Returns:
        The density.

    Raises:
        ValueError: If there is no quadrature: a single start that a warm start was mixed into is not random.

    Example:
        >>> import torch
        >>> from hf_optimizability.curvature.lanczos import lanczos
        >>> from hf_optimizability.curvature.operators import DenseOperator
        >>> matrix = torch.diag(torch.tensor([-2.0, 1.0, 1.0, 4.0]))
        >>> run = lanczos(DenseOperator(matrix), tolerance=1e-6, max_hvps=8, seed=0, starts=2)
        >>> result = density(run.nodes, run.weights, size=4, hvps=run.hvps, tolerance=0.1)
        >>> round(result.negative_mass.value, 3), round(result.frobenius_norm.value**2, 3)
        (0.25, 22.0)
    """
    if len(weights) == 0:
        raise ValueError("`weights` has no rows: no start was random. Use at least 2 `starts` with a warm start.")

    def estimate(statistic: Callable[[np.ndarray], float], *, positive: bool = False) -> Estimate:
        return _jackknife(statistic, weights, hvps=hvps, tolerance=tolerance, positive=positive)

    tiny = np.finfo(np.float64).tiny  # for the rank of a zero matrix to be 0
    average = weights.mean(axis=0)
    grid, curve, width = _smoothed(nodes, average, width)
    return Density(
        grid=tuple(grid.tolist()),
        density=tuple(curve.tolist()),
        width=width,
        nodes=tuple(nodes.tolist()),
        weights=tuple(average.tolist()),
        negative_mass=_negative_mass(nodes, weights, hvps=hvps, tolerance=tolerance),
        moments=(estimate(lambda mass: mass @ nodes), estimate(lambda mass: mass @ nodes**2, positive=True)),
        frobenius_norm=estimate(lambda mass: math.sqrt(size * (mass @ nodes**2)), positive=True),
        effective_rank=estimate(lambda mass: size * (mass @ nodes) ** 2 / max(mass @ nodes**2, tiny)),
    )


def _smoothed(nodes: np.ndarray, weights: np.ndarray, width: float | None) -> tuple[np.ndarray, np.ndarray, float]:
    """The sum of one Gaussian per node, on a grid that is fine and wide enough for its integral to be 1."""
    span = float(nodes[-1] - nodes[0])
    width = width or 0.01 * max(span, 0.01 * float(np.abs(nodes).max())) or 1.0
    points = math.ceil(3 * (span / width + 12))
    grid = np.linspace(nodes[0] - 6 * width, nodes[-1] + 6 * width, points)
    kernels = np.exp(-(((grid[:, None] - nodes) / width) ** 2) / 2) / (width * math.sqrt(2 * math.pi))
    return grid, kernels @ weights, width


def _negative_mass(nodes: np.ndarray, weights: np.ndarray, *, hvps: int, tolerance: float) -> Estimate:
    """Mass below zero; the interval takes in the nodes on either side of zero, one for each start.

    A Gauss quadrature says between which nodes some mass lies, not where (Chebyshev, Markov and Stieltjes; Golub &
    Meurant, section 6.2): the bulk of a network's spectrum, close to zero, may be one node on the wrong side.
    """
    zero = len(nodes) * np.finfo(np.float32).eps * np.abs(nodes).max()
    first, starts = int(np.searchsorted(nodes, -zero)), len(weights)
    average = weights.mean(axis=0)
    below = float(average[max(0, first - starts) : first].sum())
    above = float(average[first : first + starts].sum())
    sampled = _jackknife(lambda mass: mass[:first].sum(), weights, hvps=hvps, tolerance=tolerance)
    known = sampled.std_error is not None and max(sampled.std_error, below, above) <= tolerance
    return replace(sampled, low=max(0.0, sampled.low - below), high=min(1.0, sampled.high + above), converged=known)


def _jackknife(
    statistic: Callable[[np.ndarray], float],
    weights: np.ndarray,
    *,
    hvps: int,
    tolerance: float,
    positive: bool = False,
) -> Estimate:
    """A function of the average of independent rows, with its standard error and 95 % interval.

    That of a positive quantity is symmetric on the logarithmic scale: the samples of a norm are skewed.
    """
    from scipy.special import stdtrit

    number, value = len(weights), float(statistic(weights.mean(axis=0)))
    if number == 1:
        return Estimate(value, -math.inf, math.inf, method="slq", hvps=hvps, converged=False)
    left_out = [statistic((weights.sum(axis=0) - row) / (number - 1)) for row in weights]
    std_error = float(np.std(left_out)) * math.sqrt(number - 1)
    margin = float(stdtrit(number - 1, 0.975)) * std_error
    low, high = value - margin, value + margin
    if positive and value > 0:
        low, high = value * math.exp(-margin / value), value * math.exp(margin / value)
    return Estimate(
        value=value,
        low=low,
        high=high,
        method="slq",
        hvps=hvps,
        converged=std_error <= tolerance * abs(value),
        std_error=std_error,
    )
