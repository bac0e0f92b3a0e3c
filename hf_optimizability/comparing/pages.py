# SPDX-License-Identifier: Apache-2.0
"""A comparison as text: a page, Markdown, and lines for the terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..linalg.statistics import NORMAL_QUANTILE, standard_error, student_quantile
from ..number_format import (
    MISSING,
    format_estimate,
    format_interval,
    format_number,
    format_percent,
    one_line,
)
from ..report.charts import Chart, Series, make_chart, make_intervals, make_line, rounded
from ..report.html import render_page
from ..report.markdown import markdown_environment
from ..report_data.series import Points, logged, measured_steps
from ..scoring.checkpoint import CheckpointScores
from ..scoring.score import Score
from .ranking import CONFIDENCE, Array, Ranking
from .results import SCREENED_BY, ComparisonData, Entry, Run


SECTIONS = ("summary", "cost", "curves", "dynamics", "candidates", "method")

COLORS = ("blue", "vermillion", "green", "ink")
"""Of the style sheet; where there are more candidates, their colours are steps of a ramp."""

MARKERS = ("circle", "triangle", "diamond", "inverted")

CLOCK_NOISE = 0.1
"""Share by which times differ on one machine from one moment to the next."""

SCALE = {"accuracy": 100.0, "loss": 1.0}
"""What a quality is multiplied with to be shown: accuracies are in percent."""

SCORED = {
    "linear_probe": ("linear probe, %", 100.0),
    "logme": ("LogME", 1.0),
    "alignment": ("gradient alignment", 1.0),
    "predicted_decrease": ("predicted decrease", 1.0),
}
"""Scores before training: what they are called, and what they are multiplied with to be shown."""


def to_html(comparison: ComparisonData) -> str:
    """Render the comparison as one self-contained page, under the same policy as the page of a report.

    Args:
        comparison: The comparison; nothing in it need have been trained.
    """
    values = _values(comparison)
    return render_page(
        "comparison.html.jinja",
        charts(comparison),
        kind="Comparison on",
        title=comparison.setting.dataset or "reports",
        sections=SECTIONS,
        created="",
        versions=comparison.setting.versions,
        **values,
    )


def to_markdown(comparison: ComparisonData) -> str:
    """Render the comparison as GitHub-flavoured Markdown. Text from outside is escaped."""
    text = markdown_environment().get_template("comparison.md.jinja").render(**_values(comparison))
    return re.sub(r"\n{3,}", "\n\n", text)


def to_summary(comparison: ComparisonData) -> str:
    """Render the ranking as aligned lines of plain text, with the verdict below."""
    values = _values(comparison)
    head = ("rank", "candidate", "accuracy", "loss", "P(best)")
    rows = [
        (str(row["rank"]), one_line(row["name"]), row["accuracy"], row["loss"], row["best"]) for row in values["rows"]
    ]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    ]
    screened = ", ".join(entry.name for entry in comparison.entries if entry.dropped == 0)
    left_out = [f"Not trained, by their scores: {screened}."] if screened else []
    failed = [f"{entry.name} failed: {entry.failure.reason}" for entry in values["failed"]]
    return "\n".join([*(lines if rows else []), *map(one_line, [*values["verdict"], *left_out, *failed])])


def charts(comparison: ComparisonData) -> list[Chart]:
    """Return every plot of the page for which there is data."""
    ranked = _ranked(comparison)
    every = [
        _pareto(comparison, "pareto_training", "seconds of training", lambda run: run.train_seconds),
        _pareto(comparison, "pareto_prediction", "milliseconds for a prediction", _milliseconds),
        _curves(ranked, "loss", "training loss", "loss"),
        _curves(ranked, "eval_loss", "evaluation loss", "eval_loss"),
        _curves(ranked, "eval_accuracy", "evaluation accuracy", "eval_accuracy"),
        _measured(ranked, "lambda_max", "λ_max"),
        _measured(ranked, "trace", "Hessian trace"),
    ]
    return [chart for chart in every if chart["series"]]


def _values(comparison: ComparisonData) -> dict[str, Any]:
    """Return the variables of both templates."""
    ranking, settings = comparison.ranking, comparison.setting.settings
    ranked = _ranked(comparison)
    models = [_model_row(entry, settings) for entry in comparison.entries if entry.runs]
    return {
        "setting": comparison.setting,
        "ranking": ranking,
        "verdict": verdict(comparison),
        "rows": _ranking_rows(comparison),
        "pairs": [] if ranking is None else _pairs(ranking, comparison.setting.rank_by),
        "dynamics": [_dynamics_row(entry) for entry in ranked],
        "models": sorted(models, key=lambda row: row["size"]),
        "front": sorted(pareto_front(comparison, lambda run: run.train_seconds)),
        "failed": [entry for entry in comparison.entries if entry.failure is not None],
        "dropped": [entry for entry in comparison.entries if entry.dropped],
        "screened": _score_rows(comparison),
        "score_titles": [title for title, _ in SCORED.values()],
        "screened_by": SCORED[SCREENED_BY][0].partition(",")[0],
        "rounds": comparison.rounds,
        "entries": comparison.entries,
        "confidence": f"{CONFIDENCE:g}",
        "one_seed": len(comparison.setting.seeds) < 2,
    }


def verdict(comparison: ComparisonData) -> list[str]:
    """Return the ranking in sentences; candidates that are statistically tied are called so."""
    ranking, left = comparison.ranking, _ranked(comparison)
    if len(left) == 1 and any(entry.dropped is not None for entry in comparison.entries):
        by = "successive halving" if len(comparison.rounds) > 1 else "its score"
        return [f"{left[0].name} is the one that {by} left: the others were dropped before."]
    if ranking is None:
        return ["There is no ranking: fewer than two candidates have scores to compare."]
    first = [name for name, place in zip(ranking.names, ranking.ranks, strict=True) if place == 1]
    number = len(first)
    if number == 1:
        least = min(ranking.better[0][1:])
        sure = f"of {_share(least)} or more" if least <= 0.999 else "above 0.999"
        return [f"{first[0]} is better than every other candidate, with a probability {sure}."]
    surest = max(max(ranking.better[i][j], ranking.better[j][i]) for i in range(number) for j in range(i + 1, number))
    tied = f"{', '.join(first[:-1])} and {first[-1]} are statistically tied"
    rest = len(ranking.names) - number
    others = "1 other is" if rest == 1 else f"{rest} others are"
    worse = f" {others} worse than at least one of them." if rest else ""
    return [f"{tied}: the likeliest order between two of them has a probability of {_share(surest)}.{worse}"]


def _score_rows(comparison: ComparisonData) -> list[dict[str, Any]]:
    """Return the scores of each candidate before training, the best first."""
    scored = [(entry, entry.scores) for entry in comparison.entries if entry.scores is not None]
    return [
        {
            "name": entry.name,
            "values": [_score(scores.of(name), scale) for name, (_, scale) in SCORED.items()],
            "seconds": format_number(scores.seconds, digits=3),
            "trained": entry.dropped != 0,
            "note": " ".join(dict.fromkeys(map(str, scores.notes.values()))),
        }
        for entry, scores in sorted(scored, key=lambda pair: _decisive(pair[1]), reverse=True)
    ]


def _score(score: Score | None, scale: float) -> str:
    return MISSING if score is None else _around(scale * score.value, NORMAL_QUANTILE * scale * score.std_error)


def _around(value: float, margin: float) -> str:
    return format_interval(value, value - margin, value + margin)


def _decisive(scores: CheckpointScores) -> float:
    score = scores.of(SCREENED_BY)
    return -math.inf if score is None else score.value


def _share(probability: float) -> str:
    """Format a probability; one that no draw contradicts is not certain, but near it."""
    if probability > 0.999:
        return "> 0.999"
    return "< 0.001" if probability < 0.001 else f"{probability:.3f}".rstrip("0")


def _ranked(comparison: ComparisonData) -> list[Entry]:
    """Return the candidates with the whole budget: by rank, or as given where there is no ranking."""
    if comparison.ranking is not None:
        return [comparison.entry(name) for name in comparison.ranking.names]
    return [entry for entry in comparison.entries if entry.failure is None and entry.dropped is None and entry.runs]


def _ranking_rows(comparison: ComparisonData) -> list[dict[str, Any]]:
    """Return a row of the ranking for each candidate in it."""
    ranking = comparison.ranking
    if ranking is None:
        return []
    both = {quality: comparison.by(quality) for quality in ("accuracy", "loss")}
    rows = []
    for at, name in enumerate(ranking.names):
        last = at + 1 == len(ranking.names)
        rows.append(
            {
                "rank": ranking.ranks[at],
                "name": name,
                **{quality: _interval(quality, held, name) for quality, held in both.items()},
                "best": _share(ranking.best[at]),
                "next": MISSING if last else _share(ranking.better[at][at + 1]),
            }
        )
    return rows


def _interval(quality: str, ranking: Ranking | None, name: str) -> str:
    """Format a candidate's value of a quality with its 95 % interval."""
    if ranking is None:
        return MISSING
    at, scale = ranking.names.index(name), SCALE[quality]
    numbers = (scale * number[at] for number in (ranking.values, ranking.low, ranking.high))
    return format_interval(*numbers, unit=" %" if quality == "accuracy" else "")


