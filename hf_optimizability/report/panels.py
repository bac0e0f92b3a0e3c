# SPDX-License-Identifier: Apache-2.0
"""The plots of the report as data: series, labels and order, which figures and page draw alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from ..linalg.estimate import Estimate
from ..log_keys import PREFIX
from ..measurement.quantities_table import QUANTITIES, Quantity
from ..measurement.results import Measurement, OptimizerStability
from ..measurement.values import number_of
from ..quantities.loss_landscape import LossLine, LossPlane
from ..quantities.step_size import CriticalLearningRate
from ..report_data.data import ReportData
from ..report_data.series import (
    Points,
    batch_items,
    block_names,
    density_line,
    logged,
    measured_steps,
    next_step,
    quadratic_line,
    stability_limits,
)


Color = Literal["blue", "vermillion", "green", "ink"]
Marker = Literal["circle", "diamond", "triangle", "inverted"]

STEP = "optimizer step"
"""Title of the axis of most plots."""

JOINT_PLOTS = ("trace", "eigenvalues")
"""Plots of quantities that share the figure `curvature`."""


@dataclass(frozen=True)
class Line:
    """Points, and a line through them.

    Attributes:
        label: Name of the series.
        points: Its x and y.
        color: Colour, unless `ramp` is set.
        marker: Marker of the points; `None` for a line alone.
        line: Whether the points are connected.
        dash: Whether the line is dashed.
        width: Width of the line; `None` for that of the drawing.
        ramp: Position from 0 to 1 on a scale of colours.
    """

    label: str
    points: Points
    color: Color = "ink"
    marker: Marker | None = None
    line: bool = True
    dash: bool = False
    width: int | None = None
    ramp: float | None = None


@dataclass(frozen=True)
class Intervals:
    """Values with their intervals, over steps."""

    label: str
    steps: Sequence[int]
    values: Sequence[Estimate | CriticalLearningRate]
    color: Color
    marker: Marker
    nonnegative: bool = False


Series = Line | Intervals


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        name: Stable name.
        x: Title of the horizontal axis.
        y: Title of the vertical axis.
        series: What it shows, in the order of the legend.
        log: Whether the vertical axis is logarithmic.
    """

    name: str
    x: str
    y: str
    series: Sequence[Series]
    log: bool = False


def loss(report: ReportData) -> Panel:
    """Return the loss: training log, evaluations, and the probe set at each measurement."""
    losses = [measurement.loss for measurement in report.measurements]
    series = (
        Line("training log", logged(report, "loss"), color="blue"),
        Line("evaluation", logged(report, "eval_loss"), color="vermillion", marker="circle"),
        Line("probe set, eval mode", (measured_steps(report), losses), marker="diamond", line=False),
    )
    return Panel("loss", STEP, "loss", series)


def stability_margin(report: ReportData) -> Panel:
    """Return the sharpness and its limit."""
    steps, stability = _optimizer_stability(report)
    series: list[Series] = []
    if stability:
        sharpness = [one.sharpness for one in stability]
        series.append(Intervals("sharpness, 95 % interval", steps, sharpness, "vermillion", "triangle"))
        series.append(Line("stability limit", stability_limits(report), dash=True))
    return Panel("stability_margin", STEP, "sharpness", series, log=True)


def learning_rates(report: ReportData) -> Panel:
    """Return the critical learning rate and the one in use."""
    steps, stability = _optimizer_stability(report)
    series: list[Series] = []
    if stability:
        critical = [one.critical for one in stability]
        series.append(
            Intervals("critical, with its bracket", steps, critical, "vermillion", "triangle", nonnegative=True)
        )
        series.append(Line("in use", logged(report, "learning_rate"), color="blue"))
    return Panel("learning_rates", STEP, "learning rate", series, log=True)


def _optimizer_stability(report: ReportData) -> tuple[list[int], list[OptimizerStability]]:
    measured = [(m.step, m.optimizer_stability) for m in report.measurements if m.optimizer_stability is not None]
    return [step for step, _ in measured], [stability for _, stability in measured]


