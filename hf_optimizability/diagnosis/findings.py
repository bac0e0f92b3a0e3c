# SPDX-License-Identifier: Apache-2.0
"""Findings: conclusions from the numbers of a report, each with evidence, advice and source.

One function per finding: it takes a report and returns a finding or `None`. An effect within its error is not a
finding.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from ..linalg.estimate import Estimate
from ..linalg.statistics import NORMAL_QUANTILE
from ..measurement.results import Measurement, MultitaskMeasurement
from ..number_format import (
    format_estimate,
    format_interval,
    format_number,
    format_percent,
)
from ..objective.parameter_blocks import EMBEDDINGS, HEAD
from ..quantities.step_size import stability_limit
from ..report_data.series import batch_items


if TYPE_CHECKING:
    from ..report_data.data import ReportData

Severity = Literal["problem", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("problem", "warning", "note")
"""Worst first."""

DEAD_GRADIENT_SHARE = 2.0**-23
"""Share of the whole gradient's norm below which a block's norm is rounding in float32."""

LAYER_GRADIENT_RATIO = 1000.0
"""Factor between one layer's ‖g_b‖/‖θ_b‖ and another's. Layers of healthy small runs stayed within 5; not yet measured
on large ones."""

MIN_BLOCKS = 4
"""Smallest number of blocks among which one can stand out."""

CONCENTRATED_SHARE = 2 / 3
"""Share of the curvature at which a block holds twice as much as all others together."""

NEGATIVE_CURVATURE_RATIO = 0.1
"""`|λ_min|/λ_max` above which negative curvature is significant."""

FAR_BELOW_LIMIT = 10.0
"""Factor below the limit at which a learning rate is too low if the loss hardly decreased: in sweeps this held at a
sixteenth of the best rate only, never at the best rate or above (measured: benchmarks/advice.py)."""

LIMIT_SOURCE = "Cohen et al., arXiv 2103.00065 and 2207.14484; what the limit is worth: benchmarks/advice.py"

UNDERFIT_SHARE = 0.9
"""Share of the initial loss that remains."""

LARGE_SPIKE = 0.25
"""Share of the training loss's range. A loss that settles near 0 scatters least where most of its values are, so that
its earlier scatter counts as spikes: up to 0.16 of the range in healthy runs."""

LOSS_RISE = 1.2
"""Training loss, relative to its start, above which training has made the model worse."""

SMOOTHING_WINDOW = 3
"""Logged losses to average for that, and ..."""

LOSS_RISE_SIGMAS = 3.0
"""... robust standard deviations of a single one by which the average is above the start."""

MIN_LOGGED_LOSSES = 6
"""Smallest number of logged losses from which the scatter can be estimated."""

SWING_STD_ERRORS = 3.0
"""Standard errors of the evaluation loss above which a rise or a fall is significant."""

BATCH_FACTOR = 10.0
"""Ratio of batch to noise scale, or the inverse, that is large. At a batch B and a noise scale S a run takes 1 + S/B
times the fewest steps, and 1 + B/S times the fewest examples (McCandlish et al., 2018): 11 times at a factor 10."""

NOISE_SOURCE = "McCandlish et al., arXiv 1812.06162, section 2.2"

MAX_RELATIVE_ERROR = 0.5
"""Relative error above which only the order of magnitude of a number is known."""

MAX_PRODUCT_ERROR = 0.1
"""Relative error of a product: the largest tolerance of the trace in any profile but the lightest."""

DOMINANT_SHARE = 2 / 3
"""Share of the joint gradient at which a task has twice as much as all others together."""

MAX_NAMED = 3
"""Names to list before \"and 2 more\"."""


