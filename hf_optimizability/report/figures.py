# SPDX-License-Identifier: Apache-2.0
"""The report's figures, drawn from the report alone and without the global state of pyplot."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatter, MaxNLocator

from ..linalg.estimate import Estimate
from ..number_format import format_estimate, format_number, one_line
from ..quantities.loss_landscape import LossPlane
from ..quantities.step_size import CriticalLearningRate
from ..report_data.data import ReportData
from ..report_data.series import Points, block_names, landscapes, measured_steps
from . import panels
from .panels import Line, Panel


BLUE, VERMILLION, GREEN, BLACK, GREY = "#0072B2", "#D55E00", "#009E73", "#000000", "#888888"  # after Okabe and Ito
STYLE: Any = {
    "text.usetex": False,
    "font.family": "DejaVu Sans",  # ships with matplotlib and has ‖, λ, θ and ±
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e5e5",
    "legend.frameon": False,
    "legend.columnspacing": 1.4,
    "legend.handlelength": 1.6,
}
INKS = {"blue": BLUE, "vermillion": VERMILLION, "green": GREEN, "ink": BLACK}
MARKERS = {"circle": "o", "diamond": "D", "triangle": "^", "inverted": "v"}
NOT_CONVERGED = "not converged"


def plot_all(report: ReportData) -> dict[str, dict[str, bytes]]:
    """Draw every plot for which the report holds data.

    Returns:
        `png` and `svg` files by name: some of `loss`, `stability_margin`, `gradient_norm`, `noise_scale`, `curvature`,
        `density`, `ritz_values`, `landscape`, `blocks`.

    Example:
        >>> plot_all(ReportData())
        {}
    """
    others = {name: panel for name, panel in panels.quantity_panels(report).items() if name not in panels.JOINT_PLOTS}
    figures = {
        "loss": plot_loss(report),
        "stability_margin": plot_stability_margin(report),
        "gradient_norm": plot_gradient_norm(report),
        **{name: _plot(panel) for name, panel in others.items()},
        "curvature": plot_curvature(report),
        "density": plot_density(report),
        "ritz_values": plot_ritz_values(report),
        "landscape": plot_landscape(report),
        "blocks": plot_blocks(report),
    }
    return {name: {"png": _png(figure), "svg": _svg(figure)} for name, figure in figures.items() if figure is not None}


def plot_loss(report: ReportData) -> Figure | None:
    """Draw the loss over optimizer steps: the training log, the evaluations, the probe set at each measurement."""
    return _plot(panels.loss(report))


def plot_stability_margin(report: ReportData) -> Figure | None:
    """Draw the sharpness against its limit and, below it, the learning rate in use against the critical one."""
    return _plot(panels.stability_margin(report), panels.learning_rates(report))


def plot_noise_scale(report: ReportData) -> Figure | None:
    """Draw the gradient noise scale with its 95 % interval over steps, against the batch size."""
    return _plot(panels.quantity_panels(report)["noise_scale"])


def plot_curvature(report: ReportData) -> Figure | None:
    """Draw the Hessian trace over steps and, below it, λ_max and λ_min, each with its 95 % interval."""
    by_name = panels.quantity_panels(report)
    figure = _plot(by_name["trace"], by_name["eigenvalues"])
    for axes in [] if figure is None else figure.axes:
        axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
        if len(report.measurements) == 1:
            axes.set_xticks(measured_steps(report))
    return figure


def plot_density(report: ReportData) -> Figure | None:
    """Draw the smoothed spectral density of the first and of the last measurement that has one."""
    return _plot(panels.density(report))


@matplotlib.rc_context(STYLE)
def plot_gradient_norm(report: ReportData) -> Figure | None:
    """Draw the gradient norm over optimizer steps, as a whole and by block.

    Lines are norms of training batches before clipping, as logged; markers those of the probe set.
    """
    panel, blocks = panels.gradient_norm(report), block_names(report)
    figure = _figure(7.2, max(4, 1 + 0.16 * len(blocks)))
    axes = figure.subplots()
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.93, len(blocks)))  # the last yellow is lost on white
    whole, by_block = panel.series[:2], panel.series[2:]
    for block, series, color in zip(blocks, by_block, colors, strict=True):
        assert isinstance(series, Line)
        _line(axes, *series.points, color=color, linewidth=0.6)
        norms = [m.blocks[block].grad_norm if block in m.blocks else math.nan for m in report.measurements]
        _line(axes, measured_steps(report), norms, color=color, linestyle="", marker="o", markersize=4)
    for series in whole:
        _draw(axes, series)
    if not axes.lines:
        return None
    axes.set_ylabel(panel.y)
    _log_scale(axes)
    _step_axis(axes)
    _legend(axes)
    if blocks:
        _name_colors(axes, blocks, colors)
    return figure


@matplotlib.rc_context(STYLE)
def plot_ritz_values(report: ReportData) -> Figure | None:
    """Draw the Ritz values of the last measurement, each as high as the share of the spectrum it represents.

    Returns:
        The figure, or `None` where the last measurement has no Ritz values.
    """
    if not report.measurements or not report.measurements[-1].hessian.ritz_values:
        return None
    measurement = report.measurements[-1]
    hessian, parameters = measurement.hessian, measurement.trainable_parameters
    weights = np.array(hessian.ritz_weights)
    floor = 0.1 * max(weights[weights > 0].min(), 1e-12)
    heights = np.maximum(weights, floor).tolist()
    figure = _figure(6.4, 3.6)
    axes = figure.subplots()
    axes.vlines(hessian.ritz_values, floor, heights, color=BLUE, linewidth=1.2)
    _line(axes, hessian.ritz_values, heights, color=BLUE, linestyle="", marker="o")
    for name, estimate, color in (("λ_max", hessian.lambda_max, VERMILLION), ("λ_min", hessian.lambda_min, GREEN)):
        if estimate is not None:
            label = f"{name} = {format_estimate(estimate)}"
            axes.axvline(estimate.value, color=color, linewidth=1, linestyle="--", label=label, zorder=1)
    if parameters:
        axes.axhline(1 / parameters, color=GREY, linewidth=1, linestyle=":", label="1/n, a single eigenvalue")
    axes.set(xlabel=f"Ritz value at step {measurement.step:,}", ylabel="weight (share of the spectrum)")
    axes.set(yscale="log", ylim=(floor, 2))
    _legend(axes)
    return figure


@matplotlib.rc_context(STYLE)
def plot_landscape(report: ReportData) -> Figure | None:
    """Draw the loss along the update, along the top two eigenvectors and over their plane, with the quadratic model.

    A row of panels for the first and one for the last measurement that has them.

    Returns:
        The figure, or `None` where no landscape was measured.
    """
    known = landscapes(report)
    if not known:
        return None
    figure = _figure(9.6, 0.4 + 3 * len(known))
    rows = figure.subplots(len(known), 3, squeeze=False, width_ratios=(1, 1, 1.1))
    for (update, lines, plane), (measurement, landscape) in zip(rows, known, strict=True):
        if landscape.update is None:
            update.set_axis_off()
        else:
            panel = panels.along_update("update", measurement, landscape.update)
            _draw_all(update, panel, markersize=3.5)
            update.set_title(f"step {measurement.step:,}: along the update")
            update.set_xlabel(panel.x, loc="left")  # the power of ten stands to the right
            update.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3))
        if landscape.eigenvectors is None:
            lines.set_axis_off()
            plane.set_axis_off()
            continue
        panel = panels.along_eigenvectors("eigenvectors", measurement, landscape.eigenvectors)
        _draw_all(lines, panel, markersize=3.5)
        lines.set(title="along the top eigenvectors", xlabel=panel.x)
        _loss_map(plane, landscape.eigenvectors, measurement.loss)
    for axes in rows[:, :2].flat:
        if axes.lines:
            axes.legend(loc="best", fontsize=7, frameon=True, framealpha=0.8, edgecolor="none")
    return figure


@matplotlib.rc_context(STYLE)
def plot_blocks(report: ReportData) -> Figure | None:
    """Draw two heat maps, block by measured step: Hessian traces, and gradient norms relative to the weights.

    Returns:
        The figure, or `None` where nothing was measured.
    """
    if not report.measurements:
        return None
    blocks = block_names(report)
    traces = np.full((len(blocks), len(report.measurements)), math.nan)
    relative = traces.copy()
    for column, measurement in enumerate(report.measurements):
        for name, block in measurement.blocks.items():
            row = blocks.index(name)
            traces[row, column] = block.trace.value
            relative[row, column] = block.grad_norm / block.weight_norm if block.weight_norm else math.nan
    figure = _figure(8.4, 1.4 + 0.2 * max(6, len(blocks)))
    left, right = figure.subplots(1, 2, sharey=True)
    limit = np.abs(traces[np.isfinite(traces)]).max(initial=0) or 1.0
    signed = SymLogNorm(limit / 30, vmin=-limit, vmax=limit)
    _heat_map(left, measured_steps(report), traces, cmap="RdBu_r", norm=signed)
    positive = relative[np.isfinite(relative) & (relative > 0)]
    norm = LogNorm(positive.min(), positive.max()) if positive.size else LogNorm(0.1, 1)
    _heat_map(right, measured_steps(report), relative, cmap="viridis", norm=norm)
    left.images[0].colorbar.set_ticks([-limit, -limit / 10, 0, limit / 10, limit])
    left.set_title("Hessian trace")
    right.set_title("gradient norm / weight norm")
    left.set_yticks(range(len(blocks)), [_block_label(block) for block in blocks])
    return figure


@matplotlib.rc_context(STYLE)
def _plot(*drawn: Panel) -> Figure | None:
    """Draw panels below each other, with a common horizontal axis; `None` if they have no data."""
    figure = _figure(6.4, 3.6 if len(drawn) == 1 else 5.2)
    rows = figure.subplots(len(drawn), sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(rows, drawn, strict=True):
        _draw_all(axes, panel)
        axes.set_xlabel("")
        if panel.log:
            _log_scale(axes)
        _legend(axes)
    if not any(axes.lines or axes.containers for axes in rows):
        return None
    if drawn[-1].x == panels.STEP:
        _step_axis(rows[-1])
    else:
        rows[-1].set_xlabel(drawn[-1].x)
    return figure


def _draw_all(axes: Axes, panel: Panel, **style: Any) -> None:
    """Add the series of a panel and the titles of its axes."""
    for series in panel.series:
        _draw(axes, series, **style)
    axes.set(xlabel=panel.x, ylabel=panel.y)


def _draw(axes: Axes, series: panels.Series, **style: Any) -> None:
    """Add a series."""
    color = INKS[series.color]
    if isinstance(series, Line):
        style |= {} if series.line else {"linestyle": "", "zorder": 4}
        style |= {"linestyle": "--"} if series.dash else {}
        style |= {} if series.marker is None else {"marker": MARKERS[series.marker]}
        style |= {"fillstyle": "none"} if series.marker == "diamond" else {}
        _line(axes, *_sorted(series.points), color=color, linewidth=1.2, label=series.label, **style)
    else:
        _intervals(axes, series.steps, series.values, color, MARKERS[series.marker], series.label)


def _figure(width: float, height: float) -> Figure:
    """Return an empty figure of that size in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: Figure) -> bytes:
    """Return the figure as a PNG file of 150 dpi; line plots in 256 colours, at a third of the size."""
    from PIL import Image

    figure.set_dpi(150)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    if not any(axes.images for axes in figure.axes):
        image = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True, dpi=(150, 150))
    return buffer.getvalue()


