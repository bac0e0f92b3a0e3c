# SPDX-License-Identifier: Apache-2.0
"""The plots, read back from the figures: what is drawn is what the report holds."""

from __future__ import annotations

import dataclasses
import io
import math
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from PIL import Image

from hf_optimizability.quantities.loss_landscape import Landscape
from hf_optimizability.report import OptimizabilityReport
from hf_optimizability.report.figures import (
    plot_all,
    plot_blocks,
    plot_curvature,
    plot_density,
    plot_gradient_norm,
    plot_landscape,
    plot_loss,
    plot_noise_scale,
    plot_ritz_values,
    plot_stability_margin,
)
from tests.support.example_report import make_measurement, make_report


pytestmark = pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")

NAMES = [
    "loss",
    "stability_margin",
    "gradient_norm",
    "noise_scale",
    "curvature",
    "density",
    "ritz_values",
    "landscape",
    "blocks",
]
PLOTS = [
    plot_loss,
    plot_stability_margin,
    plot_gradient_norm,
    plot_noise_scale,
    plot_curvature,
    plot_density,
    plot_ritz_values,
    plot_landscape,
    plot_blocks,
]
OF_BLOCKS = [plot_gradient_norm, plot_blocks]
"""Those that show names, norms or curvature of blocks."""


def line(axes: Axes, label: str) -> np.ndarray:
    """The points of the line with that label."""
    return np.asarray(next(line for line in axes.lines if line.get_label() == label).get_xydata())


def error_bars(axes: Axes) -> dict[str, ErrorbarContainer]:
    return {str(bars.get_label()): bars for bars in axes.containers if isinstance(bars, ErrorbarContainer)}


def draw(figure: Figure) -> FigureCanvasAgg:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas


class TestAll:
    @pytest.mark.parametrize(
        ("report", "names"),
        [
            (make_report(1), NAMES),
            (make_report(0, failures=2), []),
            (OptimizabilityReport(log_history=[{"loss": 1.0, "step": 1}]), ["loss"]),
            (OptimizabilityReport(log_history=[{"grad_norm": 1.0, "step": 1}]), ["gradient_norm"]),
            (OptimizabilityReport(log_history=[{"eval_loss": None, "step": 1}]), []),
        ],
        ids=["one", "all failed", "loss log", "gradient log", "NaN only"],
    )
    def test_draws_what_there_is_data_for(self, report, names):
        assert list(plot_all(report)) == names

    @pytest.mark.slow
    def test_large_reports_make_small_files_of_150_dpi(self):
        for name, images in plot_all(make_report(20, blocks=30)).items():
            image = Image.open(io.BytesIO(images["png"]))
            assert image.format == "PNG"
            assert image.info["dpi"] == pytest.approx((150, 150), rel=1e-3)
            assert 800 < image.width < 1500
            assert len(images["png"]) < 150_000, name
            assert len(images["svg"]) < 200_000, name

    def test_svg_is_well_formed_and_the_same_each_time(self):
        report = OptimizabilityReport(log_history=[{"loss": 1.0, "step": 1}])
        once, again = (plot_all(report)["loss"]["svg"] for _ in range(2))
        assert ElementTree.fromstring(once).tag == "{http://www.w3.org/2000/svg}svg"
        assert once == again

    def test_leaves_matplotlib_as_it_was(self):
        before = dict(matplotlib.rcParams)
        assert plot_all(OptimizabilityReport(log_history=[{"loss": 1.0, "step": 1}]))
        assert dict(matplotlib.rcParams) == before

    @pytest.mark.parametrize(  # all are drawn in the same context
        "plot", [plot_loss, *(pytest.param(plot, marks=pytest.mark.slow) for plot in PLOTS if plot is not plot_loss)]
    )
    def test_does_not_depend_on_the_users_style(self, plot):
        report = make_report(1, blocks=3)
        expected = np.asarray(draw(plot(report)).buffer_rgba()).copy()
        with matplotlib.rc_context({"text.usetex": True, "font.size": 20, "axes.grid": False}):
            figure = plot(report)
        np.testing.assert_array_equal(draw(figure).buffer_rgba(), expected)

    @pytest.mark.parametrize(
        "plot", [plot for plot in PLOTS if plot not in (plot_ritz_values, plot_landscape, plot_blocks)]
    )
    def test_legends_lie_outside_the_data_and_inside_the_figure(self, plot):
        figure = plot(make_report())
        renderer = draw(figure).get_renderer()
        for axes in (axes for axes in figure.axes if axes.get_legend()):
            legend, data = axes.get_legend().get_window_extent(renderer), axes.get_window_extent(renderer)
            assert legend.y0 >= data.y1 - 1
            assert legend.x1 <= figure.bbox.x1
            assert legend.y1 <= figure.bbox.y1

    @pytest.mark.parametrize("plot", PLOTS)
    def test_every_axis_says_what_it_shows(self, plot):
        figure = plot(make_report())
        for axes in (axes for axes in figure.axes if axes.get_label() != "<colorbar>"):
            assert axes.get_ylabel() or axes.get_title()
        assert any(axes.get_xlabel() for axes in figure.axes)


