# SPDX-License-Identifier: Apache-2.0
"""Symmetric matrices that are known by their products with vectors only."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..linalg.communicator import ProcessGroup
from ..linalg.operator import SymmetricOperator
from ..linalg.vectors import quadratic_forms
from ..model_state.write_counter import write_count
from .empirical_risk import EmpiricalRisk
from .hessian_vector_product import first_backward, second_backward


if TYPE_CHECKING:
    pass


class ObjectiveOperator(SymmetricOperator):
    """A matrix over all parameters laid end to end, that is a mean over an objective's items, had part by part.

    Where several processes share the work, each has the parts of its own objective, and a product is summed over the
    ranks once, however many its columns.

    Args:
        objective: What depends on the parameters.

    Raises:
        FloatingPointError: From a product that is not finite.
    """

    def __init__(
        self,
        objective: EmpiricalRisk,
    ):
        parameters = objective.parameters
        self.group = objective.group
        self._counter = objective.hvp_counter
        self._items: float | None = None  # of all ranks, once a product has shown them
        self._sizes = [parameter.numel() for parameter in parameters]
        self.size = sum(self._sizes)
        self.device = parameters[0].device
        # Products of half-precision parameters are summed in float32.
        double = any(parameter.dtype == torch.float64 for parameter in parameters)
        self.dtype = torch.float64 if double else torch.float32

    @abstractmethod
    def _parts(self, vectors: Tensor) -> Iterator[tuple[Iterable[Sequence[Tensor]], float]]:
        """Yield each part's products with the rows of `vectors`, shaped like the parameters, and its items."""

    def matmat(self, vectors: Tensor) -> Tensor:
        """Return `A V` for the columns of V, of shape (n, k)."""
        total: Tensor | None = None
        items = 0.0
        for products, count in self._parts(vectors.T):
            total = self._add(products, total, number=vectors.shape[1])
            items += count
        return self._mean(self._zeros(vectors.shape[1]) if total is None else total, items)

    def matmat_per_batch(
        self, vectors: Tensor, segments: Sequence[Sequence[slice]]
    ) -> tuple[Tensor, np.ndarray, list[float]]:
        """Return `A V` and each batch's forms; see `SymmetricOperator`. Several batches take memory for one more."""
        total: Tensor | None = None
        forms, items = [], []
        for products, count in self._parts(vectors.T):
            part = self._add(products, None, number=vectors.shape[1])
            forms.append(quadratic_forms(vectors.T, part, segments, self.rows.group) / count)
            items.append(count)
            total = part if total is None else total.add_(part)
            del part  # before the next one is made
        total = self._zeros(vectors.shape[1]) if total is None else total
        product = self._mean(total, sum(items))
        return product, np.array(self.group.all_gather_interleaved(forms)), self.group.all_gather_interleaved(items)

    def _mean(self, total: Tensor, items: float) -> Tensor:
        """Return `A V` from the sum over this rank's items."""
        if self._items is None:
            self._items = sum(self.group.all_gather_interleaved([items]))
        self.group.all_reduce_(total).div_(self._items)
        _require_finite(total, self.rows.group)
        self._count(len(total))
        return total.T

    def _add(self, products: Iterable[Sequence[Tensor]], total: Tensor | None, *, number: int) -> Tensor:
        """Add products, shaped like the parameters, to the rows of `total`; allocate it at the first.

        It is made when the first product is there: what the graph took before has been given back by then.
        """
        made = total is None
        for index, product in enumerate(products):
            if total is None:
                total = torch.empty(number, len(self.rows), dtype=self.dtype, device=self.device)
            for place, piece in zip(total[index].split(self._sizes), product, strict=True):
                there = piece.detach().reshape(-1)
                place.copy_(there) if made else place.add_(there.to(place))
        assert total is not None
        return total

    def _zeros(self, number: int) -> Tensor:
        return torch.zeros(number, len(self.rows), dtype=self.dtype, device=self.device)

    def _count(self, products: int) -> None:
        if self._counter is not None:
            self._counter.add(products)

    def _split(self, vector: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Cut a long vector into pieces of the parameters' shapes, dtypes and devices."""
        pieces = zip(vector.split(self._sizes), parameters, strict=True)
        # Contiguous, though the column of a matrix is not: some backward passes refuse other strides, or misread them.
        shaped = [piece.contiguous().view(parameter.shape).to(parameter) for piece, parameter in pieces]
        # What may be pairs of real and imaginary parts begins at an even place, as `view_as_complex` wants it.
        return [
            piece.clone() if piece.shape[-1:] == (2,) and piece.storage_offset() % 2 else piece for piece in shaped
        ]


class HessianOperator(ObjectiveOperator):
    """The Hessian of a mean loss, over all its parameters laid end to end, by double backward.

    Where the loss comes in one part, the graph of its gradient is kept from the second product on, for as long as the
    operator: each product then costs two gradients.

    Args:
        objective: The loss, in parts.

    Raises:
        FloatingPointError: From a product that is not finite.

    Example:
        >>> class Quadratic(EmpiricalRisk):
        ...     parameters = [torch.ones(2, requires_grad=True)]
        ...     def losses(self):
        ...         yield (self.parameters[0] * torch.tensor([3.0, 1.0]) * self.parameters[0]).sum(), 1
        >>> HessianOperator(Quadratic()).matvec(torch.tensor([1.0, 1.0]))
        tensor([6., 2.])
    """

    def __init__(
        self,
        objective: EmpiricalRisk,
    ):
        super().__init__(objective)
        self._objective = objective
        self._one_part = False  # until the first product has shown it
        self._kept: _Kept | None = None

    def _parts(self, vectors: Tensor) -> Iterator[tuple[Iterable[Sequence[Tensor]], float]]:
        """Yield the products of each part; all vectors share its forward and first backward pass."""
        parameters = self._objective.parameters
        pieces = [self._split(vector, parameters) for vector in vectors]
        point = [(id(parameter), write_count(parameter)) for parameter in parameters]
        if self._kept is not None and self._kept.point == point:
            yield second_backward(self._kept.gradients, parameters, pieces, keep_graph=True), self._kept.items
            return
        self._kept, number = None, 0
        for loss, items in self._losses():
            gradients = first_backward(loss, parameters)
            yield second_backward(gradients, parameters, pieces, keep_graph=self._one_part), items
            if self._one_part:
                self._kept = _Kept(point, gradients, items)
            number += 1
        self._one_part = number == 1

    def _losses(self) -> Iterable[tuple[Tensor, float]]:
        """Yield what is differentiated twice, as `EmpiricalRisk.losses` does."""
        return self._objective.losses()


class _Kept(NamedTuple):
    """The gradient of the only part, with its graph, at the point where it was taken."""

    point: list[tuple[int, int]]
    gradients: Sequence[Tensor]
    items: float


def _require_finite(products: Tensor, group: ProcessGroup) -> None:
    # Cheap test first: unless it overflows, the sum is finite if and only if all entries are.
    if math.isfinite(group.all_reduce_(products.sum())):
        return
    if group.all_reduce_((~torch.isfinite(products)).sum()):
        raise FloatingPointError("A product with the curvature matrix is not finite.")
