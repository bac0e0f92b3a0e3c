# SPDX-License-Identifier: Apache-2.0
"""Curvature of the loss over a whole data set, from a sample: eigenvalues from both sides, and traces.

The largest eigenvalue of a sample is, in the mean, above that of what it was drawn from: it is convex in the matrix
(Granziol et al., arXiv 2006.09092). And the curvature of the whole set along any unit vector is below its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..curvature.block_diagonal import BlockDiagonalHessian
from ..curvature.compact_embeddings import UsedRows
from ..linalg.estimate import Estimate, Spectrum
from ..linalg.operator import SymmetricOperator
from ..linalg.spectrum_and_trace import SpectrumAndTrace
from ..linalg.statistics import NORMAL_QUANTILE, student_quantile
from ..linalg.vectors import Segments, flatten, norm
from ..objective.objective import Objective
from ..objective.population import Population
from ..objective.sampling import design_std_error, noisy_variance
from .design import Array, Design
from .pool_pass import CurvatureAlong, curvature_along, drawn_again


MAX_UNSEEN = 0.5
"""Share of gᵀP⁻¹g where a sample has no gradient, above which its sharpness has no upper end: in small nets with rare
words it was above 0.99 where the interval missed, and from 0 to 0.8 where it held."""


@dataclass(frozen=True)
class Along:
    """The curvature along a vector v that was found on a sample.

    Attributes:
        whole: vᵀHv of the whole set: what differences say of the pool, and the rest as the sample has it.
        std_error: Standard error of `whole`: of that rest, and of a pool that is a part of the set.
        sample_std_error: How far vᵀHv of another sample of this design would be from that of the set.
        freedom: Degrees of freedom of `std_error`.
        sample_freedom: Degrees of freedom of `sample_std_error`.
    """

    whole: float
    std_error: float
    sample_std_error: float
    freedom: float
    sample_freedom: float = math.inf

    def times(self, factor: float) -> Along:
        """Return the curvature along a vector that is longer by the root of a factor."""
        return replace(
            self,
            whole=factor * self.whole,
            std_error=factor * self.std_error,
            sample_std_error=factor * self.sample_std_error,
        )


@dataclass(frozen=True, eq=False)
class Direction:
    """A vector v over all parameters, and the curvature of a sample along it.

    Attributes:
        unit: v/‖v‖.
        forms: `vᵀH_bv/‖v‖²` of each batch b of the sample, of shape (batches,).
        squared_length: ‖v‖².
        seen: Whether the sample has what may be the largest curvature; else it has no upper end.
    """

    unit: Tensor
    forms: Array
    squared_length: float = 1.0
    seen: bool = True


@dataclass(frozen=True, eq=False)
class Directions:
    """Where to look at the curvature of the whole set.

    Attributes:
        ends: Ritz vectors of λ_max and, if it was looked for, of λ_min.
        gradient: The gradient of the pool, of norm 1.
        sharpest: P^-½u, with u of norm 1 about where P^-½HP^-½ is the largest; `None` where P is 1, or there is none.
    """

    ends: tuple[Direction, ...]
    gradient: Direction
    sharpest: Direction | None = None


def directions_of(
    spectrum: SpectrumAndTrace, objective: Objective, operator: SymmetricOperator, used: UsedRows
) -> Directions:
    """Return the Ritz vectors of a sample and the pool's gradient; takes a product with each.

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
    *ends, along_gradient = map(Direction, (*map(used.expanded, spectrum.extremal), gradient), forms.T)
    return Directions(tuple(ends), along_gradient)