class TestLoss:
    def test_lines_are_the_log(self):
        report = make_report()
        (axes,) = plot_loss(report).axes
        logged = [(entry["step"], entry["loss"]) for entry in report.log_history if "loss" in entry]
        evaluated = [(entry["step"], entry["eval_loss"]) for entry in report.log_history if "eval_loss" in entry]
        assert line(axes, "training log").tolist() == [list(point) for point in logged]
        assert line(axes, "evaluation").tolist() == [list(point) for point in evaluated]
        assert line(axes, "probe set, eval mode").tolist() == [[m.step, m.loss] for m in report.measurements]

    def test_a_loss_that_is_not_finite_leaves_a_gap(self):
        log = [{"loss": loss, "step": step} for step, loss in enumerate([1.0, None, math.nan, 0.5])]
        (axes,) = plot_loss(OptimizabilityReport(log_history=log)).axes
        np.testing.assert_array_equal(line(axes, "training log")[:, 1], [1.0, math.nan, math.nan, 0.5])


class TestGradientNorm:
    def test_lines_are_the_log_and_markers_the_measurements(self):
        report = make_report(2, blocks=3)
        axes = plot_gradient_norm(report).axes[0]
        drawn = [points.get_ydata().tolist() for points in axes.lines]
        for name in ("embeddings", "layer.0", "head"):
            key = f"optimizability/train_grad_norm/{name}"
            assert [entry[key] for entry in report.log_history if key in entry] in drawn
            assert [measurement.blocks[name].grad_norm for measurement in report.measurements] in drawn
        assert line(axes, "all, probe set")[:, 1].tolist() == [m.grad_norm for m in report.measurements]
        assert axes.get_yscale() == "log"

    def test_colors_name_every_block_in_order(self):
        _, bar = plot_gradient_norm(make_report(blocks=30)).axes
        names = [label.get_text() for label in bar.get_yticklabels()]
        assert names == ["embeddings", *(f"layer.{index}" for index in range(28)), "head"]
        assert bar.yaxis_inverted()

    def test_works_without_training_norms(self):
        report = dataclasses.replace(make_report(2), log_history=[])
        axes = plot_gradient_norm(report).axes[0]
        assert len(axes.lines) == 8 + 1


