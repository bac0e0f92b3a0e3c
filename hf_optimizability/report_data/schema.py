# SPDX-License-Identifier: Apache-2.0
"""The layout of `report.json`: its JSON Schema, validation, and migration from older layouts."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Set
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from itertools import combinations
from typing import TYPE_CHECKING, Any

from ..reasons import Reason


if TYPE_CHECKING:
    from jsonschema import ValidationError
    from jsonschema.protocols import Validator

SCHEMA_VERSION = 5
"""Version of the layout of `report.json`; raised when a reader of the old layout would misread the new one."""

MAX_DEPTH = 40
"""Lists and objects within each other; a report has ten. Far deeper ones exhaust Python's stack."""

_RENEW = "Restore the file, or create the report again."


@cache
def report_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of `report.json`.

    Example:
        >>> report_schema()["title"]
        'Optimizability report'
    """
    schema: dict[str, Any] = json.loads(files(__package__).joinpath("report.schema.json").read_text(encoding="utf-8"))
    return schema


def parse(content: bytes) -> Any:
    """Read JSON in UTF-8 whose numbers fit into float64.

    Raises:
        ValueError: If it is invalid; the message says where, and what to do.

    Example:
        >>> parse(b'{"x": NaN}')
        Traceback (most recent call last):
        ...
        ValueError: It is not valid JSON (the number NaN is not finite). Restore the file, or create the report again.
    """
    try:
        return json.loads(content.decode("utf-8"), parse_int=_integer, parse_float=_finite, parse_constant=_finite)
    except ValueError as error:
        raise ValueError(f"It is not valid JSON ({error}). {_RENEW}") from None
    except RecursionError:
        raise ValueError(f"It is nested too deep for a report. {_RENEW}") from None


def upgraded(data: Any) -> dict[str, Any]:
    """Return the data in the current layout, checked against the schema.

    Args:
        data: Content of `report.json`, in the layout of any version up to `SCHEMA_VERSION`.

    Raises:
        ValueError: If it was written by a later version of this package or is damaged; the message says what is wrong
            and what to do.
    """
    if not isinstance(data, dict):
        raise ValueError(f"It holds {_shown(data)}, not a report. Pass the `report.json` that a report was saved to.")
    if _is_deep(data):
        raise ValueError(f"It is nested too deep for a report. {_RENEW}")
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
    problem = _problem(data) or next(_unfit(data), None)
    if problem:
        raise ValueError(f"It is damaged: {problem}. {_RENEW}")
    return data


def require_valid_measurement(measurement: dict[str, Any]) -> None:
    """Check a measurement of this version alone, as `upgraded` checks those of a report.

    Raises:
        ValueError: If it is damaged; the message says where.
    """
    error = next(_validators()["measurement"].iter_errors(measurement), None)
    problem = _explained(error) if error else next(_unfit({"measurements": [measurement]}), None)
    if problem:
        raise ValueError(problem)


def _is_deep(data: Any) -> bool:
    """Return whether lists and objects are nested deeper than in any report."""
    level = [data]
    for _ in range(MAX_DEPTH):
        inner = [value.values() if isinstance(value, dict) else value for value in level]
        level = [item for items in inner for item in items if isinstance(item, (dict, list))]
        if not level:
            return False
    return True


def _from_1(data: dict[str, Any]) -> dict[str, Any]:
    """Add quantities that were not measured yet; findings are derived from the numbers again."""
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
    """Add the landscape, which was not measured."""
    measurements = [{"landscape": None, **measurement} for measurement in data["measurements"]]
    return {**data, "schema_version": 3, "measurements": measurements}


def _from_3(data: dict[str, Any]) -> dict[str, Any]:
    """Add results by task, which were not measured."""
    measurements = [{"several": None, **measurement} for measurement in data["measurements"]]
    return {**data, "schema_version": 4, "measurements": measurements}


def _from_4(data: dict[str, Any]) -> dict[str, Any]:
    """Rename fields, and put reasons by code in place of free text."""
    measurements = [with_current_names(measurement) for measurement in data["measurements"]]
    failures = [failure_with_reason(failure) for failure in data["failures"]]
    return {**data, "schema_version": 5, "measurements": measurements, "failures": failures}


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
        checks = [_renamed(check, {"end": "which"}) for check in renamed["eigenvalue_checks"]]
        renamed["eigenvalue_checks"] = [{**check, "reason": _reason(check["reason"])} for check in checks]
    return {**renamed, "fallback": _reason(renamed["fallback"])}


def failure_with_reason(failure: dict[str, Any]) -> dict[str, Any]:
    """Return a failure of version 4 or 5 in the layout of version 5."""
    if "why" in failure:
        return failure
    return {"step": failure["step"], "epoch": failure["epoch"], "why": _reason(failure["reason"])}


def _reason(found: Any) -> dict[str, Any] | None:
    """Return a reason of version 5 for one of version 4 or 5."""
    return asdict(Reason.of_earlier_version(found)) if isinstance(found, str) else found


def _renamed(data: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in data.items()}


_MIGRATIONS: tuple[Callable[[dict[str, Any]], dict[str, Any]], ...] = (_from_1, _from_2, _from_3, _from_4)
"""From version 1 to 2, from 2 to 3, and so on."""


def _problem(data: dict[str, Any]) -> str | None:
    """Return the first violation of the schema."""
    error = next(_validators()["report"].iter_errors(data), None)
    return None if error is None else _explained(error)


@cache
def _validators() -> dict[str, Validator]:
    """Return what checks a report, and a measurement alone.

    jsonschema makes a validator for each of the thousands of numbers in lists; here a list is checked as one.
    """
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend

    def items(validator: Validator, each: dict[str, Any], value: Any, schema: dict[str, Any]) -> Iterator[Any]:
        are_numbers = each == {"type": "number"} and isinstance(value, list) and {int, float} >= set(map(type, value))
        return iter(()) if are_numbers else Draft202012Validator.VALIDATORS["items"](validator, each, value, schema)

    validator = extend(Draft202012Validator, {"items": items})
    whole = report_schema()
    one = {"$ref": "#/$defs/Measurement", "$defs": whole["$defs"]}
    return {"report": validator(whole), "measurement": validator(one)}


def _explained(error: ValidationError) -> str:
    """Return where a value violates the schema, and what was expected."""
    if error.context:  # of `anyOf`: the first option says what is expected, the second that it may be null
        return _explained(next(inner for inner in error.context if inner.schema_path[0] == 0))
    value, expected = error.instance, error.validator_value
    path = "report" + "".join(f"[{key}]" if isinstance(key, int) else f".{_key(key)}" for key in error.absolute_path)
    if error.validator == "type":
        kinds = [expected] if isinstance(expected, str) else expected
        return f"{path} is {_shown(value)}, not of type {' or '.join(kinds)}"
    if error.validator == "required":
        return f"{path} lacks {next(name for name in expected if name not in value)!r}"
    if error.validator == "additionalProperties":
        return f"{path}.{_key(next(name for name in value if name not in error.schema['properties']))} is not known"
    if error.validator == "enum":
        return f"{path} is {_shown(value)}, not one of {expected}"
    if error.validator == "minimum":
        return f"{path} is {value}, less than {expected}"
    if error.validator == "pattern":
        return f"{path} is {_shown(value)}, not of the form {expected}"
    return f"{path} has {len(value)} entries, not {expected}"


def _unfit(data: dict[str, Any]) -> Iterator[str]:
    """Yield what belongs together but does not fit, which a schema can't express: lengths, tasks and blocks."""
    for index, measurement in enumerate(data["measurements"]):
        hessian = measurement["hessian"]
        density = hessian.get("density") or {}
        for part, first, second in (
            (hessian, "ritz_values", "ritz_weights"),
            (density, "grid", "density"),
            (density, "nodes", "weights"),
        ):
            if len(part.get(first, ())) != len(part.get(second, ())):
                yield f"report.measurements[{index}].hessian has `{first}` and `{second}` of different lengths"
        if not all(_fit(slice_) for slice_ in (measurement["landscape"] or {}).values() if slice_ is not None):
            yield f"report.measurements[{index}].landscape has axes and `losses` of different lengths"
        if measurement["multitask"] is not None:
            yield from (
                f"report.measurements[{index}].multitask {problem}"
                for problem in _unfit_tasks(measurement["multitask"], measurement["blocks"].keys())
            )


