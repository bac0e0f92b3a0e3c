# SPDX-License-Identifier: Apache-2.0
"""Printed numbers, read back: they hold the interval and no digit beyond it."""

from __future__ import annotations

import math
import re
from decimal import Decimal

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hf_optimizability.linalg.estimate import Estimate
from hf_optimizability.number_format import (
    BOUND_RATIO,
    format_estimate,
    format_interval,
    format_number,
    format_percent,
    format_share,
)


CALM = settings(
    deadline=None, derandomize=True, database=None, max_examples=300, suppress_health_check=list(HealthCheck)
)
NUMBER = r"-?[\d,.]+(?:e-?\d+)?"


def read(text: str) -> list[Decimal]:
    """The numbers of a text."""
    return [Decimal(number.replace(",", "")) for number in re.findall(NUMBER, text)]


sizes = st.floats(-300, 300).map(lambda exponent: 10.0**exponent)
numbers = st.tuples(st.sampled_from([-1, 1]), sizes).map(math.prod) | st.just(0.0)


@st.composite
def intervals(draw: st.DrawFn) -> tuple[float, float, float]:
    """Value, low and high, from far narrower than the value to far wider."""
    value = draw(numbers)
    scale = abs(value) if value and draw(st.booleans()) else draw(sizes)
    margins = [min(scale * 10 ** draw(st.floats(-9, 6)), 1e300) * draw(st.sampled_from([0, 1])) for _ in range(2)]
    return value, value - margins[0], value + margins[1]


