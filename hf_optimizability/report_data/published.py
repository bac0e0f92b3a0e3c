# SPDX-License-Identifier: Apache-2.0
"""What of a report is published: fields that report.schema.json allows, and nothing that its marks do not.

Whatever lies in a report's folder counts as published: the Trainer's own `push_to_hub` uploads it without asking. So
this is applied when a report is written, and again when one is pushed, which may be older or come from elsewhere.

Numbers pass. A string passes by its mark in the schema, `published`:

- `name`: names of parameters, metrics, labels, tasks, models, data sets, classes. They pass as they are, unless they
  look like a secret, a path, a URL or an address: then a hash takes their place (`public_name`).
- `word`: the same of one word: versions, types of errors, what a reason's sentences are completed with. In place of a
  sentence there is a hash, too.
- `option`: an option of the measurements: a number, a name, or a list of names.
- `note`: a sentence of the training dynamics; those of `hf_optimizability.dynamics` pass.
- `number`: nothing but a number passes, such as in the Trainer's log.

Without a mark no string passes, and without a schema nothing does. Keys are names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ..files import finite
from ..reasons import Reason
from ..redaction import public_name, public_word
from .schema import report_schema


def published(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data of a report as it may be published.

    Args:
        data: Valid data of `report.json`, of this version.

    Example:
        >>> published({"model": {"id": "org/name", "token": "x"}, "log_history": [{"loss": 0.5, "note": "hi"}]})
        {'model': {'id': 'org/name'}, 'log_history': [{'loss': 0.5}]}
    """
    return _allowed(data, report_schema())  # type: ignore[no-any-return]


def published_reason(why: Reason) -> Reason:
    """Return a reason as it may be published.

    Example:
        >>> published_reason(Reason("tensors_overwritten", values={"tensors": ("a", "/home/ada")})).values
        {'tensors': ('a', 'private-cf2d5242')}
    """
    return Reason.from_dict(_allowed(finite(asdict(why)), report_schema()["$defs"]["Reason"]))


def _allowed(value: Any, schema: Mapping[str, Any]) -> Any:
    """Return what a schema allows of a value."""
    schema = _resolved(value, schema)
    if isinstance(value, Mapping):
        return _fields(value, schema)
    if isinstance(value, list):
        return [_allowed(item, schema.get("items", schema)) for item in value]
    if isinstance(value, str):
        return _string(value, schema)
    return value


def _fields(data: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    known, others = schema.get("properties", {}), schema.get("additionalProperties")
    found = {name: _allowed(value, known[name]) for name, value in data.items() if name in known}
    if not others:
        return found
    more = {name: value for name, value in data.items() if name not in known}
    if others.get("published") == "number":
        more = {name: value for name, value in more.items() if value is None or isinstance(value, (int, float))}
    return found | {public_name(name): _allowed(value, others) for name, value in more.items()}


def _string(text: str, schema: Mapping[str, Any]) -> str | None:
    """Return a string, or nothing in its place."""
    mark = schema.get("published")
    if mark in ("name", "option"):
        return public_name(text)
    if mark == "word":
        return public_word(text)
    if text in schema.get("enum", ()) or (mark == "note" and _is_note(text)):
        return text
    return None if "null" in schema.get("type", ()) else ""


def _is_note(text: str) -> bool:
    from ..dynamics import is_note  # loads `evaluate` and `datasets`

    return text == "" or is_note(text)


def _resolved(value: Any, schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the schema that a valid value follows: what a reference refers to, the option of its type."""
    while "$ref" in schema or "anyOf" in schema:
        if "$ref" in schema:
            schema = report_schema()["$defs"][schema["$ref"].rpartition("/")[2]]
        else:
            schema = next((one for one in schema["anyOf"] if _fits(value, one)), {})
    return schema


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Return whether a value has a schema's type."""
    if "$ref" in schema or "anyOf" in schema:
        return _fits(value, _resolved(value, schema)) if "anyOf" in schema else isinstance(value, Mapping)
    kinds = schema.get("type", [])
    return any(isinstance(value, _TYPES[kind]) for kind in ([kinds] if isinstance(kinds, str) else kinds))


_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "object": Mapping,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}