def _unfit_tasks(multitask: dict[str, Any], blocks: Set[str]) -> Iterator[str]:
    """Yield pairs of tasks without a conflict, or the reverse, and tasks and conflicts with other blocks."""
    tasks, conflicts = multitask["tasks"], multitask["conflicts"]
    pairs = Counter(frozenset((one["first"], one["second"])) for one in conflicts)
    if pairs != Counter(map(frozenset, combinations(tasks, 2))):
        yield "has `conflicts` that are not one for each pair of its `tasks`"
    if any(one["blocks"].keys() != blocks for one in (*tasks.values(), *conflicts)):
        yield "has other blocks than the measurement"


def _fit(landscape: dict[str, Any]) -> bool:
    """Return whether there is a loss for each position on the one axis, or on both."""
    losses = landscape["losses"]
    if "axis" in landscape:
        return len(losses) == len(landscape["axis"]["at"])
    first, second = (len(axis["at"]) for axis in landscape["axes"])
    return len(losses) == second and all(len(row) == first for row in losses)


def _shown(value: Any) -> str:
    """Return a value for an error message: on one line, shortened."""
    text = ascii(value) if isinstance(value, (str, int, float, type(None))) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:56]}…{text[-1]}"


def _key(name: str) -> str:
    """Return a key for an error message."""
    return _shown(name)[1:-1]


def _integer(text: str) -> int:
    """Read an integer of at most 18 digits: steps, parameters and bytes are smaller."""
    if len(text) > 19:
        raise ValueError(f"the number {text[:20]}… is too large")
    return int(text)


def _finite(text: str) -> float:
    """Read a finite number."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text[:20]} is not finite")
    return value
