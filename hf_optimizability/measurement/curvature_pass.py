# SPDX-License-Identifier: Apache-2.0
"""Spectrum, trace, blocks and tasks of a curvature matrix, with one engine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from ..config import OptimizabilityConfig
from ..curvature.backward_errors import backward_errors_unified
from ..curvature.block_diagonal import BlockDiagonalHessian
from ..curvature.compact_embeddings import drop_unused_embedding_rows
from ..curvature.eigenvalue_check import EigenvalueCheck
from ..curvature.gauss_newton import split_trace
from ..curvature.gradient import Gradient
from ..linalg.estimate import Estimate, Spectrum
from ..linalg.lanczos import lanczos, lanczos_by_segment
from ..linalg.operator import ColumnParallelOperator, PreconditionedOperator, SymmetricOperator
from ..linalg.probe_vectors import PROBE_BLOCK_SIZE, random_rows
from ..linalg.spectrum_and_trace import SpectrumAndTrace, estimate_spectrum, estimate_trace
from ..linalg.trace_result import TraceResult
from ..linalg.vectors import Segments, dot, flatten, norm, scatter
from ..objective.objective import Objective
from ..quantities.step_size import QuadraticModel, quadratic_model
from .cost_model import allocate_hvps
from .eigenvector_check import check_along_eigenvectors, product_error, require_right_derivatives, require_symmetric
from .engines import HvpEngine
from .multitask import TaskCurvature, eigenvalues_by_task, means_by_task, traces_by_task
from .optimizer_step import OptimizerStep
from .two_sided import (
    AlongGradient,
    Directions,
    about_the_whole_set,
    blocks_of_the_whole_set,
    directions_of,
    sharpest_direction,
)


POPULATION_EIGEN_TOLERANCE = 0.02
"""Relative residual of a sample's eigenvalues below which the draw makes most of the error."""

_GRAPH, _PRODUCT = 1.5, 2.0
"""Gradients that the graph of a batch takes, and each product made from it."""


@dataclass(frozen=True)
class DirectionalCurvature:
    """Curvature along the gradient and the next update.

    Attributes:
        quadratic: The quadratic model along −g.
        along_update: uᵀHu of the update u; `None` where it was not asked for.
        per_batch: gᵀH_bg of each batch b, of all ranks.
        items: The items of each batch.
    """

    quadratic: QuadraticModel
    along_update: float | None
    per_batch: np.ndarray
    items: list[float]


@dataclass(frozen=True)
class CurvatureEstimates:
    """What was estimated of a curvature matrix.

    Attributes:
        spectrum: Extreme eigenvalues, density and trace.
        unused_parameters: Entries of embedding rows that no example looks up.
        blocks: Extreme eigenvalues of each block; `None` where they were not asked for.
        sharpness: λ_max as the optimizer sees it; `None` without an optimizer.
        tasks: What each task has of it.
        checks: Eigenvalues compared with differences along their vectors.
        along_gradient: The loss of the whole set along its gradient; `None` where there is none but the sample.
    """

    spectrum: SpectrumAndTrace
    unused_parameters: int
    blocks: tuple[Spectrum, ...] | None
    sharpness: Estimate | None
    tasks: TaskCurvature
    checks: tuple[EigenvalueCheck, ...]
    along_gradient: AlongGradient | None


def measure_directions(
    engine: HvpEngine,
    objective: Objective,
    point: Gradient,
    update: Tensor | None,
    config: OptimizabilityConfig,
) -> DirectionalCurvature:
    """Compute the curvature along the gradient and an update, and check that the matrix is symmetric.

    The gradient is multiplied as a vector of norm 1: where the loss is scaled down, products of small numbers would
    vanish. The check takes one more product, with a random vector, in the same pass.

    Raises:
        WrongDerivativeError: If the matrix is not symmetric, and the products are exact.
        MeasurementError: If it is not symmetric otherwise, or rounding leaves nothing of it.
    """
    operator = engine.operator(objective)
    group = operator.rows.group
    gradient = flatten(point.tensors).to(operator.device, operator.dtype)
    length = norm(gradient, group) or 1.0
    direction = gradient / length
    [probe] = random_rows(operator, 1, seed=config.probe_seed)
    columns = [direction, probe] if update is None else [direction, probe, update.to(operator.device, operator.dtype)]
    products, forms, items = operator.matmat_per_batch(torch.stack(columns, dim=1), [[slice(0, len(gradient))]])
    along, other, *along_update = products.T
    require_symmetric((direction, along), (probe, other), objective, point, engine)
    require_right_derivatives(objective, engine, seed=config.probe_seed)
    return DirectionalCurvature(
        quadratic=quadratic_model(gradient, along * length, group),
        along_update=dot(columns[2], along_update[0], group) if along_update else None,
        per_batch=forms[:, 0, 0] * length**2,
        items=items,
    )


