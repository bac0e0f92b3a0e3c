# SPDX-License-Identifier: Apache-2.0
"""The self-check before a first measurement: is the loss one function, which mean is it, is its gradient its slope.

Costs about ten forward passes over the probe set where all is well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .batches import Unit, batch_size, count_units, listed
from .curvature.displacement import displaced
from .curvature.vectors import dot
from .gradients import Gradient, norm_of
from .measurement import MeasurementError, SelfCheck
from .objective import Objective, ProbeBatch


MAX_REPEAT_ERROR = 1e-6
"""Relative difference of a loss evaluated twice on a GPU, whose sums may come in any order. On CPUs there is none."""

MAX_MEAN_ERROR = 1e-4
"""Relative difference between a batch's mean loss and that of its halves: rounding in float32 makes 1e-6."""

MAX_SLOPE_ERROR = 0.02
"""Difference between g·v and the slope of the loss along v, relative to ‖g‖‖v‖. Truncation and rounding stay below
1e-3 on smooth losses; kinks make more."""

SETTLED = 0.1
"""Relative difference below which the slopes at two steps, a factor of 8 apart, are the same slope."""

RELATIVE_CHANGE = 1e-3
"""Change of the loss that a step aims at, relative to the loss, and its longest length, relative to the parameters."""

FAR_CHANGE = 0.1
"""Change of the loss at the second point where batches and halves are compared: losses that happen to be equal at the
first one (a head of zeros) are not equal there."""

STEPS = (1.0, 1 / 8, 8.0)
"""Steps to try, in this order, as multiples of the one that aims at `RELATIVE_CHANGE`."""

_UNITS: tuple[Unit, ...] = ("items", "examples", "attended tokens")


def check_objective(objective: Objective, point: Gradient) -> SelfCheck:
    """Check that a loss is one function of the parameters, which mean it is, and that its gradient is its slope.

    To be called inside `measuring` and in the precision of the measurement, by all ranks together.

    Args:
        objective: What will be measured.
        point: Its gradient at the present parameters.

    Raises:
        MeasurementError: If the loss of a batch differs between two passes, or the gradient is not that of the loss.
    """
    draws = any(objective.ranks.gather([objective.draws()]))
    _require_repeatable(objective)
    slopes = _Slopes(objective, point)
    slope_errors = slopes.check()
    unit, mean_error = ("items", None) if draws else _find_unit(objective, slopes)
    return SelfCheck(
        draws=draws,
        unit=unit,
        can_cut=not draws and unit != "batches",
        mean_error=mean_error,
        slope_errors=slope_errors,
        hooks_set_aside=tuple(objective.state.set_aside),
        module_hooks=tuple(objective.state.module_hooks),
    )


def _require_repeatable(objective: Objective) -> None:
    first, second = (_means(objective, objective.local_batches)[0] for _ in range(2))
    tolerance = 0.0 if objective.parameters[0].device.type == "cpu" else MAX_REPEAT_ERROR
    errors = np.abs(first - second) / np.maximum(np.abs(first), torch.finfo(torch.float32).tiny)
    error = max(objective.ranks.gather(errors.tolist()), default=0.0)
    if error > tolerance:
        raise MeasurementError(
            f"The loss of the same batch differs by {error:.1e} between two passes in eval mode, although random "
            "numbers, buffers and attributes were put back before each.",
            "Look for state or random numbers outside of the model (a global counter, a generator that the loss "
            "holds); keep them in the model, or make the loss deterministic.",
        )


