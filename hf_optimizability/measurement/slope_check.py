# SPDX-License-Identifier: Apache-2.0
"""The self-check's second part: is the gradient of an objective the slope of its loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

import torch
from torch import Tensor

from ..curvature.displacement import displaced
from ..curvature.gradient import Gradient, gradient, norm_of
from ..errors import MeasurementError
from ..linalg.vectors import dot
from ..objective.objective import Objective
from ..objective.padding_rows import without_padding_rows
from .mean_check import mean_loss, moved_far, typical_sizes


MAX_SLOPE_ERROR = 0.02
"""Difference between g·v and the slope of the loss along v, relative to ‖g‖‖v‖. Truncation and rounding stay below
1e-3 on smooth losses; kinks make more."""

SETTLED = 0.1
"""Relative difference below which the slopes at the two smallest steps are the same slope. Jumps of the loss (points
or queries that are selected) make them differ, or agree with the gradient at the smallest."""

RELATIVE_CHANGE = 1e-3
"""Change of the loss that a step aims at, relative to the loss, and its longest length, relative to the parameters."""

STEPS = (1.0, 1 / 8, 8.0, 1 / 64, 64.0)
"""Steps to try, in this order, as multiples of the one that aims at `RELATIVE_CHANGE`."""

ROUNDING = torch.finfo(torch.float32).eps
"""Rounding of a loss: 4 times this of its value, and once this of 1, near which a classifier's probabilities are."""

MAX_MISSING = 0.02
"""Norm of what a gradient lacks, relative to its own, as random directions estimate it. Truncation and rounding make
up to 4e-3, kinks more, which do not settle."""

FARTHEST = 10.0
"""How many times farther than by its size a small tensor may move: a loss is another one far away."""

SURE = 8.0
"""Times its rounding by which a slope is another one, where rounding is all that can be seen of the right one."""

RANDOM_STEPS = (4e-3, 16e-3, 1e-3)
"""Steps along them, relative to the parameters, in this order."""

DIRECTIONS = 4
"""How many random directions to try, in search of a slope where the gradient is 0: along one it may be small."""


def slope_errors(objective: Objective, point: Gradient) -> tuple[float | None, ...]:
    """Compare the gradient with differences of the loss, along it and along it with a random sign for each tensor.

    What a gradient lacks may be nearly orthogonal to both. So the slopes along random signs are compared, too, once in
    steps by the size of each tensor and once in about equal ones: relative to what g·v comes to there, they differ by
    the norm of what is missing relative to ‖g‖, in mean square.

    To be called inside `measuring` and in the precision of the measurement, by all ranks together. Takes eight forward
    passes over the probe set where all is well. Where the slopes differ, they are compared at a second point as well:
    a network may rest on kinks (ReLU units whose input is 0 or 1e-28), a wrong backward pass is wrong anywhere.

    Args:
        objective: What will be measured.
        point: Its gradient at the present parameters.

    Returns:
        The difference of both slopes, relative to `‖g‖‖v‖`, or `None` where the slope of the loss moves with
        the step, differs between ahead and behind, or drowns in rounding. Nothing where the gradient is 0.

    Raises:
        MeasurementError: If the loss has another slope than its gradient says.
    """
    try:
        return _Slopes(objective, point).check()
    except MeasurementError:
        with moved_far(objective):
            elsewhere = gradient(objective)
            if not math.isfinite(elsewhere.loss):
                raise
            _Slopes(objective, elsewhere).check()
        return None, None


