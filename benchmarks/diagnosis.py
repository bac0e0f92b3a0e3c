# SPDX-License-Identifier: Apache-2.0
"""What the report says of runs that are known to differ in one thing: weights, learning rate, optimizer, labels.

MobileNetV2 on 640 handwritten digits of 32 × 32 pixels, 100 steps with batches of 32: pretrained, with AdamW at 1e-3,
and then with one thing changed. Every training is measured before, half way and at the end.

    python benchmarks/diagnosis.py [--only NAME ...]

keeps the reports of what was trained in `out/benchmarks/diagnosis`, does not train it again, and writes
`benchmarks/results/diagnosis.json` and the picture in `docs/images`, and prints the table of `docs/diagnosis.md`.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import HfArgumentParser, PrinterCallback, TrainingArguments
from workloads import CACHE, VISION_CHECKPOINT, VISION_DATA

from hf_optimizability import OptimizabilityConfig, OptimizabilityReport, OptimizabilityTrainer
from hf_optimizability.files import write_atomically
from hf_optimizability.linalg.statistics import NORMAL_QUANTILE
from hf_optimizability.number_format import format_estimate, format_interval, format_number
from hf_optimizability.report.figures import BLUE, GREEN, VERMILLION
from hf_optimizability.tasks import image_classification as task
from hf_optimizability.tasks.fine_tuning import load, parse_arguments


RESULTS = Path(__file__).parent / "results" / "diagnosis.json"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "diagnosis.png"
SETTINGS: dict[str, Any] = {
    "model_name_or_path": str(VISION_CHECKPOINT), "config_overrides": "classifier_dropout_prob=0.2",
    "batch_norm_momentum": 0.1, "dataset_name": str(VISION_DATA), "image_size": 32, "max_train_samples": 640,
    "max_eval_samples": 300, "per_device_train_batch_size": 32, "per_device_eval_batch_size": 100, "max_steps": 100,
    "learning_rate": 1e-3, "lr_scheduler_type": "linear", "warmup_steps": 6, "eval_strategy": "steps",
    "eval_steps": 20, "logging_steps": 4, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    "dataloader_pin_memory": False, "measure_strategy": "steps", "measure_steps": 50, "profile": "light",
    "probe_examples": 48, "probe_batch_size": 8, "max_hvps": 24,
}  # fmt: skip
NOISE = 0.4
"""Share of the training labels replaced by a random one."""


@dataclass(frozen=True)
class Case:
    """One training: what is changed in it, with which other it is shown."""

    pair: str
    changes: dict[str, Any] = field(default_factory=dict)
    noisy: bool = False


CASES: dict[str, Case] = {
    "as usual": Case("as usual"),
    "random weights": Case("weights", {"random_weights": True}),
    "learning rate / 30": Case("learning rate", {"learning_rate": 1e-3 / 30}),
    "learning rate × 30": Case("learning rate", {"learning_rate": 3e-2}),
    "SGD with momentum": Case("optimizer", {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 1e-2}),
    "Adafactor": Case(
        "optimizer",
        {"optim": "adafactor", "optim_args": "relative_step=False,scale_parameter=False,warmup_init=False"},
    ),
    "noisy labels": Case("labels", noisy=True),
}
PAIRS = tuple(dict.fromkeys(case.pair for case in CASES.values() if case.pair != "as usual"))
COLOURS = (BLUE, VERMILLION, GREEN)


def train(name: str) -> OptimizabilityReport:
    """Trains one case, measured; or loads what it left before."""
    folder = CACHE / "diagnosis" / name.replace(" ", "-").replace("/", "by")
    if (folder / "report.json").exists():
        return OptimizabilityReport.load(folder)
    case = CASES[name]
    parts = (task.ModelArguments, task.DataArguments, OptimizabilityConfig, TrainingArguments)
    parser = HfArgumentParser(parts)  # type: ignore[arg-type]  # its annotation fits no dataclass
    values = {**SETTINGS, **case.changes, "output_dir": str(folder / "trainer")}
    model_args, data_args, config, args = parse_arguments(parser, [], values=values)
    inputs = load(task, model_args, data_args, args)
    if case.noisy:
        inputs = replace(inputs, train_dataset=with_noise(inputs.train_dataset, data_args.label_column_name))
    trainer = OptimizabilityTrainer(args=args, optimizability=config, **inputs.as_kwargs())
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    report = trainer.optimizability_report()
    report.save(folder)
    shutil.rmtree(folder / "trainer")
    del trainer
    gc.collect()
    return report


def with_noise(examples: Dataset, column: str) -> Dataset:
    """Draw a share of the examples' labels at random."""
    generator = np.random.default_rng(0)
    plain = examples.with_format(None)
    labels = np.array(plain[column])
    drawn = generator.random(len(labels)) < NOISE
    labels[drawn] = generator.integers(labels.max() + 1, size=drawn.sum())
    noisy = plain.remove_columns(column).add_column(column, labels.tolist(), feature=plain.features[column])
    return noisy.with_transform(examples.format["format_kwargs"]["transform"])