def gradient_norm(report: ReportData) -> Panel:
    """Return the gradient norm, as a whole and by block."""
    totals = [measurement.grad_norm for measurement in report.measurements]
    names = block_names(report)
    series = (
        Line("all, training batches before clipping", logged(report, "grad_norm"), color="blue", width=2),
        Line("all, probe set", (measured_steps(report), totals), marker="diamond", line=False),
        *(
            Line(name, logged(report, f"{PREFIX}train_grad_norm/{name}"), ramp=index / max(1, len(names) - 1))
            for index, name in enumerate(names)
        ),
    )
    return Panel("gradient_norm", STEP, "gradient norm (2-norm)", series, log=True)


def quantity_panels(report: ReportData) -> dict[str, Panel]:
    """Return the plots of the table of quantities, by name."""
    plotted = [quantity for quantity in QUANTITIES if quantity.plot]
    panels = {}
    for name, group in groupby(plotted, key=lambda quantity: quantity.plot or ""):
        quantities = list(group)
        series = [*_behind(name, report), *_quantity_series(quantities, report.measurements)]
        y = quantities[0].unit or " and ".join(quantity.label for quantity in quantities)
        panels[name] = Panel(name, STEP, y, series, log=any(quantity.log_scale for quantity in quantities))
    return panels


def _quantity_series(quantities: Sequence[Quantity], measurements: Sequence[Measurement]) -> list[Series]:
    styles: list[tuple[Color, Marker]] = [("vermillion", "triangle"), ("green", "inverted"), ("blue", "circle")]
    series: list[Series] = []
    for quantity, (color, marker) in zip(quantities, styles if len(quantities) > 1 else styles[2:], strict=False):
        measured = [(m.step, value) for m in measurements if (value := quantity.get(m)) is not None]
        steps = [step for step, _ in measured]
        estimates = [value for _, value in measured if isinstance(value, Estimate)]
        if not measured:
            continue
        if len(estimates) == len(measured):
            label, sign = f"{quantity.label}, 95 % interval", quantity.nonnegative
            series.append(Intervals(label, steps, estimates, color, marker, nonnegative=sign))
        else:
            numbers = [number for _, value in measured if (number := number_of(value)) is not None]
            series.append(Line(quantity.label, (steps, numbers), color=color, marker=marker))
    return series


def _behind(name: str, report: ReportData) -> list[Series]:
    """Return the further series of a plot, which are drawn behind its quantities."""
    if name == "noise_scale" and (items := batch_items(report)):
        measured = [m.step for m in report.measurements if m.noise_scale is not None]
        if measured:
            last = max([*measured, *(entry["step"] for entry in report.log_history)])
            return [Line("items in a batch", ([0, last], [items, items]), dash=True)]
    return []


def density(report: ReportData) -> Panel:
    """Return the smoothed spectral density of the first and of the last measurement that has one."""
    measured = [(m.step, m.hessian.density) for m in report.measurements if m.hessian.density is not None]
    styles: list[tuple[Color, bool]] = [("blue", False), ("vermillion", True)]
    series = [
        Line(f"step {step:,}", density_line(density), color=color, dash=dash)
        for (step, density), (color, dash) in zip(measured[:: max(1, len(measured) - 1)], styles, strict=False)
    ]
    return Panel("density", "eigenvalue", "density (share per unit of eigenvalue)", series, log=True)


def along_update(name: str, measurement: Measurement, line: LossLine) -> Panel:
    """Return the loss along the optimizer's update, with its quadratic model."""
    series = (
        Line("loss", (line.axis.at, line.losses), color="blue", marker="circle"),
        Line("quadratic model", quadratic_line(line, present=measurement.loss), dash=True),
        Line("now", ([0.0], [measurement.loss]), marker="diamond", line=False),
        Line("after the next step", next_step(measurement, line), color="vermillion", marker="triangle", line=False),
    )
    return Panel(name, "learning rate of the step", "loss", series)


def along_eigenvectors(name: str, measurement: Measurement, plane: LossPlane) -> Panel:
    """Return the loss along each of the top two eigenvectors, with its quadratic model."""
    styles: list[tuple[Color, Marker]] = [("vermillion", "triangle"), ("green", "inverted")]
    series = []
    for index, line, (color, marker) in zip("₁₂", plane.lines, styles, strict=True):
        model = quadratic_line(line, present=measurement.loss)
        series.append(Line(f"along q{index}", (line.axis.at, line.losses), color=color, marker=marker))
        series.append(Line("its quadratic model", model, color=color, dash=True))
    return Panel(name, "units along the eigenvector", "loss", series)
