# SPDX-License-Identifier: Apache-2.0
"""Result dataclasses from the plain data of `dataclasses.asdict`, as JSON holds it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints


T = TypeVar("T")

LowerBound = Annotated[float, -math.inf]
"""A float that is −∞, not ∞, where JSON holds `null`."""

_LEAVES: Mapping[Any, tuple[type, ...]] = {float: (int, float), int: (int,), str: (str,), bool: (bool,)}


def structure(cls: type[T], data: Any, *, place: str = "") -> T:
    """Build a dataclass from plain data, guided by its type hints, and check that the data fit them.

    Lists become tuples where the hint is one. JSON has no infinite numbers, so that `None` is read as ∞ where the hint
    is `float`. A class with a `from_dict` of its own is built by that. Missing fields take their defaults.

    Args:
        cls: The dataclass.
        data: Its fields by name.
        place: Where the data are, for errors.

    Raises:
        ValueError: If a field is unknown, missing or of another type; the message says where.

    Example:
        >>> from dataclasses import make_dataclass
        >>> structure(make_dataclass("Interval", [("low", LowerBound), ("high", float)]), {"low": None, "high": None})
        Interval(low=-inf, high=inf)
        >>> structure(make_dataclass("Interval", [("low", float)]), {"low": "x"})
        Traceback (most recent call last):
        ...
        ValueError: Interval.low is 'x', not of type float.
    """
    place = place or cls.__name__
    if not isinstance(data, Mapping):
        raise _unfit(place, data, "object")
    hints = _hints(cls)  # type: ignore[arg-type]
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    if unknown := data.keys() - known.keys():
        raise ValueError(f"{place} has an unknown field {min(unknown)!r}.")
    for name, field in known.items():
        if name not in data and field.default is field.default_factory is MISSING:
            raise ValueError(f"{place} lacks {name!r}.")
    return cls(**{name: _value(hints[name], value, f"{place}.{name}") for name, value in data.items()})


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _value(hint: Any, value: Any, place: str) -> Any:
    """Return a value as its hint says."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return arguments[1] if value is None else _value(arguments[0], value, place)
    if origin in (Union, UnionType):
        return _one_of(arguments, value, place)
    if hint is float and value is None:
        return math.inf
    if hint is Any:
        return value
    if origin is Literal:
        if value not in arguments:
            raise _unfit(place, value, " or ".join(map(repr, arguments)))
        return value
    if hint in _LEAVES:
        if not isinstance(value, _LEAVES[hint]) or (hint is not bool and isinstance(value, bool)):
            raise _unfit(place, value, hint.__name__)
        return value
    if is_dataclass(hint):
        return _dataclass(hint, value, place)
    return _container(origin or hint, arguments, value, place)


def _dataclass(cls: Any, value: Any, place: str) -> Any:
    if not hasattr(cls, "from_dict"):
        return structure(cls, value, place=place)
    try:
        return cls.from_dict(value)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{place} is damaged ({type(error).__name__}: {error}).") from error


def _one_of(hints: tuple[Any, ...], value: Any, place: str) -> Any:
    """Return a value by the first of several hints that it fits."""
    if value is None and NoneType in hints:
        return None
    inner = [hint for hint in hints if hint is not NoneType]
    for hint in inner[:-1]:
        try:
            return _value(hint, value, place)
        except ValueError:
            continue
    return _value(inner[-1], value, place)


def _container(origin: Any, arguments: tuple[Any, ...], value: Any, place: str) -> Any:
    """Return a list, a tuple or a mapping."""
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise _unfit(place, value, "object")
        return {key: _value(arguments[1], item, f"{place}[{key!r}]") for key, item in value.items()}
    if origin not in (list, tuple):
        return value  # such as an array, which its class's own `from_dict` checks
    if not isinstance(value, (list, tuple)):
        raise _unfit(place, value, "list")
    if origin is tuple and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise ValueError(f"{place} has {len(value)} entries, not {len(arguments)}.")
        hints = list(arguments)
    else:
        hints = [arguments[0]] * len(value)
    items = [
        _value(hint, item, f"{place}[{index}]") for index, (hint, item) in enumerate(zip(hints, value, strict=True))
    ]
    return items if origin is list else tuple(items)


def _unfit(place: str, value: Any, expected: str) -> ValueError:
    shown = repr(value)
    shown = shown if len(shown) <= 40 else f"{shown[:40]}…"
    return ValueError(f"{place} is {shown}, not of type {expected}.")