class _Slopes:
    """Compares g·v with the slope of the loss along v, for directions that are the gradient with a sign per tensor."""

    def __init__(self, objective: Objective, point: Gradient):
        self._objective = objective
        self._gradient = point.tensors
        self._loss = abs(point.loss)
        self._parameter_ranks = objective.rows.ranks
        self._squares = [dot(g.flatten(), g.flatten(), self._parameter_ranks) for g in point.tensors]
        self._square = math.fsum(self._squares)
        self._size = float(norm_of([p.detach() for p in objective.parameters], self._parameter_ranks)) or 1.0
        generator = torch.Generator().manual_seed(0)
        draws = torch.randint(2, (len(point.tensors),), generator=generator).tolist()
        self._signs = [2.0 * draw - 1 for draw in draws]

    def moved(self, change: float) -> AbstractContextManager[None]:
        """Move the parameters along the gradient with random signs, as far as would change the loss by `change`."""
        step = self._step(change)
        return displaced(self._objective.parameters, self._gradient, [step * sign for sign in self._signs])

    def _step(self, change: float) -> float:
        """Return the step along the gradient that changes the loss by `change`, as far as the gradient says."""
        if not self._square:
            return 0.0
        norm = math.sqrt(self._square)
        return min(change * self._loss / self._square, change * self._size / norm)

    def check(self) -> tuple[float | None, ...]:
        """Return the errors along the gradient, and along the gradient with random signs.

        Raises:
            MeasurementError: If the slope of the loss is another one.
        """
        if not self._square:
            self._require_flat(range(len(self._gradient)))
            return ()
        errors = tuple(self._error(signs) for signs in ([1.0] * len(self._signs), self._signs))
        if any(error is not None and error > MAX_SLOPE_ERROR for error in errors):
            raise MeasurementError(
                f"The gradient of the loss is not its slope: they differ by {max(e for e in errors if e):.0%} of the "
                f"gradient's norm, by {self._culprits()}.",
                "Measure a loss whose backward pass is its derivative: look for parts that are detached, gradient "
                "reversal, straight-through estimators, losses that run a backward pass of their own (GradCache), and "
                "hooks that change gradients.",
            )
        without = [index for index, square in enumerate(self._squares) if not square]
        if without:
            self._require_flat(without)
        return errors

    def _error(self, signs: Sequence[float]) -> float | None:
        """Return the error along one direction at the first step that agrees, or where the steps settle on another."""
        expected = math.fsum(sign * square for sign, square in zip(signs, self._squares, strict=True)) / self._square
        found: list[float] = []
        for factor in STEPS:
            step = factor * self._step(RELATIVE_CHANGE)
            ahead, behind = (self._loss_at([way * step * sign for sign in signs]) for way in (1, -1))
            scale = 2 * step * self._square
            rounding = 4 * torch.finfo(torch.float32).eps * max(abs(ahead), abs(behind)) / scale
            slope = (ahead - behind) / scale
            if not math.isfinite(slope) or rounding > SETTLED:
                continue
            if abs(slope - expected) <= MAX_SLOPE_ERROR + rounding:
                return abs(slope - expected)
            found.append(slope)
        return self._settled(found, expected)

    @staticmethod
    def _settled(found: Sequence[float], expected: float) -> float | None:
        """Return how far off a slope is that two steps agree on; `None` where they don't."""
        pairs = [(a, b) for a, b in pairwise(sorted(found)) if abs(a - b) <= SETTLED * max(abs(a), abs(b), SETTLED)]
        return min((abs((a + b) / 2 - expected) for a, b in pairs), default=None)

    def _culprits(self) -> str:
        """Return the names of the tensors along which the slope is another one, alone."""
        names = []
        for index in sorted(range(len(self._squares)), key=lambda index: -self._squares[index])[:16]:
            error = self._error([float(other == index) for other in range(len(self._squares))])
            if error is not None and error > MAX_SLOPE_ERROR * self._squares[index] / self._square:
                names.append(self._objective.names[index])
        return f"{listed(names[:4])}{', …' if len(names) > 4 else ''}" if names else "all parameters together"

    def _require_flat(self, indices: Sequence[int]) -> None:
        """Refuse a gradient of exactly zero where the loss has a slope."""
        generator = torch.Generator().manual_seed(1)
        directions = [torch.zeros((), dtype=g.dtype).expand(g.shape) for g in self._gradient]
        parameters = self._objective.parameters
        for index in indices:
            signs = 2.0 * torch.randint(2, self._gradient[index].shape, generator=generator) - 1
            scale = float(parameters[index].detach().square().mean().sqrt()) or RELATIVE_CHANGE
            directions[index] = (scale * signs).to(self._gradient[index])
        odd = []
        for step in (RELATIVE_CHANGE, 8 * RELATIVE_CHANGE):
            ahead, behind = (self._loss_at([way * step] * len(directions), directions) for way in (1, -1))
            rounding = 100 * torch.finfo(torch.float32).eps * max(abs(ahead), abs(behind))
            odd.append((ahead - behind) / 2 if abs(ahead - behind) / 2 > rounding else 0.0)
        slopes = odd[0] / RELATIVE_CHANGE, odd[1] / (8 * RELATIVE_CHANGE)
        if not all(map(math.isfinite, slopes)) or abs(slopes[0] - slopes[1]) > SETTLED * abs(slopes[1]):
            return  # no slope, or one that moves with the step
        if slopes[0]:
            everywhere = len(indices) == len(self._gradient)
            names = "everywhere" if everywhere else f"by {listed([self._objective.names[i] for i in indices][:4])}"
            raise MeasurementError(
                f"The gradient is exactly 0 {names}, but the loss depends on the weights there.",
                "The loss is detached from them: a `detach`, a `no_grad`, weights merged in eval mode, or a loss that "
                "runs a backward pass of its own (GradCache, as in the `Cached…` losses of sentence-transformers). "
                "Measure a loss that autograd can follow, for instance the one without the cache.",
            )

    def _loss_at(self, steps: Sequence[float], directions: Sequence[Tensor] | None = None) -> float:
        objective = self._objective
        with displaced(objective.parameters, directions or self._gradient, steps):
            return mean_loss(objective)


