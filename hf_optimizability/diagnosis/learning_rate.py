# SPDX-License-Identifier: Apache-2.0
"""Rules about the learning rate: too high, too low, or a run that was unstable for whatever reason."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..measurement.results import OptimizerStability
from ..number_format import format_number
from ..quantities.step_size import stability_limit
from ..report_data.data import ReportData
from .evidence import MAX_NAMED, dead_blocks
from .loss_curve import (
    MIN_LOGGED_LOSSES,
    instability,
    logged_losses,
    risen_measurements,
    rose_above_start,
    still_falling,
    unchanged_loss,
)
from .outcome import Finding, Fine, NotChecked, Outcome


FAR_BELOW_LIMIT = 10.0
"""Factor below the limit at which a learning rate is too low if the loss hardly decreased: in sweeps this held at a
sixteenth of the best rate only, never at the best rate or above (measured: benchmarks/advice.py)."""

LIMIT_SOURCE = "Cohen et al., arXiv 2103.00065 and 2207.14484; what the limit is worth: benchmarks/advice.py"


def learning_rate_above_limit(report: ReportData) -> Outcome:
    """Report an unstable run whose learning rate was above the stability limit."""
    stable, peak = largest_stable_rate(report), peak_rate(report)
    if isinstance(stable, NotChecked):
        return stable
    if isinstance(peak, NotChecked):
        return peak
    unstable = instability(report)
    if peak <= stable.low:
        return Fine()
    if not unstable:
        return _enough_logged(report)
    return Finding(
        name="learning_rate_above_limit",
        severity="problem",
        sentence="The learning rate was above its stability limit, and training was unstable.",
        evidence=(*unstable, *stable.evidence(peak), *passed_critical(report, peak)),
        advice=f"Start again at {format_number(stable.low, digits=2)} or less, or with a longer warm-up.",
        source=LIMIT_SOURCE,
    )


def training_unstable(report: ReportData) -> Outcome:
    """Report a run that its own log shows to be unstable."""
    unstable = instability(report)
    if unstable and isinstance(learning_rate_above_limit(report), Finding):
        return Fine("The learning rate explains it.")
    if unstable:
        return Finding(
            name="training_unstable",
            severity="problem",
            sentence="Training was unstable.",
            evidence=unstable,
            advice="Try a lower learning rate, a longer warm-up or a lower `max_grad_norm`, and look at the batches "
            "where the loss jumps.",
            source="this run's log",
        )
    return _enough_logged(report)


def learning_rate_far_below_limit(report: ReportData) -> Outcome:
    """Report a learning rate far below its limit in a run whose loss hardly decreased."""
    stable, peak = largest_stable_rate(report), peak_rate(report)
    if isinstance(stable, NotChecked):
        return stable
    if isinstance(peak, NotChecked):
        return peak
    if peak >= stable.low / FAR_BELOW_LIMIT:
        return Fine()
    if instability(report) or against_raising(report):
        return Fine("A higher rate is not the cure.")
    slow = _slow(report)
    if not isinstance(slow, str):
        return slow
    return Finding(
        name="learning_rate_far_below_limit",
        severity="warning",
        sentence="The learning rate is far below its stability limit, and the loss did not get far.",
        evidence=(slow, *stable.evidence(peak)),
        advice="Raise it by a factor 3 at a time. Do not aim at the limit: the best rate may lie well below it.",
        source=LIMIT_SOURCE,
    )


def against_raising(report: ReportData) -> tuple[str, ...]:
    """Return the evidence that a higher learning rate is not the cure, whatever else is wrong."""
    peak = peak_rate(report)
    passed = () if isinstance(peak, NotChecked) else (*_passed_limit(report, peak), *passed_critical(report, peak))
    dead = [f"no gradient reaches some blocks at step {m.step:,}" for m in report.measurements if dead_blocks(m)]
    codes = {failure.why.code: failure.step for failure in report.failures}
    failed = [f"{words} at step {codes[code]:,}" for code, words in _NO_RATE_HELPS.items() if code in codes]
    return (*passed, *rose_above_start(report), *dead[:1], *failed, *_gradient_below_epsilon(report))


_NO_RATE_HELPS = {
    "loss_not_finite": "the loss is not finite",
    "gradient_not_finite": "the gradient is not finite",
    "gradient_zero": "the gradient is 0",
    "gradient_zero_in_part": "the gradient is 0 in part",
    "loss_near_zero": "the loss is lost in rounding",
}
"""Failures of a measurement that a higher rate does not cure, in words."""


def passed_critical(report: ReportData, peak: float) -> tuple[str, ...]:
    """Return the evidence that the schedule's peak was above the critical learning rate at some measurement."""
    found = {m.step: m.optimizer_stability.critical for m in report.measurements if m.optimizer_stability is not None}
    passed = {step: one.value for step, one in found.items() if math.isfinite(one.high) and one.value <= peak}
    if not passed:
        return ()
    step = min(passed, key=passed.__getitem__)
    return (f"critical learning rate at step {step:,}, passed by the peak: {format_number(passed[step], digits=2)}",)


