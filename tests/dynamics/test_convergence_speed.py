# SPDX-License-Identifier: Apache-2.0
"""Convergence speed against curves whose half-life is known."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from hf_optimizability.dynamics.convergence_speed import MAX_POINTS, VALUES, ConvergenceSpeed, fit_convergence


STEPS = np.arange(30) * 10.0


def exponential(steps: np.ndarray, tau: float, *, floor: float = 0.5, height: float = 2.0) -> np.ndarray:
    return floor + height * np.exp(-(steps - steps[0]) / tau)


def noise(points: int, seed: int, *, rho: float = 0.0) -> np.ndarray:
    """Gaussian noise of variance 1 in which neighbours correlate by rho."""
    values = np.random.default_rng(1000 + seed).normal(size=points)
    for index in range(1, points):
        values[index] = rho * values[index - 1] + math.sqrt(1 - rho**2) * values[index]
    return values


class TestWithoutNoise:
    @pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
    @pytest.mark.parametrize("tau", [8.0, 40.0, 250.0])
    def test_is_exact(self, tau, scale):
        losses = scale * exponential(STEPS, tau)
        result = fit_convergence(STEPS, losses)
        assert result["half_life"] == pytest.approx(tau * math.log(2), rel=1e-6)
        assert result["steps_to_90"] == pytest.approx(tau * math.log(10), rel=1e-6)
        assert result["half_life_low"] == pytest.approx(result["half_life"], rel=1e-6)
        assert result["half_life_high"] == pytest.approx(result["half_life"], rel=1e-6)
        assert result["initial_loss"] == pytest.approx(losses[0], rel=1e-6)
        assert result["final_loss"] == pytest.approx(losses[-1], rel=1e-6)
        assert result["drop"] == pytest.approx(losses[0] - losses[-1], rel=1e-6)
        assert (result["points"], result["note"]) == (30, "")

    def test_uneven_steps_in_any_order(self):
        steps = np.array([7.0, 8.0, 11.0, 40.0, 41.0, 90.0, 300.0, 310.0])
        rows = list(zip(steps, exponential(steps, 60.0), strict=True))
        random.Random(0).shuffle(rows)
        result = fit_convergence(*zip(*rows, strict=True))
        assert result["half_life"] == pytest.approx(60 * math.log(2), rel=1e-6)
        assert (result["initial_loss"], result["final_loss"]) == pytest.approx((2.5, exponential(steps, 60.0)[-1]))

    def test_running_mean_has_the_same_half_life(self):
        losses = exponential(np.arange(400.0), 70.0).reshape(40, 10).mean(axis=1)  # what logging_steps=10 writes
        result = fit_convergence(np.arange(10, 401, 10), losses)
        assert result["half_life"] == pytest.approx(70 * math.log(2), rel=1e-6)

    def test_more_points_than_are_fitted(self):
        steps = np.arange(4 * MAX_POINTS, dtype=float)
        result = fit_convergence(steps, exponential(steps, 300.0))
        assert result["half_life"] == pytest.approx(300 * math.log(2), rel=1e-6)
        assert result["points"] == 4 * MAX_POINTS

    @pytest.mark.parametrize("tau", [0.05, 0.2, 0.8, 3.0])
    def test_area_has_its_closed_form(self, tau):
        steps = np.linspace(0, 1, 500)
        end = math.exp(-1 / tau)
        area = fit_convergence(steps, exponential(steps, tau))["normalized_area"]
        assert area == pytest.approx(tau - end / (1 - end), abs=1e-4)

    def test_area_under_a_straight_fall_is_one_half(self):
        assert fit_convergence(STEPS, 5 - 0.01 * STEPS)["normalized_area"] == pytest.approx(0.5, abs=0.01)


class TestWithNoise:
    @pytest.mark.parametrize(
        ("points", "rho", "least"),
        [
            pytest.param(8, 0.0, 0.92, marks=pytest.mark.slow),  # few points
            (60, 0.5, 0.87),  # correlated noise
            pytest.param(40, 0.0, 0.92, marks=pytest.mark.slow),  # easier than both
        ],
    )
    def test_interval_covers_the_truth_as_often_as_it_says(self, points, rho, least):
        steps = np.linspace(0, 1000, points)
        covered = 0
        for seed in range(120):
            result = fit_convergence(steps, exponential(steps, 200.0) + 0.1 * noise(points, seed, rho=rho), seed=seed)
            covered += result["half_life_low"] <= 200 * math.log(2) <= result["half_life_high"]
        assert least <= covered / 120 <= 0.99  # the standard error of the share is 0.02

    def test_spikes_hardly_matter(self):
        losses = exponential(STEPS, 50.0) + 0.02 * noise(30, 0)
        losses[[4, 13, 22]] += [5.0, 40.0, 3.0]
        result = fit_convergence(STEPS, losses)
        assert result["half_life"] == pytest.approx(50 * math.log(2), rel=0.05)
        assert result["half_life_low"] < 50 * math.log(2) < result["half_life_high"] < 50

    def test_standstill_is_rarely_called_a_drop(self):
        found = [fit_convergence(STEPS, noise(30, seed))["drop"] is not None for seed in range(100)]
        assert np.mean(found) <= 0.08

    def test_small_drop_is_found_among_many_points(self):
        steps = np.arange(300.0)
        assert fit_convergence(steps, exponential(steps, 60.0, height=0.8) + noise(300, 0))["drop"] > 0

    def test_seed_alone_decides_the_interval(self):
        losses = exponential(STEPS, 50.0) + 0.1 * noise(30, 0)
        before = np.random.get_state()[1].copy()
        assert fit_convergence(STEPS, losses, seed=1) == fit_convergence(STEPS, losses, seed=1)
        assert fit_convergence(STEPS, losses, seed=1) != fit_convergence(STEPS, losses, seed=2)
        assert np.array_equal(np.random.get_state()[1], before)


class TestNoFinding:
    @pytest.mark.parametrize(
        ("losses", "note"),
        [
            ([], "Too few points: 0"),
            ([3.0, 2.0, 1.0], "Too few points: 3"),
            ([1.0] * 10, "No significant drop"),
            (list(range(10)), "No significant drop"),
            ([math.nan, math.inf, None, 3.0, 2.0, 1.0], "Too few points: 3"),
        ],
    )
    def test_all_values_are_none(self, losses, note):
        result = fit_convergence(range(len(losses)), losses)
        assert all(result[name] is None for name in VALUES)
        assert result["note"].startswith(note)

    def test_points_at_one_step_are_one(self):
        assert fit_convergence([1, 1, 1, 1, 2], [5, 4, 3, 2, 1])["note"].startswith("Too few points: 2")

    @pytest.mark.parametrize(
        ("losses", "note"),
        [(exponential(STEPS, 500.0), "Not yet levelled"), (exponential(STEPS, 1.0), "The loss fell before")],
    )
    def test_no_times_that_the_curve_does_not_show(self, losses, note):
        result = fit_convergence(STEPS, losses + 1e-6 * noise(30, 0))
        times = [result[name] for name in VALUES[:6]]
        assert times == [None] * 6 and result["note"].startswith(note)
        assert result["drop"] == pytest.approx(losses[0] - losses[-1], rel=1e-3)

    def test_no_times_lost_in_the_scatter(self):
        result = fit_convergence(STEPS[:15], exponential(STEPS[:15], 50.0, height=0.1) + 0.05 * noise(15, 6))
        assert result["drop"] > 0
        assert [result[name] for name in VALUES[:6]] == [None] * 6
        assert "too large to tell how fast" in result["note"]

    def test_no_upper_end_that_the_curve_does_not_show(self):
        result = fit_convergence(STEPS[:8], exponential(STEPS[:8], 50.0) + 0.15 * noise(8, 3))
        assert result["half_life"] is not None
        assert result["half_life_high"] is None and result["steps_to_90_high"] is None
        assert result["half_life_low"] < 50 * math.log(2)
        assert "bound the half-life from above" in result["note"]


class TestMeasurement:
    def test_class_gives_what_the_function_gives(self, tmp_path):
        losses = [None, *exponential(STEPS[1:], 50.0) + 0.1 * noise(29, 0)]
        measurement = ConvergenceSpeed(cache_dir=str(tmp_path))
        result = measurement.compute(step=STEPS.tolist(), loss=losses, seed=5)
        assert result == fit_convergence(STEPS, losses, seed=5)
        assert result["points"] == 29

    def test_different_lengths_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="Mismatch in the number"):
            ConvergenceSpeed(cache_dir=str(tmp_path)).compute(step=[1, 2], loss=[1.0])
