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
from ..curvature.gradient import batch_gradients, norm_of
from ..errors import MeasurementError
from ..linalg.vectors import split_like
from ..objective.example_losses import ExampleLosses
from ..objective.objective import Objective, ProbeBatch
from ..objective.pool import Pool
from ..objective.population import Drawn, Look, Population
from ..objective.sampling import Sample, draw_sample, inclusion_probabilities


Array = NDArray[np.float64]

SIZE_PROBES = 4
"""Random vectors that an example's size is the mean over: of fewer, its inverse has no mean (E 1/χ²_k, k ≤ 2)."""

MIN_GROUPS = 6
"""Groups of examples whose spread is the error over the data; of fewer, that is itself not known."""

SAME_LOSS = 1e-3
"""Relative difference of losses that rounding may make."""

HALVED = 4
"""Batches whose halves are compared with them."""

ASIDE_STEP, OTHER_TERM = 0.1, 1e-4
"""How far to go from the parameters, relative to them, to see a loss that is not the examples'; its gradient, relative
to the whole one, above that of rounding."""

SIZE_STEP = 1e-2
"""Step along a random vector, relative to the parameters: second differences of outputs in float32 need a long one."""

MAX_HELD = 2**22
"""Numbers that models put out, of batches of the pool that are held at the same time."""

LOSS_CHANGE = 1e-4
"""Change of the mean loss, relative to it, that a step along an eigenvector aims at."""

LONGEST_STEP = 1e-2
"""Longest step along an eigenvector, relative to the parameters."""


