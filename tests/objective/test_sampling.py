# SPDX-License-Identifier: Apache-2.0
"""Draws with unequal probabilities against what they promise, over many draws."""

from __future__ import annotations

import numpy as np
import pytest

from hf_optimizability.objective.sampling import (
    design_std_error,
    draw_sample,
    inclusion_probabilities,
)


SIZES = np.random.default_rng(0).pareto(1.5, 60)
PROBABILITIES = inclusion_probabilities(SIZES, 20)


def draws(number: int) -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    return [draw_sample(PROBABILITIES, groups=4, generator=generator).indices for _ in range(number)]


def test_probabilities_sum_to_the_number_and_grow_with_size():
    assert PROBABILITIES.sum() == pytest.approx(20)
    assert np.all(np.diff(PROBABILITIES[np.argsort(SIZES)]) >= 0)
    assert PROBABILITIES.min() > 0 and PROBABILITIES.max() == 1


@pytest.mark.parametrize("sizes", [np.zeros(5), np.ones(5), np.array([0.0, 0.0, 0.0, 0.0, 1e300])])
def test_any_sizes_have_probabilities(sizes: np.ndarray):
    found = inclusion_probabilities(sizes, 2)
    assert found.sum() == pytest.approx(2) and np.all((found > 0) & (found <= 1))


def test_all_are_certain_where_all_are_taken():
    sample = draw_sample(inclusion_probabilities(SIZES, 99), groups=4, generator=np.random.default_rng(0))
    assert len(sample.certain) == 60 and sample.groups == ()


def test_each_is_drawn_as_often_as_its_probability_says():
    counts = np.bincount(np.concatenate(draws(4000)), minlength=60) / 4000
    errors = (counts - PROBABILITIES) / np.sqrt(np.maximum(PROBABILITIES * (1 - PROBABILITIES), 1e-3) / 4000)
    assert np.abs(errors).max() < 4.5
    assert all(len(set(drawn)) == 20 for drawn in draws(20))


def test_errors_are_those_of_many_draws():
    values = SIZES * np.random.default_rng(2).uniform(0.2, 2, 60)
    found = draws(4000)
    totals = np.array([(values[drawn] / PROBABILITIES[drawn]).sum() for drawn in found])
    assert totals.mean() == pytest.approx(values.sum(), abs=4 * totals.std() / 4000**0.5)
    assert design_std_error(values, PROBABILITIES) == pytest.approx(totals.std(), rel=0.1)