@dataclass(frozen=True)
class Finding:
    """One conclusion about a run.

    Attributes:
        name: Stable name, that of its function.
        severity: `"problem"` (the run or the report is not what it should be), `"warning"` (likely to cost something),
            or `"note"` (good to know).
        sentence: The conclusion, in one plain sentence.
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


def find(report: ReportData) -> tuple[Finding, ...]:
    """Return all findings of a report, worst first.

    Example:
        >>> from hf_optimizability.report_data.data import ReportData
        >>> [finding.name for finding in find(ReportData(training={"loss_scale": 3.0}))]
        ['loss_scaled']
    """
    found = [finding for function in FINDINGS if (finding := function(report)) is not None]
    return tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))


def learning_rate_above_limit(report: ReportData) -> Finding | None:
    """Report an unstable run whose learning rate was above the stability limit."""
    peak, stable, instability = _peak_rate(report), _largest_stable_rate(report), _instability(report)
    if peak is None or stable is None or not instability or peak <= stable.low:
        return None
    return Finding(
        name="learning_rate_above_limit",
        severity="problem",
        sentence="The learning rate was above its stability limit, and training was unstable.",
        evidence=(*instability, *stable.evidence(peak)),
        advice=f"Start again at {format_number(stable.low, digits=2)} or less, or with a longer warm-up.",
        source=LIMIT_SOURCE,
    )


def learning_rate_far_below_limit(report: ReportData) -> Finding | None:
    """Report a learning rate far below its limit in a run whose loss hardly decreased."""
    peak, stable = _peak_rate(report), _largest_stable_rate(report)
    if peak is None or stable is None or peak >= stable.low / FAR_BELOW_LIMIT or _instability(report):
        return None
    slow = _still_falling(report) or _unchanged_loss(report)
    if slow is None:
        return None
    return Finding(
        name="learning_rate_far_below_limit",
        severity="warning",
        sentence="The learning rate is far below its stability limit, and the loss did not get far.",
        evidence=(slow, *stable.evidence(peak)),
        advice="Raise it by a factor 3 at a time. Do not aim at the limit: the best rate may lie well below it.",
        source=LIMIT_SOURCE,
    )


def training_unstable(report: ReportData) -> Finding | None:
    """Report a run that its own log shows to be unstable."""
    instability = _instability(report)
    if not instability or learning_rate_above_limit(report) is not None:
        return None
    return Finding(
        name="training_unstable",
        severity="problem",
        sentence="Training was unstable.",
        evidence=instability,
        advice="Try a lower learning rate, a longer warm-up or a lower `max_grad_norm`, and look at the batches where "
        "the loss jumps.",
        source="this run's log",
    )


def gradients_dead(report: ReportData) -> Finding | None:
    """Report blocks that no gradient reaches."""
    last = _last_measurement(report)
    dead = [] if last is None else _dead_blocks(last)
    if last is None or not dead:
        return None
    return Finding(
        name="gradients_dead",
        severity="problem",
        sentence=f"No gradient reaches {_enumeration(dead)}.",
        evidence=tuple(
            f"{name}: ‖g_b‖ = {format_number(last.blocks[name].grad_norm, digits=3)} at step {last.step:,}, "
            f"‖g‖ = {format_number(last.grad_norm, digits=3)}"
            for name in dead[:MAX_NAMED]
        ),
        advice="Look for units stuck at 0 behind a ReLU (too high a learning rate, a bias far below 0), and for "
        "parameters that the loss does not depend on; freeze those.",
        source="rounding of float32; Lu et al., arXiv 1903.06733, on dying ReLUs",
    )


def gradients_vanishing(report: ReportData) -> Finding | None:
    """Report layers with a far smaller gradient, relative to their weights, than the other layers."""
    relative = _relative_gradients(report)
    exploding = _exploding_layers(relative)
    least = (
        max((value for name, value in relative.items() if name not in exploding), default=0.0) / LAYER_GRADIENT_RATIO
    )
    return _outlying_layers(
        report,
        relative,
        [name for name, value in relative.items() if value < least],
        name="gradients_vanishing",
        sentence="The gradient all but vanishes in {}.",
        advice="These layers hardly learn with SGD. Give them a higher learning rate, a normalization or a residual "
        "connection; or freeze them and save their price.",
    )


def gradients_exploding(report: ReportData) -> Finding | None:
    """Report layers with a far larger gradient, relative to their weights, than the other layers."""
    relative = _relative_gradients(report)
    return _outlying_layers(
        report,
        relative,
        _exploding_layers(relative),
        name="gradients_exploding",
        sentence="The gradient explodes in {}.",
        advice="Give these layers a lower learning rate, a normalization or a smaller initial scale. Clipping by the "
        "norm of the whole gradient makes them starve the rest.",
    )


def curvature_concentrated(report: ReportData) -> Finding | None:
    """Report a block that holds most of the curvature."""
    last = _last_measurement(report)
    if last is None or len(last.blocks) < MIN_BLOCKS:
        return None
    total = sum(abs(block.trace.value) for block in last.blocks.values())
    margin = NORMAL_QUANTILE * math.hypot(*(_error(block.trace) for block in last.blocks.values()))
    if not total + margin:  # a loss without curvature, as after divergence
        return None
    for name, block in last.blocks.items():
        least = (abs(block.trace.value) - NORMAL_QUANTILE * _error(block.trace)) / (total + margin)
        if least > CONCENTRATED_SHARE:
            return Finding(
                name="curvature_concentrated",
                severity="note",
                sentence=f"Most of the curvature lies in {name}.",
                evidence=(
                    f"trace of {name} at step {last.step:,}: {format_estimate(block.trace)}",
                    f"that is {format_percent(abs(block.trace.value) / total)} of all blocks' (at least "
                    f"{format_percent(least)}), in {format_percent(block.parameters / _parameters(last))} of the "
                    "parameters",
                ),
                advice=f"It is what limits the learning rate. Give {name} a lower one, or freeze it, and the rest may "
                "take longer steps.",
                source="95 % intervals of the block traces; Dong et al., arXiv 1911.03852, rank layers by them",
            )
    return None


def saddle(report: ReportData) -> Finding | None:
    """Report significant negative curvature at the end of training."""
    last = _final_measurement(report)
    if last is None or last.hessian.lambda_min is None:
        return None
    bottom, top = last.hessian.lambda_min, last.hessian.lambda_max
    if last.curvature != "hessian" or bottom.high >= -NEGATIVE_CURVATURE_RATIO * abs(top.value):
        return None
    return Finding(
        name="saddle",
        severity="note",
        sentence="Training ended where some direction curves clearly downward: not at a minimum.",
        evidence=(f"λ_min = {format_estimate(bottom)}", f"λ_max = {format_estimate(top)}"),
        advice="Usual after a short fine-tuning. Train longer if the loss still falls.",
        source="Sagun et al., arXiv 1706.04454: after long training, negative eigenvalues are small relative to λ_max",
    )


def not_converged(report: ReportData) -> Finding | None:
    """Report a loss that was still falling at the end."""
    last, falling = _final_measurement(report), _still_falling(report)
    if last is None or falling is None:
        return None
    evidence = [falling, f"gradient norm at step {last.step:,}: {format_number(last.grad_norm)}"]
    if last.quadratic_model is not None and last.quadratic_model.predicted_decrease is not None:
        gain = format_number(last.quadratic_model.predicted_decrease)
        evidence.append(f"one best step along it would lower the loss of {format_number(last.loss)} by {gain}")
    return Finding(
        name="not_converged",
        severity="warning",
        sentence="The loss was still falling when training ended.",
        evidence=tuple(evidence),
        advice="Train for more steps, or at a higher learning rate if it was steady.",
        source="95 % interval of a fit to this run's log, as in dynamics/convergence_speed.py",
    )


def overfitting(report: ReportData) -> Finding | None:
    """Report an evaluation loss that has risen again, above the training loss."""
    gap = report.dynamics.get("generalization_gap") or {}
    error, rise = gap.get("std_error"), gap.get("rise_since_best")
    if error is None or rise is None or not (gap["low"] > 0 and rise > NORMAL_QUANTILE * error):
        return None
    return Finding(
        name="overfitting",
        severity="warning",
        sentence="The model overfits: its loss on new data has risen again.",
        evidence=(
            f"eval loss up by {_around(rise, error)} since its best at step {gap['best_step']:,}",
            f"eval loss − train loss at the end: {_gap(gap)}",
        ),
        advice="Keep the best checkpoint (`load_best_model_at_end`), stop there (`EarlyStoppingCallback`), or "
        "regularize: fewer epochs, weight decay, dropout, more data. Look for wrong labels.",
        source="95 % interval of the evaluation loss; Prechelt 1998, Early Stopping – But When?",
    )


def underfitting(report: ReportData) -> Finding | None:
    """Report a loss close to its start, on training and evaluation data alike."""
    gap = report.dynamics.get("generalization_gap") or {}
    unchanged = _unchanged_loss(report)
    if (
        unchanged is None
        or gap.get("high") is None
        or gap["high"] > (1 - UNDERFIT_SHARE) * report.measurements[-1].loss
    ):
        return None
    if _instability(report) or not_converged(report) or learning_rate_far_below_limit(report):
        return None
    return Finding(
        name="underfitting",
        severity="warning",
        sentence="The model has learnt next to nothing: its loss is about where it started.",
        evidence=(unchanged, f"eval loss − train loss: {_gap(gap)}"),
        advice="Check that the labels belong to the inputs and that nothing needed is frozen; then try a higher "
        "learning rate, more steps, or a larger model.",
        source="less than a tenth of the starting loss is gone, with no gap to new data; Goodfellow et al. 2016, "
        "section 5.2",
    )


def evaluation_unstable(report: ReportData) -> Finding | None:
    """Report an evaluation loss that rises and falls again by more than its error."""
    gap = report.dynamics.get("generalization_gap") or {}
    error = gap.get("std_error") or 0.0
    points = [
        (entry["step"], entry["eval_loss"]) for entry in report.log_history if _is_finite(entry.get("eval_loss"))
    ]
    swings = [] if error == 0 else _swings([loss for _, loss in points], least=SWING_STD_ERRORS * error)
    if not swings:
        return None
    size, at = max(swings)
    return Finding(
        name="evaluation_unstable",
        severity="warning",
        sentence="The evaluation loss goes up and down by more than its error.",
        evidence=(
            f"largest swing: {_around(size, error)}, up to {format_number(points[at][1])} at step "
            f"{points[at][0]:,} and down again",
            f"swings of that kind: {len(swings)} in {len(points)} evaluations",
        ),
        advice="Which checkpoint is best is partly luck: lower the learning rate towards the end, average weights, or "
        "evaluate more often and keep the best.",
        source=f"this run's log; a swing is a rise and a fall of over {SWING_STD_ERRORS} standard errors of the mean "
        "loss each",
    )


def batch_below_noise_scale(report: ReportData) -> Finding | None:
    """Report a batch so small that its gradient is mostly noise."""
    batch, noise = batch_items(report), _noise_interval(report)
    if batch is None or noise is None or noise[0] <= BATCH_FACTOR * batch:
        return None
    return Finding(
        name="batch_below_noise_scale",
        severity="note",
        sentence="The batch is far below the gradient noise scale: a step's gradient is mostly noise.",
        evidence=_batch_evidence(report, batch),
        advice="A larger batch (or more accumulation steps) takes almost proportionally fewer steps, at a higher "
        "learning rate. If the price counts in examples, leave it.",
        source=NOISE_SOURCE,
    )


def batch_above_noise_scale(report: ReportData) -> Finding | None:
    """Report a batch so large that most of its examples add little."""
    batch, noise = batch_items(report), _noise_interval(report)
    if batch is None or noise is None or noise[1] * BATCH_FACTOR >= batch:
        return None
    return Finding(
        name="batch_above_noise_scale",
        severity="note",
        sentence="The batch is far above the gradient noise scale: most of its examples add little.",
        evidence=_batch_evidence(report, batch),
        advice="A smaller batch reaches the same loss with fewer examples, in hardly more steps.",
        source=NOISE_SOURCE,
    )


def tasks_conflict(report: ReportData) -> Finding | None:
    """Report tasks of which one's steps raise the loss of another."""
    multitask = _multitask(report)
    if multitask is None:
        return None
    z = statistics.NormalDist().inv_cdf(1 - 0.025 / max(len(multitask.conflicts), 1))  # Bonferroni's, for all pairs
    known = [(pair, pair.cosine) for pair in multitask.conflicts if pair.cosine is not None]
    opposed = [(pair, cosine) for pair, cosine in known if max(cosine.high, cosine.value + z * _error(cosine)) < 0]
    if not opposed:
        return None
    worsened = [
        f"a step along the joint gradient raises the loss of {name}: its share is {_interval(task.share)}"
        for name, task in multitask.tasks.items()
        if task.share is not None and task.share.high < 0
    ]
    return Finding(
        name="tasks_conflict",
        severity="warning",
        sentence=f"Tasks conflict: {_enumeration([f'{pair.first} with {pair.second}' for pair, _ in opposed])}.",
        evidence=(
            *(
                f"cosine of the gradients of {pair.first} and {pair.second} at step {report.measurements[-1].step:,}: "
                f"{_interval(cosine)}"
                for pair, cosine in opposed[:MAX_NAMED]
            ),
            *worsened[:MAX_NAMED],
        ),
        advice="Look at the blocks where they conflict: layers of their own for each task there, or other weights, "
        "may help. Check that the labels of these tasks do not contradict each other. A conflict at one step need not "
        "cost anything in the end: compare with a run on each task alone.",
        source="95 % intervals over batches, for all pairs together; Yu et al., arXiv 2001.06782, section 2",
    )


