# SPDX-License-Identifier: Apache-2.0
"""The part of a matrix that a known subspace accounts for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .communicator import SINGLE_PROCESS, ProcessGroup
from .vectors import Segments, gram_chunk, gram_matrices, symmetrize


@dataclass(frozen=True)
class Deflation:
    """The part of A that a subspace accounts for: A − PAP, where P = I − QᵀQ removes the span of the rows of Q.

    That part is exact; only PAP needs probes, whose variance is smaller by all that Q captures of A.

    Attributes:
        vectors: Q: orthonormal rows, of shape (k, n). They must not depend on the probes: a Krylov basis grown from a
            probe contains it.
        products: The rows A q, of shape (k, n).
        group: The processes that hold the n columns between them.
    """

    vectors: Tensor
    products: Tensor
    group: ProcessGroup = SINGLE_PROCESS

    def reduce(self, probes: Tensor, products: Tensor) -> Tensor:
        """Return `PAPv` for rows v from their products Av, which are overwritten."""
        products.addmm_(self.group.all_reduce_(probes @ self.vectors.T), self.products, alpha=-1)
        return products.addmm_(self.group.all_reduce_(products @ self.vectors.T), self.vectors, alpha=-1)

    def extend(self, vectors: Tensor, products: Tensor) -> Deflation:
        """Return a larger subspace; the new rows must be orthonormal, and orthogonal to the present ones."""
        return Deflation(torch.cat([self.vectors, vectors]), torch.cat([self.products, products]), self.group)

    def traces(self, segments: Segments) -> tuple[NDArray[np.float64], float]:
        """Return the trace of A − PAP by segment, and `‖A − PAP‖_F²`, which is `‖A‖_F² − ‖PAP‖_F²`.

        The diagonal is `2 Σ q ⊙ Aq − Σ h_ij q_i ⊙ q_j` with H = Q A Qᵀ.
        """
        size, both = len(self.vectors), [self.vectors, self.products]
        gram = gram_matrices(both, both, segments, self.group)
        inner = symmetrize(gram[:, :size, size:].sum(0))
        traces = 2 * np.trace(gram[:, :size, size:], axis1=1, axis2=2) - np.tensordot(gram[:, :size, :size], inner)
        return traces, float(2 * np.trace(gram[:, size:, size:].sum(0)) - (inner**2).sum())

    def diagonal(self) -> Tensor:
        """Return the diagonal of A − PAP, of shape (n,)."""
        gram = gram_matrices([self.vectors], [self.products], group=self.group).sum(0)
        inner = torch.from_numpy(symmetrize(gram)).to(self.vectors)
        diagonal = torch.empty_like(self.vectors[0])
        chunk = gram_chunk(diagonal)
        chunks = (matrix.split(chunk, dim=-1) for matrix in (self.vectors, self.products))
        for piece, vectors, products in zip(diagonal.split(chunk), *chunks, strict=True):
            piece.copy_(((2 * products - inner @ vectors) * vectors).sum(0))
        return diagonal
