# SPDX-License-Identifier: Apache-2.0
"""Findings: sentences that a report draws from its numbers, each with its evidence, what to do, and its source.

One function per finding: a report in, a finding or nothing out. An effect within its error is no finding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .markdown import format_number


if TYPE_CHECKING:
    from .report import OptimizabilityReport

Severity = Literal["problem", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("problem", "warning", "note")
"""Worst first."""


@dataclass(frozen=True)
class Finding:
    """One thing that a report says about a run.

    Attributes:
        name: Stable name, that of the function that found it.
        severity: `"problem"` (the run or the report is not what it should be), `"warning"` (likely to cost something),
            or `"note"` (good to know).
        sentence: What was found, in one plain sentence.
        evidence: The numbers with their errors, as text.
        advice: What to do.
        source: Paper and section, or what was measured.
    """

    name: str
    severity: Severity
    sentence: str
    evidence: tuple[str, ...]
    advice: str
    source: str


def find(report: OptimizabilityReport) -> tuple[Finding, ...]:
    """All findings of a report, worst first.

    Example:
        >>> from hf_optimizability import OptimizabilityReport
        >>> [finding.name for finding in find(OptimizabilityReport(training={"loss_scale": 3.0}))]
        ['loss_scaled']
    """
    found = [finding for function in FINDINGS if (finding := function(report)) is not None]
    return tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))


def loss_scaled(report: OptimizabilityReport) -> Finding | None:
    """The loss is not the mean over a step's items."""
    factor = report.training.get("loss_scale") or 1.0
    if factor == 1:  # what may be rounding has been taken out where it was measured
        return None
    return Finding(
        name="loss_scaled",
        severity="warning",
        sentence=f"The loss that was trained is {format_number(factor, digits=3)} times the mean over a step's items.",
        evidence=(f"loss of one batch as part of a step / its mean: {format_number(factor, digits=3)}",),
        advice="Divide the learning rate of SGD by this factor, and multiply `max_grad_norm` by it; or pass a "
        "`compute_loss_func` that divides by `num_items_in_batch`. Adam notices by its clipping only.",
        source="transformers issue 47688",
    )


def measurement_failed(report: OptimizabilityReport) -> Finding | None:
    """A measurement could not be made."""
    if not report.failures:
        return None
    made, last = len(report.measurements), report.failures[-1]
    return Finding(
        name="measurement_failed",
        severity="warning" if made else "problem",
        sentence="Some measurements could not be made." if made else "No measurement could be made.",
        evidence=(f"{len(report.failures)} failed, {made} made", f"the last, at step {last.step:,}: {last.reason}"),
        advice=last.remedy,
        source="the failures in this report",
    )


FINDINGS: tuple[Callable[[OptimizabilityReport], Finding | None], ...] = (
    loss_scaled,
    measurement_failed,
)
"""Of one severity in this order."""
