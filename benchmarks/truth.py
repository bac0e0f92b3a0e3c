# SPDX-License-Identifier: Apache-2.0
"""What the estimates are judged by: both ends of the spectrum, the trace and the density, from long float64 runs.

    python benchmarks/truth.py vision text decoder

Eigenvalues by SciPy's ARPACK, with residuals computed apart from it (where its basis does not fit into memory, by the
plain Lanczos recurrence); trace and density by plain sampling, written here and not taken from the package. The trace
is computed twice: by plain probes of the Hessian, and far sharper from the decoupled matrix, which has the same
diagonal, outside its dominant subspace; the results say whether they agree. The products are the package's, in
float64,
checked against double backward of the plain mean loss over all rows. Each part is kept under `out/`, so that what
was stopped
continues where it was.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from libraries import Quadrature, with_zeros
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import eigsh
from scipy.stats import wasserstein_distance
from torch import Tensor
from workloads import CACHE, WORKLOADS, Workload, WorkloadName, load

from hf_optimizability.curvature.compact_embeddings import drop_unused_embedding_rows
from hf_optimizability.curvature.hessian import HessianOperator
from hf_optimizability.curvature.layer_decoupled import DecoupledHessian
from hf_optimizability.model_state.measuring import math_attention, measuring
from hf_optimizability.objective.objective import Objective


@dataclass(frozen=True)
class Effort:
    """How much to spend.

    Attributes:
        probes: Probes of each trace.
        runs: Lanczos runs of the density.
        steps: Steps of each.
        at_once: How many of them go in lockstep.
        keeps_basis: Whether ARPACK's 20 vectors fit into memory.
    """

    probes: int
    runs: int
    steps: int
    at_once: int
    keeps_basis: bool = True


EFFORT: dict[WorkloadName, Effort] = {
    "text": Effort(probes=40, runs=2, steps=40, at_once=1),  # a basis is 3.5 GB
    "vision": Effort(probes=64, runs=2, steps=40, at_once=2),
    # Its products take too long for more than the ends.
    "decoder": Effort(probes=0, runs=0, steps=0, at_once=1, keeps_basis=False),
}
PROBES_AT_ONCE = 4
SUBSPACE = 16  # dimensions of the decoupled matrix that are treated exactly
CONVERGED = 1e-3  # relative residual of a Ritz value that counts as an eigenvalue
EIGENVALUE_TOLERANCE = 1e-5
MAX_STEPS = 200  # of the plain recurrence
EXACT = 1e-5  # relative difference allowed between two ways to one product; a decoder takes its loss in float32


class Run(NamedTuple):
    """A Lanczos run: Ritz values, their quadrature weights and their residuals."""

    nodes: np.ndarray
    weights: np.ndarray
    residuals: np.ndarray


@dataclass(frozen=True)
class Mean:
    """An average and its standard error."""

    value: float
    std_error: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Mean:
        """Return the mean of independent samples."""
        return cls(float(np.mean(samples)), float(np.std(samples, ddof=1)) / math.sqrt(len(samples)))

    def agrees(self, other: Mean) -> bool:
        """Whether the difference is within 3 standard errors.

        Example:
            >>> Mean(10.0, 1.0).agrees(Mean(12.9, 0.0)), Mean(10.0, 1.0).agrees(Mean(13.1, 0.0))
            (True, False)
        """
        return abs(self.value - other.value) <= 3 * math.hypot(self.std_error, other.std_error)


@dataclass(frozen=True)
class Truth:
    """The long runs' results.

    Attributes:
        lambda_max: Largest eigenvalue.
        lambda_min: Smallest eigenvalue.
        residuals: `‖Hq − λq‖` of the largest and of the smallest.
        trace: The trace, from the decoupled matrix, where it was sampled.
        plain_trace: The same from the Hessian itself.
        density: Nodes and weights from all runs, as `sharpened` puts them together, where they were made.
        density_noise: Distance between the densities of half the runs and of the other half, as `distance` gives it.
    """

    lambda_max: float
    lambda_min: float
    residuals: tuple[float, float] = (0.0, 0.0)
    trace: Mean | None = None
    plain_trace: Mean | None = None
    density: Quadrature | None = None
    density_noise: float | None = None

    def distance(self, run: Quadrature) -> float:
        """Wasserstein-1 distance of a density to this one, as a share of λ_max, each weighted by squared eigenvalues.

        So it tells where on the axis ‖H‖_F² lies. Unweighted, the distance would be that between the places of the
        bulk next to zero, which 40 Lanczos steps do not find: on MobileNetV2 two halves of the long runs differed as
        much as one of them from a density that is all at zero.
        """
        assert self.density is not None
        return _distance(run, self.density) / self.lambda_max

    def summary(self) -> dict[str, Any]:
        """Return what the results contain: everything except nodes and weights."""
        agree = self.trace and self.plain_trace and self.trace.agrees(self.plain_trace)
        return {name: value for name, value in asdict(self).items() if name != "density"} | {"traces_agree": agree}


def truth(name: WorkloadName) -> Truth:
    """Return the reference values of a workload; takes hours if the long runs have not been made yet."""
    with ExitStack() as held:
        return _truth(EFFORT[name], CACHE / name / "truth", _Exact(name, held))


def _truth(effort: Effort, folder: Path, exact: _Exact) -> Truth:
    check = _part(folder / "check.json", exact.check)
    ends = _part(folder / "ends.json", exact.ends if effort.keeps_basis else exact.ends_without_basis)
    runs: list[Run] = []
    for first in range(0, effort.runs, effort.at_once):
        part = _part(folder / f"runs-{first}.json", partial(exact.runs, effort, first))
        runs += [Run(*(np.array(column) for column in columns)) for columns in part]
    traces = []
    for matrix, sample in (("decoupled", exact.decoupled_samples), ("hessian", exact.hessian_samples)):
        samples: list[float] = []
        for first in range(0, effort.probes, PROBES_AT_ONCE):
            samples += _part(folder / f"{matrix}-{first}.json", partial(sample, first))
        traces.append(Mean.of(samples) if samples else None)
    density, noise = None, None
    if runs:
        density, *halves = (
            with_zeros(sharpened(some, check["size"]), check["left_out"] / (check["size"] + check["left_out"]))
            for some in (runs, runs[::2], runs[1::2])
        )
        noise = _distance(*halves) / ends["lambda_max"]
    return Truth(
        lambda_max=ends["lambda_max"],
        lambda_min=ends["lambda_min"],
        residuals=tuple(ends["residuals"]),
        trace=traces[0],
        plain_trace=traces[1],
        density=density,
        density_noise=noise,
    )


def pooled(runs: Sequence[Quadrature]) -> Quadrature:
    """Return the mean of several quadratures.

    Example:
        >>> one, other = Quadrature(np.array([1.0]), np.array([1.0])), Quadrature(np.array([3.0]), np.array([1.0]))
        >>> pooled([one, other])
        Quadrature(nodes=array([1., 3.]), weights=array([0.5, 0.5]))
    """
    nodes = np.concatenate([run.nodes for run in runs])
    weights = np.concatenate([run.weights / run.weights.sum() for run in runs])
    return Quadrature(nodes, weights / len(runs))


def sharpened(runs: Sequence[Run], size: int) -> Quadrature:
    """Average quadratures, except for the eigenvalues that all of them found, which have their true weight of 1/n.

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
    shares = (run.weights * run.nodes**2 for run in (one, other))
    return float(wasserstein_distance(one.nodes, other.nodes, *shares))


