# SPDX-License-Identifier: Apache-2.0
"""The report's plots: each function draws one figure from the report alone, without pyplot and its global state."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from ..curvature.estimates import Estimate
from ..measurement import PREFIX
from .markdown import format_estimate, format_number, format_percent, one_line, trace_shares
from .report import OptimizabilityReport


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
NOT_CONVERGED = "not converged"


def plot_all(report: OptimizabilityReport) -> dict[str, bytes]:
    """Draws every plot for which the report holds data.

    Returns:
        PNG files by name: some of `loss`, `gradient_norm`, `curvature`, `ritz_values`, `blocks`.

    Example:
        >>> plot_all(OptimizabilityReport())
        {}
    """
    figures = {
        "loss": plot_loss(report),
        "gradient_norm": plot_gradient_norm(report),
        "curvature": plot_curvature(report),
        "ritz_values": plot_ritz_values(report),
        "blocks": plot_blocks(report),
    }
    return {name: _png(figure) for name, figure in figures.items() if figure is not None}


@matplotlib.rc_context(STYLE)
def plot_loss(report: OptimizabilityReport) -> Figure | None:
    """Draws the loss over optimizer steps: the training log, the evaluations, the probe set at each measurement.

    Returns:
        The figure, or `None` where no loss is known.
    """
    figure = _figure(6.4, 3.6)
    axes = figure.subplots()
    losses = [measurement.loss for measurement in report.measurements]
    _line(axes, *_logged(report, "loss"), color=BLUE, linewidth=1.3, label="training log")
    _line(axes, *_logged(report, "eval_loss"), color=VERMILLION, marker="o", linewidth=0.8, label="evaluation")
    _line(axes, _steps(report), losses, linestyle="", marker="D", fillstyle="none", label="probe set, eval mode")
    if not axes.lines:
        return None
    axes.set_ylabel("loss")
    _step_axis(axes)
    _legend(axes)
    return figure


@matplotlib.rc_context(STYLE)
def plot_gradient_norm(report: OptimizabilityReport) -> Figure | None:
    """Draws the gradient norm over optimizer steps, in all and by block.

    Lines are norms of training batches before clipping, as logged; markers those of the probe set.

    Returns:
        The figure, or `None` where no gradient norm is known.
    """
    blocks = _blocks(report)
    figure = _figure(7.2, max(4, 1 + 0.16 * len(blocks)))
    axes = figure.subplots()
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.93, len(blocks)))  # the last yellow is lost on white
    for block, color in zip(blocks, colors, strict=True):
        steps, norms = _logged(report, f"{PREFIX}train_grad_norm/{block}")
        _line(axes, steps, norms, color=color, linewidth=0.6)
        norms = [m.blocks[block].grad_norm if block in m.blocks else math.nan for m in report.measurements]
        _line(axes, _steps(report), norms, color=color, linestyle="", marker="o", markersize=4)
    _line(axes, *_logged(report, "grad_norm"), linewidth=1, label="all, training batches before clipping")
    totals = [measurement.grad_norm for measurement in report.measurements]
    _line(axes, _steps(report), totals, linestyle="", marker="D", fillstyle="none", label="all, probe set")
    if not axes.lines:
        return None
    # A logarithmic axis can't hold a run whose gradients are all zero.
    axes.set(ylabel="gradient norm (2-norm)", yscale="log" if axes.dataLim.y1 > 0 else "linear")
    _step_axis(axes)
    _legend(axes)
    if blocks:
        _name_colors(axes, blocks, colors)
    return figure


@matplotlib.rc_context(STYLE)
def plot_curvature(report: OptimizabilityReport) -> Figure | None:
    """Draws the Hessian trace ± standard error over steps and, below it, λ_max and λ_min ± residual bound.

    Behind the trace, in a wider and lighter bar, its error over the data.

    Returns:
        The figure, or `None` where nothing was measured.
    """
    if not report.measurements:
        return None
    figure = _figure(6.4, 5.2)
    upper, lower = figure.subplots(2, sharex=True)
    steps, hessians = _steps(report), [measurement.hessian for measurement in report.measurements]
    over_data = [(step, h.trace.value, h.trace.data_std_error) for step, h in zip(steps, hessians, strict=True)]
    if known := [point for point in over_data if point[2] is not None]:
        at, values, errors = zip(*known, strict=True)
        label = "± its error over the data"
        upper.errorbar(at, values, errors, fmt="none", ecolor=BLUE, alpha=0.25, elinewidth=7, label=label)
    _error_bars(upper, steps, [h.trace for h in hessians], BLUE, "o", "trace ± standard error")
    _error_bars(lower, steps, [h.lambda_max for h in hessians], VERMILLION, "^", "λ_max ± residual")
    _error_bars(lower, steps, [h.lambda_min for h in hessians], GREEN, "v", "λ_min ± residual")
    upper.set_ylabel("Hessian trace")
    lower.set_ylabel("extreme eigenvalues")
    for axes in (upper, lower):
        axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
        _legend(axes)
    _step_axis(lower)
    if len(steps) == 1:
        lower.set_xticks(steps)
    return figure


@matplotlib.rc_context(STYLE)
def plot_ritz_values(report: OptimizabilityReport) -> Figure | None:
    """Draws the Ritz values of the last measurement, each as high as the share of the spectrum it stands for.

    Returns:
        The figure, or `None` where the last measurement has no Ritz values.
    """
    if not report.measurements or not report.measurements[-1].hessian.ritz_values:
        return None
    measurement = report.measurements[-1]
    hessian, parameters = measurement.hessian, report.model.get("trainable_parameters")
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
def plot_blocks(report: OptimizabilityReport) -> Figure | None:
    """Draws two heat maps, block by measured step: trace shares, and gradient norms relative to the weights.

    Returns:
        The figure, or `None` where nothing was measured.
    """
    if not report.measurements:
        return None
    blocks = _blocks(report)
    shares = np.full((len(blocks), len(report.measurements)), math.nan)
    relative = shares.copy()
    for column, measurement in enumerate(report.measurements):
        for name, share in trace_shares(measurement).items():
            row, block = blocks.index(name), measurement.blocks[name]
            shares[row, column] = share
            relative[row, column] = block.grad_norm / block.weight_norm if block.weight_norm else math.nan
    figure = _figure(8.4, 1.4 + 0.2 * max(6, len(blocks)))
    left, right = figure.subplots(1, 2, sharey=True)
    limit = np.abs(shares[np.isfinite(shares)]).max(initial=0.01)
    _heat_map(left, _steps(report), shares, format_percent, cmap="RdBu_r", norm=Normalize(-limit, limit))
    positive = relative[np.isfinite(relative) & (relative > 0)]
    norm = LogNorm(positive.min(), positive.max()) if positive.size else Normalize()
    _heat_map(right, _steps(report), relative, partial(format_number, digits=2), cmap="viridis", norm=norm)
    left.set_title("share of the trace")
    right.set_title("gradient norm / weight norm")
    left.set_yticks(range(len(blocks)), [_block_label(block) for block in blocks])
    return figure


def _figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: Figure) -> bytes:
    """The figure as a PNG file of 150 dpi; line plots in 256 colours, which makes them a third of the size."""
    figure.set_dpi(150)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    if not any(axes.images for axes in figure.axes):
        image = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True, dpi=(150, 150))
    return buffer.getvalue()


def _steps(report: OptimizabilityReport) -> list[int]:
    """The steps of the measurements."""
    return [measurement.step for measurement in report.measurements]


def _blocks(report: OptimizabilityReport) -> list[str]:
    """Every block measured, in the model's order."""
    return list(dict.fromkeys(name for measurement in report.measurements for name in measurement.blocks))


