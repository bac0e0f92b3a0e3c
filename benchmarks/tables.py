# SPDX-License-Identifier: Apache-2.0
"""The results of `peers.py` as Markdown, and what is wrong with this package's own."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from libraries import LIBRARIES
from workloads import TITLES

from hf_optimizability.linalg.statistics import NORMAL_QUANTILE
from hf_optimizability.number_format import format_interval


OURS = "ours"
PROMISED_ERROR = 0.01
"""Relative error that this package's own calls promise for an eigenvalue."""

MAX_VECTOR_WORK = 0.1
"""Promised share of a card's time that is not spent in passes through the model."""

MAX_GRADIENTS = {"one": 3.3, "four at once": 2.4}
"""Promised time of a product, in gradients."""

SHARE_OF_DEFAULTS = {"pyhessian": 1 / 5, "hessian_eigenthings": 1 / 5}
"""Promised time of the whole card, relative to that of a peer by its defaults."""

SHARE_OF_MATCHED = 1 / 2
"""Promised time of the whole card, relative to that of any peer stopped at the same true error."""


INTRODUCTION = """What other curvature libraries do with the same models, data and machine, as measured by
`python benchmarks/peers.py`, which wrote this page, row by row. A gradient is a forward and a backward pass as
Transformers runs them by default. Errors are those against long float64 runs (`benchmarks/truth.py`), which no user
has."""


MISSED = """Of its own promises: a product in at most 3.3 gradients, or 2.4 each of four at once; never more time
or memory than a peer; the card in a fifth of the time that PyHessian's and hessian-eigenthings' defaults take, and in
half of what any peer takes to the same errors; a tenth of its time at most for the estimators' own vector work."""


def markdown(results: dict[str, Any]) -> str:
    """All tables that the results have numbers for."""
    lines = ["# Side by side", "", INTRODUCTION, ""]
    lines += [", ".join(f"{name} {number}" for name, number in results["versions"].items()) + ".", ""]
    machine = "{cores} cores, {threads} threads; a call is stopped after at most {limit:.0f} s.".format(
        **results["machine"]
    )
    lines += [machine, ""]
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
            lines += ["**The whole card, peers stopped at the target accuracy**", "", *_matched(rows), ""]
    if "any" in results["rows"]:
        lines += ["## What each takes", "", *_features(results["rows"]["any"]["features"]), ""]
    if missed := problems(results):
        lines += ["## What this package misses", "", MISSED, "", *(f"- {text}" for text in missed), ""]
    return "\n".join(lines)


def problems(results: dict[str, Any]) -> list[str]:
    """Where this package failed, missed the accuracy or the cost that it promises, or was slower than a peer."""
    found = []
    for workload, rows in results["rows"].items():
        ours = {row: libraries.get(OURS, {}) for row, libraries in rows.items()}
        wrong = chain(
            chain.from_iterable(_own_problems(row, result) for row, result in ours.items()),
            _costly(rows.get("cost", {})),
            _slower(rows),
            _dear_card(rows),
        )
        found += [f"{workload}, {text}" for text in wrong]
    return found


def _own_problems(row: str, result: dict[str, Any]) -> Iterator[str]:
    if "failed" in result:
        yield f"{row}: {result['failed']}"
    for call in result.get("calls", []):
        if "failed" in call:
            yield f"{row}: {call['failed']}"
        for name in ("lambda_max_error", "lambda_min_error"):
            if call.get(name, 0) > PROMISED_ERROR:
                yield f"{row}: {name} is {call[name]:.1%}"
    for target, reached in result.get("targets", {}).items():
        if reached is None or "expected_hvps" in reached:
            yield f"{row}: {target} is not reached"
    if 1 - result.get("passes", 1) > MAX_VECTOR_WORK:
        yield f"profile: {1 - result['passes']:.0%} of the time is not spent in passes through the model"
    if row == "density" and result and "runs" not in result:
        yield f"{row}: the target is not reached"
    for feature, outcome in result.get("outcomes", {}).items():
        if outcome != "works":
            yield f"{feature}: {outcome}"


def _costly(row: dict[str, Any]) -> Iterator[str]:
    """Products that cost more than promised, or more time or memory than the lowest peer's."""
    ways = {library: result.get("ways", {}) for library, result in _each(row)}
    ours = ways.pop(OURS, {})
    for name, most in MAX_GRADIENTS.items():
        if name in ours and ours[name]["time_ratio"] > most:
            yield f"cost: {name} takes {ours[name]['time_ratio']:.1f} gradients, more than {most}"
    for what, one_vector in (("time_ratio", True), ("time_ratio", False), ("mebibytes", True)):
        lowest = _lowest(ours, what, one_vector=one_vector)
        for library, theirs in ways.items():
            peer = _lowest(theirs, what, one_vector=one_vector)
            if lowest is not None and peer is not None and lowest > peer:
                vectors = "one vector" if one_vector else "several vectors"
                yield f"cost: {what} with {vectors} is {lowest:.2f}, that of {library} {peer:.2f}"


