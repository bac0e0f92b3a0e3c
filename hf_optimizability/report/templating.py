# SPDX-License-Identifier: Apache-2.0
"""The environment of the report's templates, and the values that all of them take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..linalg.estimate import Estimate
from ..measurement.results import Measurement, MultitaskMeasurement
from ..number_format import MISSING, format_interval, format_number
from ..report_data.data import ReportData
from . import tables


SHADES = 6
"""Shades of a heat map's colour; the style sheet has a class for each."""


def environment(text: Callable[[Any], Markup]) -> Environment:
    """Return the environment of the templates, where every value is formatted by its type and escaped.

    Args:
        text: Formats and escapes a value.

    Example:
        >>> templates = environment(lambda value: format_plain(value) or Markup.escape(value))
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
    made.globals.update(tables=tables, labels=tables.LABELS, cosine_map=cosine_map, block_cosines=block_cosines)
    return made


def format_plain(value: Any) -> Markup | None:
    """Return a number, a flag or a missing value as text; `None` for a value that needs escaping."""
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
    """Return the checkpoint, or its class if it has no id, and the task."""
    model, task = report.model.id or report.model.class_name or "a model", report.task.task
    return f"{model} on {task}" if task else model


def first_and_last(measurements: Sequence[Measurement]) -> Sequence[Measurement]:
    """Return the first and the last measurement, or the only one, or none."""
    return measurements[:: max(1, len(measurements) - 1)]


def measurement_values(report: ReportData) -> dict[str, Any]:
    """Return the values that both templates of the report take."""
    ends = first_and_last(report.measurements)
    blocks = ends[-1].blocks.values() if ends else ()
    return {
        "report": report,
        "ends": ends,
        "steps": [f"step {end.step:,}" for end in ends],
        "training": flattened(report.training),
        "not_converged": not all(m.converged for m in report.measurements)
        or not all(block.trace.converged for block in blocks),
    }


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested settings to one level of `outer.inner` names, with values as Python prints them.

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
    """Return each cosine with its interval and its shade: by sign and size, or 0 where the interval holds 0.

    A cosine whose interval reaches from -1 to 1 is unknown.

    Example:
        >>> clear, vague = (Estimate(-0.5, low, 0.1 + low, "", 0, True) for low in (-0.6, -0.05))
        >>> cosine_cells([clear, vague, Estimate(0.9, -1.0, 1.0, "", 0, True), None])
        [('-0.50 (-0.60 to -0.50)', -5), ('between -0.50 and 0.05', 0), ('–', 0), ('–', 0)]
    """
    cells = []
    for cosine in cosines:
        if cosine is None or (cosine.low <= -1 and cosine.high >= 1):
            cells.append((MISSING, 0))
            continue
        significant = cosine.low * cosine.high > 0
        size = math.ceil(SHADES * math.sqrt(abs(cosine.value))) if significant else 0
        cells.append((format_interval(cosine.value, cosine.low, cosine.high), int(math.copysign(size, cosine.value))))
    return cells


def cosine_map(multitask: MultitaskMeasurement) -> dict[str, list[tuple[str, int]]]:
    """Return the cosines of each task with all tasks."""
    return {
        first: cosine_cells(multitask.cosine(first, second) for second in multitask.tasks) for first in multitask.tasks
    }


def block_cosines(multitask: MultitaskMeasurement) -> dict[str, list[tuple[str, int]]]:
    """Return the cosines of each pair of tasks, by block."""
    blocks = multitask.conflicts[0].blocks if multitask.conflicts else {}
    return {block: cosine_cells(pair.blocks[block] for pair in multitask.conflicts) for block in blocks}
