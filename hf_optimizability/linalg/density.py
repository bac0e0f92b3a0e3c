# SPDX-License-Identifier: Apache-2.0
"""The spectral density of an operator and quantities derived from it, by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .estimate import Estimate
from .statistics import NORMAL_QUANTILE


Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

_RESOLVED = 0.01
"""Largest residual, relative to the gap, at which a Ritz value counts as resolved."""

_IMPLAUSIBLE = 1e-4
"""Probability of a weight beyond which a Ritz value does not represent a single eigenvalue. So small since a simple
eigenvalue that is taken for a multiple one keeps its weight, which is too large: its error bar would be wrong."""

_TINY = np.finfo(np.float64).tiny  # instead of 0 below a fraction: makes the ratios of a zero matrix 0


@dataclass(frozen=True, kw_only=True)
class Density:
    """How the eigenvalues of an n × n matrix are distributed; all masses are shares of the n eigenvalues.

    Attributes:
        grid: Points of the smoothed density, ascending, evenly spaced.
        density: The smoothed density there, per unit of eigenvalue; its integral is 1.
        width: Standard deviation of the Gaussian smoothing kernel, in units of eigenvalues.
        nodes: Nodes of the quadrature, ascending.
        weights: The mass at each node, exactly 1/n for a resolved eigenvalue; they sum to 1.
        negative_mass: Share of negative eigenvalues. Sums weights: Ritz values cluster at the extremes, so that their
            number says nothing. Its interval also includes the mass of the nodes next to zero, whose sign is unknown;
            what is zero to the rounding of float32 is not negative.
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
    nodes: Array,
    weights: Array,
    residuals: Array,
    *,
    size: int,
    hvps: int,
    tolerance: float,
    zero_rows: int = 0,
    width: float | None = None,
) -> Density:
    """Estimate the spectral density from the quadratures of a Lanczos run; one start is enough.

    Stochastic Lanczos quadrature (Lin, Saad & Yang 2016, SIAM Review 58; Ghorbani et al. 2019, arXiv 1901.10159,
    section 2; Yao et al. 2020, arXiv 1912.07145): for a random start v of norm √n, `vᵀf(A)v / n` has the mean
    `tr f(A) / n`. Its Gauss quadrature consists of the run's Ritz values and the squared first components of the
    projected matrix's eigenvectors.

    A random start gives an eigenvalue a random weight. A Ritz value whose residual is at most 1 % of the gap to the
    next one is resolved: it is an eigenvalue, and gets its true weight 1/n; c of them leave 1 − c/n to the others. An
    eigenvalue is taken to be simple unless its weight says otherwise: one start cannot distinguish one that is
    repeated a few times, or several within 1 % of the gap around them, from a single one; two starts can distinguish
    a pair.

    The others were sampled: a sum `Σ wⱼ f(θⱼ)` over them has the variance `2/n Σ wⱼ (f(θⱼ) − f̄)²`, divided by the
    number of starts. For Rademacher starts this is an upper bound (Hutchinson 1990): theirs is smaller by
    `2/n² Σ bᵢᵢ²` with B = f(A) − f̄, a negligible amount unless eigenvectors lie along few coordinates. A node counts
    in it with at least 1/n, the mass of one eigenvalue. Other quantities follow by the delta method. Intervals are
    normal at 95 %: on a logarithmic scale for positive quantities, for the effective rank on that of tr A / ‖A‖_F.
    That of the negative mass adds a bound for the quadrature, and nearly always covers the truth.

    Args:
        nodes: `LanczosRun.nodes`, of shape (m,), ascending.
        weights: `LanczosRun.weights`, of shape (starts, m).
        residuals: `LanczosRun.residuals`, `‖Aq − θq‖` of each node's Ritz pair, of shape (m,).
        size: Number of rows of the operator.
        hvps: Products spent, recorded in the estimates.
        tolerance: Standard error up to which an estimate has converged: relative to its value, except for the negative
            mass, where it is absolute.
        zero_rows: Number of rows known to be zero that the operator leaves out; n is `size + zero_rows`.
        width: Standard deviation of the smoothing kernel, in units of eigenvalues; by default 1 % of the range of the
            nodes.

    Returns:
        The density.

    Raises:
        ValueError: If there are fewer than three steps, unless these have found the whole spectrum.

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
    if len(nodes) < 3 * len(weights) and residuals.max() > _rounding(nodes):  # the variance of a mean λ² takes λ⁴
        raise ValueError(
            f"{len(nodes)} nodes from {len(weights)} starts are too few for an error bar: make at least 3 steps "
            "from each start."
        )
    total = size + zero_rows
    masses, sampled = _resolve_eigenvalues(nodes, weights, residuals, size)
    spectrum = _Quadrature(
        nodes=nodes,
        masses=masses * (size / total),
        sampled=sampled,
        size=total,
        starts=len(weights),
        hvps=hvps,
        tolerance=tolerance,
    )
    square = _mean_square(spectrum)
    all_nodes, all_masses = nodes, spectrum.masses
    if zero_rows:
        zero = int(np.searchsorted(nodes, 0))
        all_nodes, all_masses = np.insert(nodes, zero, 0), np.insert(all_masses, zero, zero_rows / total)
    grid, curve, width = _smooth(all_nodes, all_masses, width)
    return Density(
        grid=tuple(grid.tolist()),
        density=tuple(curve.tolist()),
        width=width,
        nodes=tuple(all_nodes.tolist()),
        weights=tuple(all_masses.tolist()),
        negative_mass=_negative_mass(spectrum, residuals),
        moments=(_mean(spectrum), square),
        frobenius_norm=_frobenius_norm(spectrum, square),
        effective_rank=_effective_rank(spectrum),
    )


@dataclass(frozen=True, kw_only=True)
class _Quadrature:
    """Masses at nodes, with the errors of sums over them.

    Attributes:
        nodes: Ritz values, of shape (m,), ascending.
        masses: Their shares of the n eigenvalues; rows that were left out have the remaining mass.
        sampled: Which masses are random; the others are exact.
        size: n.
    """

    nodes: Array
    masses: Array
    sampled: Mask
    size: int
    starts: int
    hvps: int
    tolerance: float

    def std_error(self, values: Array | Mask) -> float:
        """Return the standard error of `masses @ values`."""
        masses, values = self.masses[self.sampled], values[self.sampled]
        if len(masses) == 0:
            return 0.0
        deviations = values - np.average(values, weights=masses)
        variance = 2 / self.size * np.maximum(masses, 1 / self.size) @ deviations**2
        return math.sqrt(variance / self.starts)

    def estimate(self, value: float, std_error: float, low: float, high: float) -> Estimate:
        """Return a value with its error; it has converged if the relative error is small enough."""
        return Estimate(
            value=value,
            low=low,
            high=high,
            method="slq",
            hvps=self.hvps,
            converged=std_error <= self.tolerance * abs(value),
            std_error=std_error,
        )


def _resolve_eigenvalues(nodes: Array, weights: Array, residuals: Array, size: int) -> tuple[Array, Mask]:
    """Return masses, exact ones for resolved eigenvalues, and which of them are still random.

    A weight times the size is χ² with as many degrees of freedom as the eigenvalue is repeated. Zero, in particular,
    may be repeated a million times, and its Ritz value has no residual.
    """
    from scipy.special import chdtri

    starts, masses = len(weights), weights.mean(axis=0)
    gaps = np.diff(nodes, prepend=-np.inf, append=np.inf)
    gaps = np.minimum(gaps[:-1], gaps[1:])
    resolved = (residuals <= _RESOLVED * gaps) & (gaps > _rounding(nodes))  # copies are no further apart than rounding
    resolved &= size * starts * masses <= chdtri(starts, _IMPLAUSIBLE)
    others = size - resolved.sum()
    if others and size * starts * masses[~resolved].sum() < chdtri(starts * others, 1 - _IMPLAUSIBLE):
        resolved[:] = False  # too little mass would remain for the others: some of the resolved ones are repeated
    if len(nodes) == size:
        resolved[:] = True  # the basis is the whole space
    masses[~resolved] *= (1 - resolved.sum() / size) / max(masses[~resolved].sum(), _TINY)
    masses[resolved] = 1 / size
    return masses, ~resolved


def _rounding(nodes: Array) -> float:
    """Return a bound of the rounding error of Ritz values in float32."""
    return float(len(nodes) * np.finfo(np.float32).eps * np.abs(nodes).max())


def _mean(spectrum: _Quadrature) -> Estimate:
    return Estimate.from_std_error(
        float(spectrum.masses @ spectrum.nodes),
        spectrum.std_error(spectrum.nodes),
        tolerance=spectrum.tolerance,
        method="slq",
        hvps=spectrum.hvps,
    )


def _mean_square(spectrum: _Quadrature) -> Estimate:
    return Estimate.from_relative_error(
        float(spectrum.masses @ spectrum.nodes**2),
        spectrum.std_error(spectrum.nodes**2),
        tolerance=spectrum.tolerance,
        method="slq",
        hvps=spectrum.hvps,
    )


def _frobenius_norm(spectrum: _Quadrature, square: Estimate) -> Estimate:
    value, low, high = (math.sqrt(spectrum.size * bound) for bound in (square.value, square.low, square.high))
    assert square.std_error is not None
    std_error = spectrum.size * square.std_error / (2 * max(value, _TINY))
    return spectrum.estimate(value, std_error, low, high)


def _effective_rank(spectrum: _Quadrature) -> Estimate:
    """Estimate the rank n ρ² with ρ = tr A / (√n ‖A‖_F); near a trace of 0, ρ is normal and ρ² is not."""
    scaled = spectrum.nodes / math.sqrt(max(float(spectrum.masses @ spectrum.nodes**2), _TINY))
    ratio = float(spectrum.masses @ scaled)
    ratio_error = spectrum.std_error(scaled - ratio * scaled**2 / 2)
    margin = NORMAL_QUANTILE * ratio_error
    low, high = max(0.0, abs(ratio) - margin), min(1.0, abs(ratio) + margin)
    std_error = 2 * spectrum.size * abs(ratio) * ratio_error
    return spectrum.estimate(spectrum.size * ratio**2, std_error, spectrum.size * low**2, spectrum.size * high**2)


def _negative_mass(spectrum: _Quadrature, residuals: Array) -> Estimate:
    """Estimate the mass below zero; the interval includes the nodes on either side of zero, one for each start.

    A Gauss quadrature says between which nodes some mass lies, not where (Chebyshev, Markov and Stieltjes; Golub &
    Meurant, section 6.2): the bulk of a network's spectrum, close to zero, may be one node on the wrong side. A Ritz
    vector with value θ and residual r lies on the side of θ except for a share of (r/θ)².
    """
    nodes, starts, zero = spectrum.nodes, spectrum.starts, _rounding(spectrum.nodes)
    unsure = (residuals > _RESOLVED * np.abs(nodes)) & ((np.abs(nodes) > zero) | (residuals > zero))
    first, masses = int(np.searchsorted(nodes, -zero)), spectrum.masses * unsure
    below, above = float(masses[max(0, first - starts) : first].sum()), float(masses[first : first + starts].sum())
    value, std_error = float(spectrum.masses[:first].sum()), spectrum.std_error(nodes < -zero)
    margin = NORMAL_QUANTILE * std_error
    low, high = max(0.0, value - margin - below), min(1.0, value + margin + above)
    estimate = spectrum.estimate(value, std_error, low, high)
    return replace(estimate, converged=max(std_error, below, above) <= spectrum.tolerance)


def _smooth(nodes: Array, weights: Array, width: float | None) -> tuple[Array, Array, float]:
    """Return the sum of one Gaussian per node, on a grid that is fine and wide enough for its integral to be 1."""
    span = float(nodes[-1] - nodes[0])
    width = width or 0.01 * max(span, 0.01 * float(np.abs(nodes).max())) or 1.0
    points = round(3 * (span / width + 12))
    grid = np.linspace(nodes[0] - 6 * width, nodes[-1] + 6 * width, points)
    kernels = np.exp(-(((grid[:, None] - nodes) / width) ** 2) / 2) / (width * math.sqrt(2 * math.pi))
    return grid, kernels @ weights, width
