# SPDX-License-Identifier: Apache-2.0
"""The rules: conclusions from the numbers of a report, each with evidence, advice and source.

One function per rule: it takes a report and returns a finding, that there is nothing to report, or what was missing to
check it. An effect within its error is not a finding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .batch_size import batch_above_noise_scale, batch_below_noise_scale
from .curvature import curvature_concentrated, saddle
from .generalization import evaluation_unstable, overfitting
from .gradients import gradients_dead, gradients_exploding, gradients_vanishing
from .learning_rate import learning_rate_above_limit, learning_rate_far_below_limit, training_unstable
from .measurement_quality import central_differences_off, errors_wide, loss_scaled, measurement_failed
from .outcome import SEVERITIES, Finding, Fine, NotChecked, Outcome, Rule, Severity
from .progress import not_converged, underfitting
from .quality import batch_norm_statistics, no_better_than_chance
from .tasks import one_task_dominates, tasks_conflict
from .verdict import Diagnosis, RuleStatus, Verdict


if TYPE_CHECKING:
    from ..report_data.data import ReportData

__all__ = [
    "RULES", "SEVERITIES", "Diagnosis", "Finding", "Fine", "NotChecked", "Outcome", "Rule", "RuleStatus", "Severity",
    "Verdict", "diagnose", "find",
]  # fmt: skip

RULES: tuple[Rule, ...] = (
    learning_rate_above_limit,
    training_unstable,
    batch_norm_statistics,
    gradients_dead,
    no_better_than_chance,
    loss_scaled,
    overfitting,
    underfitting,
    not_converged,
    evaluation_unstable,
    tasks_conflict,
    gradients_exploding,
    gradients_vanishing,
    learning_rate_far_below_limit,
    errors_wide,
    central_differences_off,
    measurement_failed,
    curvature_concentrated,
    saddle,
    one_task_dominates,
    batch_below_noise_scale,
    batch_above_noise_scale,
)
"""In the order of findings of the same severity."""


def diagnose(report: ReportData) -> Diagnosis:
    """Apply all rules to a report.

    Example:
        >>> from hf_optimizability.report_data.data import ReportData
        >>> print(diagnose(ReportData(training={"loss_scale": 3.0})).verdict.sentence)
        The loss that was trained is 3.00 times the mean over a step's items.
    """
    return Diagnosis({rule.__name__: rule(report) for rule in RULES})


def find(report: ReportData) -> tuple[Finding, ...]:
    """Return all findings of a report, worst first.

    Example:
        >>> from hf_optimizability.report_data.data import ReportData
        >>> [finding.name for finding in find(ReportData(training={"loss_scale": 3.0}))]
        ['loss_scaled']
    """
    return diagnose(report).findings
