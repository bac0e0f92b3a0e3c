# SPDX-License-Identifier: Apache-2.0
"""The Hessian by central differences of gradients, for losses that can be differentiated only once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from ..linalg.operator import SymmetricOperator
from ..linalg.row_partition import RowPartition
from ..linalg.vectors import norm
from .displacement import displaced
from .empirical_risk import EmpiricalRisk
from .gradient import gradient_sum, norm_of
from .hessian import ObjectiveOperator


RELATIVE_STEP = {torch.float32: 5e-5, torch.float64: 6e-6}
"""Size of the step relative to the parameters. In float32 the best is 1.5e-3 along random signs (a third of the cube
root of the machine precision) but 1.5e-5 or less along the steepest eigenvectors, where higher derivatives are large
too, measured on a small pretrained BERT; this one is off by 2e-3 to 3e-3 along both. In float64 the cube root itself
does, and leaves room for losses that a model computes in float32."""


def usual_step(parameters: Sequence[Tensor]) -> float:
    """Return the default step for parameters, the least precise of which decides."""
    return max(RELATIVE_STEP[parameter.dtype] for parameter in parameters)


class CentralDifferenceHessian(ObjectiveOperator):
    """The Hessian of a mean loss, by `Hv ≈ (∇L(θ + εv) − ∇L(θ − εv)) / 2ε`.

    Needs no second derivative: works under any attention kernel, and for the trainable weights of a quantized model.
    A product costs two gradients, none of it shared between columns.

    The step is a share of the parameters' own size, `ε‖v‖ = relative_step · ‖θ‖`. The truncation error grows as ε²,
    and that from rounding in the gradients as 1/ε (Nocedal & Wright, Numerical Optimization, section 8.1).

    Not to be trusted with ReLU and other kinks: each unit that switches within the step adds a jump of the gradient
    over 2ε, which the exact Hessian does not have. On a pretrained MobileNetV2 the jumps are 50 times the product at
    the step of float32, grow as it shrinks, and go only at 1e-9 of the parameters, which takes float64. Compare with
    an exact product where there is one.

    The weights are moved in place, and come back bit for bit from a saved copy, also when a gradient raises.

    Args:
        objective: The loss, in parts.
        relative_step: Size of the step relative to the parameters; by default `RELATIVE_STEP` of their dtype.

    Raises:
        ValueError: If a parameter is of less than float32: the step would round away. Hold
            `hf_optimizability.model_state.measuring.full_precision` around both the construction and the products.
        FloatingPointError: From a product that is not finite.

    Example:
        >>> class Cubic(EmpiricalRisk):
        ...     parameters = [torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)]
        ...     def losses(self):
        ...         yield (self.parameters[0] ** 3).sum(), 1
        >>> CentralDifferenceHessian(Cubic()).matvec(torch.ones(2, dtype=torch.float64)).round(decimals=6)
        tensor([ 6., 12.], dtype=torch.float64)
    """

    def __init__(
        self,
        objective: EmpiricalRisk,
        *,
        relative_step: float | None = None,
    ):
        super().__init__(objective)
        self._rows = objective.rows
        self.size = self._rows.size
        low = next((p.dtype for p in objective.parameters if torch.finfo(p.dtype).bits < 32), None)
        if low is not None:
            raise ValueError(
                f"A parameter is of {low}, in which the step of a central difference rounds away. "
                "Hold `full_precision(model)` around the measurement."
            )
        self._objective = objective
        self._relative_step = usual_step(objective.parameters) if relative_step is None else relative_step

    @property
    def rows(self) -> RowPartition:
        """Which rows of the vectors are here."""
        return self._rows

    def matmat_per_batch(
        self, vectors: Tensor, segments: Sequence[Sequence[slice]]
    ) -> tuple[Tensor, np.ndarray, list[float]]:
        """Return `A V`; a difference is of the whole gradient, so that there is one batch for all ranks."""
        return SymmetricOperator.matmat_per_batch(self, vectors, segments)

    def _parts(self, vectors: Tensor) -> Iterator[tuple[Iterable[Sequence[Tensor]], float]]:
        products = (self._product(vector) for vector in vectors)
        first, items = next(products)
        yield chain([first], (product for product, _ in products)), items

    def _product(self, vector: Tensor) -> tuple[list[Tensor], float]:
        """Return the product, summed over the items, and their number."""
        parameters = self._objective.parameters
        length = norm(vector, self.rows.group) or 1.0
        scale = float(norm_of([parameter.detach() for parameter in parameters], self.rows.group)) or 1.0
        step = self._relative_step * scale / length
        direction = self._split(vector, parameters)
        with displaced(parameters, direction, [step] * len(parameters)):
            ahead, _, items = gradient_sum(self._objective)
        with displaced(parameters, direction, [-step] * len(parameters)):
            behind, _, _ = gradient_sum(self._objective)
        return [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)], items