class TestStabilityMargin:
    def test_sharpness_stands_against_its_limit(self):
        report = make_report()
        upper, lower = plot_stability_margin(report).axes
        sizes = [measurement.optimizer_stability for measurement in report.measurements]
        points, _, (bars,) = error_bars(upper)["sharpness, 95 % interval"].lines
        assert points.get_ydata().tolist() == [size.sharpness.value for size in sizes]
        ends = np.array(bars.get_segments())
        np.testing.assert_allclose(ends[:, 1, 1] - ends[:, 0, 1], [2 * size.sharpness.residual for size in sizes])
        assert line(upper, "stability limit")[:, 1] == pytest.approx(1.9e6)
        logged = [(entry["step"], entry["learning_rate"]) for entry in report.log_history if "learning_rate" in entry]
        assert line(lower, "in use").tolist() == [list(point) for point in logged]
        (bars,) = error_bars(lower)["critical, with its bracket"].lines[2]
        np.testing.assert_allclose(np.array(bars.get_segments())[:, :, 1], [[2.3e-4, 2.9e-4]] * 3)

    def test_the_limit_follows_the_learning_rate(self):
        report = make_report(2)  # limits of 1.9e6 at 2e-5 were measured at both ends
        report.log_history = [{"step": 10, "learning_rate": 4e-5}, {"step": 20, "learning_rate": 0.0}]
        points = line(plot_stability_margin(report).axes[0], "stability limit")
        assert points.tolist() == [[0, 1.9e6], [10, pytest.approx(0.95e6)], [300, 1.9e6]]

    def test_needs_an_optimizer(self):
        [measurement] = make_report(1).measurements
        report = OptimizabilityReport(measurements=[dataclasses.replace(measurement, optimizer_stability=None)])
        assert plot_stability_margin(report) is None

    def test_without_a_learning_rate_there_is_no_limit(self):
        [measurement] = make_report(1).measurements
        size = dataclasses.replace(measurement.optimizer_stability, learning_rate=0.0, limit=math.inf)
        report = OptimizabilityReport(measurements=[dataclasses.replace(measurement, optimizer_stability=size)])
        upper, _ = plot_stability_margin(report).axes
        assert [text.get_text() for text in upper.get_legend().get_texts()] == ["sharpness, 95 % interval"]


class TestNoiseScale:
    def test_bars_are_the_interval_and_an_arrow_where_it_is_open(self):
        report = make_report()
        report.training["examples_per_step"] = 16
        (axes,) = plot_noise_scale(report).axes
        points, _, (bars,) = error_bars(axes)["Gradient noise scale, 95 % interval"].lines
        assert points.get_ydata().tolist() == [35.2] * 3
        np.testing.assert_allclose(np.array(bars.get_segments())[:, :, 1], [[20.1, 35.2], [20.1, 88.4], [20.1, 88.4]])
        assert [note.xyann for note in axes.texts] == [(0, 35.2)]
        assert line(axes, "not converged").tolist() == [[0, 35.2]]
        assert set(line(axes, "items in a batch")[:, 1]) == {16}

    def test_a_batch_of_sequences_holds_many_labels(self):
        report = make_report(2)
        report.training["examples_per_step"] = 8
        probe = dataclasses.replace(report.data.probe, items=50 * report.data.probe.examples)
        report.data = dataclasses.replace(report.data, probe=probe)
        assert set(line(plot_noise_scale(report).axes[0], "items in a batch")[:, 1]) == {400}


class TestDensity:
    def test_lines_are_the_densities_without_the_tails_of_the_kernel(self):
        report = make_report()
        (axes,) = plot_density(report).axes
        for measurement in (report.measurements[0], report.measurements[-1]):
            density = measurement.hessian.density
            grid, drawn = line(axes, f"step {measurement.step}").T
            np.testing.assert_array_equal(grid, density.grid)
            kept = np.isfinite(drawn)
            np.testing.assert_array_equal(drawn[kept], np.array(density.density)[kept])
            step = density.grid[1] - density.grid[0]
            assert drawn[kept].sum() * step == pytest.approx(1, abs=1e-6)
            single = 1 / 22_713_986 / (density.width * math.sqrt(2 * math.pi))
            assert 0.01 * single <= drawn[kept].min() < single

    def test_one_measurement_draws_one_line(self):
        (axes,) = plot_density(make_report(1)).axes
        assert len(axes.lines) == 1

    def test_power_iteration_has_none(self):
        [measurement] = make_report(1).measurements
        hessian = dataclasses.replace(measurement.hessian, density=None)
        report = OptimizabilityReport(measurements=[dataclasses.replace(measurement, hessian=hessian)])
        assert plot_density(report) is None


