# SPDX-License-Identifier: Apache-2.0
"""What the page's interactive plots show, as plain data; `templates/report.js` draws it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..linalg.estimate import Estimate
from ..log_keys import PREFIX
from ..quantities.step_size import CriticalLearningRate
from ..report_data.data import ReportData
from ..report_data.number_format import one_line
from ..report_data.series import (
    Points,
    batch_items,
    block_names,
    density_line,
    landscapes,
    logged,
    measured_steps,
    next_step,
    quadratic_line,
    stability_limits,
)


Chart = dict[str, Any]
Series = dict[str, Any]
MAX_POINTS = 600
"""Of one line; more would be less than a pixel apart on a phone and make the page large."""

STEP = "optimizer step"


def charts(report: ReportData) -> list[Chart]:
    """Every plot of the page for which the report holds data.

    Returns:
        Plots with `id`, `x` and `y` (titles of the axes), `log` (whether y is logarithmic) and `series`: points `x`
        and `y`, `None` for a gap; ends of the error bars `low` and `high`, `None` where there is none; and the style.

    Example:
        >>> [chart["id"] for chart in charts(ReportData(log_history=[{"loss": 1.0, "step": 1}]))]
        ['loss']
    """
    every = [
        _loss(report),
        _stability_margin(report),
        _learning_rates(report),
        _gradient_norm(report),
        _noise_scale(report),
        _trace(report),
        _eigenvalues(report),
        _density(report),
        *_landscapes(report),
    ]
    return [chart for chart in every if chart["series"]]


def _loss(report: ReportData) -> Chart:
    losses = [measurement.loss for measurement in report.measurements]
    series = [
        make_line("training log", logged(report, "loss"), color="blue"),
        make_line("evaluation", logged(report, "eval_loss"), color="vermillion", marker="circle"),
        make_line("probe set, eval mode", (measured_steps(report), losses), color="ink", marker="diamond", line=False),
    ]
    return make_chart("loss", STEP, "loss", series)


def _stability_margin(report: ReportData) -> Chart:
    measured = [(m.step, m.optimizer_stability) for m in report.measurements if m.optimizer_stability is not None]
    at = [step for step, _ in measured]
    sharpness = [size.sharpness for _, size in measured]
    series = [
        make_bars("sharpness ± residual", at, sharpness, color="vermillion", marker="triangle"),
        make_line("stability limit", stability_limits(report), color="ink", dash=True),
    ]
    return make_chart("stability_margin", STEP, "sharpness", series, log=True)


def _learning_rates(report: ReportData) -> Chart:
    measured = [
        (m.step, m.optimizer_stability.critical) for m in report.measurements if m.optimizer_stability is not None
    ]
    if not measured:
        return make_chart("learning_rates", STEP, "learning rate", [])
    at, critical = [step for step, _ in measured], [rate for _, rate in measured]
    series = [
        _intervals("critical, with its bracket", at, critical, color="vermillion", marker="triangle"),
        make_line("in use", logged(report, "learning_rate"), color="blue"),
    ]
    return make_chart("learning_rates", STEP, "learning rate", series, log=True)


def _gradient_norm(report: ReportData) -> Chart:
    totals = [measurement.grad_norm for measurement in report.measurements]
    names = block_names(report)
    series = [
        make_line("all, training batches before clipping", logged(report, "grad_norm"), color="blue", width=2),
        make_line("all, probe set", (measured_steps(report), totals), color="ink", marker="diamond", line=False),
        *(
            make_line(name, logged(report, f"{PREFIX}train_grad_norm/{name}"), ramp=index / max(1, len(names) - 1))
            for index, name in enumerate(names)
        ),
    ]
    return make_chart("gradient_norm", STEP, "gradient norm (2-norm)", series, log=True)


def _noise_scale(report: ReportData) -> Chart:
    measured = [(m.step, m.noise_scale) for m in report.measurements if m.noise_scale is not None]
    if not measured:
        return make_chart("noise_scale", STEP, "items", [])
    at, scales = [step for step, _ in measured], [scale for _, scale in measured]
    series: list[Series | None] = [
        _intervals("noise scale, 95 % interval", at, scales, color="green", marker="circle")
    ]
    if items := batch_items(report):
        ends = [0, max([*at, *(entry["step"] for entry in report.log_history)])]
        series.append(make_line("items in a batch", (ends, [items, items]), color="ink", dash=True))
    return make_chart("noise_scale", STEP, "items", series, log=True)


def _trace(report: ReportData) -> Chart:
    traces = [measurement.hessian.trace for measurement in report.measurements]
    known = [(m.step, t) for m, t in zip(report.measurements, traces, strict=True) if t.data_std_error is not None]
    series = [
        _bars(
            "± its error over the data",
            [step for step, _ in known],
            [trace.value for _, trace in known],
            [trace.data_std_error or 0.0 for _, trace in known],
            color="blue",
        ),
        make_bars("trace ± standard error", measured_steps(report), traces, color="blue", marker="circle"),
    ]
    return make_chart("trace", STEP, "Hessian trace", series)


def _eigenvalues(report: ReportData) -> Chart:
    hessians = [measurement.hessian for measurement in report.measurements]
    series = [
        make_bars("λ_max ± residual", measured_steps(report), [h.lambda_max for h in hessians], color="vermillion",
                   marker="triangle"),
        make_bars("λ_min ± residual", measured_steps(report), [h.lambda_min for h in hessians], color="green",
                   marker="inverted"),
    ]  # fmt: skip
    return make_chart("eigenvalues", STEP, "extreme eigenvalues", series)


def _density(report: ReportData) -> Chart:
    known = [(m.step, m.hessian.density) for m in report.measurements if m.hessian.density is not None]
    ends = known[:: max(1, len(known) - 1)]
    colors = ("blue", "vermillion")
    series = [
        make_line(f"step {step:,}", density_line(density), color=color)
        for (step, density), color in zip(ends, colors, strict=False)
    ]
    return make_chart("density", "eigenvalue", "density", series, log=True)


def _landscapes(report: ReportData) -> list[Chart]:
    """The loss along the update and along both eigenvectors, at the first and at the last measurement that has it."""
    drawn = []
    for index, (measurement, landscape) in enumerate(landscapes(report)):
        if landscape.update is not None:
            line, present = landscape.update, measurement.loss
            series = [
                make_line("loss", (line.axis.at, line.losses), color="blue", marker="circle"),
                make_line("quadratic model", quadratic_line(line, present=present), color="ink", dash=True),
                make_line("now", ([0.0], [present]), color="ink", marker="diamond", line=False),
                make_line("after the next step", next_step(measurement, line), color="vermillion", marker="triangle"),
            ]
            drawn.append(make_chart(f"landscape_update_{index}", "learning rate of the step", "loss", series))
        if landscape.eigenvectors is not None:
            first, second = landscape.eigenvectors.lines
            styles: tuple[Series, ...] = (
                {"color": "vermillion", "marker": "triangle"},
                {"color": "green", "marker": "inverted"},
            )
            series = []
            for name, line, style in zip("₁₂", (first, second), styles, strict=True):
                model = quadratic_line(line, present=measurement.loss)
                series.append(make_line(f"along q{name}", (line.axis.at, line.losses), **style))
                series.append(make_line("its quadratic model", model, color=style["color"], dash=True))
            drawn.append(make_chart(f"landscape_eigenvectors_{index}", "units along the eigenvector", "loss", series))
    return drawn


def make_chart(identifier: str, x: str, y: str, series: Sequence[Series | None], *, log: bool = False) -> Chart:
    """A plot of the series that have a point; on a logarithmic axis only positive ones are."""
    drawn = [_positive(one) if log else one for one in series if one is not None]
    drawn = [one for one in drawn if any(value is not None for value in one["y"])]
    return {"id": identifier, "x": x, "y": y, "log": log, "series": drawn}


def make_line(label: str, points: Points, **style: Any) -> Series | None:
    """A line through points, which are put in order and thinned; `None` if there is none."""
    pairs = sorted(zip(*points, strict=True), key=lambda pair: pair[0])
    if not pairs:
        return None
    kept = _thinned([(x, rounded(y)) for x, y in pairs])
    series = {"label": one_line(label), "x": [rounded(x) for x, _ in kept], "y": [y for _, y in kept], **style}
    return {**series, "thinned": len(pairs)} if len(kept) < len(pairs) else series


def make_bars(label: str, at: Sequence[int], estimates: Sequence[Estimate | None], **style: Any) -> Series | None:
    """Estimates ± their errors; hollow where they did not converge."""
    known = [(step, estimate) for step, estimate in zip(at, estimates, strict=True) if estimate is not None]
    values = [estimate.value for _, estimate in known]
    bars = _bars(label, [step for step, _ in known], values, [estimate.error for _, estimate in known], **style)
    return bars and {**bars, "wide": False, "hollow": [not estimate.converged for _, estimate in known]}


def _bars(
    label: str, at: Sequence[int], values: Sequence[float], errors: Sequence[float], **style: Any
) -> Series | None:
    """Wide error bars alone, `values` ± `errors`."""
    if not at:
        return None
    low = [rounded(value - error) for value, error in zip(values, errors, strict=True)]
    high = [rounded(value + error) for value, error in zip(values, errors, strict=True)]
    points = {"x": list(at), "y": [rounded(value) for value in values], "low": low, "high": high}
    return {"label": label, **points, "wide": True, **style}


def _intervals(
    label: str, at: Sequence[int], values: Sequence[Estimate | CriticalLearningRate], **style: Any
) -> Series:
    """Values with their intervals; an end that is not known lies outside the plot."""
    return {
        "label": label,
        "x": list(at),
        "y": [rounded(value.value if math.isfinite(value.value) else value.low) for value in values],
        "low": [rounded(value.low) for value in values],
        "high": [rounded(value.high) for value in values],
        "open": [not math.isfinite(value.high) for value in values],
        "hollow": [not value.converged for value in values],
        **style,
    }


def _positive(series: Series) -> Series:
    """The series without what a logarithmic axis can't hold."""
    ends: Series = {
        name: [value if value is not None and value > 0 else None for value in series[name]]
        for name in ("y", "low", "high")
        if name in series
    }
    return {**series, **ends}


def _thinned(points: list[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """The lowest and the highest point of each of equally long stretches, once there are more than `MAX_POINTS`."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(2 * len(points) / MAX_POINTS)
    kept = []
    for start in range(0, len(points), size):
        stretch = sorted(points[start : start + size], key=lambda point: (point[1] is not None, point[1] or 0.0))
        kept += sorted({id(point): point for point in (stretch[0], stretch[-1])}.values(), key=lambda point: point[0])
    return kept


def rounded(value: float | None) -> float | None:
    """Six significant digits, more than a plot can show; `None` for what is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")
