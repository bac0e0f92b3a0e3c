# SPDX-License-Identifier: Apache-2.0
"""Several tasks on the same parameters: how far their gradients agree, and what the joint gradient is made of.

Each part of the objective holds examples of one task. Parts are independent draws, so that the product of two parts'
gradients is free of their noise; the squared norm of any one gradient is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..curvature.empirical_risk import EmpiricalRisk
from ..curvature.gradient import batch_gradients
from ..linalg.estimate import Estimate
from ..linalg.statistics import jackknife, jackknife_covariance, student_quantile
from ..linalg.vectors import dot
from .noise_scale import MIN_PARTS, NoiseScale, noise_from_products


WITH_ITSELF = Estimate(1.0, 1.0, 1.0, method="definition", hvps=0, converged=True, std_error=0.0)
"""The cosine of a task with itself."""


@dataclass(frozen=True, kw_only=True)
class BatchProducts:
    """Products of the gradients of an objective's parts and tasks, as sums: Sᵢ of part i, Gₜ of all parts of task t.

    Attributes:
        losses: Summed loss of each part, of shape (parts,).
        counts: Items of each part, of shape (parts,).
        owners: The task of each part, of shape (parts,).
        squares: ‖Sᵢ‖² by block, of shape (parts, blocks).
        products: Sᵢ·Gₜ by block, of shape (parts, tasks, blocks).
    """

    losses: np.ndarray
    counts: np.ndarray
    owners: np.ndarray
    squares: np.ndarray
    products: np.ndarray

    def of(self, task: int) -> np.ndarray:
        """Return the indices of a task's parts."""
        return np.flatnonzero(self.owners == task)

    def mean_loss(self, task: int) -> tuple[float, float]:
        """Return the mean loss of one task and its standard error; NaN from one part."""
        own = self.of(task)
        means = self.losses[own] / self.counts[own]
        return float(np.average(means, weights=self.counts[own])), jackknife(means, self.counts[own])

    def grad_norms(self, task: int) -> np.ndarray:
        """Return the 2-norm of the gradient of one task's mean loss, of shape (blocks,)."""
        own = self.of(task)
        return np.sqrt(np.maximum(self.products[own, task].sum(axis=0), 0)) / self.counts[own].sum()

    def noise_scale(self, task: int) -> NoiseScale | None:
        """Return the gradient noise scale of one task; `None` from fewer than 3 parts."""
        own = self.of(task)
        if len(own) < MIN_PARTS:
            return None
        counts = self.counts[own]
        products = self.products[own, task].sum(axis=1) / counts.sum()
        return noise_from_products(self.squares[own].sum(axis=1), products, counts)


def batch_products(
    objective: EmpiricalRisk,
    owners: Sequence[int],
    blocks: Sequence[Sequence[int]],
) -> BatchProducts:
    """Compute the gradient of every batch twice: for the sums by task, and for its products with them.

    Costs two gradients of the objective; memory: an n-vector for each task and one besides. Leaves `.grad` alone.

    Args:
        objective: The loss, in parts that hold one task each.
        owners: The task of each part of all ranks, counted from 0, in the order in which they were distributed.
        blocks: Indices into the parameters.
    """
    group, parameter_group = objective.group, objective.rows.group
    mine, tasks = owners[group.rank :: group.world_size], max(owners) + 1
    sums = [[torch.zeros_like(parameter) for parameter in objective.parameters] for _ in range(tasks)]
    for batch, owner in zip(batch_gradients(objective), mine, strict=True):
        for total, piece in zip(sums[owner], batch.tensors, strict=True):
            total += piece
    group.all_reduce_many_([total for totals in sums for total in totals])
    found = []
    for (pieces, loss, count), owner in zip(batch_gradients(objective), mine, strict=True):
        dots = torch.tensor([_dots(pieces, other, blocks) for other in (pieces, *sums)], dtype=torch.float64)
        found.append((float(loss), count, owner, parameter_group.all_reduce_(dots).numpy()))
    losses, counts, of_parts, both = (
        np.array(column) for column in zip(*group.all_gather_interleaved(found), strict=True)
    )
    return BatchProducts(losses=losses, counts=counts, owners=of_parts, squares=both[:, 0], products=both[:, 1:])


