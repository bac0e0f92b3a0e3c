# SPDX-License-Identifier: Apache-2.0
"""How far one step may go: the limit of stability, the model along the gradient, where the loss first rises."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..curvature.displacement import restored
from ..curvature.empirical_risk import EmpiricalRisk
from ..linalg.communicator import SINGLE_PROCESS, ProcessGroup
from ..linalg.vectors import dot


_ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Relative change of a loss that may be rounding: losses are averaged in float32 at worst."""


def stability_limit(
    learning_rate: float, *, momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False
) -> float:
    """Return the largest curvature λ at which gradient descent with momentum does not diverge on ½λx².

    2/η without momentum, (2 + 2β)/η for the heavy ball, (2 + 2β)/((1 + 2β)η) for Nesterov (Cohen et al., arXiv
    2103.00065). A moving average m ← βm + (1 − β)g has dampening β: (2 + 2β)/((1 − β)η), 38/η for Adam's
    β₁ = 0.9 (arXiv 2207.14484).

    Args:
        learning_rate: η.
        momentum: β.
        dampening: The gradient enters the momentum buffer with weight `1 - dampening`.
        nesterov: Whether the step looks ahead.

    Example:
        >>> stability_limit(0.5), stability_limit(0.5, momentum=0.5), stability_limit(0.5, momentum=0.5, nesterov=True)
        (4.0, 6.0, 3.0)
        >>> stability_limit(0.0)
        inf
    """
    if learning_rate == 0:
        return math.inf
    weight = 1 + 2 * momentum if nesterov else 1 - dampening
    return (2 + 2 * momentum) / (weight * learning_rate)


@dataclass(frozen=True)
class QuadraticModel:
    """The loss along −g to second order: L(θ − ηg) ≈ L(θ) − η‖g‖² + ½η² gᵀHg.

    Attributes:
        gradient_squared: ‖g‖².
        curvature: gᵀHg.
        best_step: The η that minimizes the model, ‖g‖²/gᵀHg; `None` where gᵀHg ≤ 0, so that it has no minimum. The
            model is back at L(θ) at twice this step.
        predicted_decrease: What the best step gains, ½‖g‖⁴/gᵀHg; `None` where there is none.
    """

    gradient_squared: float
    curvature: float
    best_step: float | None
    predicted_decrease: float | None

    @classmethod
    def of(cls, gradient_squared: float, curvature: float) -> QuadraticModel:
        """Return the model from ‖g‖² and gᵀHg."""
        if curvature <= 0:
            return cls(gradient_squared, curvature, None, None)
        best_step = gradient_squared / curvature
        return cls(gradient_squared, curvature, best_step, best_step * gradient_squared / 2)


def quadratic_model(gradient: Tensor, product: Tensor, group: ProcessGroup = SINGLE_PROCESS) -> QuadraticModel:
    """Return the quadratic model of the loss along −g (Nocedal & Wright, Numerical Optimization, chapter 4.1).

    Args:
        gradient: g, of shape (n,).
        product: Hg, of shape (n,).
        group: The processes that hold the n rows between them.

    Example:
        >>> gradient, product = torch.tensor([1.0, 1.0]), torch.tensor([1.0, 3.0])  # H = diag(1, 3)
        >>> model = quadratic_model(gradient, product)
        >>> model.curvature, model.best_step, model.predicted_decrease
        (4.0, 0.5, 0.5)
    """
    return QuadraticModel.of(dot(gradient, gradient, group), dot(gradient, product, group))


@dataclass(frozen=True)
class CriticalLearningRate:
    """The learning rate η_c at which the loss first rises above its present value, along one direction.

    Attributes:
        value: Geometric middle of the bracket, or its one end that is known.
        low: The loss is below its present value here; 0 if it was seen below it nowhere.
        high: The loss is above its present value here; infinite if it was seen above it nowhere.
        forward_passes: Evaluations of the loss.
        converged: Whether both ends are known and close enough.
    """

    value: float
    low: float
    high: float
    forward_passes: int
    converged: bool

    @property
    def sharpness(self) -> float:
        """2/η_c, the critical sharpness: on a quadratic, uᵀHu/gᵀu for the direction u."""
        return 2 / self.value


