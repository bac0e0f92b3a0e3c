# SPDX-License-Identifier: Apache-2.0
"""The report as text: GitHub-flavoured Markdown, and ten lines for the terminal."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from functools import cache
from textwrap import shorten
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from ..diagnosis.findings import diagnose
from ..measurement.quantities_table import QUANTITIES
from ..measurement.results import Measurement
from ..number_format import NOT_CONVERGED, format_number, one_line
from ..report_data.data import ReportData
from .panels import JOINT_PLOTS
from .tables import LABELS, card_rows, loss_gap, quantity_cells, span, subject
from .templating import environment, first_and_last, format_plain, measurement_values, title_of


CARD_FOLDER = "optimizability"
"""Where a repository of a model keeps its report."""

CARD_PLOTS = ("loss", "curvature")
"""The plots that a model card shows."""

ALT_TEXTS = {
    **{q.plot: f"{q.label} over optimizer steps." for q in QUANTITIES if q.plot and q.plot not in JOINT_PLOTS},
    "loss": "Loss over optimizer steps: training log, evaluations and probe set.",
    "stability_margin": "Sharpness against its stability limit, learning rate against the critical one, over steps.",
    "gradient_norm": "Gradient norm over optimizer steps, in all and by block, on a logarithmic scale.",
    "noise_scale": "Gradient noise scale with its 95 % interval over steps, against the items in a batch.",
    "curvature": "Hessian trace and extreme eigenvalues over optimizer steps, with error bars.",
    "density": "Spectral density of the first and the last measurement, on a logarithmic scale.",
    "ritz_values": "Ritz values of the last measurement with their quadrature weights.",
    "landscape": "Loss along the update and over the plane of the top two eigenvectors, with its quadratic model.",
    "blocks": "Heat maps of trace and relative gradient norm, block by step.",
}

# A backslash where every dialect of Markdown takes one, an entity elsewhere. Characters that are special only at the
# start of a line (#, -, +, 1.) need none: the template never puts external text there.
_ESCAPES = str.maketrans(
    {
        **{character: f"\\{character}" for character in r"\`*_[]"},
        **{character: f"&#{ord(character)};" for character in "&<>|~$"},
    }
)


def to_markdown(report: ReportData, *, plots: Sequence[str] = ()) -> str:
    """Render the report as GitHub-flavoured Markdown.

    Args:
        report: The report; any part of it may be empty.
        plots: Names of the plots that are saved next to the file as `<name>.png`.

    Returns:
        The Markdown. External text (ids, block names, reasons of failures) is escaped.

    Example:
        >>> from hf_optimizability.report_data.provenance import ModelInfo, TaskInfo
        >>> report = ReportData(model=ModelInfo(id="org/a|b"), task=TaskInfo(task="fill-mask"))
        >>> print(to_markdown(report).splitlines()[0])
        # Optimizability of org/a&#124;b on fill-mask
    """
    template = markdown_environment().get_template("report.md.jinja")
    text = template.render(
        diagnosis=diagnose(report),
        title=title_of(report),
        plots=plots,
        alt_texts=ALT_TEXTS,
        **measurement_values(report),
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def card_section(report: ReportData, *, files: Collection[str] = ()) -> str:
    """Render the section of a model card: first and last measurement, two plots, links to the whole report.

    Args:
        report: The report; any part of it may be empty.
        files: Names of the report's files in the folder `optimizability` next to the card.

    Returns:
        GitHub-flavoured Markdown that begins with the heading `## Optimizability`. External text is escaped.

    Example:
        >>> from hf_optimizability.report_data.provenance import ModelInfo, TaskInfo
        >>> report = ReportData(model=ModelInfo(id="org/name"), task=TaskInfo(task="fill-mask"))
        >>> print(card_section(report, files=["report.json"]))
        ## Optimizability
        <BLANKLINE>
        **No rule could be checked: ...
        <BLANKLINE>
        Nothing was measured of org/name on fill-mask.
        <BLANKLINE>
        Measured with hf-optimizability: [all numbers](optimizability/report.json).
    """
    links = {"report.md": "the full report", "report.html": "as a page to open", "report.json": "all numbers"}
    text = (
        markdown_environment()
        .get_template("card.md.jinja")
        .render(
            report=report,
            diagnosis=diagnose(report),
            title=title_of(report),
            ends=first_and_last(report.measurements),
            rows=card_rows(first_and_last(report.measurements)),
            subject=subject(report) if report.measurements else "",
            folder=CARD_FOLDER,
            plots=[name for name in CARD_PLOTS if f"{name}.png" in files],
            alt_texts=ALT_TEXTS,
            links={file: label for file, label in links.items() if file in files},
        )
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def to_summary(report: ReportData) -> str:
    """Render the report as at most eleven aligned lines of plain text, and one for each further problem and warning.

    Example:
        >>> from hf_optimizability.report_data.provenance import ModelInfo, TaskInfo
        >>> print(to_summary(ReportData(model=ModelInfo(id="org/name"), task=TaskInfo(task="fill-mask"))))
        Optimizability  org/name on fill-mask
        Verdict         No rule could be checked: nothing was measured; ...
        Cost            nothing was measured
    """
    diagnosis = diagnose(report)
    others = [
        (LABELS[finding.severity], finding.sentence)
        for finding in diagnosis.findings[1:]
        if finding.severity != "note" and finding.name != "measurement_failed"
    ]
    lines = [
        ("Optimizability", title_of(report)),
        ("Verdict", str(diagnosis.verdict)),
        *others,
        *_quantity_lines(report).items(),
        *_dynamics_lines(report.dynamics).items(),
        ("Cost", _cost_line(report.measurements)),
    ]
    if report.failures:
        last = report.failures[-1]
        reason = shorten(last.reason, 160, placeholder=" …")
        lines.append(("Failed", f"{len(report.failures)}, the last at step {last.step:,}: {reason} {last.remedy}"))
    return "\n".join(f"{label:<14}  {one_line(text)}" for label, text in lines)


def escape(text: str) -> str:
    """Return the text in one line, with every character escaped that Markdown or HTML could read as markup.

    Example:
        >>> escape("<b>|x")
        '&#60;b&#62;&#124;x'
    """
    return one_line(text).translate(_ESCAPES)


@cache
def markdown_environment() -> Environment:
    """Return the environment of the templates, with Markdown's escaping."""
    return environment(_text)