def row(report: OptimizabilityReport) -> dict[str, Any]:
    """Extract from a report what table and pictures show."""
    last, convergence = report.measurements[-1], report.dynamics["convergence_speed"]
    logged = report.log_history
    return {
        "accuracy": [entry["eval_accuracy"] for entry in logged if "eval_accuracy" in entry][-1],
        "eval_loss": [entry["eval_loss"] for entry in logged if "eval_loss" in entry][-1],
        "losses": [[entry["step"], entry["loss"]] for entry in logged if "loss" in entry],
        "lambda_max": [
            [one.step, one.hessian.lambda_max.value, one.hessian.lambda_max.error] for one in report.measurements
        ],
        "trace": format_estimate(last.hessian.trace),
        "top": format_estimate(last.hessian.lambda_max),
        "half_life": convergence["half_life"],
        "findings": [[finding.name, finding.severity, finding.sentence] for finding in report.findings],
        "gap": [report.dynamics["generalization_gap"][name] for name in ("loss_gap", "std_error")],
    }


def plot(rows: dict[str, dict[str, Any]]) -> Figure:
    """Loss and λ_max over the steps, a column for each thing that is changed, next to the usual run."""
    figure = Figure(figsize=(11, 5), layout="constrained", dpi=100)
    panels = figure.subplots(2, len(PAIRS), sharex=True, sharey="row")
    for column, pair in enumerate(PAIRS):
        shown = ["as usual", *(name for name in rows if CASES[name].pair == pair)]
        for name, colour in zip(shown, COLOURS, strict=False):
            loss, top = (np.array(rows[name][key], dtype=float) for key in ("losses", "lambda_max"))
            panels[0, column].plot(loss[:, 0], loss[:, 1], color=colour, label=name)
            panels[1, column].errorbar(top[:, 0], top[:, 1], yerr=top[:, 2], color=colour, marker="o", ms=4, capsize=3)
        panels[0, column].set(title=pair, yscale="log")
        panels[1, column].set(xlabel="optimizer step", yscale="log")
        panels[0, column].legend(frameon=False, fontsize=8)
    panels[0, 0].set_ylabel("training loss")
    panels[1, 0].set_ylabel("λ_max")
    return figure


def table(rows: dict[str, dict[str, Any]]) -> str:
    """One row a training."""
    lines = [
        "| run | accuracy, % | eval loss | eval − train | half-life, steps | trace | λ_max | findings |",
        "|:--|--:|--:|--:|--:|--:|--:|:--|",
    ]
    for name, held in rows.items():
        findings = ", ".join(f"`{found}`" for found, severity, _ in held["findings"] if severity != "note") or "–"
        life = held["half_life"]
        numbers = [f"{100 * held['accuracy']:.1f}", format_number(held["eval_loss"])]
        gap, error = held["gap"]
        numbers.append(format_interval(gap, gap - NORMAL_QUANTILE * error, gap + NORMAL_QUANTILE * error))
        numbers += ["–" if life is None else format_number(life), held["trace"], held["top"]]
        lines.append(f"| {name} | {' | '.join(numbers)} | {findings} |")
    return "\n".join(lines)


def main() -> None:
    """Trains what is asked for, and writes all that was trained so far."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in parser.parse_args().only:
        results[name] = row(train(name))
    results = {name: results[name] for name in CASES if name in results}
    write_atomically(RESULTS, (json.dumps(results, indent=1) + "\n").encode())
    picture = io.BytesIO()
    plot(results).savefig(picture)
    write_atomically(PICTURE, picture.getvalue())
    print(table(results))


if __name__ == "__main__":
    main()
