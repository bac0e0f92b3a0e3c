# SPDX-License-Identifier: Apache-2.0
"""How fast a loss falls: an `evaluate` measurement that needs nothing but the loss curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.integrate import trapezoid
from scipy.optimize import least_squares


Array = NDArray[np.float64]

MIN_POINTS = 4
"""Points that a fit needs: one more than it has parameters."""

MAX_POINTS = 500
"""Longer curves are averaged into as many windows. Equal windows leave τ as it is."""

LONGEST = 10.0
"""Largest τ that is fitted, in lengths of the curve; the fall is then all but straight."""

RESAMPLES = 999
"""Shuffled curves to test the drop with, and resampled ones for the interval."""

NOTES = {
    "few_points": "Too few points: {points} different steps; a fit needs {needed}.",
    "no_drop": "No significant drop: the loss did not fall beyond its scatter.",
    "not_levelled": "Not yet levelled: τ is longer than the run, so a half-life would be extrapolated.",
    "fell_at_once": "The loss fell before the second point; log more often to resolve the half-life.",
    "scattered": "The loss fell, but its scatter is too large to tell how fast.",
    "unbounded": "The curve is too short or too noisy to bound the half-life from above.",
}
"""What the note says where a value is missing."""

DESCRIPTION = """
Convergence speed: half-life of a loss, and steps to 90 % of its drop, from a robust exponential fit to the loss curve.
"""

CITATION = """
@book{efron1993bootstrap,
  title = {An Introduction to the Bootstrap},
  author = {Efron, Bradley and Tibshirani, Robert J.},
  publisher = {Chapman and Hall},
  year = {1993}
}
"""

INPUTS_DESCRIPTION = """
Args:
    step (list of float): Optimizer steps at which the loss was logged, in any order.
    loss (list of float): The loss at these steps; NaN, infinite and None are left out.
    seed (int): Seed of the significance test and of the intervals. Defaults to 0.

Returns:
    dict: half_life and steps_to_90 in steps, each with _low and _high (95 % confidence interval); initial_loss,
    final_loss and drop, of the fit, from the first step to the last; normalized_area (lower is faster); points; and
    note, which says why a value is None.
"""

VALUES = (
    "half_life", "half_life_low", "half_life_high", "steps_to_90", "steps_to_90_low", "steps_to_90_high",
    "initial_loss", "final_loss", "drop", "normalized_area",
)  # fmt: skip
"""Results that are `None` where the curve doesn't give them."""


class ConvergenceSpeed(evaluate.Measurement):
    """Half-life of a loss, and area under its normalized curve.

    The curve `L(t) = c + a·exp(−t/τ)` is fitted by least squares with the soft-L1 loss, which caps the pull of spikes.
    `half_life` is τ ln 2 and `steps_to_90` is τ ln 10: the steps in which the fitted loss covers 50 % and 90 % of its
    drop to `c`. A running mean of the loss, as the `Trainer` logs it, changes `a` but not τ.

    Intervals are 95 % percentile intervals of a residual bootstrap (Efron and Tibshirani 1993, chapter 9). They are
    widened for short curves, by Student's t, and where neighbouring residuals are alike, by the factor √((1+ρ)/(1−ρ))
    of a first-order autoregression with lag-1 autocorrelation ρ. They hold as far as the loss is exponential: in
    simulations they cover the truth 95 % of the time if the noise is independent, 92 % if its ρ is 0.5.

    Nothing is reported unless the drop is significant (p < 0.05, permutation test): an exponential must fit the ranks
    of the losses better than it fits 95 % of their shuffles.

    `normalized_area` is the area under the curve scaled to go from 1 (fit at the first step) to 0 (fit at the last)
    over a time from 0 to 1: ½ for a straight fall, near 0 for a fast one.

    Example:
        >>> steps = list(range(0, 200, 10))
        >>> losses = [0.5 + 2 * 0.5 ** (step / 30) for step in steps]
        >>> result = ConvergenceSpeed().compute(step=steps, loss=losses)
        >>> round(result["half_life"], 3), round(result["steps_to_90"], 3)
        (30.0, 99.658)
    """

    def _info(self) -> evaluate.MeasurementInfo:
        return evaluate.MeasurementInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS_DESCRIPTION,
            features=datasets.Features({"step": datasets.Value("float64"), "loss": datasets.Value("float64")}),
        )

    def _compute(self, *, step: Sequence[float], loss: Sequence[float | None], seed: int = 0) -> dict[str, Any]:
        return fit_convergence(step, loss, seed=seed)


