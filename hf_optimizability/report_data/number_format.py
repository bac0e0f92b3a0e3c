# SPDX-License-Identifier: Apache-2.0
"""Numbers as the report prints them: rounded to what their errors warrant."""

from __future__ import annotations

import math
import sys

from ..linalg.estimate import Estimate


MISSING = "–"
NOT_CONVERGED = "†"


def format_number(value: float | None, *, digits: int = 4) -> str:
    """Format a number without an error, to `digits` significant digits.

    Example:
        >>> [format_number(value) for value in (0.693147, 12345.6, 2e-5, None)]
        ['0.6931', '12,350', '2.000e-05', '–']
    """
    if value is None or not math.isfinite(value):
        return MISSING
    exponent = _exponent(value, digits)
    if _is_scientific(exponent):
        return f"{value:.{digits - 1}e}"
    return _rounded(value, exponent - digits + 1)


def format_with_error(value: float | None, error: float | None) -> str:
    """Format a number and its error: the error to two significant digits (GUM, 7.2.6), the number to the same place.

    A number has six digits at most, however small its error. An unknown error is `?`.

    Example:
        >>> [format_with_error(361.29, 43.41), format_with_error(9.0213, 0.0312), format_with_error(4.2e6, 3e5)]
        ['361 ± 43', '9.021 ± 0.031', '(4.20 ± 0.30)e+06']
        >>> format_with_error(9.0213, None)
        '9.021 ± ?'
    """
    if value is None or not math.isfinite(value):
        return MISSING
    if error is None or not math.isfinite(error):
        return f"{format_number(value)} ± ?"
    if error == 0:
        return f"{format_number(value, digits=6)} ± 0"
    exponent = max(_exponent(value, 6), _exponent(error, 2))
    place = _exponent(error, 2) - 1
    if place < exponent - 5:
        small = f"{error:#.2g}" if 1e-4 <= error < 9.95 else f"{error:.1e}"
        return f"{format_number(value, digits=6)} ± {small}"
    if _is_scientific(exponent):
        exponent = max(exponent, sys.float_info.min_10_exp)  # smaller powers are not exact, and at last 0
        value, error, place = value / 10.0**exponent, error / 10.0**exponent, place - exponent
        return f"({_rounded(value, place)} ± {_rounded(error, place)})e{exponent:+03d}"
    return f"{_rounded(value, place)} ± {_rounded(error, place)}"


def format_interval(value: float | None, low: float | None, high: float | None) -> str:
    """Format a number and its 95 % interval, all rounded at the second digit of a quarter of the interval.

    Example:
        >>> [format_interval(35.21, 20.13, 62.34), format_interval(35.21, 20.13, None)]
        ['35 (20 to 62)', '35.2 (at least 20.1)']
        >>> format_interval(math.inf, 20.13, math.inf), format_interval(35.21, -math.inf, math.inf)
        ('at least 20.1', '35.2 ± ?')
    """
    if value == math.inf and low is not None:
        return f"at least {format_number(low, digits=3)}"
    if low == -math.inf and value is not None and math.isfinite(value):
        return f"{format_number(value, digits=3)} ± ?"
    if value is None or low is None or low == high or not math.isfinite(value + low):
        return format_number(value, digits=3)
    if high is None or not math.isfinite(high):
        return f"{format_number(value, digits=3)} (at least {format_number(low, digits=3)})"
    place = _exponent(high / 4 - low / 4, 2) - 1
    return f"{_rounded(value, place)} ({_rounded(low, place)} to {_rounded(high, place)})"


def format_estimate(estimate: Estimate | None) -> str:
    """Format an estimate and its error, with a dagger if it did not converge."""
    if estimate is None:
        return MISSING
    text = format_with_error(estimate.value, estimate.error)
    return text if estimate.converged else f"{text} {NOT_CONVERGED}"


def format_percent(share: float | None) -> str:
    """Format a share in percent, to two significant digits.

    Example:
        >>> [format_percent(0.4213), format_percent(1.0), format_percent(-0.0031), format_percent(None)]
        ['42 %', '100 %', '-0.31 %', '–']
    """
    return MISSING if share is None or not math.isfinite(share) else f"{format_number(100 * share, digits=2)} %"


def one_line(text: str) -> str:
    """Return the text without line breaks, control characters and runs of spaces."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def _exponent(value: float, digits: int) -> int:
    """Return the power of ten of the first digit of `value`, rounded to `digits` significant digits."""
    return int(f"{value:.{digits - 1}e}".partition("e")[2])


def _is_scientific(exponent: int) -> bool:
    """Return whether a number of that magnitude is easier to read with a power of ten."""
    return not -3 <= exponent < 6


def _rounded(value: float, place: int) -> str:
    """Return `value` rounded to a multiple of 10**place."""
    try:
        return f"{round(value, -place) + 0.0:,.{max(0, -place)}f}"  # + 0.0 turns -0.0 into 0.0
    except OverflowError:  # up, beyond the largest number
        return f"{value:.1e}"