def mean_loss(objective: Objective) -> float:
    """Return the mean loss over all batches of all ranks, without a graph."""
    means, items = _means(objective, objective.local_batches)
    pairs = objective.ranks.gather(list(zip(means.tolist(), items.tolist(), strict=True)))
    return math.fsum(mean * count for mean, count in pairs) / math.fsum(count for _, count in pairs)


@torch.no_grad()
def _means(objective: Objective, batches: Sequence[ProbeBatch]) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean loss of each batch, and what it is over."""
    found = [(float(loss), items) for loss, items in objective.over(batches).losses()]
    sums, items = np.array(found, dtype=np.float64).reshape(-1, 2).T
    return sums / items, items


def _find_unit(objective: Objective, slopes: _Slopes) -> tuple[Unit, float | None]:
    """Return the first unit in which the mean losses of batches are those of their halves, and the difference."""
    halves = _Halves(objective, "items")
    if objective.rows.ranks.number > 1 or not any(objective.ranks.gather([bool(halves.batches)])):
        return "items", None  # shards lie over ranks, which cut each batch
    means = halves.means_near_and_far(slopes)
    for unit in _UNITS:
        if (error := halves.error(means, unit)) <= MAX_MEAN_ERROR:
            return unit, error
    pairs = _Halves(objective, "pairs")
    if all(objective.ranks.gather([len(pairs.batches) == len(halves.batches)])):
        error = pairs.error(pairs.means_near_and_far(slopes), "pairs")
        if error <= MAX_MEAN_ERROR:
            return "pairs", error
    return "batches", None


class _Means(NamedTuple):
    """Mean losses of batches, those of their halves, of shape (batches, 2), and what these are over by `loss_fn`."""

    whole: np.ndarray
    halves: np.ndarray
    items: np.ndarray


class _Halves:
    """The local batches that can be cut in two, and their halves.

    Args:
        objective: The objective.
        unit: `"pairs"` keeps pairs together.
    """

    def __init__(self, objective: Objective, unit: Unit):
        self._objective = objective
        self.batches: list[ProbeBatch] = []
        self._halves: list[ProbeBatch] = []
        for batch in objective.local_batches:
            number = batch_size(batch.inputs) // (2 if unit == "pairs" else 1)
            try:
                halves = objective.pieces(batch, -(-number // 2) or 1, unit=unit)
            except ValueError:
                continue
            if len(halves) == 2:
                self.batches.append(batch)
                self._halves += halves

    def means_near_and_far(self, slopes: _Slopes) -> list[_Means]:
        """Return mean losses at the present parameters, and at a second point unless the loss is not finite there."""
        near = self._means()
        with slopes.moved(FAR_CHANGE):
            far = self._means()
        finite = all(self._objective.ranks.gather([bool(np.isfinite(far.whole).all())]))
        return [near, far] if finite else [near]

    def _means(self) -> _Means:
        whole, _ = _means(self._objective, self.batches)
        # Halves in which nothing counts have weight 0; they are evaluated all the same, so that each batch has two.
        halves, items = _means(self._objective, [replace(half, items=half.items or 1) for half in self._halves])
        items[[half.items == 0 for half in self._halves]] = 0
        return _Means(whole, halves.reshape(-1, 2), items.reshape(-1, 2))

    def error(self, means: Sequence[_Means], unit: Unit) -> float:
        """Return the largest difference, over all ranks, between a batch's mean and its halves' mean in a unit."""
        errors = [0.0]
        for whole, halves, items in means:
            weights = items if unit == "items" else self._weights(unit)
            halves = np.where(weights == 0, 0.0, halves)
            with np.errstate(invalid="ignore", divide="ignore"):
                mean = (weights * halves).sum(1) / weights.sum(1)
                difference = np.abs(mean - whole) / np.maximum(np.abs(whole), np.abs(halves).max(1))
            errors += np.nan_to_num(difference, nan=math.inf).tolist()
        return max(self._objective.ranks.gather(errors))

    def _weights(self, unit: Unit) -> np.ndarray:
        counts = [count_units(self._objective.model, half.inputs, unit) for half in self._halves]
        return np.array([math.nan if count is None else count for count in counts]).reshape(-1, 2)
