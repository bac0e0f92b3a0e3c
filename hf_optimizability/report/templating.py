# SPDX-License-Identifier: Apache-2.0
"""What the report's pages have in common: the environment of their templates, and what these are given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..curvature.eigenvalue_check import EigenvalueCheck
from ..linalg.estimate import Estimate
from ..measurement.results import Measurement, MultitaskMeasurement
from ..quantities.step_size import CriticalLearningRate
from ..report_data.data import ReportData
from ..report_data.number_format import (
    MISSING,
    format_estimate,
    format_interval,
    format_number,
    format_percent,
    format_with_error,
)


SHADES = 6
"""Shades of a heat map's colour; the style sheet has a class for each."""


def environment(text: Callable[[Any], Markup]) -> Environment:
    """The report's templates, in which every value is formatted by its type and escaped, unless a filter has done so.

    Args:
        text: What is printed for a value.

    Example:
        >>> templates = environment(lambda value: text_without_strings(value) or Markup.escape(value))
        >>> templates.from_string("{{ name }}: {{ number }}").render(name="<b>", number=1500)
        '&lt;b&gt;: 1,500'
    """
    made = Environment(
        loader=PackageLoader(__package__ or ""),
        autoescape=True,
        finalize=text,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters.update(at=_at, estimate=format_estimate, percent=format_percent, number=format_number)
    made.filters.update(range=_range, checks=checks_along_vectors)
    made.globals.update(with_error=format_with_error, interval=format_interval)
    made.globals.update(cosine_map=cosine_map, block_cosines=block_cosines)
    return made


def _at(value: Any, path: str) -> Any:
    """An attribute of an attribute, or an entry by its number; `None` where one on the way is."""
    for name in path.split("."):
        if value is not None:
            value = value[int(name)] if name.isdigit() else getattr(value, name)
    return value


def _range(value: Estimate | CriticalLearningRate | None) -> str:
    """A value and its interval."""
    return MISSING if value is None else format_interval(value.value, value.low, value.high)


def checks_along_vectors(checks: Sequence[EigenvalueCheck]) -> str:
    """What differences along their own vectors say of the eigenvalues, in one line.

    Example:
        >>> checks_along_vectors([EigenvalueCheck("lambda_max", 2.0, (3.0, 2.0), (0.2, 0.1), "agrees")])
        'λ_max: 2.000, by differences 2.000 (agrees)'
    """
    names = {"lambda_max": "λ_max", "lambda_min": "λ_min"}
    return "; ".join(
        f"{names[check.which]}: {format_number(check.value)}, by differences {format_number(check.differences[-1])} "
        f"({check.verdict})"
        for check in checks
    )


def text_without_strings(value: Any) -> Markup | None:
    """What templates print for a number, a switch or what is missing; `None` for what needs escaping."""
    if isinstance(value, Markup):
        return value
    if value is None:
        return Markup(MISSING)
    if isinstance(value, bool):
        return Markup("yes" if value else "no")
    if isinstance(value, int):
        return Markup(f"{value:,}")
    if isinstance(value, float):
        return Markup(format_number(value))
    return None


def title_of(report: ReportData) -> str:
    """What was measured: the checkpoint, or its class where it has no id, and the task."""
    model = report.model.get("id") or report.model.get("class") or "a model"
    task = report.task.get("task")
    return f"{model} on {task}" if task else str(model)


def first_and_last(measurements: Sequence[Measurement]) -> Sequence[Measurement]:
    """The first and the last measurement, or the only one, or none."""
    return measurements[:: max(1, len(measurements) - 1)]


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as one level of `outer.inner` names; values as Python prints them.

    Example:
        >>> flattened({"a": {"b": 1, "c": None}, "d": "x"})
        {'a.b': '1', 'a.c': 'None', 'd': 'x'}
    """
    level: dict[str, str] = {}
    for name, value in settings.items():
        level |= (
            flattened(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": str(value)}
        )
    return level


def cosine_cells(cosines: Iterable[Estimate | None]) -> list[tuple[str, int]]:
    """Each cosine with its interval, and a shade: that of its sign and size, or 0 where the interval holds 0.

    An interval from -1 to 1 tells nothing; nor does its middle.

    Example:
        >>> clear, vague = (Estimate(-0.5, low, 0.1 + low, "", 0, True) for low in (-0.6, -0.05))
        >>> cosine_cells([clear, vague, Estimate(0.9, -1.0, 1.0, "", 0, True), None])
        [('-0.500 (-0.600 to -0.500)', -5), ('-0.500 (-0.050 to 0.050)', 0), ('–', 0), ('–', 0)]
    """
    cells = []
    for cosine in cosines:
        if cosine is None or (cosine.low <= -1 and cosine.high >= 1):
            cells.append((MISSING, 0))
            continue
        told = cosine.low * cosine.high > 0
        size = math.ceil(SHADES * math.sqrt(abs(cosine.value))) if told else 0
        cells.append((_range(cosine), int(math.copysign(size, cosine.value))))
    return cells


def cosine_map(several: MultitaskMeasurement) -> dict[str, list[tuple[str, int]]]:
    """The cosines of each task with all of them."""
    return {first: cosine_cells(several.cosine(first, second) for second in several.tasks) for first in several.tasks}


def block_cosines(several: MultitaskMeasurement) -> dict[str, list[tuple[str, int]]]:
    """The cosines of each pair of tasks, by block."""
    blocks = several.conflicts[0].blocks if several.conflicts else {}
    return {block: cosine_cells(pair.blocks[block] for pair in several.conflicts) for block in blocks}


def trace_shares(measurement: Measurement) -> dict[str, float]:
    """Each block's trace as a share of the sum of the blocks' absolute traces (a total may be near 0, that sum not).

    Returns:
        Shares in [-1, 1] by block; NaN where there is no curvature at all.
    """
    traces = {name: block.trace.value for name, block in measurement.blocks.items()}
    total = sum(abs(trace) for trace in traces.values())
    return {name: trace / total if total else math.nan for name, trace in traces.items()}
