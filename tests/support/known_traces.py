# SPDX-License-Identifier: Apache-2.0
"""Trace estimates of matrices whose every entry is known."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor

from hf_optimizability.linalg.deflation import Deflation
from hf_optimizability.linalg.operator import DenseOperator
from hf_optimizability.linalg.trace import hutchinson, hutchplusplus
from hf_optimizability.linalg.trace_result import TraceResult
from hf_optimizability.linalg.xtrace import xtrace
from tests.support import tiny_models


METHODS: dict[str, Callable[..., TraceResult]] = {"hutchinson": hutchinson, "hutch++": hutchplusplus, "xtrace": xtrace}


NEVER = 1e-12  # a tolerance that no estimate reaches


def with_eigenvalues(eigenvalues: np.ndarray) -> Tensor:
    """A symmetric matrix with random eigenvectors."""
    size = len(eigenvalues)
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))
    return torch.from_numpy((basis * eigenvalues) @ basis.T)


@cache
def matrix(name: str) -> Tensor:
    """`network`: outliers at both ends, a bulk near zero; `decaying`: i⁻²; `flat`: 1 to 3; `bert`: a true Hessian."""
    if name == "bert":
        model = tiny_models.make("bert").eval()
        [batch] = tiny_models.cut(tiny_models.examples("bert", 5), 5)
        return tiny_models.dense_hessian(model, batch)
    bulk = 0.02 + np.random.default_rng(1).normal(size=196) / 50
    return with_eigenvalues(
        {
            "network": np.concatenate([[-6.0, -2.0, 5.0, 9.0], bulk]),
            "decaying": np.arange(1.0, 201.0) ** -2,
            "flat": np.linspace(1, 3, 200),
        }[name]
    )


def segments(dense: Tensor) -> list[list[slice]]:
    """A third, the rest, and a small block between the rest's two parts."""
    size = len(dense)
    first, second = size // 3, size - 40
    return [[slice(0, first)], [slice(first, second), slice(second + 20, size)], [slice(second, second + 20)]]


def truths(dense: Tensor) -> list[float]:
    """The trace, the segments' traces, and ‖A‖_F²."""
    diagonal = dense.diagonal()
    parts = [float(sum(diagonal[part].sum() for part in segment)) for segment in segments(dense)]
    return [float(diagonal.sum()), *parts, float((dense**2).sum())]


def values(result: TraceResult) -> list[float]:
    return [estimate.value for estimate in (result.total, *result.segments, result.frobenius_squared)]


def estimate(name: str, dense: Tensor, **options: object) -> TraceResult:
    return METHODS[name](DenseOperator(dense), segments(dense), **options)


def coverage(dense: Tensor, run: Callable[[int], TraceResult], *, seeds: int = 250) -> np.ndarray:
    """How often the intervals hold the trace, the segments' traces and ‖A‖_F²."""
    held, true = np.zeros(5), truths(dense)
    for seed in range(seeds):
        result = run(seed)
        found = (result.total, *result.segments, result.frobenius_squared)
        held += [e.low <= truth <= e.high for e, truth in zip(found, true, strict=True)]
    return held / seeds


def nearly_dominant(dense: Tensor, size: int) -> Deflation:
    """Dominant eigenvectors as they come from an iteration that stopped at a few per cent."""
    eigenvalues, vectors = torch.linalg.eigh(dense)
    vectors = vectors[:, eigenvalues.abs().argsort(descending=True)[:size]]
    noise = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(0), dtype=dense.dtype)
    vectors = torch.linalg.qr(vectors + 0.03 * noise / len(dense) ** 0.5)[0].T.contiguous()
    return Deflation(vectors, vectors @ dense)


def projected(dense: Tensor, deflation: Deflation) -> Tensor:
    """PAP."""
    projector = torch.eye(len(dense), dtype=dense.dtype) - deflation.vectors.T @ deflation.vectors
    return projector @ dense @ projector


def signs(number: int, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (number, size), generator=generator).double() * 2 - 1


def cases(adaptive: float, *quick: str) -> list[ParameterSet]:
    """Matrices with a fixed number of probes and with as many as a tolerance takes; slow but for the quick ones."""
    return [
        pytest.param(
            name,
            tolerance,
            id=f"{name}-{kind}",
            marks=[] if f"{name}-{kind}" in quick else [pytest.mark.slow],
        )
        for name in ("network", "decaying", "bert")
        for kind, tolerance in (("fixed", NEVER), ("adaptive", adaptive))
    ]
