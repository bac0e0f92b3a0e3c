# SPDX-License-Identifier: Apache-2.0
"""Write report.schema.json from the result dataclasses: `make schema`.

Each dataclass that a report's measurements, failures and findings consist of becomes a definition: types from its
hints, descriptions from its docstring; fields without a default are required. The rest of the file (the Trainer's log,
the dynamics) describes dicts; it is kept as it is.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from hf_optimizability.config import OptimizabilityConfig
from hf_optimizability.diagnosis.findings import Finding, RuleStatus, Verdict
from hf_optimizability.measurement.results import Measurement, MeasurementFailure
from hf_optimizability.reasons import WORDS
from hf_optimizability.report_data.schema import SCHEMA_VERSION


FILE = Path(__file__).parents[1] / "hf_optimizability/report_data/report.schema.json"

ROOTS: dict[str, type] = {
    "measurements": Measurement,
    "failures": MeasurementFailure,
    "findings": Finding,
    "rules": RuleStatus,
}
"""What the lists of a report hold."""

VERDICT = "verdict"
"""The field that holds one `Verdict`. Reports of earlier versions have neither it nor `rules`."""

MAY_BE_INFINITE = {
    "Estimate.value", "Estimate.low", "Estimate.high", "CriticalLearningRate.value", "CriticalLearningRate.low",
    "CriticalLearningRate.high", "OptimizerStability.limit", "LossLine.losses", "LossPlane.losses",
}  # fmt: skip
"""Floats that may be infinite, which JSON holds as null."""

NARROWER: dict[str, dict[str, Any]] = {
    "Axis.at": {"minItems": 2},
    "EigenvalueCheck.differences": {"minItems": 1},
    "EigenvalueCheck.which": {"enum": ["lambda_max", "lambda_min"]},
    "Reason.code": {"enum": sorted(WORDS)},
    "Reason.error": {"pattern": "^[\\w-]+$"},
}
"""What a type can't express."""

DERIVED: dict[str, dict[str, Any]] = {
    "Measurement": {"converged": {"type": "boolean"}},
    "MeasurementFailure": {
        "reason": {"description": "Its words, for readers; this package reads `why`.", "type": "string"},
        "remedy": {"description": "What the user can do, likewise.", "type": "string"},
    },
}
"""Properties that `to_dict` adds to the fields."""

SINGLE_WORDS = {
    "Estimate.method", "Measurement.attention", "Measurement.curvature", "Measurement.dtype", "Measurement.engine",
    "OptimizerStability.optimizer", "Reason.error", "Reason.values",
}  # fmt: skip
"""Fields whose strings are single words, and published as such."""

OPTION = {"published": "option"}
"""An option of the measurements: a number, a name or a list of names."""

SCALARS: dict[type, dict[str, Any]] = {
    bool: {"type": "boolean"},
    int: {"type": "integer", "minimum": 0},
    float: {"type": "number"},
    str: {"type": "string", "published": "name"},
}


def definitions(*roots: type) -> dict[str, dict[str, Any]]:
    """Return the definition of each dataclass that can be reached from these, by name."""
    found: dict[str, dict[str, Any]] = {}
    todo = list(roots)
    while todo:
        cls = todo.pop()
        if cls.__name__ not in found:
            hints = get_type_hints(cls, include_extras=True)
            todo += [inner for field in fields(cls) for inner in _dataclasses(hints[field.name])]
            found[cls.__name__] = _definition(cls, hints)
    return dict(sorted(found.items()))


def _definition(cls: type, hints: Mapping[str, Any]) -> dict[str, Any]:
    described: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        described |= _attributes(inspect.cleandoc(base.__dict__.get("__doc__") or ""))
    properties = {}
    for field in fields(cls):
        place = f"{cls.__name__}.{field.name}"
        value = _schema(hints[field.name], infinite=place in MAY_BE_INFINITE) | NARROWER.get(place, {})
        properties[field.name] = {
            "description": described[field.name],
            **(_words(value) if place in SINGLE_WORDS else value),
        }
    return {
        "description": _plain((cls.__doc__ or "").partition("\n\n")[0]),
        "type": "object",
        "properties": properties | DERIVED.get(cls.__name__, {}),
        "required": [field.name for field in fields(cls) if field.default is field.default_factory is MISSING],
        "additionalProperties": False,
    }


def _schema(hint: Any, *, infinite: bool = False) -> dict[str, Any]:
    """Return the schema of a value with this type hint."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _schema(arguments[0], infinite=infinite)
    if is_dataclass(hint):
        return {"$ref": f"#/$defs/{hint.__name__}"}
    if origin in (Union, UnionType):
        inner = [_schema(argument, infinite=infinite) for argument in arguments if argument is not NoneType]
        (any_of,) = inner if len(inner) == 1 else [{"anyOf": inner}]
        return _or_null(any_of) if NoneType in arguments else any_of
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        length = {} if arguments[-1] is Ellipsis else {"minItems": len(arguments), "maxItems": len(arguments)}
        return {"type": "array", "items": _schema(arguments[0], infinite=infinite), **length}
    if origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": _schema(arguments[1], infinite=infinite)}
    return _or_null(SCALARS[hint]) if infinite and hint is float else dict(SCALARS[hint])


def _words(schema: Any) -> Any:
    """Return the schema with the mark of single words in place of that of names."""
    if isinstance(schema, list):
        return [_words(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: "word" if key == "published" else _words(value) for key, value in schema.items()}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.get("type") in ("number", "integer", "string", "boolean"):
        return {**schema, "type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


def _dataclasses(hint: Any) -> list[type]:
    if is_dataclass(hint):
        return [hint]
    return [found for argument in get_args(hint) for found in _dataclasses(argument)]


def _attributes(docstring: str) -> dict[str, str]:
    """Return the descriptions in the section "Attributes" of a docstring."""
    section = re.search(r"^Attributes:\n((?:    .*\n?|\n(?=    ))*)", docstring, re.MULTILINE)
    entries = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", section[1] if section else "", re.MULTILINE)
    return {name: _plain(text) for name, text in entries}


def _plain(text: str) -> str:
    return " ".join(text.replace("`None`", "null").split())


def schema() -> dict[str, Any]:
    """Return the schema of `report.json`."""
    written = json.loads(FILE.read_text(encoding="utf-8"))
    result = written | {"description": f"Layout of report.json, version {SCHEMA_VERSION}. Infinite numbers are null."}
    result["properties"]["schema_version"] = {"enum": [SCHEMA_VERSION]}
    for name, cls in ROOTS.items():
        result["properties"][name] = {"type": "array", "items": {"$ref": f"#/$defs/{cls.__name__}"}}
    result["properties"][VERDICT] = {"$ref": f"#/$defs/{Verdict.__name__}"}
    by_hand = {name: value for name, value in written["$defs"].items() if not name[0].isupper()}
    result["$defs"] = by_hand | definitions(*ROOTS.values(), Verdict)
    result["properties"]["config"]["properties"] = {
        field.name: dict(OPTION) for field in fields(OptimizabilityConfig) if field.name != "report_dir"
    }
    return result


def text() -> str:
    """Return the content that report.schema.json should have."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
