# SPDX-License-Identifier: Apache-2.0
"""The quantities that a measurement reports: one row each, which log, command, summary, card and pages read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from ..quantities.loss_landscape import Landscape
from ..reasons import Reason
from .results import Measurement, TaskMeasurement
from .values import Form, Value, number_of


T = TypeVar("T")

Section = Literal["loss", "gradient", "curvature", "spectrum", "step"]
"""The table of the report that holds the quantity's row."""


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """One reported quantity of a measurement.

    Attributes:
        name: Stable name: `optimizability/<name>` in the log, `optimizability_<name>` among the card's metrics.
        get: Read the value; `None` if it was not measured, NaN if it does not exist.
        label: Head of its row.
        reading: How to read it, in a sentence.
        section: Table of the report that holds its row; `None` for a part of another quantity's error.
        form: How its value is printed.
        nonnegative: Whether it can't be below 0.
        scope: What it is about where the measured examples were drawn from a pool: these examples alone, the training
            loss (or the optimizer, whatever the examples), or the training's batches.
        always: Whether the row stays, with a dash, where it was not measured.
        logged: Whether the value goes to the log and the trackers.
        logged_error: Error of an estimate that is logged as well, as `<name>_<error>`.
        card: Whether it is listed in the model card and printed by the command.
        metric: Full name, for a quantity that is a metric of the model card.
        tile: Whether it stands at the top of the page.
        summary: Its line in the summary; quantities may share one.
        plot: The plot over optimizer steps that shows it; quantities may share one, if they are neighbours.
        log_scale: Whether that plot has a logarithmic axis.
        unit: Unit of the value.
        failure: Why it was not measured where it was asked for; `None` if it was, or was not asked for.
    """

    name: str
    get: Callable[[Measurement], Value]
    label: str
    reading: str
    section: Section | None
    form: Form = "interval"
    nonnegative: bool = False
    scope: Literal["examples", "loss", "batches"] = "examples"
    always: bool = False
    logged: bool = True
    logged_error: Literal["std_error", "residual"] | None = None
    card: bool = False
    metric: str | None = None
    tile: bool = False
    summary: str | None = None
    plot: str | None = None
    log_scale: bool = False
    unit: str = ""
    failure: Callable[[Measurement], Reason | None] = lambda measurement: None

    def number(self, measurement: Measurement) -> float | None:
        """Return the value without its error."""
        return number_of(self.get(measurement))

    @property
    def title(self) -> str:
        """Return the name to print where no reading explains the label."""
        name = self.metric or self.label
        return f"{name}, {self.unit}" if self.unit else name


@dataclass(frozen=True, kw_only=True)
class TaskQuantity:
    """One reported quantity of a task of a joint loss.

    Attributes:
        get: Read the value; `None` if it was not measured.
        label: Head of its column.
        form: How its value is printed.
        nonnegative: Whether it can't be below 0.
        log_key: Key in the log, behind `optimizability/task/<task>/`; `None` if it is not logged.
    """

    get: Callable[[TaskMeasurement], Value]
    label: str
    form: Form = "interval"
    nonnegative: bool = False
    log_key: str | None = None


def _of(part: T | None, get: Callable[[T], Value]) -> Value:
    """Return a value of a part of a measurement; `None` if that part was not measured."""
    return None if part is None else get(part)


def _peak_beside_batch_sharpness(measurement: Measurement) -> float | None:
    stability = measurement.optimizer_stability
    return None if stability is None or measurement.batch_sharpness is None else stability.peak_learning_rate


def _predicted_decrease(measurement: Measurement) -> float | None:
    decrease = None if measurement.quadratic_model is None else measurement.quadratic_model.predicted_decrease
    return math.nan if decrease is not None and 0 <= measurement.loss < decrease else decrease


def _quadratic_return(landscape: Landscape) -> float | None:
    if landscape.update is None:
        return None
    back = landscape.update.axis.quadratic_return
    return math.nan if back is None else back


