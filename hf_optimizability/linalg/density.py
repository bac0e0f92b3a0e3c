# SPDX-License-Identifier: Apache-2.0
"""The spectral density of an operator, and what follows from it, by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from .estimate import Estimate


_FOUND = 0.01
"""A Ritz value has been told apart from something when its residual is at most this share of the distance to it."""

_IMPLAUSIBLE = 1e-4
"""Chance of a weight beyond which a Ritz value does not stand for a single eigenvalue. So small since a simple
eigenvalue that is taken for a multiple one keeps its weight, which is too large: its error bar would be wrong."""

_NORMAL_QUANTILE = 1.959964  # of a two-sided 95 % interval

_TINY = np.finfo(np.float64).tiny  # instead of 0 below a fraction: makes the ratios of a zero matrix 0


@dataclass(frozen=True, kw_only=True)
class Density:
    """How the eigenvalues of an n × n matrix are distributed; all masses are shares of the n eigenvalues.

    Attributes:
        grid: Where the smoothed density is given, ascending, evenly spaced.
        density: The smoothed density there, per unit of eigenvalue; its integral is 1.
        width: Standard deviation of the Gaussian kernel that smoothed it, in units of eigenvalues.
        nodes: Nodes of the quadrature, ascending.
        weights: The mass that each node stands for, exactly 1/n for an eigenvalue that was found; they sum to 1.
        negative_mass: Share of negative eigenvalues. Sums weights: Ritz values gather at the ends, and counting them
            says nothing. Its interval also holds the mass of the nodes next to zero, whose side is not known; what is
            zero to the rounding of float32 is not negative.
        moments: Mean eigenvalue (trace / n), and mean squared eigenvalue (‖A‖_F² / n).
        frobenius_norm: ‖A‖_F.
        effective_rank: (tr A)² / ‖A‖_F²: n for a multiple of the identity, 1 for a matrix of rank 1.
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


def density(
    nodes: np.ndarray,
    weights: np.ndarray,
    residuals: np.ndarray,
    *,
    size: int,
    hvps: int,
    tolerance: float,
    left_out: int = 0,
    width: float | None = None,
) -> Density:
    """Estimates the spectral density from the quadratures of a Lanczos run; one start is enough.

    Stochastic Lanczos quadrature (Lin, Saad & Yang 2016, SIAM Review 58; Ghorbani et al. 2019, arXiv 1901.10159,
    section 2; Yao et al. 2020, arXiv 1912.07145): for a random start v of norm √n, `vᵀf(A)v / n` has the mean
    `tr f(A) / n`, and its Gauss quadrature is had from the run's Ritz values and the squared first components of the
    projected matrix's eigenvectors.

    A random start gives an eigenvalue a random weight. A Ritz value whose residual is at most 1 % of the gap to the
    next one has been found to be an eigenvalue, and gets its true weight 1/n; the c that were found leave 1 − c/n to
    the others. An eigenvalue is taken to be simple unless its weight says otherwise: one start cannot tell one that
    is repeated a few times, or several within 1 % of the gap around them, from a single one; two starts can tell
    a pair.

    The others were sampled: a sum `Σ wⱼ f(θⱼ)` over them has the variance `2/n Σ wⱼ (f(θⱼ) − f̄)²`, divided by the
    number of starts. For Rademacher starts this is an upper bound (Hutchinson 1990): they have less by `2/n² Σ bᵢᵢ²`
    with B = f(A) − f̄, next to nothing unless eigenvectors lie along few coordinates. A node counts in it with at least
    1/n, the mass of one eigenvalue. Other quantities follow by the delta method. Intervals are normal at 95 %: on a
    logarithmic scale for positive quantities, for the effective rank on that of tr A / ‖A‖_F. That of the negative
    mass adds a bound for the quadrature, and nearly always holds the truth.

    Args:
        nodes: `LanczosRun.nodes`, of shape (m,), ascending.
        weights: `LanczosRun.weights`, of shape (starts, m).
        residuals: `LanczosRun.residuals`, `‖Aq − θq‖` of each node's Ritz pair, of shape (m,).
        size: Number of rows of the operator.
        hvps: Products spent, to be stated with the estimates.
        tolerance: Standard error up to which an estimate has converged: relative to its value, but for the negative
            mass, where it is a mass.
        left_out: Number of rows that are known to be zero, and that the operator does without; n is `size + left_out`.
        width: Standard deviation of the smoothing kernel, in units of eigenvalues; by default 1 % of the range of the
            nodes.

    Returns:
        The density.

    Raises:
        ValueError: If there is no quadrature: a single start that a warm start was mixed into is not random. If it is
            of fewer than three steps, unless these have found the whole spectrum.

    Example:
        >>> import torch
        >>> from hf_optimizability.linalg.lanczos import lanczos
        >>> from hf_optimizability.linalg.operator import DenseOperator
        >>> matrix = torch.diag(torch.tensor([-2.0, 1.0, 3.0, 4.0]))
        >>> run = lanczos(DenseOperator(matrix), tolerance=1e-6, max_hvps=4, seed=0)
        >>> result = density(run.nodes, run.weights, run.residuals, size=4, hvps=run.hvps, tolerance=0.1)
        >>> round(result.negative_mass.value, 3), round(result.frobenius_norm.value**2, 3)
        (0.25, 30.0)
    """
    if len(weights) == 0:
        raise ValueError("`weights` has no rows: no start was random. Use at least 2 `starts` with a warm start.")
    if len(nodes) < 3 * len(weights) and residuals.max() > _rounding(nodes):  # the variance of a mean λ² takes λ⁴
        raise ValueError(
            f"{len(nodes)} nodes from {len(weights)} starts are too few for an error bar: make at least 3 steps "
            "from each start."
        )
    total = size + left_out
    masses, sampled = _sharpened(nodes, weights, residuals, size)
    spectrum = _Spectrum(
        nodes=nodes,
        masses=masses * (size / total),
        sampled=sampled,
        size=total,
        starts=len(weights),
        hvps=hvps,
        tolerance=tolerance,
    )
    square = _mean_square(spectrum)
    places, masses = nodes, spectrum.masses
    if left_out:
        zero = int(np.searchsorted(nodes, 0))
        places, masses = np.insert(nodes, zero, 0), np.insert(masses, zero, left_out / total)
    grid, curve, width = _smoothed(places, masses, width)
    return Density(
        grid=tuple(grid.tolist()),
        density=tuple(curve.tolist()),
        width=width,
        nodes=tuple(places.tolist()),
        weights=tuple(masses.tolist()),
        negative_mass=_negative_mass(spectrum, residuals),
        moments=(_mean(spectrum), square),
        frobenius_norm=_frobenius_norm(spectrum, square),
        effective_rank=_effective_rank(spectrum),
    )