def _lowest(ways: dict[str, Any], what: str, *, one_vector: bool) -> float | None:
    return min((way[what] for name, way in ways.items() if name.startswith("one") == one_vector), default=None)


def _slower(rows: dict[str, Any]) -> Iterator[str]:
    """Yield the targets that a peer reaches earlier."""
    for row in ("eigenvalues", "trace", "density"):
        libraries = dict(_each(rows.get(row, {})))
        ours = _to_targets(libraries.pop(OURS, {}))
        for library, result in libraries.items():
            for target, theirs in _to_targets(result).items():
                if target in ours and _seconds(ours[target]) > _seconds(theirs):
                    both = f"{_seconds(ours[target]):.0f} s, {library} {_seconds(theirs):.0f} s"
                    yield f"{row}: {target} takes {both}"


def _to_targets(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    targets = result.get("targets", {"the target": result if "runs" in result else None})
    return {target: reached for target, reached in targets.items() if reached}


def _dear_card(rows: dict[str, Any]) -> Iterator[str]:
    """Whether the whole card takes more than its promised share of the peers' time."""
    card = dict(_each(rows.get("card", {})))
    ours = _whole(card.get(OURS, {}))
    if ours is None:
        return
    for library, share in SHARE_OF_DEFAULTS.items():
        theirs = _whole(card.get(library, {}))
        if theirs is not None and ours["seconds"] > share * _seconds(theirs):
            yield f"card: takes {ours['seconds']:.0f} s, {library} {_seconds(theirs):.0f} s by its defaults"
    for library in LIBRARIES:
        parts = _matched_parts(rows, library)
        if library != OURS and all(parts):
            matched = sum(_seconds(part) for part in parts if part)
            if ours["seconds"] > SHARE_OF_MATCHED * matched:
                yield f"card: takes {ours['seconds']:.0f} s, {library} {matched:.0f} s to the same errors"


def _whole(result: dict[str, Any]) -> dict[str, Any] | None:
    """Products and seconds of all calls of a card; what was stopped counts with the time it would have taken."""
    if "calls" not in result:
        return None
    calls = result["calls"]
    whole = {key: sum(call[key] for call in calls) for key in ("hvps", "seconds")}
    return whole | {"expected_seconds": sum(_seconds(call) for call in calls)}


def _seconds(cost: dict[str, Any]) -> float:
    """Seconds spent, or what would have been where it was stopped."""
    return float(cost.get("expected_seconds", cost["seconds"]))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    r"""Return a Markdown table.

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
        text += f"; trace {_interval(truth['trace'])}; by plain probes {_interval(truth['plain_trace'])}"
        text += f", which {'agrees' if truth['traces_agree'] else 'does not agree'}"
        text += f"; density known to a distance of {truth['density_noise']:.2g}"
    return text + "."


def _interval(mean: dict[str, float]) -> str:
    """Return a mean with its 95 % interval."""
    margin = NORMAL_QUANTILE * mean["std_error"]
    return format_interval(mean["value"], mean["value"] - margin, mean["value"] + margin)


def _each(row: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((library, row[library]) for library in LIBRARIES if library in row)


def _cost(row: dict[str, Any]) -> list[str]:
    lines = []
    # What a gradient takes is little, and comes out differently in each process.
    gradients = [way["gradient_mebibytes"] for _, result in _each(row) for way in result.get("ways", {}).values()]
    for library, result in _each(row):
        if "failed" in result:
            lines.append([library, result["failed"], "", "", "", ""])
        for name, way in result.get("ways", {}).items():
            memory = f"{way['mebibytes']:.0f} MiB, {way['mebibytes'] / statistics.median(gradients):.1f}"
            lines.append([
                library, name, f"{way['seconds']:.2f}", f"{way['time_ratio']:.1f}", memory,
                f"eager attention; the default {result['note']}" if result["note"] else "",
            ])  # fmt: skip
    return table(["library", "vectors", "seconds each", "time / gradient", "peak memory / gradient", ""], lines)


def _targets(row: dict[str, Any]) -> list[str]:
    names = list(dict.fromkeys(target for _, result in _each(row) for target in result.get("targets", {})))
    lines = []
    for library, result in _each(row):
        remark = result.get("stopped") or result.get("failed") or ""
        if remark and "hvps" in result:
            remark += f", {result['hvps']} HVPs"
        lines.append([library, *(_spent(result.get("targets", {}).get(name)) for name in names), remark])
    return table(["library", *names, ""], lines)


def _density(row: dict[str, Any]) -> list[str]:
    lines = []
    for library, result in _each(row):
        missed = result.get("failed") or result.get("stopped") or "not reached"
        how = f"{result['runs']} × {result['steps']}" if "runs" in result else missed
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
        whole = _whole(result)
        if whole is not None and len(result["calls"]) > 1:
            failed = any("failed" in call for call in result["calls"])
            told = f"in all: {_spent(whole)}{', not all of it done' if failed else ''}"
            if whole["expected_seconds"] > whole["seconds"]:
                told += f"; about {whole['expected_seconds']:.0f} s to the end"
            lines.append([library, told, "", "", "", ""])
    return table(["library", "call", "error of λ_max", "of λ_min", "of the trace", "distance of the density"], lines)


def _matched(rows: dict[str, Any]) -> list[str]:
    lines = []
    for library in LIBRARIES:
        parts = _matched_parts(rows, library)
        whole = None
        if all(parts):
            whole = {key: sum(part[key] for part in parts if part) for key in ("hvps", "seconds")}
            whole["expected_seconds"] = sum(_seconds(part) for part in parts if part)
        told = _spent(whole)
        if whole and whole["expected_seconds"] > whole["seconds"]:
            told = f"about {whole['expected_seconds']:.0f} s"
        lines.append([library, *(_spent(part) for part in parts), told])
    ours = _whole(rows.get("card", {}).get(OURS, {}))
    lines.append([f"{OURS}, in one pass", "", "", "", _spent(ours)])
    return table(["library", "both ends to 1 %", "trace to 10 %", "density", "in all"], lines)


def _matched_parts(rows: dict[str, Any], library: str) -> list[dict[str, Any] | None]:
    """Return the cost of each part of the card to the target accuracy; `None` if it was not reached."""
    ends = rows.get("eigenvalues", {}).get(library, {}).get("targets", {}).get("both to 1.0%")
    trace = rows.get("trace", {}).get(library, {}).get("targets", {}).get("10%")
    density = rows.get("density", {}).get(library, {})
    return [ends, trace, density if "runs" in density else None]


def _features(row: dict[str, Any]) -> list[str]:
    columns = dict(_each(row))
    names = list(dict.fromkeys(name for result in columns.values() for name in result.get("outcomes", {})))
    lines = [
        [name, *(result.get("outcomes", {}).get(name, result.get("failed", "")) for result in columns.values())]
        for name in names
    ]
    return table(["", *columns], lines)


def _profile(row: dict[str, Any]) -> list[str]:
    result = row[OURS]
    if "failed" in result:
        return [result["failed"]]
    passes, products = result["passes"], result["matrix_products"]
    return [
        f"Of {result['seconds']:.0f} s under a profiler, {products:.0%} went to matrix products and convolutions, "
        f"{passes - products:.0%} to the rest of the passes through the model, {1 - passes:.0%} to the vector work of "
        "the estimators and all else."
    ]


TABLES = {
    "cost": ("One Hessian-vector product relative to one gradient", _cost),
    "eigenvalues": ("Both ends of the spectrum, to an error that this benchmark knows and a user does not", _targets),
    "trace": ("The trace, to a standard error", _targets),
    "density": ("The density, weighted by squared eigenvalues, to a Wasserstein distance of 10 % of λ_max", _density),
    "card": ("The whole card, by each library's own defaults", _card),
    "profile": ("Where the time of our card goes", _profile),
}


def _call(call: dict[str, Any]) -> str:
    if "call" not in call:
        return str(call.get("failed", ""))
    text = f"`{call['call']}`: {_spent(call)}"
    if "failed" in call:
        of = f" of {call['planned_hvps']}" if "planned_hvps" in call else ""
        text = f"`{call['call']}`: {call['failed']}, {call['hvps']}{of} HVPs"
    return text


def _spent(cost: dict[str, Any] | None) -> str:
    """Products and seconds, in words."""
    if not cost or "seconds" not in cost:
        return "–"
    if "expected_hvps" in cost:
        expected = f"about {cost['expected_hvps']} HVPs, {cost['expected_seconds']:.0f} s"
        return f"{expected}, by the spread of {cost['hvps']}"
    return f"{cost['hvps']} HVPs, {cost['seconds']:.1f} s"


def _error(call: dict[str, Any], name: str) -> str:
    return f"{call[f'{name}_error']:.2%}" if f"{name}_error" in call else "–"
