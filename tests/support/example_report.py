# SPDX-License-Identifier: Apache-2.0
"""A made-up report that looks like a real one, of any size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from hf_optimizability.dynamics.stability import NOTES
from hf_optimizability.linalg.density import density
from hf_optimizability.linalg.estimate import Estimate
from hf_optimizability.linalg.spectrum_and_trace import HessianEstimates
from hf_optimizability.measurement.results import (
    BlockMeasurement,
    Conflict,
    Measurement,
    MeasurementFailure,
    MultitaskMeasurement,
    OptimizerStability,
    TaskBlock,
    TaskMeasurement,
)
from hf_optimizability.objective.self_check import SelfCheck
from hf_optimizability.quantities.batch_sharpness import BatchSharpness
from hf_optimizability.quantities.loss_landscape import Axis, Landscape, LossLine, LossPlane
from hf_optimizability.quantities.step_size import CriticalLearningRate, QuadraticModel
from hf_optimizability.reasons import Reason
from hf_optimizability.report import OptimizabilityReport
from hf_optimizability.report_data.provenance import DataInfo, ModelInfo, ProbeSetInfo, TaskInfo


def make_estimate(value: float, error: float, *, kind: str = "residual", converged: bool = True) -> Estimate:
    """An estimate whose error bar is `error`, of an eigenvalue or (`kind="std_error"`) of an average."""
    width = error if kind == "residual" else 1.96 * error
    errors: dict[str, float] = {kind: error}
    method = "lanczos" if kind == "residual" else "hutchinson"
    return Estimate(value, value - width, value + width, method, hvps=32, converged=converged, **errors)


def make_landscape(present: float, top: float, *, converged: bool = True) -> Landscape:
    """Slices through a loss that flattens away from its minimum, where the quadratic model does not."""

    def flattened(change: float) -> float:
        return present + 2 * present * math.tanh(change / present / 2)

    rates = sorted([2e-5, *(2.6e-4 * (index / 10 - 0.5) for index in range(21))])
    update = Axis(tuple(rates), 14.2, -700 * present, 7e6 * present)
    at = tuple(index / 5 - 1 for index in range(11))
    first = Axis(at, math.sqrt(2 * present / top), -0.8 * present, 2 * present)
    second = Axis(at, math.sqrt(4 * present / top), -0.2 * present, 2 * present)
    return Landscape(
        update=LossLine(update, tuple(flattened(update.quadratic_change(s)) for s in update.at)),
        eigenvectors=LossPlane(
            (first, second),
            (make_estimate(top, 0.0312), make_estimate(top / 2, 0.3, converged=converged)),
            tuple(tuple(flattened(first.quadratic_change(s) + second.quadratic_change(t)) for s in at) for t in at),
        ),
    )


def make_several(measurement: Measurement, names: Sequence[str]) -> MultitaskMeasurement:
    """Tasks that share a measurement, each with a part of its gradient; of the first, one number is not known."""
    weight = 1 / len(names)

    def number(value: float, low: float, high: float) -> Estimate:
        return Estimate(value, low, high, "jackknife", 0, converged=math.isfinite(low), std_error=(high - low) / 4)

    tasks = {
        name: TaskMeasurement(
            num_items=measurement.num_items // len(names),
            batches=8,
            weight=weight,
            loss=make_estimate(measurement.loss * (1 + index / 10), 0.02, kind="std_error"),
            grad_norm=measurement.grad_norm * (1 + index),
            signal_norm=number(measurement.grad_norm, 0.5, 1.5),
            share=number(0.9 if index else 0.1, 0.75 if index else -math.inf, 1.1 if index else math.inf),
            noise_scale=number(20.0, 10.0, 60.0),
            trace=make_estimate(measurement.hessian.trace.value * (1 + index), 12.0, kind="std_error"),
            lambda_max=make_estimate(8.0, 0.05) if index else None,
            curvature_along_gradient=3.2,
            equal_norm_weight=number(weight, 0.1, 0.9),
            min_norm_weight=number(weight, 0.0, 1.0),
            blocks={block: TaskBlock(own.grad_norm, own.trace) for block, own in measurement.blocks.items()},
        )
        for index, name in enumerate(names)
    }
    conflicts = [
        Conflict(
            first,
            second,
            number(-0.4, -0.6, -0.2),
            {block: number(0.3, -0.1, 0.6) if index else None for index, block in enumerate(measurement.blocks)},
        )
        for first, second in combinations(names, 2)
    ]
    return MultitaskMeasurement(tasks, tuple(conflicts))


def make_measurement(step: int = 0, *, blocks: int = 8, total: int = 300, converged: bool = True) -> Measurement:
    """The measurement at `step` of a run of `total` steps: loss falls, gradient and curvature shrink."""
    rng = np.random.default_rng(step + 1)
    decay = math.exp(-3 * step / total)
    names = ["embeddings", *(f"layer.{index}" for index in range(blocks - 2)), "head"]
    profile = np.exp(np.linspace(-1.5, 1.5, blocks)) * rng.lognormal(0, 0.3, blocks)
    traces = 361 * (0.3 + decay) * profile / profile.sum()
    traces[1] *= -0.4
    measured = {
        name: BlockMeasurement(
            parameters=11_720_448 if index == 0 else 1_774_464 if index < blocks - 1 else 770,
            grad_norm=float(2 * (0.1 + decay) * profile[index] / math.sqrt(blocks)),
            weight_norm=float(30 * rng.lognormal(0, 0.2)),
            trace=make_estimate(float(traces[index]), abs(float(traces[index])) * 0.2 + 0.5, kind="std_error"),
        )
        for index, name in enumerate(names)
    }
    top = 9.0213 * (0.4 + decay)
    ritz = np.sort(np.concatenate([rng.laplace(0, 0.3, 20), top * np.array([0.3, 0.55, 1.0])]))
    weights = np.exp(-4 * np.abs(ritz)) + 1e-7
    trace = make_estimate(float(traces.sum()), 43.4 * (0.3 + decay), kind="std_error", converged=converged)
    weights /= weights.sum()
    residuals = np.where(np.abs(ritz) > 2, 1e-3, 0.3)
    hessian = HessianEstimates(
        trace=dataclasses.replace(trace, data_std_error=152.3 * (0.3 + decay)),
        lambda_max=make_estimate(float(ritz[-1]), 0.0312),
        lambda_min=make_estimate(float(ritz[0]), 0.08, converged=converged),
        ritz_values=tuple(ritz.tolist()),
        ritz_weights=tuple(weights.tolist()),
        density=density(ritz, weights[None], residuals, size=22_713_986, hvps=32, tolerance=0.1),
    )
    return Measurement(
        step=step,
        epoch=3 * step / total,
        loss=0.15 + 0.55 * decay,
        num_items=64,
        grad_norm=math.sqrt(sum(block.grad_norm**2 for block in measured.values())),
        hessian=hessian,
        blocks=measured,
        curvature="hessian",
        quadratic_model=QuadraticModel(4.1 * decay, 14.2 * decay, 0.2887, 0.592 * decay),
        noise_scale=Estimate(35.2, 20.1, 88.4 if step else math.inf, "jackknife", 0, converged=bool(step)),
        optimizer_stability=OptimizerStability(
            optimizer="AdamW",
            learning_rate=2e-5,
            sharpness=make_estimate(6.41e5 * (0.4 + decay), 2.1e3),
            limit=1.9e6,
            critical=CriticalLearningRate(2.6e-4, low=2.3e-4, high=2.9e-4, forward_passes=8, converged=True),
            peak_learning_rate=5e-5,
        ),
        landscape=make_landscape(0.15 + 0.55 * decay, top, converged=converged),
        multitask=None,
        engine="double_backward",
        fallback=None,
        central_difference_error=None,
        attention="math",
        dtype="float32",
        batch_size=16,
        unused_embedding_parameters=0,
        hvps=56,
        seconds=7.31,
        self_check=SelfCheck(False, "items", True, 1.2e-7, (2e-5, None), ("layer.0.weight",), ("layer.0", "layer.1")),
        batch_sharpness=BatchSharpness(
            sharpness=Estimate(24.5, 18.2, 33.1, "jackknife", 30, converged=False, std_error=3.1, data_std_error=3.1),
            preconditioned=Estimate(8.1e5, 6.2e5, 1.1e6, "jackknife", 30, True, std_error=7e4, data_std_error=7e4),
            items=32.0,
            batches=30,
        ),
    )


def make_log(names: list[str], *, total: int = 300, every: int = 10) -> list[dict[str, Any]]:
    """A log as the Trainer writes it: training logs, an evaluation per epoch, the summary at the end."""
    rng = np.random.default_rng(0)
    log: list[dict[str, Any]] = []
    for step in range(every, total + 1, every):
        decay = math.exp(-3 * step / total)
        norms = [
            float((0.1 + decay) * rng.lognormal(0, 0.4)) * 2 * 15 ** (index / len(names) - 1)
            for index in range(len(names))
        ]
        loss = 0.2 + 0.5 * decay + float(rng.normal(0, 0.03))
        log.append({"loss": loss, "grad_norm": math.hypot(*norms), "learning_rate": 2e-5, "step": step})
        log[-1].update(
            (f"optimizability/train_grad_norm/{name}", norm) for name, norm in zip(names, norms, strict=True)
        )
        if step % (total // 3) == 0:
            log.append({"eval_loss": 0.3 + 0.4 * decay, "eval_accuracy": 0.9 - 0.3 * decay, "step": step})
    return [*log, {"train_runtime": 61.0, "train_loss": 0.4, "step": total}]


def make_dynamics() -> dict[str, Any]:
    """Results of the three training dynamics modules."""
    series = {
        "setbacks": 3,
        "comparisons": 29,
        "setback_share": 3 / 29,
        "setback_share_low": 0.036,
        "setback_share_high": 0.264,
        "mean_setback": 0.021,
        "largest_setback": 0.048,
        "spikes": 0,
        "non_finite": 0,
        "note": None,
    }
    return {
        "convergence_speed": {
            "half_life": 68.4,
            "half_life_low": 55.2,
            "half_life_high": 88.1,
            "steps_to_90": 227.1,
            "steps_to_90_low": 190.2,
            "steps_to_90_high": 281.0,
            "initial_loss": 0.6931,
            "final_loss": 0.2249,
            "drop": 0.4682,
            "normalized_area": 0.3127,
            "points": 30,
            "note": None,
        },
        "stability": {
            "loss": series,
            "eval_loss": {
                **series,
                "setbacks": 0,
                "comparisons": 2,
                "mean_setback": None,
                "note": NOTES["few_for_spikes"].format(points=3, needed=8),
            },
        },
        "generalization_gap": {
            "loss_gap": 0.0812,
            "std_error": 0.0214,
            "low": 0.0393,
            "high": 0.1231,
            "significant": True,
            "measured_alike": True,
            "examples": 64,
            "metric_gaps": {"accuracy": 0.031},
            "best_eval_loss": 0.3199,
            "best_step": 300,
            "rise_since_best": 0.0,
            "note": None,
        },
    }


def make_report(
    measurements: int = 3, *, blocks: int = 8, failures: int = 0, total: int = 300, converged: bool = True
) -> OptimizabilityReport:
    """A report with that many measurements, evenly spread over `total` steps, and failures."""
    steps = [round(step) for step in np.linspace(0, total, measurements)] if measurements != 1 else [total]
    measured = [make_measurement(step, blocks=blocks, total=total, converged=converged) for step in steps]
    failure = MeasurementFailure(
        step=100,
        epoch=1.0,
        why=Reason("no_second_derivative", error="NotImplementedError"),
    )
    return OptimizabilityReport(
        model=ModelInfo(
            id="sentence-transformers/all-MiniLM-L6-v2",
            class_name="BertForSequenceClassification",
            parameters=22_713_986,
            trainable_parameters=22_713_986,
        ),
        task=TaskInfo(task="text-classification", loss="the Trainer's loss"),
        data=DataInfo(
            train_examples=1600,
            eval_examples=400,
            probe=ProbeSetInfo(examples=64, items=64, batches=4, fingerprint="5f2a9c01d3e7b684"),
        ),
        training={"optimizer": "AdamW", "optimizer_settings": {"betas": [0.9, 0.999]}, "learning_rate": 2e-5},
        config={
            "profile": "standard",
            "probe_seed": 0,
            "trace_tolerance": 0.1,
            "eigen_tolerance": 0.01,
            "max_hvps": 64,
        },
        versions={"hf_optimizability": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        measurements=measured,
        failures=[failure] * failures,
        dynamics=make_dynamics() if measurements else {},
        log_history=make_log(list(measured[-1].blocks), total=total) if measured else [],
        created="2026-01-02T03:04:05+00:00",
    )


def fill_provenance(report: OptimizabilityReport, text: str) -> None:
    """Put a text wherever the report says in words where its numbers come from."""
    report.model = dataclasses.replace(report.model, id=text, class_name=text)
    report.task = TaskInfo(task=text, loss=text)
    assert report.data.probe is not None
    probe = dataclasses.replace(report.data.probe, fingerprint=text)
    report.data = dataclasses.replace(report.data, dataset=text, probe=probe)
    for part in (report.training, report.versions, report.config):
        part.update({name: text for name, value in part.items() if isinstance(value, str)})


def with_tasks(report: OptimizabilityReport, names: Sequence[str]) -> OptimizabilityReport:
    """The report with its measurements told by task."""
    measured = [dataclasses.replace(m, multitask=make_several(m, names)) for m in report.measurements]
    gap = {"loss_gap": 0.05, "std_error": 0.02, "low": 0.01, "high": 0.09, "significant": True, "note": ""}
    by_task = {name: {"convergence_speed": report.dynamics["convergence_speed"], "loss_gap": gap} for name in names}
    return dataclasses.replace(report, measurements=measured, dynamics={**report.dynamics, "tasks": by_task})
