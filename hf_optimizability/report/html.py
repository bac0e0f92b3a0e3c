# SPDX-License-Identifier: Apache-2.0
"""The report as one page: no other file, no network, and nothing runs in it but its own script."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment
from markupsafe import Markup, escape

from ..diagnosis.findings import diagnose
from ..measurement.results import Measurement
from ..number_format import MISSING, NOT_CONVERGED, format_estimate, format_number, one_line
from ..quantities.loss_landscape import LossPlane
from ..report_data.data import ReportData
from ..report_data.series import landscapes
from .charts import Chart, charts
from .templating import SHADES, environment, format_plain, measurement_values, title_of


SECTIONS = (
    "summary", "findings", "numbers", "convergence", "stability", "generalization", "gradient", "curvature", "tasks",
    "blocks", "method",
)  # fmt: skip


_INTERVAL = re.compile(r"\([^()]*\d to -?\d[^()]*\)")


def to_html(report: ReportData) -> str:
    """Render the report as one self-contained page.

    The page's Content Security Policy allows only its own style and its two scripts, by their hashes. External text is
    escaped, or JSON in a block that no browser runs.

    Args:
        report: The report; any part of it may be empty.

    Example:
        >>> from hf_optimizability.report_data.provenance import ModelInfo, TaskInfo
        >>> page = to_html(ReportData(model=ModelInfo(id="<script>"), task=TaskInfo(task="fill-mask")))
        >>> "<title>Optimizability of &lt;script&gt; on fill-mask</title>" in page
        True
    """
    last = report.measurements[-1] if report.measurements else None
    return render_page(
        "report.html.jinja",
        charts(report),
        kind="Optimizability of",
        title=title_of(report),
        sections=[name for name in SECTIONS if name != "tasks" or (last and last.multitask)],
        created=report.created,
        versions=report.versions,
        **measurement_values(report),
        diagnosis=diagnose(report),
        last=last,
        gradient_map=_heat_map(report.measurements, _relative_gradient, _rank_on_log_scale),
        trace_map=_heat_map(report.measurements, _trace, _rank_around_zero),
        landscapes=landscapes(report),
        landscape_steps=[f"step {measurement.step:,}" for measurement, _ in landscapes(report)],
        loss_map=_loss_map,
    )


def render_page(template: str, drawn: Sequence[Chart], *, title: str, **values: Any) -> str:
    """Render a template that extends `page.html.jinja`, with its plots.

    Args:
        template: Name of the template.
        drawn: Its plots, as `charts.charts` makes them.
        title: Title of the page; behind `kind`, the first of the values.
        values: What the templates take: `kind`, `sections`, `created`, `versions` and the template's own.
    """
    return _page_environment().get_template(template).render(
        charts={chart["id"]: chart for chart in drawn},
        data=_json(drawn),
        style=_asset("uplot/uPlot.min.css") + _asset("report.css"),
        library=_asset("uplot/uPlot.iife.min.js"),
        library_licence=_asset("uplot/LICENSE"),
        script=_asset("report.js"),
        title=one_line(title),
        **values,
    )  # fmt: skip


@cache
def _page_environment() -> Environment:
    """Return the environment of the templates, with HTML's escaping."""
    page = environment(_text)
    page.filters.update(hash=_hash, split_interval=_split_interval)
    return page


def _text(value: Any) -> Markup:
    """Return a value as text; strings on one line, without control and direction characters."""
    plain = format_plain(value)
    if plain is not None:
        return plain
    text = _INTERVAL.sub(lambda found: found[0].replace(" ", "\xa0").replace("e-", "e-\u2060"), one_line(str(value)))
    for sign in ("%", NOT_CONVERGED):  # no line begins with them
        text = text.replace(f" {sign}", f"\xa0{sign}")
    return escape(text)


def _split_interval(value: Any) -> tuple[Any, str]:
    """Split a formatted number from its interval."""
    if not isinstance(value, str):
        return value, ""
    number, opening, rest = value.partition(" (")
    return number, opening.strip() + rest


@cache
def _asset(name: str) -> Markup:
    """Return a file of the package that goes into the page unchanged."""
    return Markup(files(__package__).joinpath(f"templates/{name}").read_text(encoding="utf-8"))


def _hash(content: str) -> Markup:
    """Return the hash of an inline style or script for the Content Security Policy."""
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    return Markup(f"'sha256-{digest}'")


def _json(data: Any) -> Markup:
    """Return JSON that can't close its script element."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))


Cell = tuple[float, str]


def _heat_map(
    measurements: Sequence[Measurement],
    cell: Callable[[Measurement, str], Cell],
    shades: Callable[[Sequence[float]], list[int]],
) -> dict[str, list[tuple[str, int]]]:
    """Return text and shade of every block at every measurement; shade 0 is uncoloured."""
    blocks = dict.fromkeys(name for measurement in measurements for name in measurement.blocks)
    cells = {
        name: [cell(m, name) if name in m.blocks else (math.nan, MISSING) for m in measurements] for name in blocks
    }
    ranks = iter(shades([value for row in cells.values() for value, _ in row]))
    return {name: [(text, next(ranks)) for _, text in row] for name, row in cells.items()}


def _loss_map(present: float, plane: LossPlane) -> list[tuple[float, list[tuple[str, int]]]]:
    """Return each position on the second axis, the largest first, and the losses there with their shades."""
    ranks = iter(_rank_around_zero([loss - present for row in plane.losses for loss in row]))
    rows = zip(plane.axes[1].at, plane.losses, strict=True)
    return [(s, [(format_number(loss, digits=3), next(ranks)) for loss in row]) for s, row in rows][::-1]


def _relative_gradient(measurement: Measurement, name: str) -> Cell:
    block = measurement.blocks[name]
    value = block.grad_norm / block.weight_norm if block.weight_norm else math.nan
    return value, format_number(value, digits=2)


def _trace(measurement: Measurement, name: str) -> Cell:
    trace = measurement.blocks[name].trace
    return math.nan if trace.low <= 0 <= trace.high else trace.value, format_estimate(trace)


def _rank_on_log_scale(values: Sequence[float]) -> list[int]:
    """Return shades 1 to `SHADES`, evenly on a logarithmic scale from the smallest positive value to the largest."""
    logs = [math.log(value) if 0 < value < math.inf else None for value in values]
    known = [log for log in logs if log is not None]
    low, span = min(known, default=0.0), (max(known, default=0.0) - min(known, default=0.0)) or 1.0
    return [0 if log is None else 1 + min(SHADES - 1, int(SHADES * (log - low) / span)) for log in logs]


def _rank_around_zero(values: Sequence[float]) -> list[int]:
    """Return shades −`SHADES` to `SHADES` by sign and by the root of the share of the largest absolute value."""
    finite = [abs(value) for value in values if math.isfinite(value)]
    limit = max(finite, default=0.0) or 1.0
    return [
        int(math.copysign(math.ceil(SHADES * math.sqrt(abs(value) / limit)), value)) if math.isfinite(value) else 0
        for value in values
    ]
