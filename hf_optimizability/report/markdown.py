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

from ..diagnosis.findings import find
from ..measurement.results import Measurement
from ..report_data.data import ReportData
from ..report_data.number_format import (
    NOT_CONVERGED,
    format_estimate,
    format_interval,
    format_number,
    format_with_error,
    one_line,
)
from .templating import environment, first_and_last, flattened, text_without_strings, title_of, trace_shares


CARD_FOLDER = "optimizability"
"""Where a repository of a model keeps its report."""

CARD_PLOTS = ("loss", "curvature")
"""The plots that a model card shows."""

ALT_TEXTS = {
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

# A backslash where every dialect of Markdown takes one, an entity elsewhere. What matters only at the start of a line
# (#, -, +, 1.) needs none: the template never puts an outside value there.
_ESCAPES = str.maketrans(
    {
        **{character: f"\\{character}" for character in r"\`*_[]"},
        **{character: f"&#{ord(character)};" for character in "&<>|~$"},
    }
)


def to_markdown(report: ReportData, *, plots: Sequence[str] = ()) -> str:
    """Renders the report as GitHub-flavoured Markdown.

    Args:
        report: The report; any part of it may be empty.
        plots: Names of the plots that lie beside the file as `<name>.png`.

    Returns:
        The Markdown. Whatever came from outside (ids, block names, reasons of failures) is escaped.

    Example:
        >>> report = ReportData(model={"id": "org/a|b"}, task={"task": "fill-mask"})
        >>> print(to_markdown(report).splitlines()[0])
        # Optimizability of org/a&#124;b on fill-mask
    """
    template = markdown_environment().get_template("report.md.jinja")
    text = template.render(
        report=report,
        findings=find(report),
        title=title_of(report),
        plots=plots,
        alt_texts=ALT_TEXTS,
        ends=first_and_last(report.measurements),
        training=flattened(report.training),
        shares=trace_shares(report.measurements[-1]) if report.measurements else {},
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def card_section(report: ReportData, *, files: Collection[str] = ()) -> str:
    """Renders the section of a model card: what was measured first and last, two plots, links to the whole report.

    Args:
        report: The report; any part of it may be empty.
        files: Names of the report's files that lie in the folder `optimizability` beside the card.

    Returns:
        GitHub-flavoured Markdown that begins with the heading `## Optimizability`. Whatever came from outside is
        escaped.

    Example:
        >>> report = ReportData(model={"id": "org/name"}, task={"task": "fill-mask"})
        >>> print(card_section(report, files=["report.json"]))
        ## Optimizability
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
            findings=find(report),
            title=title_of(report),
            ends=first_and_last(report.measurements),
            folder=CARD_FOLDER,
            plots=[name for name in CARD_PLOTS if f"{name}.png" in files],
            alt_texts=ALT_TEXTS,
            links={file: label for file, label in links.items() if file in files},
        )
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def to_summary(report: ReportData) -> str:
    """Renders the report as at most ten aligned lines of plain text, and one more for each problem and warning.

    Example:
        >>> print(to_summary(ReportData(model={"id": "org/name"}, task={"task": "fill-mask"})))
        Optimizability  org/name on fill-mask
        Cost            nothing was measured
    """
    lines = {
        "Optimizability": title_of(report),
        **_geometry_lines(report.measurements),
        **_dynamics_lines(report.dynamics),
        "Cost": _cost_line(report.measurements),
    }
    told = [finding for finding in find(report) if finding.severity != "note"]
    rest = [
        (finding.severity.capitalize(), finding.sentence) for finding in told if finding.name != "measurement_failed"
    ]
    if report.failures:
        last = report.failures[-1]
        reason = shorten(last.reason, 160, placeholder=" …")
        rest.append(("Failed", f"{len(report.failures)}, the last at step {last.step:,}: {reason} {last.remedy}"))
    return "\n".join(f"{label:<14}  {one_line(text)}" for label, text in [*lines.items(), *rest])


def escape(text: str) -> str:
    """The text in one line, with every character that Markdown or HTML could take for markup made harmless.

    Example:
        >>> escape("<b>|x")
        '&#60;b&#62;&#124;x'
    """
    return one_line(text).translate(_ESCAPES)


@cache
def markdown_environment() -> Environment:
    """The templates' environment, with Markdown's escaping."""
    return environment(_text)


def _text(value: Any) -> Markup:
    """What the template prints for a value."""
    plain = text_without_strings(value)
    return Markup(escape(str(value))) if plain is None else plain


def _geometry_lines(measurements: Sequence[Measurement]) -> dict[str, str]:
    """The lines about loss, gradient and curvature, from the first to the last measurement."""
    ends = first_and_last(measurements)
    if not ends:
        return {}
    top = " → ".join(format_estimate(end.hessian.lambda_max) for end in ends)
    bottom = " → ".join(format_estimate(end.hessian.lambda_min) for end in ends)
    return {
        "Loss": " → ".join(f"{format_number(end.loss)} (step {end.step:,})" for end in ends),
        "Gradient norm": " → ".join(format_number(end.grad_norm) for end in ends),
        "Hessian trace": " → ".join(format_estimate(end.hessian.trace) for end in ends),
        "λ_max; λ_min": f"{top}; {bottom}",
    }


def _dynamics_lines(dynamics: dict[str, Any]) -> dict[str, str]:
    """The lines about convergence speed, stability and generalization gap: what could be told from the log."""
    lines = {}
    speed = dynamics.get("convergence_speed")
    if speed and speed["half_life"] is not None:
        half_life = format_interval(speed["half_life"], speed["half_life_low"], speed["half_life_high"])
        to_90 = format_interval(speed["steps_to_90"], speed["steps_to_90_low"], speed["steps_to_90_high"])
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
        lines["Gap"] = f"eval loss - train loss = {format_with_error(gap['loss_gap'], gap['std_error'])}"
        if gap["significant"] is not None:
            lines["Gap"] += ", more than chance" if gap["significant"] else ", within chance"
    return lines


def _cost_line(measurements: Sequence[Measurement]) -> str:
    """What the measurements cost and whether they reached their tolerances."""
    if not measurements:
        return "nothing was measured"
    hvps = sum(measurement.hvps for measurement in measurements)
    seconds = sum(measurement.seconds for measurement in measurements)
    wide = sum(not measurement.converged for measurement in measurements)
    converged = f"{wide} did not converge ({NOT_CONVERGED})" if wide else "all converged"
    plural = "s" if len(measurements) > 1 else ""
    return f"{len(measurements)} measurement{plural}, {hvps:,} HVPs, {format_number(seconds, digits=3)} s, {converged}"
