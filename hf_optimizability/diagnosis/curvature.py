# SPDX-License-Identifier: Apache-2.0
"""Rules about the shape of the loss: where its curvature lies, and whether training ended at a minimum."""

from __future__ import annotations

import math
import statistics

from ..linalg.statistics import NORMAL_QUANTILE
from ..measurement.results import Measurement
from ..number_format import format_estimate, format_percent
from ..objective.parameter_blocks import HEAD
from ..report_data.data import ReportData
from .evidence import dead_blocks, error_of, final_measurement, last_measurement
from .outcome import Finding, Fine, NotChecked, Outcome


MIN_BLOCKS = 4
"""Smallest number of blocks among which one can stand out."""

CONCENTRATED_SHARE = 2 / 3
"""Share of the curvature at which a block holds twice as much as all others together."""

NEGATIVE_CURVATURE_RATIO = 0.1
"""`|λ_min|/λ_max` above which negative curvature is significant."""


def curvature_concentrated(report: ReportData) -> Outcome:
    """Report a block that holds most of the curvature."""
    last = last_measurement(report)
    if isinstance(last, NotChecked):
        return last
    if len(last.blocks) < MIN_BLOCKS:
        return NotChecked("blocks", len(last.blocks), MIN_BLOCKS)
    if not all(math.isfinite(error_of(block.trace)) for block in last.blocks.values()):
        return NotChecked("block_errors")
    if dead_blocks(last):
        return Fine("Blocks without a gradient have no curvature either.")
    shares = _least_shares(last)
    name = max(shares, key=shares.__getitem__)
    if shares[name] <= CONCENTRATED_SHARE:
        return Fine()
    block, total = last.blocks[name], sum(abs(block.trace.value) for block in last.blocks.values())
    parameters = sum(block.parameters for block in last.blocks.values())
    return Finding(
        name="curvature_concentrated",
        severity="note",
        sentence=f"Most of the curvature lies in {name}.",
        evidence=(
            f"trace of {name} at step {last.step:,}: {format_estimate(block.trace)}",
            f"that is {format_percent(abs(block.trace.value) / total)} of all blocks' (at least "
            f"{format_percent(shares[name])}), in {format_percent(block.parameters / parameters)} of the parameters",
        ),
        advice=f"Give {name} a lower learning rate{_or_freeze(last, name)}, and the rest may take longer steps: it is "
        "what limits them.",
        source="95 % intervals of the block traces; Dong et al., arXiv 1911.03852, rank layers by them",
    )


def saddle(report: ReportData) -> Outcome:
    """Report significant negative curvature at the end of training."""
    last = final_measurement(report)
    if isinstance(last, NotChecked):
        return last
    if last.curvature != "hessian":
        return NotChecked("hessian")
    bottom, top = last.hessian.lambda_min, last.hessian.lambda_max
    if bottom is None:
        return NotChecked("lambda_min")
    if bottom.high >= -NEGATIVE_CURVATURE_RATIO * abs(top.value):
        return Fine()
    return Finding(
        name="saddle",
        severity="note",
        sentence="Training ended where some direction curves clearly downward: not at a minimum.",
        evidence=(f"λ_min = {format_estimate(bottom)}", f"λ_max = {format_estimate(top)}"),
        advice="Usual after a short fine-tuning. Train longer if the loss still falls.",
        source="Sagun et al., arXiv 1706.04454: after long training, negative eigenvalues are small relative to λ_max",
    )


def _or_freeze(measurement: Measurement, name: str) -> str:
    """Return that a block may be frozen: neither a head, which may be new, nor a block where training happens."""
    relative = {key: b.grad_norm / b.weight_norm for key, b in measurement.blocks.items() if b.weight_norm > 0}
    if name == HEAD or name not in relative or relative[name] >= statistics.median(relative.values()):
        return ""
    return ", or freeze it"


def _least_shares(measurement: Measurement) -> dict[str, float]:
    """Return the share of all blocks' absolute traces that each holds at least, by its own error and the others'."""
    total = sum(abs(block.trace.value) for block in measurement.blocks.values())
    margin = NORMAL_QUANTILE * math.hypot(*(error_of(block.trace) for block in measurement.blocks.values()))
    if not total + margin:  # a loss without curvature, as after divergence
        return dict.fromkeys(measurement.blocks, 0.0)
    return {
        name: (abs(block.trace.value) - NORMAL_QUANTILE * error_of(block.trace)) / (total + margin)
        for name, block in measurement.blocks.items()
    }