def critical_learning_rate(
    loss: Callable[[float], float], *, start: float, tolerance: float = 0.1, max_forward_passes: int = 20
) -> CriticalLearningRate:
    """Find the learning rate η_c at which the loss first rises above its present value, by evaluations alone.

    Doubles or halves η from `start` until the loss passes its present value, then halves the bracket on a log scale
    (Kalra et al., arXiv 2601.16979). From a start within a factor 4 of η_c that takes 6 to 8 evaluations. On a
    quadratic L(θ − ηu) = L − η gᵀu + ½η² uᵀHu, so that η_c = 2 gᵀu/uᵀHu. A loss that rises and falls again within a
    factor of 2 may be stepped over. A change of the loss that may be rounding counts as none.

    Args:
        loss: The loss at θ − ηu, as a function of η; not finite counts as risen. See `loss_along`.
        start: The first η to try: the learning rate in use, or the last η_c found.
        tolerance: Ratio of the bracket's ends, less 1, to stop at.
        max_forward_passes: Most evaluations, the one at η = 0 included.

    Raises:
        ValueError: If `start` is not positive.
        FloatingPointError: If the present loss is not finite.

    Example:
        >>> found = critical_learning_rate(lambda step: (step - 1) ** 2, start=0.3)
        >>> found.low < 2 < found.high, found.forward_passes, found.converged
        (True, 8, True)
    """
    if not start > 0:
        raise ValueError(f"`start` is {start}; it must be a positive learning rate.")
    present = loss(0.0)
    if not math.isfinite(present):
        raise FloatingPointError("The present loss is not finite.")
    margin = _ROUNDING * abs(present)
    low, high, fell, passes, step = 0.0, math.inf, False, 1, start
    while passes < max_forward_passes and high > (1 + tolerance) * low:
        change = loss(step) - present
        passes += 1
        if change <= margin:
            low, fell = step, fell or change < -margin
        else:
            high = step
        step = 2 * low if high == math.inf else high / 2 if low == 0 else math.sqrt(low * high)
    if not fell:  # the lower end may be no more than too short a step for a difference to show
        low = 0.0
    known = low > 0 and high < math.inf
    value = math.sqrt(low * high) if known else low if low > 0 else high
    return CriticalLearningRate(value, low, high, passes, known and high <= (1 + tolerance) * low)


@contextmanager
def loss_along(objective: EmpiricalRisk, *updates: Tensor) -> Iterator[Callable[..., float]]:
    """Yield the mean loss at θ − ηu as a function of η; restore the weights bit for bit at the end.

    The weights are moved in place, without gradients, and come back from a saved copy also where the loss raises.
    Memory: a copy of the parameters.

    Args:
        objective: The loss, in parts.
        updates: u, of shape (n,), in the order of the objective's parameters. With several of them the loss is that at
            θ − Σ ηᵢuᵢ, as a function of as many ηᵢ.

    Example:
        >>> class Parabola(EmpiricalRisk):
        ...     parameters = [torch.tensor([3.0], requires_grad=True)]
        ...     def losses(self):
        ...         yield (self.parameters[0] ** 2).sum(), 1
        >>> with loss_along(Parabola(), torch.tensor([1.0])) as loss:
        ...     loss(0.0), loss(2.0)
        (9.0, 1.0)
    """
    parameters = objective.parameters
    sizes = [parameter.numel() for parameter in parameters]
    pieces = list(zip(*(update.split(sizes) for update in updates), strict=True))
    with restored(parameters) as saved:

        @torch.no_grad()
        def loss(*steps: float) -> float:
            for parameter, origin, along in zip(parameters, saved, pieces, strict=True):
                moved = origin
                for step, piece in zip(steps, along, strict=True):
                    moved = moved - step * piece.reshape(origin.shape).to(origin.device)
                parameter.data.copy_(moved)
            total, items = 0.0, 0.0
            for part, count in objective.losses():
                total += float(part)
                items += count
            totals, counts = zip(*objective.group.all_gather_interleaved([(total, items)]), strict=True)
            return sum(totals) / sum(counts)

        yield loss
