# SPDX-License-Identifier: Apache-2.0
"""The block Krylov decomposition that the Lanczos process grows, and its basis."""

from __future__ import annotations

import math
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .estimate import Estimate
from .row_partition import RowPartition
from .vectors import column_slices, from_numpy, to_numpy


Array = NDArray[np.float64]

OUTLIER_MARGIN = 0.2
"""How far beyond a found end of the spectrum, as a share of it, an eigenvalue that was missed is looked for."""

BASIS_CHUNK = 8
"""Vectors that a basis grows by at once."""

MISS_PROBABILITY = 0.1
"""A random start is shorter than this share of its typical length along a given vector with a chance of 8 %."""


class KrylovDecomposition:
    """A Krylov decomposition `AQᵀ = QᵀT + ZᵀCᵀ` that grows by blocks; the rows of Q and Z are orthonormal, Z ⟂ Q.

    Attributes:
        basis: Q, of shape (m, n).
        values: Eigenvalues of T, ascending: the Ritz values.
        vectors: Eigenvectors of T as columns, of shape (m, m).
    """

    def __init__(self, starts: Tensor, rows: RowPartition):
        number = len(starts)
        self.basis = _Basis(rows, starts.dtype, starts.device)
        self._rows = rows
        self.values, self.vectors = np.zeros(0), np.zeros((0, 0))
        self._eps = torch.finfo(starts.dtype).eps
        self._T = np.zeros((0, 0))
        self._first_cycle: tuple[Array, Array, Array] | None = None
        # Dependence among the starts shows in their Gram matrix to the square root of float64's precision only.
        self._starts = self._orthonormalize(starts, np.zeros((number, 0)), floor=1e-7)
        self._C = np.zeros((0, len(self._mix)))
        self._anew: Array | None = None

    @property
    def width(self) -> int:
        """Vectors in the next block Z; fewer than there are starts once their Krylov spaces meet."""
        return len(self._mix)

    @property
    def exhausted(self) -> bool:
        """Whether the basis holds all that the starts can reach."""
        return self.width == 0 or len(self.basis) >= self.basis.size

    @property
    def may_start_anew(self) -> bool:
        """Whether the starts reach no further, and there is more, of which `start_anew` has not been asked."""
        if len(self.basis) >= self.basis.size or self._anew is not None:
            return False
        return self.width == 0 or bool(np.abs(self._C).max() <= 4 * self._rounding)

    @property
    def restarted(self) -> bool:
        """Whether the basis has been shrunk, and does not hold the starts any more."""
        return self._first_cycle is not None

    @property
    def starts(self) -> Array:
        """Coordinates of the starts in Q, of shape (k, m), until a restart."""
        return self._padded(self._starts)

    def start_anew(self, start: Tensor) -> None:
        """Continue from another vector of norm 1, as a row, where the starts reach no further; overwrite it."""
        along, _ = self.basis.subtract(torch.zeros(1, len(self.basis), dtype=start.dtype, device=start.device), start)
        links = self._orthonormalize(start, along, floor=1e-7)
        self._anew = np.concatenate([along, links], axis=1)
        self._C = np.zeros((len(self._T), self.width))

    def _padded(self, coordinates: Array) -> Array:
        return np.pad(coordinates, ((0, 0), (0, len(self._T) - coordinates.shape[1])))

    def extend(self) -> Tensor:
        """Append the next block Z to the basis and return it, as rows; `absorb` wants its product."""
        return self.basis.append(from_numpy(self._mix, self._remainder), self._remainder)

    def absorb(self, product: Tensor) -> None:
        """Take `Az` for each row z of the block that `extend` returned, as rows, and overwrite it."""
        corner = to_numpy(self._rows.group.all_reduce_(_gram(self.basis.last(len(product)), product)))
        self._T = np.block([[self._T, self._C], [self._C.T, (corner + corner.T) / 2]])
        self.values, self.vectors = np.linalg.eigh(self._T)
        old = len(self._C)
        links = self._orthonormalize(product, self._T[old:], floor=self._rounding)
        self._C = np.concatenate([np.zeros((old, self.width)), links])

    def restart(self, *, keep: int) -> None:
        """Shrink the basis to `keep` Ritz vectors, half of them from each end (Wu & Simon 2000)."""
        self._first_cycle = self.first_cycle()
        order = np.arange(len(self.values))
        ends = np.concatenate([order[: keep // 2], order[keep // 2 - keep :]])
        self.basis.compress(self.vectors[:, ends].T)
        self._T, self._C = np.diag(self.values[ends]), self.vectors[:, ends].T @ self._C

    def combine(self, coordinates: Array) -> Tensor:
        """Return the vectors with these coordinates in Q, as rows."""
        return self.basis.combine(coordinates)

    def multiply(self, coordinates: Array) -> Tensor:
        """Return A times the vectors with these coordinates in Q, as rows."""
        outside = from_numpy(coordinates @ self._C @ self._mix, self._remainder) @ self._remainder
        return outside.add_(self.basis.combine(coordinates @ self._T))

    def first_cycle(self) -> tuple[Array, Array, Array]:
        """Return Ritz values and residuals, both (m,), and each start's quadrature weights (k, m), before any restart.

        Golub & Meurant, Matrices, Moments and Quadrature, chapter 6.
        """
        if self._first_cycle is not None:
            return self._first_cycle
        return self.values, self._residuals(self.vectors), (self.starts @ self.vectors) ** 2

    def converged(self, tolerance: float, number: int) -> bool:
        """Return whether the `number` outermost values at both ends have converged."""
        ends = self._end(1, tolerance, number), self._end(-1, tolerance, number)
        return len(self.values) >= number and all(converged.all() for _, _, converged in ends)

    def eigenvalues(self, sign: int, tolerance: float, number: int, hvps: int) -> tuple[Estimate, ...]:
        """Return the `number` outermost values at the upper (1) or lower (-1) end, the outermost first."""
        return tuple(
            Estimate(
                value=float(value),
                low=float(value - residual),
                high=float(value + residual),
                method="lanczos",
                hvps=hvps,
                converged=bool(converged),
                residual=float(residual),
            )
            for value, residual, converged in zip(*self._end(sign, tolerance, number), strict=True)
        )

    def _end(self, sign: int, tolerance: float, number: int) -> tuple[Array, Array, NDArray[np.bool_]]:
        """Return values, residuals, and whether converged, at one end, the outermost first."""
        indices = np.argsort(-sign * self.values)[:number]
        values = self.values[indices]
        residuals = self._residuals(self.vectors[:, indices]) + self._rounding
        converged = residuals <= np.maximum(tolerance * np.abs(values), 2 * self._rounding)
        if converged.any():
            scale = max(abs(values[0]), tolerance * float(np.abs(self.values).max()))
            converged &= self._missed_eigenvalue_unlikely(values[0] + sign * OUTLIER_MARGIN * scale)
        return values, residuals, converged

    def _residuals(self, vectors: Array) -> Array:
        """Return `‖Aq − θq‖` of Ritz vectors whose coordinates in Q are these columns."""
        norms: Array = np.linalg.norm(vectors.T @ self._C, axis=1)
        return norms

    def _missed_eigenvalue_unlikely(self, eigenvalue: float) -> bool:
        """Return whether an eigenvalue there is unlikely to have been missed.

        Its eigenvector u has `uᵀQᵀ(λ − T) = uᵀZᵀCᵀ`. So its share in a start with coordinates c in Q is at most
        `‖Cᵀ(λ − T)⁻¹c‖`, while its share in a random vector of norm 1 is about 1/√n.
        """
        if self.exhausted or self.restarted:  # a run that restarted has made steps enough
            return True
        if self._anew is None:
            starts = self.starts
        elif self._anew.shape[1] > len(self._T):  # the other start has not been multiplied yet
            return False
        else:
            starts = self._padded(self._anew)
        shares = (starts @ self.vectors) / (eigenvalue - self.values) @ self.vectors.T @ self._C
        return bool(np.linalg.norm(shares, axis=1).min() <= MISS_PROBABILITY / math.sqrt(self.basis.size))

    @property
    def _rounding(self) -> float:
        """What rounding alone makes of a residual."""
        return len(self.values) * self._eps * float(np.abs(self.values).max())

    def _orthonormalize(self, rows: Tensor, along: Array, *, floor: float) -> Array:
        """Find L and an orthonormal Z ⟂ Q with `rows = along Q + LZ`, without directions shorter than `floor`.

        Overwrites `rows`, and keeps Z as `mix @ remainder`, to be written once, into the basis. A basis orthogonal to
        the square root of the precision makes T exact to the precision (Simon 1984), so one pass is mostly enough.
        """
        links = np.eye(len(rows))
        for _ in range(3):
            along, gram = self.basis.subtract(from_numpy(along, rows), rows)
            squares, axes = np.linalg.eigh(gram)
            kept = squares > floor**2
            lengths, axes = np.sqrt(squares[kept]), axes[:, kept]
            self._mix, self._remainder = axes.T / lengths[:, None], rows
            links, along = links @ (axes * lengths), self._mix @ along
            well_conditioned = not kept.any() or lengths[0] > 1e-3 * lengths[-1]
            if well_conditioned and np.linalg.norm(along) <= math.sqrt(self._eps):
                break
            rows = from_numpy(self._mix, rows) @ rows
            floor = 0.1  # all have norm 1 now, except for those made of rounding errors
        return links


class _Basis:
    """Orthonormal rows, stored in slabs so that they grow without being copied.

    Whatever is done with them is done columns by columns that fit into the cache: memory traffic is what it costs.
    """

    def __init__(self, rows: RowPartition, dtype: torch.dtype, device: torch.device):
        self.size = rows.size
        self._rows = rows
        self._dtype, self._device = dtype, device
        self._slabs: list[Tensor] = []
        self._used: list[int] = []

    def __len__(self) -> int:
        return sum(self._used)

    def append(self, mix: Tensor, rows: Tensor) -> Tensor:
        """Append `mix @ rows`, and return a view of it."""
        number = len(mix)
        if not self._slabs or self._used[-1] + number > len(self._slabs[-1]):
            shape = (max(BASIS_CHUNK, number), len(self._rows))
            self._slabs.append(torch.empty(shape, dtype=self._dtype, device=self._device))
            self._used.append(0)
        self._used[-1] += number
        place = self.last(number)
        for columns in column_slices(rows):
            torch.mm(mix, rows[:, columns], out=place[:, columns])
        return place

    def last(self, number: int) -> Tensor:
        """Return a view of the last rows."""
        return self._slabs[-1][self._used[-1] - number : self._used[-1]]

    def subtract(self, coordinates: Tensor, rows: Tensor) -> tuple[Array, Array]:
        """Set `rows −= coordinates Q`, in place; return what `rows` has left along Q, and its Gram matrix."""
        number = len(self)
        found = torch.zeros(len(rows), number + len(rows), dtype=torch.float64, device=rows.device)
        along, gram = found[:, :number], found[:, number:]
        for columns in column_slices(rows):
            part = rows[:, columns]
            if self._slabs:
                basis = self._part(columns)
                part.addmm_(coordinates, basis, alpha=-1)
                along += part @ basis.T
            part = part.double()
            gram += part @ part.T
        sums = to_numpy(self._rows.group.all_reduce_(found))
        return sums[:, :number], sums[:, number:]

    def combine(self, coordinates: Array) -> Tensor:
        """Return `coordinates Q`."""
        result = torch.empty(len(coordinates), len(self._rows), dtype=self._dtype, device=self._device)
        factors = from_numpy(coordinates, result)
        for columns in column_slices(result):
            result[:, columns] = factors @ self._part(columns)
        return result

    def compress(self, coordinates: Array) -> None:
        """Replace the rows by `coordinates Q`, which are fewer, in place."""
        factors = from_numpy(coordinates, self._slabs[0])
        capacities = [len(slab) for slab in self._slabs]
        starts = accumulate(capacities, initial=-len(coordinates))
        used = [min(max(-start, 0), room) for start, room in zip(starts, capacities, strict=False)]
        for columns in column_slices(self._slabs[0]):
            rows = factors @ self._part(columns)
            for slab, piece in zip(self._slabs, rows.split(used), strict=True):
                slab[: len(piece), columns] = piece
        self._slabs = [slab for slab, number in zip(self._slabs, used, strict=True) if number]
        self._used = [number for number in used if number]

    def _part(self, columns: slice) -> Tensor:
        """Return these columns of all rows."""
        parts = [slab[:number, columns] for slab, number in zip(self._slabs, self._used, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _gram(left: Tensor, right: Tensor) -> Tensor:
    """Return `left @ right.T` for rows, accumulated in float64."""
    total = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    for columns in column_slices(left):
        total += left[:, columns].double() @ right[:, columns].double().T
    return total
