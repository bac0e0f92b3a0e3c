# SPDX-License-Identifier: Apache-2.0
"""Curvature of the loss over a whole data set, from a sample: eigenvalues from both sides, and traces.

The largest eigenvalue of a sample is, in the mean, above that of what it was drawn from: it is convex in the matrix
(Granziol et al., arXiv 2006.09092). And the curvature of the whole set along any unit vector is below its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..linalg.estimate import Estimate
from ..linalg.operator import SymmetricOperator
from ..linalg.spectrum_and_trace import SpectrumAndTrace
from ..linalg.statistics import NORMAL_QUANTILE, student_quantile
from ..objective.objective import Objective
from ..objective.population import Population
from ..objective.sampling import design_std_error
from .design import Design
from .pool_pass import curvature_along


@dataclass(frozen=True)
class Along:
    """The curvature along a unit vector v that was found on a sample.

    Attributes:
        whole: vᵀHv of the whole set: what differences say of the pool, and the rest as the sample has it.
        std_error: Standard error of `whole`: of that rest, and of a pool that is a part of the set.
        sample_std_error: How far vᵀHv of another sample of this design would be from that of the set.
        freedom: Degrees of freedom of `std_error`.
    """

    whole: float
    std_error: float
    sample_std_error: float
    freedom: float


def about_the_whole_set(
    spectrum: SpectrumAndTrace,
    objective: Objective,
    population: Population,
    operator: SymmetricOperator,
    *,
    trace_tolerance: float,
) -> SpectrumAndTrace:
    """Return a sample's extreme eigenvalues and traces as estimates of those of the whole set, with one interval each.

    Args:
        spectrum: Those of the sample.
        objective: The loss over the sample.
        population: What it was drawn from.
        operator: The Hessian of the sample.
        trace_tolerance: Relative standard error of a converged trace.
    """
    found, design = spectrum.estimates, Design.of(objective)
    ends = [found.lambda_max] if found.lambda_min is None else [found.lambda_max, found.lambda_min]
    values = [end.value for end in ends]
    along = curvature_of_both(objective, population, design, operator, spectrum.extremal, values)
    bounded = [between(end, both, largest=end is found.lambda_max) for end, both in zip(ends, along, strict=True)]
    trace, *segments = _traces(spectrum, population, design, tolerance=trace_tolerance)
    smallest = bounded[1] if len(bounded) > 1 else None
    estimates = replace(found, lambda_max=bounded[0], lambda_min=smallest, trace=trace)
    return replace(spectrum, estimates=estimates, segments=tuple(segments))


def curvature_of_both(
    objective: Objective,
    population: Population,
    design: Design,
    operator: SymmetricOperator,
    vectors: Sequence[Tensor],
    values: Sequence[float],
) -> list[Along]:
    """Return the curvature of the whole set along unit vectors; takes a product with each.

    Args:
        objective: The loss over the sample.
        population: What it was drawn from.
        design: How.
        operator: The Hessian of the sample.
        vectors: Ritz vectors of it.
        values: Their Ritz values.
    """
    forms = design.forms(operator, vectors)
    found = []
    for column, differences in zip(forms.T, curvature_along(objective, population, vectors, values), strict=True):
        # What differences lack, or have too much, is known on the sample: the less it varies, the better they are.
        pairs = [(part, column - design.by_batch(part)) for part in differences]
        part, rest = min(pairs, key=lambda pair: design.std_error(pair[1]))
        error = math.hypot(design.std_error(rest), population.pool_std_error(part))
        sampling = design_std_error(part, population.sample.probabilities) / population.items
        whole = float(part.sum()) / population.items + design.mean(rest)
        found.append(Along(whole, error, math.hypot(sampling, error), design.freedom))
    return found


def between(end: Estimate, along: Along, *, largest: bool) -> Estimate:
    """Return an extreme eigenvalue of the whole set, between the two sides.

    The inner end is the curvature of the whole set along the vector; the outer end is the sample's eigenvalue with its
    residual, moved by what sampling may have taken from the curvature along the vector of the whole set. The value is
    midway between the curvature of the whole set along the vector and the sample's eigenvalue.

    Args:
        end: λ_max or λ_min of the sample.
        along: The curvature along its Ritz vector.
        largest: Whether it is λ_max.

    Example:
        >>> sample = Estimate(12.0, 12.0, 12.0, "lanczos", 8, True, residual=0.0)
        >>> found = between(sample, Along(10.0, 0.0, 1.0, freedom=5), largest=True)
        >>> found.value, found.low, round(found.high, 2)
        (11.0, 10.0, 13.96)
    """
    sign = 1.0 if largest else -1.0
    inner = along.whole - sign * student_quantile(along.freedom) * along.std_error
    outer = end.value + sign * ((end.residual or 0.0) + NORMAL_QUANTILE * along.sample_std_error)
    low, high = min(inner, outer), max(inner, outer)
    value = min(max((along.whole + end.value) / 2, low), high)
    return replace(
        end,
        value=value,
        low=low,
        high=high,
        std_error=(high - low) / (2 * NORMAL_QUANTILE),
        residual=None,
        data_std_error=along.sample_std_error,
    )


def _traces(spectrum: SpectrumAndTrace, population: Population, design: Design, *, tolerance: float) -> list[Estimate]:
    """Return the trace and those of the segments, with the error over the data in their intervals."""
    traces = [spectrum.estimates.trace, *spectrum.segments]
    if spectrum.parts is None:
        return traces
    # A size is the trace of its example, with the noise of a few probes.
    mean_size = float(population.sizes.sum()) / population.items
    of_the_pool = population.pool_std_error(population.sizes) / mean_size if mean_size else 0.0
    return [
        trace.with_data_error(
            math.hypot(error, of_the_pool * trace.value), freedom=design.freedom, tolerance=tolerance
        )
        for trace, error in zip(traces, spectrum.parts.errors_by(design.std_error).tolist(), strict=True)
    ]
