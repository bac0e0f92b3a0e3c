# SPDX-License-Identifier: Apache-2.0
"""Rules about the learning rate: too high, too low, or a run that was unstable for whatever reason."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..measurement.results import OptimizerStability
from ..number_format import format_number
from ..quantities.step_size import stability_limit
from ..report_data.data import ReportData
from .evidence import MAX_NAMED
from .loss_curve import MIN_LOGGED_LOSSES, instability, logged_losses, still_falling, unchanged_loss
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
    if not unstable or peak <= stable.low:
        return Fine()
    return Finding(
        name="learning_rate_above_limit",
        severity="problem",
        sentence="The learning rate was above its stability limit, and training was unstable.",
        evidence=(*unstable, *stable.evidence(peak)),
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
    logged = len(logged_losses(report))
    return Fine() if logged >= MIN_LOGGED_LOSSES else NotChecked("logged_losses", logged, MIN_LOGGED_LOSSES)


def learning_rate_far_below_limit(report: ReportData) -> Outcome:
    """Report a learning rate far below its limit in a run whose loss hardly decreased."""
    stable, peak = largest_stable_rate(report), peak_rate(report)
    if isinstance(stable, NotChecked):
        return stable
    if isinstance(peak, NotChecked):
        return peak
    if peak >= stable.low / FAR_BELOW_LIMIT or instability(report):
        return Fine()
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
    """Return the largest stable learning rate, by the sharpness measured after the start."""
    if not report.measurements:
        return NotChecked("measurement")
    found = _positive_sharpness(report)
    found = {step: stability for step, stability in found.items() if step > 0} or found
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