@dataclass(frozen=True, kw_only=True)
class _Spectrum:
    """Masses at nodes, and how to judge what is summed over them.

    Attributes:
        nodes: Ritz values, of shape (m,), ascending.
        masses: Their shares of the n eigenvalues; rows that were left out have the rest.
        sampled: Which masses are random; the others are exact.
        size: n.
    """

    nodes: np.ndarray
    masses: np.ndarray
    sampled: np.ndarray
    size: int
    starts: int
    hvps: int
    tolerance: float

    def std_error(self, values: np.ndarray) -> float:
        """Standard error of `masses @ values`."""
        masses, values = self.masses[self.sampled], values[self.sampled]
        if len(masses) == 0:
            return 0.0
        deviations = values - np.average(values, weights=masses)
        variance = 2 / self.size * np.maximum(masses, 1 / self.size) @ deviations**2
        return math.sqrt(variance / self.starts)

    def estimate(self, value: float, std_error: float, low: float, high: float) -> Estimate:
        """A value with its error; converged when that is small enough beside it."""
        return Estimate(
            value=value,
            low=low,
            high=high,
            method="slq",
            hvps=self.hvps,
            converged=std_error <= self.tolerance * abs(value),
            std_error=std_error,
        )


def _sharpened(
    nodes: np.ndarray, weights: np.ndarray, residuals: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Masses with those of the eigenvalues that were found made exact, and which of them are still random.

    A weight times the size is χ² with as many degrees of freedom as the eigenvalue is repeated. Zero, in particular,
    may be repeated a million times, and its Ritz value has no residual.
    """
    from scipy.special import chdtri

    starts, masses = len(weights), weights.mean(axis=0)
    gaps = np.diff(nodes, prepend=-np.inf, append=np.inf)
    gaps = np.minimum(gaps[:-1], gaps[1:])
    found = (residuals <= _FOUND * gaps) & (gaps > _rounding(nodes))  # copies are no further apart than rounding
    found &= size * starts * masses <= chdtri(starts, _IMPLAUSIBLE)
    others = size - found.sum()
    if others and size * starts * masses[~found].sum() < chdtri(starts * others, 1 - _IMPLAUSIBLE):
        found[:] = False  # the others would be left with too little: some that were found are repeated
    if len(nodes) == size:
        found[:] = True  # the basis is the whole space
    masses[~found] *= (1 - found.sum() / size) / max(masses[~found].sum(), _TINY)
    masses[found] = 1 / size
    return masses, ~found


def _rounding(nodes: np.ndarray) -> float:
    """What rounding in float32 may make of a Ritz value."""
    return float(len(nodes) * np.finfo(np.float32).eps * np.abs(nodes).max())


def _mean(spectrum: _Spectrum) -> Estimate:
    value, std_error = float(spectrum.masses @ spectrum.nodes), spectrum.std_error(spectrum.nodes)
    margin = _NORMAL_QUANTILE * std_error
    return spectrum.estimate(value, std_error, value - margin, value + margin)


def _mean_square(spectrum: _Spectrum) -> Estimate:
    value, std_error = float(spectrum.masses @ spectrum.nodes**2), spectrum.std_error(spectrum.nodes**2)
    margin = _NORMAL_QUANTILE * std_error / max(value, _TINY)
    factor = math.exp(min(margin, 700.0))  # of more, the exponential overflows
    return spectrum.estimate(value, std_error, value / factor, value * factor)


def _frobenius_norm(spectrum: _Spectrum, square: Estimate) -> Estimate:
    value, low, high = (math.sqrt(spectrum.size * end) for end in (square.value, square.low, square.high))
    assert square.std_error is not None
    std_error = spectrum.size * square.std_error / (2 * max(value, _TINY))
    return spectrum.estimate(value, std_error, low, high)


def _effective_rank(spectrum: _Spectrum) -> Estimate:
    """The rank is n ρ² with ρ = tr A / (√n ‖A‖_F); near a trace of 0, ρ is normal and ρ² is not."""
    scaled = spectrum.nodes / math.sqrt(max(float(spectrum.masses @ spectrum.nodes**2), _TINY))
    ratio = float(spectrum.masses @ scaled)
    ratio_error = spectrum.std_error(scaled - ratio * scaled**2 / 2)
    margin = _NORMAL_QUANTILE * ratio_error
    low, high = max(0.0, abs(ratio) - margin), min(1.0, abs(ratio) + margin)
    std_error = 2 * spectrum.size * abs(ratio) * ratio_error
    return spectrum.estimate(spectrum.size * ratio**2, std_error, spectrum.size * low**2, spectrum.size * high**2)


def _negative_mass(spectrum: _Spectrum, residuals: np.ndarray) -> Estimate:
    """Mass below zero; the interval takes in the nodes on either side of zero, one for each start.

    A Gauss quadrature says between which nodes some mass lies, not where (Chebyshev, Markov and Stieltjes; Golub &
    Meurant, section 6.2): the bulk of a network's spectrum, close to zero, may be one node on the wrong side. A Ritz
    vector with a residual r beside its value θ is on its own side of zero but for a share of (r/θ)².
    """
    nodes, starts, zero = spectrum.nodes, spectrum.starts, _rounding(spectrum.nodes)
    unsure = (residuals > _FOUND * np.abs(nodes)) & ((np.abs(nodes) > zero) | (residuals > zero))
    first, masses = int(np.searchsorted(nodes, -zero)), spectrum.masses * unsure
    below, above = float(masses[max(0, first - starts) : first].sum()), float(masses[first : first + starts].sum())
    value, std_error = float(spectrum.masses[:first].sum()), spectrum.std_error(nodes < -zero)
    margin = _NORMAL_QUANTILE * std_error
    low, high = max(0.0, value - margin - below), min(1.0, value + margin + above)
    estimate = spectrum.estimate(value, std_error, low, high)
    return replace(estimate, converged=max(std_error, below, above) <= spectrum.tolerance)


def _smoothed(nodes: np.ndarray, weights: np.ndarray, width: float | None) -> tuple[np.ndarray, np.ndarray, float]:
    """The sum of one Gaussian per node, on a grid that is fine and wide enough for its integral to be 1."""
    span = float(nodes[-1] - nodes[0])
    width = width or 0.01 * max(span, 0.01 * float(np.abs(nodes).max())) or 1.0
    points = round(3 * (span / width + 12))
    grid = np.linspace(nodes[0] - 6 * width, nodes[-1] + 6 * width, points)
    kernels = np.exp(-(((grid[:, None] - nodes) / width) ** 2) / 2) / (width * math.sqrt(2 * math.pi))
    return grid, kernels @ weights, width
