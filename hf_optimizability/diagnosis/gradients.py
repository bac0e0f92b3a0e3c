# SPDX-License-Identifier: Apache-2.0
"""Rules about gradients that vanish, explode or do not arrive."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ..number_format import format_number
from ..objective.parameter_blocks import EMBEDDINGS, HEAD
from ..report_data.data import ReportData
from .evidence import MAX_NAMED, dead_blocks, died_blocks, enumeration, last_measurement
from .learning_rate import against_raising
from .outcome import Finding, Fine, NotChecked, Outcome


LAYER_GRADIENT_RATIO = 1000.0
"""Factor between one layer's ‖g_b‖/‖θ_b‖ and another's. Layers of healthy small runs stayed within 5; not yet measured
on large ones."""

MIN_LAYERS = 3
"""Smallest number of layers whose median is that of the others, where one stands out."""


def gradients_dead(report: ReportData) -> Outcome:
    """Report blocks that no gradient reaches."""
    last = last_measurement(report)
    if isinstance(last, NotChecked):
        return last
    dead = dead_blocks(last)
    if not dead:
        return Fine()
    return Finding(
        name="gradients_dead",
        severity="problem",
        sentence=f"No gradient reaches {enumeration(dead)}.",
        evidence=tuple(
            f"{name}: ‖g_b‖ = {format_number(last.blocks[name].grad_norm, digits=3)} at step {last.step:,}, "
            f"‖g‖ = {format_number(last.grad_norm, digits=3)}"
            for name in dead[:MAX_NAMED]
        ),
        advice=_revive(report, dead),
        source="rounding of float32; Lu et al., arXiv 1903.06733, on dying ReLUs",
    )


def _revive(report: ReportData, dead: Sequence[str]) -> str:
    """Return what to do about dead blocks, by when they died."""
    if died_blocks(report):
        return (
            "Start again with a lower learning rate or a longer warm-up. A gradient reached these blocks at the "
            "start: their units are now stuck, at 0 behind a ReLU or where an activation saturates."
        )
    freeze = "" if HEAD in dead else "; freeze those"
    return (
        "Look for units stuck at 0 behind a ReLU (a bias far below 0), and for parameters that the loss does not "
        f"depend on{freeze}."
    )


def gradients_vanishing(report: ReportData) -> Outcome:
    """Report layers with a far smaller gradient, relative to their weights, than the other layers."""
    relative = relative_gradients(report)
    if isinstance(relative, NotChecked):
        return relative
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
        advice="These layers hardly learn with SGD. Give them "
        f"{'' if against_raising(report) else 'a higher learning rate, '}a normalization or a residual connection; or "
        "freeze them and save their price.",
    )


def gradients_exploding(report: ReportData) -> Outcome:
    """Report layers with a far larger gradient, relative to their weights, than the other layers."""
    relative = relative_gradients(report)
    if isinstance(relative, NotChecked):
        return relative
    return _outlying_layers(
        report,
        relative,
        _exploding_layers(relative),
        name="gradients_exploding",
        sentence="The gradient explodes in {}.",
        advice="Give these layers a lower learning rate, a normalization or a smaller initial scale. Clipping by the "
        "norm of the whole gradient makes them starve the rest.",
    )


def relative_gradients(report: ReportData) -> dict[str, float] | NotChecked:
    """Return ‖g_b‖/‖θ_b‖ by layer, without embeddings (few gradients) and head (small weights): layers are alike."""
    last = last_measurement(report)
    if isinstance(last, NotChecked):
        return last
    other = {EMBEDDINGS, HEAD, *dead_blocks(last)}
    layers = {name: block for name, block in last.blocks.items() if name not in other and block.weight_norm > 0}
    if len(layers) < MIN_LAYERS:
        return NotChecked("blocks", len(layers), MIN_LAYERS)
    return {name: block.grad_norm / block.weight_norm for name, block in layers.items()}


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
) -> Outcome:
    if not layers:
        return Fine()
    median = format_number(statistics.median(relative.values()), digits=3)
    return Finding(
        name=name,
        severity="warning",
        sentence=sentence.format(enumeration(layers)),
        evidence=(
            *(f"‖g_b‖/‖θ_b‖ of {layer}: {format_number(relative[layer], digits=3)}" for layer in layers[:MAX_NAMED]),
            f"median of the layers: {median}, at step {report.measurements[-1].step:,}",
        ),
        advice=advice,
        source="Glorot and Bengio 2010, section 4; ‖g‖/‖θ‖ by layer: You et al., arXiv 1708.03888",
    )