def _passed_limit(report: ReportData, peak: float) -> tuple[str, ...]:
    """Return the evidence that the schedule's peak was above the stability limit at some measurement."""
    limit = _limit_at_rate_1(report)
    ratios = {step: one.sharpness.value * peak / limit for step, one in _positive_sharpness(report).items()}
    step = max(ratios, key=ratios.__getitem__, default=None)
    if step is None or ratios[step] <= 1:
        return ()
    ratio = format_number(ratios[step], digits=2)
    return (f"sharpness at step {step:,}, relative to its limit at the peak learning rate: {ratio}",)


def _gradient_below_epsilon(report: ReportData) -> tuple[str, ...]:
    """Return the evidence that an Adam's ε outweighs the gradient, or that there is none."""
    if not report.measurements:
        return ()
    last, epsilon = report.measurements[-1], _optimizer_numbers(report).get("eps", 0.0)
    root_mean_square = last.grad_norm / math.sqrt(max(1, last.trainable_parameters))
    if root_mean_square > epsilon:
        return ()
    size, least = (format_number(number, digits=2) for number in (root_mean_square, epsilon))
    return (f"root mean square of the gradient at step {last.step:,}: {size}, the optimizer's ε: {least}",)


def _enough_logged(report: ReportData) -> Fine | NotChecked:
    """Return whether the log is long enough to show an instability."""
    logged = len(logged_losses(report))
    return Fine() if logged >= MIN_LOGGED_LOSSES else NotChecked("logged_losses", logged, MIN_LOGGED_LOSSES)


def _slow(report: ReportData) -> str | Fine | NotChecked:
    """Return the evidence that the loss did not get far, by its log or by its measured ends."""
    falling, unchanged = still_falling(report), unchanged_loss(report)
    return next(
        (slow for slow in (falling, unchanged) if isinstance(slow, str)),
        falling if isinstance(falling, NotChecked) else unchanged,
    )


@dataclass(frozen=True)
class StableRate:
    """Interval of the largest stable learning rate over a run, by the formula of its optimizer.

    Attributes:
        low: Smallest lower bound.
        high: Largest upper bound.
        steps: Steps at which it was measured.
    """

    low: float
    high: float
    steps: tuple[int, ...]

    def evidence(self, peak: float) -> tuple[str, ...]:
        """Return the learning rate and its limit as text."""
        low, high = format_number(self.low, digits=2), format_number(self.high, digits=2)
        span = f"{low} to {high}" if math.isfinite(self.high) else f"at least {low}"
        steps = ", ".join(f"{step:,}" for step in self.steps[-MAX_NAMED:])
        return (
            f"peak learning rate {format_number(peak, digits=2)}",
            f"largest stable one, by the sharpness at step {steps}: {span}",
        )


def largest_stable_rate(report: ReportData) -> StableRate | NotChecked:
    """Return the largest stable learning rate, by the sharpness measured after the start.

    A network that has broken down has another sharpness than it broke down with: then the start has to do.
    """
    if not report.measurements:
        return NotChecked("measurement")
    found = _positive_sharpness(report)
    broken = {m.step for m in (*risen_measurements(report), *filter(dead_blocks, report.measurements))}
    found = {step: stability for step, stability in found.items() if step not in {0, *broken}} or found
    if not found:
        return NotChecked("optimizer_state")
    if report.model.batch_norm is not False:
        return NotChecked("training_mode_sharpness")
    limit = _limit_at_rate_1(report)
    sharpness = [stability.sharpness for stability in found.values()]
    return StableRate(
        low=min(limit / estimate.high for estimate in sharpness),
        high=max(limit / estimate.low if estimate.low > 0 else math.inf for estimate in sharpness),
        steps=tuple(found),
    )


def _positive_sharpness(report: ReportData) -> dict[int, OptimizerStability]:
    """Return the optimizer's stability at each step where there is one, and its sharpness limits the rate."""
    found = {m.step: m.optimizer_stability for m in report.measurements if m.optimizer_stability is not None}
    return {step: stability for step, stability in found.items() if stability.sharpness.value > 0}


def _limit_at_rate_1(report: ReportData) -> float:
    """Return the largest stable sharpness at a learning rate of 1, by the optimizer's settings."""
    settings = _optimizer_numbers(report)
    betas = (report.training.get("optimizer_settings") or {}).get("betas")
    beta = (betas or [settings.get("beta1") or 0.0])[0]
    averaged = {"momentum": beta, "dampening": beta}
    names = ("momentum", "dampening", "nesterov")
    buffered = {name: settings[name] for name in names if settings.get("momentum") and name in settings}
    return stability_limit(1.0, **(averaged if report.training.get("optimizer") != "SGD" else buffered))


def peak_rate(report: ReportData) -> float | NotChecked:
    """Return the largest learning rate of the schedule."""
    rate = _optimizer_numbers(report).get("lr")
    used = [m.optimizer_stability.learning_rate for m in report.measurements if m.optimizer_stability is not None]
    return max([rate, *used]) if rate else NotChecked("learning_rate")


def _optimizer_numbers(report: ReportData) -> dict[str, float]:
    """Return the optimizer's settings that are single numbers."""
    settings = report.training.get("optimizer_settings") or {}
    return {name: value for name, value in settings.items() if isinstance(value, (int, float))}
