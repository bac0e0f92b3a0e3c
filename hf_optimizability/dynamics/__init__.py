# SPDX-License-Identifier: Apache-2.0
"""Training dynamics: convergence speed, stability and generalization gap, from a Trainer's log.

Each of the three is an `evaluate.Measurement` in a file of its own that also works without this package, as in
`evaluate.load("path/to/convergence_speed.py")`. Importing this package imports `evaluate` and `datasets`.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from ..log_keys import PREFIX
from . import convergence_speed, generalization_gap, stability
from .convergence_speed import ConvergenceSpeed, fit_convergence
from .generalization_gap import GeneralizationGap, compare_losses
from .stability import Stability, count_setbacks


__all__ = ["ConvergenceSpeed", "GeneralizationGap", "Stability", "compute_dynamics", "is_note"]

RUNNING_MEAN = "The train loss is a running mean of the training log, with dropout on."
NO_BEST_LOSS = "No eval_loss was logged during training, so there is no best one."

_NOTES = (
    *convergence_speed.NOTES.values(), *stability.NOTES.values(), *generalization_gap.NOTES.values(), RUNNING_MEAN,
    NO_BEST_LOSS,
)  # fmt: skip
_NOTE = "|".join(re.sub(r"\\{\w+\\}", r"\\d+", re.escape(note)) for note in _NOTES)

NOT_METRICS = ("_runtime", "_per_second", "_time")
"""Endings of what the Trainer adds to the metrics of an evaluation."""

Curve = dict[int, float]
"""A logged value by optimizer step."""


def compute_dynamics(
    log_history: Sequence[dict[str, Any]], *, tasks: Sequence[str] = (), seed: int = 0
) -> dict[str, Any]:
    """Compute convergence speed, stability and generalization gap of a run.

    Of values logged twice at a step the later one counts.

    Args:
        log_history: `trainer.state.log_history`, or that of a `trainer_state.json`. Of the losses that
            `OptimizabilityCallback` measures alike on training and evaluation data at the end, the gap is computed if
            they are there; else from `eval_loss` and the last training `loss` logged until then.
        tasks: Names of evaluation sets, where a Trainer has several: each is one task, whose loss it logs as
            `eval_<name>_loss`.
        seed: Seed of the intervals of the convergence speed.

    Returns:
        Plain numbers, strings and `None`, ready for JSON: `"convergence_speed"` of the training loss; `"stability"`,
        by name, of the training loss and of whatever `eval_…` was logged, where lower is better if the name contains
        "loss" and higher if not; `"generalization_gap"`, with `measured_alike` (whether both losses were measured in
        eval mode with the same weights), `examples` (of each set) and `metric_gaps` (train minus eval). With `tasks`
        also `"tasks"`: the convergence speed of each one's evaluation loss, and the gap at the end. Where the log
        lacks something, values are `None` and `note` says why.

    Example:
        >>> log = [{"loss": 2.0, "step": 10}, {"loss": 1.0, "step": 20}, {"eval_loss": 1.5, "step": 20}]
        >>> dynamics = compute_dynamics(log)
        >>> dynamics["generalization_gap"]["loss_gap"], dynamics["generalization_gap"]["measured_alike"]
        (0.5, False)
        >>> dynamics["convergence_speed"]["half_life"], dynamics["convergence_speed"]["note"]
        (None, 'Too few points: 2 different steps; a fit needs 4.')
    """
    loss = _curve(log_history, "loss")
    evaluated = dict.fromkeys(key for entry in log_history for key in entry if key.startswith("eval_"))
    curves = {"loss": loss} | {key: _curve(log_history, key) for key in evaluated if not key.endswith(NOT_METRICS)}
    by_task = {name: _of_task(log_history, name, curves.get(f"eval_{name}_loss", {}), seed) for name in tasks}
    return {
        "convergence_speed": fit_convergence(list(loss), list(loss.values()), seed=seed),
        "stability": {
            name: count_setbacks(list(curve), list(curve.values()), greater_is_better="loss" not in name)
            for name, curve in curves.items()
            if curve or name == "loss"
        },
        "generalization_gap": _generalization_gap(log_history, loss, curves.get("eval_loss", {})),
        **({"tasks": by_task} if tasks else {}),
    }


def is_note(text: str) -> bool:
    """Return whether a text consists of notes that the dynamics give, and of nothing else.

    Example:
        >>> is_note("Too few points: 1; a comparison needs 2."), is_note("Too few points: /home/ada")
        (True, False)
    """
    return re.fullmatch(f"(?: ?(?:{_NOTE}))*", text) is not None


def _of_task(log_history: Sequence[dict[str, Any]], name: str, eval_loss: Curve, seed: int) -> dict[str, Any]:
    """Compute how fast a task's evaluation loss falls, and its gap to the training loss, measured alike."""
    prefix = f"{PREFIX}task/{name}/"
    alike = next((entry for entry in reversed(log_history) if f"{prefix}eval_loss" in entry), {"step": 0})
    names = ("train_loss", "eval_loss", "train_loss_std_error", "eval_loss_std_error")
    gap = compare_losses([alike["step"]], *([alike.get(prefix + number)] for number in names))
    return {
        "convergence_speed": fit_convergence(list(eval_loss), list(eval_loss.values()), seed=seed),
        "loss_gap": {key: gap[key] for key in ("loss_gap", "std_error", "low", "high", "significant", "note")},
    }