def one_task_dominates(report: ReportData) -> Finding | None:
    """Report a task with most of the joint gradient, beyond its share of the examples."""
    multitask = _multitask(report)
    if multitask is None or tasks_conflict(report) is not None:  # shares mean little where gradients cancel
        return None
    for name, task in multitask.tasks.items():
        if task.share is not None and task.share.converged and task.share.low > max(DOMINANT_SHARE, task.weight):
            return Finding(
                name="one_task_dominates",
                severity="note",
                sentence=f"{name} dominates the joint gradient.",
                evidence=(
                    f"its share at step {report.measurements[-1].step:,}: {_interval(task.share)}",
                    f"its share of the items: {format_number(task.weight, digits=2)}",
                ),
                advice="The other tasks are trained along the way. If they learn too slowly, give them more weight or "
                "more examples; weights that make the gradients equally long are in this report.",
                source="95 % interval over batches; Chen et al., arXiv 1711.02257, balance gradient norms",
            )
    return None


def loss_scaled(report: ReportData) -> Finding | None:
    """Report a loss that is not the mean over a step's items."""
    factor = report.training.get("loss_scale") or 1.0
    if factor == 1:  # rounding has been removed where it was measured
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


def measurement_failed(report: ReportData) -> Finding | None:
    """Report failed measurements."""
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


