# SPDX-License-Identifier: Apache-2.0
"""Puts a report into the text of a model card: its section, a tag, and its numbers as `model-index` metrics.

A card belongs to whoever wrote it. It is edited as text, so that what is not the report's own stays as it was, byte
for byte: line breaks, comments, order and quotes of the front matter, other results. Where the front matter is written
in a way that can't be edited in place (flow style, anchors), the one key in question is written anew.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from typing import Any

import yaml  # type: ignore[import-untyped]  # its stubs are a package of their own

from ..linalg.estimate import Estimate
from ..measurement.quantities_table import QUANTITIES
from ..report import OptimizabilityReport
from ..report.markdown import card_section, escape
from ..report_data.number_format import one_line


START = "<!-- optimizability:start -->"
END = "<!-- optimizability:end -->"
"""Around the section, so that the next report can take its place."""

TAG = "optimizability"
METRIC_PREFIX = "optimizability_"
"""Before the type of each metric of ours in the `model-index`; by it they are found again."""

# As the Hub finds it (huggingface_hub.repocard.REGEX_YAML_BLOCK), but it may be empty and follow a byte order mark.
_FRONT_MATTER = re.compile(
    r"\A(?P<opening>\ufeff?\s*---(?:\r\n|\r|\n))"
    r"(?P<yaml>(?:[\S\s]*?(?:\r\n|\r|\n))??)"
    r"(?P<closing>---[ \t]*(?:\r\n|\n|\Z))"
)
_RULE_FIRST = re.compile(r"\A\ufeff?\s*---[ \t]*(?:\r\n|\r|\n|\Z)")
_MARKER = re.compile(rf"(?:(?<=[\r\n])|\A)[ \t]*(?P<marker>{START}|{END})[ \t]*(?=[\r\n]|\Z)")
_LINE_BREAK = re.compile(r"\r\n|\r|\n")

_Edit = tuple[int, int, str]
"""Start and end of a stretch of text, and what takes its place."""


class ModelCardError(ValueError):
    """A model card that can't be edited without a guess at what its author meant."""


def with_report(card: str, report: OptimizabilityReport, *, name: str, files: Collection[str] = ()) -> str:
    r"""The card with the report's section in it, the tag `optimizability` and the report's numbers as metrics.

    An earlier section, between its markers, is replaced; else it goes to the end. So are earlier metrics. The second
    of two calls with one report changes nothing.

    Args:
        card: Text of the card, with the line breaks it has; may be empty.
        report: What to put in.
        name: Name of the model, for a card that has no title or `model-index` yet.
        files: Names of the report's files that lie in the folder `optimizability` beside the card.

    Raises:
        ModelCardError: If the front matter is not closed or no YAML mapping, the `model-index` is not as the Hub wants
            it, or the markers don't come as one pair.

    Example:
        >>> report = OptimizabilityReport(model={"id": "org/name"})
        >>> print(with_report("---\nlicense: mit  # as before\n---\n# Mine\n", report, name="mine"))
        ---
        license: mit  # as before
        tags:
        - optimizability
        ---
        # Mine
        <BLANKLINE>
        <!-- optimizability:start -->
        ## Optimizability
        <BLANKLINE>
        Nothing was measured of org/name.
        <!-- optimizability:end -->
        <BLANKLINE>
    """
    line_break = found.group() if (found := _LINE_BREAK.search(card)) else "\n"
    opening, front_matter, closing, body = _parts(card, line_break)
    front_matter = _with_metadata(front_matter, report, name, line_break)
    section = f"{START}\n{card_section(report, files=files)}\n{END}".replace("\n", line_break)
    if not body.strip():
        body = f"{body}# {escape(name)}{line_break}"
    return opening + front_matter + closing + _with_section(body, section, line_break)


def metadata_result(report: OptimizabilityReport) -> dict[str, Any] | None:
    """The last measurement as a result for the `model-index`; `None` where the Hub would not take it.

    Its metrics are of no type that the Hub knows; their `args` hold the step and the interval of each.
    """
    task = report.task.get("task")
    if not task or not report.measurements:
        return None
    last = report.measurements[-1]
    metrics = [
        _metric(quantity.name, quantity.metric, value, last.step)
        for quantity in QUANTITIES
        if quantity.metric and isinstance(value := quantity.get(last), Estimate) and math.isfinite(value.value)
    ]
    dataset = one_line(report.data.get("dataset") or "unknown")
    kind = re.sub(r"[^\w.-]+", "-", dataset, flags=re.ASCII).strip("-")  # the Hub takes a name such as `imdb` only
    return {
        "task": {"type": task},
        "dataset": {"type": kind or "unknown", "name": dataset},
        "metrics": metrics,
    }