def _pairs(ranking: Ranking, quality: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the probability that the row's candidate is better than the column's, and the difference."""
    scale = SCALE[quality]
    return [
        (name, [("", "") if i == j else (_share(ranking.better[i][j]),
                                         format_interval(*(scale * end for end in ranking.differences[i][j])))
                for j in range(len(ranking.names))])
        for i, name in enumerate(ranking.names)
    ]  # fmt: skip


def _dynamics_row(entry: Entry) -> dict[str, Any]:
    """Return how a candidate trained: means over its seeds, with their 95 % intervals."""
    runs = entry.runs

    def over_seeds(number: Callable[[Run], float | None]) -> str:
        known = [value for value in map(number, runs) if value is not None and math.isfinite(value)]
        if not known:
            return MISSING
        error = float(standard_error(np.array(known))) if len(known) > 1 else 0.0
        mean = float(np.mean(known))
        text = _around(mean, student_quantile(len(known) - 1) * error) if error else format_number(mean, digits=3)
        return text if len(known) == len(runs) else f"{text} ({len(known)} of {len(runs)} seeds)"

    measured = next((run.report.measurements[-1] for run in runs if run.report.measurements), None)
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    return {
        "name": entry.name,
        "steps": runs[0].report.training.get("max_steps"),
        "half_life": over_seeds(lambda run: _dynamic(run, "convergence_speed", "half_life")),
        "area": over_seeds(lambda run: _dynamic(run, "convergence_speed", "normalized_area")),
        "setbacks": over_seeds(_setbacks),
        "spikes": over_seeds(lambda run: _stability(run, "loss", "spikes")),
        "gap": over_seeds(lambda run: _dynamic(run, "generalization_gap", "loss_gap")),
        "grad_norm": MISSING if measured is None else format_number(measured.grad_norm, digits=3),
        "lambda_max": MISSING if measured is None else format_estimate(measured.hessian.lambda_max),
        "trace": MISSING if measured is None else format_estimate(measured.hessian.trace),
        "seconds": over_seeds(lambda run: run.train_seconds),
        "prediction": over_seeds(_milliseconds),
        "memory": f"{max(peaks) / 2**20:,.0f} MiB" if peaks else MISSING,
    }


def _dynamic(run: Run, module: str, name: str) -> float | None:
    value = run.report.dynamics.get(module, {}).get(name)
    return None if value is None else float(value)


def _stability(run: Run, series: str, name: str) -> float | None:
    value = run.report.dynamics.get("stability", {}).get(series, {}).get(name)
    return None if value is None else float(value)


def _setbacks(run: Run) -> float | None:
    """Return the share of set-backs between consecutive logged training losses, in percent."""
    share = _stability(run, "loss", "setback_share")
    return None if share is None else 100 * share


def _milliseconds(run: Run) -> float | None:
    return None if run.predict_seconds is None else 1000 * run.predict_seconds


def _model_row(entry: Entry, shared: Mapping[str, Any]) -> dict[str, Any]:
    """Return size, source of the weights and architecture."""
    model = entry.model
    random = str({**shared, **entry.changes}.get("random_weights")).lower() in ("true", "t", "yes", "y", "1")
    size, trained = model.parameters or 0, model.trainable_parameters or 0
    return {
        "name": entry.name,
        "size": size,
        "trained": trained,
        "share": format_percent(trained / size) if size else MISSING,
        "source": "none: random weights" if random else model.id or "unknown",
        "architecture": model.class_name or "unknown",
        "optimizer": entry.runs[0].report.training.get("optimizer"),
        "learning_rate": entry.runs[0].report.training.get("learning_rate"),
        "dropped": entry.dropped,
    }


def pareto_front(comparison: ComparisonData, cost: Callable[[Run], float | None]) -> set[str]:
    """Return the candidates not beaten in quality or cost by one that does not significantly lose in the other.

    Qualities differ as in the ranking; costs if the difference is more than twice the standard error over the
    seeds and by more than `CLOCK_NOISE`. Two copies of one checkpoint are both on the front, or both off.

    Args:
        comparison: The comparison.
        cost: Of a run; the mean over the seeds counts.
    """
    ranking = comparison.ranking
    if ranking is None:
        return set()
    costs = [_costs(cost, comparison.entry(name)) for name in ranking.names]
    at = [index for index, held in enumerate(costs) if np.isfinite(held).all()]

    def beats(one: int, other: int) -> bool:
        better, worse = (ranking.better[i][j] >= CONFIDENCE for i, j in ((one, other), (other, one)))
        cheaper, dearer = _clearly_less(costs[one], costs[other]), _clearly_less(costs[other], costs[one])
        return (better and not dearer) or (cheaper and not worse)

    return {ranking.names[i] for i in at if not any(beats(j, i) for j in at if j != i)}


def _clearly_less(one: Array, other: Array) -> bool:
    """Return whether costs, one for each seed, are lower by more than their noise."""
    errors = [float(standard_error(held)) if len(held) > 1 else 0.0 for held in (one, other)]
    return float(other.mean() - one.mean()) > max(2 * math.hypot(*errors), CLOCK_NOISE * float(other.mean()))


def _costs(cost: Callable[[Run], float | None], entry: Entry) -> Array:
    """Return the cost of each of a candidate's runs; NaN where it is unknown."""
    return np.array([math.nan if (value := cost(run)) is None else value for run in entry.runs])


def _pareto(comparison: ComparisonData, identifier: str, x: str, cost: Callable[[Run], float | None]) -> Chart:
    """Plot quality with its interval against cost, a point for each candidate, and the front as a line."""
    ranking, quality = comparison.ranking, comparison.setting.rank_by
    y = f"{quality}, %" if quality == "accuracy" else quality
    if ranking is None:
        return make_chart(identifier, x, y, [])
    scale = SCALE[quality]
    costs = [float(_costs(cost, comparison.entry(name)).mean()) for name in ranking.names]
    front = pareto_front(comparison, cost)
    held = [
        (at, scale * value)
        for name, at, value in zip(ranking.names, costs, ranking.values, strict=True)
        if name in front
    ]
    series: list[Series | None] = [
        make_line("Pareto front", ([at for at, _ in held], [value for _, value in held]), color="ink", dash=True)
    ]
    for i, name in enumerate(ranking.names):
        if math.isfinite(costs[i]):
            point = {"x": [rounded(costs[i])], "y": [rounded(scale * ranking.values[i])]}
            ends = {"low": [rounded(scale * ranking.low[i])], "high": [rounded(scale * ranking.high[i])]}
            style = {**_style(i, len(ranking.names)), "line": False, "tag": str(i + 1)}
            series.append({"label": one_line(f"{i + 1}. {name}"), **point, **ends, **style})
    return make_chart(identifier, x, y, series)


def _style(index: int, number: int) -> dict[str, Any]:
    """Return colour and marker of a candidate."""
    color = {"color": COLORS[index]} if number <= len(COLORS) else {"ramp": index / (number - 1)}
    return {**color, "marker": MARKERS[index % len(MARKERS)]}


def _curves(ranked: Sequence[Entry], key: str, y: str, identifier: str) -> Chart:
    """Plot a logged value of every candidate, the mean over the seeds."""
    series = []
    for index, entry in enumerate(ranked):
        style = _style(index, len(ranked))
        if key == "loss":  # has too many points to mark them
            del style["marker"]
        points = _mean_curve([logged(run.report, key) for run in entry.runs])
        series.append(make_line(entry.name, points, width=2, **style))
    return make_chart(identifier, "optimizer step", y, series)


def _mean_curve(curves: Sequence[Points]) -> Points:
    """Return the mean at each step at which every seed has a value."""
    tables = [dict(zip(*curve, strict=True)) for curve in curves]
    steps = [step for step in tables[0] if all(step in table for table in tables)]
    return steps, [float(np.mean([table[step] for table in tables])) for step in steps]


def _measured(ranked: Sequence[Entry], name: str, y: str) -> Chart:
    """Plot a measured quantity over the steps, of the first seed that was measured."""
    series = []
    for index, entry in enumerate(ranked):
        report = next((run.report for run in entry.runs if run.report.measurements), None)
        if report is not None:
            estimates = [getattr(measurement.hessian, name) for measurement in report.measurements]
            style = {**_style(index, len(ranked)), "width": 2}
            series.append(make_intervals(one_line(entry.name), measured_steps(report), estimates, **style))
    positive = all(value > 0 for one in series if one is not None for value in one["y"] if value is not None)
    return make_chart(name, "optimizer step", y, series, log=positive)
