# SPDX-License-Identifier: Apache-2.0
"""Stability against set-backs and spikes counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hf_optimizability.dynamics.stability import VALUES, Stability, count_setbacks


def falling(points: int, seed: int = 0) -> np.ndarray:
    return 2 * np.exp(-np.linspace(0, 4, points)) + 0.02 * np.random.default_rng(seed).normal(size=points)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The interval's ends solve (p − k/n)² = z² p (1 − p) / n."""
    z2, share = 1.959963984540054**2, successes / trials
    return tuple(np.sort(np.roots([1 + z2 / trials, -2 * share - z2 / trials, share**2]).real))


class TestSetbacks:
    def test_counted_by_hand(self):
        result = count_setbacks(range(7), [4.0, 3.0, 3.5, 2.0, 2.0, 3.0, 0.0])
        assert (result["setbacks"], result["comparisons"], result["points"], result["non_finite"]) == (2, 6, 7, 0)
        assert result["setback_share"] == pytest.approx(2 / 6)
        assert (result["setback_share_low"], result["setback_share_high"]) == pytest.approx(wilson(2, 6))
        assert result["mean_setback"] == pytest.approx((0.5 + 1.0) / 2 / 4.0)
        assert result["largest_setback"] == pytest.approx(1.0 / 4.0)

    def test_greater_is_better_turns_the_direction(self):
        result = count_setbacks(range(4), [0.5, 0.9, 0.7, 0.8], greater_is_better=True)
        assert result["setbacks"] == 1
        assert result["largest_setback"] == pytest.approx(0.5)
        assert count_setbacks(range(4), [0.5, 0.9, 0.7, 0.8])["setbacks"] == 2

    def test_by_step_whatever_the_order(self):
        assert count_setbacks([3, 1, 2], [1.0, 3.0, 2.0])["setbacks"] == 0

    def test_non_finite_values_are_counted_and_left_out(self):
        result = count_setbacks(range(6), [3.0, math.nan, 2.0, math.inf, None, 2.5])
        assert (result["non_finite"], result["points"], result["comparisons"], result["setbacks"]) == (3, 3, 2, 1)

    def test_steady_improvement(self):
        result = count_setbacks(range(20), np.linspace(5, 1, 20))
        assert (result["setbacks"], result["spikes"], result["largest_setback"], result["note"]) == (0, 0, 0.0, "")
        assert (result["setback_share_low"], result["setback_share_high"]) == pytest.approx(wilson(0, 19), abs=1e-12)

    def test_constant_values(self):
        result = count_setbacks(range(20), [0.3] * 20)
        assert (result["setbacks"], result["mean_setback"], result["spikes"]) == (0, 0.0, 0)

    @pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan]])
    def test_nothing_to_compare(self, values):
        result = count_setbacks(range(len(values)), values)
        assert all(result[name] is None for name in VALUES)
        assert (result["setbacks"], result["comparisons"]) == (0, 0)
        assert result["note"].startswith("Too few points")


class TestSpikes:
    @pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
    def test_spikes_upward_are_counted(self, scale):
        losses = falling(60)
        losses[[20, 21, 40]] += 1.5  # two spikes, the first two points wide
        assert count_setbacks(range(60), scale * losses)["spikes"] == 2
        assert count_setbacks(range(60), scale * losses, greater_is_better=True)["spikes"] == 0
        assert count_setbacks(range(60), -scale * losses, greater_is_better=True)["spikes"] == 2

    def test_noise_is_no_spike(self):
        rng = np.random.default_rng(0)
        assert np.mean([count_setbacks(range(40), rng.normal(size=40))["spikes"] > 0 for _ in range(300)]) <= 0.02

    @pytest.mark.parametrize(
        "values",
        [
            np.linspace(1, 0, 40),
            1 / (1 + np.exp(np.linspace(-9, 9, 40))),  # the shoulder of an S is above its neighbours' median
            0.1 + np.zeros(40) + np.tile([0.0, 1e-16], 20),
        ],
        ids=["straight", "shoulder", "rounding"],
    )
    def test_smooth_curve_has_none(self, values):
        assert count_setbacks(range(len(values)), values)["spikes"] == 0

    def test_spike_from_a_flat_line(self):
        assert count_setbacks(range(30), [1.0] * 15 + [2.0] + [1.0] * 14)["spikes"] == 1

    def test_wobble_of_a_plateau_is_no_spike(self):
        accuracies = np.full(40, 0.9)
        accuracies[[5, 12, 19, 26, 33]] -= 0.01
        assert count_setbacks(range(40), accuracies, greater_is_better=True)["spikes"] == 0

    def test_few_points_are_not_judged(self):
        result = count_setbacks(range(8), [5.0, 4.0, 3.0, 90.0, 2.0, 1.0, 1.0, 1.0])
        assert result["spikes"] is None and result["setbacks"] == 1
        assert result["note"].startswith("Too few points to tell spikes")


def test_class_gives_what_the_function_gives(tmp_path):
    values = [0.5, None, math.nan, 0.7, 0.6]
    measurement = Stability(cache_dir=str(tmp_path))
    result = measurement.compute(step=[1, 2, 3, 4, 5], value=values, greater_is_better=True)
    assert result == count_setbacks(range(5), values, greater_is_better=True)
    assert result["setbacks"] == 1