def estimate_curvature(
    engine: HvpEngine,
    objective: Objective,
    config: OptimizabilityConfig,
    *,
    point: Gradient,
    directions: DirectionalCurvature,
    step: OptimizerStep | None,
    blocks: Mapping[str, list[int]],
) -> CurvatureEstimates:
    """Estimate all that is asked of a curvature matrix, with an engine that is active."""
    preconditions = step is not None and step.preconditions(objective)
    sampled = objective.population is not None
    allocation = allocate_hvps(config, engine, preconditions=preconditions, population=sampled)
    by_task = config.task_column is not None and engine.separates_batches
    found: Directions | None = None
    with drop_unused_embedding_rows(objective) as used:
        segments = block_segments(objective, blocks.values())
        spectrum = _estimate_spectrum(
            engine,
            objective,
            config,
            segments,
            max_hvps=allocation.spectrum,
            unused=used.left_out,
            deflate=not by_task,
        )
        checks = check_along_eigenvectors(spectrum, objective, point, engine)
        error = product_error(engine, checks)
        if error is not None:
            spectrum = spectrum.with_product_error(
                error,
                _rows_on_all_ranks(objective, segments),
                eigen_tolerance=config.budget.eigen_tolerance,
                trace_tolerance=config.budget.trace_tolerance,
            )
        if sampled:
            found = directions_of(spectrum, objective, engine.operator(objective), used)
        task_maxima = {}
        if allocation.tasks:
            task_maxima = eigenvalues_by_task(objective, engine, config, max_hvps=allocation.tasks)
        by_block: tuple[Spectrum, ...] | None = None
        ends: tuple[Tensor, ...] = ()
        if allocation.blocks:
            by_block, ends = _block_spectra(objective, config, blocks, segments, max_hvps=allocation.blocks)
        ends = tuple(map(used.expanded, ends))
    sharpness = sharpest = along_gradient = None
    if step is not None and preconditions:
        sharpness, sharpest = _preconditioned_sharpness(engine, objective, config, step, max_hvps=allocation.sharpness)
    if found is not None:
        if step is not None and sharpest is not None:
            direction = sharpest_direction(
                sharpest,
                objective,
                engine.operator(objective),
                of_sample=point.tensors,
                preconditioner=step.preconditioner.diagonal,
            )
            found = replace(found, sharpest=direction)
        whole = about_the_whole_set(
            spectrum, sharpness, objective, found, trace_tolerance=config.budget.trace_tolerance
        )
        spectrum, sharpness, along_gradient = whole.spectrum, whole.sharpness, whole.along_gradient
        if by_block is not None:
            by_block = blocks_of_the_whole_set(
                by_block,
                ends,
                objective,
                list(blocks.values()),
                block_segments(objective, blocks.values()),
                seed=config.probe_seed + 1,
                pool_error=whole.pool_error,
            )
    if step is not None and not preconditions:
        sharpness = spectrum.estimates.lambda_max
    # Vectors as long as the parameters are released here, except for those that the landscape needs.
    spectrum = replace(spectrum, eigenvectors=spectrum.eigenvectors if config.landscape else None, extremal=())
    tasks = TaskCurvature({}, {}, {})
    if by_task:
        traces = traces_by_task(objective, spectrum, tolerance=config.budget.trace_tolerance)
        means = means_by_task(objective, directions.per_batch, directions.items)
        tasks = TaskCurvature(means, task_maxima, traces)
    return CurvatureEstimates(spectrum, used.left_out, by_block, sharpness, tasks, checks, along_gradient)


def _estimate_spectrum(
    engine: HvpEngine,
    objective: Objective,
    config: OptimizabilityConfig,
    segments: Segments,
    *,
    max_hvps: int,
    unused: int,
    deflate: bool,
) -> SpectrumAndTrace:
    """Estimate the spectrum with at most half the products, then the trace with the rest.

    Each stage has an operator of its own and lets it go, so that no two of them hold a graph at once.
    """
    spectrum = estimate_spectrum(
        engine.operator(objective),
        tolerance=_eigen_tolerance(objective, config),
        max_hvps=max_hvps // 2,
        seed=config.probe_seed,
        method=config.eigen_method,
        num_eigenvalues=config.num_eigenvalues,
        left_out=unused,
    )
    max_hvps -= spectrum.hvps
    trace = None
    if config.trace_method == "hutchinson" and engine.differentiates_hessian and engine.cheap:
        trace = _split_trace(objective, config, segments, max_hvps=max_hvps)
    if trace is None:
        trace = estimate_trace(
            _trace_operator(engine, objective),
            segments,
            tolerance=config.budget.trace_tolerance,
            max_hvps=max_hvps,
            seed=config.probe_seed + 1,
            method=config.trace_method,
            deflating_vectors=spectrum.deflating_vectors if deflate else None,
        )
    return SpectrumAndTrace.of(spectrum, trace)