def _text(value: Any) -> Markup:
    """Return a value as text."""
    plain = format_plain(value)
    return Markup(escape(str(value))) if plain is None else plain


def _quantity_lines(report: ReportData) -> dict[str, str]:
    """Return the lines of the quantities, from the first to the last measurement."""
    ends = first_and_last(report.measurements)
    if not ends:
        return {}
    lines = {"About": subject(report)}
    for quantity in QUANTITIES:
        if quantity.summary:
            cells = quantity_cells(quantity, ends)
            if quantity.name == "loss":
                cells = [f"{cell} (step {end.step:,})" for cell, end in zip(cells, ends, strict=True)]
            values = " → ".join(cells)
            lines[quantity.summary] = f"{lines[quantity.summary]}; {values}" if quantity.summary in lines else values
    return lines


def _dynamics_lines(dynamics: dict[str, Any]) -> dict[str, str]:
    """Return the lines about convergence speed, stability and generalization gap, as far as the log shows them."""
    lines = {}
    speed = dynamics.get("convergence_speed")
    if speed and speed["half_life"] is not None:
        half_life, to_90 = span(speed, "half_life"), span(speed, "steps_to_90")
        lines["Convergence"] = f"loss half-life {half_life} steps, 90 % of the drop after {to_90} steps"
    stability = dynamics.get("stability") or {}
    setbacks = [
        f"{name}: {series['setbacks']} setbacks in {series['comparisons']} comparisons"
        + (f", {series['spikes']} spikes" if series["spikes"] else "")
        for name, series in stability.items()
        if series["comparisons"] and name in ("loss", "eval_loss")
    ]
    if setbacks:
        lines["Stability"] = "; ".join(setbacks)
    gap = dynamics.get("generalization_gap")
    if gap and gap["loss_gap"] is not None:
        lines["Gap"] = f"eval loss - train loss = {loss_gap(gap)}"
        if gap["significant"] is not None:
            lines["Gap"] += ", more than chance" if gap["significant"] else ", within chance"
    return lines


def _cost_line(measurements: Sequence[Measurement]) -> str:
    """Return what the measurements cost and whether they reached their tolerances."""
    if not measurements:
        return "nothing was measured"
    hvps = sum(measurement.hvps for measurement in measurements)
    seconds = sum(measurement.seconds for measurement in measurements)
    wide = sum(not measurement.converged for measurement in measurements)
    converged = f"{wide} did not converge ({NOT_CONVERGED})" if wide else "all converged"
    plural = "s" if len(measurements) > 1 else ""
    return f"{len(measurements)} measurement{plural}, {hvps:,} HVPs, {format_number(seconds, digits=3)} s, {converged}"