def errors_wide(report: ReportData) -> Finding | None:
    """Report a last measurement far from its tolerances."""
    last = _last_measurement(report)
    if last is None:
        return None
    hessian = last.hessian
    estimates = {"tr H": hessian.trace, "λ_max": hessian.lambda_max}
    if last.optimizer_stability is not None:
        estimates["the sharpness"] = last.optimizer_stability.sharpness
    wide = {
        name: estimate
        for name, estimate in estimates.items()
        if not estimate.converged and not _error(estimate) <= MAX_RELATIVE_ERROR * abs(estimate.value)
    }
    if not wide:
        return None
    return Finding(
        name="errors_wide",
        severity="warning",
        sentence=f"The last measurement is too uncertain to build on: {_enumeration(list(wide))}.",
        evidence=tuple(f"{name} = {format_estimate(estimate)}" for name, estimate in wide.items()),
        advice="Raise `max_hvps`, or take a larger profile.",
        source=f"its own error, over {format_percent(MAX_RELATIVE_ERROR)} of the value",
    )


def central_differences_off(report: ReportData) -> Finding | None:
    """Report products by central differences that are far from exact."""
    last = _last_measurement(report)
    if last is None or last.central_difference_error is None or last.central_difference_error <= MAX_PRODUCT_ERROR:
        return None
    return Finding(
        name="central_differences_off",
        severity="warning",
        sentence="The curvature is from central differences that are off.",
        evidence=(f"relative error of a product: {format_number(last.central_difference_error, digits=2)}",),
        advice="Read the curvature as an order of magnitude. Where the loss has a second derivative, set "
        "`engine='double_backward'`; kinks (ReLU) are what makes differences fail.",
        source=f"its own check; over {format_percent(MAX_PRODUCT_ERROR)} it is more than `trace_tolerance` allows",
    )


