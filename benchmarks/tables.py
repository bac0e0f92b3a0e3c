# SPDX-License-Identifier: Apache-2.0
"""The results of `peers.py` as Markdown, and what is wrong with this package's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from libraries import LIBRARIES
from workloads import TITLES


OURS = "ours"
PROMISED_ERROR = 0.01
"""Relative error that this package's own calls promise for an eigenvalue."""


def markdown(results: dict[str, Any]) -> str:
    """All tables that the results have numbers for."""
    lines = ["# Side by side", ""]
    lines += [", ".join(f"{name} {number}" for name, number in results["versions"].items()) + ".", ""]
    lines += ["{cores} cores, {threads} threads.".format(**results["machine"]), ""]
    for workload, title in TITLES.items():
        rows = results["rows"].get(workload, {})
        if rows:
            lines += [f"## {title}", ""]
        if workload in results["truth"]:
            lines += [_truth(results["truth"][workload]), ""]
        for row, (heading, draw) in TABLES.items():
            if row in rows:
                lines += [f"**{heading}**", "", *draw(rows[row]), ""]
        if {"eigenvalues", "trace", "density"} <= rows.keys():
            lines += ["**The whole card, each part stopped at the target accuracy**", "", *_matched(rows), ""]
    if "any" in results["rows"]:
        lines += ["## What each takes", "", *_features(results["rows"]["any"]["features"]), ""]
    return "\n".join(lines)


def problems(results: dict[str, Any]) -> list[str]:
    """Where this package's own rows failed or missed the accuracy that they promise."""
    found = []
    for workload, rows in results["rows"].items():
        for row, libraries in rows.items():
            result = libraries.get(OURS, {})
            where = f"{workload}, {row}"
            if "failed" in result:
                found.append(f"{where}: {result['failed']}")
            for call in [result.get("default", {}), *result.get("calls", [])]:
                if "failed" in call:
                    found.append(f"{where}: {call['failed']}")
                for name in ("lambda_max_error", "lambda_min_error"):
                    if call.get(name, 0) > PROMISED_ERROR:
                        found.append(f"{where}: {name} is {call[name]:.1%}")
            for feature, outcome in result.get("outcomes", {}).items():
                if outcome != "works":
                    found.append(f"{feature}: {outcome}")
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    r"""A Markdown table.

    Example:
        >>> print("\n".join(table(["library", "HVPs"], [["ours", "8"]])))
        | library | HVPs |
        |---|---|
        | ours | 8 |
    """
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    drawn = ["| " + " | ".join(line) + " |" for line in lines]
    drawn[1] = drawn[1].replace(" ", "")
    return drawn


def _truth(truth: dict[str, Any]) -> str:
    text = f"λ_max {truth['lambda_max']:.4g}, λ_min {truth['lambda_min']:.4g}"
    text += " (residuals {:.1g} and {:.1g})".format(*truth["residuals"])
    if truth["trace"] is not None:
        text += f"; trace {truth['trace']:.4g} ± {truth['trace_std_error']:.2g}"
        text += f"; density known to a distance of {truth['density_noise']:.2g}"
    return text + "."