def _metric(kind: str, name: str, estimate: Estimate, step: int) -> dict[str, Any]:
    ends = {"low": estimate.low, "high": estimate.high}
    return {
        "type": METRIC_PREFIX + kind,
        "name": name,
        "value": _six_digits(estimate.value),
        "args": {
            "step": step,
            **{end: _six_digits(value) for end, value in ends.items() if math.isfinite(value)},
            "converged": estimate.converged,
        },
    }


def _six_digits(value: float) -> float:
    return float(f"{value:.6g}")


def _parts(card: str, line_break: str) -> tuple[str, str, str, str]:
    """The line that opens the front matter, the YAML, the line that closes it, and the rest."""
    if found := _FRONT_MATTER.match(card):
        return found["opening"], found["yaml"], found["closing"], card[found.end() :]
    if _RULE_FIRST.match(card):
        raise ModelCardError(
            "The card begins with a line `---`, but its front matter is never closed. Close it by another line `---`, "
            "or take the first one out."
        )
    mark, text = ("\ufeff", card[1:]) if card.startswith("\ufeff") else ("", card)
    gap = line_break if text and not text.startswith(("\r", "\n")) else ""
    return f"{mark}---{line_break}", "", f"---{line_break}{gap}", text


def _with_section(body: str, section: str, line_break: str) -> str:
    markers = list(_MARKER.finditer(body))
    if not markers:
        gap = "" if body.endswith(("\r", "\n")) else line_break
        return f"{body}{gap}{line_break}{section}{line_break}"
    if [marker["marker"] for marker in markers] != [START, END]:
        lines = ", ".join(str(len(_LINE_BREAK.findall(body[: marker.start("marker")])) + 1) for marker in markers)
        raise ModelCardError(
            f"The card should hold one line {START} and after it one line {END}, or neither; it has such lines at "
            f"{lines} after the front matter. Take out those that are too many, or add the one that is missing."
        )
    return body[: markers[0].start("marker")] + section + body[markers[1].end("marker") :]


def _with_metadata(text: str, report: OptimizabilityReport, name: str, line_break: str) -> str:
    """The YAML of the front matter with our tag and our metrics."""
    data = _load(text)
    wanted: dict[str, Any] = {"tags": _wanted_tags(data.get("tags"))}
    index = _wanted_index(data.get("model-index"), metadata_result(report), name)
    if index is not None:
        wanted["model-index"] = index
    for key, value in wanted.items():
        if key not in data or repr(data[key]) != repr(value):
            data[key] = value
            text = _edited(text, data, key, line_break)
    return text


