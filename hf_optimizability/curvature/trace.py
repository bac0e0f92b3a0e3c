# SPDX-License-Identifier: Apache-2.0
"""The trace of an operator, in all and by segment of its rows, from products with probe vectors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .estimates import Estimate
from .operators import SymmetricOperator
from .vectors import rademacher, segment_sums


MIN_PROBES = 8
"""Probes before the spread among them is trusted to stop: with fewer, the standard error itself is a guess."""

LOCKSTEP = 4
"""Probes multiplied at once: they share the forward and the first backward pass; more save little and cost memory."""


@dataclass(frozen=True)
class TraceResult:
    """A trace and its parts.

    Attributes:
        total: The trace.
        segments: The trace of the diagonal block of each segment, from the same probes.
    """

    total: Estimate
    segments: tuple[Estimate, ...]


def hutchinson(
    operator: SymmetricOperator, segments: Sequence[Sequence[slice]], *, tolerance: float, max_hvps: int, seed: int
) -> TraceResult:
    """Estimates the trace, and the trace of each segment's diagonal block, with standard errors.

    Averages vᵀAv over Rademacher vectors v (Hutchinson 1990); a segment s averages v_sᵀ(Av)_s over the same vectors,
    at no further product (Dong et al., HAWQ, arXiv 1905.03696). Stops when the standard error of the whole trace is
    below `tolerance` times its value. Intervals are Student's t at 95 %.

    Args:
        operator: The matrix.
        segments: Slices of the rows; together they must hold each row once.
        tolerance: Relative standard error to stop at.
        max_hvps: Most products to spend, at least 2.
        seed: Seed of the probes.

    Returns:
        The trace and the segments' traces.

    Example:
        >>> from hf_optimizability.curvature.operators import DenseOperator
        >>> diagonal = DenseOperator(torch.diag(torch.tensor([1.0, 2.0, 3.0])))
        >>> result = hutchinson(diagonal, [[slice(0, 1)], [slice(1, 3)]], tolerance=0.1, max_hvps=8, seed=0)
        >>> result.total.value, [segment.value for segment in result.segments]
        (6.0, [1.0, 5.0])
    """
    samples: list[list[float]] = []
    for probes in _rademacher_probes(operator, max_hvps, seed):
        samples += _segment_products(operator, probes, segments)
        total = _average(np.sum(samples, axis=1), tolerance)
        if total.converged and len(samples) >= MIN_PROBES:
            break
    return TraceResult(total, tuple(_average(column, tolerance) for column in np.transpose(samples)))


def exact_trace(operator: SymmetricOperator, segments: Sequence[Sequence[slice]]) -> TraceResult:
    """The trace without error, from one product with each unit vector: n products, for small n.

    Args:
        operator: The matrix.
        segments: Slices of the rows; together they must hold each row once.

    Returns:
        The trace and the segments' traces, with standard error 0.
    """
    sums = np.zeros(len(segments))
    for probes in _unit_probes(operator):
        sums += np.sum(_segment_products(operator, probes, segments), axis=0)

    def exactly(value: float) -> Estimate:
        value = float(value)
        return Estimate(value, value, value, method="exact", hvps=operator.size, converged=True, std_error=0.0)

    return TraceResult(exactly(sums.sum()), tuple(exactly(value) for value in sums))


def _segment_products(
    operator: SymmetricOperator, probes: Tensor, segments: Sequence[Sequence[slice]]
) -> list[list[float]]:
    """v_sᵀ(Av)_s for each row v of `probes` and each segment s."""
    products = operator.matmat(probes.T).T
    return [segment_sums(probe * product, segments) for probe, product in zip(probes, products, strict=True)]


def _rademacher_probes(operator: SymmetricOperator, number: int, seed: int) -> Iterator[Tensor]:
    """`number` probes as the rows of matrices of at most `LOCKSTEP` rows."""
    generator = torch.Generator().manual_seed(seed)
    for first in range(0, number, LOCKSTEP):
        rows = [
            rademacher(operator.size, generator=generator, dtype=operator.dtype, device=operator.device)
            for _ in range(min(LOCKSTEP, number - first))
        ]
        yield torch.stack(rows)


def _unit_probes(operator: SymmetricOperator) -> Iterator[Tensor]:
    """All unit vectors as the rows of matrices of at most `LOCKSTEP` rows."""
    for first in range(0, operator.size, LOCKSTEP):
        number = min(LOCKSTEP, operator.size - first)
        rows = torch.zeros(number, operator.size, dtype=operator.dtype, device=operator.device)
        rows[range(number), range(first, first + number)] = 1
        yield rows


def _average(samples: np.ndarray, tolerance: float) -> Estimate:
    """Mean of independent samples with its standard error and 95 % interval."""
    from scipy.special import stdtrit

    number = len(samples)
    mean = float(np.mean(samples))
    std_error = float(np.std(samples, ddof=1)) / math.sqrt(number)
    margin = float(stdtrit(number - 1, 0.975)) * std_error
    return Estimate(
        value=mean,
        low=mean - margin,
        high=mean + margin,
        method="hutchinson",
        hvps=number,
        converged=std_error <= tolerance * abs(mean),
        std_error=std_error,
    )
