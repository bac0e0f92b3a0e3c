# SPDX-License-Identifier: Apache-2.0
"""The report as text: GitHub-flavoured Markdown, and ten lines for the terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from textwrap import shorten
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..curvature.estimates import Estimate
from ..curvature.step import CriticalLearningRate
from ..measurement import Measurement
from .report import OptimizabilityReport


CARD_FOLDER = "optimizability"
"""Where a repository of a model keeps its report."""

CARD_PLOTS = ("loss", "curvature")
"""The plots that a model card shows."""

MISSING = "–"
NOT_CONVERGED = "†"

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


def to_markdown(report: OptimizabilityReport, *, plots: Sequence[str] = ()) -> str:
    """Renders the report as GitHub-flavoured Markdown.

    Args:
        report: The report; any part of it may be empty.
        plots: Names of the plots that lie beside the file as `<name>.png`.

    Returns:
        The Markdown. Whatever came from outside (ids, block names, reasons of failures) is escaped.

    Example:
        >>> report = OptimizabilityReport(model={"id": "org/a|b"}, task={"task": "fill-mask"})
        >>> print(to_markdown(report).splitlines()[0])
        # Optimizability of org/a&#124;b on fill-mask
    """
    template = _environment().get_template("report.md.jinja")
    text = template.render(
        report=report,
        title=_title(report),
        plots=plots,
        alt_texts=ALT_TEXTS,
        ends=_ends(report.measurements),
        training=_flat(report.training),
        shares=trace_shares(report.measurements[-1]) if report.measurements else {},
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def card_section(report: OptimizabilityReport, *, files: Collection[str] = ()) -> str:
    """Renders the section of a model card: what was measured first and last, two plots, links to the whole report.

    Args:
        report: The report; any part of it may be empty.
        files: Names of the report's files that lie in the folder `optimizability` beside the card.

    Returns:
        GitHub-flavoured Markdown that begins with the heading `## Optimizability`. Whatever came from outside is
        escaped.

    Example:
        >>> report = OptimizabilityReport(model={"id": "org/name"}, task={"task": "fill-mask"})
        >>> print(card_section(report, files=["report.json"]))
        ## Optimizability
        <BLANKLINE>
        Nothing was measured of org/name on fill-mask.
        <BLANKLINE>
        Measured with hf-optimizability: [all numbers](optimizability/report.json).
    """
    links = {"report.md": "the full report", "report.html": "as a page to open", "report.json": "all numbers"}
    text = (
        _environment()
        .get_template("card.md.jinja")
        .render(
            report=report,
            title=_title(report),
            ends=_ends(report.measurements),
            folder=CARD_FOLDER,
            plots=[name for name in CARD_PLOTS if f"{name}.png" in files],
            alt_texts=ALT_TEXTS,
            links={file: label for file, label in links.items() if file in files},
        )
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def to_summary(report: OptimizabilityReport) -> str:
    """Renders the report as at most ten aligned lines of plain text, and one more for each problem and warning.

    Example:
        >>> print(to_summary(OptimizabilityReport(model={"id": "org/name"}, task={"task": "fill-mask"})))
        Optimizability  org/name on fill-mask
        Cost            nothing was measured
    """
    lines = {
        "Optimizability": _title(report),
        **_geometry_lines(report.measurements),
        **_dynamics_lines(report.dynamics),
        "Cost": _cost_line(report.measurements),
    }
    told = [finding for finding in report.findings if finding.severity != "note"]
    rest = [
        (finding.severity.capitalize(), finding.sentence) for finding in told if finding.name != "measurement_failed"
    ]
    if report.failures:
        last = report.failures[-1]
        reason = shorten(last.reason, 160, placeholder=" …")
        rest.append(("Failed", f"{len(report.failures)}, the last at step {last.step:,}: {reason} {last.remedy}"))
    return "\n".join(f"{label:<14}  {one_line(text)}" for label, text in [*lines.items(), *rest])


def format_number(value: float | None, *, digits: int = 4) -> str:
    """A number that comes without an error, to `digits` significant digits.

    Example:
        >>> [format_number(value) for value in (0.693147, 12345.6, 2e-5, None)]
        ['0.6931', '12,350', '2.000e-05', '–']
    """
    if value is None or not math.isfinite(value):
        return MISSING
    exponent = _exponent(value, digits)
    if _is_scientific(exponent):
        return f"{value:.{digits - 1}e}"
    return _rounded(value, exponent - digits + 1)


def format_with_error(value: float | None, error: float | None) -> str:
    """A number and its error: the error to two significant digits (GUM, 7.2.6), the number to the same place.

    A number is given six digits at most, however small its error. An error that is not known is `?`.

    Example:
        >>> [format_with_error(361.29, 43.41), format_with_error(9.0213, 0.0312), format_with_error(4.2e6, 3e5)]
        ['361 ± 43', '9.021 ± 0.031', '(4.20 ± 0.30)e+06']
        >>> format_with_error(9.0213, None)
        '9.021 ± ?'
    """
    if value is None or not math.isfinite(value):
        return MISSING
    if error is None or not math.isfinite(error):
        return f"{format_number(value)} ± ?"
    if error == 0:
        return f"{format_number(value, digits=6)} ± 0"
    exponent = max(_exponent(value, 6), _exponent(error, 2))
    place = _exponent(error, 2) - 1
    if place < exponent - 5:
        return f"{format_number(value, digits=6)} ± {error:.1e}"
    if _is_scientific(exponent):
        value, error, place = value / 10.0**exponent, error / 10.0**exponent, place - exponent
        return f"({_rounded(value, place)} ± {_rounded(error, place)})e{exponent:+03d}"
    return f"{_rounded(value, place)} ± {_rounded(error, place)}"


def format_interval(value: float | None, low: float | None, high: float | None) -> str:
    """A number and its 95 % interval, all rounded where a quarter of the interval has its second digit.

    Example:
        >>> [format_interval(35.21, 20.13, 62.34), format_interval(35.21, 20.13, None)]
        ['35 (20 to 62)', '35.2 (at least 20.1)']
        >>> format_interval(math.inf, 20.13, math.inf)
        'at least 20.1'
    """
    if value == math.inf and low is not None:
        return f"at least {format_number(low, digits=3)}"
    if value is None or low is None or low == high or not math.isfinite(value + low):
        return format_number(value, digits=3)
    if high is None or not math.isfinite(high):
        return f"{format_number(value, digits=3)} (at least {format_number(low, digits=3)})"
    place = _exponent((high - low) / 4, 2) - 1
    return f"{_rounded(value, place)} ({_rounded(low, place)} to {_rounded(high, place)})"


def format_estimate(estimate: Estimate | None) -> str:
    """An estimate and its error, with a dagger if it did not converge."""
    if estimate is None:
        return MISSING
    text = format_with_error(estimate.value, estimate.error)
    return text if estimate.converged else f"{text} {NOT_CONVERGED}"


def format_percent(share: float | None) -> str:
    """A share in percent, to two significant digits.

    Example:
        >>> [format_percent(0.4213), format_percent(1.0), format_percent(-0.0031), format_percent(None)]
        ['42 %', '100 %', '-0.31 %', '–']
    """
    return MISSING if share is None or not math.isfinite(share) else f"{format_number(100 * share, digits=2)} %"


def one_line(text: str) -> str:
    """The text without line breaks, control characters and runs of spaces."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def escape(text: str) -> str:
    """The text in one line, with every character that Markdown or HTML could take for markup made harmless.

    Example:
        >>> escape("<b>|x")
        '&#60;b&#62;&#124;x'
    """
    return one_line(text).translate(_ESCAPES)