def _curve(log_history: Sequence[dict[str, Any]], key: str) -> Curve:
    """Return the numbers logged as `key`, without metrics that are lists or strings."""
    return {entry["step"]: float(entry[key]) for entry in log_history if isinstance(entry.get(key), (int, float))}


def _generalization_gap(log_history: Sequence[dict[str, Any]], loss: Curve, eval_loss: Curve) -> dict[str, Any]:
    """Return the gap from losses measured alike, else from the log; the best eval loss is always from the log."""
    logged_at = sorted(loss)
    train_losses = [_last_until(step, logged_at, loss) for step in eval_loss]
    unknown = [None] * len(eval_loss)
    logged = compare_losses(list(eval_loss), train_losses, list(eval_loss.values()), unknown, unknown)
    alike = next((entry for entry in reversed(log_history) if f"{PREFIX}train_loss" in entry), None)
    if alike is None:
        if logged["loss_gap"] is not None:
            logged["note"] += f" {RUNNING_MEAN}"
        return {**logged, "measured_alike": False, "examples": None, "metric_gaps": {}}

    names = ("train_loss", "eval_loss", "train_loss_std_error", "eval_loss_std_error")
    measured = compare_losses([alike["step"]], *([alike.get(PREFIX + name)] for name in names))
    if not eval_loss:
        measured["note"] += f" {NO_BEST_LOSS}"
    return {
        **measured,
        **{name: logged[name] for name in ("best_eval_loss", "best_step", "rise_since_best")},
        "measured_alike": True,
        "examples": alike.get(f"{PREFIX}gap_examples"),
        "metric_gaps": _metric_gaps(alike),
        "note": measured["note"].strip(),
    }


def _last_until(step: int, logged_at: list[int], curve: Curve) -> float | None:
    """Return the last value logged at or before a step."""
    logged = bisect_right(logged_at, step)
    return curve[logged_at[logged - 1]] if logged else None


def _metric_gaps(entry: dict[str, Any]) -> dict[str, float]:
    """Train minus eval of every metric that is a finite number on both."""
    train, evaluated = (
        {
            key.removeprefix(f"{PREFIX}{split}_"): value
            for key, value in entry.items()
            if key.startswith(f"{PREFIX}{split}_") and isinstance(value, (int, float)) and math.isfinite(value)
        }
        for split in ("train", "eval")
    )
    names = [name for name in train if name in evaluated and name not in ("loss", "loss_std_error")]
    return {name: float(train[name] - evaluated[name]) for name in names}