def _svg(figure: Figure) -> bytes:
    """Return the figure as an SVG file, deterministic; letters are outlines, which need no font."""
    figure.set_layout_engine("none")  # as it was laid out for the PNG
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "hf-optimizability", "svg.fonttype": "path"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return buffer.getvalue()


def _log_scale(axes: Axes) -> None:
    """Make the vertical axis logarithmic, unless all data are zero."""
    if axes.dataLim.y1 > 0:
        axes.set_yscale("log")
        if axes.dataLim.minposy > 1e-3 and axes.dataLim.y1 < 1e5:  # 0.1 and 20, not 10⁻¹ and 2 × 10¹
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))


def _sorted(points: Points) -> Points:
    """Return the points from left to right."""
    x, y = points
    order = np.argsort(x, kind="stable")
    return [x[i] for i in order], [y[i] for i in order]


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
    """Add a line, or nothing if there is no value."""
    if np.isfinite(y).any():
        axes.plot(x, y, **{"color": BLACK, "markersize": 5, **style})


def _intervals(
    axes: Axes,
    steps: Sequence[int],
    values: Sequence[Estimate | CriticalLearningRate],
    color: str,
    marker: str,
    label: str,
) -> None:
    """Add values with their intervals, hollow if not converged; an arrow to the top marks an unknown upper bound."""
    if not values:
        return
    known = [value.value if math.isfinite(value.value) else value.low for value in values]
    ends = [
        (middle - value.low if math.isfinite(value.low) else 0, value.high - middle if value.high < math.inf else 0)
        for middle, value in zip(known, values, strict=True)
    ]
    style: dict[str, Any] = {"marker": marker, "markersize": 5, "linewidth": 0.9, "capsize": 3}
    axes.errorbar(steps, known, np.clip(ends, 0, None).T, color=color, label=label, **style)
    for step, middle, value in zip(steps, known, values, strict=True):
        if value.high == math.inf:
            arrow = {"arrowstyle": "->", "color": color, "shrinkA": 0, "shrinkB": 0}
            axes.annotate(
                "", (step, 1), (step, middle), xycoords=("data", "axes fraction"), textcoords="data", arrowprops=arrow
            )
    wide = [(s, middle) for s, middle, value in zip(steps, known, values, strict=True) if not value.converged]
    _hollow(axes, wide, color, marker)