def _each(row: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((library, row[library]) for library in LIBRARIES if library in row)


def _cost(row: dict[str, Any]) -> list[str]:
    lines = []
    for library, result in _each(row):
        if "failed" in result:
            lines.append([library, result["failed"], "", "", "", ""])
        for name, way in result.get("ways", {}).items():
            lines.append([
                library, name, f"{way['seconds']:.2f}", f"{way['time_ratio']:.1f}", f"{way['memory_ratio']:.1f}",
                f"eager attention; the default {result['note']}" if result["note"] else "",
            ])  # fmt: skip
    return table(["library", "vectors", "seconds each", "time / gradient", "peak memory / gradient", ""], lines)


def _eigenvalues(row: dict[str, Any]) -> list[str]:
    targets = list(dict.fromkeys(target for _, result in _each(row) for target in result.get("targets", {})))
    lines = []
    for library, result in _each(row):
        call = result.get("default", result)
        reached = [_spent(result.get("targets", {}).get(target)) for target in targets]
        lines.append([library, _call(call), _error(call, "lambda_max"), _error(call, "lambda_min"), *reached])
    return table(["library", "its own call", "error of λ_max", "of λ_min", *targets], lines)


def _trace(row: dict[str, Any]) -> list[str]:
    targets = list(dict.fromkeys(target for _, result in _each(row) for target in result.get("targets", {})))
    lines = []
    for library, result in _each(row):
        call = result.get("default", result)
        reached = [_spent(result.get("targets", {}).get(target)) for target in targets]
        stated = f"{call['std_error'] / abs(call['trace']):.1%}" if call.get("std_error") else "none stated"
        lines.append([library, _call(call), _error(call, "trace"), stated, *reached])
    return table(["library", "its own call", "error", "standard error", *(f"to {t}" for t in targets)], lines)


def _density(row: dict[str, Any]) -> list[str]:
    lines = []
    for library, result in _each(row):
        how = f"{result['runs']} × {result['steps']}" if "runs" in result else result.get("failed", "not reached")
        lines.append([library, how, _spent(result), f"{result['distance']:.2g}" if "distance" in result else ""])
    return table(["library", "runs × steps", "spent", "distance"], lines)


def _card(row: dict[str, Any]) -> list[str]:
    lines = []
    for library, result in _each(row):
        if "failed" in result:
            lines.append([library, result["failed"], str(result.get("hvps", "")), *[""] * 5])
        for call in result.get("calls", []):
            errors = [_error(call, name) for name in ("lambda_max", "lambda_min", "trace")]
            distance = f"{call['distance']:.2g}" if "distance" in call else ""
            lines.append([library, _call(call), *errors, distance])
        if "calls" in result:
            whole = {key: sum(call[key] for call in result["calls"]) for key in ("hvps", "seconds")}
            unfinished = any("failed" in call for call in result["calls"])
            lines.append([library, f"in all: {_spent(whole)}{', unfinished' if unfinished else ''}", "", "", "", ""])
    return table(["library", "call", "error of λ_max", "of λ_min", "of the trace", "distance of the density"], lines)


def _matched(rows: dict[str, Any]) -> list[str]:
    lines = []
    for library in LIBRARIES:
        ends = rows["eigenvalues"].get(library, {}).get("targets", {}).get("both to 1.0%")
        trace = rows["trace"].get(library, {}).get("targets", {}).get("10%")
        density = rows["density"].get(library, {})
        parts = [ends, trace, density if "runs" in density else None]
        whole = None
        if all(parts):
            whole = {key: sum(part[key] for part in parts if part) for key in ("hvps", "seconds")}
        lines.append([library, *(_spent(part) for part in (*parts, whole))])
    return table(["library", "both ends to 1 %", "trace to 10 %", "density", "in all"], lines)


def _features(row: dict[str, Any]) -> list[str]:
    columns = dict(_each(row))
    names = list(dict.fromkeys(name for result in columns.values() for name in result.get("outcomes", {})))
    lines = [
        [name, *(result.get("outcomes", {}).get(name, result.get("failed", "")) for result in columns.values())]
        for name in names
    ]
    return table(["", *columns], lines)


TABLES = {
    "cost": ("One Hessian-vector product beside one gradient", _cost),
    "eigenvalues": ("Both ends of the spectrum", _eigenvalues),
    "trace": ("The trace, to a standard error", _trace),
    "density": ("The density, to a distance from the true one", _density),
    "card": ("The whole card, by each library's own defaults", _card),
}


def _call(call: dict[str, Any]) -> str:
    if "call" not in call:
        return str(call.get("failed", ""))
    return f"`{call['call']}`: {call.get('failed') or _spent(call)}"


def _spent(cost: dict[str, Any] | None) -> str:
    """Products and seconds, in words."""
    if not cost or "seconds" not in cost:
        return "–"
    if "expected_hvps" in cost:
        return f"about {cost['expected_hvps']} HVPs, by the spread of {cost['hvps']}"
    return f"{cost['hvps']} HVPs, {cost['seconds']:.0f} s"


def _error(call: dict[str, Any], name: str) -> str:
    return f"{call[f'{name}_error']:.2%}" if f"{name}_error" in call else "–"
