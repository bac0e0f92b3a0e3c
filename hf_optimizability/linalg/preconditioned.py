# SPDX-License-Identifier: Apache-2.0
"""A symmetric matrix between two diagonal ones."""

from __future__ import annotations

from torch import Tensor

from .operator import SymmetricOperator
from .row_partition import RowPartition


class PreconditionedOperator(SymmetricOperator):
    """P^-½ A P^-½, which has the eigenvalues of P⁻¹A.

    Args:
        operator: A, of size n.
        diagonal: The diagonal of P, of shape (n,); an infinite entry makes a zero row and column.

    Raises:
        ValueError: If the diagonal has another size or an entry that is not positive.

    Example:
        >>> import torch
        >>> from hf_optimizability.linalg.operator import DenseOperator
        >>> operator = PreconditionedOperator(DenseOperator(torch.ones(2, 2)), torch.tensor([1.0, 4.0]))
        >>> operator.matmat(torch.eye(2))
        tensor([[1.0000, 0.5000],
                [0.5000, 0.2500]])
    """

    def __init__(self, operator: SymmetricOperator, diagonal: Tensor):
        if diagonal.shape != (len(operator.rows),):
            raise ValueError(f"`diagonal` has shape {tuple(diagonal.shape)}, the operator size {operator.size}.")
        if not (diagonal > 0).all():
            raise ValueError("`diagonal` has an entry that is not positive.")
        self._operator = operator
        self._scale = diagonal.to(device=operator.device, dtype=operator.dtype).rsqrt()[:, None]
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device
        self.group = operator.group

    @property
    def rows(self) -> RowPartition:
        """As those of A."""
        return self._operator.rows

    def matmat(self, vectors: Tensor) -> Tensor:
        """`P^-½ A P^-½ V` for the columns of V, of shape (n, k)."""
        return self._operator.matmat(self._scale * vectors).mul_(self._scale)
