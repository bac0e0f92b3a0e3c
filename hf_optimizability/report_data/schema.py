# SPDX-License-Identifier: Apache-2.0
"""The layout of `report.json`: its JSON Schema, checks against it, and the way up from older layouts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from functools import cache
from importlib.resources import files
from typing import Any


SCHEMA_VERSION = 5
"""Version of the layout of `report.json`; raised when a reader of the old layout would misread the new one."""

_RENEW = "Restore the file, or make the report again."
_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "number": (int, float),
    "integer": int,
}


@cache
def report_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of `report.json`, as it ships with the package.

    Example:
        >>> report_schema()["title"]
        'Optimizability report'
    """
    schema: dict[str, Any] = json.loads(files(__package__).joinpath("report.schema.json").read_text(encoding="utf-8"))
    return schema


def parse(content: bytes) -> Any:
    """Reads JSON in UTF-8 whose numbers a float64 can hold.

    Raises:
        ValueError: If it is none; the message says where and what to do.

    Example:
        >>> parse(b'{"x": NaN}')
        Traceback (most recent call last):
        ...
        ValueError: It is no valid JSON (the number NaN is not finite). Restore the file, or make the report again.
    """
    try:
        return json.loads(content.decode("utf-8"), parse_int=_integer, parse_float=_finite, parse_constant=_finite)
    except ValueError as error:
        raise ValueError(f"It is no valid JSON ({error}). {_RENEW}") from None
    except RecursionError:
        raise ValueError(f"It is nested too deep for a report. {_RENEW}") from None


def upgraded(data: Any) -> dict[str, Any]:
    """The data in the present layout, checked against the schema.

    Args:
        data: What `report.json` holds, in the layout of any version up to `SCHEMA_VERSION`.

    Raises:
        ValueError: If it was written by a later version of this package or is damaged; the message says what is wrong
            and what to do.
    """
    if not isinstance(data, dict):
        raise ValueError(f"It holds {_shown(data)}, not a report. Pass the `report.json` that a report was saved to.")
    version = data.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"`schema_version` is {_shown(version)}, not a number from 1 to {SCHEMA_VERSION}. {_RENEW}")
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"It has schema version {version}, this package reads up to {SCHEMA_VERSION}. "
            "Upgrade hf-optimizability to open it."
        )
    try:
        for migrate in _MIGRATIONS[version - 1 :]:
            data = migrate(data)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"It is damaged: not in the layout of schema version {version} ({type(error).__name__}: {error}). {_RENEW}"
        ) from None
    problem = next(_problems(data, report_schema(), "report"), None) or next(_unequal(data), None)
    if problem:
        raise ValueError(f"It is damaged: {problem}. {_RENEW}")
    return data


def _from_1(data: dict[str, Any]) -> dict[str, Any]:
    """What was not yet measured is not known; findings are drawn anew from the numbers."""
    return {
        **data,
        "schema_version": 2,
        "findings": [],
        "measurements": [_measurement_from_1(measurement) for measurement in data["measurements"]],
    }


def _measurement_from_1(measurement: dict[str, Any]) -> dict[str, Any]:
    unknown = dict.fromkeys(("along_gradient", "noise_scale", "step_size", "fallback", "engine_error"))
    probe = {"curvature": "hessian", "batch_size": measurement["items"], "left_out": 0}
    hessian = {"top": [measurement["hessian"]["lambda_max"]], "bottom": [], "density": None, **measurement["hessian"]}
    blocks = {name: {"lambda_max": None, "lambda_min": None, **block} for name, block in measurement["blocks"].items()}
    return {**unknown, **probe, **measurement, "hessian": hessian, "blocks": blocks}


def _from_2(data: dict[str, Any]) -> dict[str, Any]:
    """No landscape was measured."""
    measurements = [{"landscape": None, **measurement} for measurement in data["measurements"]]
    return {**data, "schema_version": 3, "measurements": measurements}


def _from_3(data: dict[str, Any]) -> dict[str, Any]:
    """Tasks were not told apart."""
    measurements = [{"several": None, **measurement} for measurement in data["measurements"]]
    return {**data, "schema_version": 4, "measurements": measurements}


def _from_4(data: dict[str, Any]) -> dict[str, Any]:
    """Fields were renamed."""
    measurements = [with_current_names(measurement) for measurement in data["measurements"]]
    return {**data, "schema_version": 5, "measurements": measurements}


_RENAMED_IN_5 = {
    "items": "num_items",
    "along_gradient": "quadratic_model",
    "step_size": "optimizer_stability",
    "several": "multitask",
    "engine_error": "central_difference_error",
    "left_out": "unused_embedding_parameters",
}


