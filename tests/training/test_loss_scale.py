# SPDX-License-Identifier: Apache-2.0
"""The factor on the loss, against the gradients that a Trainer's own steps make."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from hf_optimizability import OptimizabilityConfig, OptimizabilityTrainer
from hf_optimizability.training.loss_scale import explanation, loss_scale
from tests.support import tiny_training


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


class OwnLoss(Trainer):
    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        return model(**inputs).loss


class WithoutItems(Trainer):
    """Takes no number of items, and steps by itself."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False) -> Tensor:
        return model(**inputs).loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        model.train()
        loss = self.compute_loss(model, inputs)
        self.accelerator.backward(loss)
        return loss.detach()


class TwiceTheItems(Trainer):
    """Counts the items of a step as it likes: twice."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        samples, items = super().get_batch_samples(*args, **kwargs)
        return samples, 2 * items


@pytest.mark.parametrize(
    ("name", "steps", "cls", "options", "factor"),
    [
        ("bert", 3, Trainer, {}, 3.0),
        ("resnet", 3, Trainer, {}, 3.0),
        ("vit", 3, Trainer, {}, 1.0),
        ("llama", 3, Trainer, {}, 1.0),
        ("gpt2", 3, Trainer, {}, 17 / 18),  # it counts the one first label that is not ignored
        ("gpt2", 1, Trainer, {}, 17 / 18),
        ("bert", 1, Trainer, {}, 1.0),
        ("bert", 3, Trainer, {"compute_loss_func": summed}, 1.0),
        ("bert", 3, Trainer, {"compute_loss_func": averaged}, 3.0),
        ("bert", 3, Trainer, {"label_smoothing_factor": 0.1}, 1.0),
        ("bert", 3, OwnLoss, {}, 3.0),
        ("vit", 3, WithoutItems, {}, 3.0),
        ("vit", 3, TwiceTheItems, {}, 0.5),
    ],
)
def test_factor_is_that_of_the_gradients(
    tmp_path: Path, name: str, steps: int, cls: type[Trainer], options: dict[str, Any], factor: float
):
    """The data set is one batch again and again, so that the gradient of a step is a multiple of that of one batch."""
    rows = tiny_training.dataset(name, 4) * 6
    settings = {"train_dataset": rows, "max_steps": 1, "max_grad_norm": 1e9, "train_sampling_strategy": "sequential"}
    own = tiny_training.model(name)
    for module in own.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # else the batches of a step would move it
    gradients = Gradients()
    trainer = tiny_training.trainer(
        tmp_path, name, cls, own=own, callbacks=[gradients], gradient_accumulation_steps=steps, **settings, **options
    )  # fmt: skip
    batch = trainer.data_collator(rows[:4])
    smoothing = trainer.label_smoother
    own.train()
    loss = own(**batch).loss if smoothing is None else smoothing(own(**batch), batch["labels"])
    mean = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(own.parameters()))])
    attributes = vars(trainer).copy()
    found = loss_scale(trainer, batch, seed=0)
    assert vars(trainer) == attributes
    trainer.train()
    assert gradients.first is not None
    torch.testing.assert_close(gradients.first, factor * mean, rtol=1e-4, atol=1e-5)
    assert found == pytest.approx(factor, rel=1e-4)


def test_a_batch_without_labels_has_no_factor_of_the_count(tmp_path: Path):
    class Own(Trainer):
        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            return model(inputs["nested"]["x"]).square().mean()

    trainer = tiny_training.trainer(tmp_path, cls=Own, own=nn.Linear(2, 1), gradient_accumulation_steps=4)
    assert loss_scale(trainer, {"nested": {"x": torch.ones(3, 2)}}, seed=0) == 1.0


def test_a_factor_below_one_is_that_of_a_count():
    assert "counts more items than the loss averages over" in explanation("GPT2LMHeadModel", 0.94)
    assert "averages over each micro-batch" in explanation("BertForSequenceClassification", 3.0)


@pytest.mark.usefixtures("quickly")
def test_a_factor_is_told_once_with_what_it_does(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = OptimizabilityConfig(**tiny_training.QUICK, measure_strategy="no")
    logging.getLogger("transformers").propagate = True
    options = {"optimizability": config, "gradient_accumulation_steps": 5, "max_steps": 1}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            tiny_training.trainer(tmp_path, cls=OptimizabilityTrainer, **options).train()
    [told] = [entry.getMessage() for entry in caplog.records if "times the mean over a step's items" in entry.message]
    assert "BertForSequenceClassification returns a loss (and gradients) of 5 times" in told
    assert "as if it were 0.2 times" in told
