# SPDX-License-Identifier: Apache-2.0
"""Curvature of the loss over a whole data set, from a sample: eigenvalues from both sides, and traces.

The largest eigenvalue of a sample is, in the mean, above that of what it was drawn from: it is convex in the matrix
(Granziol et al., arXiv 2006.09092). And the curvature of the whole set along any unit vector is below its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from ..curvature.compact_embeddings import UsedRows
from ..linalg.estimate import Estimate
from ..linalg.operator import SymmetricOperator
from ..linalg.spectrum_and_trace import SpectrumAndTrace
from ..linalg.statistics import NORMAL_QUANTILE, student_quantile
from ..linalg.vectors import flatten, norm
from ..objective.objective import Objective
from ..objective.population import Population
from ..objective.sampling import design_std_error, noisy_variance
from .design import Array, Design
from .pool_pass import CurvatureAlong, curvature_along


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


@dataclass(frozen=True, eq=False)
class SampleForms:
    """What a sample says of the curvature along unit vectors over all parameters.

    Attributes:
        vectors: Ritz vectors of λ_max and, if it was looked for, of λ_min; then the gradient of the pool, of norm 1.
        forms: `vᵀH_bv` of each batch of the sample, of shape (batches, vectors).
    """

    vectors: tuple[Tensor, ...]
    forms: Array


def sample_forms(
    spectrum: SpectrumAndTrace, objective: Objective, operator: SymmetricOperator, used: UsedRows
) -> SampleForms:
    """Return the curvature of a sample along its Ritz vectors and the pool's gradient; takes a product with each.

    Args:
        spectrum: The spectrum of the sample.
        objective: The loss over the sample.
        operator: The Hessian of it.
        used: The parameters that the Hessian is by.
    """
    assert objective.population is not None
    gradient = flatten(objective.population.look.gradient).to(operator.device, operator.dtype)
    gradient = gradient / (norm(gradient) or 1.0)
    forms = Design.of(objective).forms(operator, [*spectrum.extremal, used.reduced(gradient)])
    return SampleForms((*map(used.expanded, spectrum.extremal), gradient), forms)


@dataclass(frozen=True)
class AlongGradient:
    """The loss along the gradient g of the pool.

    Attributes:
        curvature: gᵀHg/‖g‖² of the whole set.
        slope_std_error: How far the slope along g may be from that of the whole set.
    """

    curvature: float
    slope_std_error: float


def about_the_whole_set(
    spectrum: SpectrumAndTrace, objective: Objective, of_sample: SampleForms, *, trace_tolerance: float
) -> tuple[SpectrumAndTrace, AlongGradient]:
    """Return a sample's extreme eigenvalues and traces as estimates of those of the whole set, with one interval each.

    Args:
        spectrum: Those of the sample.
        objective: The loss over the sample.
        of_sample: The curvature along their vectors.
        trace_tolerance: Relative standard error of a converged trace.
    """
    population, design = objective.population, Design.of(objective)
    assert population is not None
    parts = curvature_along(objective, population, of_sample.vectors, [design.mean(f) for f in of_sample.forms.T])
    along = [_along(*pair, population, design) for pair in zip(of_sample.forms.T, parts, strict=True)]
    found = spectrum.estimates
    largest = between(found.lambda_max, along[0], largest=True)
    smallest = None if found.lambda_min is None else between(found.lambda_min, along[1], largest=False)
    trace, *segments = _traces(spectrum, population, design, tolerance=trace_tolerance)
    estimates = replace(found, lambda_max=largest, lambda_min=smallest, trace=trace)
    along_gradient = AlongGradient(along[-1].whole, population.pool_std_error(parts[-1].slope))
    return replace(spectrum, estimates=estimates, segments=tuple(segments)), along_gradient


def _along(forms: Array, parts: CurvatureAlong, population: Population, design: Design) -> Along:
    """Return the curvature of the whole set along a vector.

    What differences lack, or have too much, is known on the sample: the less it varies, the better they are.
    """
    pairs = [(part, forms - design.by_batch(part)) for part in (parts.gauss_newton, parts.hessian)]
    part, rest = min(pairs, key=lambda pair: design.std_error(pair[1]))
    error = math.hypot(design.std_error(rest), population.pool_std_error(part))
    sampling = design_std_error(part, population.sample.probabilities) / population.look.items
    return Along(population.mean(part) + design.mean(rest), error, math.hypot(sampling, error), design.freedom)


def between(end: Estimate, along: Along, *, largest: bool) -> Estimate:
    """Return an extreme eigenvalue of the whole set, between the two sides.

    The inner end is the curvature of the whole set along the vector; the outer end is the sample's eigenvalue with its
    residual, or that curvature if it is beyond, moved by what sampling may have taken from the curvature along the
    vector of the whole set. The value is midway between the curvature of the whole set along the vector and the
    sample's eigenvalue.

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
    farthest = sign * max(sign * end.value + (end.residual or 0.0), sign * along.whole)
    outer = farthest + sign * NORMAL_QUANTILE * along.sample_std_error
    low, high = min(inner, outer), max(inner, outer)
    value = min(max((along.whole + end.value) / 2, low), high)
    known = math.isfinite(high - low)
    return replace(
        end,
        value=value,
        low=low,
        high=high,
        converged=end.converged and known,
        std_error=(high - low) / (2 * NORMAL_QUANTILE) if known else None,
        residual=None,
        data_std_error=along.sample_std_error if known else None,
    )


def _traces(spectrum: SpectrumAndTrace, population: Population, design: Design, *, tolerance: float) -> list[Estimate]:
    """Return the trace and those of the segments, with the error over the data in their intervals.

    The sample was drawn by the trace of the Gauss-Newton matrix. Of the rest, the pool has an estimate for each
    example, by which the sample is corrected as far as it is not noise: in networks with kinks (ReLU) it mostly is.
    The error over the data is that of the groups' spread, or what the pool's estimates predict where that is more.
    """
    trace, segments = spectrum.estimates.trace, spectrum.segments
    if spectrum.parts is None:
        return [trace, *segments]
    look, means = population.look, spectrum.parts.means()
    chances = population.sample.probabilities
    of_bends = noisy_variance(look.bend_probes, chances)
    bends = of_bends.reliability * look.bends
    left = noisy_variance(look.size_probes + (1 - of_bends.reliability) * look.bend_probes, chances).signal
    by_design = math.sqrt(left + of_bends.reliability**2 * of_bends.noise) / look.items
    shift = population.mean(bends) - design.mean(design.by_batch(bends))
    trace = replace(trace, value=trace.value + shift, low=trace.low + shift, high=trace.high + shift)
    errors = [design.std_error(values) for values in (means.sum(axis=1) - design.by_batch(bends), *means.T)]
    errors[0] = max(errors[0], by_design)
    known = look.sizes + look.bends
    of_the_pool = population.pool_std_error(known) / (abs(population.mean(known)) or 1.0)
    return [
        estimate.with_data_error(
            math.hypot(error, of_the_pool * abs(estimate.value)), freedom=design.freedom, tolerance=tolerance
        )
        for estimate, error in zip((trace, *segments), errors, strict=True)
    ]