def _multitask(report: ReportData) -> MultitaskMeasurement | None:
    last = _last_measurement(report)
    return None if last is None else last.multitask


def _interval(estimate: Estimate) -> str:
    return format_interval(estimate.value, estimate.low, estimate.high)


def _around(value: float, std_error: float) -> str:
    margin = NORMAL_QUANTILE * std_error
    return format_interval(value, value - margin, value + margin)


def _gap(gap: Mapping[str, Any]) -> str:
    return format_interval(gap["loss_gap"], gap["low"], gap["high"])


def _last_measurement(report: ReportData) -> Measurement | None:
    return report.measurements[-1] if report.measurements else None


@dataclass(frozen=True)
class _StableRate:
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


def _largest_stable_rate(report: ReportData) -> _StableRate | None:
    """Return the largest stable learning rate, by the sharpness measured after the start.

    `None` for models with BatchNorm: their sharpness in eval mode is not that of training.
    """
    settings = _optimizer_numbers(report)
    measured = [
        m
        for m in report.measurements
        if m.optimizer_stability is not None and m.optimizer_stability.sharpness.value > 0
    ]
    measured = [measurement for measurement in measured if measurement.step > 0] or measured
    if not measured or report.model.batch_norm is not False:
        return None
    betas = (report.training.get("optimizer_settings") or {}).get("betas")
    beta = (betas or [settings.get("beta1") or 0.0])[0]
    averaged = {"momentum": beta, "dampening": beta}
    names = ("momentum", "dampening", "nesterov")
    buffered = {name: settings[name] for name in names if settings.get("momentum") and name in settings}
    limit = stability_limit(1.0, **(averaged if report.training.get("optimizer") != "SGD" else buffered))
    sharpness = [
        measurement.optimizer_stability.sharpness
        for measurement in measured
        if measurement.optimizer_stability is not None
    ]
    return _StableRate(
        low=min(limit / estimate.high for estimate in sharpness),
        high=max(limit / estimate.low if estimate.low > 0 else math.inf for estimate in sharpness),
        steps=tuple(measurement.step for measurement in measured),
    )


