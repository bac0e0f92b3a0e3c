# SPDX-License-Identifier: Apache-2.0
"""The tables of the report, which the Markdown, the page and the model card show alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

from ..curvature.eigenvalue_check import EigenvalueCheck
from ..diagnosis.outcome import SEVERITIES, STATUSES, Status
from ..diagnosis.verdict import Diagnosis
from ..linalg.estimate import Estimate
from ..measurement.quantities_table import QUANTITIES, TASK_QUANTITIES, Quantity, Section
from ..measurement.results import NOT_CONVERGED_NOTE, Measurement, MultitaskMeasurement
from ..measurement.values import formatted
from ..number_format import (
    MISSING,
    format_estimate,
    format_interval,
    format_number,
    format_percent,
    format_share,
)
from ..quantities.loss_landscape import Landscape
from ..report_data.data import ReportData
from ..report_data.provenance import ProbeSetInfo


class Row(NamedTuple):
    """A quantity, how to read it, and its values."""

    label: str
    reading: str
    cells: Sequence[Any]


class Table(NamedTuple):
    """A table whose rows begin with a name."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


LABELS: Mapping[Status, str] = {
    "problem": "Problem",
    "warning": "Warning",
    "note": "Note",
    "not_checked": "Not checked",
    "fine": "Fine",
}
"""Of the status of a rule."""

TEXTS = {
    "intervals": "In parentheses: 95 % intervals.",
    "parts": "Standard error: over the probe vectors, or half of the interval by 1.96. Over the data: how far other "
    "examples, drawn alike, would move the number; where they were drawn from a pool, this is part of the interval. "
    "Residual: an eigenvalue lies within this distance.",
    "local": "All of this is local: what λ_max says about the learning rate holds here and now, and does not judge "
    "the run.",
    "not_converged": NOT_CONVERGED_NOTE,
    "setbacks": "A setback is a step in the wrong direction from one logged value to the next. If half of the "
    "comparisons are setbacks, this is noise around a standstill; large ones and spikes are instability.",
    "landscape": "The loss at θ − s·u, u the optimizer's next update and s the learning rate of the step; and at "
    "θ − s₁q₁ − s₂q₂, q₁ and q₂ the eigenvectors of the two largest eigenvalues. Positive is downhill. Dashed: the "
    "quadratic model of gradient and Hessian. Where it follows the loss, curvature tells how far a step may go.",
    "block_shares": "The share is the block's part of the sum of the absolute block traces. A block with a high share "
    "and a low relative gradient limits the step, but gains little from it.",
    "tasks": "The joint loss is the sum of the tasks' mean losses, each times its weight w, its share of the items. "
    "In parentheses: 95 % intervals, over batches. –: noise dominates a gradient, or there are fewer than 3 batches.",
    "task_shares": "The share is a task's part of the decrease by a small step of gradient descent; if negative, that "
    "step raises the task's own loss.",
    "weights": "Equal norms: all tasks have gradients of the same length. Shortest joint gradient: a step along it "
    "raises no task's loss. Both are local; neither says that the tasks will end up better for it.",
    "task_dynamics": "From evaluation sets named like the tasks; –: there is none, or its loss does not show it.",
    "failures": "Measurements that failed; training continued without them.",
}
"""Sentences of the report around its tables."""


def subject(report: ReportData) -> str:
    """Return what the numbers of the last measurement are about."""
    last, probe = report.measurements[-1], report.data.probe
    if last.population is not None or probe is None or probe.examples is None:
        return last.subject
    if probe.examples == report.data.train_examples:
        return f"the training loss over all {probe.examples:,} examples"
    return f"the mean loss over these {probe.examples:,} examples"


def about(report: ReportData, *sections: Section | Literal["tile"]) -> str:
    """Return the sentence at the head of these sections' table, or of the tiles: what its numbers are about."""
    last = report.measurements[-1]
    if last.population is None:
        why = report.data.no_pool
        return f"Of {subject(report)}." + ("" if why is None else f" Not of the whole training set: {why}")
    shown = [q for q in QUANTITIES if q.section in sections or (q.tile and "tile" in sections)]
    drawn = f"f the {last.population.sampled_examples:,} examples measured."
    if not any(q.scope == "loss" for q in shown):
        return f"O{drawn}"
    others = [q.label for q in shown if q.scope == "examples" and q.get(last) is not None]
    return f"Of {subject(report)}." + (f" {', '.join(others)}: o{drawn}" if others else "")


