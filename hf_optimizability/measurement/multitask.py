# SPDX-License-Identifier: Apache-2.0
"""Per-task decomposition of the gradient and the curvature."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from ..config import OptimizabilityConfig
from ..linalg.estimate import Estimate
from ..linalg.lanczos import lanczos
from ..linalg.spectrum_and_trace import SpectrumAndTrace
from ..linalg.statistics import student_quantile
from ..objective.objective import Objective
from ..quantities.task_conflict import BatchProducts, TaskGram, batch_products
from .engines import HvpEngine
from .results import Conflict, MultitaskMeasurement, TaskBlock, TaskMeasurement


@dataclass(frozen=True)
class TaskCurvature:
    """Curvature of each task, by name; empty where the engine does not separate tasks.

    Attributes:
        along_gradient: gᵀHₜg.
        lambda_max: Largest eigenvalue of Hₜ.
        traces: Trace of Hₜ, then that of each of its blocks.
    """

    along_gradient: Mapping[str, float]
    lambda_max: Mapping[str, Estimate]
    traces: Mapping[str, Sequence[Estimate]]


def task_batches(objective: Objective) -> dict[str, list[int]]:
    """Return the indices of each task's batches among those of all ranks, tasks in alphabetical order."""
    tasks = objective.part_tasks or []
    return {name: [place for place, own in enumerate(tasks) if own == name] for name in sorted(set(tasks))}


def means_by_task(objective: Objective, values: np.ndarray, items: Sequence[float]) -> dict[str, float]:
    """Return the mean over each task's batches, weighted by items, of numbers of shape (batches,)."""
    return {
        name: float(np.average(values[places], weights=np.array(items)[places]))
        for name, places in task_batches(objective).items()
    }


def traces_by_task(
    objective: Objective, found: SpectrumAndTrace, *, tolerance: float
) -> dict[str, tuple[Estimate, ...]]:
    """Return the trace of each task and of its blocks, from the probes of the joint one."""
    joint, parts = found.estimates.trace, found.parts
    assert parts is not None  # `xtrace` is refused where tasks are measured one by one
    options: dict[str, Any] = {"tolerance": tolerance, "method": joint.method, "hvps": joint.hvps}
    return {name: parts.mean_of(places, **options) for name, places in task_batches(objective).items()}


def eigenvalues_by_task(
    objective: Objective, engine: HvpEngine, config: OptimizabilityConfig, *, max_hvps: int
) -> dict[str, Estimate]:
    """Return the largest eigenvalue of each task's own matrix.

    A product with each of them evaluates all batches once, and so counts as one.
    """
    maxima = {}
    for name in task_batches(objective):
        matrix = engine.operator(objective.of_task(name))
        run = lanczos(matrix, tolerance=config.budget.eigen_tolerance, max_hvps=max_hvps, seed=config.probe_seed)
        maxima[name] = run.lambda_max
    if objective.hvp_counter is not None:
        objective.hvp_counter.add(max(estimate.hvps for estimate in maxima.values()))
    return maxima


def measure_tasks(
    objective: Objective, blocks: Mapping[str, Sequence[int]], curvature: TaskCurvature
) -> MultitaskMeasurement:
    """Return the gradients of all tasks, their agreement, and their curvature."""
    places = task_batches(objective)
    names = list(places)
    owners = [names.index(task) for task in objective.part_tasks or []]
    products = batch_products(objective, owners, list(blocks.values()))
    gram = TaskGram(products)
    equal, shortest = gram.equal_norm_weights(), gram.min_norm_weights()
    tasks = {
        name: _task(
            products, gram, index, list(blocks), curvature, name,
            equal_norm_weight=None if equal is None else equal[index],
            min_norm_weight=None if shortest is None else shortest[index],
        )
        for index, name in enumerate(names)
    }  # fmt: skip
    pairs = combinations(range(len(names)), 2)
    conflicts = [
        Conflict(
            names[first],
            names[second],
            gram.cosine(first, second),
            {block: gram.cosine(first, second, index) for index, block in enumerate(blocks)},
        )
        for first, second in pairs
    ]
    return MultitaskMeasurement(tasks, tuple(conflicts))


def _task(
    products: BatchProducts,
    gram: TaskGram,
    index: int,
    blocks: Sequence[str],
    curvature: TaskCurvature,
    name: str,
    **weights: Estimate | None,
) -> TaskMeasurement:
    noise, norms = products.noise_scale(index), products.grad_norms(index)
    traces = curvature.traces.get(name)
    own = products.of(index)
    return TaskMeasurement(
        num_items=int(products.counts[own].sum()),
        batches=len(own),
        weight=float(gram.weights[index]),
        loss=_mean(*products.mean_loss(index), parts=len(own)),
        grad_norm=math.hypot(*norms),
        signal_norm=None if noise is None else _root(noise.gradient_squared),
        share=gram.share(index),
        noise_scale=None if noise is None else noise.noise_scale,
        trace=None if traces is None else traces[0],
        lambda_max=curvature.lambda_max.get(name),
        curvature_along_gradient=curvature.along_gradient.get(name),
        blocks={
            block: TaskBlock(float(norm), None if traces is None else traces[1 + place])
            for place, (block, norm) in enumerate(zip(blocks, norms, strict=True))
        },
        **weights,
    )


def _mean(value: float, std_error: float, *, parts: int) -> Estimate:
    """Return a mean over batches; it has no error if there is one batch."""
    if parts == 1:
        return Estimate(value, -math.inf, math.inf, method="mean", hvps=0, converged=False)
    margin = student_quantile(parts - 1) * std_error
    return Estimate(value, value - margin, value + margin, method="mean", hvps=0, converged=True, std_error=std_error)


def _root(square: Estimate) -> Estimate:
    """Return the root of a square that noise may have made negative."""
    value, low, high = (math.sqrt(max(number, 0.0)) for number in (square.value, square.low, square.high))
    error = square.std_error / (2 * value) if square.std_error is not None and value > 0 else None
    return Estimate(value, low, high, square.method, hvps=0, converged=square.converged, std_error=error)
