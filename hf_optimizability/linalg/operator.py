# SPDX-License-Identifier: Apache-2.0
"""Symmetric matrices that are known only by their products with vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .communicator import SINGLE_PROCESS, ProcessGroup
from .row_partition import RowPartition
from .vectors import segment_dots


if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


class SymmetricOperator(ABC):
    """A symmetric n × n matrix A, given by products.

    Attributes:
        size: n.
        dtype: Dtype of the vectors it multiplies.
        device: Device of the vectors it multiplies.
        group: The processes that share the work on its products, and get the same ones.
    """

    size: int
    dtype: torch.dtype
    device: torch.device
    group: ProcessGroup = SINGLE_PROCESS

    @property
    def rows(self) -> RowPartition:
        """Which rows of the vectors are here: all n, unless they lie over ranks. Shapes below are of those."""
        return RowPartition.whole(self.size)

    @abstractmethod
    def matmat(self, vectors: Tensor) -> Tensor:
        """`A V` for the columns of V, of shape (n, k)."""

    def matvec(self, vector: Tensor) -> Tensor:
        """`A v`, of shape (n,)."""
        return self.matmat(vector[:, None])[:, 0]

    def matmat_per_batch(
        self, vectors: Tensor, segments: Sequence[Sequence[slice]]
    ) -> tuple[Tensor, np.ndarray, list[int]]:
        """`A V`, and what each part p tells: A is the mean of the A_p, weighted by items.

        A matrix that is not made of parts is one part.

        Args:
            vectors: V, of shape (n, k).
            segments: Slices of the rows.

        Returns:
            `A V`; `v_sᵀ(A_p v)_s` for each part, column v and segment s, of shape (parts, k, segments); the items of
            each part.
        """
        product = self.matmat(vectors)
        return product, _forms(vectors.T, product.T, segments, self.rows.group)[None], [1]

    def to_scipy(self) -> LinearOperator:
        """The same matrix for SciPy's solvers, on NumPy arrays."""
        from scipy.sparse.linalg import LinearOperator

        def matmat(vectors: np.ndarray) -> np.ndarray:
            columns = torch.from_numpy(np.ascontiguousarray(vectors)).to(device=self.device, dtype=self.dtype)
            return self.matmat(columns).cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(
            shape=(self.size, self.size),
            dtype=dtype,
            matvec=lambda vector: matmat(vector.reshape(-1, 1))[:, 0],
            rmatvec=lambda vector: matmat(vector.reshape(-1, 1))[:, 0],
            matmat=matmat,
            rmatmat=matmat,
        )


class DenseOperator(SymmetricOperator):
    """A symmetric matrix held in memory: for examples, and to try an estimator on a known spectrum.

    Args:
        matrix: The matrix, of shape (n, n).
    """

    def __init__(self, matrix: Tensor):
        self._matrix = matrix
        self.size = len(matrix)
        self.dtype = matrix.dtype
        self.device = matrix.device

    def matmat(self, vectors: Tensor) -> Tensor:
        """`A V` for the columns of V, of shape (n, k)."""
        return self._matrix @ vectors


class SharedColumns(SymmetricOperator):
    """A matrix that every rank has in whole; of its products each rank makes those with its share of the columns.

    Where there are fewer parts than ranks to share them, this is how vectors in lockstep still share the work.

    Args:
        operator: The matrix, by itself on every rank.
        group: The processes that share the columns.
        on_products: Called with the number of products that all of them just made.

    Example:
        >>> from hf_optimizability.linalg.communicator import ProcessGroup
        >>> SharedColumns(DenseOperator(torch.eye(2)), ProcessGroup()).matmat(torch.ones(2, 1)).T
        tensor([[1., 1.]])
    """

    def __init__(
        self, operator: SymmetricOperator, group: ProcessGroup, *, on_products: Callable[[int], object] | None = None
    ):
        self._operator, self.group = operator, group
        self._on_products = on_products
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device

    def matmat(self, vectors: Tensor) -> Tensor:
        """`A V` for the columns of V, of shape (n, k)."""
        rows, mine = torch.zeros_like(vectors.T), slice(self.group.rank, None, self.group.world_size)
        if len(rows[mine]):
            rows[mine] = self._operator.matmat(vectors[:, mine]).T
        return self._summed(rows)

    def matmat_per_batch(
        self, vectors: Tensor, segments: Sequence[Sequence[slice]]
    ) -> tuple[Tensor, np.ndarray, list[int]]:
        """`A V`, and what each part tells; see `SymmetricOperator`."""
        rows, mine = torch.zeros_like(vectors.T), slice(self.group.rank, None, self.group.world_size)
        # A rank without a column multiplies one all the same, and so knows the parts.
        own = mine if len(rows[mine]) else slice(1)
        product, found, items = self._operator.matmat_per_batch(vectors[:, own], segments)
        forms = torch.zeros(len(items), len(rows), len(segments), dtype=torch.float64)
        if own is mine:
            rows[mine], forms[:, mine] = product.T, torch.from_numpy(found)
        return self._summed(rows), self.group.all_reduce_(forms).numpy(), items

    def _summed(self, rows: Tensor) -> Tensor:
        if self._on_products is not None:
            self._on_products(len(rows))
        return self.group.all_reduce_(rows).T


def _forms(vectors: Tensor, products: Tensor, segments: Sequence[Sequence[slice]], group: ProcessGroup) -> np.ndarray:
    """`v_sᵀ(Av)_s` for rows v and their products, of shape (k, segments)."""
    forms = [segment_dots(v, row, segments) for v, row in zip(vectors, products, strict=True)]
    return group.all_reduce_(torch.tensor(forms, dtype=torch.float64)).numpy()