def quantity_rows(measurements: Sequence[Measurement], *sections: Section) -> list[Row]:
    """Return the rows of the quantities of these sections, without those that no measurement has or was to have."""
    rows = []
    for quantity in QUANTITIES:
        failure = next(filter(None, map(quantity.failure, measurements)), None)
        shown = quantity.always or failure is not None or _is_known(quantity, measurements)
        if quantity.section in sections and shown:
            reading = quantity.reading if failure is None else f"{quantity.reading} {MISSING}: {failure}"
            rows.append(Row(quantity.label, reading, quantity_cells(quantity, measurements)))
    return rows


def card_rows(measurements: Sequence[Measurement]) -> list[Row]:
    """Return the rows of the model card."""
    return [Row(q.label, "", quantity_cells(q, measurements)) for q in QUANTITIES if q.card]


def tiles(measurements: Sequence[Measurement], dynamics: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Return title and values of the numbers at the top of the page."""
    tiles = [(q.title, quantity_cells(q, measurements)) for q in QUANTITIES if q.tile]
    speed, gap = dynamics.get("convergence_speed") or {}, dynamics.get("generalization_gap") or {}
    if speed.get("half_life") is not None:
        tiles.append(("Half-life of the loss, steps", [span(speed, "half_life")]))
    if gap.get("loss_gap") is not None:
        tiles.append(("Eval loss − train loss", [loss_gap(gap)]))
    return tiles


def span(numbers: Mapping[str, Any], name: str) -> str:
    """Return a number of steps with its interval."""
    return format_interval(numbers[name], numbers[f"{name}_low"], numbers[f"{name}_high"], nonnegative=True)


def loss_gap(gap: Mapping[str, Any]) -> str:
    """Return the generalization gap with its interval."""
    return format_interval(gap["loss_gap"], gap["low"], gap["high"])


def plots(*sections: Section) -> list[Row]:
    """Return title, reading and name of the plots of these sections' quantities."""
    plotted = [quantity for quantity in QUANTITIES if quantity.plot and quantity.section in sections]
    by_name = {name: list(group) for name, group in groupby(plotted, key=lambda quantity: quantity.plot or "")}
    return [
        Row(" and ".join(q.label for q in group), " ".join(q.reading for q in group), [name])
        for name, group in by_name.items()
    ]


def quantity_cells(quantity: Quantity, measurements: Sequence[Measurement]) -> list[str]:
    """Return a quantity's value at each measurement."""
    return [
        formatted(quantity.get(measurement), quantity.form, nonnegative=quantity.nonnegative)
        for measurement in measurements
    ]


def _is_known(quantity: Quantity, measurements: Sequence[Measurement]) -> bool:
    return any(quantity.get(measurement) is not None for measurement in measurements)


def plane_rows(landscapes: Sequence[Landscape | None]) -> list[Row]:
    """Return the eigenvalues of the plane of the landscape, and the lengths of its units."""
    planes = [None if landscape is None else landscape.eigenvectors for landscape in landscapes]
    rows = []
    for index, q in enumerate(("q₁", "q₂")):
        values = [format_estimate(None if plane is None else plane.eigenvalues[index]) for plane in planes]
        lengths = [format_number(None if plane is None else plane.axes[index].length, digits=3) for plane in planes]
        rows.append(Row(f"Eigenvalue of {q}", "The curvature along it.", values))
        reading = "‖Δθ‖ at which this curvature alone changes the loss by its present value."
        rows.append(Row(f"One unit along {q}", reading, lengths))
    return rows


def convergence_rows(speed: Mapping[str, Any]) -> list[Row]:
    """Return the rows of a fit to the loss curve."""
    fitted = f"{format_number(speed['initial_loss'])} → {format_number(speed['final_loss'])}"
    area = "0: dropped at once; 0.5: straight line; near 1: dropped at the very end."
    return [
        Row(
            "Half-life of the loss, in steps",
            "Steps in which the fitted loss covers half of its drop.",
            [span(speed, "half_life")],
        ),
        Row("Steps to 90 % of the drop", "Training beyond this buys the last tenth.", [span(speed, "steps_to_90")]),
        Row("Fitted loss, start → end", "By a robust fit to the logged points.", [fitted]),
        Row("Drop", "Of the fitted loss.", [speed["drop"]]),
        Row("Normalized area under the curve", area, [format_number(speed["normalized_area"], digits=3)]),
    ]


def gap_rows(gap: Mapping[str, Any]) -> list[Row]:
    """Return the rows of the generalization gap."""
    examples = f" on {gap['examples']:,} examples each" if gap.get("examples") else ""
    rows = [
        Row(
            "Eval loss − train loss",
            "Clearly above zero: the model fits the training set better than new data. Its interval is over other "
            "examples of both sets.",
            [loss_gap(gap)],
        )
    ]
    if gap["significant"] is not None:
        rows.append(Row("More than chance", "Whether the interval excludes zero.", [gap["significant"]]))
    alike = f"Both in eval mode{examples}; if not, the gap also includes the effects of dropout and averaging."
    rows.append(Row("Measured alike", alike, [gap["measured_alike"]]))
    for name, value in (gap["metric_gaps"] or {}).items():
        reading = "Positive: better on the training set (if more is better)."
        rows.append(Row(f"Train {name} − eval {name}", reading, [format_number(value, digits=3)]))
    if gap["best_eval_loss"] is not None:
        rise = format_number(gap["rise_since_best"], digits=3)
        rows.append(Row("Best eval loss", f"At step {gap['best_step'] or 0:,}.", [gap["best_eval_loss"]]))
        rows.append(Row("Rise since", "A clear rise is overfitting.", [rise]))
    return rows


def setbacks(stability: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the setbacks of each logged series."""
    columns = (
        "Series",
        "Setbacks",
        "Share (95 % interval)",
        "Mean setback",
        "Largest setback",
        "Spikes",
        "Not finite",
    )
    return Table(columns, [(name, *_setbacks(series)) for name, series in stability.items()])


def _setbacks(series: Mapping[str, Any]) -> tuple[Any, ...]:
    share = format_share(*(series[f"setback_share{end}"] for end in ("", "_low", "_high")))
    sizes = (format_number(series[f"{kind}_setback"], digits=3) for kind in ("mean", "largest"))
    counts = [MISSING if series[name] is None else f"{series[name]:,}" for name in ("setbacks", "comparisons")]
    return " of ".join(counts), share, *sizes, series["spikes"], series["non_finite"]


def blocks(measurement: Measurement) -> Table:
    """Return the blocks of a measurement."""
    shares = trace_shares(measurement)
    rows = [
        (
            name,
            block.parameters,
            format_number(block.grad_norm, digits=3),
            format_number(block.grad_norm / block.weight_norm if block.weight_norm else None, digits=3),
            format_estimate(block.trace),
            format_percent(shares[name]),
        )
        for name, block in measurement.blocks.items()
    ]
    return Table(("Block", "Parameters", "‖g_b‖", "‖g_b‖/‖θ_b‖", "Trace", "Share"), rows)


def trace_shares(measurement: Measurement) -> dict[str, float]:
    """Return each block's trace as a share of the sum of the blocks' absolute traces (a total may be near 0).

    Returns:
        Shares in [-1, 1] by block; NaN where there is no curvature at all.
    """
    traces = {name: block.trace.value for name, block in measurement.blocks.items()}
    total = sum(abs(trace) for trace in traces.values())
    return {name: trace / total if total else float("nan") for name, trace in traces.items()}


def all_measurements(measurements: Sequence[Measurement]) -> Table:
    """Return one row per measurement."""
    columns = ("Step", "Epoch", "Loss", "‖g‖", "Trace", "λ_max", "λ_min", "HVPs", "Seconds")
    names = ("loss", "grad_norm", "hessian_trace", "hessian_lambda_max", "hessian_lambda_min")
    by_name = {q.name: quantity_cells(q, measurements) for q in QUANTITIES if q.name in names}
    rows = [
        (m.step, format_number(m.epoch, digits=3), *cells, m.hvps, format_number(m.seconds, digits=3))
        for m, *cells in zip(measurements, *(by_name[name] for name in names), strict=True)
    ]
    return Table(columns, rows)


def error_parts(measurement: Measurement) -> Table:
    """Return what the interval of each estimate of a measurement is made of."""
    columns = ("Quantity", "Standard error", "Over the data", "Residual", "HVPs", "Method", "Converged")
    found = [(q.label, q.get(measurement)) for q in QUANTITIES]
    rows = [
        (
            label,
            *(format_number(part, digits=2) for part in (one.std_error, one.data_std_error, one.residual)),
            one.hvps,
            one.method,
            one.converged,
        )
        for label, one in found
        if isinstance(one, Estimate)
    ]
    return Table(columns, rows)


def rules(diagnosis: Diagnosis) -> Table:
    """Return what came of each rule; those of findings say where they are."""
    rows = [
        (
            rule.name.replace("_", " ").capitalize(),
            LABELS[rule.status],
            rule.because or ("See the finding." if rule.status in SEVERITIES else ""),
            rule.remedy,
        )
        for rule in diagnosis.rules
    ]
    return Table(("Rule", "Status", "Because", "To check it"), rows)


def count_rules(diagnosis: Diagnosis) -> str:
    """Return how many rules have each status, in a line."""
    numbers = Counter(rule.status for rule in diagnosis.rules)
    plural = {status: "s" * (status in SEVERITIES and numbers[status] > 1) for status in STATUSES}
    counted = (f"{numbers[status]} {LABELS[status].lower()}{plural[status]}" for status in STATUSES if numbers[status])
    return f"All {len(diagnosis.rules)} rules: {', '.join(counted)}"


def failures(report: ReportData) -> Table:
    """Return what failed, why, and what to do."""
    return Table(("Step", "Reason", "What to do"), [(one.step, one.reason, one.remedy) for one in report.failures])


def tasks(multitask: MultitaskMeasurement) -> Table:
    """Return the quantities of each task."""
    rows = [
        (name, *(formatted(q.get(task), q.form, nonnegative=q.nonnegative) for q in TASK_QUANTITIES))
        for name, task in multitask.tasks.items()
    ]
    return Table(("Task", *(quantity.label for quantity in TASK_QUANTITIES)), rows)


def suggested_weights(multitask: MultitaskMeasurement) -> Table:
    """Return the weights that the gradients suggest."""
    rows = [
        (
            name,
            format_number(task.weight, digits=3),
            formatted(task.equal_norm_weight, nonnegative=True),
            formatted(task.min_norm_weight, nonnegative=True),
        )
        for name, task in multitask.tasks.items()
    ]
    return Table(("Task", "Now", "Equal norms", "Shortest joint gradient"), rows)


def task_dynamics(by_task: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return convergence and generalization gap of each task."""
    half_life, to_90 = "Half-life of the eval loss, steps", "Steps to 90 % of its drop"
    rows = []
    for name, found in by_task.items():
        speed, gap = found["convergence_speed"], found["loss_gap"]
        spans = (span(speed, "half_life"), span(speed, "steps_to_90"))
        rows.append((name, *spans, loss_gap(gap)))
    return Table(("Task", half_life, to_90, "Eval loss − train loss at the end"), rows)


def method(report: ReportData) -> dict[str, Any]:
    """Return what was measured, on what, how, and at what price."""
    last = report.measurements[-1] if report.measurements else None
    probe = report.data.probe or ProbeSetInfo()
    known = {
        "Model class": report.model.class_name or None,
        "Parameters": report.model.parameters,
        "Trainable parameters": report.model.trainable_parameters,
        "Loss": report.task.loss or None,
        "Data set": report.data.dataset or None,
        "Training examples": report.data.train_examples,
        "Evaluation examples": report.data.eval_examples,
        "Probe examples": probe.examples,
        "Probe batches": probe.batches,
        "Probe set fingerprint": probe.fingerprint,
        **({} if last is None else _method(last, report)),
        **{name: None if value is None else str(value) for name, value in report.config.items()},
    }
    return {label: value for label, value in known.items() if value is not None}


def _method(last: Measurement, report: ReportData) -> dict[str, str | None]:
    check = last.self_check
    counted = check is not None and check.unit in ("attended tokens", "pairs")
    unit = check.unit if check is not None and counted else "items (examples, or labels other than -100)"
    error = last.central_difference_error
    off = "" if error is None else f" (relative error {format_number(error, digits=2)})"
    hvps = sum(measurement.hvps for measurement in report.measurements)
    seconds = format_number(sum(measurement.seconds for measurement in report.measurements), digits=3)
    overhead = report.training.get("overhead")
    share = f", {format_percent(overhead)} of the training time" if overhead else ""
    return {
        "Mean over": f"{last.num_items:,} {unit}",
        "Sample": None if last.population is None else str(last.population),
        "Self-check": None if check is None else str(check),
        "Mode": "eval: dropout off; BatchNorm, if any, with its running statistics (its eval-mode Hessian)",
        "Matrix": last.curvature,
        "Hessian-vector products (HVPs)": f"{last.engine}{off}, {last.attention} attention kernel, {last.dtype}",
        "Eigenvalues along their own vectors": eigenvalue_checks(last.eigenvalue_checks) or None,
        "Price": f"{hvps:,} HVPs in {seconds} s{share}",
    }


def eigenvalue_checks(checks: Sequence[EigenvalueCheck]) -> str:
    """Return the checks of eigenvalues by differences along their own vectors, in one line.

    Example:
        >>> eigenvalue_checks([EigenvalueCheck("lambda_max", 2.0, (3.0, 2.0), (0.2, 0.1), "agrees")])
        'λ_max: 2.000, by differences 2.000 (agrees)'
    """
    names = {"lambda_max": "λ_max", "lambda_min": "λ_min"}
    return "; ".join(
        f"{names[check.which]}: {format_number(check.value)}, by differences {format_number(check.differences[-1])} "
        f"({check.verdict})"
        for check in checks
    )