class _Slopes:
    """Compares g·v with the slope of the loss along v, for directions that are the gradient with a sign per tensor."""

    def __init__(self, objective: Objective, point: Gradient):
        self._objective = objective
        self._gradient = without_padding_rows(objective, point.tensors)
        self._loss = point.loss
        self._parameter_group = objective.rows.group
        self._squares = [dot(g.flatten(), g.flatten(), self._parameter_group) for g in self._gradient]
        self._square = math.fsum(self._squares)
        self._size = float(norm_of([p.detach() for p in objective.parameters], self._parameter_group)) or 1.0
        generator = torch.Generator().manual_seed(0)
        draws = torch.randint(2, (len(self._gradient),), generator=generator).tolist()
        self._signs = [2.0 * draw - 1 for draw in draws]

    def _step(self, change: float) -> float:
        """Return the step along the gradient that changes the loss by `change`, as far as the gradient says."""
        if not self._square:
            return 0.0
        norm = math.sqrt(self._square)
        return min(change * abs(self._loss) / self._square, change * self._size / norm)

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
            worst = max(error for error in errors if error)
            raise MeasurementError("gradient_not_slope", difference=worst, parameters=self._culprits())
        without = [index for index, square in enumerate(self._squares) if not square]
        if without:
            self._require_flat(without)
        missing = self._missing()
        if missing > MAX_MISSING:
            raise MeasurementError("gradient_not_slope", difference=missing, parameters=self._culprits())
        return errors

    def _missing(self) -> float:
        """Return the norm of what the gradient lacks, relative to its own, as far as differences can tell."""
        generator = torch.Generator().manual_seed(2)
        errors = []
        for by_size in (True, False):
            directions = self._random_signs(range(len(self._gradient)), generator, by_size=by_size)
            terms = [(g * d).flatten() for g, d in zip(self._gradient, directions, strict=True)]
            expected = math.fsum(dot(term, torch.ones_like(term), self._parameter_group) for term in terms)
            typical = math.sqrt(math.fsum(dot(term, term, self._parameter_group) for term in terms))
            errors.append(self._random_error(directions, expected, typical))
        return max(error or 0.0 for error in errors)

    def _random_error(self, directions: Sequence[Tensor], expected: float, typical: float) -> float | None:
        """Return how far the slope along directions is from g·v, relative to what that comes to in the mean square.

        `None` where the steps don't settle on another slope, or on a kink: one whose slope ahead and behind differ by
        more, however short the step.
        """
        found: dict[float, tuple[float, float]] = {}
        for step in RANDOM_STEPS:
            ahead, behind = (self._loss_at([way * step] * len(directions), directions) for way in (1, -1))
            rounding = ROUNDING * max(4 * abs(ahead), 4 * abs(behind), 1) / (2 * step)
            error = (ahead - behind) / (2 * step) - expected
            if not math.isfinite(error) or (rounding > MAX_MISSING * typical and abs(error) <= SURE * rounding):
                continue
            if abs(error) <= MAX_MISSING * typical:
                return abs(error) / typical
            found[step] = (error, (ahead + behind - 2 * self._loss) / step)
        if len(found) < 2:
            return None
        (error, turn), (other, turn_of_longer), *farther = (found[step] for step in sorted(found))
        settled = abs(error - other) <= abs(error) / 10 and all(abs(error - e) <= abs(error) / 4 for e, _ in farther)
        smooth = abs(turn) <= max(abs(turn_of_longer) / 2, abs(error) / 10)  # its turn is in proportion to the step
        return abs(error) / (typical or abs(error)) if settled and smooth else None

    def _error(self, signs: Sequence[float]) -> float | None:
        """Return the error along one direction at the first step that agrees, or where the steps settle on another.

        A step across a kink says nothing: of a ReLU network that rests on one, the gradient is one of two slopes.
        """
        expected = math.fsum(sign * square for sign, square in zip(signs, self._squares, strict=True)) / self._square
        found: dict[float, float] = {}
        for factor in STEPS:
            step = factor * self._step(RELATIVE_CHANGE)
            ahead, behind = (self._loss_at([way * step * sign for sign in signs]) for way in (1, -1))
            scale = 2 * step * self._square
            if not scale:
                continue
            rounding = ROUNDING * max(4 * abs(ahead), 4 * abs(behind), 1) / scale
            slope, turn = (ahead - behind) / scale, 2 * (ahead + behind - 2 * self._loss) / scale
            if not math.isfinite(slope) or (rounding > SETTLED and abs(slope - expected) <= SURE * rounding):
                continue
            if abs(slope - expected) <= MAX_SLOPE_ERROR + rounding:
                return min(abs(slope - expected), MAX_SLOPE_ERROR)
            if abs(turn) <= abs(slope - expected):  # else it differs that much between ahead and behind: a kink
                found[step] = slope
        return self._settled(found, expected)

    @staticmethod
    def _settled(found: Mapping[float, float], expected: float) -> float | None:
        """Return how far off a slope is that the two smallest steps agree on; `None` where they don't."""
        slopes = [found[step] for step in sorted(found)[:2]]
        if len(slopes) < 2 or abs(slopes[0] - slopes[1]) > SETTLED * max(*map(abs, slopes), SETTLED):
            return None
        return abs(sum(slopes) / 2 - expected)

    def _culprits(self) -> tuple[str, ...]:
        """Return the names of the tensors along which the slope is another one, alone; none if not one by one."""
        names = []
        for index in sorted(range(len(self._squares)), key=lambda index: -self._squares[index])[:16]:
            error = self._error([float(other == index) for other in range(len(self._squares))])
            if error is not None and error > MAX_SLOPE_ERROR * self._squares[index] / self._square:
                names.append(self._objective.names[index])
        return tuple(names)

    def _require_flat(self, indices: Sequence[int]) -> None:
        """Refuse a gradient of exactly zero where the loss has a slope."""
        generator = torch.Generator().manual_seed(1)
        for _ in range(DIRECTIONS):
            slope = self._slope_along_signs(indices, generator)
            if slope == 0:
                return
            if slope is not None:
                if len(indices) == len(self._gradient):
                    raise MeasurementError("gradient_zero")
                names = tuple(self._objective.names[index] for index in indices)
                raise MeasurementError("gradient_zero_in_part", parameters=names)

    def _random_signs(
        self, indices: Iterable[int], generator: torch.Generator, *, by_size: bool = True
    ) -> Sequence[Tensor]:
        """Return random signs in some tensors, times the size of each, or about equal ones."""
        directions = [torch.zeros((), dtype=g.dtype).expand(g.shape) for g in self._gradient]
        sizes = typical_sizes(self._objective)
        equal = [min(median(sizes), FARTHEST * size) for size in sizes]
        for index in indices:
            signs = 2.0 * torch.randint(2, self._gradient[index].shape, generator=generator) - 1
            directions[index] = ((sizes if by_size else equal)[index] * signs).to(self._gradient[index])
        return without_padding_rows(self._objective, directions)

    def _slope_along_signs(self, indices: Sequence[int], generator: torch.Generator) -> float | None:
        """Return the slope along random signs in some tensors, 0 if it has none, `None` if undecided."""
        directions = self._random_signs(indices, generator)
        slopes: list[float] = []
        for step in (RELATIVE_CHANGE, 8 * RELATIVE_CHANGE):
            ahead, behind = (self._loss_at([way * step] * len(directions), directions) for way in (1, -1))
            if ahead == behind:
                return 0.0
            odd, even = (ahead - behind) / 2, (ahead + behind) / 2 - self._loss
            # Where both ways rise, or both fall, units that were dead come to life.
            if not abs(odd) > max(100 * ROUNDING * max(abs(ahead), abs(behind)), 0 if slopes else abs(even)):
                return None
            slopes.append(odd / step)
        settled = abs(slopes[0] - slopes[1]) <= SETTLED * abs(slopes[1]) < math.inf
        return slopes[0] if settled else None

    def _loss_at(self, steps: Sequence[float], directions: Sequence[Tensor] | None = None) -> float:
        objective = self._objective
        with displaced(objective.parameters, directions or self._gradient, steps):
            return mean_loss(objective)
