# SPDX-License-Identifier: Apache-2.0
"""Result dataclasses from the plain data of `dataclasses.asdict`, as JSON holds it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import cache
from itertools import repeat
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints


T = TypeVar("T")

LowerBound = Annotated[float, -math.inf]
"""A float that is −∞, not ∞, where JSON holds `null`."""


def structure(cls: type[T], data: Mapping[str, Any]) -> T:
    """Build a dataclass from plain data, guided by its type hints.

    Lists become tuples where the hint is one. JSON has no infinite numbers, so that `None` is read as ∞ where the hint
    is `float`. A class with a `from_dict` of its own is built by that. Missing fields take their defaults.

    Args:
        cls: The dataclass.
        data: Its fields by name.

    Raises:
        TypeError: If a field is unknown, or one without a default is missing.

    Example:
        >>> from dataclasses import make_dataclass
        >>> structure(make_dataclass("Interval", [("low", LowerBound), ("high", float)]), {"low": None, "high": None})
        Interval(low=-inf, high=inf)
    """
    hints = _hints(cls)  # type: ignore[arg-type]
    return cls(**{name: _value(hints.get(name), value) for name, value in data.items()})


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _value(hint: Any, value: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if value is None:
        return math.inf if hint is float else arguments[1] if origin is Annotated else None
    if is_dataclass(hint):
        return hint.from_dict(value) if hasattr(hint, "from_dict") else structure(hint, value)  # type: ignore[arg-type]
    if origin in (Union, UnionType):
        inner = [argument for argument in arguments if argument is not type(None)]
        return _value(inner[0], value) if len(inner) == 1 else value
    if origin is tuple and arguments[-1] is Ellipsis:
        return tuple(map(_value, repeat(arguments[0]), value))
    if origin is tuple:
        return tuple(_value(*pair) for pair in zip(arguments, value, strict=True))
    if origin is list:
        return [_value(arguments[0], item) for item in value]
    if origin in (dict, Mapping):
        return {key: _value(arguments[1], item) for key, item in value.items()}
    return value