def _peak_rate(report: ReportData) -> float | None:
    """Return the largest learning rate of the schedule."""
    rate = _optimizer_numbers(report).get("lr")
    sizes = [m.optimizer_stability.learning_rate for m in report.measurements if m.optimizer_stability is not None]
    return max([rate, *sizes]) if rate else None


def _optimizer_numbers(report: ReportData) -> dict[str, float]:
    """Return the optimizer's settings that are single numbers."""
    settings = report.training.get("optimizer_settings") or {}
    return {name: value for name, value in settings.items() if isinstance(value, (int, float))}


def _still_falling(report: ReportData) -> str | None:
    """Return the evidence that more than a tenth of the loss's drop was still to come; `None` if there is none."""
    speed = report.dynamics.get("convergence_speed") or {}
    if speed.get("drop") is None or not report.measurements:
        return None
    low, steps = speed.get("steps_to_90_low"), report.measurements[-1].step
    if low is not None and low > steps:
        interval = format_interval(speed["steps_to_90"], low, speed["steps_to_90_high"], nonnegative=True)
        return f"90 % of the loss's drop after {interval} steps, trained for {steps:,}"
    if str(speed.get("note")).startswith("Not yet levelled"):
        area = format_number(speed["normalized_area"], digits=3)
        return f"the loss had not levelled by step {steps:,}: area under its curve {area}, 0.5 for a straight fall"
    return None


