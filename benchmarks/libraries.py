# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: D102 -- what the methods of the adapters do is documented once, in `Library`
"""One face for this package and its peers: the Hessian of the same loss, estimated as each library's documents say.

Each adapter feeds its library in the form it asks for and counts the Hessian-vector products it makes. Nothing else is
added: no estimator here is anybody's but the library's own.
"""

from __future__ import annotations

import importlib
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_optimizability import OptimizabilityConfig, measure
from hf_optimizability.curvature.compact_embeddings import drop_unused_embedding_rows
from hf_optimizability.curvature.empirical_risk import HvpCounter
from hf_optimizability.curvature.gauss_newton import split_trace
from hf_optimizability.curvature.hessian import HessianOperator
from hf_optimizability.curvature.twice_differentiable import CheapSecondDerivatives
from hf_optimizability.linalg.density import density
from hf_optimizability.linalg.lanczos import lanczos
from hf_optimizability.linalg.operator import SymmetricOperator
from hf_optimizability.model_state.measuring import math_attention, measuring
from hf_optimizability.objective.objective import Objective


Batch = dict[str, Tensor]
PROBE_BLOCK_SIZE = 4
MIN_PROBES = 8
LANCZOS_STEPS = 30
SEED = 0


class OutOfTimeError(Exception):
    """The row has had its time."""


class NotOfferedError(Exception):
    """The library has no such estimator."""


@dataclass
class Products:
    """Counts Hessian-vector products, with the time at which each ended, and stops what takes too long.

    Attributes:
        seconds: How long may pass between `restart` and a product.
        announce: Whether to print the count, for a parent process to know it where this one is ended.
        ended: When each product ended, in seconds since the row began.
    """

    seconds: float = math.inf
    announce: bool = False
    ended: list[float] = field(default_factory=list)
    _started: float = field(default_factory=time.perf_counter)
    _restarted: float = 0.0

    def restart(self) -> None:
        """Count all further time, not only that of products."""
        self._restarted = self.now()

    def add(self, number: int = 1) -> None:
        """Record `number` products that just ended.

        Raises:
            OutOfTimeError: If the time is up.
        """
        self.ended += [self.now()] * number
        if self.announce:
            print(json.dumps({"hvps": len(self.ended)}), flush=True)
        if self.now() - self._restarted > self.seconds:
            raise OutOfTimeError

    def now(self) -> float:
        """Seconds since the row began."""
        return time.perf_counter() - self._started


class HvpEngine(NamedTuple):
    """How products are computed: `build()` prepares and returns the action for `columns` vectors."""

    name: str
    columns: int
    build: Callable[[], Callable[[], object]]


class Call(NamedTuple):
    """A call as a user would write it, and what it finds.

    That is `lambda_max` and `lambda_min`, `trace` and `std_error`, or `nodes` and `weights`, as far as it gives them.
    `planned` is the number of products that it will make, where that is fixed beforehand.
    """

    text: str
    run: Callable[[], dict[str, Any]]
    planned: int | None = None


class Ends(NamedTuple):
    """Estimates of both ends of the spectrum after so many products of one run."""

    run: str
    hvps: int
    seconds: float
    lambda_max: float
    lambda_min: float | None


class Quadrature(NamedTuple):
    """One Lanczos run from a random start: Ritz values and the share of the spectrum that each stands for."""

    nodes: np.ndarray
    weights: np.ndarray