def sharpest_direction(
    vector: Tensor,
    objective: Objective,
    operator: SymmetricOperator,
    *,
    of_sample: Sequence[Tensor],
    preconditioner: Tensor,
) -> Direction:
    """Return P^-½u, u about where P^-½HP^-½ of a sample is the largest, as a direction; takes a product with it.

    Words that the optimizer has not seen have the smallest P. Where the sample lacks them, too, and the pool has them,
    the sample does not know the largest curvature: then most of gᵀP⁻¹g, with g the gradient of the pool, lies where
    the gradient of the sample is 0.

    Args:
        vector: P^-½u.
        objective: The loss over the sample.
        operator: The Hessian of it.
        of_sample: The gradient of the sample.
        preconditioner: The diagonal of P.
    """
    assert objective.population is not None
    length = norm(vector)
    unit = vector / (length or 1.0)
    forms = Design.of(objective).forms(operator, [unit])[:, 0]
    gains = flatten(objective.population.look.gradient).double().square() / preconditioner
    unseen = float(gains[flatten(of_sample) == 0].sum())
    return Direction(unit, forms, length**2, seen=unseen <= MAX_UNSEEN * float(gains.sum()))


@dataclass(frozen=True)
class AlongGradient:
    """The loss along the gradient g of the pool.

    Attributes:
        curvature: gᵀHg/‖g‖² of the whole set.
        slope_std_error: How far the slope along g may be from that of the whole set.
    """

    curvature: float
    slope_std_error: float


@dataclass(frozen=True)
class WholeSet:
    """What is known of a whole set from a sample of it.

    Attributes:
        spectrum: Its extreme eigenvalues and traces; the rest is that of the sample.
        sharpness: λ_max(P^-½HP^-½); `None` without a direction for it.
        along_gradient: The loss along its gradient.
        pool_error: Standard error of a pool that is a part of it, of the curvature along the Ritz vector of λ_max,
            relative to that.
    """

    spectrum: SpectrumAndTrace
    sharpness: Estimate | None
    along_gradient: AlongGradient
    pool_error: float


def about_the_whole_set(
    spectrum: SpectrumAndTrace,
    sharpness: Estimate | None,
    objective: Objective,
    directions: Directions,
    *,
    trace_tolerance: float,
) -> WholeSet:
    """Return a sample's extreme eigenvalues and traces as estimates of those of the whole set, with one interval each.

    Args:
        spectrum: Those of the sample.
        sharpness: λ_max(P^-½HP^-½) of the sample, if there is a direction for it.
        objective: The loss over the sample.
        directions: The curvature along their vectors.
        trace_tolerance: Relative standard error of a converged trace.
    """
    population, design = objective.population, Design.of(objective)
    assert population is not None
    seen = [directions.gradient, *directions.ends]
    if directions.sharpest is not None:
        seen.append(directions.sharpest)
    parts = curvature_along(objective, population, [d.unit for d in seen], [design.mean(d.forms) for d in seen])
    along_gradient, *along = [_along(*pair, population, design) for pair in zip(seen, parts, strict=True)]
    found = spectrum.estimates
    largest = between(found.lambda_max, along[0], largest=True)
    last = along[len(directions.ends) - 1]  # the only one of a matrix of one row
    smallest = None if found.lambda_min is None else between(found.lambda_min, last, largest=False)
    trace, *segments = _traces(spectrum, population, design, tolerance=trace_tolerance)
    estimates = replace(found, lambda_max=largest, lambda_min=smallest, trace=trace)
    return WholeSet(
        replace(spectrum, estimates=estimates, segments=tuple(segments)),
        None if sharpness is None else between(sharpness, along[-1], largest=True),
        AlongGradient(along_gradient.whole, population.pool_std_error(parts[0].slope)),
        _of_the_pool(population, parts[1].gauss_newton),
    )


