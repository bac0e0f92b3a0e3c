# SPDX-License-Identifier: Apache-2.0
"""Put a report into the text of a model card: its section, a tag, and its numbers as `model-index` metrics.

A card belongs to its author. It is edited as text, so that everything else stays the same byte for byte: line breaks,
comments, order and quotes of the front matter, other results. Where a key can't be edited in place (flow style,
anchors), that key alone is rewritten. Round trips by `ruamel.yaml` would not do: 0.19 writes lists that are indented
in different ways all alike, drops carriage returns and spaces inside of lines, and turns `~` and `null` to nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from typing import Any

import yaml

from ..linalg.estimate import Estimate
from ..measurement.quantities_table import QUANTITIES
from ..number_format import one_line
from ..report import OptimizabilityReport
from ..report.markdown import card_section, escape


START = "<!-- optimizability:start -->"
END = "<!-- optimizability:end -->"
"""Markers around the section, by which the next report replaces it."""

TAG = "optimizability"
METRIC_PREFIX = "optimizability_"
"""Prefix of the types of our metrics in the `model-index`, by which they are found again."""

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
"""Start and end of a span of text, and its replacement."""


class ModelCardError(ValueError):
    """A model card that can't be edited without guessing what its author meant."""


def with_report(card: str, report: OptimizabilityReport, *, name: str, files: Collection[str] = ()) -> str:
    r"""Return the card with the report's section, the tag `optimizability` and the report's numbers as metrics.

    An earlier section, between its markers, and earlier metrics are replaced; a new section goes to the end. A second
    call with the same report changes nothing.

    Args:
        card: Text of the card, with its own line breaks; may be empty.
        report: The report.
        name: Name of the model, for a card without title or `model-index`.
        files: Names of the report's files in the folder `optimizability` next to the card.

    Raises:
        ModelCardError: If the front matter is not closed or not a YAML mapping, the `model-index` does not have the
            Hub's layout, or the markers are not one pair.

    Example:
        >>> from hf_optimizability.report_data.provenance import ModelInfo
        >>> report = OptimizabilityReport(model=ModelInfo(id="org/name"))
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
        **No rule could be checked: nothing was measured; ...** Measure it; where that failed, ...
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
    """Return the last measurement as a result for the `model-index`; `None` where the Hub would reject it.

    The types of its metrics are our own; their `args` hold step and interval.
    """
    task = report.task.task
    if not task or not report.measurements:
        return None
    last = report.measurements[-1]
    metrics = [
        _metric(quantity.name, quantity.metric, value, last.step)
        for quantity in QUANTITIES
        if quantity.metric and isinstance(value := quantity.get(last), Estimate) and math.isfinite(value.value)
    ]
    dataset = one_line(report.data.dataset or "unknown")
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
    """Return the opening line of the front matter, the YAML, the closing line, and the body."""
    if found := _FRONT_MATTER.match(card):
        return found["opening"], found["yaml"], found["closing"], card[found.end() :]
    if _RULE_FIRST.match(card):
        raise ModelCardError(
            "The card begins with a line `---`, but its front matter is never closed. Close it with another line "
            "`---`, or remove the first one."
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
            f"{lines} after the front matter. Remove the extra ones, or add the missing one."
        )
    return body[: markers[0].start("marker")] + section + body[markers[1].end("marker") :]


def _with_metadata(text: str, report: OptimizabilityReport, name: str, line_break: str) -> str:
    """Return the YAML of the front matter with our tag and our metrics."""
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
            f"The card's YAML front matter is invalid{line}: {error.problem}. Fix it, between the two lines `---`."
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: of a date such as 2026-13-01
        raise ModelCardError(f"The card's YAML front matter can't be read: {type(error).__name__}. Fix it.") from None
    if aliases:  # with aliases a few lines can expand to millions of values, and no card needs them
        raise ModelCardError("The card's front matter uses YAML aliases (`*name`). Write out what they stand for.")
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ModelCardError(
            f"The card's front matter is a {type(data).__name__}, not a mapping such as `license: mit`. Fix it."
        )
    return data


def _wanted_tags(tags: Any) -> list[str]:
    listed = [tags] if isinstance(tags, str) else tags or []
    if not isinstance(listed, list):
        raise ModelCardError("`tags` in the card's front matter should be a list of words. Fix it.")
    return listed if TAG in listed else [*listed, TAG]


def _wanted_index(index: Any, result: dict[str, Any] | None, name: str) -> list[dict[str, Any]] | None:
    """Return the `model-index` with `result` in place of our earlier metrics; `None` if there should be none."""
    if not index:
        return None if result is None else [{"name": name, "results": [result]}]
    try:
        models = [{**model, "results": list(model["results"] or [])} for model in index]
        results = [[{**one, "metrics": list(one["metrics"])} for one in model["results"]] for model in models]
        ours = [[[_is_ours(metric) for metric in one["metrics"]] for one in model] for model in results]
    except (AttributeError, KeyError, TypeError):
        raise ModelCardError(
            "`model-index` in the card's front matter should be a list of models, each with a `name` and a list of "
            "`results`, each with a list of `metrics`. Fix or remove it."
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
    """Return the YAML with the value of `key` as in `wanted`: edited in place if possible, else rewritten."""
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
        f"The card's front matter is written in a way in which `{key}` can't be changed. Write it as `key: value`, "
        "one per line."
    )


def _reads_as(text: str, wanted: dict[str, Any]) -> bool:
    try:
        return repr(yaml.safe_load(text)) == repr(wanted)  # NaN is not equal to itself
    except yaml.YAMLError:
        return False


def _tag_edits(text: str, tags: yaml.Node, wanted: list[str], line_break: str) -> list[_Edit]:
    return _appended(text, tags, TAG, line_break)


def _index_edits(text: str, index: yaml.Node, wanted: list[dict[str, Any]], line_break: str) -> list[_Edit]:
    """Return the edits that replace our result, or append it, and remove our metrics from other results."""
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
    """Return the edits that append an item to a list."""
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
    """Return an item of a list as lines of YAML."""
    lines = _dump([item]).rstrip("\n").split("\n")
    return "".join(f"{' ' * indent}{line}{line_break}" for line in lines)


def _item_span(text: str, item: yaml.Node) -> tuple[int, int]:
    """Return the span from the start of the line with the item's dash to the end of its last line."""
    dash = text.rindex("-", 0, item.start_mark.index)
    start = max(text.rfind("\n", 0, dash), text.rfind("\r", 0, dash)) + 1
    return start, _line_end(text, _end(item))


def _end(node: yaml.Node) -> int:
    """Return the end of a node: PyYAML extends those in block style over the comments that follow."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(node, yaml.MappingNode) else last)
    return node.end_mark.index


def _line_end(text: str, at: int) -> int:
    """Return the end of the line that holds `at`."""
    if at and text[at - 1] in "\r\n":
        return at
    found = _LINE_BREAK.search(text, at)
    return found.end() if found else len(text)


class _Dumper(yaml.SafeDumper):
    """Dumper that writes words plainly and other strings in double quotes, to be read alike by YAML 1.1 and 1.2."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_string(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = None if re.fullmatch(r"[A-Za-z][\w./-]*", text, flags=re.ASCII) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_string)


def _dump(data: Any) -> str:
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)