class Library(ABC):
    """A library's Hessian of one loss.

    Args:
        model: A Transformers model.
        batches: Batches as its data collator gives them: dicts with labels.
        products: Where to count.
    """

    package: ClassVar[str]
    one_batch: ClassVar[bool] = False
    """Whether it is fastest where the whole probe set is one batch."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch], products: Products):
        self.model = model
        self.batches = batches
        self.products = products
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.size = sum(parameter.numel() for parameter in self.parameters)

    @abstractmethod
    def product(self, vector: Tensor) -> Tensor:
        """`H v` for a vector of shape (n,)."""

    @classmethod
    def product_as_given(cls, model: nn.Module, batches: Sequence[Batch], vector: Tensor) -> Tensor:
        """`H v` where the library is handed the model and its dict batches as they are."""
        return cls(model, batches, Products()).product(vector)

    @abstractmethod
    def ways(self, vectors: Tensor) -> Iterator[HvpEngine]:
        """Yield the engines for products with the columns of a matrix of shape (n, LOCKSTEP)."""

    @abstractmethod
    def card(self) -> list[Call]:
        """Return the calls for both ends, trace and density, with all options at their defaults."""

    @abstractmethod
    def ends(self) -> Iterator[Ends]:
        """Run towards λ_max and λ_min; yield both after each product where the library exposes them."""

    @abstractmethod
    def trace_sample(self) -> float:
        """One sample of vᵀHv."""

    @abstractmethod
    def quadrature(self, steps: int) -> Quadrature:
        """One run of stochastic Lanczos quadrature."""

    def density_after(self, run: Quadrature, steps: int) -> Quadrature:
        """Return the quadrature that the library computes from the first steps of a run."""
        return shortened(run, steps)

    def _ends_by_steps(self, run: str, quadrature: Callable[[int], Quadrature]) -> Iterator[Ends]:
        """Yield both ends after each step of a Lanczos run, which may take fewer steps than requested."""
        first, started = len(self.products.ended), self.products.now()
        found = quadrature(LANCZOS_STEPS)
        for hvps in range(1, len(found.nodes) + 1):
            nodes = shortened(found, hvps).nodes
            seconds = self.products.ended[first + hvps - 1] - started
            yield Ends(run, hvps, seconds, float(nodes.max()), float(nodes.min()))

    def trace_to(self, tolerances: Sequence[float]) -> Iterator[dict[str, Any]]:
        """Sample until the standard error is below each tolerance times the mean, as no peer stops by its own.

        Yields:
            `tolerance`, `trace`, `std_error`, `hvps` and `seconds` so far; where time runs out, what is to be expected
            of both too, as `expected_hvps` and `expected_seconds`.
        """
        samples: list[float] = []
        started = self.products.now()
        for tolerance in tolerances:
            found: dict[str, Any] = {"tolerance": tolerance}
            try:
                while len(samples) < MIN_PROBES or _std_error(samples) > tolerance * abs(float(np.mean(samples))):
                    samples.append(self.trace_sample())
            except OutOfTimeError:
                if len(samples) < MIN_PROBES:
                    raise
                missing = (_std_error(samples) / (tolerance * float(np.mean(samples)))) ** 2
                found["expected_hvps"] = math.ceil(len(samples) * missing)
                found["expected_seconds"] = missing * (self.products.now() - started)
            yield {
                **found,
                "trace": float(np.mean(samples)),
                "std_error": _std_error(samples),
                "hvps": len(samples),
                "seconds": self.products.now() - started,
            }


def _std_error(samples: Sequence[float]) -> float:
    return float(np.std(samples, ddof=1)) / math.sqrt(len(samples))


class Ours(Library):
    """This package: its estimators on the operators that `measure` builds, and `measure` itself for the whole card."""

    package = "hf-optimizability"
    one_batch = True

    def __init__(self, model: nn.Module, batches: Sequence[Batch], products: Products):
        super().__init__(model, batches, products)
        self._objective = Objective(model, batches)

    def product(self, vector: Tensor) -> Tensor:
        with self._twice_differentiable():
            return self._hessian().matvec(vector)

    def ways(self, vectors: Tensor) -> Iterator[HvpEngine]:
        def kept() -> Callable[[], object]:
            hessian = self._hessian()
            multiply(hessian, vectors[:, :1])  # shows that there is one part, whose graph is kept from the next on
            return lambda: multiply(hessian, vectors[:, :1])

        def multiply(hessian: SymmetricOperator, columns: Tensor) -> Tensor:
            with self._twice_differentiable():
                return hessian.matmat(columns)

        yield HvpEngine("one, graph kept", 1, kept)
        yield HvpEngine("one", 1, lambda: lambda: multiply(self._hessian(), vectors[:, :1]))
        yield HvpEngine("four at once", PROBE_BLOCK_SIZE, lambda: lambda: multiply(self._hessian(), vectors))

    def card(self) -> list[Call]:
        return [Call("measure(model, batches)", self._measure)]

    def ends(self) -> Iterator[Ends]:
        yield from self._ends_by_steps("lanczos", lambda steps: self._quadrature(steps)[0])

    def trace_sample(self) -> float:
        raise NotOfferedError("probes go in lockstep")

    def trace_to(self, tolerances: Sequence[float]) -> Iterator[dict[str, Any]]:
        for tolerance in tolerances:
            started = self.products.now()
            with self._twice_differentiable(), drop_unused_embedding_rows(self._objective):
                everything = [[slice(0, sum(parameter.numel() for parameter in self._objective.parameters))]]
                options: dict[str, Any] = {"tolerance": tolerance, "max_hvps": 4000, "seed": SEED}
                total = split_trace(self._counted(), everything, **options).total
            yield {
                "tolerance": tolerance,
                "trace": total.value,
                "std_error": total.std_error,
                "hvps": total.hvps,
                "seconds": self.products.now() - started,
            }

    def quadrature(self, steps: int) -> Quadrature:
        run, left_out = self._quadrature(steps)
        return with_zeros(run, left_out / self.size)

    def density_after(self, run: Quadrature, steps: int) -> Quadrature:
        short = super().density_after(run, steps)
        if not 3 <= steps < len(run.nodes):
            return short
        options: dict[str, Any] = {"size": self.size, "hvps": steps, "tolerance": 0.1}
        found = density(short.nodes, short.weights[None], residuals(run, steps), **options)
        return Quadrature(np.array(found.nodes), np.array(found.weights))

    def _quadrature(self, steps: int) -> tuple[Quadrature, int]:
        """Return the quadrature of the rows in use, and the number of other rows."""
        with self._twice_differentiable(), drop_unused_embedding_rows(self._objective) as used:
            run = lanczos(self._hessian(), tolerance=0, max_hvps=steps, seed=len(self.products.ended))
        return Quadrature(run.nodes, run.weights[0]), used.left_out

    @contextmanager
    def _twice_differentiable(self) -> Iterator[None]:
        with measuring(self.model, seed=SEED), math_attention(), CheapSecondDerivatives():
            yield

    def _hessian(self) -> HessianOperator:
        return HessianOperator(self._counted())

    def _counted(self) -> Objective:
        return self._objective.counting(HvpCounter(self.products.add))

    def _measure(self) -> dict[str, Any]:
        found = measure(self.model, self.batches, OptimizabilityConfig())
        hessian = found.hessian
        assert hessian.lambda_min is not None and hessian.density is not None
        self.products.add(found.hvps)
        return {
            "lambda_max": hessian.lambda_max.value,
            "lambda_min": hessian.lambda_min.value,
            "trace": hessian.trace.value,
            "std_error": hessian.trace.std_error,
            "nodes": hessian.density.nodes,
            "weights": hessian.density.weights,
        }


class PyHessian(Library):
    """PyHessian: takes pairs of one input tensor and targets, and keeps the graph of a single batch."""

    package = "pyhessian"
    one_batch = True

    def __init__(self, model: nn.Module, batches: Sequence[Batch], products: Products):
        super().__init__(model, batches, products)
        self._module = importlib.import_module("pyhessian.hessian")
        self._logits = _Logits(model)
        self._pairs = [(_one_tensor(batch), _targets(batch)) for batch in batches]
        one = len(self._pairs) == 1
        self._hessian = self._build(data=self._pairs[0]) if one else self._build(dataloader=self._pairs)

    @classmethod
    def product_as_given(cls, model: nn.Module, batches: Sequence[Batch], vector: Tensor) -> Tensor:
        module = importlib.import_module("pyhessian.hessian")
        hessian = module.hessian(model, lambda outputs, _: outputs.loss, data=batches[0], cuda=False)
        pieces = _pieces(vector, hessian.params)
        return torch.cat([p.flatten() for p in module.hessian_vector_product(hessian.gradsH, hessian.params, pieces)])

    def _build(self, **data: Any) -> Any:
        self.model.zero_grad()  # it would take gradients that are there for part of its own
        return self._module.hessian(self._logits, cross_entropy, cuda=False, **data)

    @contextmanager
    def _counting(self) -> Iterator[list[float]]:
        """Count the products made inside; collect their Rayleigh quotients, the estimates of power iteration."""
        quotients: list[float] = []
        kept, rebuilt = self._module.hessian_vector_product, self._hessian.dataloader_hv_product

        def from_kept_graph(gradients: Any, parameters: Any, vector: Any) -> Any:
            product = kept(gradients, parameters, vector)
            quotients.append(float(self._module.group_product(product, vector)))
            self.products.add()
            return product

        def over_batches(vector: Any) -> Any:
            quotient, product = rebuilt(vector)
            quotients.append(quotient)
            self.products.add()
            return quotient, product

        with (
            mock.patch.object(self._module, "hessian_vector_product", from_kept_graph),
            mock.patch.object(self._hessian, "dataloader_hv_product", over_batches),
        ):
            yield quotients

    def product(self, vector: Tensor) -> Tensor:
        pieces = _pieces(vector, self.parameters)
        if self._hessian.full_dataset:
            _, product = self._hessian.dataloader_hv_product(pieces)
        else:
            product = self._module.hessian_vector_product(self._hessian.gradsH, self._hessian.params, pieces)
        return torch.cat([piece.flatten() for piece in product])

    def ways(self, vectors: Tensor) -> Iterator[HvpEngine]:
        pieces = _pieces(vectors[:, 0].contiguous(), self.parameters)

        def kept() -> Callable[[], object]:
            hessian = self._build(data=self._pairs[0])
            return lambda: self._module.hessian_vector_product(hessian.gradsH, hessian.params, pieces)

        def rebuilt() -> Callable[[], object]:
            hessian = self._build(dataloader=self._pairs)
            return lambda: hessian.dataloader_hv_product(pieces)

        self._hessian = None
        yield HvpEngine("one, graph kept", 1, kept)
        yield HvpEngine("one", 1, rebuilt)

    def card(self) -> list[Call]:
        return [
            Call("hessian.eigenvalues()", lambda: {"lambda_max": self._run("eigenvalues")[0][0]}),
            Call("hessian.trace()", lambda: {"trace": float(np.mean(self._run("trace")))}),
            Call("hessian.density()", self._density, planned=100),
        ]

    def ends(self) -> Iterator[Ends]:
        first, started = len(self.products.ended), self.products.now()
        try:
            with self._counting() as quotients:
                self._hessian.eigenvalues(maxIter=60, tol=0.0)
        finally:
            for hvps, quotient in enumerate(quotients, start=1):
                seconds = self.products.ended[first + hvps - 1] - started
                yield Ends("power iteration", hvps, seconds, quotient, None)

    def trace_sample(self) -> float:
        return self._run("trace", maxIter=1)[0]

    def quadrature(self, steps: int) -> Quadrature:
        found = self._density(iter=steps)
        return Quadrature(np.array(found["nodes"]), np.array(found["weights"]))

    def _run(self, method: str, **options: Any) -> Any:
        with self._counting():
            return getattr(self._hessian, method)(**options)

    def _density(self, **options: Any) -> dict[str, Any]:
        [nodes], [weights] = self._run("density", **options)
        return {"nodes": nodes, "weights": weights}


class HessianEigenthings(Library):
    """hessian-eigenthings: takes dict batches and the model's own loss; means over batches, not over items."""

    package = "hessian-eigenthings"

    def __init__(self, model: nn.Module, batches: Sequence[Batch], products: Products):
        super().__init__(model, batches, products)
        self._package = importlib.import_module("hessian_eigenthings")
        self._operator = self._package.HessianOperator(model, batches, self._package.hf_lm_loss())
        self._runs = 0
        matvec = self._operator.matvec

        def counted(vector: Tensor) -> Tensor:
            product = matvec(vector)
            products.add()
            return product

        self._operator.matvec = counted

    def product(self, vector: Tensor) -> Tensor:
        return self._operator.matvec(vector)

    def ways(self, vectors: Tensor) -> Iterator[HvpEngine]:
        vector = vectors[:, 0].contiguous()
        yield HvpEngine("one", 1, lambda: lambda: self._operator.matvec(vector))

    def card(self) -> list[Call]:
        package, operator = self._package, self._operator

        def eigenvalues() -> dict[str, Any]:
            found = package.lanczos(operator, seed=SEED)
            return {"lambda_max": float(found.eigenvalues.max()), "lambda_min": float(found.eigenvalues.min())}

        def trace() -> dict[str, Any]:
            found = package.trace(operator, seed=SEED)
            return {"trace": found.estimate, "std_error": found.stderr}

        def density() -> dict[str, Any]:
            found = package.spectral_density(operator, seed=SEED)
            weights = found.raw_weights.flatten() / len(found.raw_weights)
            return {"nodes": found.raw_eigenvalues.flatten().tolist(), "weights": weights.tolist()}

        return [
            Call("lanczos(operator)", eigenvalues, planned=20),
            Call("trace(operator)", trace, planned=100),
            Call("spectral_density(operator)", density, planned=800),
        ]

    def ends(self) -> Iterator[Ends]:
        yield from self._ends_by_steps("lanczos_tridiagonal", self.quadrature)

    def trace_sample(self) -> float:
        self._runs += 1
        return self._package.hutchinson(self._operator, num_samples=1, seed=self._runs).estimate

    def quadrature(self, steps: int) -> Quadrature:
        self._runs += 1
        generator = torch.Generator().manual_seed(self._runs)
        start = torch.randint(0, 2, (self.size,), generator=generator).float().mul_(2).sub_(1)
        run = self._package.lanczos_tridiagonal(self._operator, start, steps)
        nodes, vectors = eigh_tridiagonal(run.alphas.double().numpy(), run.betas.double().numpy())
        return Quadrature(nodes, vectors[0] ** 2)