class TestIntervals:
    @pytest.mark.parametrize(
        ("value", "low", "high", "expected"),
        [
            (12_570, 10_930, 15_840, "12,600 (10,900 to 15,900)"),
            (13_041, 8_117, 19_620, "13,000 (8,000 to 20,000)"),
            (361.29, 276.2, 446.4, "360 (270 to 450)"),
            (9.0213, 8.9902, 9.0524, "9.021 (8.990 to 9.053)"),
            (9.0213, 9.0201, 9.0225, "9.0213 (9.0201 to 9.0225)"),
            (9.0213, 9.0209, 9.0217, "9.021"),
            (9.02134567, 9.02134566, 9.02134568, "9.0213"),
            (33350.053, 33349.97, 33350.14, "33,350"),
            (15_270.0, 15_270.0, 15_270.0, "15,270"),
            (0.0, 0.0, 0.0, "0"),
            (-254.7, -262.3, -247.1, "-255 (-263 to -247)"),
            (0.0, -0.4, 0.4, "between -0.40 and 0.40"),
            (-0.3121, -5.112, 4.489, "between -5.2 and 4.5"),
            (20.4, 4.31, 233.0, "between 4.3 and 240"),
            (4.2e6, 3.61e6, 4.79e6, "4.2e6 (3.6e6 to 4.8e6)"),
            (8.1e5, 6.2e5, 1.1e6, "8.1e5 (6.2e5 to 11.0e5)"),
            (2.6e-4, 2.3e-4, 2.9e-4, "2.60e-4 (2.30e-4 to 2.90e-4)"),
            (0.99987, 0.93, 1.0, "1.000 (0.930 to 1.000)"),  # the value rounds up into the next place
            (35.21, 20.13, None, "at least 20"),
            (math.inf, 20.13, math.inf, "at least 20"),
            (35.21, -math.inf, 62.34, "at most 63"),
            (35.21, None, None, "35.2 (no interval)"),
            (35.21, -math.inf, math.nan, "35.2 (no interval)"),
            (35.0, 36.0, 40.0, "35.0 (35.0 to 40.0)"),  # an interval that lacks its value
            (math.inf, -math.inf, math.inf, "–"),
            (math.nan, 1.0, 2.0, "–"),
            (None, None, None, "–"),
        ],
    )
    def test_examples(self, value, low, high, expected):
        assert format_interval(value, low, high) == expected

    @pytest.mark.parametrize(
        ("low", "high", "expected"),
        [
            (-3.0, 39.1, "at most 40"),
            (0.0, 39.1, "at most 40"),
            (0.02, 39.1, "at most 40"),
            (0.5, 39.1, "between 0.50 and 40"),
            (10.0, 39.1, "20 (10 to 40)"),
            (0.0, math.inf, "20.0 (no interval)"),
            (19.999, 20.001, "20.00"),
        ],
    )
    def test_what_cannot_be_negative(self, low, high, expected):
        assert format_interval(20.0, low, high, nonnegative=True) == expected

    @CALM
    @given(intervals())
    @example((1e300, -1e300, 1e300))
    @example((0.30000000000000004, 0.1, 0.7))
    @example((-100000.0, -100000.0, -100000.0))
    def test_what_is_printed_holds_the_interval_and_the_value(self, interval):
        value, low, high = interval
        text = format_interval(value, low, high)
        slack = Decimal("1e-11")  # of binary fractions, which are not printed
        if "(" in text or text.startswith("between"):
            shown_low, shown_high = read(text)[-2:]
            assert shown_low <= Decimal(low) + slack * abs(Decimal(low)), text
            assert shown_high >= Decimal(high) - slack * abs(Decimal(high)), text
        if "(" in text:
            assert shown_low <= read(text)[0] <= shown_high, text
        if len(read(text)) == 1:  # shown alone: right to one of the last digit
            [shown] = read(text)
            digits = len(re.sub(r"e.*|\D", "", text).lstrip("0"))
            assert (digits >= 4 and len(shown.normalize().as_tuple().digits) <= 5) or shown == 0 == value
            assert max(abs(shown - Decimal(low)), abs(shown - Decimal(high))) <= Decimal("1e-3") * abs(shown), text

    @CALM
    @given(intervals())
    def test_no_digit_that_the_interval_does_not_carry(self, interval):
        value, low, high = interval
        text = format_interval(value, low, high)
        place = (Decimal(high) - Decimal(low)).adjusted() - 1  # the interval is 10 to 100 units wide
        for number in read(text):
            if "(" in text or low < 0 < high:
                assert number % Decimal((0, (1,), place)) == 0, text
                assert -number.as_tuple().exponent <= max(0, -place), text
            elif text.startswith("between"):
                assert len(number.normalize().as_tuple().digits) <= 2, text

    @CALM
    @given(intervals())
    def test_a_bound_where_the_ends_differ_much(self, interval):
        value, low, high = interval
        bound = format_interval(value, low, high).startswith("between")
        ratio = max(abs(low), abs(high)) / min(abs(low), abs(high)) if low and high else math.inf
        assert bound == ((low < 0 < high) or ratio > BOUND_RATIO) or low == high == 0

    @CALM
    @given(intervals())
    def test_the_sign_turns_everything_around(self, interval):
        value, low, high = interval
        turned = read(format_interval(-value, -high, -low))
        assert sorted(-number for number in turned) == sorted(read(format_interval(value, low, high)))

    def test_units_and_convergence(self):
        assert format_interval(41.3, 35.2, 47.9, unit=" %") == "41 % (35 to 48 %)"
        assert format_share(0.02, 0.0, 0.11) == "at most 11 %"
        assert format_share(1.0, 1.0, 1.0) == "100.00 %"
        wide = Estimate(20.0, 10.0, 39.1, "lanczos", 8, converged=False)
        assert format_estimate(wide) == "20 (10 to 40) †" and format_estimate(None) == "–"


class TestNumbers:
    @pytest.mark.parametrize(
        ("value", "digits", "expected"),
        [
            (0.693147, 4, "0.6931"),
            (9.99999, 4, "10.00"),
            (12345.6, 4, "12,350"),
            (2e-5, 2, "2.0e-5"),
            (1e6, 2, "1.0e6"),
            (-0.0, 3, "0.00"),
            (math.inf, 4, "–"),
            (None, 4, "–"),
        ],
    )
    def test_numbers_without_error(self, value, digits, expected):
        assert format_number(value, digits=digits) == expected

    @CALM
    @given(numbers, st.integers(1, 6))
    def test_numbers_are_right_to_their_digits(self, value, digits):
        [shown] = read(format_number(value, digits=digits))
        assert abs(float(shown) - value) <= 0.501 * 10.0 ** (1 - digits) * abs(value)

    def test_percent(self):
        assert [format_percent(x) for x in (0.996, 0.999, -0.0031, None)] == ["100 %", "100 %", "-0.31 %", "–"]
