# SPDX-License-Identifier: Apache-2.0
"""Findings: small real runs that have an illness and that have not, and both sides of every threshold."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_optimizability import OptimizabilityConfig, OptimizabilityReport, OptimizabilityTrainer
from hf_optimizability.report import findings
from hf_optimizability.report.findings import FINDINGS, SEVERITIES, Finding, find

from .example import make_estimate, make_report


Rows = list[dict[str, Any]]


class Perceptron(nn.Module):
    """Layers on digits, with the interface of a Transformers model."""

    def __init__(self, *, layers: int = 3, width: int = 32, activation: Callable[[], nn.Module] = nn.ReLU):
        super().__init__()
        sizes = [64, *[width] * layers]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(sizes, sizes[1:], strict=False))
        self.activation = activation()
        self.classifier = nn.Linear(width, 10)
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight)

    def forward(self, pixels: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        for layer in self.layers:
            pixels = self.activation(layer(pixels))
        logits = self.classifier(pixels)
        return SequenceClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def digits(number: int, *, start: int = 0, wrong: float = 0.0) -> Rows:
    """Rows of scikit-learn's digits; labels are drawn at random with probability `wrong`."""
    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(labels))
    labels = np.where(rng.random(len(labels)) < wrong, rng.integers(0, 10, len(labels)), labels)
    chosen = order[start : start + number]
    pixels = torch.tensor(images[chosen] / 8 - 1, dtype=torch.float32)
    return [{"pixels": row, "labels": int(label)} for row, label in zip(pixels, labels[chosen], strict=True)]


def trained(folder: Path, own: nn.Module | None = None, *, config: dict[str, Any] | None = None, **options: Any):
    """The report of a run of a perceptron on digits, as it comes back from its file."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "train_dataset": digits(400), "eval_dataset": digits(400, start=1000), "max_steps": 90, "logging_steps": 2,
        "per_device_train_batch_size": 16, "learning_rate": 1e-2, "warmup_steps": 10, "optim": "adamw_torch",
    }  # fmt: skip
    probing: dict[str, Any] = {
        "profile": "light", "measure_strategy": "no", "max_hvps": 16, "probe_examples": 32, "probe_batch_size": 8,
    }  # fmt: skip
    trainer = training.trainer(
        folder,
        cls=OptimizabilityTrainer,
        own=own or Perceptron(),
        optimizability=OptimizabilityConfig(**{**probing, **(config or {})}),
        **{**settings, **options},
    )
    trainer.train()
    loaded = OptimizabilityReport.load(folder / "optimizability")
    assert loaded.findings == trainer.optimizability_report().findings
    written = json.loads((folder / "optimizability" / "report.json").read_text())["findings"]
    assert [Finding(**{**data, "evidence": tuple(data["evidence"])}) for data in written] == [*loaded.findings]
    return loaded


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., OptimizabilityReport]:
    monkeypatch.setattr("hf_optimizability.report.plots.plot_all", lambda report: {})  # takes longer than the run
    return partial(trained, tmp_path)


def names(report: OptimizabilityReport) -> list[str]:
    return [finding.name for finding in report.findings]
