# SPDX-License-Identifier: Apache-2.0
"""The values of quantities, as numbers and as text."""

from __future__ import annotations

from typing import Literal

from ..linalg.estimate import Estimate
from ..number_format import format_estimate, format_interval, format_number, format_share
from ..quantities.step_size import CriticalLearningRate


Value = Estimate | CriticalLearningRate | float | None

Form = Literal["number", "interval", "share"]
"""How a value is printed: 0.69; 360 (270 to 450), or the former where it has no interval; 42 % (36 to 50 %)."""


def number_of(value: Value) -> float | None:
    """Return a value without its error."""
    return value.value if isinstance(value, (Estimate, CriticalLearningRate)) else value


def formatted(value: Value, form: Form = "interval", *, nonnegative: bool = False) -> str:
    """Return a value with its interval as text.

    Example:
        >>> formatted(0.25), formatted(None), formatted(1234, "number")
        ('0.2500', '–', '1,234')
    """
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, (Estimate, CriticalLearningRate)):
        return format_number(value)
    if form == "share":
        return format_share(value.value, value.low, value.high)
    if isinstance(value, Estimate) and value.hvps:  # only of these does a dagger say what to do
        return format_estimate(value, nonnegative=nonnegative)
    return format_interval(value.value, value.low, value.high, nonnegative=nonnegative)