def fit_convergence(step: Sequence[float], loss: Sequence[float | None], *, seed: int = 0) -> dict[str, Any]:
    """Compute what `ConvergenceSpeed().compute` returns, without its detour through a file.

    Args:
        step: Optimizer steps at which the loss was logged, in any order.
        loss: The loss at these steps; NaN, infinite and `None` are left out.
        seed: Seed of the significance test and of the intervals.

    Returns:
        The values that `ConvergenceSpeed` describes, and a note that says why one is `None`.

    Example:
        >>> fit_convergence([1, 2, 3], [3.0, 2.0, 1.0])["note"]
        'Too few points: 3 different steps; a fit needs 4.'
    """
    steps, losses = _finite_points(step, loss)
    result: dict[str, Any] = {**dict.fromkeys(VALUES), "points": len(losses), "note": ""}
    distinct = len(np.unique(steps))
    if distinct < MIN_POINTS:
        return {**result, "note": NOTES["few_points"].format(points=distinct, needed=MIN_POINTS)}
    span = float(steps[-1] - steps[0])
    elapsed, losses = _windows((steps - steps[0]) / span), _windows(losses)
    first_gap = float(np.diff(np.unique(elapsed))[0])
    log_taus = np.linspace(math.log(first_gap / 20), math.log(LONGEST), 60)
    rng = np.random.default_rng(seed)
    if not _falls(elapsed, losses, log_taus, rng):
        return {**result, "note": NOTES["no_drop"]}
    floor, height, log_tau = _fit(elapsed, losses, log_taus)
    tau = math.exp(log_tau)
    final, drop = floor + height * math.exp(-1 / tau), -height * math.expm1(-1 / tau)
    if drop < _soft_scale(losses) / math.sqrt(len(losses)):  # the fit follows the bulk, which need not have fallen
        return {**result, "note": NOTES["no_drop"]}

    result |= {"initial_loss": floor + height, "final_loss": final, "drop": drop}
    result["normalized_area"] = float(trapezoid((losses - final) / drop, elapsed))
    if tau > 1:
        return {**result, "note": NOTES["not_levelled"]}
    if tau < first_gap / 5:
        return {**result, "note": NOTES["fell_at_once"]}

    low, high = _interval(elapsed, losses, np.array([floor, height, log_tau]), log_taus, rng)
    if low == 0 and high >= LONGEST:
        return {**result, "note": NOTES["scattered"]}
    for name, factor in (("half_life", math.log(2) * span), ("steps_to_90", math.log(10) * span)):
        result |= {name: factor * tau, f"{name}_low": factor * low}
        result[f"{name}_high"] = factor * high if high < LONGEST else None
    if high >= LONGEST:
        result["note"] = NOTES["unbounded"]
    return result


def _finite_points(step: Sequence[float], loss: Sequence[float | None]) -> tuple[Array, Array]:
    """Return the points with a finite loss, by step."""
    steps, losses = np.asarray(step, dtype=float), np.asarray(loss, dtype=float)
    order = np.argsort(steps, kind="stable")
    order = order[np.isfinite(losses[order])]
    return steps[order], losses[order]


def _windows(values: Array) -> Array:
    """Return the values, or the means of `MAX_POINTS` windows if there are more of them."""
    if len(values) <= MAX_POINTS:
        return values
    return np.array([window.mean() for window in np.array_split(values, MAX_POINTS)])


def _projections(elapsed: Array, log_taus: Array, curves: Array) -> Array:
    """Project each curve (column) on each falling exponential (row), both centred.

    The larger the projection, the better the exponential fits, once its offset and height are the best for it.
    """
    shapes = np.exp((elapsed[0] - elapsed) / np.exp(log_taus)[:, None])
    shapes -= shapes.mean(axis=1, keepdims=True)
    shapes /= np.linalg.norm(shapes, axis=1, keepdims=True)
    return shapes @ (curves - curves.mean(axis=0))


