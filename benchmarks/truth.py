# SPDX-License-Identifier: Apache-2.0
"""What the estimates are judged by: both ends of the spectrum, the trace and the density, from long converged runs.

Eigenvalues by SciPy's ARPACK, with residuals computed apart from it; trace and density by plain sampling, written here
and not taken from the package. Each part is kept under `out/`, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from libraries import Ours, Products, Quadrature
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import eigsh
from scipy.stats import wasserstein_distance
from torch import Tensor
from workloads import CACHE, WorkloadName, load

from hf_optimizability.curvature.operators import HessianOperator


@dataclass(frozen=True)
class Effort:
    """How much to spend: probes of the trace; Lanczos runs of the density, their steps, and how many go at once."""

    probes: int
    runs: int
    steps: int
    at_once: int


EFFORT: dict[WorkloadName, Effort] = {
    "text": Effort(probes=400, runs=10, steps=60, at_once=2),  # two bases of 60 vectors are 11 GB
    "vision": Effort(probes=400, runs=10, steps=60, at_once=10),
    "decoder": Effort(probes=0, runs=0, steps=0, at_once=1),  # its products take too long for more than the ends
}
PROBES_AT_ONCE = 4
CONVERGED = 1e-3  # relative residual of a Ritz value that counts as an eigenvalue


class Run(NamedTuple):
    """A Lanczos run: Ritz values, their quadrature weights and their residuals."""

    nodes: np.ndarray
    weights: np.ndarray
    residuals: np.ndarray


@dataclass(frozen=True)
class Truth:
    """The long runs' results.

    Attributes:
        lambda_max: Largest eigenvalue.
        lambda_min: Smallest eigenvalue.
        residuals: `‖Hq − λq‖` of the largest and of the smallest.
        trace: The trace, where it was sampled.
        trace_std_error: Its standard error.
        density: Nodes and weights from all runs, as `sharpened` puts them together, where they were made.
        density_noise: Distance between the densities of half the runs and of the other half, as `distance` gives it.
    """

    lambda_max: float
    lambda_min: float
    residuals: tuple[float, float]
    trace: float | None
    trace_std_error: float | None
    density: Quadrature | None
    density_noise: float | None

    def distance(self, run: Quadrature) -> float:
        """Wasserstein-1 distance of a density to this one, as a share of the root mean square eigenvalue."""
        assert self.density is not None
        return _distance(run, self.density) / _root_mean_square(self.density)

    def summary(self) -> dict[str, Any]:
        """What goes into the results: everything but the nodes and weights."""
        return {name: value for name, value in vars(self).items() if name != "density"}


def truth(name: WorkloadName) -> Truth:
    """The long runs of a workload; takes hours where they have not been made yet."""
    effort = EFFORT[name]
    workload = load(name)
    hessian = Ours(workload.model, workload.batches, Products()).operator
    folder = CACHE / name / "truth"

    ends = _part(folder / "ends.json", partial(_ends, hessian))
    samples: list[float] = []
    for first in range(0, effort.probes, PROBES_AT_ONCE):
        samples += _part(folder / f"probes-{first}.json", partial(_samples, hessian, first))
    runs: list[Run] = []
    for first in range(0, effort.runs, effort.at_once):
        part = _part(folder / f"runs-{first}.json", partial(_runs, hessian, effort, first))
        runs += [Run(*(np.array(column) for column in columns)) for columns in part]
    density = sharpened(runs, hessian.size) if runs else None
    noise = None
    if density is not None:
        halves = [sharpened(half, hessian.size) for half in (runs[::2], runs[1::2])]
        noise = _distance(*halves) / _root_mean_square(density)
    return Truth(
        lambda_max=ends["lambda_max"],
        lambda_min=ends["lambda_min"],
        residuals=tuple(ends["residuals"]),
        trace=float(np.mean(samples)) if samples else None,
        trace_std_error=float(np.std(samples, ddof=1)) / math.sqrt(len(samples)) if samples else None,
        density=density,
        density_noise=noise,
    )


def pooled(runs: Sequence[Quadrature]) -> Quadrature:
    """The mean of several quadratures.

    Example:
        >>> one, other = Quadrature(np.array([1.0]), np.array([1.0])), Quadrature(np.array([3.0]), np.array([1.0]))
        >>> pooled([one, other])
        Quadrature(nodes=array([1., 3.]), weights=array([0.5, 0.5]))
    """
    nodes = np.concatenate([run.nodes for run in runs])
    weights = np.concatenate([run.weights / run.weights.sum() for run in runs])
    return Quadrature(nodes, weights / len(runs))


def sharpened(runs: Sequence[Run], size: int) -> Quadrature:
    """The mean of quadratures, but for the eigenvalues that all of them found, which have their true weight of 1/n.

    A random start vector gives an eigenvalue a random weight, whose square deviation is twice its square: were they
    left, the few large ones would blur the distance to any other density.

    Example:
        >>> runs = [Run(np.array([0.0, 9.0]), np.array([1 - w, w]), np.array([0.5, 0.0])) for w in (0.05, 0.3)]
        >>> density = sharpened(runs, 10)
        >>> density.nodes.tolist(), density.weights.round(2).tolist()
        ([9.0, 0.0, 0.0], [0.1, 0.45, 0.45])
    """
    converged = [run.nodes[run.residuals <= CONVERGED * np.abs(run.nodes)] for run in runs]
    common = np.array([node for node in converged[0] if all(_among(node, others) for others in converged)])
    nodes, weights = [common], [np.full(len(common), 1 / size)]
    for run in runs:
        rest = np.array([not _among(node, common) for node in run.nodes])
        nodes.append(run.nodes[rest])
        share = (1 - len(common) / size) / len(runs)
        weights.append(share * run.weights[rest] / run.weights[rest].sum())
    return Quadrature(np.concatenate(nodes), np.concatenate(weights))


def _among(node: float, others: np.ndarray) -> bool:
    return bool((np.abs(others - node) <= CONVERGED * abs(node)).any())


def _distance(one: Quadrature, other: Quadrature) -> float:
    return float(wasserstein_distance(one.nodes, other.nodes, one.weights, other.weights))


def _root_mean_square(run: Quadrature) -> float:
    return math.sqrt(run.nodes**2 @ run.weights)


def _part(file: Path, compute: Callable[[], Any]) -> Any:
    """A part of the truth, read if it was kept, else computed and kept."""
    if not file.exists():
        result = compute()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".new").write_text(json.dumps(result))
        file.with_suffix(".new").replace(file)
        print(f"{file.parent.parent.name}: {file.stem}", flush=True)
    return json.loads(file.read_text())


def _ends(hessian: HessianOperator) -> dict[str, Any]:
    start = np.random.default_rng(0).standard_normal(hessian.size, dtype=np.float32)
    values, vectors = eigsh(hessian.to_scipy(), k=2, which="BE", tol=1e-6, v0=start)
    residuals = []
    for value, vector in zip(values[::-1], vectors.T[::-1], strict=True):
        vector = torch.from_numpy(np.ascontiguousarray(vector))
        residuals.append(float((hessian.matvec(vector) - float(value) * vector).norm()))
    return {"lambda_max": float(values[1]), "lambda_min": float(values[0]), "residuals": residuals}


def _rademacher(size: int, number: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(1_000_003 + seed)  # far from the seeds of those that are judged
    return torch.randint(0, 2, (number, size), generator=generator, dtype=torch.int8).float().mul_(2).sub_(1)


def _samples(hessian: HessianOperator, seed: int) -> list[float]:
    probes = _rademacher(hessian.size, PROBES_AT_ONCE, seed)
    products = hessian.matmat(probes.T).T
    return [float((probe.double() * product).sum()) for probe, product in zip(probes, products, strict=True)]


def _runs(hessian: HessianOperator, effort: Effort, seed: int) -> list[list[list[float]]]:
    """What `Run` takes, of Lanczos runs in lockstep, each orthogonalized in full against its own basis."""
    basis = torch.empty(effort.at_once, effort.steps, hessian.size)
    vectors = _rademacher(hessian.size, effort.at_once, 500_000 + seed) / math.sqrt(hessian.size)
    diagonals, off_diagonals = np.empty((effort.at_once, effort.steps)), np.empty((effort.at_once, effort.steps))
    for step in range(effort.steps):
        basis[:, step] = vectors
        products = hessian.matmat(vectors.T).T
        diagonals[:, step] = (vectors.double() * products).sum(dim=1)
        for product, known in zip(products, basis[:, : step + 1], strict=True):
            for _ in range(2):
                product -= known.T @ (known @ product)
        off_diagonals[:, step] = products.double().norm(dim=1)
        vectors = products / products.norm(dim=1, keepdim=True)
    found = []
    for diagonal, off_diagonal in zip(diagonals, off_diagonals, strict=True):
        nodes, eigenvectors = eigh_tridiagonal(diagonal, off_diagonal[:-1])
        residuals = off_diagonal[-1] * np.abs(eigenvectors[-1])
        found.append([nodes.tolist(), (eigenvectors[0] ** 2).tolist(), residuals.tolist()])
    return found
