# SPDX-License-Identifier: Apache-2.0
"""Cost of a measurement: the products of each stage, and the vectors that it holds at once."""

from __future__ import annotations

from typing import NamedTuple

from ..config import HvpAllocation, OptimizabilityConfig
from ..linalg.krylov import BASIS_CHUNK
from ..linalg.probe_vectors import PROBE_BLOCK_SIZE
from ..linalg.spectrum_and_trace import DEFLATED
from ..objective.objective import Objective
from .engines import HvpEngine


_CHECK = 6
"""Vectors that a check along eigenvectors needs: of λ_min, their sum, saved parameters, two gradients, a product."""


class HvpCost(NamedTuple):
    """Cost of one product: seconds over all batches, and bytes for the largest one."""

    seconds: float
    memory: int


class CostModel(NamedTuple):
    """Cost of each kind of product.

    Attributes:
        size: Rows of the matrix, without the embedding rows that are left out.
        vector_bytes: Bytes of a vector of that size.
        all_bytes: Bytes of a vector with all rows.
        one: One product.
        lockstep: One of `PROBE_BLOCK_SIZE` products at once with the matrix that the trace is estimated from; the
            memory is that of all of them.
        block: One with the block-diagonal matrix; `None` where the eigenvalues of blocks are not asked for.
        known_part: Seconds for the part of the trace that takes no products.
    """

    size: int
    vector_bytes: int
    all_bytes: int
    one: HvpCost
    lockstep: HvpCost
    block: HvpCost | None
    known_part: float


class HvpBudget(NamedTuple):
    """Products of each kind that `measure` makes at most."""

    ends: int
    trace: int
    blocks: int
    tasks: int
    sharpness: int
    checks: int  # along gradients, another with it, along the update, along eigenvectors; of central differences

    @property
    def number(self) -> int:
        """Return the sum of all."""
        return sum(self)


def allocate_hvps(
    config: OptimizabilityConfig, engine: HvpEngine, *, preconditions: bool, population: bool = False
) -> HvpAllocation:
    """Return what each part of a measurement may spend with an engine.

    Args:
        config: What is measured.
        engine: How products are computed.
        preconditions: Whether the sharpness that the optimizer sees takes products of its own.
        population: Whether the batches are a sample of a larger set.
    """
    by_task = config.task_column is not None and engine.separates_batches
    return config.budget.allocate(
        sharpness=preconditions,
        blocks=engine.differentiates_hessian and config.budget.block_eigenvalues,
        tasks=by_task and config.budget.task_eigenvalues,
        differences=engine.curvature == "hessian",
        population=population,
    )


def count_hvps(
    config: OptimizabilityConfig, engine: HvpEngine, shares: HvpAllocation, *, size: int, update: bool
) -> HvpBudget:
    """Return the products that a measurement makes at most.

    Args:
        config: What is measured.
        engine: How products are computed; those by central differences are compared with two others.
        shares: What each part may spend.
        size: Rows of the matrix.
        update: Whether the curvature along the optimizer's update is measured too.
    """
    ends = shares.spectrum // 2
    compared = 2 * (engine.name == "central_difference")
    return HvpBudget(
        ends=ends,
        trace=size if config.trace_method == "exact" else shares.spectrum - ends,
        blocks=shares.blocks,
        tasks=shares.tasks,
        sharpness=shares.sharpness,
        checks=shares.along_gradient + shares.along_eigenvectors + shares.of_sample + update + compared,
    )


class Stage(NamedTuple):
    """Memory of one stage of a measurement: vectors, their bytes, and the bytes of one batch's graph."""

    vectors: int
    vector_memory: int
    graph_memory: int


def list_stages(config: OptimizabilityConfig, products: HvpBudget, prices: CostModel) -> list[Stage]:
    """Return the stages that may be the largest; each releases what it took, except for the Ritz vectors."""
    lanczos = config.eigen_method == "lanczos"
    ritz = min(DEFLATED, prices.size) if lanczos else 0
    ends = _basis(products.ends, prices.size) if lanczos else 3
    left = products.ends + products.trace  # for the trace, if the ends took next to none
    trace = {
        "hutchinson": 2 * PROBE_BLOCK_SIZE,  # Ritz vectors' products, and probes
        "exact": PROBE_BLOCK_SIZE,
        "hutch++": 2 * left,  # two for each column, which takes two products, and a copy of both
        "xtrace": left + PROBE_BLOCK_SIZE,
    }[config.trace_method]
    counts = [
        (ends + 1, prices.vector_bytes, prices.one.memory),
        (ends + ritz, prices.vector_bytes, 0),
        (ritz + trace + 2, prices.vector_bytes, prices.lockstep.memory),  # that of λ_min as well
        (ritz + _CHECK, prices.vector_bytes, prices.one.memory),
    ]
    if prices.block is not None:
        counts.append((ritz + _basis(products.blocks, prices.size) + 2, prices.vector_bytes, prices.block.memory))
    if products.tasks:
        counts.append((ritz + _basis(products.tasks, prices.size) + 2, prices.vector_bytes, prices.one.memory))
    if products.sharpness:
        more = 3 * (prices.all_bytes - prices.vector_bytes)  # here the product has all the rows
        counts.append((ritz + _basis(products.sharpness, prices.size) + 2, prices.all_bytes, prices.one.memory + more))
    return [Stage(number, number * size, graph) for number, size, graph in counts]


def measurement_bytes(objective: Objective, config: OptimizabilityConfig) -> int:
    """Return the bytes that a measurement on whole parameters takes on each rank, without graphs."""
    itemsize = max(4, *(parameter.dtype.itemsize for parameter in objective.parameters))
    size = sum(parameter.numel() for parameter in objective.parameters)
    nothing = HvpCost(0.0, 0)
    prices = CostModel(
        size=size,
        vector_bytes=itemsize * size,
        all_bytes=itemsize * size,
        one=nothing,
        lockstep=nothing,
        block=nothing if config.budget.block_eigenvalues else None,
        known_part=0.0,
    )
    engine = HvpEngine("double_backward", config.curvature, "math")
    shares = allocate_hvps(config, engine, preconditions=True)
    stages = list_stages(config, count_hvps(config, engine, shares, size=size, update=False), prices)
    parameters = itemsize * sum(parameter.numel() for parameter in objective.model.parameters())
    return parameters + 2 * itemsize * size + max(stage.vector_memory for stage in stages)  # 2: gradient, P


def _basis(steps: int, size: int) -> int:
    """Return the vectors that a Krylov basis holds after so many steps."""
    return -(-min(steps, size) // BASIS_CHUNK) * BASIS_CHUNK
