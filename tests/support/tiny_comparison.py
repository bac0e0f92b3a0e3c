# SPDX-License-Identifier: Apache-2.0
"""Comparisons of tiny models, and trainings whose scores are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hf_optimizability import OptimizabilityReport
from hf_optimizability.comparing.results import Run, Scores
from hf_optimizability.comparing.training import Inputs
from hf_optimizability.report_data.provenance import ModelInfo


def flags_of(inputs: Path, output: Path) -> dict[str, Any]:
    """What candidates share; a training takes some tenths of a second."""
    data = str(inputs / "data.parquet")
    return {
        "model_name_or_path": str(inputs / "tiny-bert"), "train_file": data, "validation_file": data,
        "text_column_name": ["sentence"], "ignore_mismatched_sizes": True, "cache_dir": str(inputs / "cache"),
        "output_dir": str(output), "budget_steps": 4, "seeds": 2, "measured_seeds": 0,
        "per_device_train_batch_size": 4, "learning_rate": 1e-3, "probe_examples": 4, "max_hvps": 16,
        "pool_examples": 0,
        "dataloader_pin_memory": False,
    }  # fmt: skip


def trained(inputs: Inputs, *, quality: float, examples: int = 200) -> Run:
    """A run whose accuracy is about `quality`, with luck of examples and seeds that all candidates share."""
    seed = inputs.training.seed
    luck = np.random.default_rng(0).uniform(size=examples) + 0.02 * np.random.default_rng(seed).normal()
    right = luck < quality
    report = OptimizabilityReport(model=ModelInfo(id="org/a", parameters=7, trainable_parameters=7))
    report.training["max_steps"] = inputs.training.max_steps
    return Run(seed, report, Scores(np.where(right, 0.1, 2.0), right), train_seconds=1.0, predict_seconds=0.001)