def _logged(report: OptimizabilityReport, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one key of the Trainer's log; a value JSON could not hold (`None`) is NaN."""
    entries = [entry for entry in report.log_history if key in entry]
    return [entry["step"] for entry in entries], [math.nan if entry[key] is None else entry[key] for entry in entries]


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
    """Adds a line, or nothing where there is no value."""
    if np.isfinite(y).any():
        axes.plot(x, y, **{"color": BLACK, "markersize": 5, **style})


def _error_bars(
    axes: Axes, steps: Sequence[int], estimates: Sequence[Estimate | None], color: str, marker: str, label: str
) -> None:
    """Adds estimates with their errors; those that did not converge are hollow."""
    points = [(step, estimate) for step, estimate in zip(steps, estimates, strict=True) if estimate is not None]
    if not points:
        return
    x, y = [step for step, _ in points], [estimate.value for _, estimate in points]
    errors = [estimate.error for _, estimate in points]
    axes.errorbar(x, y, errors, color=color, marker=marker, markersize=5, linewidth=0.9, capsize=3, label=label)
    wide = [(step, estimate.value) for step, estimate in points if not estimate.converged]
    if wide:
        axes.plot(
            *zip(*wide, strict=True), marker, color=color, markerfacecolor="white", label=NOT_CONVERGED, zorder=3
        )


def _heat_map(
    axes: Axes, steps: Sequence[int], values: np.ndarray, text: Callable[[float], str], **colors: Any
) -> None:
    """Fills axes with values, block by step, adds a colour bar and, where there is room, the values as `text`."""
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


def _step_axis(axes: Axes) -> None:
    """Labels the horizontal axis, with ticks at whole steps."""
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))


def _legend(axes: Axes) -> None:
    """Puts the legend above the axes, where it covers no data."""
    entries = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if NOT_CONVERGED in entries:
        entries[NOT_CONVERGED] = entries.pop(NOT_CONVERGED)  # to the end
    columns = 3 if sum(map(len, entries)) < 60 else 2
    axes.legend(entries.values(), entries, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns)


def _name_colors(axes: Axes, blocks: Sequence[str], colors: np.ndarray) -> None:
    """Adds a colour bar with one named step per block, the first on top as in the tables."""
    norm = BoundaryNorm(np.arange(len(blocks) + 1) - 0.5, len(blocks))
    bar = axes.figure.colorbar(ScalarMappable(norm, ListedColormap(colors)), ax=axes, aspect=40)
    bar.set_ticks(range(len(blocks)), labels=[_block_label(block) for block in blocks], fontsize=7)
    bar.ax.tick_params(length=0)
    bar.ax.invert_yaxis()


def _block_label(block: str) -> str:
    """A block's name, short enough for an axis and with no character that matplotlib takes for mathematics."""
    name = one_line(block)
    return (name if len(name) <= 28 else f"…{name[-27:]}").replace("$", r"\$")