def _falls(elapsed: Array, losses: Array, log_taus: Array, rng: np.random.Generator) -> bool:
    """Return whether the fall is significant, by ranks: a spike counts no more than any other large loss."""
    group = stats.rankdata(losses)
    if len(group) <= 6:
        curves = np.array(list(permutations(group)))  # all there are, the curve itself first
    else:
        curves = np.vstack([group, rng.permuted(np.tile(group, (RESAMPLES, 1)), axis=1)])
    best = _projections(elapsed, log_taus, curves.T).max(axis=0)
    return bool(np.mean(best >= best[0] - 1e-9 * abs(best[0])) < 0.05)


def _curve(parameters: Array, elapsed: Array) -> Array:
    floor, height, log_tau = parameters
    return floor + height * np.exp(-elapsed * np.exp(-log_tau))


def _gradient(parameters: Array, elapsed: Array) -> Array:
    """Return the derivatives of `_curve` by its three parameters, as columns."""
    _, height, log_tau = parameters
    rate = np.exp(-log_tau)
    decay = np.exp(-elapsed * rate)
    return np.column_stack([np.ones_like(elapsed), decay, height * decay * elapsed * rate])


def _soft_scale(losses: Array) -> float:
    """Return where soft-L1 turns from a square to a line: at twice the scatter between neighbouring points."""
    scatter = 1.4826 * np.median(np.abs(np.diff(losses, n=2))) / math.sqrt(6)
    return float(2 * max(scatter, 1e-3 * np.ptp(losses)))


def _fit(elapsed: Array, losses: Array, log_taus: Array) -> tuple[float, float, float]:
    """Return offset, height and log τ of the best of four robust fits, started from a fast to a slow fall."""
    fits = [
        least_squares(
            lambda parameters: _curve(parameters, elapsed) - losses,
            (losses.min(), np.ptp(losses), start),
            jac=lambda parameters: _gradient(parameters, elapsed),
            bounds=([-np.inf, 0, log_taus[0]], [np.inf, np.inf, log_taus[-1]]),
            loss="soft_l1",
            f_scale=_soft_scale(losses),
            x_scale="jac",
            ftol=1e-14,
            xtol=1e-12,
            gtol=None,
        )
        for start in np.linspace(log_taus[0], log_taus[-1], 6)[1:-1]
    ]
    floor, height, log_tau = min(fits, key=lambda fit: fit.cost).x
    return float(floor), float(height), float(log_tau)


def _interval(
    elapsed: Array, losses: Array, parameters: Array, log_taus: Array, rng: np.random.Generator
) -> tuple[float, float]:
    """Return the 95 % interval of τ; 0 or infinite where it reaches the ends of `log_taus`."""
    points, freedom, scale = len(losses), len(losses) - len(parameters), _soft_scale(losses)
    fitted = _curve(parameters, elapsed)
    # A robust fit is the plain least-squares fit to these residuals (Huber's pseudo-values), which is cheap to repeat.
    ratio = (losses - fitted) / scale
    residuals = scale * ratio / np.sqrt(1 + ratio**2) / np.mean((1 + ratio**2) ** -1.5)
    residuals -= residuals.mean()
    rho = residuals[1:] @ residuals[:-1] / (residuals @ residuals + np.finfo(float).tiny)
    rho = max(0.0, rho + (1 - rho) * len(parameters) / points)  # the fit has taken about that much of it away
    student = stats.t.ppf(0.975, freedom) / stats.norm.ppf(0.975)
    residuals *= student * math.sqrt(points / freedom * (1 + rho) / (1 - rho))

    jacobian = _gradient(parameters, elapsed)
    spread = 8 * residuals.std() * math.sqrt(np.linalg.pinv(jacobian.T @ jacobian)[2, 2])
    grid = np.linspace(max(parameters[2] - spread, log_taus[0]), min(parameters[2] + spread, log_taus[-1]), 401)
    curves = fitted[:, None] + rng.choice(residuals, size=(points, RESAMPLES))
    refits = grid[_projections(elapsed, grid, curves).argmax(axis=0)]
    low, high = np.quantile(refits, [0.025, 0.975])
    return math.exp(low) if low > log_taus[0] else 0.0, math.exp(high) if high < log_taus[-1] else math.inf