def draw_from_pool(
    objective: Objective, pool: Pool, *, examples: int, batch_size: int, seed: int
) -> tuple[list[ProbeBatch], Population]:
    """Draw examples from a pool with probabilities by their curvature.

    An example's size is `(Jᵢv)ᵀH_ℓ(Jᵢv)`, the mean over a few random vectors v: what it adds to the trace of the
    Gauss-Newton matrix. Takes two forward passes over the pool for each vector, and one with the gradient. To be
    called inside `measuring`.

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
    look = _look(objective, pool, seed=seed)
    probabilities = _chances(look, examples)
    population = Population(pool, look, _drawn(probabilities, batch_size, seed=seed))
    return list(_sampled_batches(objective, population, batch_size)), population


def drawn_again(objective: Objective, *, seed: int) -> Objective:
    """Return the loss over the population of an objective, on other examples, drawn alike.

    Args:
        objective: The loss over a sample.
        seed: Seed of the draw; another one than that of the sample.
    """
    assert objective.population is not None
    size, before = objective.batch_size, objective.population
    population = replace(before, sample=_drawn(before.sample.probabilities, size, seed=seed))
    return objective.sampled(list(_sampled_batches(objective, population, size)), population)


def _drawn(probabilities: Array, batch_size: int, *, seed: int) -> Sample:
    """Return a sample with these inclusion probabilities, in groups of about as many examples as a batch has."""
    groups = max(MIN_GROUPS, round(round(float(probabilities.sum())) / batch_size))
    return draw_sample(probabilities, groups=groups, generator=np.random.default_rng(seed))


def _chances(look: Look, number: int) -> Array:
    """Return the probability of each example to be in a sample of that many.

    One with neither loss nor curvature (all of its labels are ignored) adds nothing to any sum. It is never drawn: a
    group of such examples has no mean loss, and its share of the items would be lost.
    """
    counted = (look.losses != 0) | (look.sizes != 0) | (look.bends != 0)
    if not counted.any():
        counted[:] = True
    chances = np.zeros(len(counted))
    chances[counted] = inclusion_probabilities(_importance(look)[counted], number)
    return chances


def _importance(look: Look) -> Array:
    """Return what examples are drawn in proportion to: their sizes, and what they have beyond the Gauss-Newton matrix.

    Hard examples have most of the latter, of which the smallest eigenvalue is made. In all it counts at most as much
    as the sizes: in networks with kinks (ReLU) it is noise.
    """
    bends = np.abs(look.bends)
    whole, beyond = float(look.sizes.sum()), float(bends.sum())
    return look.sizes + bends * (min(1.0, whole / beyond) if beyond else 0.0)


def _require_apart(objective: Objective) -> None:
    """Raise unless the loss of a batch is the sum of those of its examples, by themselves, as far as passes can tell.

    The halves of a few batches must have the losses that their examples have in the whole, and the first batch no
    other term with a gradient. In the pass over the pool an item's loss must count by the same in each batch
    (`_require_same_weights`). Unseen remains a loss function of torch that is called alike on all batches, on outputs
    that depend on other examples in few of them.
    """
    for batch in objective.local_batches[:HALVED]:
        _require_same_in_halves(objective, batch)
    parameters = objective.parameters
    generator = torch.Generator().manual_seed(0)
    aside = [torch.randn(p.shape, generator=generator) for p in parameters]
    step = ASIDE_STEP * _length(parameters) / math.sqrt(sum(p.numel() for p in parameters))
    for length in (0.0, step):  # a penalty has no gradient at its centre
        with displaced(parameters, aside, [length] * len(parameters)):
            _require_no_other_term(objective, objective.local_batches[0])


def _require_same_in_halves(objective: Objective, batch: ProbeBatch) -> None:
    """Raise unless the losses of a batch's examples are those that its halves have."""
    try:
        halves = objective.pieces(batch, -(-objective.examples(batch.inputs) // 2))
    except ValueError as error:
        raise MeasurementError("losses_not_apart") from error
    loss, apart = _apart(objective, batch)
    _require_finite(float(loss))
    losses = _known(apart.by_example(loss))
    ends = np.cumsum([objective.examples(half.inputs) for half in halves])
    parts = [part.sum() for part in np.split(losses, ends[:-1])]
    sums = [float(_apart(objective, half)[0]) if half.items else 0.0 for half in halves]
    if not np.allclose(parts, sums, rtol=SAME_LOSS, atol=SAME_LOSS * abs(float(loss))):
        raise MeasurementError("losses_not_apart")


def _require_same_weights(batches: Sequence[Sequence[float]]) -> None:
    """Raise unless an item's loss counts in the sum over a batch by the same in each, for each call of a loss."""
    if len(set(map(len, batches))) > 1:
        raise MeasurementError("losses_not_apart")
    for weights in zip(*batches, strict=True):
        known = [weight for weight in weights if weight]
        if known and max(known) - min(known) > SAME_LOSS * abs(known[0]):
            raise MeasurementError("losses_not_apart")


def _require_no_other_term(objective: Objective, batch: ProbeBatch) -> None:
    """Raise if a batch's loss has a part that is none of its examples': it would not be weighted as they are."""
    loss, apart = objective.example_losses(batch)
    rest = apart.rest(loss)
    assert rest is not None
    of_rest, of_loss = (
        float(norm_of(torch.autograd.grad(term, objective.parameters, retain_graph=True, materialize_grads=True)))
        for term in (rest, loss)
    )
    if of_rest > OTHER_TERM * of_loss:
        raise MeasurementError("losses_not_apart")


def _require_finite(loss: float) -> None:
    if not math.isfinite(loss):
        raise MeasurementError("loss_not_finite", loss=str(loss))


def _look(objective: Objective, pool: Pool, *, seed: int) -> Look:
    generator = torch.Generator().manual_seed(seed)
    parameters = objective.parameters
    vectors = [
        [2.0 * torch.randint(2, p.shape, generator=generator) - 1 for p in parameters] for _ in range(SIZE_PROBES)
    ]
    step = SIZE_STEP * _length(parameters) / math.sqrt(sum(p.numel() for p in parameters))
    losses, sizes, bends, weights, items = [], [], [], [], 0
    gradients = _GradientSum(objective)
    with pool.reading():
        for looked in _looked_at(objective, pool):
            losses += [_known(one.apart.by_example(one.loss)) for one in looked]
            weights += [one.apart.item_weights(one.loss) for one in looked]
            _require_same_weights(weights)
            items += sum(one.batch.items for one in looked)
            parts = [_along(objective, looked, vector, step) for vector in vectors]
            for of_batch in zip(*parts, strict=True):
                sizes.append(np.stack([part.gauss_newton for part in of_batch]))
                bends.append(np.stack([part.hessian - part.gauss_newton for part in of_batch]))
            gradients.add(looked)
    _require_finite(float(np.concatenate(losses).sum()))
    return Look(
        np.concatenate(losses),
        items,
        np.concatenate(sizes, axis=1),
        np.concatenate(bends, axis=1),
        gradient=gradients.mean,
        batch_squares=np.array(gradients.squares),
    )


class _GradientSum:
    """The gradient over a pool, batch by batch.

    Attributes:
        squares: `‖S‖²/b` of each batch of b items, S the gradient of the sum of its losses.
    """

    def __init__(self, objective: Objective):
        self._objective = objective
        self._totals = [torch.zeros_like(parameter) for parameter in objective.parameters]
        self._items = 0.0
        self.squares: list[float] = []

    def add(self, looked: Sequence[_Looked]) -> None:
        for tensors, _, items in batch_gradients(self._objective.over([one.batch for one in looked])):
            for total, piece in zip(self._totals, tensors, strict=True):
                total += piece
            self._items += items
            self.squares.append(float(norm_of(tensors)) ** 2 / items)

    @property
    def mean(self) -> tuple[Tensor, ...]:
        """The gradient of the mean loss."""
        return tuple(total / self._items for total in self._totals)


class CurvatureAlong(NamedTuple):
    """The curvature of each example's loss along a unit vector v, summed over its items; of shape (N,).

    Attributes:
        slope: gᵢᵀv, by first differences of the losses.
        gauss_newton: `(Jᵢv)ᵀH_ℓ(Jᵢv)`, by first differences of the outputs.
        hessian: vᵀHᵢv, by second differences of the losses.
    """

    slope: Array
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
    longest = LONGEST_STEP * _length(parameters)
    change = 2 * LOSS_CHANGE * abs(population.mean_loss)
    steps = [min(longest, math.sqrt(change / abs(value))) if change and value else longest for value in values]
    directions = [split_like(vector, parameters) for vector in vectors]
    found: list[list[CurvatureAlong]] = [[] for _ in vectors]
    with population.pool.reading():
        for looked in _looked_at(objective, population.pool):
            for direction, step, parts in zip(directions, steps, found, strict=True):
                parts += _along(objective, looked, direction, step)
    return [CurvatureAlong(*map(np.concatenate, zip(*parts, strict=True))) for parts in found]


class _Looked(NamedTuple):
    """A batch of the pool, the sum of its losses, and those of its examples."""

    batch: ProbeBatch
    loss: Tensor
    apart: ExampleLosses

    @property
    def outputs(self) -> list[Tensor]:
        return [call.outputs for call in self.apart.calls]


def _looked_at(objective: Objective, pool: Pool) -> Iterator[list[_Looked]]:
    """Yield the batches of a pool, several at a time: moving the weights can take as long as a forward pass.

    Inside `reading`, which is not held here: a generator that is left in the middle would restore late.
    """
    looked, held = [], 0
    for index, inputs in enumerate(pool.batches(objective.batch_size)):
        batch = objective.probe_batch(inputs, index)
        looked.append(_Looked(batch, *_apart(objective, batch)))
        held += sum(outputs.numel() for outputs in looked[-1].outputs)
        if held >= MAX_HELD:
            yield looked
            looked, held = [], 0
    if looked:
        yield looked


def _along(
    objective: Objective, looked: Sequence[_Looked], direction: Sequence[Tensor], step: float
) -> list[CurvatureAlong]:
    """Return the curvature of the examples of each batch, from the outputs at both sides."""
    behind, ahead = (_outputs_at(objective, looked, direction, way) for way in (-step, step))
    return [_differences(one, a, b, step) for one, a, b in zip(looked, behind, ahead, strict=True)]


def _outputs_at(
    objective: Objective, looked: Sequence[_Looked], direction: Sequence[Tensor], step: float
) -> list[list[Tensor]]:
    """Return the outputs of batches after a step of all parameters along a direction."""
    parameters = objective.parameters
    with displaced(parameters, direction, [step] * len(parameters)):
        return [[call.outputs for call in _apart(objective, one.batch)[1].calls] for one in looked]


def _differences(one: _Looked, behind: Sequence[Tensor], ahead: Sequence[Tensor], step: float) -> CurvatureAlong:
    """Return the curvature of a batch's examples from the outputs at both sides."""
    moves = [(b.double() - a.double()) / (2 * step) for a, b in zip(behind, ahead, strict=True)]
    first, second, middle = (_known(one.apart.losses_at(one.loss, z)) for z in (behind, ahead, one.outputs))
    return CurvatureAlong(
        slope=(second - first) / (2 * step),
        gauss_newton=_known(one.apart.curvature_by_example(one.loss, one.outputs, moves)),
        hessian=(first + second - 2 * middle) / step**2,
    )


def _length(parameters: Sequence[Tensor]) -> float:
    """Return the norm of the parameters, to measure steps by; 1 if all are 0."""
    return float(norm_of([p.detach() for p in parameters])) or 1.0


def _sampled_batches(objective: Objective, population: Population, batch_size: int) -> Iterator[ProbeBatch]:
    """Yield the batches of a sample: those of certain examples, then the groups, each with its share of the items."""
    sample, pool = population.sample, population.pool
    certain = np.array_split(sample.certain, max(1, math.ceil(len(sample.certain) / batch_size)))
    drawn = sum(map(len, sample.groups))
    left = float(population.look.items)
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


def _known(values: Tensor | None) -> Array:
    if values is None:
        raise MeasurementError("losses_not_apart")
    return values.cpu().numpy()