QUANTITIES: tuple[Quantity, ...] = (
    Quantity(
        name="loss",
        get=lambda m: m.loss if m.population is None else m.population.loss,
        label="Loss",
        reading="In eval mode.",
        section="loss",
        scope="loss",
        summary="Loss",
        card=True,
        tile=True,
    ),
    Quantity(
        name="grad_norm",
        get=lambda m: m.grad_norm if m.population is None else m.population.grad_norm,
        label="Gradient norm ‖g‖",
        reading="How steep the loss is. Room to improve is a large gradient over small curvature.",
        section="gradient",
        nonnegative=True,
        scope="loss",
        card=True,
        tile=True,
        summary="Gradient norm",
    ),
    Quantity(
        name="hessian_trace",
        get=lambda m: m.hessian.trace,
        label="Hessian trace",
        reading="Sum of the eigenvalues: total curvature. Large curvature does not mean room to improve.",
        section="curvature",
        scope="loss",
        logged_error="std_error",
        card=True,
        metric="Hessian trace",
        tile=True,
        summary="Hessian trace",
        plot="trace",
    ),
    Quantity(
        name="hessian_trace_data_std_error",
        get=lambda m: m.hessian.trace.data_std_error,
        label="Standard error of the trace over the data",
        reading="How far another probe set of this size would move the trace (jackknife over batches).",
        section=None,
    ),
    Quantity(
        name="hessian_lambda_max",
        get=lambda m: m.hessian.lambda_max,
        label="λ_max",
        reading="Largest eigenvalue, the sharpest direction. A large value limits the learning rate.",
        section="curvature",
        scope="loss",
        logged_error="residual",
        card=True,
        metric="Largest eigenvalue of the Hessian",
        tile=True,
        summary="λ_max; λ_min",
        plot="eigenvalues",
    ),
    Quantity(
        name="hessian_lambda_min",
        get=lambda m: m.hessian.lambda_min,
        label="λ_min",
        reading="Smallest eigenvalue. Below zero with its whole interval: the loss curves downward in some direction, "
        "so this is not a minimum.",
        section="curvature",
        scope="loss",
        always=True,
        logged_error="residual",
        card=True,
        metric="Smallest eigenvalue of the Hessian",
        tile=True,
        summary="λ_max; λ_min",
        plot="eigenvalues",
    ),
    Quantity(
        name="hessian_frobenius_norm",
        get=lambda m: _of(m.hessian.density, lambda density: density.frobenius_norm),
        label="‖H‖_F",
        reading="Root of the sum of the squared eigenvalues: the size of the curvature, whatever its sign.",
        section="spectrum",
        nonnegative=True,
    ),
    Quantity(
        name="hessian_effective_rank",
        get=lambda m: _of(m.hessian.density, lambda density: density.effective_rank),
        label="Effective rank",
        reading="(tr H)²/‖H‖_F²: the number of equal eigenvalues with this trace and this norm. Much smaller than n: "
        "few directions hold the curvature.",
        section="spectrum",
        nonnegative=True,
    ),
    Quantity(
        name="hessian_negative_mass",
        get=lambda m: _of(m.hessian.density, lambda density: density.negative_mass),
        label="Negative eigenvalues",
        reading="Share of all directions that curve downward.",
        section="spectrum",
        form="share",
        nonnegative=True,
    ),
    Quantity(
        name="gradient_noise_scale",
        get=lambda m: m.noise_scale,
        label="Gradient noise scale",
        reading="Items in a batch whose gradient is as much noise as signal; larger batches than this gain little. "
        "Its interval is over batches drawn like these.",
        section="gradient",
        nonnegative=True,
        scope="batches",
        always=True,
        card=True,
        metric="Gradient noise scale",
        tile=True,
        plot="noise_scale",
        log_scale=True,
        unit="items",
    ),
    Quantity(
        name="learning_rate",
        get=lambda m: _of(m.optimizer_stability, lambda stability: stability.learning_rate),
        label="Learning rate η",
        reading="The largest among the optimizer's parameter groups at the measurement.",
        section="step",
        scope="loss",
        form="number",
        logged=False,
    ),
    Quantity(
        name="sharpness",
        get=lambda m: _of(m.optimizer_stability, lambda stability: stability.sharpness),
        label="Sharpness",
        reading="λ_max(P^-½HP^-½), the sharpest direction as the optimizer scales it (P = 1 for SGD).",
        section="step",
        scope="loss",
    ),
    Quantity(
        name="sharpness_limit",
        get=lambda m: _of(m.optimizer_stability, lambda stability: stability.limit),
        label="Its limit at η",
        reading="Above it, the optimizer would diverge on a quadratic; training often hovers there without harm. "
        "–: η was 0.",
        section="step",
        scope="loss",
        form="number",
    ),
    Quantity(
        name="batch_sharpness",
        get=lambda m: _of(m.batch_sharpness, lambda batches: batches.as_stepped),
        label="Batch sharpness",
        reading="Curvature of batches of one step along their own gradients, as the optimizer scales them. Plain SGD "
        "holds it near 2/η. Its interval is over such batches.",
        section="step",
        scope="batches",
        failure=lambda m: m.batch_sharpness_failure,
    ),
    Quantity(
        name="batch_sharpness_rate",
        get=lambda m: _of(m.batch_sharpness, lambda batches: batches.rate),
        label="2/(batch sharpness)",
        reading="Learning rate above which plain SGD overshoots on a batch's own loss. Compare with η, and with the "
        "row below.",
        section="step",
        nonnegative=True,
        scope="batches",
        logged=False,
    ),
    Quantity(
        name="peak_learning_rate",
        get=_peak_beside_batch_sharpness,
        label="Learning rate at the peak of the schedule",
        reading="What steps come to, where η is still warmed up, or already decayed.",
        section="step",
        scope="loss",
        form="number",
        logged=False,
    ),
    Quantity(
        name="critical_learning_rate",
        get=lambda m: _of(m.optimizer_stability, lambda stability: stability.critical),
        label="Critical learning rate",
        reading="Where the loss first rises along the next update: its bracket.",
        section="step",
        nonnegative=True,
        tile=True,
    ),
    Quantity(
        name="quadratic_return",
        get=lambda m: _of(m.landscape, _quadratic_return),
        label="… by the quadratic model",
        reading="Learning rate at which the quadratic model returns to the current loss. If this differs strongly "
        "from the row above, curvature is not predictive here.",
        section="step",
        form="number",
        logged=False,
    ),
    Quantity(
        name="best_step",
        get=lambda m: _of(m.quadratic_model, lambda model: model.best_step),
        label="Best step along −g",
        reading="‖g‖²/gᵀHg, the learning rate of plain gradient descent that gains most; –: no minimum in that "
        "direction.",
        section="step",
        scope="loss",
        form="number",
        always=True,
        logged=False,
    ),
    Quantity(
        name="predicted_decrease",
        get=_predicted_decrease,
        label="Its predicted decrease",
        reading="½‖g‖⁴/gᵀHg, of the loss; –: more than the loss itself, so that the model does not hold that far.",
        section="step",
        scope="loss",
        form="number",
        always=True,
        logged=False,
    ),
)
"""In the order in which they are shown."""

TASK_QUANTITIES: tuple[TaskQuantity, ...] = (
    TaskQuantity(get=lambda task: task.num_items, label="Items", form="number"),
    TaskQuantity(get=lambda task: task.weight, label="w", form="number"),
    TaskQuantity(get=lambda task: task.loss, label="Loss", log_key="loss"),
    TaskQuantity(get=lambda task: task.grad_norm, label="‖g‖", form="number", log_key="grad_norm"),
    TaskQuantity(get=lambda task: task.signal_norm, label="… without noise", nonnegative=True),
    TaskQuantity(get=lambda task: task.share, label="Share of the joint gradient", log_key="grad_share"),
    TaskQuantity(get=lambda task: task.trace, label="Trace", log_key="hessian_trace"),
    TaskQuantity(get=lambda task: task.lambda_max, label="λ_max", log_key="hessian_lambda_max"),
    TaskQuantity(get=lambda task: task.noise_scale, label="Noise scale", nonnegative=True),
)
"""In the order in which they are shown."""