class TestCurvature:
    def test_error_bars_are_the_intervals(self):
        report = make_report()
        upper, lower = plot_curvature(report).axes
        for axes, label, name in (
            (upper, "Hessian trace, 95 % interval", "trace"),
            (lower, "λ_max, 95 % interval", "lambda_max"),
            (lower, "λ_min, 95 % interval", "lambda_min"),
        ):
            points, _, (bars,) = error_bars(axes)[label].lines
            estimates = [getattr(measurement.hessian, name) for measurement in report.measurements]
            assert points.get_ydata().tolist() == [estimate.value for estimate in estimates]
            ends = np.array(bars.get_segments())
            np.testing.assert_allclose(ends[:, 0, 1], [e.low for e in estimates])
            np.testing.assert_allclose(ends[:, 1, 1], [e.high for e in estimates])
            assert ends[:, 0, 0].tolist() == [0, 150, 300]

    def test_what_did_not_converge_is_hollow(self):
        upper, lower = plot_curvature(make_report(converged=False)).axes
        assert len(line(upper, "not converged")) == 3
        hessians = [measurement.hessian for measurement in make_report(converged=False).measurements]
        assert line(lower, "not converged")[:, 1].tolist() == [hessian.lambda_min.value for hessian in hessians]
        assert lower.get_legend().get_texts()[-1].get_text() == "not converged"

    def test_an_unknown_interval_draws_no_bar(self):
        measurement = make_measurement()
        trace = dataclasses.replace(measurement.hessian.trace, low=-math.inf, high=math.inf)
        hessian = dataclasses.replace(measurement.hessian, trace=trace, lambda_min=None)
        figure = plot_curvature(OptimizabilityReport(measurements=[dataclasses.replace(measurement, hessian=hessian)]))
        draw(figure)
        upper, lower = figure.axes
        [bar] = error_bars(upper)["Hessian trace, 95 % interval"].lines[2][0].get_segments()
        assert bar[:, 1].tolist() == [trace.value] * 2
        assert list(error_bars(lower)) == ["λ_max, 95 % interval"]


class TestRitzValues:
    def test_stems_are_values_and_weights(self):
        report = make_report()
        hessian = report.measurements[-1].hessian
        (axes,) = plot_ritz_values(report).axes
        tops = np.array([segment[1] for segment in axes.collections[0].get_segments()])
        np.testing.assert_allclose(tops, np.transpose([hessian.ritz_values, hessian.ritz_weights]))
        assert axes.get_ylim()[0] < min(hessian.ritz_weights)

    def test_marks_the_ends_and_a_single_eigenvalue(self):
        report = make_report()
        (axes,) = plot_ritz_values(report).axes
        marks = {str(mark.get_label()).split()[0]: mark.get_xydata() for mark in axes.lines}
        assert marks["λ_max"][0, 0] == report.measurements[-1].hessian.lambda_max.value
        assert marks["λ_min"][0, 0] == report.measurements[-1].hessian.lambda_min.value
        assert marks["1/n,"][0, 1] == pytest.approx(1 / report.measurements[-1].trainable_parameters)

    def test_a_weight_of_zero_is_no_problem(self):
        measurement = make_measurement()
        weights = (0.0, *measurement.hessian.ritz_weights[1:])
        hessian = dataclasses.replace(measurement.hessian, ritz_weights=weights)
        draw(plot_ritz_values(OptimizabilityReport(measurements=[dataclasses.replace(measurement, hessian=hessian)])))

    def test_power_iteration_has_none(self):
        measurement = make_measurement()
        hessian = dataclasses.replace(measurement.hessian, ritz_values=(), ritz_weights=(), lambda_min=None)
        report = OptimizabilityReport(measurements=[dataclasses.replace(measurement, hessian=hessian)])
        assert plot_ritz_values(report) is None


