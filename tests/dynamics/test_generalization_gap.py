# SPDX-License-Identifier: Apache-2.0
"""Generalization gap against sums done by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hf_optimizability.dynamics.generalization_gap import VALUES, GeneralizationGap, compare_losses


class TestGap:
    def test_by_hand(self):
        result = compare_losses([30, 10, 20], [0.2, 1.0, 0.5], [0.9, 1.1, 0.6], [0.03, 9.0, 9.0], [0.04, 9.0, 9.0])
        assert (result["step"], result["train_loss"], result["eval_loss"]) == (30, 0.2, 0.9)
        assert result["loss_gap"] == pytest.approx(0.7)
        assert result["std_error"] == pytest.approx(0.05)
        assert (result["low"], result["high"]) == pytest.approx((0.7 - 0.097998, 0.7 + 0.097998), abs=1e-6)
        assert (result["best_eval_loss"], result["best_step"]) == (0.6, 20)
        assert result["rise_since_best"] == pytest.approx(0.3)
        assert result["note"] == ""

    @pytest.mark.parametrize(("gap", "significant"), [(0.09, False), (0.11, True), (-0.11, True), (0.0, False)])
    def test_significant_beyond_1_96_standard_errors(self, gap, significant):
        assert compare_losses([1], [1.0], [1.0 + gap], [0.03], [0.04])["significant"] is significant

    def test_interval_covers_the_truth(self):
        rng = np.random.default_rng(0)
        train, evaluated = 1 + 0.03 * rng.normal(size=2000), 1.2 + 0.04 * rng.normal(size=2000)
        results = [compare_losses([1], [t], [e], [0.03], [0.04]) for t, e in zip(train, evaluated, strict=True)]
        assert 0.94 <= np.mean([result["low"] <= 0.2 <= result["high"] for result in results]) <= 0.96


class TestMissing:
    @pytest.mark.parametrize("unknown", [None, math.nan])
    def test_no_error_without_both_standard_errors(self, unknown):
        result = compare_losses([1], [1.0], [1.5], [0.1], [unknown])
        assert result["loss_gap"] == 0.5
        assert [result[name] for name in ("std_error", "low", "high", "significant")] == [None] * 4
        assert result["note"].startswith("Without the standard errors")

    @pytest.mark.parametrize("train_loss", [None, math.nan, math.inf])
    def test_an_earlier_gap_is_no_substitute(self, train_loss):
        result = compare_losses([1, 2], [1.0, train_loss], [1.5, 1.75], [0.1, 0.1], [0.1, 0.1])
        assert (result["loss_gap"], result["train_loss"]) == (None, None)
        assert (result["eval_loss"], result["rise_since_best"]) == (1.75, 0.25)
        assert "not finite" in result["note"]

    def test_diverged_eval_loss(self):
        result = compare_losses([1, 2], [1.0, 1.0], [1.5, math.nan], [None, None], [None, None])
        assert (result["best_eval_loss"], result["best_step"], result["rise_since_best"]) == (1.5, 1, None)

    def test_no_rows(self):
        result = compare_losses([], [], [], [], [])
        assert all(result[name] is None for name in VALUES)
        assert result["note"].startswith("No losses")


def test_class_gives_what_the_function_gives(tmp_path):
    columns = {
        "step": [1, 2],
        "train_loss": [1.0, 0.5],
        "eval_loss": [1.0, 0.75],
        "train_std_error": [None, 0.1],
        "eval_std_error": [math.nan, 0.2],
    }
    result = GeneralizationGap(cache_dir=str(tmp_path)).compute(**columns)
    assert result == compare_losses(**columns)
    assert result["loss_gap"] == 0.25