def _unchanged_loss(report: ReportData) -> str | None:
    """Return the evidence that the loss on the probe set ended close to its start; `None` if there is none."""
    last = _final_measurement(report)
    if last is None:
        return None
    first = report.measurements[0]
    if not last.loss >= UNDERFIT_SHARE * first.loss > 0:
        return None
    ends = f"{format_number(first.loss)} at step {first.step:,}, {format_number(last.loss)} at step {last.step:,}"
    return f"loss on the probe set: {ends}"


def _final_measurement(report: ReportData) -> Measurement | None:
    """Return the measurement of the final weights."""
    last = _last_measurement(report)
    if last is None or not report.dynamics or last.step == 0:
        return None
    return None if report.failures and report.failures[-1].step > last.step else last


def _instability(report: ReportData) -> tuple[str, ...]:
    """Collect evidence of instability from the training log."""
    found = []
    series = (report.dynamics.get("stability") or {}).get("loss") or {}
    if series.get("non_finite"):
        found.append(f"losses in the log that are not finite: {series['non_finite']:,}")
    norms = [entry["grad_norm"] for entry in report.log_history if "grad_norm" in entry]
    if lost := sum(not _is_finite(norm) for norm in norms):
        found.append(f"gradient norms in the log that are not finite: {lost:,} of {len(norms):,}")
    failed = [failure.step for failure in report.failures if failure.why.code == "loss_not_finite"]
    if failed:
        found.append(f"loss on the probe set not finite at step {failed[0]:,}")
    if series.get("spikes") and series["largest_setback"] > LARGE_SPIKE:
        size = format_percent(series["largest_setback"])
        found.append(f"spikes of the training loss: {series['spikes']:,}, the largest of {size} of its whole range")
    if (series.get("setback_share_low") or 0.0) > 0.5:
        low, high = (format_percent(series[f"setback_share_{end}"]) for end in ("low", "high"))
        found.append(f"the training loss rose more often than it fell: {low} to {high} of the time")
    if rise := _loss_rise(report):
        found.append(rise)
    return tuple(found)


def _loss_rise(report: ReportData) -> str | None:
    """Return the evidence that the training loss rose above its start by more than its scatter."""
    losses = [entry["loss"] for entry in report.log_history if _is_finite(entry.get("loss"))]
    if len(losses) < MIN_LOGGED_LOSSES:
        return None
    scale = report.training.get("loss_scale") or 1.0
    # Before the first step, in eval mode; the log begins after the first ones, in training mode.
    start = max([losses[0], *(measurement.loss * scale for measurement in report.measurements[:1])])
    sigma = 1.4826 * statistics.median(abs(after - before) for before, after in pairwise(losses)) / math.sqrt(2)
    top = max(
        statistics.fmean(losses[index : index + SMOOTHING_WINDOW])
        for index in range(len(losses) - SMOOTHING_WINDOW + 1)
    )
    if top <= max(LOSS_RISE * start, start + LOSS_RISE_SIGMAS * sigma):
        return None
    return f"the training loss rose to {format_number(top)}, from {format_number(start)} at the start"


