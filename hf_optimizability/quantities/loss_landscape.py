# SPDX-License-Identifier: Apache-2.0
"""Slices through the loss landscape: along one direction, and over the plane of two, each with its quadratic model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..curvature.empirical_risk import EmpiricalRisk
from ..linalg.estimate import Estimate
from ..linalg.vectors import dot, norm
from .step_size import loss_along


LINE_POINTS = 21
"""Losses along a line, besides that of the next step."""

PLANE_POINTS = 11
"""Losses along each axis of a plane."""

_FLATTEST = 1e-3
"""The least curvature, as a share of the largest, that the unit of an axis is chosen by: at 0 it would be infinite."""


@dataclass(frozen=True)
class Axis:
    """A direction d through the weights θ, along which they are moved to θ − s·d.

    Attributes:
        at: The values of s, ascending, with 0 among them.
        length: ‖d‖, how far the weights move for each unit of s.
        slope: −gᵀd, the derivative of the loss by s at 0.
        curvature: dᵀHd, its second derivative.
    """

    at: tuple[float, ...]
    length: float
    slope: float
    curvature: float

    def quadratic_change(self, s: float) -> float:
        """Return the change of the loss at s that the quadratic model predicts.

        Example:
            >>> Axis(at=(0.0, 1.0), length=1.0, slope=-4.0, curvature=2.0).quadratic_change(1.0)
            -3.0
        """
        return self.slope * s + self.curvature * s * s / 2

    @property
    def quadratic_return(self) -> float | None:
        """The s at which the quadratic model returns to the present loss; `None` if it only falls or only rises."""
        return -2 * self.slope / self.curvature if self.slope < 0 < self.curvature else None


@dataclass(frozen=True)
class LossLine:
    """The loss along one direction.

    Attributes:
        axis: The direction.
        losses: The mean loss at each of `axis.at`; infinite where it is not finite.
    """

    axis: Axis
    losses: tuple[float, ...]


@dataclass(frozen=True)
class LossPlane:
    """The loss over the plane of two eigenvectors.

    Attributes:
        axes: Along the eigenvector of the largest eigenvalue, and along the next. Positive s is downhill. One unit is
            `√(2|L|/|λ|)` long: where the curvature alone changes the loss by its present value L.
        eigenvalues: Of both, with their residuals. The model along an axis takes the curvature as it is, whether the
            eigenvector has converged or not.
        losses: The mean loss, row by row: `losses[i][j]` where s is `axes[0].at[j]` and `axes[1].at[i]`.
    """

    axes: tuple[Axis, Axis]
    eigenvalues: tuple[Estimate, Estimate]
    losses: tuple[tuple[float, ...], ...]

    @property
    def lines(self) -> tuple[LossLine, LossLine]:
        """The loss along each axis alone."""
        first, second = self.axes
        middle_row = self.losses[len(second.at) // 2]
        middle_column = tuple(row[len(first.at) // 2] for row in self.losses)
        return LossLine(first, middle_row), LossLine(second, middle_column)


@dataclass(frozen=True)
class Landscape:
    """Slices through the loss at one point of training.

    Attributes:
        update: Along the optimizer's next update, where s is the learning rate of the step; `None` without an
            optimizer whose state can be read.
        eigenvectors: Over the plane of the top two eigenvectors; `None` where fewer than two directions are curved.
    """

    update: LossLine | None
    eigenvectors: LossPlane | None


def loss_line(
    objective: EmpiricalRisk,
    update: Tensor,
    *,
    gradient: Tensor,
    curvature: float,
    reach: float,
    step: float,
) -> LossLine:
    """Evaluate the loss along an update, from half of `reach` before the weights to one and a half beyond.

    Args:
        objective: The loss, in parts.
        update: u, of shape (n,); the weights go to θ − s·u.
        gradient: g, of shape (n,).
        curvature: uᵀHu.
        reach: A step at which the loss has come back, or the like.
        step: The next step, which gets a point of its own if it is in between.

    Example:
        >>> import torch
        >>> class Parabola(EmpiricalRisk):
        ...     parameters = [torch.tensor([3.0], requires_grad=True)]
        ...     def losses(self):
        ...         yield (self.parameters[0] ** 2).sum(), 1
        >>> g = torch.tensor([6.0])
        >>> line = loss_line(Parabola(), g, gradient=g, curvature=72.0, reach=1.0, step=0.0)
        >>> line.axis.at[0], line.axis.at[10], line.axis.at[-1]
        (-0.5, 0.5, 1.5)
        >>> line.losses[10], 9 + line.axis.quadratic_change(0.5)
        (0.0, 0.0)
    """
    places = {reach * (index / (LINE_POINTS // 2) - 0.5) for index in range(LINE_POINTS)}
    at = tuple(sorted(places | ({step} if 0 < step < max(places) else set())))
    with loss_along(objective, update) as loss:
        losses = tuple(_known(loss(s)) for s in at)
    axis = Axis(
        at,
        length=norm(update, objective.rows.group),
        slope=-dot(gradient, update, objective.rows.group),
        curvature=curvature,
    )
    return LossLine(axis, losses)


def loss_plane(
    objective: EmpiricalRisk,
    eigenvectors: Tensor,
    eigenvalues: Sequence[Estimate],
    *,
    gradient: Tensor,
    present: float,
) -> LossPlane | None:
    """Evaluate the loss over the plane of the first two eigenvectors, as far as one unit of `LossPlane` each way.

    Args:
        objective: The loss, in parts.
        eigenvectors: Of unit length, as rows, of shape (k, n).
        eigenvalues: Of each, the largest first.
        gradient: g, of shape (n,).
        present: The present loss.

    Returns:
        The plane; `None` where there are fewer than two eigenvectors, or the largest eigenvalue is 0.
    """
    if len(eigenvalues) < 2 or eigenvalues[0].value == 0:
        return None
    at = tuple(2 * index / (PLANE_POINTS - 1) - 1 for index in range(PLANE_POINTS))
    axes, updates = [], []
    for vector, eigenvalue in zip(eigenvectors[:2], eigenvalues[:2], strict=True):
        curvature = max(abs(eigenvalue.value), _FLATTEST * abs(eigenvalues[0].value))
        unit = math.sqrt(2 * (abs(present) or 1.0) / curvature)
        slope = dot(gradient, vector, objective.rows.group) * unit
        axes.append(Axis(at, length=unit, slope=-abs(slope), curvature=eigenvalue.value * unit**2))
        updates.append(math.copysign(unit, slope) * vector)
    with loss_along(objective, *updates) as loss:
        losses = tuple(tuple(_known(loss(first, second)) for first in at) for second in at)
    return LossPlane((axes[0], axes[1]), (eigenvalues[0], eigenvalues[1]), losses)


def _known(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
