# SPDX-License-Identifier: Apache-2.0
"""How well numbers that are known early rank candidates: Kendall's τ by task, and of combinations fitted elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata


Array = NDArray[np.float64]
Table = Mapping[str, Array]
"""By task: rows are candidates, columns quantities; NaN where one is not known."""

RESAMPLES = 1000
RIDGE = 1.0
"""Penalty on the squared weights of a combination, added to the sum of squares over the candidates."""


def filled(values: Array) -> Array:
    """Values of which more is better, with those that are not known below all others."""
    known = values[np.isfinite(values)]
    return np.where(np.isfinite(values), values, (known.min() if len(known) else 0.0) - 1.0)


def tau(one: Array, other: Array) -> float:
    """Kendall's τ-b; 0 where one of both is the same throughout."""
    return _tau(_orders(one), _orders(other))


def mean_tau(
    predicted: Table, final: Table, *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """Return the mean over tasks of τ within each, and its 95 % bootstrap interval over each task's candidates.

    Args:
        predicted: By task, a number for each candidate.
        final: By task, what it is to predict.
        seed: Of the bootstrap.
        resamples: Of the bootstrap.
    """
    rng = np.random.default_rng(seed)
    draws = np.zeros(resamples)
    for task, values in predicted.items():
        one, other = _orders(values), _orders(final[task])
        counts = np.zeros((resamples, len(values)))
        drawn = rng.integers(len(values), size=counts.shape)
        np.add.at(counts, (np.arange(resamples)[:, None], drawn), 1)
        agree, *untied = (np.sum(counts @ pairs * counts, axis=1) for pairs in (one * other, one**2, other**2))
        norm = np.sqrt(np.prod(untied, axis=0))
        draws += np.divide(agree, norm, out=np.zeros(resamples), where=norm > 0) / len(predicted)
    value = float(np.mean([tau(values, final[task]) for task, values in predicted.items()]))
    low, high = np.quantile(draws, (0.025, 0.975))
    return value, float(low), float(high)


def _orders(values: Array) -> Array:
    """Of every two values, 1 where the first is larger, -1 where the second is, 0 where they are the same."""
    return np.sign(values[:, None] - values)


def _tau(one: Array, other: Array) -> float:
    untied = np.sqrt(np.sum(one**2) * np.sum(other**2))
    return float(np.sum(one * other) / untied) if untied else 0.0


def group(columns: Array) -> Array:
    """Ranks within each column, from −½ to ½; ties share theirs."""
    places = np.apply_along_axis(lambda column: rankdata(filled(column)), 0, columns)
    return (places - (len(columns) + 1) / 2) / max(len(columns) - 1, 1)


def fit(known: Table, final: Table, tasks: Sequence[str]) -> Array:
    """Weights of the ranks, by ridge regression of the final ranks on some tasks. Their signs are learnt as well."""
    x = np.concatenate([group(known[task]) for task in tasks])
    y = np.concatenate([group(final[task][:, None])[:, 0] for task in tasks])
    return np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ y)


def out_of_sample(known: Table, final: Table) -> dict[str, Array]:
    """By task, the combination fitted on all others."""
    return {
        task: group(columns) @ fit(known, final, [other for other in known if other != task])
        for task, columns in known.items()
    }