def _hollow(axes: Axes, points: Sequence[tuple[int, float]], color: str, marker: str) -> None:
    """Add hollow markers for values that did not converge."""
    if points:
        x, y = zip(*points, strict=True)
        axes.plot(x, y, marker, color=color, markerfacecolor="white", label=NOT_CONVERGED, zorder=3)


def _heat_map(axes: Axes, steps: Sequence[int], values: np.ndarray, **colors: Any) -> None:
    """Fill axes with values, block by step, with a colour bar and, where there is room, the values as text."""
    text = partial(format_number, digits=2)
    image = axes.imshow(values, aspect="auto", interpolation="nearest", **colors)
    axes.figure.colorbar(image, ax=axes, format=FuncFormatter(lambda value, _: text(value)))
    every = math.ceil(len(steps) / 8)
    axes.set_xticks(range(0, len(steps), every), [f"{step:,}" for step in steps[::every]])
    axes.set(xlabel="optimizer step", facecolor="#dddddd")
    axes.grid(False)
    if len(steps) > 6:
        return
    for (row, column), value in np.ndenumerate(values):
        luminance = np.dot(image.to_rgba(value)[:3], (0.2126, 0.7152, 0.0722))
        ink = "white" if luminance < 0.4 else "black"
        axes.text(column, row, text(value), color=ink, ha="center", va="center", fontsize=7)


