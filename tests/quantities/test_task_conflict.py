# SPDX-License-Identifier: Apache-2.0
"""Conflict of tasks: against brute force, closed forms and a whole population; intervals that hold the truth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

from hf_optimizability.curvature.empirical_risk import EmpiricalRisk
from hf_optimizability.quantities.task_conflict import BatchProducts, TaskGram, batch_products


BLOCKS = [[0], [1]]


class Regression(EmpiricalRisk):
    """Mean squared errors of one linear model on batches of two tasks, with two blocks of parameters."""

    parameters = ()

    def __init__(self, batches: Sequence[tuple[Tensor, Tensor]], weights: Tensor):
        self.batches = batches
        self.parameters = [part.clone().requires_grad_() for part in weights.split([2, 3])]

    def losses(self) -> Iterator[tuple[Tensor, int]]:
        weights = torch.cat(self.parameters)
        for inputs, targets in self.batches:
            yield (inputs @ weights - targets).square().sum(), len(targets)


def population(seed: int = 0, *, size: int = 400) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """All data of two tasks: inputs of shape (size, 5), targets of shape (size,)."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(5, generator=generator, dtype=torch.float64)
    tasks = []
    for scale in (1.0, 2.0):
        inputs = torch.randn(size, 5, generator=generator, dtype=torch.float64)
        noise = torch.randn(size, generator=generator, dtype=torch.float64)
        goal = weights + scale * torch.randn(5, generator=generator, dtype=torch.float64)
        tasks.append((inputs, inputs @ goal + 0.5 * noise))
    return tasks, weights


def gradients(tasks: Sequence[tuple[Tensor, Tensor]], weights: Tensor) -> np.ndarray:
    """The closed form (2/N) Xᵀ(Xθ − y) of each task, of shape (tasks, 5)."""
    return np.stack([(2 / len(y) * x.T @ (x @ weights - y)).numpy() for x, y in tasks])


def drawn(tasks: Sequence[tuple[Tensor, Tensor]], seed: int, counts: Sequence[Sequence[int]]) -> list:
    """Batches of each task, of the given sizes, drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for (inputs, targets), sizes in zip(tasks, counts, strict=True):
        for size in sizes:
            chosen = torch.randint(len(targets), (size,), generator=generator)
            batches.append((inputs[chosen], targets[chosen]))
    return batches


COUNTS = [[8, 8, 8, 8, 8, 3], [8] * 10]
OWNERS = [0] * 6 + [1] * 10


@cache
def measured(seed: int) -> BatchProducts:
    tasks, weights = population()
    return batch_products(Regression(drawn(tasks, seed, COUNTS), weights), OWNERS, BLOCKS)


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


def test_the_products_are_those_of_the_batches_gradients():
    tasks, weights = population()
    batches = drawn(tasks, 0, COUNTS)
    found = measured(0)
    sums = np.stack([gradients([batch], weights)[0] * len(batch[1]) for batch in batches])
    for block, columns in enumerate((slice(0, 2), slice(2, 5))):
        part = sums[:, columns]
        totals = np.stack([part[np.array(OWNERS) == task].sum(axis=0) for task in (0, 1)])
        np.testing.assert_allclose(found.squares[:, block], (part**2).sum(axis=1), rtol=1e-12)
        np.testing.assert_allclose(found.products[:, :, block], part @ totals.T, rtol=1e-9, atol=1e-9)
    assert found.counts.tolist() == [8, 8, 8, 8, 8, 3] + [8] * 10
    whole = [torch.cat([batch[i] for batch in batches[:6]]) for i in (0, 1)]
    loss = float((whole[0] @ weights - whole[1]).square().mean())
    assert found.mean_loss(0)[0] == pytest.approx(loss, rel=1e-12)
    assert np.hypot(*found.grad_norms(0)) == pytest.approx(np.linalg.norm(gradients([whole], weights)), rel=1e-12)


def test_what_is_left_without_a_part_is_what_is_measured_without_it():
    tasks, weights = population()
    batches = drawn(tasks, 1, COUNTS)
    gram = TaskGram(batch_products(Regression(batches, weights), OWNERS, BLOCKS))
    for part in (0, 5, 9):
        fewer = [batch for index, batch in enumerate(batches) if index != part]
        owners = [owner for index, owner in enumerate(OWNERS) if index != part]
        other = TaskGram(batch_products(Regression(fewer, weights), owners, BLOCKS))
        np.testing.assert_allclose(gram.without[part], other.value, rtol=1e-9, atol=1e-9)


def test_the_gram_matrix_has_no_bias():
    """Where the plain squared norms of the mean gradients are too large by several standard errors."""
    tasks, weights = population()
    truth = gradients(tasks, weights)
    grams = np.stack([TaskGram(measured(seed)).value.sum(axis=-1) for seed in range(200)])
    errors = grams.std(axis=0) / np.sqrt(len(grams))
    assert np.all(np.abs(grams.mean(axis=0) - truth @ truth.T) < 3.5 * errors)
    plain = [np.hypot(*measured(seed).grad_norms(0)) ** 2 for seed in range(200)]
    assert np.mean(plain) - truth[0] @ truth[0] > 2 * np.std(plain) / np.sqrt(200)


def test_intervals_hold_the_truth_of_the_whole_population():
    tasks, weights = population()
    truth = gradients(tasks, weights)
    shares = np.array([43, 80]) / 123
    joint = shares @ truth
    truths = {
        "cosine": cosine(*truth),
        "block": cosine(*truth[:, 2:]),
        "share": float(shares[0] * truth[0] @ joint / (joint @ joint)),
        "equal": float(np.linalg.norm(truth[1]) / np.linalg.norm(truth, axis=1).sum()),
    }
    held: dict[str, list[bool]] = {name: [] for name in truths}
    for seed in range(200):
        gram = TaskGram(measured(seed))
        weights_found = gram.equal_norm_weights()
        estimates = {
            "cosine": gram.cosine(0, 1),
            "block": gram.cosine(1, 0, block=1),
            "share": gram.share(0),
            "equal": None if weights_found is None else weights_found[0],
        }
        for name, estimate in estimates.items():
            if estimate is not None:
                held[name].append(estimate.low <= truths[name] <= estimate.high)
    for name, hits in held.items():
        assert len(hits) > 180 and 0.92 <= np.mean(hits) <= 0.995, (name, len(hits), np.mean(hits))


def test_a_task_agrees_with_itself_and_conflicts_with_its_negation():
    """Near 0 the model's outputs are small beside the targets, and negated targets turn the gradient round."""
    (inputs, targets), _ = population()[0]
    both = [(inputs, targets), (inputs, -targets)]
    batches = drawn(both, 0, [[20] * 8] * 2)
    gram = TaskGram(
        batch_products(Regression(batches, torch.zeros(5, dtype=torch.float64)), [0] * 8 + [1] * 8, BLOCKS)
    )
    itself, negated = gram.cosine(0, 0), gram.cosine(0, 1)
    assert (itself.value, itself.low, itself.high) == (1.0, 1.0, 1.0)
    assert -1 <= negated.value < -0.95 and negated.high < -0.8
    assert gram.cosine(1, 0) == negated
    shortest = gram.min_norm_weights()
    assert shortest[0].value + shortest[1].value == pytest.approx(1)
    assert abs(shortest[0].value - 0.5) < 3 * shortest[0].std_error + 0.05