def _split_trace(
    objective: Objective, config: OptimizabilityConfig, segments: Segments, *, max_hvps: int
) -> TraceResult | None:
    """Return the trace with its Gauss-Newton part exact; `None` where the loss can't be split."""
    tolerance = config.budget.trace_tolerance
    try:
        with backward_errors_unified():
            return split_trace(objective, segments, tolerance=tolerance, max_hvps=max_hvps, seed=config.probe_seed + 1)
    except ValueError:
        return None
    except (torch.OutOfMemoryError, FloatingPointError):
        raise
    except RuntimeError as error:  # single examples that can't be differentiated twice
        if should_reduce_batch_size(error):
            raise
        return None


def _trace_operator(engine: HvpEngine, objective: Objective) -> SymmetricOperator:
    """Return the matrix that the trace is estimated from.

    The probes are multiplied in blocks. Their products are shared over ranks by batches or by columns, whichever
    leaves less to the busiest rank.
    """
    group, batches = objective.group, objective.parts
    by_batch = math.ceil(batches / group.world_size) * (_GRAPH + PROBE_BLOCK_SIZE * _PRODUCT)
    by_column = batches * (_GRAPH + math.ceil(PROBE_BLOCK_SIZE / group.world_size) * _PRODUCT)
    if by_column >= by_batch:
        return engine.trace_operator(objective)
    counter, whole = objective.hvp_counter, objective.unsharded().counting(None)
    on_products = None if counter is None else counter.add
    return ColumnParallelOperator(engine.trace_operator(whole), group, on_products=on_products)


def _preconditioned_sharpness(
    engine: HvpEngine, objective: Objective, config: OptimizabilityConfig, step: OptimizerStep, *, max_hvps: int
) -> tuple[Estimate, Tensor | None]:
    """Return λ_max(P^-½HP^-½) and, of a sample, P^-½u for a vector u of norm 1 along which that matrix is as large.

    u is the product with the Ritz vector, which has nothing where the rows of H are zero (dead units, words that the
    sample lacks). There the Ritz vector has what is left of its start, and as P is small there, P^-½ makes that long.
    """
    diagonal = step.preconditioner.diagonal
    operator = PreconditionedOperator(engine.operator(objective), diagonal)
    run = lanczos(operator, tolerance=_eigen_tolerance(objective, config), max_hvps=max_hvps, seed=config.probe_seed)
    if objective.population is None:
        return run.lambda_max, None
    [product] = run.ritz_products([-1]).to(operator.device)
    return run.lambda_max, product.div_(norm(product) or 1.0).mul_(diagonal.to(product).rsqrt())


def _block_spectra(
    objective: Objective,
    config: OptimizabilityConfig,
    blocks: Mapping[str, list[int]],
    segments: Segments,
    *,
    max_hvps: int,
) -> tuple[tuple[Spectrum, ...], tuple[Tensor, ...]]:
    """Return both ends of each block's spectrum; of a sample also the Ritz vectors, those of all blocks in one.

    The first of them has those of the blocks' λ_max, the second those of λ_min.
    """
    operator = BlockDiagonalHessian(objective, list(blocks.values()))
    tolerance = _eigen_tolerance(objective, config)
    runs = lanczos_by_segment(operator, segments, tolerance=tolerance, max_hvps=max_hvps, seed=config.probe_seed)
    ends = []
    if objective.population is not None:
        for index in (-1, 0):
            ends.append(torch.zeros(operator.size, dtype=operator.dtype, device=operator.device))
            for run, segment in zip(runs, segments, strict=True):
                scatter(run.ritz_vectors([index]), segment, ends[-1])
    return tuple(run.spectrum for run in runs), tuple(ends)


def _eigen_tolerance(objective: Objective, config: OptimizabilityConfig) -> float:
    """Return the relative residual of eigenvalues to stop at: of a sample, more precision would be about itself."""
    tolerance = config.budget.eigen_tolerance
    return tolerance if objective.population is None else max(tolerance, POPULATION_EIGEN_TOLERANCE)


def _rows_on_all_ranks(objective: Objective, segments: Segments) -> list[float]:
    """Return the number of rows of each segment, wherever they are."""
    here = [sum(part.stop - part.start for part in segment) for segment in segments]
    rows: list[float] = objective.rows.group.all_reduce_(torch.tensor(here, dtype=torch.float64)).tolist()
    return rows


def block_segments(objective: Objective, blocks: Iterable[list[int]]) -> list[list[slice]]:
    """Return where each block's parameters lie in the long vector of all of them."""
    offsets = list(accumulate((parameter.numel() for parameter in objective.parameters), initial=0))
    slices = [slice(start, end) for start, end in pairwise(offsets)]
    return [[slices[index] for index in block] for block in blocks]
