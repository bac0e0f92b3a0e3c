# SPDX-License-Identifier: Apache-2.0
"""The page's interactive plots as plain data, which `templates/report.js` draws."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from ..linalg.estimate import Estimate
from ..measurement.values import formatted
from ..number_format import one_line
from ..quantities.step_size import CriticalLearningRate
from ..report_data.data import ReportData
from ..report_data.series import Points, landscapes
from . import panels
from .panels import Line, Panel, along_eigenvectors, along_update


Chart = dict[str, Any]
Series = dict[str, Any]
MAX_POINTS = 600
"""Most points of a line; more would be less than a pixel apart on a phone and make the page large."""


def charts(report: ReportData) -> list[Chart]:
    """Return every plot of the page for which the report holds data.

    Returns:
        Plots with `id`, `x` and `y` (titles of the axes), `log` (whether y is logarithmic) and `series`: points `x`
        and `y`, `None` for a gap; bounds `low` and `high` of the error bars, `None` for an unknown one, and `text`,
        the value with them; and the style.

    Example:
        >>> [chart["id"] for chart in charts(ReportData(log_history=[{"loss": 1.0, "step": 1}]))]
        ['loss']
    """
    every = [
        panels.loss(report),
        panels.stability_margin(report),
        panels.learning_rates(report),
        panels.gradient_norm(report),
        *panels.quantity_panels(report).values(),
        panels.density(report),
        *_landscapes(report),
    ]
    return [chart for panel in every if (chart := to_chart(panel))["series"]]


def _landscapes(report: ReportData) -> Iterator[Panel]:
    """Yield the slices through the loss of the first and the last measurement that has them."""
    for index, (measurement, landscape) in enumerate(landscapes(report)):
        if landscape.update is not None:
            yield along_update(f"landscape_update_{index}", measurement, landscape.update)
        if landscape.eigenvectors is not None:
            yield along_eigenvectors(f"landscape_eigenvectors_{index}", measurement, landscape.eigenvectors)


def to_chart(panel: Panel) -> Chart:
    """Return a plot as plain data."""
    return make_chart(panel.name, panel.x, panel.y, [_series(one) for one in panel.series], log=panel.log)


def _series(series: panels.Series) -> Series | None:
    if isinstance(series, Line):
        style = {name: value for name, value in vars(series).items() if name not in ("label", "points")}
        style = {name: value for name, value in style.items() if value != _DEFAULTS[name] or name == "color"}
        if series.ramp is not None:
            del style["color"]
        return make_line(series.label, series.points, **style)
    style = {"nonnegative": series.nonnegative, "color": series.color, "marker": series.marker}
    return make_intervals(series.label, series.steps, series.values, **style)


_DEFAULTS = {field.name: field.default for field in fields(Line)}
"""Styles that the page takes where none is named."""


def make_chart(identifier: str, x: str, y: str, series: Sequence[Series | None], *, log: bool = False) -> Chart:
    """Return a plot of the series that have a point; on a logarithmic axis, a positive one."""
    drawn = [_positive(one) if log else one for one in series if one is not None]
    drawn = [one for one in drawn if any(value is not None for value in one["y"])]
    return {"id": identifier, "x": x, "y": y, "log": log, "series": drawn}


def make_line(label: str, points: Points, **style: Any) -> Series | None:
    """Return a line through points, sorted and thinned; `None` if there is none."""
    pairs = sorted(zip(*points, strict=True), key=lambda pair: pair[0])
    if not pairs:
        return None
    thinned = _thinned([(x, rounded(y)) for x, y in pairs])
    series = {"label": one_line(label), "x": [rounded(x) for x, _ in thinned], "y": [y for _, y in thinned], **style}
    return {**series, "thinned": len(pairs)} if len(thinned) < len(pairs) else series


def make_intervals(
    label: str,
    at: Sequence[int],
    values: Sequence[Estimate | CriticalLearningRate],
    *,
    nonnegative: bool = False,
    **style: Any,
) -> Series:
    """Return values with their intervals, hollow if not converged; an unknown bound lies outside the plot."""
    return {
        "label": label,
        "x": list(at),
        "y": [rounded(value.value if math.isfinite(value.value) else value.low) for value in values],
        "low": [rounded(value.low) for value in values],
        "high": [rounded(value.high) for value in values],
        "open": [not math.isfinite(value.high) for value in values],
        "hollow": [not value.converged for value in values],
        "text": [formatted(value, nonnegative=nonnegative) for value in values],
        **style,
    }


def _positive(series: Series) -> Series:
    """Return the series without values that a logarithmic axis can't show."""
    ends: Series = {
        name: [value if value is not None and value > 0 else None for value in series[name]]
        for name in ("y", "low", "high")
        if name in series
    }
    return {**series, **ends}


def _thinned(points: list[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """Return the lowest and the highest point of each of equally long spans if there are more than `MAX_POINTS`."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(2 * len(points) / MAX_POINTS)
    thinned = []
    for start in range(0, len(points), size):
        stretch = sorted(points[start : start + size], key=lambda point: (point[1] is not None, point[1] or 0.0))
        thinned += sorted(
            {id(point): point for point in (stretch[0], stretch[-1])}.values(), key=lambda point: point[0]
        )
    return thinned


def rounded(value: float | None) -> float | None:
    """Round to six significant digits, more than a plot can show; `None` for a number that is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")
