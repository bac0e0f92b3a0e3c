# SPDX-License-Identifier: Apache-2.0
"""The gradient noise scale: how many items the noise of a gradient averages over before the gradient itself shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..curvature.empirical_risk import EmpiricalRisk
from ..curvature.gradient import batch_gradients, gradient
from ..linalg.estimate import Estimate
from ..linalg.statistics import jackknife_variance, student_quantile
from ..linalg.vectors import dot


MIN_PARTS = 3
"""Parts without which there is no spread among delete-one estimates."""


@dataclass(frozen=True)
class NoiseScale:
    """Noise and signal of a gradient, for items whose gradients scatter about g with covariance Σ.

    Attributes:
        noise_scale: tr Σ/‖g‖², in items (examples, or labels of a language model): a mean over this many items has as
            much noise as signal. Infinite, as is its upper end, where ‖g‖² is not significantly above 0: more probe
            examples are needed. Converged is a finite upper end.
        gradient_squared: ‖g‖², of the gradient over all data; may come out negative where noise dominates.
        trace_covariance: tr Σ, of the gradient of one item.
        items: What the mean gradient is over.
        parts: Independent parts that it is from.
    """

    noise_scale: Estimate
    gradient_squared: Estimate
    trace_covariance: Estimate
    items: int
    parts: int


def noise_scale(
    objective: EmpiricalRisk,
    *,
    mean_gradient: Sequence[Tensor] | None = None,
) -> NoiseScale:
    """Estimate the gradient noise scale from the gradients of an objective's parts (McCandlish et al., 1812.06162).

    The parts must be independent draws; they may hold different numbers of items. Costs one gradient of the objective
    where its mean gradient is known, else two; memory: two n-vectors. Leaves `.grad` alone.

    Args:
        objective: The loss, in parts: micro-batches, or single examples.
        mean_gradient: Gradient of the mean loss, shaped like the parameters.

    Raises:
        ValueError: If there are fewer than 3 parts.

    Example:
        >>> class Lines(EmpiricalRisk):
        ...     parameters = [torch.zeros(1, requires_grad=True)]
        ...     def losses(self):
        ...         for slope in (1.0, 2.0, 3.0, 2.0):
        ...             yield (slope * self.parameters[0]).sum(), 1
        >>> found = noise_scale(Lines())  # ‖g‖² = 2² − tr Σ/4, tr Σ = 2/3
        >>> round(found.noise_scale.value, 4), round(found.trace_covariance.value, 4)
        (0.1739, 0.6667)
    """
    mean = gradient(objective).tensors if mean_gradient is None else mean_gradient
    parameter_group = objective.rows.group
    found = []
    for pieces, _, count in batch_gradients(objective):
        square = sum(dot(piece.reshape(-1), piece.reshape(-1)) for piece in pieces)
        product = sum(dot(p.reshape(-1), m.reshape(-1)) for p, m in zip(pieces, mean, strict=True))
        square, product = parameter_group.all_reduce_(torch.tensor([square, product], dtype=torch.float64)).tolist()
        found.append((square, product, count))
    squares, products, counts = np.array(objective.group.all_gather_interleaved(found)).reshape(-1, 3).T
    return noise_from_products(squares, products, counts.astype(int))


def noise_from_products(squares: np.ndarray, products: np.ndarray, counts: np.ndarray) -> NoiseScale:
    """Return the noise scale from two numbers a part.

    With bᵢ items in part i of N, B in all, Sᵢ the part's summed gradient and G = ΣSᵢ/B:
    tr Σ = (Σ‖Sᵢ‖²/bᵢ − B‖G‖²)/(N − 1) and ‖g‖² = ‖G‖² − tr Σ/B are unbiased. Leaving part i out turns ‖G‖² into
    (B²‖G‖² − 2B Sᵢ·G + ‖Sᵢ‖²)/(B − bᵢ)², so that jackknife errors need no further product.

    The interval of the noise scale comes from φ = E‖G‖²·B/tr Σ = 1 + B‖g‖²/tr Σ, estimated by F = ‖G‖²·B/tr Σ. Its
    jackknife variance V is in the main that of ‖G‖², and estimates 4gᵀΣg/B + 4tr Σ²/B². Truly that variance is
    4gᵀΣg/B + 2tr Σ²/B²: the jackknife doubles the part that is quadratic in the noise (Efron & Stein 1981). Where
    g lies to the axes of Σ as its own noise does, the true variance is V(1 − 1/(2φ)), and in proportion to φ − ½. The
    interval holds the φ that F lies within t standard errors of, (F − φ)² ≤ t²V(φ − ½)/F: a quadratic equation for
    its ends. That of ‖g‖² = (φ − 1) tr Σ/B is made likewise.

    Args:
        squares: ‖Sᵢ‖², of shape (N,).
        products: Sᵢ·G, of shape (N,).
        counts: bᵢ, of shape (N,).

    Raises:
        ValueError: If there are fewer than 3 parts.
    """
    parts, items = len(counts), int(counts.sum())
    if parts < MIN_PARTS:
        raise ValueError(f"The noise scale needs at least {MIN_PARTS} parts, not {parts}. Cut the probe set finer.")
    mean_squared = float(products.sum()) / items
    rest = items - counts
    mean_squared_rest = (items**2 * mean_squared - 2 * items * products + squares) / rest**2
    weighted = squares / counts
    trace = (float(weighted.sum()) - items * mean_squared) / (parts - 1)
    trace_rest = (weighted.sum() - weighted - rest * mean_squared_rest) / (parts - 2)
    signal = mean_squared - trace / items
    signal_rest = mean_squared_rest - trace_rest / rest
    if trace <= 0:  # all parts have the same mean gradient, to rounding
        nothing = _estimate(0.0, low=0.0, high=0.0, std_error=0.0)
        return NoiseScale(nothing, _estimate(signal, low=signal, high=signal, std_error=0.0), nothing, items, parts)

    ratio = max(items * mean_squared / trace, np.finfo(float).eps)
    quantile = student_quantile(parts - 1)
    signal_variance = jackknife_variance(signal_rest)
    ratio_variance = jackknife_variance(items * (signal_rest / trace - trace_rest * signal / trace**2))  # linearized
    share = 1 - 1 / (2 * max(ratio, 1.0))  # of these variances, what is not noise counted twice
    below, above = _ratio_margins(ratio, ratio_variance, quantile)
    signal_below, signal_above = _ratio_margins(ratio, signal_variance * (items / trace) ** 2, quantile)
    value = _noise_scale_at(ratio, items)
    return NoiseScale(
        noise_scale=_estimate(
            value,
            low=_noise_scale_at(ratio + above, items),
            high=_noise_scale_at(ratio - below, items),
            std_error=value**2 / items * math.sqrt(share * ratio_variance) if value < math.inf else None,
            converged=ratio - below > 1,
        ),
        gradient_squared=_estimate(
            signal,
            low=signal - signal_below * trace / items,
            high=signal + signal_above * trace / items,
            std_error=math.sqrt(share * signal_variance),
            converged=ratio - signal_below > 1,
        ),
        trace_covariance=_symmetric(trace, math.sqrt(jackknife_variance(trace_rest)), quantile),
        items=items,
        parts=parts,
    )


def _ratio_margins(ratio: float, variance: float, quantile: float) -> tuple[float, float]:
    """Return how far the φ with (F − φ)² ≤ t²V(φ − ½)/F lie below and above F; 0 below an F that is under ½."""
    half = quantile**2 * variance / ratio / 2
    reach = math.sqrt(half**2 + 2 * half * max(ratio - 0.5, 0.0))
    return max(reach - half, 0.0), reach + half


def _noise_scale_at(ratio: float, items: int) -> float:
    """Return B/(φ − 1), which is infinite where noise alone explains all of ‖G‖²."""
    return items / (ratio - 1) if ratio > 1 else math.inf


def _estimate(value: float, *, low: float, high: float, std_error: float | None, converged: bool = True) -> Estimate:
    return Estimate(value, low, high, method="jackknife", hvps=0, converged=converged, std_error=std_error)


def _symmetric(value: float, std_error: float, quantile: float) -> Estimate:
    margin = quantile * std_error
    return _estimate(value, low=value - margin, high=value + margin, std_error=std_error, converged=margin < value)
