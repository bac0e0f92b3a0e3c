# SPDX-License-Identifier: Apache-2.0
"""Symmetric matrices that are given by their products with vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .communicator import SINGLE_PROCESS, ProcessGroup
from .row_partition import RowPartition
from .vectors import Segments, quadratic_forms


if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

BatchProducts = tuple[Tensor, NDArray[np.float64], list[float]]
"""The result of `SymmetricOperator.matmat_per_batch`."""


class SymmetricOperator(ABC):
    """A symmetric n × n matrix A, given by products.

    Attributes:
        size: n.
        dtype: Dtype of the vectors it multiplies.
        device: Device of the vectors it multiplies.
        group: The processes that share the work on its products; all of them get the same ones.
    """

    size: int
    dtype: torch.dtype
    device: torch.device
    group: ProcessGroup = SINGLE_PROCESS

    @property
    def rows(self) -> RowPartition:
        """The local rows of the vectors: all n, unless they are partitioned over ranks. Shapes below are local."""
        return RowPartition.whole(self.size)

    @abstractmethod
    def matmat(self, vectors: Tensor) -> Tensor:
        """Return `A V` for the columns of V, of shape (n, k)."""

    def matvec(self, vector: Tensor) -> Tensor:
        """Return `A v`, of shape (n,)."""
        return self.matmat(vector[:, None])[:, 0]

    def matmat_per_batch(self, vectors: Tensor, segments: Segments) -> BatchProducts:
        """Return `A V`, and quadratic forms of each batch's A_b; A is their mean, weighted by items.

        Any other matrix counts as one batch.

        Args:
            vectors: V, of shape (n, k).
            segments: Slices of the rows.

        Returns:
            `A V`; `v_sᵀ(A_b v)_s` for each batch, column v and segment s, of shape (batches, k, segments); the number
            of items in each batch.
        """
        product = self.matmat(vectors)
        return product, quadratic_forms(vectors.T, product.T, segments, self.rows.group)[None], [1]

    def to_scipy(self) -> LinearOperator:
        """Return the same matrix for SciPy's solvers, on NumPy arrays."""
        from scipy.sparse.linalg import LinearOperator

        def matmat(vectors: NDArray[Any]) -> NDArray[Any]:
            columns = torch.from_numpy(np.ascontiguousarray(vectors)).to(device=self.device, dtype=self.dtype)
            product: NDArray[Any] = self.matmat(columns).cpu().numpy()
            return product

        def matvec(vector: NDArray[Any]) -> NDArray[Any]:
            return matmat(vector.reshape(-1, 1))[:, 0]

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        shape = (self.size, self.size)
        return LinearOperator(shape=shape, dtype=dtype, matvec=matvec, rmatvec=matvec, matmat=matmat, rmatmat=matmat)


class DenseOperator(SymmetricOperator):
    """A symmetric matrix in memory: for examples, and to try an estimator on a known spectrum.

    Args:
        matrix: The matrix, of shape (n, n).
    """

    def __init__(self, matrix: Tensor):
        self._matrix = matrix
        self.size = len(matrix)
        self.dtype = matrix.dtype
        self.device = matrix.device

    def matmat(self, vectors: Tensor) -> Tensor:
        """Return `A V` for the columns of V, of shape (n, k)."""
        return self._matrix @ vectors


class PreconditionedOperator(SymmetricOperator):
    """P^-½ A P^-½, which has the eigenvalues of P⁻¹A.

    Args:
        operator: A, of size n.
        diagonal: The diagonal of P, of shape (n,); an infinite entry makes a zero row and column.

    Raises:
        ValueError: If the diagonal has another size or an entry that is not positive.

    Example:
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
        """The local rows of the vectors: those of A."""
        return self._operator.rows

    def matmat(self, vectors: Tensor) -> Tensor:
        """Return `P^-½ A P^-½ V` for the columns of V, of shape (n, k)."""
        return self._operator.matmat(self._scale * vectors).mul_(self._scale)


class ColumnParallelOperator(SymmetricOperator):
    """A matrix that every rank has in whole; each rank multiplies its share of the columns.

    With fewer batches than ranks, this is how a block of vectors still shares the work.

    Args:
        operator: The matrix, of a single process on every rank.
        group: The processes that share the columns.
        on_products: Called with the number of products that all of them just made.

    Example:
        >>> ColumnParallelOperator(DenseOperator(torch.eye(2)), ProcessGroup()).matmat(torch.ones(2, 1)).T
        tensor([[1., 1.]])
    """

    def __init__(
        self, operator: SymmetricOperator, group: ProcessGroup, *, on_products: Callable[[int], object] | None = None
    ):
        self._operator, self.group = operator, group
        self._on_products = on_products
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device

    def matmat(self, vectors: Tensor) -> Tensor:
        """Return `A V` for the columns of V, of shape (n, k)."""
        products, local = torch.zeros_like(vectors.T), self._local_columns
        if len(products[local]):
            products[local] = self._operator.matmat(vectors[:, local]).T
        return self._reduce(products)

    def matmat_per_batch(self, vectors: Tensor, segments: Segments) -> BatchProducts:
        """Return `A V` and quadratic forms of each batch; see `SymmetricOperator`."""
        products, local = torch.zeros_like(vectors.T), self._local_columns
        has_columns = len(products[local]) > 0
        # A rank without a column multiplies the first one all the same, to learn about the batches.
        columns = local if has_columns else slice(1)
        product, local_forms, items = self._operator.matmat_per_batch(vectors[:, columns], segments)
        forms = torch.zeros(len(items), len(products), len(segments), dtype=torch.float64)
        if has_columns:
            products[local], forms[:, local] = product.T, torch.from_numpy(local_forms)
        return self._reduce(products), self.group.all_reduce_(forms).numpy(), items

    @property
    def _local_columns(self) -> slice:
        return slice(self.group.rank, None, self.group.world_size)

    def _reduce(self, products: Tensor) -> Tensor:
        if self._on_products is not None:
            self._on_products(len(products))
        return self.group.all_reduce_(products).T
