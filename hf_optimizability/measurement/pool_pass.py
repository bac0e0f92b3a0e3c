# SPDX-License-Identifier: Apache-2.0
"""Forward passes over a pool: the loss of each example, and its part in the curvature along a vector."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..curvature.displacement import displaced
from ..curvature.gradient import norm_of
from ..errors import MeasurementError
from ..objective.example_losses import ExampleLosses
from ..objective.objective import Objective, ProbeBatch
from ..objective.pool import Pool
from ..objective.population import Drawn, Population
from ..objective.sampling import draw_sample, inclusion_probabilities


Array = NDArray[np.float64]

SIZE_PROBES = 4
"""Random vectors that an example's size is the mean over: of fewer, its inverse has no mean (E 1/χ²_k, k ≤ 2)."""

MIN_GROUPS = 6
"""Groups of examples whose spread is the error over the data; of fewer, that is itself not known."""

SAME_LOSS = 1e-3
"""Relative difference of losses that rounding may make."""

SIZE_STEP = 1e-3
"""Step along a random vector, relative to the parameters."""

LOSS_CHANGE = 1e-4
"""Change of the mean loss, relative to it, that a step along an eigenvector aims at."""

LONGEST_STEP = 1e-2
"""Longest step along an eigenvector, relative to the parameters."""


def draw_from_pool(
    objective: Objective, pool: Pool, *, examples: int, batch_size: int, seed: int
) -> tuple[list[ProbeBatch], Population]:
    """Draw examples from a pool with probabilities by their curvature.

    An example's size is `(Jᵢv)ᵀH_ℓ(Jᵢv)`, the mean over a few random vectors v: what it adds to the trace of the
    Gauss-Newton matrix. Takes 1 + `SIZE_PROBES` forward passes over the pool. To be called inside `measuring`.

    Args:
        objective: The loss, over any batches.
        pool: The examples.
        examples: How many to draw.
        batch_size: Examples in a batch of the sample.
        seed: Seed of the vectors and the draw.

    Returns:
        The batches to measure on, and what they are a sample of.

    Raises:
        MeasurementError: If the losses of single examples are not known, or a row can't be read.
    """
    _require_apart(objective)
    losses, items, sizes = _look(objective, pool, seed=seed)
    probabilities = inclusion_probabilities(sizes, examples)
    groups = max(MIN_GROUPS, round(examples / batch_size))
    sample = draw_sample(probabilities, groups=groups, generator=np.random.default_rng(seed))
    population = Population(pool, losses, items, sizes, sample)
    return list(_sampled_batches(objective, population, batch_size)), population


