# SPDX-License-Identifier: Apache-2.0
"""Facts of a report that several rules judge by, and their words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..linalg.estimate import Estimate
from ..linalg.statistics import NORMAL_QUANTILE
from ..measurement.results import Measurement
from ..number_format import format_interval
from ..report_data.data import ReportData
from .outcome import NotChecked


MAX_NAMED = 3
"""Names to list before \"and 2 more\"."""

DEAD_GRADIENT_SHARE = 2.0**-23
"""Share of the whole gradient's norm below which a block's norm is rounding in float32."""


def last_measurement(report: ReportData) -> Measurement | NotChecked:
    """Return the last measurement, whether or not training has ended."""
    return report.measurements[-1] if report.measurements else NotChecked("measurement")


def final_measurement(report: ReportData) -> Measurement | NotChecked:
    """Return the measurement of the final weights."""
    if not report.dynamics:
        return NotChecked("training")
    if not report.measurements:
        return NotChecked("measurement")
    last = report.measurements[-1]
    if last.step == 0 or (report.failures and report.failures[-1].step > last.step):
        return NotChecked("final_measurement")
    return last


def dead_blocks(measurement: Measurement) -> list[str]:
    """Return the blocks that no gradient reaches; none where there is no gradient at all, as at a loss of 0."""
    least = DEAD_GRADIENT_SHARE * measurement.grad_norm
    return [name for name, block in measurement.blocks.items() if least > 0 and block.grad_norm <= least]


def died_blocks(report: ReportData) -> list[str]:
    """Return the blocks that a gradient reached at the first measurement, and not at the last."""
    if not report.measurements:
        return []
    before = dead_blocks(report.measurements[0])
    return [name for name in dead_blocks(report.measurements[-1]) if name not in before]


def error_of(estimate: Estimate) -> float:
    """Return the standard error or the residual bound; infinite if it is unknown."""
    return math.inf if math.isnan(estimate.error) else estimate.error


def is_finite(value: float | None) -> bool:
    """Return whether a logged number is there and finite."""
    return value is not None and math.isfinite(value)


def interval(estimate: Estimate) -> str:
    """Return an estimate with its interval."""
    return format_interval(estimate.value, estimate.low, estimate.high)


def around(value: float, std_error: float) -> str:
    """Return a number with the interval of its standard error."""
    margin = NORMAL_QUANTILE * std_error
    return format_interval(value, value - margin, value + margin)


def enumeration(names: Sequence[str]) -> str:
    """Join names for a sentence.

    Example:
        >>> [enumeration(["a"]), enumeration(["a", "b"]), enumeration(["a", "b", "c", "d", "e"])]
        ['a', 'a and b', 'a, b, c and 2 more']
    """
    if len(names) > MAX_NAMED:
        return f"{', '.join(names[:MAX_NAMED])} and {len(names) - MAX_NAMED} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