def with_current_names(measurement: dict[str, Any]) -> dict[str, Any]:
    """Return a measurement of version 4 or 5 with the field names of version 5."""
    renamed = _renamed(measurement, _RENAMED_IN_5)
    if multitask := renamed["multitask"]:
        names = {"items": "num_items", "along_gradient": "curvature_along_gradient"}
        tasks = {name: _renamed(task, names) for name, task in multitask["tasks"].items()}
        renamed["multitask"] = {**multitask, "tasks": tasks}
    if "eigenvalue_checks" in renamed:
        renamed["eigenvalue_checks"] = [_renamed(check, {"end": "which"}) for check in renamed["eigenvalue_checks"]]
    return renamed


def _renamed(data: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in data.items()}


_MIGRATIONS: tuple[Callable[[dict[str, Any]], dict[str, Any]], ...] = (_from_1, _from_2, _from_3, _from_4)
"""From version 1 to 2, from 2 to 3, and so on."""


def _problems(value: Any, schema: dict[str, Any], path: str) -> Iterator[str]:
    """Where a value breaks a schema, for the keywords that the report's schema is written in."""
    if "$ref" in schema:
        schema = report_schema()["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    if "anyOf" in schema:
        broken = [list(_problems(value, option, path)) for option in schema["anyOf"]]
        yield from broken[0] if all(broken) else []
    if value not in schema.get("enum", [value]):
        yield f"{path} is {_shown(value)}, none of {schema['enum']}"
    kinds = schema.get("type", list(_TYPES))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not any(_is(value, kind) for kind in kinds):
        yield f"{path} is {_shown(value)}, not of type {' or '.join(kinds)}"
    elif _is(value, "number") and value < schema.get("minimum", -math.inf):
        yield f"{path} is {value}, less than {schema['minimum']}"
    elif isinstance(value, dict):
        yield from _problems_inside(value, schema, path)
    elif isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf):
            yield f"{path} has {len(value)} entries"
        if "items" in schema:
            for index, item in enumerate(value):
                yield from _problems(item, schema["items"], f"{path}[{index}]")


def _problems_inside(value: dict[str, Any], schema: dict[str, Any], path: str) -> Iterator[str]:
    """Where the entries of an object break its schema."""
    known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{path} lacks {name!r}"
    for name, item in value.items():
        inner = f"{path}.{_shown(name)[1:-1]}"
        schemas = [known[name]] if name in known else []
        schemas += [rule for pattern, rule in patterns.items() if re.search(pattern, name)]
        rest = schema.get("additionalProperties", True)
        if not schemas and rest is False:
            yield f"{inner} is not known"
        for rule in schemas or ([rest] if isinstance(rest, dict) else []):
            yield from _problems(item, rule, inner)


def _unequal(data: dict[str, Any]) -> Iterator[str]:
    """Lists that go together but are not of one length, which a schema can't say."""
    for index, measurement in enumerate(data["measurements"]):
        hessian, density = measurement["hessian"], measurement["hessian"]["density"] or {}
        for part, first, second in (
            (hessian, "ritz_values", "ritz_weights"),
            (density, "grid", "density"),
            (density, "nodes", "weights"),
        ):
            if len(part.get(first, ())) != len(part.get(second, ())):
                yield f"report.measurements[{index}].hessian has `{first}` and `{second}` of different lengths"
        if not all(_fit(slice_) for slice_ in (measurement["landscape"] or {}).values() if slice_ is not None):
            yield f"report.measurements[{index}].landscape has axes and `losses` of different lengths"


def _fit(landscape: dict[str, Any]) -> bool:
    """Whether there is a loss for each place on the one axis, or on both."""
    losses = landscape["losses"]
    if "axis" in landscape:
        return len(losses) == len(landscape["axis"]["at"])
    first, second = (len(axis["at"]) for axis in landscape["axes"])
    return len(losses) == second and all(len(row) == first for row in losses)


def _is(value: Any, kind: str) -> bool:
    """Whether a value is of a kind, in the terms of JSON Schema."""
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()  # JSON has one kind of number
    return isinstance(value, _TYPES[kind])


def _shown(value: Any) -> str:
    """A value for an error message: in one line, not long."""
    text = ascii(value) if isinstance(value, (str, int, float, type(None))) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:56]}…{text[-1]}"


def _integer(text: str) -> int:
    """A whole number of at most 18 digits: steps, parameters and bytes are smaller."""
    if len(text) > 19:
        raise ValueError(f"the number {text[:20]}… is too large")
    return int(text)


def _finite(text: str) -> float:
    """A number; JSON has none that is not finite."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text[:20]} is not finite")
    return value
