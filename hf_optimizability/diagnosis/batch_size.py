# SPDX-License-Identifier: Apache-2.0
"""Rules about the batch size, by the gradient noise scale."""

from __future__ import annotations

from ..number_format import format_interval, format_number
from ..report_data.data import ReportData
from ..report_data.series import batch_items
from .evidence import MAX_NAMED
from .learning_rate import against_raising
from .outcome import Finding, Fine, NotChecked, Outcome


BATCH_FACTOR = 10.0
"""Ratio of batch to noise scale, or the inverse, that is large. At a batch B and a noise scale S a run takes 1 + S/B
times the fewest steps, and 1 + B/S times the fewest examples (McCandlish et al., 2018): 11 times at a factor 10."""

NOISE_SOURCE = "McCandlish et al., arXiv 1812.06162, section 2.2"


def batch_below_noise_scale(report: ReportData) -> Outcome:
    """Report a batch so small that its gradient is mostly noise."""
    batch, noise = _items_in_step(report), _noise_interval(report)
    if isinstance(noise, NotChecked):
        return noise
    if isinstance(batch, NotChecked):
        return batch
    low, high = noise
    if low <= BATCH_FACTOR * batch:
        return Fine() if high <= BATCH_FACTOR * batch else _too_few_batches(report)
    return Finding(
        name="batch_below_noise_scale",
        severity="note",
        sentence="The batch is far below the gradient noise scale: a step's gradient is mostly noise.",
        evidence=_batch_evidence(report, batch),
        advice="A larger batch (or more accumulation steps) takes almost proportionally fewer steps"
        f"{'' if against_raising(report) else ', at a higher learning rate'}. If the price counts in examples, leave "
        "it.",
        source=NOISE_SOURCE,
    )


def batch_above_noise_scale(report: ReportData) -> Outcome:
    """Report a batch so large that most of its examples add little."""
    batch, noise = _items_in_step(report), _noise_interval(report)
    if isinstance(noise, NotChecked):
        return noise
    if isinstance(batch, NotChecked):
        return batch
    low, high = noise
    if high * BATCH_FACTOR >= batch:
        return Fine() if low * BATCH_FACTOR >= batch else _too_few_batches(report)
    return Finding(
        name="batch_above_noise_scale",
        severity="note",
        sentence="The batch is far above the gradient noise scale: most of its examples add little.",
        evidence=_batch_evidence(report, batch),
        advice="A smaller batch reaches the same loss with fewer examples, in hardly more steps.",
        source=NOISE_SOURCE,
    )


def _noise_interval(report: ReportData) -> tuple[float, float] | NotChecked:
    """Return the bounds of the noise scale over the run, which usually grows during training."""
    if not report.measurements:
        return NotChecked("measurement")
    scales = [measurement.noise_scale for measurement in report.measurements if measurement.noise_scale is not None]
    if not scales:
        return _too_few_batches(report)
    return min(scale.low for scale in scales), max(scale.high for scale in scales)


def _too_few_batches(report: ReportData) -> NotChecked:
    probe = report.data.probe
    return NotChecked("probe_batches", found=None if probe is None else probe.batches)


def _items_in_step(report: ReportData) -> float | NotChecked:
    items = batch_items(report)
    return NotChecked("batch_items") if items is None else items


def _batch_evidence(report: ReportData, batch: float) -> tuple[str, ...]:
    scales = [
        f"noise scale at step {measurement.step:,}: "
        + format_interval(
            measurement.noise_scale.value, measurement.noise_scale.low, measurement.noise_scale.high, nonnegative=True
        )
        for measurement in report.measurements[-MAX_NAMED:]
        if measurement.noise_scale is not None
    ]
    return (f"items in a step: {format_number(batch, digits=3)}", *scales)
