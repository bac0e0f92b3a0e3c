# SPDX-License-Identifier: Apache-2.0
"""Numbers as people read them: a value with one 95 % interval, and no digit that the interval does not carry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Decimal
from typing import Protocol


MISSING = "–"
NOT_CONVERGED = "†"

EXACT_DIGITS = (5, 4)
"""Significant digits of a number that is shown alone, as its interval is narrower than these digits are."""

BOUND_RATIO = 10.0
"""Factor between the ends of an interval above which they are shown without the value."""

TINY = 1e-3
"""Share of the upper end below which the lower end of what can't be negative says nothing."""


class Bounded(Protocol):
    """A value with its interval, such as an `Estimate`."""

    @property
    def value(self) -> float:
        """The value."""

    @property
    def low(self) -> float:
        """Lower end."""

    @property
    def high(self) -> float:
        """Upper end."""

    @property
    def converged(self) -> bool:
        """Whether the interval is as narrow as asked for."""


def format_number(value: float | None, *, digits: int = 4) -> str:
    """Format a number without an error, to `digits` significant digits.

    Example:
        >>> [format_number(value) for value in (0.693147, 12345.6, 2e-5, None)]
        ['0.6931', '12,350', '2.000e-5', '–']
    """
    if value is None or not math.isfinite(value):
        return MISSING
    [text] = _texts([_decimal(value)], _exponent(value, digits) - digits + 1)
    return text


def format_interval(
    value: float | None, low: float | None, high: float | None, *, nonnegative: bool = False, unit: str = ""
) -> str:
    """Format a number and its 95 % interval, all to the place at which the interval is 10 to 100 units wide.

    The ends are rounded outward. An interval so narrow that it would not show is left out; one whose ends differ in
    sign or by more than a factor of 10 is a bound, without the value.

    Args:
        value: The number.
        low: Lower end; `None` or −∞ if unknown.
        high: Upper end; `None` or ∞ if unknown.
        nonnegative: Whether the number can't be below 0, so that a lower end at 0 goes without saying.
        unit: What follows the number, such as `" %"`.

    Example:
        >>> [format_interval(12570.0, 10930.0, 15840.0), format_interval(9.0213, 9.0211, 9.0214)]
        ['12,600 (10,900 to 15,900)', '9.021']
        >>> [format_interval(1.3, -2.6, 4.4), format_interval(12.0, -3.0, 39.1, nonnegative=True)]
        ['between -2.6 and 4.4', 'at most 40']
        >>> [format_interval(20.4, 4.31, 233.0), format_interval(35.21, 20.13, None), format_interval(0.1, None, None)]
        ['between 4.3 and 240', 'at least 20', '0.100 (no interval)']
    """
    if value is None or math.isnan(value):
        return MISSING
    low, high = min(value, _known(low, -math.inf)), max(value, _known(high, math.inf))
    if nonnegative and low <= 0 < high:
        low = -math.inf
    if low == -math.inf and high == math.inf:
        return f"{format_number(value, digits=3)}{unit} (no interval)" if math.isfinite(value) else MISSING
    if high == math.inf:
        return f"at least {_end(low, up=False)}{unit}"
    if low == -math.inf:
        return f"at most {_end(high, up=True)}{unit}"
    digits = _exact_digits(value, 2 * max(high - value, value - low))
    if digits:
        return f"{format_number(value, digits=digits)}{unit}"
    if (low > 0 or high < 0) and max(low / high, high / low) > BOUND_RATIO:
        if nonnegative and low < TINY * high:
            return f"at most {_end(high, up=True)}{unit}"
        return f"between {_end(low, up=False)} and {_end(high, up=True)}{unit}"
    place = _exponent(high / 10 - low / 10, 3)
    ends = [_round(low, place, ROUND_FLOOR), _round(high, place, ROUND_CEILING)]
    if low <= 0 <= high:
        return f"between {' and '.join(_texts(ends, place))}{unit}"
    shown, *shown_ends = _texts([_decimal(value), *ends], place, exponent=_exponent(value, 1))
    return f"{shown}{unit} ({' to '.join(shown_ends)}{unit})"


def format_estimate(estimate: Bounded | None, *, nonnegative: bool = False) -> str:
    """Format an estimate and its interval, with a dagger if it did not converge."""
    if estimate is None:
        return MISSING
    text = format_interval(estimate.value, estimate.low, estimate.high, nonnegative=nonnegative)
    return text if estimate.converged else f"{text} {NOT_CONVERGED}"


def format_share(share: float | None, low: float | None, high: float | None) -> str:
    """Format a share and its 95 % interval in percent.

    Example:
        >>> [format_share(0.104, 0.036, 0.264), format_share(0.02, 0.0, 0.11), format_share(None, None, None)]
        ['10 % (3 to 27 %)', 'at most 11 %', '–']
    """
    percents = (None if number is None else 100 * number for number in (share, low, high))
    return format_interval(*percents, nonnegative=True, unit=" %")


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


def _known(end: float | None, unknown: float) -> float:
    return unknown if end is None or math.isnan(end) else end


def _exact_digits(value: float, width: float) -> int | None:
    """Return the digits of a number whose interval is narrower than the last one, or exactly 0; `None` if it isn't."""
    if width == 0:
        return EXACT_DIGITS[0] if value else 1
    narrow = (digits for digits in EXACT_DIGITS if width <= 10.0 ** (_exponent(value, digits) - digits + 1))
    return next(narrow, None) if value else None


def _end(value: float, *, up: bool) -> str:
    """Return the end of an interval, rounded outward to two significant digits."""
    place = _exponent(value, 2) - 1
    [text] = _texts([_round(value, place, ROUND_CEILING if up else ROUND_FLOOR)], place)
    return text


def _exponent(value: float, digits: int) -> int:
    """Return the power of ten of the first digit of `value`, rounded to `digits` significant digits."""
    return int(f"{value:.{digits - 1}e}".partition("e")[2])


def _decimal(value: float) -> Decimal:
    """Return a number without the digits that only its binary fraction has."""
    return Decimal(f"{value:.12e}")


def _round(value: float, place: int, rounding: str) -> Decimal:
    """Return a number rounded to a multiple of 10**place."""
    return _decimal(value).quantize(Decimal((0, (1,), place)), rounding)


def _texts(numbers: Sequence[Decimal], place: int, *, exponent: int | None = None) -> list[str]:
    """Return numbers rounded to a multiple of 10**place, with this or the largest power of ten if it reads easier."""
    rounded = [number.quantize(Decimal((0, (1,), place)), ROUND_HALF_EVEN) + 0 for number in numbers]  # + 0: no -0
    largest = max(number.adjusted() if number else place for number in rounded)
    if -3 <= largest < 6 or not any(rounded):
        return [f"{number:,.{max(0, -place)}f}" for number in rounded]
    exponent = largest if exponent is None else exponent
    decimals = max(0, exponent - place)
    return [f"{number.scaleb(-exponent):.{decimals}f}e{exponent}" if number else "0" for number in rounded]
