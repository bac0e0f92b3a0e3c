# SPDX-License-Identifier: Apache-2.0
"""The tables of `benchmarks/prediction.py`, from what it found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rank_correlation import Array, Table, filled, fit, mean_tau, out_of_sample, tau


class Quantity(NamedTuple):
    """What is known early: its name, whether more (1) or less (-1) of it is meant to be better, and its cost."""

    title: str
    sign: int
    cost: str


BEFORE = {
    "linear_probe": Quantity("linear probe", 1, "linear_probe"),
    "logme": Quantity("LogME", 1, "logme"),
    "alignment": Quantity("gradient alignment", 1, "alignment"),
    "predicted_decrease": Quantity("predicted decrease", 1, "predicted_decrease"),
}
"""Scores before any training."""

EARLY = {
    "early_loss": Quantity("training loss", -1, "early"),
    "loss_drop": Quantity("drop of the training loss", 1, "early"),
    "extrapolated": Quantity("training loss, extrapolated", -1, "early"),
    "half_life": Quantity("half-life so far", -1, "early"),
    "eval_loss": Quantity("evaluation loss", -1, "evaluation"),
    "eval_accuracy": Quantity("evaluation accuracy", 1, "evaluation"),
    "gap": Quantity("generalization gap", -1, "gap"),
    "grad_norm": Quantity("gradient norm", -1, "measurement"),
    "trace": Quantity("Hessian trace", -1, "measurement"),
    "lambda_max": Quantity("λ_max", -1, "measurement"),
    "sharpness": Quantity("sharpness over its limit", -1, "measurement"),
    "critical_rate": Quantity("critical over present learning rate", 1, "measurement"),
    "decrease": Quantity("predicted decrease", 1, "measurement"),
    "noise_scale": Quantity("gradient noise scale", -1, "measurement"),
}
"""What is known after a tenth of the steps."""

SHORT = {
    "short_accuracy": Quantity("evaluation accuracy", 1, "short"),
    "short_loss": Quantity("evaluation loss", -1, "short"),
}
"""What is known at the end of a training of a tenth of the steps with a schedule of its own."""

GROUPS = {"before training": BEFORE, "at a tenth": EARLY, "of a short training": SHORT}

QUANTITIES = {**BEFORE, **EARLY, **SHORT}

BASELINES = ("early_loss", "logme", "linear_probe")

COMBINATIONS: dict[str, tuple[str, ...]] = {
    "of all scores before training": tuple(BEFORE),
    "of the baselines": BASELINES,
    "of losses and evaluations": ("early_loss", "loss_drop", "extrapolated", "eval_loss", "eval_accuracy"),
    "of everything": (*BEFORE, *EARLY),
    "of a short training": tuple(SHORT),
    "of a short training and all scores before it": (*BEFORE, *SHORT),
}


def page(results: Mapping[str, Any]) -> str:
    """Return the whole page."""
    lines = ["# What is known early", "", "What `python benchmarks/prediction.py` found.", "", tables(results), ""]
    for task, runs in results["tasks"].items():
        lines += [f"## {task}", "", "| candidate | accuracy, % | loss |", "|:--|--:|--:|"]
        for name in sorted(runs, key=lambda name: -runs[name]["final"]["accuracy"]):
            final = runs[name]["final"]
            loss = "–" if final["loss"] is None else f"{final['loss']:.3f}"
            lines.append(f"| {name} | {100 * final['accuracy']:.1f} | {loss} |")
        lines.append("")
    return "\n".join(lines)


def tables(results: Mapping[str, Any]) -> str:
    """Rank correlations of single quantities and of combinations, as Markdown."""
    steps, look, results = results["steps"], results["look"], results["tasks"]
    number = ", ".join(f"{len(runs)} on {task}" for task, runs in results.items())
    about = f"Candidates: {number}. {steps} steps each, looked at after {look}; means over two seeds."
    final = {task: _column(runs, lambda run: run["final"]["accuracy"]) for task, runs in results.items()}
    known = {name: oriented(results, name) for name in QUANTITIES}
    heads = ["known", "mean τ (95 % interval)", *results, "cost, %"]
    lines = [about, "", _row(heads), _row([":--"] + ["--:"] * (len(heads) - 1)), _ceiling(results)]
    for group, quantities in GROUPS.items():
        found = {name: mean_tau(known[name], final) for name in quantities}
        for name in sorted(found, key=lambda name: -found[name][0]):
            quantity = quantities[name]
            arrow = "↑" if quantity.sign > 0 else "↓"
            by_task = [f"{tau(known[name][task], final[task]):.2f}" for task in results]
            share = np.median([run["cost"][quantity.cost] for runs in results.values() for run in runs.values()])
            lines.append(
                _row([f"{quantity.title} {arrow}, {group}", _interval(found[name]), *by_task, f"{100 * share:.0f}"])
            )
    lines += ["", *_combinations(known, final)]
    return "\n".join(lines)


def _ceiling(results: Mapping[str, Any]) -> str:
    """How well the end of the trainings with one seed tells that of the others."""
    by_seed = [
        {
            task: _column(runs, lambda run, at=at: run["final"]["accuracy_by_seed"][at])
            for task, runs in results.items()
        }
        for at in (0, 1)
    ]
    first, second = by_seed
    by_task = [f"{tau(first[task], second[task]):.2f}" for task in results]
    return _row(
        ["accuracy at the end, of one seed for the other's", _interval(mean_tau(first, second)), *by_task, "100"]
    )


def _combinations(known: Mapping[str, Table], final: Table) -> Iterator[str]:
    """Yield the combinations, each tested on a task it was not fitted on, and their weights from all tasks."""
    heads = ["combination", "mean τ (95 % interval)", *final, "weights, fitted on all tasks"]
    yield _row(heads)
    yield _row([":--", *["--:"] * (len(final) + 1), ":--"])
    titles = {name: quantity.title for name, quantity in QUANTITIES.items()}
    titles["decrease"] += " at a tenth"
    for title, names in COMBINATIONS.items():
        columns = {task: np.column_stack([known[name][task] for name in names]) for task in final}
        predicted = out_of_sample(columns, final)
        by_task = [f"{tau(predicted[task], final[task]):.2f}" for task in final]
        weights = fit(columns, final, list(final))
        told = [
            f"{titles[name]} {weight:.2f}"
            for weight, name in sorted(zip(weights, names, strict=True), key=lambda pair: -abs(pair[0]))
            if abs(weight) >= 0.05
        ]
        yield _row([title, _interval(mean_tau(predicted, final)), *by_task, ", ".join(told)])


def oriented(results: Mapping[str, Any], name: str) -> Table:
    """Return a quantity by task, oriented so that more is better; unknown values come last."""
    sign = QUANTITIES[name].sign
    return {task: filled(sign * _column(runs, lambda run: run["known"].get(name))) for task, runs in results.items()}


def _column(runs: Mapping[str, Any], number: Any) -> Array:
    return np.array([np.nan if (value := number(run)) is None else value for run in runs.values()], dtype=float)


def _interval(found: tuple[float, float, float]) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*found)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