class Curvlinops(Library):
    """curvlinops: takes pairs of inputs, which may be a dict, and targets; eigenvalues by SciPy, as it advises."""

    package = "curvlinops-for-pytorch"

    def __init__(self, model: nn.Module, batches: Sequence[Batch], products: Products):
        super().__init__(model, batches, products)
        self._package = importlib.import_module("curvlinops")
        pairs = [({k: v for k, v in batch.items() if k != "labels"}, _targets(batch)) for batch in batches]

        class Counting(self._package.HessianLinearOperator):  # type: ignore[misc,name-defined]
            def _matmat(self, columns: list[Tensor]) -> list[Tensor]:
                result = super()._matmat(columns)
                products.add(columns[0].shape[-1])
                return result

        self._operator = Counting(
            _Logits(model),
            nn.CrossEntropyLoss(),
            self.parameters,
            pairs,
            batch_size_fn=_examples,
        )

    @classmethod
    def product_as_given(cls, model: nn.Module, batches: Sequence[Batch], vector: Tensor) -> Tensor:
        package = importlib.import_module("curvlinops")
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        loss = nn.CrossEntropyLoss()
        return package.HessianLinearOperator(model, loss, parameters, batches, batch_size_fn=_examples) @ vector

    def product(self, vector: Tensor) -> Tensor:
        return self._operator @ vector

    def ways(self, vectors: Tensor) -> Iterator[HvpEngine]:
        vector = vectors[:, 0].contiguous()
        yield HvpEngine("one", 1, lambda: lambda: self._operator @ vector)
        yield HvpEngine("four at once", PROBE_BLOCK_SIZE, lambda: lambda: self._operator @ vectors)

    def card(self) -> list[Call]:
        def trace() -> dict[str, Any]:
            return {"trace": float(np.mean([self.trace_sample() for _ in range(100)]))}

        def density() -> dict[str, Any]:
            run = self.quadrature(128)
            return {"nodes": run.nodes.tolist(), "weights": run.weights.tolist()}

        return [
            Call('eigsh(A.to_scipy(), k=2, which="BE")', self._eigsh),
            Call("hutchinson_trace(A, num_matvecs=1), 100 times", trace, planned=100),
            Call("fast_lanczos(A, ncv=128)", density, planned=128),
        ]

    def ends(self) -> Iterator[Ends]:
        for tolerance in (1e-1, 1e-2, 1e-3):
            first, started = len(self.products.ended), self.products.now()
            found = self._eigsh(tol=tolerance)
            hvps, seconds = len(self.products.ended) - first, self.products.now() - started
            yield Ends(f"eigsh, tol={tolerance}", hvps, seconds, found["lambda_max"], found["lambda_min"])

    def trace_sample(self) -> float:
        return float(self._package.hutchinson_trace(self._operator, num_matvecs=1))

    def quadrature(self, steps: int) -> Quadrature:
        spectrum = importlib.import_module("curvlinops.papyan2020traces.spectrum")
        nodes, vectors = spectrum.fast_lanczos(self._operator, steps)
        return Quadrature(nodes.double().numpy(), vectors[0].double().numpy() ** 2)

    def _eigsh(self, **options: Any) -> dict[str, Any]:
        start = np.random.default_rng(SEED).standard_normal(self.size, dtype=np.float32)
        low, high = eigsh(self._operator.to_scipy(), k=2, which="BE", v0=start, return_eigenvectors=False, **options)
        return {"lambda_max": float(high), "lambda_min": float(low)}