def _load(text: str) -> dict[str, Any]:
    try:
        aliases = any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text))
        data = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" (its line {error.problem_mark.line + 1})"
        raise ModelCardError(
            f"The card's front matter is no plain YAML{line}: {error.problem}. Mend it, between the two lines `---`."
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: of a date such as 2026-13-01
        raise ModelCardError(
            f"The card's front matter can't be read as YAML: {type(error).__name__}. Mend it."
        ) from None
    if aliases:  # with them a few lines stand for millions of values, and no card needs them
        raise ModelCardError("The card's front matter uses YAML aliases (`*name`). Write out what they stand for.")
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ModelCardError(
            f"The card's front matter is a {type(data).__name__}, not a mapping such as `license: mit`. Mend it."
        )
    return data


def _wanted_tags(tags: Any) -> list[str]:
    listed = [tags] if isinstance(tags, str) else tags or []
    if not isinstance(listed, list):
        raise ModelCardError("`tags` in the card's front matter should be a list of words. Mend it.")
    return listed if TAG in listed else [*listed, TAG]


def _wanted_index(index: Any, result: dict[str, Any] | None, name: str) -> list[dict[str, Any]] | None:
    """The `model-index` with `result` in the place of our earlier metrics; `None` if there shall be none."""
    if not index:
        return None if result is None else [{"name": name, "results": [result]}]
    try:
        models = [{**model, "results": list(model["results"] or [])} for model in index]
        results = [[{**one, "metrics": list(one["metrics"])} for one in model["results"]] for model in models]
        ours = [[[_is_ours(metric) for metric in one["metrics"]] for one in model] for model in results]
    except (AttributeError, KeyError, TypeError):
        raise ModelCardError(
            "`model-index` in the card's front matter should be a list of models, each with a `name` and a list of "
            "`results`, each with a list of `metrics`. Mend it, or take it out."
        ) from None
    new = [result] if result is not None else []
    for model, marks in zip(models, ours, strict=True):
        kept = []
        for one, mark in zip(model["results"], marks, strict=True):
            if mark and all(mark):
                kept += new
                new = []
            else:
                theirs = [metric for metric, our in zip(one["metrics"], mark, strict=True) if not our]
                kept.append({**one, "metrics": theirs})
        model["results"] = kept
    models[0]["results"] += new
    return models


def _is_ours(metric: dict[str, Any]) -> bool:
    return str(metric.get("type")).startswith(METRIC_PREFIX)


def _edited(text: str, wanted: dict[str, Any], key: str, line_break: str) -> str:
    """The YAML with the value of `key` as in `wanted`: edited in place, or else the key written anew."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    pairs = {} if root is None else {name.value: (name, value) for name, value in root.value}
    new = _dump({key: wanted[key]}).replace("\n", line_break)
    if key not in pairs:
        attempts = [[(len(text), len(text), new)]]
    else:
        name, value = pairs[key]
        edits = _tag_edits if key == "tags" else _index_edits
        whole = (name.start_mark.index, _line_end(text, _end(value)), new)
        attempts = [edits(text, value, wanted[key], line_break), [whole]]
    for attempt in attempts:
        edited = text
        for start, end, instead in sorted(attempt, reverse=True):
            edited = edited[:start] + instead + edited[end:]
        if _reads_as(edited, wanted):
            return edited
    raise ModelCardError(
        f"The card's front matter is written in a way that `{key}` can't be changed in. Write it as `key: value`, one "
        "a line."
    )


def _reads_as(text: str, wanted: dict[str, Any]) -> bool:
    try:
        return repr(yaml.safe_load(text)) == repr(wanted)  # of numbers that are not equal to themselves, too
    except yaml.YAMLError:
        return False


def _tag_edits(text: str, tags: yaml.Node, wanted: list[str], line_break: str) -> list[_Edit]:
    return _appended(text, tags, TAG, line_break)


def _index_edits(text: str, index: yaml.Node, wanted: list[dict[str, Any]], line_break: str) -> list[_Edit]:
    """Replaces our result by the new one, takes our metrics out of other results, or appends our result."""
    if not isinstance(index, yaml.SequenceNode) or not index.value:
        return []
    ours = [one for model in wanted for one in model["results"] if any(map(_is_ours, one["metrics"]))]
    edits: list[_Edit] = []
    lists = [_child(model, "results") for model in index.value]
    for results in lists:
        for one in results.value:
            metrics = _child(one, "metrics").value
            marks = [_child(metric, "type").value.startswith(METRIC_PREFIX) for metric in metrics]
            if not (marks and all(marks)):
                edits += [(*_item_span(text, metric), "") for metric, our in zip(metrics, marks, strict=True) if our]
            elif results.flow_style:
                edits.append((one.start_mark.index, one.end_mark.index, _flow(ours.pop()) if ours else ""))
            else:
                new = _item(ours.pop(), results.start_mark.column, line_break) if ours else ""
                edits.append((*_item_span(text, one), new))
    for one in ours:
        edits += _appended(text, lists[0], one, line_break)
    return edits


def _child(mapping: yaml.Node, key: str) -> yaml.Node:
    return next((value for name, value in mapping.value if name.value == key), yaml.ScalarNode("", ""))


def _appended(text: str, items: yaml.Node, item: Any, line_break: str) -> list[_Edit]:
    """Puts an item at the end of a list."""
    if isinstance(items, yaml.ScalarNode):
        return []
    if not items.flow_style:
        at = _line_end(text, _end(items))
        return [(at, at, _item(item, items.start_mark.column, line_break))]
    start, end = items.start_mark.index, items.end_mark.index
    if items.value:
        return [(end - 1, end - 1, f", {_flow(item)}")]
    line = text[:start].replace("\r", "\n").rpartition("\n")[2]
    indent = len(line) - len(line.lstrip(" -"))  # that of the list's key
    at = _line_end(text, end)
    return [(start - 1, end, ""), (at, at, _item(item, indent, line_break))]


def _flow(item: Any) -> str:
    return json.dumps(item, ensure_ascii=False)


def _item(item: Any, indent: int, line_break: str) -> str:
    """An item of a list, as lines of YAML."""
    lines = _dump([item]).rstrip("\n").split("\n")
    return "".join(f"{' ' * indent}{line}{line_break}" for line in lines)


def _item_span(text: str, item: yaml.Node) -> tuple[int, int]:
    """From the start of the line with the item's dash to the end of its last line."""
    dash = text.rindex("-", 0, item.start_mark.index)
    start = max(text.rfind("\n", 0, dash), text.rfind("\r", 0, dash)) + 1
    return start, _line_end(text, _end(item))


def _end(node: yaml.Node) -> int:
    """Where a node ends: PyYAML lets those in block style go on over the comments that follow."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(node, yaml.MappingNode) else last)
    return node.end_mark.index


def _line_end(text: str, at: int) -> int:
    """Where the line ends that `at` is in."""
    if at and text[at - 1] in "\r\n":
        return at
    found = _LINE_BREAK.search(text, at)
    return found.end() if found else len(text)


class _Dumper(yaml.SafeDumper):
    """Writes words plainly and any other string in double quotes, so that YAML 1.1 and 1.2 read the same."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_string(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = None if re.fullmatch(r"[A-Za-z][\w./-]*", text, flags=re.ASCII) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_string)


def _dump(data: Any) -> str:
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)
