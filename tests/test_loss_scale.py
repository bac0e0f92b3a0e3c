# SPDX-License-Identifier: Apache-2.0
"""The factor on the loss, against the gradients that a Trainer's own steps make."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import training
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from hf_optimizability import OptimizabilityConfig, OptimizabilityTrainer


class Gradients(TrainerCallback):
    """Keeps the gradient of the first step."""

    def __init__(self) -> None:
        self.first: Tensor | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if self.first is None:
            self.first = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def summed(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    """A loss function that does as it is told."""
    total = nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def averaged(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    """A loss function that does not."""
    return nn.functional.cross_entropy(outputs.logits, labels)


class OwnLoss(OptimizabilityTrainer):
    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        return model(**inputs).loss


@pytest.mark.parametrize(
    ("name", "steps", "cls", "options", "factor"),
    [
        ("bert", 3, OptimizabilityTrainer, {}, 3.0),
        ("resnet", 3, OptimizabilityTrainer, {}, 3.0),
        ("vit", 3, OptimizabilityTrainer, {}, 1.0),
        ("gpt2", 3, OptimizabilityTrainer, {}, 1.0),
        ("bert", 1, OptimizabilityTrainer, {}, 1.0),
        ("bert", 3, OptimizabilityTrainer, {"compute_loss_func": summed}, 1.0),
        ("bert", 3, OptimizabilityTrainer, {"compute_loss_func": averaged}, 3.0),
        ("bert", 3, OwnLoss, {}, 3.0),
    ],
)
def test_factor_is_that_of_the_gradients(
    tmp_path: Path, name: str, steps: int, cls: type[Trainer], options: dict[str, Any], factor: float
):
    """The data set is one batch again and again, so that a step of several makes the gradient of one."""
    rows = training.dataset(name, 4) * 6
    settings = {"train_dataset": rows, "max_steps": 1, "max_grad_norm": 1e9, "train_sampling_strategy": "sequential"}
    config = OptimizabilityConfig(probe_examples=4, max_hvps=16, measure_strategy="no")
    own = training.model(name)
    for module in own.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # else the batches of a step would move it
    weights = {key: value.clone() for key, value in own.state_dict().items()}
    found = {}
    for accumulation in (1, steps):
        own.load_state_dict(weights)
        gradients = Gradients()
        trainer = training.trainer(
            tmp_path, name, cls, own=own, optimizability=config, callbacks=[gradients],
            gradient_accumulation_steps=accumulation, **settings, **options,
        )  # fmt: skip
        trainer.train()
        found[accumulation] = gradients.first
    ratio = float(found[steps].norm() / found[1].norm())
    assert ratio == pytest.approx(factor, rel=1e-3)
    assert trainer.optimizability_report().training["loss_scale"] == pytest.approx(factor, rel=1e-4)


def test_a_factor_is_told_once_with_what_it_does(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = OptimizabilityConfig(probe_examples=4, max_hvps=16, measure_strategy="no")
    logging.getLogger("transformers").propagate = True
    options = {"optimizability": config, "gradient_accumulation_steps": 5, "max_steps": 1}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            training.trainer(tmp_path, cls=OptimizabilityTrainer, **options).train()
    [told] = [entry.getMessage() for entry in caplog.records if "times the mean over a step's items" in entry.message]
    assert "BertForSequenceClassification comes out 5 times" in told and "as if it were 0.2 times" in told