LIBRARIES: dict[str, type[Library]] = {
    "ours": Ours,
    "pyhessian": PyHessian,
    "hessian_eigenthings": HessianEigenthings,
    "curvlinops": Curvlinops,
}


def shortened(run: Quadrature, steps: int) -> Quadrature:
    """Return the quadrature of a Lanczos run of fewer steps from the same start.

    The nodes and weights of a run determine its tridiagonal matrix (Golub & Meurant, Matrices, Moments and Quadrature,
    section 5.1): that of the Lanczos process on the nodes, started from the roots of the weights.

    Example:
        >>> whole = Quadrature(np.array([1.0, 2.0, 4.0]), np.array([0.5, 0.25, 0.25]))
        >>> shortened(whole, 1).nodes, np.allclose(shortened(whole, 3).nodes, whole.nodes)
        (array([2.]), True)
    """
    diagonal, off_diagonal = _tridiagonal(run, steps)
    nodes, vectors = eigh_tridiagonal(diagonal, off_diagonal[:-1])
    return Quadrature(nodes, vectors[0] ** 2)


def residuals(run: Quadrature, steps: int) -> np.ndarray:
    """`‖Aq − θq‖` of the Ritz pairs after fewer steps than the run has.

    Example:
        >>> whole = Quadrature(np.array([1.0, 3.0]), np.array([0.5, 0.5]))
        >>> residuals(whole, 1)  # of the start vector, whose Rayleigh quotient is 2
        array([1.])
    """
    diagonal, off_diagonal = _tridiagonal(run, steps)
    _, vectors = eigh_tridiagonal(diagonal, off_diagonal[:-1])
    return off_diagonal[-1] * np.abs(vectors[-1])