def _loss_map(axes: Axes, plane: LossPlane, present: float) -> None:
    """Fill axes with the change of the loss over the plane of two eigenvectors."""
    change = np.array(plane.losses) - present
    change[~np.isfinite(change)] = math.nan
    limit = np.abs(change[np.isfinite(change)]).max(initial=0) or 1.0
    norm = SymLogNorm(limit / 30, vmin=-limit, vmax=limit)
    shades = matplotlib.colormaps["RdBu_r"].resampled(31)
    across, up = (axis.at for axis in plane.axes)
    mesh = axes.pcolormesh(across, up, change, cmap=shades, norm=norm, shading="nearest", rasterized=True)
    bar = axes.figure.colorbar(mesh, ax=axes, format=FuncFormatter(lambda value, _: format_number(value, digits=2)))
    bar.set_ticks([-limit, -limit / 10, 0, limit / 10, limit])
    axes.plot(0, 0, "+", color=BLACK)
    axes.grid(False)
    axes.set(title="change of the loss", xlabel="units along q₁", ylabel="units along q₂", facecolor="#dddddd")


def _step_axis(axes: Axes) -> None:
    """Label the horizontal axis, with ticks at whole steps."""
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))


def _legend(axes: Axes) -> None:
    """Place the legend above the axes, where it covers no data."""
    entries = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if NOT_CONVERGED in entries:
        entries[NOT_CONVERGED] = entries.pop(NOT_CONVERGED)  # to the end
    columns = 3 if sum(map(len, entries)) < 60 else 2
    axes.legend(entries.values(), entries, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns)


def _name_colors(axes: Axes, blocks: Sequence[str], colors: np.ndarray) -> None:
    """Add a colour bar with one named step per block, the first on top as in the tables."""
    norm = BoundaryNorm(np.arange(len(blocks) + 1) - 0.5, len(blocks))
    bar = axes.figure.colorbar(ScalarMappable(norm, ListedColormap(colors)), ax=axes, aspect=40)
    bar.set_ticks(range(len(blocks)), labels=[_block_label(block) for block in blocks], fontsize=7)
    bar.ax.tick_params(length=0)
    bar.ax.invert_yaxis()


def _block_label(block: str) -> str:
    """Return a block's name, shortened for an axis, without characters that matplotlib reads as mathematics."""
    name = one_line(block)
    return (name if len(name) <= 28 else f"…{name[-27:]}").replace("$", r"\$")