class TaskGram:
    """The products ⟨gₛ, gₜ⟩ of the tasks' gradients over all data, and what follows from them, with errors.

    With B items of task t in parts of bᵢ, ‖Gₜ‖²/B² is larger than ‖gₜ‖² by the noise, which would pull every cosine
    towards 0. Products of different parts, `Σ_{i≠j} Sᵢ·Sⱼ / Σ_{i≠j} bᵢbⱼ`, are unbiased, and so are those of different
    tasks. Errors are from the jackknife over the parts of each task (Busing, Meijer & van der Leeden 1999, for parts
    that differ in size), with Welch's degrees of freedom; what is left without one of them follows from the same
    products. A ratio's interval is Fieller's (1954): all values that the errors do not exclude, unbounded where the
    denominator may be 0.

    Args:
        found: The products of the parts.

    Attributes:
        value: By block, of shape (tasks, tasks, blocks); NaN on the diagonal for a task with one part.
        without: The same without one of the parts, of shape (parts, tasks, tasks, blocks).
        weights: Each task's share of the items, of shape (tasks,).

    Example:
        >>> class Lines(EmpiricalRisk):  # L₁ = 2 x, L₂ = −x + 3 y, each in three parts without noise
        ...     parameters = [torch.zeros(2, requires_grad=True)]
        ...     def losses(self):
        ...         for slopes in 3 * [[2.0, 0.0]] + 3 * [[-1.0, 3.0]]:
        ...             yield (torch.tensor(slopes) * self.parameters[0]).sum(), 1
        >>> gram = TaskGram(batch_products(Lines(), [0, 0, 0, 1, 1, 1], [[0]]))
        >>> gram.value[:, :, 0].tolist(), round(gram.cosine(0, 1).value, 4)  # −2/(2·√10)
        ([[4.0, -2.0], [-2.0, 10.0]], -0.3162)
    """

    def __init__(self, found: BatchProducts):
        self._owners, self._counts = found.owners, found.counts
        tasks = found.products.shape[1]
        parts = [found.of(task) for task in range(tasks)]
        items = np.array([found.counts[own].sum() for own in parts])
        totals = _Totals(
            products=np.stack([found.products[own].sum(axis=0) for own in parts]),
            squares=np.stack([found.squares[own].sum(axis=0) for own in parts]),
            items=items,
            lengths=np.array([np.square(found.counts[own]).sum() for own in parts]),
        )
        self._parts = np.array([len(own) for own in parts])
        self.weights = items / items.sum()
        self.value = totals.gram()
        self.without = np.stack([totals.without(part, found).gram() for part in range(len(found.counts))])

    def cosine(self, first: int, second: int, block: int | None = None) -> Estimate | None:
        """Return the cosine between the gradients of two tasks; below 0 they conflict (Yu et al., arXiv 2001.06782).

        Args:
            first: A task.
            second: Another one; with itself, a task has cosine 1 by definition.
            block: A block of the parameters; by default, all of them.

        Returns:
            The cosine with its 95 % interval, within [−1, 1]. `None` where the noise hides a gradient altogether, or
            where a task has fewer than 3 parts.
        """
        if first == second:
            return WITH_ITSELF

        def product_and_norms(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            products = gram.sum(axis=-1) if block is None else gram[..., block]
            squares = np.maximum(products[..., first, first], 0) * np.maximum(products[..., second, second], 0)
            return products[..., first, second], np.sqrt(squares)

        return self._ratio(product_and_norms, (first, second), low=-1.0, high=1.0)

    def share(self, task: int) -> Estimate | None:
        """Return a task's share `⟨wₜgₜ, g⟩/‖g‖²` of the joint gradient g = Σ wₜgₜ, w being `weights`; shares sum to 1.

        To first order, a step of gradient descent of rate η lowers the joint loss by η‖g‖², and this is the task's
        part in it. Below 0, that step raises the task's own loss.
        """

        def along_joint(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            along = gram.sum(axis=-1) @ self.weights  # ⟨gₜ, g⟩
            return self.weights[task] * along[..., task], along @ self.weights

        return self._ratio(along_joint, range(len(self.weights)), low=-math.inf, high=math.inf)

    def equal_norm_weights(self) -> list[Estimate] | None:
        """Return weights of the mean losses, of sum 1, that give all tasks' gradients one norm: `αₜ ∝ 1/‖gₜ‖`.

        It is where GradNorm (Chen et al. 2018, arXiv 1711.02257) rests if all tasks train equally fast. `None` where
        the noise hides a gradient, or a task has fewer than 3 parts.
        """

        def of(gram: np.ndarray) -> np.ndarray:
            inverse = 1 / np.sqrt(np.maximum(np.diagonal(gram), 0))
            return inverse / inverse.sum()

        return self._weights(of)

    def min_norm_weights(self) -> list[Estimate] | None:
        """Return the weights of the mean losses, of sum 1, that minimize the norm of the joint gradient.

        A step along it raises no task's loss to first order: MGDA (Sener & Koltun 2018, arXiv 1810.04650, section 3).
        The error of a weight at 0 says little, as the jackknife wants smooth functions. `None` as above.
        """
        return self._weights(_shortest)

    def _weights(self, of: Callable[[np.ndarray], np.ndarray]) -> list[Estimate] | None:
        grams = self.without.sum(axis=-1)
        value = self.value.sum(axis=-1)
        smallest = min(np.diagonal(gram).min() for gram in (value, *grams))
        if not self._has_scatter(range(len(value))) or not smallest > 0:  # NaN neither
            return None
        found, without = of(value), np.stack([of(gram) for gram in grams])
        by_task = np.diagonal(self._covariances(without), axis1=1, axis2=2)
        weights = []
        for weight, variances in zip(found.tolist(), by_task.T, strict=True):
            std_error = math.sqrt(variances.sum())
            margin = _quantile(variances, self._parts) * std_error
            low, high = max(weight - margin, 0.0), min(weight + margin, 1.0)
            weights.append(Estimate(weight, low, high, "jackknife", hvps=0, converged=True, std_error=std_error))
        return weights

    def _ratio(
        self,
        terms: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
        tasks: Collection[int],
        *,
        low: float,
        high: float,
    ) -> Estimate | None:
        """Return numerator over denominator, and the c in [low, high] for which `|x − c y|` is within its error."""
        x, y = (float(term) for term in terms(self.value))
        if not self._has_scatter(tasks) or not y > 0:
            return None
        by_task, value = self._covariances(np.stack(terms(self.without), axis=1)), x / y
        variances = np.maximum(np.array([1, -value]) @ by_task @ np.array([1, -value]), 0)  # of x − c y at x/y
        std_error, square = math.sqrt(variances.sum()) / y, _quantile(variances, self._parts) ** 2
        (xx, xy), (_, yy) = by_task.sum(axis=0).tolist()
        curve = y**2 - square * yy  # curve c² − 2 slope c + (x² − square xx) ≤ 0
        ends = (low, high)
        if curve > 0:
            slope = x * y - square * xy
            reach = math.sqrt(max(slope**2 - curve * (x**2 - square * xx), 0.0))
            ends = ((slope - reach) / curve, (slope + reach) / curve)
        value, least, most = np.clip([value, *ends], low, high).tolist()
        return Estimate(value, least, most, method="jackknife", hvps=0, converged=curve > 0, std_error=std_error)

    def _has_scatter(self, tasks: Collection[int]) -> bool:
        """Return whether these tasks have parts enough to estimate their scatter."""
        return all(self._parts[task] >= MIN_PARTS for task in tasks)

    def _covariances(self, without: np.ndarray) -> np.ndarray:
        """Return what each task's batches add to the jackknife's covariance of numbers.

        Args:
            without: The numbers without each part, of shape (parts, numbers).

        Returns:
            Of shape (tasks, numbers, numbers).
        """
        owned = [self._owners == task for task in range(len(self.weights))]
        return np.stack([jackknife_covariance(without[own], self._counts[own]) for own in owned])


@dataclass(frozen=True)
class _Totals:
    """Sums over the parts of each task: Gₛ·Gₜ and Σ‖Sᵢ‖² by block, Σ bᵢ and Σ bᵢ²."""

    products: np.ndarray
    squares: np.ndarray
    items: np.ndarray
    lengths: np.ndarray

    def without(self, part: int, found: BatchProducts) -> _Totals:
        """Return the sums without one part."""
        owner, count, change = found.owners[part], found.counts[part], found.products[part]
        products, squares, items, lengths = (
            array.copy() for array in (self.products, self.squares, self.items, self.lengths)
        )
        products[owner] -= change
        products[:, owner] -= change
        products[owner, owner] += found.squares[part]
        squares[owner] -= found.squares[part]
        items[owner] -= count
        lengths[owner] -= count**2
        return _Totals(products, squares, items, lengths)

    def gram(self) -> np.ndarray:
        """Return unbiased ⟨gₛ, gₜ⟩ by block."""
        gram = self.products.copy()
        pairs = np.outer(self.items, self.items).astype(np.float64)
        diagonal = np.arange(len(gram))
        gram[diagonal, diagonal] -= self.squares
        pairs[diagonal, diagonal] -= self.lengths
        with np.errstate(divide="ignore", invalid="ignore"):  # of a task with one part
            return (gram + gram.swapaxes(0, 1)) / 2 / pairs[..., None]


def _quantile(variances: np.ndarray, parts: np.ndarray) -> float:
    """Return Student's t for a variance that is the sum of each task's: Welch (1947) has the degrees of freedom."""
    of_parts = float(np.sum(variances**2 / np.maximum(parts - 1, 1)))
    freedom = float(variances.sum()) ** 2 / of_parts if of_parts > 0 else math.inf
    return student_quantile(min(freedom, 1e6))


def _dots(x: Sequence[Tensor], y: Sequence[Tensor], blocks: Sequence[Sequence[int]]) -> list[float]:
    return [sum(dot(x[index].reshape(-1), y[index].reshape(-1)) for index in block) for block in blocks]


def _shortest(gram: np.ndarray) -> np.ndarray:
    """Return the α ≥ 0 of sum 1 with the least αᵀ gram α.

    The least `‖R x‖² + (1ᵀx − 1)²` over x ≥ 0, RᵀR being the Gram matrix, is at a multiple of it (Lawson & Hanson
    1974, chapter 23).
    """
    from scipy.optimize import nnls

    values, vectors = np.linalg.eigh(gram)
    root = np.sqrt(np.maximum(values, 0) / np.trace(gram))[:, None] * vectors.T
    found, _ = nnls(np.vstack([root, np.ones(len(gram))]), np.append(np.zeros(len(gram)), 1.0))
    return found / found.sum()
