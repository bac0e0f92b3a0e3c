# SPDX-License-Identifier: Apache-2.0
"""Blocks of probe vectors: random signs, unit vectors, orthonormal rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .communicator import SINGLE_PROCESS, ProcessGroup
from .operator import SymmetricOperator
from .vectors import gram_matrices


PROBE_BLOCK_SIZE = 4
"""Probes multiplied at once: they share the forward and the first backward pass; more save little and cost memory."""


SIGNS_FROM_SIZE = 100
"""Smallest matrix for whose extreme eigenvalues random signs are the start.

Signs are orthogonal to an eigenvector with n entries of ±1/√n with a chance of √(2/πn): 1/2 for (1, −1)/√2, and for
this size 8 %, which is the chance that a normal vector is ten times shorter along an eigenvector than is typical.
"""


def start_rows(operator: SymmetricOperator, number: int, *, seed: int, device: torch.device) -> Tensor:
    """Return random vectors of norm 1 as rows: signs, or normal numbers where the matrix is small."""
    return random_rows(operator, number, seed=seed, device=device).div_(math.sqrt(operator.size))


def random_rows(operator: SymmetricOperator, number: int, *, seed: int, device: torch.device | None = None) -> Tensor:
    """Return random vectors of norm √n as rows: signs, or normal numbers where the matrix is small."""
    if operator.size < SIGNS_FROM_SIZE:
        return normal_rows(operator, number, seed=seed, device=device)
    return rademacher_rows(operator, number, torch.Generator().manual_seed(seed), device)


def normal_rows(operator: SymmetricOperator, number: int, *, seed: int, device: torch.device | None = None) -> Tensor:
    """Return vectors of normal numbers, of norm √n, as rows; each is drawn whole, however many ranks share it."""
    generator = torch.Generator().manual_seed(seed)
    whole = functional.normalize(torch.randn(number, operator.size, generator=generator, dtype=operator.dtype))
    rows = torch.stack([operator.rows.select(row) for row in whole]).mul_(math.sqrt(operator.size))
    return rows.to(device or operator.device)


def rademacher_rows(
    operator: SymmetricOperator, number: int, generator: torch.Generator, device: torch.device | None = None
) -> Tensor:
    """Return random ±1 vectors as rows, by default on the operator's device."""
    device = device or operator.device
    probes = torch.empty(number, len(operator.rows), dtype=operator.dtype, device=device)
    for probe in probes:
        probe.copy_(operator.rows.rademacher(generator=generator, dtype=operator.dtype, device=device))
    return probes


def unit_rows(operator: SymmetricOperator) -> Iterator[Tensor]:
    """Yield all unit vectors as the rows of matrices of at most `PROBE_BLOCK_SIZE` rows."""
    for first in range(0, operator.size, PROBE_BLOCK_SIZE):
        indices = range(first, min(first + PROBE_BLOCK_SIZE, operator.size))
        yield torch.stack([operator.rows.unit(i, dtype=operator.dtype, device=operator.device) for i in indices])


def orthonormalize(rows: Tensor, bases: Sequence[Tensor], group: ProcessGroup = SINGLE_PROCESS) -> Tensor:
    """Return orthonormal rows that span what `rows` add to the span of `bases`, whose rows are orthonormal.

    Twice: removes the bases, then whitens by the eigenvectors of the Gram matrix (Stathopoulos & Wu 2002). That needs
    no more than two passes over the rows, and drops directions that are zero to rounding.
    """
    smallest = max(10 * torch.finfo(rows.dtype).eps, 1e-7)
    for _ in range(2):
        largest = group.all_reduce_(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()).max().sqrt()
        for basis in bases:
            rows = torch.addmm(rows, group.all_reduce_(rows @ basis.T), basis, alpha=-1)
        values, vectors = np.linalg.eigh(gram_matrices([rows], [rows], group=group).sum(0))
        significant = values > (smallest * float(largest)) ** 2
        if not significant.any():
            return rows[:0]
        rows = torch.from_numpy((vectors[:, significant] / np.sqrt(values[significant])).T).to(rows) @ rows
    return rows
