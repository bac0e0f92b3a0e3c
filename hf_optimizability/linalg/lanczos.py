# SPDX-License-Identifier: Apache-2.0
"""Eigenvalues at both ends of the spectrum, and its Gauss quadrature, by the Lanczos process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..device_memory import free_memory
from .estimate import Estimate, Spectrum
from .operator import SymmetricOperator
from .row_partition import RowPartition
from .vectors import as_rows


OUTLIER_MARGIN = 0.2
"""How far beyond a found end of the spectrum, as a share of it, an eigenvalue that was missed is looked for."""

BASIS_CHUNK = 8
"""Vectors that a basis grows by at once."""

MISS_PROBABILITY = 0.1
"""A random start is shorter than this share of its typical length along a given vector with a chance of 8 %."""


@dataclass(frozen=True, eq=False)
class LanczosRun:
    """What a Lanczos run found, and the basis it found it in; the basis stays in memory as long as the run.

    Attributes:
        spectrum: Both ends with residual bounds, and the quadrature averaged over the starts.
        nodes: Nodes of the quadratures, of shape (m,), ascending: the Ritz values; those of the first cycle, where the
            run restarted.
        residuals: `‖Aq − θq‖` of the Ritz pair of each of `nodes`, of shape (m,), up to rounding.
        weights: One quadrature per random start v, of shape (starts, m): `vᵀf(A)v / n ≈ weights @ f(nodes)`, exact
            for polynomials of a degree below twice the number of steps. A start that a warm start was mixed into is
            not random, and has no row.
        hvps: Products spent.
    """

    spectrum: Spectrum
    nodes: np.ndarray = field(repr=False)
    residuals: np.ndarray = field(repr=False)
    weights: np.ndarray = field(repr=False)
    hvps: int
    _krylov: _Krylov = field(repr=False)

    @property
    def lambda_max(self) -> Estimate:
        """Largest algebraic eigenvalue."""
        return self.spectrum.lambda_max

    @property
    def lambda_min(self) -> Estimate:
        """Smallest algebraic eigenvalue."""
        return self.spectrum.bottom[0]

    def top(self, number: int, *, tolerance: float) -> tuple[Estimate, ...]:
        """Return the largest eigenvalues, the largest first: up to `number`, whether so many were asked for or not.

        Args:
            number: How many.
            tolerance: Relative residual below which one has converged.
        """
        return self._krylov.eigenvalues(1, tolerance, number, self.hvps)

    def ritz_vectors(self, indices: Sequence[int]) -> Tensor:
        """Return orthonormal approximate eigenvectors, as rows, on the device of the basis.

        Args:
            indices: Which, counted from the smallest Ritz value: `[-1, 0]` for λ_max and λ_min.
        """
        return self._krylov.combine(self._krylov.vectors[:, indices].T)

    def ritz_products(self, indices: Sequence[int]) -> Tensor:
        """Return `A q` for each of `ritz_vectors(indices)`, as rows, without a further product."""
        return self._krylov.multiply(self._krylov.vectors[:, indices].T)

    def probes(self) -> tuple[Tensor, Tensor]:
        """Return the random starts v (entries ±1, up to rounding) and `A v`, both as rows, without a further product.

        Raises:
            ValueError: If the run restarted, which overwrites them.
        """
        if self._krylov.restarted:
            raise ValueError("The run restarted, and its starts are gone. Raise `max_basis`.")
        starts = self._krylov.starts
        random = starts[len(starts) - len(self.weights) :] * math.sqrt(self._krylov.basis.size)
        return self._krylov.combine(random), self._krylov.multiply(random)


def lanczos(
    operator: SymmetricOperator,
    *,
    tolerance: float,
    max_hvps: int,
    seed: int,
    num_eigenvalues: int = 1,
    starts: int = 1,
    warm_start: Tensor | None = None,
    max_basis: int | None = None,
    basis_device: torch.device | None = None,
) -> LanczosRun:
    """Estimate the eigenvalues at both ends of the spectrum of a symmetric operator, and its quadrature.

    Block Lanczos (Golub & Van Loan, Matrix Computations, section 10.3) from Rademacher starts that are multiplied
    together, with a basis orthogonal to the square root of the precision (Simon 1984) and the projected matrix in
    float64. An end of the spectrum has converged when

    - the residual `‖Aq − θq‖` of each wanted Ritz value θ there is at most `tolerance · |θ|`, and
    - an eigenvalue 20 % further out would have shown: given what was seen, its eigenvector would have to be ten times
      shorter than is typical along every start. A warm run can't do without the products that this takes.

    A Ritz value never lies outside the spectrum: `lambda_max` is approached from below, `lambda_min` from above. One
    start sees a multiple eigenvalue once, k starts up to k times.

    Args:
        operator: The matrix, of size n. Its `matmat` must return a new tensor, which is overwritten.
        tolerance: Relative residual to stop at.
        max_hvps: Most products to spend, at least `starts`. Memory: one n-vector for each, unless `max_basis` is less.
        seed: Seed of the starts.
        num_eigenvalues: How many to find at each end.
        starts: Random starts. One finds the ends with the fewest products (of fine-tuned MiniLM-L6 and MobileNetV2
            with 19 and 20, two starts with 30 and 24, four with 48 and 40); more give the density and the trace an
            error bar, and products in lockstep are cheaper.
        warm_start: Orthonormal approximate eigenvectors, of shape (k, n), from a run at a nearby point; best that of
            λ_max alone, since others delay it. Their sum goes into the first start with the weight n^-¼: enough to
            save products, and so little that a missed eigenvalue still shows in time. It saves products of λ_max, the
            more the less its eigenvector has turned, and few of λ_min, which takes most of a run.
        max_basis: Most vectors to keep; beyond, the run restarts from the Ritz vectors at both ends (thick restart, Wu
            & Simon 2000), which costs further products. By default as many as half of the free memory holds.
        basis_device: Where to keep the basis and do the vector arithmetic; by default the operator's device, or the
            CPU where half of that device's free memory does not hold `max_basis` or `max_hvps` vectors.

    Returns:
        The run.

    Raises:
        ValueError: If `max_hvps` or `max_basis` leaves no room.

    Example:
        >>> from hf_optimizability.linalg.operator import DenseOperator
        >>> matrix = torch.diag(torch.tensor([-1.0, 2.0, 5.0]))
        >>> run = lanczos(DenseOperator(matrix), tolerance=1e-3, max_hvps=3, seed=0)
        >>> round(run.lambda_max.value, 4), round(run.lambda_min.value, 4)
        (5.0, -1.0)
        >>> run.ritz_vectors([-1]).abs().round(decimals=3)
        tensor([[0., 0., 1.]])
    """
    if max_hvps < starts:
        raise ValueError(f"`max_hvps` is {max_hvps}; the first step alone takes {starts} products, one per start.")
    if max_basis is not None and max_basis < 2 * (num_eigenvalues + starts):
        raise ValueError(
            f"`max_basis` is {max_basis}; a restart needs at least {2 * (num_eigenvalues + starts)}: "
            "twice the eigenvalues at each end, and twice the starts."
        )
    device = basis_device or _roomy_device(operator, max_basis or max_hvps)
    max_basis = max_basis or max(_vectors_that_fit(operator, device), 2 * (num_eigenvalues + starts))
    first = _start_rows(operator, starts, seed, device)
    if warm_start is not None:
        # Halfway, on a log scale, between the share 1/√n that it has in the random part and that of the whole.
        first[0] += warm_start.to(first).sum(dim=0) * (operator.size**-0.25 / math.sqrt(len(warm_start)))
    krylov = _Krylov(first, operator.rows)
    hvps = 0
    while True:
        block = krylov.extend()
        hvps += len(block)
        krylov.absorb(as_rows(operator.matmat(block.T.to(operator.device))).to(device))
        done = krylov.exhausted or krylov.converged(tolerance, num_eigenvalues)
        if done or hvps + krylov.width > max_hvps:
            break
        if len(krylov.basis) + krylov.width > max_basis:
            krylov.restart(keep=max(2 * num_eigenvalues, (max_basis - krylov.width) // 2))
    nodes, residuals, weights = krylov.first_cycle()
    if warm_start is not None:
        weights = weights[1:]
    spectrum = _spectrum(krylov, tolerance, num_eigenvalues, hvps, nodes, weights)
    return LanczosRun(spectrum, nodes, residuals, weights, hvps, krylov)


def lanczos_by_segment(
    operator: SymmetricOperator, segments: Sequence[Sequence[slice]], *, tolerance: float, max_hvps: int, seed: int
) -> tuple[Spectrum, ...]:
    """Estimate both ends of the spectrum of each diagonal block of an operator, all from the same products.

    One Lanczos process per block. Their vectors are concatenated into one of length n, so that a product serves all of
    them; a block that is done gets zeros. (Zhang et al. 2024, arXiv 2402.16788, do so with the blocks of a network's
    Hessian.)

    Args:
        operator: The matrix, of size n, whose entries between different segments are zero.
        segments: Slices of the rows of each block; no row in two of them.
        tolerance: Relative residual to stop at, as for `lanczos`.
        max_hvps: Most products to spend. Memory: one n-vector for each.
        seed: Seed of the start vector.

    Returns:
        The spectrum of each block; the number of products in them is that of the whole.

    Example:
        >>> from hf_optimizability.linalg.operator import DenseOperator
        >>> blocks = torch.block_diag(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[7.0]]))
        >>> segments = [[slice(0, 2)], [slice(2, 3)]]
        >>> both = lanczos_by_segment(DenseOperator(blocks), segments, tolerance=1e-3, max_hvps=9, seed=0)
        >>> [(round(block.lambda_min.value, 4), round(block.lambda_max.value, 4)) for block in both]
        [(-1.0, 1.0), (7.0, 7.0)]
    """
    generator = torch.Generator().manual_seed(seed)
    # Not signs: in a small block these are orthogonal to an eigenvector too often.
    start = torch.randn(1, operator.size, generator=generator, dtype=operator.dtype).to(operator.device)
    starts = [functional.normalize(_gather(start, segment)) for segment in segments]
    processes = [_Krylov(start, RowPartition.whole(start.shape[1])) for start in starts]
    vector = torch.empty(operator.size, dtype=operator.dtype, device=operator.device)
    active = dict(enumerate(processes))
    hvps = 0
    while active and hvps < max_hvps:
        vector.zero_()
        for index, process in active.items():
            _scatter(process.extend(), segments[index], vector)
        product = operator.matvec(vector)[None]
        hvps += 1
        for index, process in list(active.items()):
            process.absorb(_gather(product, segments[index]))
            if process.exhausted or process.converged(tolerance, 1):
                del active[index]
    cycles = [process.first_cycle() for process in processes]
    return tuple(
        _spectrum(process, tolerance, 1, hvps, nodes, weights)
        for process, (nodes, _, weights) in zip(processes, cycles, strict=True)
    )


def _spectrum(
    krylov: _Krylov, tolerance: float, number: int, hvps: int, nodes: np.ndarray, weights: np.ndarray
) -> Spectrum:
    top = krylov.eigenvalues(1, tolerance, number, hvps)
    bottom = krylov.eigenvalues(-1, tolerance, number, hvps)
    known = len(weights) > 0
    return Spectrum(
        lambda_max=top[0],
        lambda_min=bottom[0],
        top=top,
        bottom=bottom,
        ritz_values=tuple(nodes.tolist()) if known else (),
        ritz_weights=tuple(weights.mean(axis=0).tolist()) if known else (),
    )


def _roomy_device(operator: SymmetricOperator, vectors: int) -> torch.device:
    """Return the operator's device if so many vectors fit there, else the CPU."""
    fit = _vectors_that_fit(operator, operator.device) >= vectors
    return operator.device if fit else torch.device("cpu")


