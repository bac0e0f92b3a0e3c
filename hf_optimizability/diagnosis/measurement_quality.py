# SPDX-License-Identifier: Apache-2.0
"""Rules about what was measured: whether it could be, and whether it is precise enough to build on."""

from __future__ import annotations

from ..number_format import format_estimate, format_number, format_percent
from ..report_data.data import ReportData
from .evidence import enumeration, error_of, last_measurement
from .outcome import Finding, Fine, NotChecked, Outcome, Severity


MAX_RELATIVE_ERROR = 0.5
"""Relative error above which only the order of magnitude of a number is known."""

MAX_PRODUCT_ERROR = 0.1
"""Relative error of a product: the largest tolerance of the trace in any profile but the lightest."""


def loss_scaled(report: ReportData) -> Outcome:
    """Report a loss that is not the mean over a step's items."""
    factor = report.training.get("loss_scale")
    if not factor:
        return NotChecked("trainer")
    if factor == 1:  # rounding has been removed where it was measured
        return Fine()
    return Finding(
        name="loss_scaled",
        severity="warning",
        sentence=f"The loss that was trained is {format_number(factor, digits=3)} times the mean over a step's items.",
        evidence=(f"loss of one batch as part of a step / its mean: {format_number(factor, digits=3)}",),
        advice="Divide the learning rate of SGD by this factor, and multiply `max_grad_norm` by it; or pass a "
        "`compute_loss_func` that divides by `num_items_in_batch`. Adam notices by its clipping only.",
        source="transformers issue 47688",
    )


def measurement_failed(report: ReportData) -> Outcome:
    """Report failed measurements."""
    if not report.failures:
        return Fine() if report.measurements else NotChecked("measurement")
    made, last = len(report.measurements), report.failures[-1]
    severity: Severity = "warning" if made else "problem"
    sentence = "Some measurements could not be made." if made else "No measurement could be made."
    if made and all(failure.why.code == "loss_near_zero" for failure in report.failures):
        severity, sentence = "note", "The loss came so near 0 that its curvature could not be measured any more."
    return Finding(
        name="measurement_failed",
        severity=severity,
        sentence=sentence,
        evidence=(f"{len(report.failures)} failed, {made} made", f"the last, at step {last.step:,}: {last.reason}"),
        advice=last.remedy,
        source="the failures in this report",
    )


def errors_wide(report: ReportData) -> Outcome:
    """Report a last measurement far from its tolerances."""
    last = last_measurement(report)
    if isinstance(last, NotChecked):
        return last
    hessian = last.hessian
    estimates = {"tr H": hessian.trace, "λ_max": hessian.lambda_max}
    if last.optimizer_stability is not None:
        estimates["the sharpness"] = last.optimizer_stability.sharpness
    wide = {
        name: estimate
        for name, estimate in estimates.items()
        if not estimate.converged and not error_of(estimate) <= MAX_RELATIVE_ERROR * abs(estimate.value)
    }
    if not wide:
        return Fine()
    return Finding(
        name="errors_wide",
        severity="warning",
        sentence=f"The last measurement is too uncertain to build on: {enumeration(list(wide))}.",
        evidence=tuple(f"{name} = {format_estimate(estimate)}" for name, estimate in wide.items()),
        advice="Raise `max_hvps`, or take a larger profile.",
        source=f"its own error, over {format_percent(MAX_RELATIVE_ERROR)} of the value",
    )


def central_differences_off(report: ReportData) -> Outcome:
    """Report products by central differences that are far from exact."""
    last = last_measurement(report)
    if isinstance(last, NotChecked):
        return last
    if last.central_difference_error is None:
        return Fine("Products are exact.")
    if last.central_difference_error <= MAX_PRODUCT_ERROR:
        return Fine()
    return Finding(
        name="central_differences_off",
        severity="warning",
        sentence="The curvature is from central differences that are off.",
        evidence=(f"relative error of a product: {format_number(last.central_difference_error, digits=2)}",),
        advice="Read the curvature as an order of magnitude. Where the loss has a second derivative, set "
        "`engine='double_backward'`; kinks (ReLU) are what makes differences fail.",
        source=f"its own check; over {format_percent(MAX_PRODUCT_ERROR)} it is more than `trace_tolerance` allows",
    )