class TestLandscape:
    def test_panels_hold_the_losses_of_the_first_and_the_last_measurement(self):
        report = make_report()
        figure = plot_landscape(report)
        panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
        for (update, lines, plane), measurement in zip(
            (panels[:3], panels[3:]), report.measurements[::2], strict=True
        ):
            landscape, present = measurement.landscape, measurement.loss
            assert update.get_title() == f"step {measurement.step}: along the update"
            assert (
                line(update, "loss").tolist()
                == np.transpose([landscape.update.axis.at, landscape.update.losses]).tolist()
            )
            places, model = line(update, "quadratic model").T
            axis = landscape.update.axis
            np.testing.assert_allclose(model, present + axis.slope * places + axis.curvature / 2 * places**2)
            rate = measurement.optimizer_stability.learning_rate
            assert line(update, "after the next step").tolist() == [
                [rate, landscape.update.losses[axis.at.index(rate)]]
            ]
            losses = np.array(landscape.eigenvectors.losses)
            assert line(lines, "along q₁")[:, 1].tolist() == losses[5].tolist()
            assert line(lines, "along q₂")[:, 1].tolist() == losses[:, 5].tolist()
            [mesh] = plane.collections
            np.testing.assert_allclose(mesh.get_array(), losses - present)
            assert mesh.norm.vmin == -mesh.norm.vmax
            np.testing.assert_allclose(mesh.get_coordinates()[0, :, 0], np.linspace(-1.1, 1.1, 12))
            assert not plane.yaxis_inverted()

    def test_is_drawn_only_where_it_was_measured(self):
        first, second, third = make_report().measurements
        bare = [dataclasses.replace(measurement, landscape=None) for measurement in (first, third)]
        report = OptimizabilityReport(measurements=[bare[0], second, bare[1]])
        assert plot_landscape(report).axes[0].get_title() == "step 150: along the update"
        assert plot_landscape(OptimizabilityReport(measurements=bare)) is None

    def test_slices_that_are_missing_or_not_finite_are_no_problem(self):
        measurement = make_measurement()
        update, plane = measurement.landscape.update, measurement.landscape.eigenvectors
        infinite = dataclasses.replace(plane, losses=tuple((math.inf,) * 11 for _ in range(11)))
        for landscape in (Landscape(None, plane), Landscape(update, None), Landscape(update, infinite)):
            found = OptimizabilityReport(measurements=[dataclasses.replace(measurement, landscape=landscape)])
            draw(plot_landscape(found))


class TestBlocks:
    def test_maps_hold_the_traces_and_relative_norms(self):
        report = make_report(3, blocks=4)
        left, right = plot_blocks(report).axes[:2]
        traces, relative = left.images[0].get_array(), right.images[0].get_array()
        for column, measurement in enumerate(report.measurements):
            for row, block in enumerate(measurement.blocks.values()):
                assert traces[row, column] == block.trace.value
                assert relative[row, column] == pytest.approx(block.grad_norm / block.weight_norm)
        assert [label.get_text() for label in left.get_yticklabels()] == ["embeddings", "layer.0", "layer.1", "head"]
        assert [label.get_text() for label in left.get_xticklabels()] == ["0", "150", "300"]

    def test_trace_colors_are_centred_on_zero(self):
        image = plot_blocks(make_report()).axes[0].images[0]
        assert image.norm.vmin == -image.norm.vmax
        assert np.abs(image.get_array()).max() == image.norm.vmax

    def test_values_are_written_where_there_is_room(self):
        assert len(plot_blocks(make_report(6, blocks=3)).axes[0].texts) == 18
        crowded = plot_blocks(make_report(20, blocks=30)).axes[0]
        assert len(crowded.texts) == 0
        assert len(crowded.get_xticks()) <= 8

    def test_zero_gradient_weights_and_curvature_are_drawn_without_a_warning(self):
        measurement = make_measurement(blocks=3)
        flat = {
            name: dataclasses.replace(
                block, grad_norm=0.0, weight_norm=0.0, trace=dataclasses.replace(block.trace, value=0.0)
            )
            for name, block in measurement.blocks.items()
        }
        report = OptimizabilityReport(measurements=[dataclasses.replace(measurement, blocks=flat, grad_norm=0.0)])
        for plot in OF_BLOCKS:
            draw(plot(report))

    def test_any_block_name_can_be_drawn(self):
        measurement = make_measurement(blocks=3)
        names = ["$\\frac{", "a\nb", "_" + "x" * 100]
        blocks = dict(zip(names, measurement.blocks.values(), strict=True))
        report = OptimizabilityReport(measurements=[dataclasses.replace(measurement, blocks=blocks)])
        for plot in OF_BLOCKS:
            draw(plot(report))
        labels = [label.get_text() for label in plot_blocks(report).axes[0].get_yticklabels()]
        assert labels == [r"\$\frac{", "a b", "…" + "x" * 27]
