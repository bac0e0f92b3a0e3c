# SPDX-License-Identifier: Apache-2.0
"""Rules about the tasks of a joint loss."""

from __future__ import annotations

import statistics

from ..measurement.results import MultitaskMeasurement
from ..number_format import format_number
from ..report_data.data import ReportData
from .evidence import MAX_NAMED, enumeration, error_of, interval, last_measurement
from .outcome import Finding, Fine, NotChecked, Outcome


DOMINANT_SHARE = 2 / 3
"""Share of the joint gradient at which a task has twice as much as all others together."""


def tasks_conflict(report: ReportData) -> Outcome:
    """Report tasks of which one's steps raise the loss of another."""
    multitask = _multitask(report)
    if isinstance(multitask, (Fine, NotChecked)):
        return multitask
    z = statistics.NormalDist().inv_cdf(1 - 0.025 / max(len(multitask.conflicts), 1))  # Bonferroni's, for all pairs
    known = [(pair, pair.cosine) for pair in multitask.conflicts if pair.cosine is not None]
    opposed = [(pair, cosine) for pair, cosine in known if max(cosine.high, cosine.value + z * error_of(cosine)) < 0]
    if not opposed:
        return Fine() if known else NotChecked("task_batches")
    worsened = [
        f"a step along the joint gradient raises the loss of {name}: its share is {interval(task.share)}"
        for name, task in multitask.tasks.items()
        if task.share is not None and task.share.high < 0
    ]
    return Finding(
        name="tasks_conflict",
        severity="warning",
        sentence=f"Tasks conflict: {enumeration([f'{pair.first} with {pair.second}' for pair, _ in opposed])}.",
        evidence=(
            *(
                f"cosine of the gradients of {pair.first} and {pair.second} at step {report.measurements[-1].step:,}: "
                f"{interval(cosine)}"
                for pair, cosine in opposed[:MAX_NAMED]
            ),
            *worsened[:MAX_NAMED],
        ),
        advice="Look at the blocks where they conflict: layers of their own for each task there, or other weights, "
        "may help. Check that the labels of these tasks do not contradict each other. A conflict at one step need not "
        "cost anything in the end: compare with a run on each task alone.",
        source="95 % intervals over batches, for all pairs together; Yu et al., arXiv 2001.06782, section 2",
    )


def one_task_dominates(report: ReportData) -> Outcome:
    """Report a task with most of the joint gradient, beyond its share of the examples."""
    multitask = _multitask(report)
    if isinstance(multitask, (Fine, NotChecked)):
        return multitask
    if isinstance(tasks_conflict(report), Finding):
        return Fine("The tasks conflict: shares mean little where gradients cancel.")
    for name, task in multitask.tasks.items():
        if task.share is not None and task.share.converged and task.share.low > max(DOMINANT_SHARE, task.weight):
            return Finding(
                name="one_task_dominates",
                severity="note",
                sentence=f"{name} dominates the joint gradient.",
                evidence=(
                    f"its share at step {report.measurements[-1].step:,}: {interval(task.share)}",
                    f"its share of the items: {format_number(task.weight, digits=2)}",
                ),
                advice="The other tasks are trained along the way. If they learn too slowly, give them more weight or "
                "more examples; weights that make the gradients equally long are in this report.",
                source="95 % interval over batches; Chen et al., arXiv 1711.02257, balance gradient norms",
            )
    known = any(task.share is not None and task.share.converged for task in multitask.tasks.values())
    return Fine() if known else NotChecked("task_batches")


def _multitask(report: ReportData) -> MultitaskMeasurement | Fine | NotChecked:
    """Return the last measurement by task."""
    last = last_measurement(report)
    if isinstance(last, NotChecked):
        return last
    return Fine("One task was measured.") if last.multitask is None else last.multitask
