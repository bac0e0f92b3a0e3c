# SPDX-License-Identifier: Apache-2.0
"""The empirical Fisher matrix: the second moment of the examples' gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..linalg.vectors import dot
from .empirical_risk import EmpiricalRisk
from .gradient import batch_gradients
from .hessian import ObjectiveOperator


class EmpiricalFisherOperator(ObjectiveOperator):
    """`(1/N) Σ gᵢgᵢᵀ`: gᵢ the gradient of the loss of example i, summed over its items, and N the number of items.

    Positive semidefinite, from first derivatives alone, so it works under any attention kernel and on quantized
    models. In token tasks i is a sequence, whose loss is the sum over its labels, and N is the number of labels: for
    labels drawn from the model this is the Fisher matrix of the mean loss over labels, since the labels' gradients are
    uncorrelated. With the labels of the data it is not the Fisher matrix, and no approximation of the Hessian away
    from a good fit (Martens, arXiv 1412.1193, section 11; Kunstner et al. 2019, arXiv 1905.12558).

    A product, however many its columns, costs a forward and a backward pass for each example by itself.

    Args:
        objective: The loss, which must be able to be cut into examples.

    Raises:
        ValueError: If the batches can't be cut into examples.
        FloatingPointError: From a product that is not finite.

    Example:
        >>> class Two(EmpiricalRisk):  # losses x and 3x: gradients 1 and 3
        ...     parameters = [torch.ones(1, requires_grad=True)]
        ...     def losses(self):
        ...         yield from ((slope * self.parameters[0].sum(), 1) for slope in (1.0, 3.0))
        ...     def cut(self, size):
        ...         return self
        >>> EmpiricalFisherOperator(Two()).matvec(torch.ones(1))
        tensor([5.])
    """

    def __init__(
        self,
        objective: EmpiricalRisk,
    ):
        super().__init__(objective)
        self._examples = objective.cut(1)

    def _parts(self, vectors: Tensor) -> Iterator[tuple[Iterable[Sequence[Tensor]], float]]:
        for pieces, _, items in batch_gradients(self._examples):
            gradient = torch.cat([piece.flatten() for piece in pieces]).to(vectors.dtype)
            yield ([dot(gradient, vector) * piece for piece in pieces] for vector in vectors), items