def _along(direction: Direction, parts: CurvatureAlong, population: Population, design: Design) -> Along:
    """Return the curvature of the whole set along a vector.

    What differences lack, or have too much, is known on the sample: the less it varies, the better they are.
    """
    pairs = [(part, direction.forms - design.by_batch(part)) for part in (parts.gauss_newton, parts.hessian)]
    part, rest = min(pairs, key=lambda pair: design.std_error(pair[1]))
    error = math.hypot(design.std_error(rest), population.pool_std_error(part))
    sampling = design_std_error(part, population.sample.probabilities) / population.look.items
    sampling = math.hypot(sampling, error) if direction.seen else math.inf
    along = Along(population.mean(part) + design.mean(rest), error, sampling, design.freedom)
    return along.times(direction.squared_length)


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
    outer = farthest + sign * student_quantile(along.sample_freedom) * along.sample_std_error
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


def blocks_of_the_whole_set(
    spectra: Sequence[Spectrum],
    vectors: Sequence[Tensor],
    objective: Objective,
    blocks: Sequence[Sequence[int]],
    segments: Segments,
    *,
    seed: int,
    pool_error: float,
) -> tuple[Spectrum, ...]:
    """Return the extreme eigenvalues of a sample's blocks as estimates of those of the whole set.

    Along the vectors of one sample, another one has the curvature of the whole set, up to the error of its draw. That
    takes two products for all blocks, where forward passes over the pool would take two for each vector.

    Args:
        spectra: Both ends of each block, of the sample.
        vectors: Two, over all parameters: in each block the Ritz vector of λ_max, and of λ_min.
        objective: The loss over the sample.
        blocks: Indices of each block's parameters.
        segments: The places of their entries.
        seed: Seed of the other sample; another one than that of the first.
        pool_error: That of `WholeSet`, which a block's eigenvalues are taken to have as well.
    """
    other = drawn_again(objective, seed=seed)
    design = Design.of(other)
    _, forms, _ = BlockDiagonalHessian(other, blocks).matmat_per_batch(torch.stack(list(vectors), dim=1), segments)

    def along(values: Array) -> Along:
        mean = design.mean(values)
        error = math.hypot(design.std_error(values), pool_error * abs(mean))
        return Along(mean, error, error, design.freedom, design.freedom)

    return tuple(
        replace(
            block,
            lambda_max=between(block.lambda_max, along(forms[:, 0, index]), largest=True),
            lambda_min=block.lambda_min and between(block.lambda_min, along(forms[:, 1, index]), largest=False),
        )
        for index, block in enumerate(spectra)
    )


def _traces(spectrum: SpectrumAndTrace, population: Population, design: Design, *, tolerance: float) -> list[Estimate]:
    """Return the trace and those of the segments, with the error over the data in their intervals.

    The sample was drawn by the trace of the Gauss-Newton matrix. Of the rest, the pool has an estimate for each
    example, by which the sample is corrected as far as it is not noise: in networks with kinks (ReLU) it mostly is.
    The error over the data is that of the groups' spread, or what the pool's estimates predict where that is more.
    Segments share the correction by what they have of the rest, so that they still sum to the whole.
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
    by_batch, of_the_pool = design.by_batch(bends), _of_the_pool(population, look.sizes + look.bends)
    shift = population.mean(bends) - design.mean(by_batch)
    rests = np.abs([design.mean(column) for column in spectrum.parts.probed().T])
    shares = rests / (rests.sum() or 1.0)

    def moved(estimate: Estimate, share: float, by_batch_of_it: Array, least: float = 0.0) -> Estimate:
        added = share * shift
        at = replace(estimate, value=estimate.value + added, low=estimate.low + added, high=estimate.high + added)
        error = max(design.std_error(by_batch_of_it - share * by_batch), least)
        whole = math.hypot(error, of_the_pool * abs(at.value))
        return at.with_data_error(whole, freedom=design.freedom, tolerance=tolerance)

    total = moved(trace, 1.0, means.sum(axis=1), by_design)
    return [total, *map(moved, segments, shares.tolist(), means.T)]


def _of_the_pool(population: Population, values: Array) -> float:
    """Return how far the mean of values over the pool may be from that over the data set, relative to it."""
    return population.pool_std_error(values) / (abs(population.mean(values)) or 1.0)