def _part(file: Path, compute: Callable[[], Any]) -> Any:
    """Read a part of the truth, or compute and save it."""
    if not file.exists():
        result = compute()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".new").write_text(json.dumps(result))
        file.with_suffix(".new").replace(file)
        print(f"{file.parent.parent.name}: {file.stem}", flush=True)
    return json.loads(file.read_text())


class _Exact:
    """The Hessian of a workload in float64, without rows of zeros, loaded when the first part asks for it.

    Not under `CheapSecondDerivatives`, whose memory format makes depthwise convolutions slow in float64.
    """

    def __init__(self, name: WorkloadName, held: ExitStack):
        self._name = name
        self._held = held

    @cached_property
    def hessian(self) -> HessianOperator:
        """The Hessian itself."""
        return HessianOperator(self._objective)

    @cached_property
    def decoupled(self) -> DecoupledHessian:
        """The matrix with its diagonal, whose other entries are smaller."""
        return DecoupledHessian(self._objective)

    @cached_property
    def _objective(self) -> Objective:
        workload = in_float64(load(self._name))
        objective = Objective(workload.model, workload.batches)
        self._held.enter_context(measuring(workload.model, seed=0))
        self._held.enter_context(math_attention())
        self._held.enter_context(drop_unused_embedding_rows(objective))
        return objective

    def check(self) -> dict[str, Any]:
        """Compare a product with that of plain double backward over all rows, along a function of the weights.

        Such a vector is the same with and without the rows that are left out: equal norms and equal vᵀHv show that
        these are zero.
        """
        workload = in_float64(load(self._name, attention="eager"))
        expected = _fingerprint(workload.parameters, lambda vector: plain_product(workload, vector))
        found = _fingerprint(self._objective.parameters, self.hessian.matvec)
        difference = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
        if difference > EXACT:
            raise RuntimeError(f"The products of {self._name} differ by {difference:.1g}: {found}, not {expected}.")
        size = self.hessian.size
        return {"size": size, "left_out": workload.size - size, "difference": difference}

    def ends(self) -> dict[str, Any]:
        """Both ends of the spectrum."""
        start = np.random.default_rng(0).standard_normal(self.hessian.size)
        values, vectors = eigsh(self.hessian.to_scipy(), k=2, which="BE", tol=EIGENVALUE_TOLERANCE, v0=start)
        residuals = []
        for value, vector in zip(values[::-1], vectors.T[::-1], strict=True):
            vector = torch.from_numpy(np.ascontiguousarray(vector))
            residuals.append(float((self.hessian.matvec(vector) - float(value) * vector).norm()))
        return {"lambda_max": float(values[1]), "lambda_min": float(values[0]), "residuals": residuals}

    def ends_without_basis(self) -> dict[str, Any]:
        """Both ends by the three-term recurrence, with its own residual bounds (Golub & Van Loan, section 10.1).

        Without a basis the vectors lose orthogonality, which brings copies of eigenvalues, but no wrong ones (Paige).
        """
        generator = torch.Generator().manual_seed(0)
        vector = torch.randn(self.hessian.size, generator=generator, dtype=torch.float64)
        vector /= vector.norm()
        before = torch.zeros_like(vector)
        diagonal: list[float] = []
        off_diagonal = [0.0]
        for _ in range(MAX_STEPS):
            product = self.hessian.matvec(vector)
            product.add_(before, alpha=-off_diagonal[-1])
            diagonal.append(float(vector @ product))
            product.add_(vector, alpha=-diagonal[-1])
            off_diagonal.append(float(product.norm()))
            before, vector = vector, product.div_(off_diagonal[-1])
            values, vectors = eigh_tridiagonal(diagonal, off_diagonal[1:-1])
            ends = [-1, 0]
            residuals = off_diagonal[-1] * np.abs(vectors[-1, ends])
            if len(diagonal) > 1 and (residuals <= CONVERGED * np.abs(values[ends])).all():
                return {"lambda_max": values[-1], "lambda_min": values[0], "residuals": residuals.tolist()}
        raise RuntimeError(f"The ends of the spectrum of {self._name} are not known after {MAX_STEPS} products.")

    def hessian_samples(self, seed: int) -> list[float]:
        """Return samples of vᵀHv."""
        probes = _rademacher(self.hessian.size, PROBES_AT_ONCE, seed)
        return _directional_curvature(probes, self.hessian.matmat(probes.T).T).tolist()

    def decoupled_samples(self, seed: int) -> list[float]:
        """Sample with mean tr D for the decoupled matrix D: `tr QDQᵀ + vᵀPDPv` with P = I − QᵀQ."""
        subspace, known = self._subspace
        probes = _rademacher(self.decoupled.size, PROBES_AT_ONCE, seed)
        probes -= (probes @ subspace.T) @ subspace
        return (known + _directional_curvature(probes, self.decoupled.matmat(probes.T).T)).tolist()

    @cached_property
    def _subspace(self) -> tuple[Tensor, float]:
        """Orthonormal rows Q that span D times random vectors, and tr QDQᵀ; as in Hutch++ (arXiv 2010.09649)."""
        vectors = _rademacher(self.decoupled.size, SUBSPACE, 900_000)
        for rows in vectors.split(PROBES_AT_ONCE):
            rows.copy_(self.decoupled.matmat(rows.T).T)
        for _ in range(2):  # Cholesky QR, once more for the rounding
            vectors = torch.linalg.solve_triangular(torch.linalg.cholesky(vectors @ vectors.T), vectors, upper=False)
        products = (self.decoupled.matmat(rows.T).T for rows in vectors.split(PROBES_AT_ONCE))
        known = sum(
            float(_directional_curvature(rows, some).sum())
            for rows, some in zip(vectors.split(PROBES_AT_ONCE), products, strict=True)
        )
        return vectors, known

    def runs(self, effort: Effort, seed: int) -> list[list[list[float]]]:
        """Return the arguments of `Run`, from Lanczos runs in lockstep, each fully orthogonalized in its basis."""
        size, number = self.hessian.size, effort.at_once
        basis = torch.empty(number, effort.steps, size, dtype=torch.float64)
        vectors = _rademacher(size, number, 500_000 + seed) / math.sqrt(size)
        diagonals, off_diagonals = np.empty((number, effort.steps)), np.empty((number, effort.steps))
        for step in range(effort.steps):
            basis[:, step] = vectors
            products = self.hessian.matmat(vectors.T).T
            diagonals[:, step] = _directional_curvature(vectors, products)
            for product, known in zip(products, basis[:, : step + 1], strict=True):
                for _ in range(2):
                    product -= known.T @ (known @ product)
            off_diagonals[:, step] = products.norm(dim=1)
            vectors = products / products.norm(dim=1, keepdim=True)
        found = []
        for diagonal, off_diagonal in zip(diagonals, off_diagonals, strict=True):
            nodes, eigenvectors = eigh_tridiagonal(diagonal, off_diagonal[:-1])
            residuals = off_diagonal[-1] * np.abs(eigenvectors[-1])
            found.append([nodes.tolist(), (eigenvectors[0] ** 2).tolist(), residuals.tolist()])
        return found