def test_shares_add_up_to_one():
    gram = TaskGram(measured(2))
    assert gram.share(0).value + gram.share(1).value == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_min_norm_weights_are_the_best_on_the_simplex(seed: int):
    rng = np.random.default_rng(seed)
    means = rng.standard_normal((3, 4)) + 0.5
    parts = np.repeat(means, 4, axis=0) + 1e-3 * rng.standard_normal((12, 4))
    owners = np.repeat([0, 1, 2], 4)
    totals = np.stack([parts[owners == task].sum(axis=0) for task in range(3)])
    gram = TaskGram(
        BatchProducts(
            losses=np.zeros(12),
            counts=np.ones(12, dtype=int),
            owners=owners,
            squares=(parts**2).sum(axis=1)[:, None],
            products=(parts @ totals.T)[:, :, None],
        )
    )
    matrix = gram.value[:, :, 0]
    best = scipy.optimize.minimize(
        lambda x: x @ matrix @ x,
        np.full(3, 1 / 3),
        jac=lambda x: 2 * matrix @ x,
        bounds=[(0, 1)] * 3,
        constraints={"type": "eq", "fun": lambda x: x.sum() - 1},
        options={"ftol": 1e-15, "maxiter": 500},
        method="SLSQP",
    )
    found = np.array([weight.value for weight in gram.min_norm_weights()])
    assert found @ matrix @ found <= best.fun + 1e-9
    np.testing.assert_allclose(found, best.x, atol=1e-4)


def test_too_few_batches_tell_nothing_of_errors():
    tasks, weights = population()
    batches = drawn(tasks, 0, [[4, 4], [4] * 5])
    found = batch_products(Regression(batches, weights), [0, 0, 1, 1, 1, 1, 1], BLOCKS)
    gram = TaskGram(found)
    assert gram.cosine(0, 1) is gram.share(0) is gram.min_norm_weights() is gram.equal_norm_weights() is None
    assert found.noise_scale(0) is None and found.noise_scale(1) is not None


def test_a_gradient_that_drowns_in_noise_is_said_to():
    """At its minimum a task has no gradient: no cosine, or one that may be anything."""
    tasks, _ = population()
    inputs, targets = tasks[0]
    best = torch.linalg.lstsq(inputs, targets[:, None]).solution[:, 0]
    for seed in range(20):
        batches = drawn(tasks, seed, COUNTS)
        found = TaskGram(batch_products(Regression(batches, best), OWNERS, BLOCKS)).cosine(0, 1)
        assert found is None or found.high - found.low > 0.5