def _dead_blocks(measurement: Measurement) -> list[str]:
    return [
        name
        for name, block in measurement.blocks.items()
        if block.grad_norm <= DEAD_GRADIENT_SHARE * measurement.grad_norm
    ]


def _relative_gradients(report: ReportData) -> dict[str, float]:
    """Return ‖g_b‖/‖θ_b‖ by layer, without embeddings (few gradients) and head (small weights): layers are alike."""
    last = _last_measurement(report)
    if last is None:
        return {}
    dead = {EMBEDDINGS, HEAD, *_dead_blocks(last)}
    layers = {name: block for name, block in last.blocks.items() if name not in dead and block.weight_norm > 0}
    return {name: block.grad_norm / block.weight_norm for name, block in layers.items()} if len(layers) > 2 else {}


def _exploding_layers(relative: dict[str, float]) -> list[str]:
    return [
        name for name, value in relative.items() if value > LAYER_GRADIENT_RATIO * statistics.median(relative.values())
    ]


def _outlying_layers(
    report: ReportData,
    relative: dict[str, float],
    layers: Sequence[str],
    *,
    name: str,
    sentence: str,
    advice: str,
) -> Finding | None:
    if not layers:
        return None
    median = format_number(statistics.median(relative.values()), digits=3)
    return Finding(
        name=name,
        severity="warning",
        sentence=sentence.format(_enumeration(layers)),
        evidence=(
            *(f"‖g_b‖/‖θ_b‖ of {layer}: {format_number(relative[layer], digits=3)}" for layer in layers[:MAX_NAMED]),
            f"median of the layers: {median}, at step {report.measurements[-1].step:,}",
        ),
        advice=advice,
        source="Glorot and Bengio 2010, section 4; ‖g‖/‖θ‖ by layer: You et al., arXiv 1708.03888",
    )


def _swings(losses: Sequence[float], *, least: float) -> list[tuple[float, int]]:
    """Return size and top of each rise of at least `least` that is followed by a fall of at least `least`."""
    found = []
    bottom, top = 0, 0
    for index, loss in enumerate(losses):
        if loss > losses[top]:
            top = index
        size = min(losses[top] - losses[bottom], losses[top] - loss)
        if size >= least:
            found.append((size, top))
        if size >= least or loss < losses[bottom]:
            bottom = top = index
    return found


def _noise_interval(report: ReportData) -> tuple[float, float] | None:
    """Return the bounds of the noise scale over the run, which usually grows during training."""
    scales = [measurement.noise_scale for measurement in report.measurements if measurement.noise_scale is not None]
    return (min(scale.low for scale in scales), max(scale.high for scale in scales)) if scales else None


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


def _error(estimate: Estimate) -> float:
    """Return the standard error or the residual bound; infinite if it is unknown."""
    return math.inf if math.isnan(estimate.error) else estimate.error


def _parameters(measurement: Measurement) -> int:
    return sum(block.parameters for block in measurement.blocks.values())


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _enumeration(names: Sequence[str]) -> str:
    """Join names for a sentence.

    Example:
        >>> [_enumeration(["a"]), _enumeration(["a", "b"]), _enumeration(["a", "b", "c", "d", "e"])]
        ['a', 'a and b', 'a, b, c and 2 more']
    """
    if len(names) > MAX_NAMED:
        return f"{', '.join(names[:MAX_NAMED])} and {len(names) - MAX_NAMED} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


FINDINGS: tuple[Callable[[ReportData], Finding | None], ...] = (
    learning_rate_above_limit,
    training_unstable,
    gradients_dead,
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
"""The rules, in the order of findings of the same severity."""