def in_float64(workload: Workload) -> Workload:
    """Convert the workload, its model and its batches' floating-point tensors to double precision."""
    batches = [
        {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
        for batch in workload.batches
    ]
    return Workload(workload.name, workload.model.double(), batches)


def plain_product(workload: Workload, vector: Tensor) -> Tensor:
    """`H v` of the mean over batches of the model's own loss, by double backward and nothing else."""
    total = torch.zeros_like(vector)
    for batch in workload.batches:
        gradient = torch.autograd.grad(
            workload.model(**batch).loss, workload.parameters, create_graph=True, materialize_grads=True
        )
        along = torch.cat([piece.flatten() for piece in gradient]) @ vector
        total += torch.cat(
            [piece.flatten() for piece in torch.autograd.grad(along, workload.parameters, materialize_grads=True)]
        )
    return total / len(workload.batches)


def _fingerprint(parameters: Sequence[Tensor], multiply: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """`vᵀHv` and `‖Hv‖` along a vector that is a function of each parameter."""
    vector = torch.cat([torch.sin(1e4 * parameter.detach()).flatten() for parameter in parameters])
    product = multiply(vector)
    return float(vector @ product), float(product.norm())


def _directional_curvature(vectors: Tensor, products: Tensor) -> Tensor:
    """Return the dot product of each row with its product."""
    return (vectors * products).sum(dim=1)


def _rademacher(size: int, number: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(1_000_003 + seed)  # far from the seeds of those that are judged
    return torch.randint(0, 2, (number, size), generator=generator, dtype=torch.int8).double().mul_(2).sub_(1)


def main() -> None:
    """Compute the long runs of the named workloads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="+", choices=WORKLOADS)
    for name in parser.parse_args().workloads:
        print(json.dumps({name: truth(name).summary()}, indent=1), flush=True)


if __name__ == "__main__":
    main()
