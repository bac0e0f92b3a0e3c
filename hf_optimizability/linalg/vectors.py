# SPDX-License-Identifier: Apache-2.0
"""What a vector is: one long tensor. Flattening, splitting, dot products and Gram matrices.

A block of vectors is a matrix with a vector in each row. Sums over entries are accumulated in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .communicator import SINGLE_PROCESS, ProcessGroup


Segments = Sequence[Sequence[slice]]
"""Sets of entries of a vector, each a union of slices."""

_CACHED = 1 << 14  # entries of a product that stay in a CPU's cache until they are summed
_CHUNK = 1 << 20  # keeps the float64 copies of a dot product at 8 MB, however long the vectors
_GRAM_CHUNK = 1 << 16  # columns of a float64 copy: of 32 vectors it takes 16 MB
_GRAM_CHUNK_ON_A_GPU = 1 << 21  # smaller ones would not keep it busy


def result_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """Return the dtype of a vector made of these tensors: float64 if one of them is, else float32.

    Products of half-precision tensors are summed in float32.
    """
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """Return one vector of the entries of all tensors, end to end.

    Example:
        >>> flatten([torch.ones(2, 2), torch.zeros(1)])
        tensor([1., 1., 1., 1., 0.])
    """
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def split_like(vector: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Split a vector into tensors of the shapes, dtypes and devices of others; the inverse of `flatten`.

    The pieces are contiguous, even of a column of a matrix: some backward passes refuse or misread other strides.

    Example:
        >>> [piece.shape for piece in split_like(torch.arange(5.0), [torch.ones(2, 2), torch.zeros(1)])]
        [torch.Size([2, 2]), torch.Size([1])]
    """
    pieces = zip(vector.split([tensor.numel() for tensor in tensors]), tensors, strict=True)
    return [piece.contiguous().view(tensor.shape).to(tensor) for piece, tensor in pieces]


def dot(x: Tensor, y: Tensor, group: ProcessGroup = SINGLE_PROCESS) -> float:
    """Return `x · y`, whatever the dtype of the vectors.

    Args:
        x: The local rows of x.
        y: The local rows of y.
        group: The processes that hold all rows between them.

    Example:
        >>> dot(torch.full((3,), 1e4), torch.full((3,), 1e4))
        300000000.0
    """
    chunks = zip(x.split(_CHUNK), y.split(_CHUNK), strict=True)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for a, b in chunks:
        total += torch.dot(a.double(), b.double())
    return float(group.all_reduce_(total))


def norm(x: Tensor, group: ProcessGroup = SINGLE_PROCESS) -> float:
    """Return the 2-norm of `x`, of the rows on all ranks."""
    return math.sqrt(dot(x, x, group))


def segment_sums(x: Tensor, segments: Segments) -> list[float]:
    """Return the sum of `x` over each segment.

    Example:
        >>> segment_sums(torch.arange(6.0), [[slice(0, 2), slice(5, 6)], [slice(2, 5)]])
        [6.0, 9.0]
    """
    return [float(sum(x[part].sum(dtype=torch.float64) for part in segment)) for segment in segments]


def segment_dots(x: Tensor, y: Tensor, segments: Segments) -> list[float]:
    """Return `x · y` over each segment: products in the dtype of x and y (exact where one is ±1), summed in float64.

    Example:
        >>> segment_dots(torch.arange(6.0), torch.arange(6.0), [[slice(0, 2), slice(5, 6)], [slice(2, 5)]])
        [26.0, 29.0]
    """
    size = _CACHED if x.device.type == "cpu" else _CHUNK

    def over(part: slice) -> Tensor:
        left, right = x[part], y[part]
        if len(left) <= size:  # true of most parameters, where a call costs more than a sum
            return (left * right).sum(dtype=torch.float64)
        pieces = zip(left.split(size), right.split(size), strict=True)
        return torch.stack([(a * b).sum(dtype=torch.float64) for a, b in pieces]).sum()

    return [float(sum(over(part) for part in segment)) for segment in segments]


def scatter(row: Tensor, segment: Sequence[slice], vector: Tensor) -> None:
    """Write the entries of a row, of shape (1, k), to the places of a segment in a vector.

    Example:
        >>> vector = torch.zeros(4)
        >>> scatter(torch.tensor([[1.0, 2.0, 3.0]]), [slice(0, 1), slice(2, 4)], vector)
        >>> vector
        tensor([1., 0., 2., 3.])
    """
    first = 0
    for part in segment:
        place = vector[part]
        place.copy_(row[0, first : first + len(place)])
        first += len(place)


def quadratic_forms(vectors: Tensor, products: Tensor, segments: Segments, group: ProcessGroup) -> NDArray[np.float64]:
    """Return `v_sᵀ(Av)_s` for each row v, its product Av and each segment s, of shape (k, segments)."""
    forms = [segment_dots(v, row, segments) for v, row in zip(vectors, products, strict=True)]
    return to_numpy(group.all_reduce_(torch.tensor(forms, dtype=torch.float64)))


def gram_matrices(
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    segments: Segments = ((slice(None),),),
    group: ProcessGroup = SINGLE_PROCESS,
) -> NDArray[np.float64]:
    """Return X_s Y_sᵀ for the columns of each segment s, where X and Y are blocks of rows stacked on one another."""
    grams, chunk = [], gram_chunk(x[0])
    for segment in segments:
        gram = torch.zeros(sum(map(len, x)), sum(map(len, y)), dtype=torch.float64, device=x[0].device)
        for part in segment:
            start, stop, _ = part.indices(x[0].shape[1])
            for first in range(start, stop, chunk):
                columns = slice(first, min(first + chunk, stop))
                left = torch.cat([rows[:, columns].double() for rows in x])
                right = left if y is x else torch.cat([rows[:, columns].double() for rows in y])
                gram.addmm_(left, right.T)
        grams.append(gram)
    return to_numpy(group.all_reduce_(torch.stack(grams)))


def gram_chunk(tensor: Tensor) -> int:
    """Return how many columns of a block of vectors to convert to float64 at once."""
    return _GRAM_CHUNK if tensor.device.type == "cpu" else _GRAM_CHUNK_ON_A_GPU


def symmetrize(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the symmetric part of a matrix, to undo rounding."""
    symmetric: NDArray[np.float64] = (matrix + matrix.T) / 2
    return symmetric


def column_slices(rows: Tensor) -> Iterator[slice]:
    """Yield slices of the columns that fit into a CPU's cache, or that keep another device busy."""
    step = 1 << (15 if rows.device.type == "cpu" else 22)
    return (slice(first, first + step) for first in range(0, rows.shape[1], step))


def as_rows(columns: Tensor) -> Tensor:
    """Return the transpose, without a copy if the columns are contiguous; a single row gets the stride of a row.

    Torch may give a single column any stride. With an unusual one, cuBLAS refuses to add a matrix product to it.

    Example:
        >>> as_rows(torch.ones(3, 1).as_strided((3, 1), (1, 1))).stride()
        (3, 1)
    """
    return columns.T.reshape(-1).view(columns.shape[::-1])


def to_numpy(tensor: Tensor) -> NDArray[np.float64]:
    """Return a float64 tensor as an array on the CPU."""
    array: NDArray[np.float64] = tensor.cpu().numpy()
    return array


def from_numpy(array: NDArray[np.float64], tensor: Tensor) -> Tensor:
    """Return an array as a tensor with the dtype and device of another one."""
    return torch.from_numpy(array).to(tensor)
