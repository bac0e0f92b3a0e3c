# SPDX-License-Identifier: Apache-2.0
"""The numbers of the interactive plots: what is drawn is what the report holds."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from hf_optimizability.number_format import format_estimate
from hf_optimizability.quantities.loss_landscape import Landscape
from hf_optimizability.report import OptimizabilityReport
from hf_optimizability.report.charts import MAX_POINTS, charts
from tests.support.example_report import make_report


def series(report: OptimizabilityReport, chart: str) -> dict[str, dict]:
    [found] = [one for one in charts(report) if one["id"] == chart]
    return {one["label"]: one for one in found["series"]}


def test_there_is_a_chart_for_all_there_is_data_for():
    assert [chart["id"] for chart in charts(make_report())] == [
        "loss",
        "stability_margin",
        "learning_rates",
        "gradient_norm",
        "trace",
        "eigenvalues",
        "noise_scale",
        "density",
        "landscape_update_0",
        "landscape_eigenvectors_0",
        "landscape_update_1",
        "landscape_eigenvectors_1",
    ]
    assert charts(OptimizabilityReport()) == charts(make_report(0, failures=1)) == []


def test_is_json_without_what_json_lacks():
    json.dumps(charts(make_report(3, converged=False)), allow_nan=False)


def test_losses_are_the_log_to_six_digits():
    report = make_report()
    logged = [(entry["step"], entry["loss"]) for entry in report.log_history if "loss" in entry]
    drawn = series(report, "loss")
    assert drawn["training log"]["x"] == [step for step, _ in logged]
    assert drawn["training log"]["y"] == pytest.approx([loss for _, loss in logged], rel=1e-5)
    assert drawn["probe set, eval mode"]["x"] == [0, 150, 300]


def test_what_is_not_finite_is_a_gap_and_steps_are_put_in_order():
    log = [{"loss": loss, "step": step} for step, loss in ((3, 0.5), (1, 1.0), (2, None))]
    assert series(OptimizabilityReport(log_history=log), "loss")["training log"]["y"] == [1.0, None, 0.5]


def test_error_bars_are_the_intervals():
    report = make_report(3, converged=False)
    drawn = series(report, "trace")["Hessian trace, 95 % interval"]
    traces = [measurement.hessian.trace for measurement in report.measurements]
    np.testing.assert_allclose(drawn["low"], [trace.low for trace in traces], rtol=1e-5)
    np.testing.assert_allclose(drawn["high"], [trace.high for trace in traces], rtol=1e-5)
    assert drawn["text"] == [format_estimate(trace) for trace in traces]
    assert drawn["hollow"] == [True] * 3


def test_an_open_interval_says_so():
    drawn = series(make_report(), "noise_scale")["Gradient noise scale, 95 % interval"]
    assert drawn["open"] == [True, False, False]
    assert drawn["low"] == [20.1] * 3
    assert drawn["high"] == [None, 88.4, 88.4]
    assert drawn["text"] == ["at least 20", "35 (20 to 89)", "35 (20 to 89)"]


def test_a_logarithmic_axis_holds_positive_values_only():
    [measurement] = make_report(1).measurements
    report = OptimizabilityReport(
        measurements=[dataclasses.replace(measurement, grad_norm=0.0)],
        log_history=[{"grad_norm": 0.0, "step": 1}, {"grad_norm": 2.0, "step": 2}],
    )
    drawn = series(report, "gradient_norm")
    assert drawn["all, training batches before clipping"]["y"] == [None, 2.0]
    assert "all, probe set" not in drawn


def test_blocks_keep_their_order_and_get_a_color_each():
    drawn = list(series(make_report(blocks=5), "gradient_norm").values())
    assert [one["label"] for one in drawn[2:]] == ["embeddings", "layer.0", "layer.1", "layer.2", "head"]
    assert [one["ramp"] for one in drawn[2:]] == [0, 0.25, 0.5, 0.75, 1]


def test_a_long_log_keeps_its_extremes():
    rng = np.random.default_rng(0)
    losses = rng.normal(1, 0.1, 10_007)
    losses[1234], losses[8000], losses[9000] = 9.0, -3.0, math.nan
    log = [{"loss": float(loss), "step": step} for step, loss in enumerate(losses)]
    drawn = series(OptimizabilityReport(log_history=log), "loss")["training log"]
    assert drawn["thinned"] == 10_007
    assert len(drawn["x"]) <= MAX_POINTS
    assert drawn["x"] == sorted(drawn["x"])
    points = dict(zip(drawn["x"], drawn["y"], strict=True))
    assert points[1234] == 9.0 and points[8000] == -3.0 and points[9000] is None
    assert all(loss is None or loss == pytest.approx(losses[step], rel=1e-5) for step, loss in points.items())


def test_labels_are_one_line():
    [measurement] = make_report(1).measurements
    block = measurement.blocks["head"]
    named = dataclasses.replace(measurement, blocks={"a\n\u202eb": block})
    report = OptimizabilityReport(
        measurements=[named], log_history=[{"optimizability/train_grad_norm/a\n\u202eb": 1.0, "step": 1}]
    )
    assert "a b" in series(report, "gradient_norm")


def test_slices_are_those_of_the_first_and_the_last_measurement_with_their_model():
    report = make_report(3)
    for index, measurement in enumerate(report.measurements[::2]):
        drawn, line = series(report, f"landscape_update_{index}"), measurement.landscape.update
        assert drawn["loss"]["x"] == pytest.approx(line.axis.at, rel=1e-5)
        assert drawn["loss"]["y"] == pytest.approx(line.losses, rel=1e-5)
        assert (drawn["now"]["x"], drawn["now"]["y"]) == ([0.0], [pytest.approx(measurement.loss, rel=1e-5)])
        rate = measurement.optimizer_stability.learning_rate
        assert drawn["after the next step"]["x"] == [rate]
        assert drawn["after the next step"]["y"] == pytest.approx([line.losses[line.axis.at.index(rate)]], rel=1e-5)
        model = drawn["quadratic model"]
        change = [line.axis.slope * s + line.axis.curvature / 2 * s**2 for s in model["x"]]
        assert model["y"] == pytest.approx([measurement.loss + by for by in change], rel=1e-4)
        [found] = [one for one in charts(report) if one["id"] == f"landscape_eigenvectors_{index}"]
        plane, middle = measurement.landscape.eigenvectors, measurement.landscape.eigenvectors.axes[0].at.index(0)
        assert [one["label"] for one in found["series"][::2]] == ["along q₁", "along q₂"]
        assert found["series"][0]["y"] == pytest.approx(plane.losses[middle], rel=1e-5)
        assert found["series"][2]["y"] == pytest.approx([row[middle] for row in plane.losses], rel=1e-5)


def test_a_model_that_runs_away_from_the_loss_ends_near_it():
    [measurement] = make_report(1).measurements
    line = measurement.landscape.update
    steep = dataclasses.replace(line, axis=dataclasses.replace(line.axis, curvature=100 * line.axis.curvature))
    measurement = dataclasses.replace(measurement, landscape=Landscape(steep, None))
    drawn = series(OptimizabilityReport(measurements=[measurement]), "landscape_update_0")
    known = [y for y in drawn["quadratic model"]["y"] if y is not None]
    span = max(line.losses) - min(line.losses)
    assert 10 < len(known) < 100
    assert max(line.losses) < max(known) <= max(line.losses) + 0.25 * span


def test_without_a_step_in_reach_there_is_no_point_for_it():
    [measurement] = make_report(1).measurements
    for rate in (1.0, 0.0):
        size = dataclasses.replace(measurement.optimizer_stability, learning_rate=rate)
        report = OptimizabilityReport(measurements=[dataclasses.replace(measurement, optimizer_stability=size)])
        assert "after the next step" not in series(report, "landscape_update_0")
