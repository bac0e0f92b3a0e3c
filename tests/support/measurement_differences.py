# SPDX-License-Identifier: Apache-2.0
"""What differs between two measurements beyond rounding."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any


def numbers(value: Any, path: str = "", scale: float = 0.0) -> Iterator[tuple[str, Any, float]]:
    """All that a measurement holds, with its place, and the size of the largest part of an estimate, or of a list."""
    if isinstance(value, dict):
        if "method" in value:
            scale = max(abs(value[name]) for name in ("value", "low", "high"))
        for key, item in value.items():
            yield from numbers(item, f"{path}.{key}", scale)
    elif isinstance(value, (list, tuple)):
        scale = max((abs(item) for item in value if isinstance(item, float)), default=scale)
        for index, item in enumerate(value):
            yield from numbers(item, f"{path}.{index}", scale)
    elif not path.endswith(".seconds"):
        yield path, value, scale


def differences(found: Any, expected: Any, *, tolerance: float) -> list[tuple[str, Any, Any]]:
    pairs = list(zip_longest(numbers(found), numbers(expected), fillvalue=("missing", None, 0.0)))
    return [
        (place, a, b)
        for (place, a, _), (other, b, scale) in pairs
        if place != other or not alike(a, b, tolerance, scale)
    ]


def alike(a: Any, b: Any, tolerance: float, scale: float) -> bool:
    if isinstance(b, float) and isinstance(a, float):
        return a == b or abs(a - b) <= max(tolerance * max(abs(b), scale, 1e-3), 1e-11 * (tolerance > 0))
    return bool(a == b)