def _tridiagonal(run: Quadrature, steps: int) -> tuple[list[float], list[float]]:
    """Return the diagonal after some steps, and the off-diagonal with the entry that the next step adds."""
    basis = [np.sqrt(run.weights / run.weights.sum())]
    diagonal, off_diagonal = [], []
    for _ in range(steps):
        product = run.nodes * basis[-1]
        diagonal.append(basis[-1] @ product)
        for vector in basis * 2:
            product = product - (vector @ product) * vector
        off_diagonal.append(np.linalg.norm(product))
        basis.append(product / off_diagonal[-1])
    return diagonal, off_diagonal


def with_zeros(run: Quadrature, share: float) -> Quadrature:
    """Add a share of zero eigenvalues to a density: those of the rows that were left out.

    Example:
        >>> with_zeros(Quadrature(np.array([2.0]), np.array([1.0])), 0.25)
        Quadrature(nodes=array([2., 0.]), weights=array([0.75, 0.25]))
    """
    if share == 0:
        return run
    return Quadrature(np.append(run.nodes, 0.0), np.append((1 - share) * run.weights, share))


class _Logits(nn.Module):
    """A Transformers model as other libraries want it: from one input, a tensor or a dict, to logits.

    Those of a decoder come shifted, with the classes second, as `cross_entropy` takes them.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor | Batch) -> Tensor:
        """Logits of shape (examples, classes), or (examples, classes, tokens)."""
        if isinstance(inputs, Tensor):
            inputs = {"pixel_values": inputs} if inputs.is_floating_point() else _unstacked(inputs)
        logits = self.model(**inputs).logits
        return logits if logits.ndim == 2 else logits[:, :-1].transpose(1, 2)


def _one_tensor(batch: Batch) -> Tensor:
    """Return a batch's inputs in one tensor: pixels, or concatenated token ids and attention mask."""
    if "pixel_values" in batch:
        return batch["pixel_values"]
    tokens = batch["input_ids"]
    return torch.stack([tokens, batch.get("attention_mask", torch.ones_like(tokens))], dim=1)


def _unstacked(inputs: Tensor) -> Batch:
    return {"input_ids": inputs[:, 0], "attention_mask": inputs[:, 1]}


def _examples(inputs: Batch) -> int:
    return len(next(iter(inputs.values())))


def _targets(batch: Batch) -> Tensor:
    """Labels of examples, or of all tokens but the first."""
    labels = batch["labels"]
    return labels if labels.ndim == 1 else labels[:, 1:]


def _pieces(vector: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Cut a long vector into the shapes of the parameters."""
    pieces = vector.split([parameter.numel() for parameter in parameters])
    return [piece.view_as(parameter) for piece, parameter in zip(pieces, parameters, strict=True)]