def _vectors_that_fit(operator: SymmetricOperator, device: torch.device) -> int:
    """Return how many of the operator's vectors fit into half of a device's free memory."""
    fit = free_memory(device) // 2 // (max(len(operator.rows), 1) * operator.dtype.itemsize)
    # Every rank must take the same branch.
    return min(operator.rows.group.all_gather_interleaved(operator.group.all_gather_interleaved([fit])))


def _start_rows(operator: SymmetricOperator, number: int, seed: int, device: torch.device) -> Tensor:
    """Draw Rademacher vectors of norm 1, as rows."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(operator.rows.rademacher, generator=generator, dtype=operator.dtype, device=device)
    return torch.stack([draw() for _ in range(number)]).div_(math.sqrt(operator.size))


def _gather(row: Tensor, segment: Sequence[slice]) -> Tensor:
    return torch.cat([row[:, part] for part in segment], dim=1)


def _scatter(row: Tensor, segment: Sequence[slice], vector: Tensor) -> None:
    first = 0
    for part in segment:
        place = vector[part]
        place.copy_(row[0, first : first + len(place)])
        first += len(place)


class _Krylov:
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
        self._first_cycle: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        # Dependence among the starts shows in their Gram matrix to the square root of float64's precision only.
        self._starts = self._orthonormalize(starts, np.zeros((number, 0)), floor=1e-7)
        self._C = np.zeros((0, len(self._mix)))

    @property
    def width(self) -> int:
        """Vectors in the next block Z; fewer than there are starts once their Krylov spaces meet."""
        return len(self._mix)

    @property
    def exhausted(self) -> bool:
        """Whether the basis holds all that the starts can reach."""
        return self.width == 0 or len(self.basis) >= self.basis.size

    @property
    def restarted(self) -> bool:
        """Whether the basis has been shrunk, and does not hold the starts any more."""
        return self._first_cycle is not None

    @property
    def starts(self) -> np.ndarray:
        """Coordinates of the starts in Q, of shape (k, m), until a restart."""
        return np.pad(self._starts, ((0, 0), (0, len(self._T) - self._starts.shape[1])))

    def extend(self) -> Tensor:
        """Append the next block Z to the basis and return it, as rows; `absorb` wants its product."""
        return self.basis.append(_like(self._mix, self._remainder), self._remainder)

    def absorb(self, product: Tensor) -> None:
        """Take `Az` for each row z of the block that `extend` returned, as rows, and overwrite it."""
        corner = self._rows.group.all_reduce_(_gram(self.basis.last(len(product)), product)).cpu().numpy()
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

    def combine(self, coordinates: np.ndarray) -> Tensor:
        """Return the vectors with these coordinates in Q, as rows."""
        return self.basis.combine(coordinates)

    def multiply(self, coordinates: np.ndarray) -> Tensor:
        """Return a times the vectors with these coordinates in Q, as rows."""
        outside = _like(coordinates @ self._C @ self._mix, self._remainder) @ self._remainder
        return outside.add_(self.basis.combine(coordinates @ self._T))

    def first_cycle(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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

    def _end(self, sign: int, tolerance: float, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return values, residuals, and whether converged, at one end, the outermost first."""
        indices = np.argsort(-sign * self.values)[:number]
        values = self.values[indices]
        residuals = self._residuals(self.vectors[:, indices]) + self._rounding
        converged = residuals <= np.maximum(tolerance * np.abs(values), 2 * self._rounding)
        if converged.any():
            scale = max(abs(values[0]), tolerance * float(np.abs(self.values).max()))
            converged &= self._missed_eigenvalue_unlikely(values[0] + sign * OUTLIER_MARGIN * scale)
        return values, residuals, converged

    def _residuals(self, vectors: np.ndarray) -> np.ndarray:
        """Return `‖Aq − θq‖` of Ritz vectors whose coordinates in Q are these columns."""
        return np.linalg.norm(vectors.T @ self._C, axis=1)

    def _missed_eigenvalue_unlikely(self, eigenvalue: float) -> bool:
        """Return whether an eigenvalue there is unlikely to have been missed.

        Its eigenvector u has `uᵀQᵀ(λ − T) = uᵀZᵀCᵀ`. So its share in a start with coordinates c in Q is at most
        `‖Cᵀ(λ − T)⁻¹c‖`, while its share in a random vector of norm 1 is about 1/√n.
        """
        if self.exhausted or self.restarted:  # a run that restarted has made steps enough
            return True
        shares = (self.starts @ self.vectors) / (eigenvalue - self.values) @ self.vectors.T @ self._C
        return bool(np.linalg.norm(shares, axis=1).min() <= MISS_PROBABILITY / math.sqrt(self.basis.size))

    @property
    def _rounding(self) -> float:
        """What rounding alone makes of a residual."""
        return len(self.values) * self._eps * float(np.abs(self.values).max())

    def _orthonormalize(self, rows: Tensor, along: np.ndarray, *, floor: float) -> np.ndarray:
        """Find L and an orthonormal Z ⟂ Q with `rows = along Q + LZ`, without directions shorter than `floor`.

        Overwrites `rows`, and keeps Z as `mix @ remainder`, to be written once, into the basis. A basis orthogonal to
        the square root of the precision makes T exact to the precision (Simon 1984), so one pass is mostly enough.
        """
        links = np.eye(len(rows))
        for _ in range(3):
            along, gram = self.basis.subtract(_like(along, rows), rows)
            squares, axes = np.linalg.eigh(gram)
            kept = squares > floor**2
            lengths, axes = np.sqrt(squares[kept]), axes[:, kept]
            self._mix, self._remainder = axes.T / lengths[:, None], rows
            links, along = links @ (axes * lengths), self._mix @ along
            well_conditioned = not kept.any() or lengths[0] > 1e-3 * lengths[-1]
            if well_conditioned and np.linalg.norm(along) <= math.sqrt(self._eps):
                break
            rows = _like(self._mix, rows) @ rows
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
        for columns in _columns(rows):
            torch.mm(mix, rows[:, columns], out=place[:, columns])
        return place

    def last(self, number: int) -> Tensor:
        """Return a view of the last rows."""
        return self._slabs[-1][self._used[-1] - number : self._used[-1]]

    def subtract(self, coordinates: Tensor, rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Set `rows −= coordinates Q`, in place; return what `rows` has left along Q, and its Gram matrix."""
        number = len(self)
        found = torch.zeros(len(rows), number + len(rows), dtype=torch.float64, device=rows.device)
        along, gram = found[:, :number], found[:, number:]
        for columns in _columns(rows):
            part = rows[:, columns]
            if self._slabs:
                basis = self._part(columns)
                part.addmm_(coordinates, basis, alpha=-1)
                along += part @ basis.T
            part = part.double()
            gram += part @ part.T
        found = self._rows.group.all_reduce_(found).cpu()
        return found[:, :number].numpy(), found[:, number:].numpy()

    def combine(self, coordinates: np.ndarray) -> Tensor:
        """Return `coordinates Q`."""
        result = torch.empty(len(coordinates), len(self._rows), dtype=self._dtype, device=self._device)
        factors = _like(coordinates, result)
        for columns in _columns(result):
            result[:, columns] = factors @ self._part(columns)
        return result

    def compress(self, coordinates: np.ndarray) -> None:
        """Replace the rows by `coordinates Q`, which are fewer, in place."""
        factors = _like(coordinates, self._slabs[0])
        capacities = [len(slab) for slab in self._slabs]
        starts = accumulate(capacities, initial=-len(coordinates))
        used = [min(max(-start, 0), room) for start, room in zip(starts, capacities, strict=False)]
        for columns in _columns(self._slabs[0]):
            rows = factors @ self._part(columns)
            for slab, piece in zip(self._slabs, rows.split(used), strict=True):
                slab[: len(piece), columns] = piece
        self._slabs = [slab for slab, number in zip(self._slabs, used, strict=True) if number]
        self._used = [number for number in used if number]

    def _part(self, columns: slice) -> Tensor:
        """Return these columns of all rows."""
        parts = [slab[:number, columns] for slab, number in zip(self._slabs, self._used, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _columns(rows: Tensor) -> Iterator[slice]:
    """Cut n columns into runs that fit into a CPU's cache, or that keep another device busy."""
    step = 1 << (15 if rows.device.type == "cpu" else 22)
    return (slice(first, first + step) for first in range(0, rows.shape[1], step))


def _gram(left: Tensor, right: Tensor) -> Tensor:
    """Return `left @ right.T` for rows, accumulated in float64."""
    total = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    for columns in _columns(left):
        total += left[:, columns].double() @ right[:, columns].double().T
    return total


def _like(array: np.ndarray, tensor: Tensor) -> Tensor:
    """Return the array with a tensor's dtype and device."""
    return torch.from_numpy(array).to(tensor)