def trace_shares(measurement: Measurement) -> dict[str, float]:
    """Each block's trace as a share of the sum of the blocks' absolute traces (a total may be near 0, that sum not).

    Returns:
        Shares in [-1, 1] by block; NaN where there is no curvature at all.
    """
    traces = {name: block.trace.value for name, block in measurement.blocks.items()}
    total = sum(abs(trace) for trace in traces.values())
    return {name: trace / total if total else math.nan for name, trace in traces.items()}


def _exponent(value: float, digits: int) -> int:
    """Power of ten of the first digit, once `value` is rounded to `digits` significant digits."""
    return int(f"{value:.{digits - 1}e}".partition("e")[2])


def _is_scientific(exponent: int) -> bool:
    """Whether a number of that magnitude is easier to read with a power of ten."""
    return not -3 <= exponent < 6


def _rounded(value: float, place: int) -> str:
    """`value` rounded to a multiple of 10**place."""
    return f"{round(value, -place) + 0.0:,.{max(0, -place)}f}"  # + 0.0 turns -0.0 into 0.0


def _ends(measurements: Sequence[Measurement]) -> Sequence[Measurement]:
    """The first and the last measurement, or the only one, or none."""
    return measurements[:: max(1, len(measurements) - 1)]


def _environment() -> Environment:
    """Templates in which every value is formatted by its type and escaped, unless a filter has done so."""
    environment = Environment(
        loader=PackageLoader(__package__ or ""),
        autoescape=True,
        finalize=_text,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(at=_at, estimate=format_estimate, percent=format_percent, number=format_number)
    environment.filters.update(range=_range)
    environment.globals.update(with_error=format_with_error, interval=format_interval)
    return environment


def _at(value: Any, path: str) -> Any:
    """An attribute of an attribute, or an entry by its number; `None` where one on the way is."""
    for name in path.split("."):
        if value is not None:
            value = value[int(name)] if name.isdigit() else getattr(value, name)
    return value


def _range(value: Estimate | CriticalLearningRate | None) -> str:
    """A value and its interval."""
    return MISSING if value is None else format_interval(value.value, value.low, value.high)


def _text(value: Any) -> Markup:
    """What the template prints for a value."""
    plain = _without_strings(value)
    return Markup(escape(str(value))) if plain is None else plain


def _without_strings(value: Any) -> Markup | None:
    """What templates print for a number, a switch or what is missing; `None` for what needs escaping."""
    if isinstance(value, Markup):
        return value
    if value is None:
        return Markup(MISSING)
    if isinstance(value, bool):
        return Markup("yes" if value else "no")
    if isinstance(value, int):
        return Markup(f"{value:,}")
    if isinstance(value, float):
        return Markup(format_number(value))
    return None


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as one level of `outer.inner` names; values as Python prints them."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": str(value)}
    return flat


def _title(report: OptimizabilityReport) -> str:
    """What was measured: the checkpoint, or its class where it has no id, and the task."""
    model = report.model.get("id") or report.model.get("class") or "a model"
    task = report.task.get("task")
    return f"{model} on {task}" if task else str(model)


def _geometry_lines(measurements: Sequence[Measurement]) -> dict[str, str]:
    """The lines about loss, gradient and curvature, from the first to the last measurement."""
    ends = _ends(measurements)
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