def _require_apart(objective: Objective) -> None:
    """Raise unless the losses of a batch's examples are those that its halves have."""
    batch = objective.local_batches[0]
    try:
        halves = objective.pieces(batch, -(-objective.examples(batch.inputs) // 2))
    except ValueError as error:
        raise MeasurementError("losses_not_apart") from error
    loss, apart = _apart(objective, batch)
    losses = _known(apart.by_example(loss))
    ends = np.cumsum([objective.examples(half.inputs) for half in halves])
    parts = [part.sum() for part in np.split(losses, ends[:-1])]
    sums = [float(_apart(objective, half)[0]) for half in halves]
    if not np.allclose(parts, sums, rtol=SAME_LOSS, atol=SAME_LOSS * abs(float(loss))):
        raise MeasurementError("losses_not_apart")


def _look(objective: Objective, pool: Pool, *, seed: int) -> tuple[Array, int, Array]:
    """Return the losses of all examples, the number of items, and the sizes of the examples."""
    generator = torch.Generator().manual_seed(seed)
    parameters = objective.parameters
    vectors = [
        [2.0 * torch.randint(2, p.shape, generator=generator) - 1 for p in parameters] for _ in range(SIZE_PROBES)
    ]
    number = sum(p.numel() for p in parameters)
    step = SIZE_STEP * float(norm_of([p.detach() for p in parameters])) / math.sqrt(number)
    losses, sizes, items = [], [], 0
    for batch in _pool_batches(objective, pool):
        loss, apart = _apart(objective, batch)
        losses.append(_known(apart.by_example(loss)))
        items += batch.items
        size = np.zeros(len(losses[-1]))
        for vector in vectors:
            with displaced(parameters, vector, [step] * len(parameters)):
                _, moved = _apart(objective, batch)
            moves = [(b.outputs.double() - a.outputs.double()) / step for a, b in _pairs(apart, moved)]
            size += _known(apart.curvature_by_example(loss, [call.outputs for call in apart.calls], moves))
        sizes.append(size / SIZE_PROBES)
    return np.concatenate(losses), items, np.concatenate(sizes)


class CurvatureAlong(NamedTuple):
    """The curvature of each example's loss along a unit vector v, summed over its items; of shape (N,).

    Attributes:
        gauss_newton: `(Jᵢv)ᵀH_ℓ(Jᵢv)`, by first differences of the outputs.
        hessian: vᵀHᵢv, by second differences of the losses.
    """

    gauss_newton: Array
    hessian: Array


def curvature_along(
    objective: Objective, population: Population, vectors: Sequence[Tensor], values: Sequence[float]
) -> list[CurvatureAlong]:
    """Return the curvature of each example of the pool along unit vectors, by differences of the outputs.

    Second differences have all of `vᵀHᵢv`, but of networks with kinks (ReLU) each unit that switches within the step
    adds to it by one over the step. First differences have the Gauss-Newton part, in which that hardly shows. Takes a
    forward pass over the pool, and two for each vector.

    Args:
        objective: The loss.
        population: The pool.
        vectors: Of norm 1.
        values: About how large `vᵀHv` is for each, for the step.
    """
    parameters = objective.parameters
    longest = LONGEST_STEP * float(norm_of([p.detach() for p in parameters]))
    change = 2 * LOSS_CHANGE * abs(population.mean_loss)
    steps = [min(longest, math.sqrt(change / abs(value)) if value else longest) for value in values]
    directions = [_shaped(vector, parameters) for vector in vectors]
    found: list[list[CurvatureAlong]] = [[] for _ in vectors]
    for batch in _pool_batches(objective, population.pool):
        loss, here = _apart(objective, batch)
        for direction, step, parts in zip(directions, steps, found, strict=True):
            sides = []
            for way in (-step, step):
                with displaced(parameters, direction, [way] * len(parameters)):
                    sides.append([call.outputs.double() for call in _apart(objective, batch)[1].calls])
            parts.append(_differences(loss, here, sides[0], sides[1], step))
    return [CurvatureAlong(*map(np.concatenate, zip(*parts, strict=True))) for parts in found]


def _differences(
    loss: Tensor, here: ExampleLosses, behind: Sequence[Tensor], ahead: Sequence[Tensor], step: float
) -> CurvatureAlong:
    """Return the curvature of a batch's examples from the outputs at both sides."""
    outputs = [call.outputs.double() for call in here.calls]
    moves = [(b - a) / (2 * step) for a, b in zip(behind, ahead, strict=True)]
    first, second, middle = (_known(here.losses_at(loss, z)) for z in (behind, ahead, outputs))
    return CurvatureAlong(
        gauss_newton=_known(here.curvature_by_example(loss, outputs, moves)),
        hessian=(first + second - 2 * middle) / step**2,
    )


def _shaped(vector: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    pieces = vector.split([p.numel() for p in parameters])
    return [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]


def _pool_batches(objective: Objective, pool: Pool) -> Iterator[ProbeBatch]:
    with pool.reading():
        for index, chunk in enumerate(pool.chunks()):
            yield objective.probe_batch(pool.collate(chunk), index)


def _sampled_batches(objective: Objective, population: Population, batch_size: int) -> Iterator[ProbeBatch]:
    """Yield the batches of a sample: those of certain examples, then the groups, each with its share of the items."""
    sample, pool = population.sample, population.pool
    certain = np.array_split(sample.certain, max(1, math.ceil(len(sample.certain) / batch_size)))
    drawn = sum(map(len, sample.groups))
    left = float(population.items)
    with pool.reading():
        for index, positions in enumerate([*certain, *sample.groups]):
            if not len(positions):
                continue
            batch = objective.probe_batch(pool.collate(positions), index)
            is_certain = index < len(certain)
            share = float(batch.items) if is_certain else left * len(positions) / drawn
            left -= share if is_certain else 0.0
            yield replace(batch, drawn=Drawn(positions, sample.probabilities[positions], share, is_certain))


@torch.no_grad()
def _apart(objective: Objective, batch: ProbeBatch) -> tuple[Tensor, ExampleLosses]:
    return objective.example_losses(batch)


def _pairs(first: ExampleLosses, second: ExampleLosses):
    return zip(first.calls, second.calls, strict=True)


def _known(values: Tensor | None) -> Array:
    if values is None:
        raise MeasurementError("losses_not_apart")
    return values.cpu().numpy()
