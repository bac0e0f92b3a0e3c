# SPDX-License-Identifier: Apache-2.0
"""The loss of a Trainer as a function of model and batch, against losses written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BatchEncoding, Trainer

from hf_optimizability.errors import MeasurementError
from hf_optimizability.training.trainer_loss import trainer_loss
from tests.support import tiny_models, tiny_training


WEIGHTS = torch.tensor([0.2, 1.0, 3.0])


class ClassWeights(Trainer):
    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        labels = inputs.pop("labels")
        return nn.functional.cross_entropy(model(**inputs).logits, labels, weight=WEIGHTS)


def summed(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    total = nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
    return total / num_items_in_batch


def cross_entropy(logits: Tensor, labels: Tensor, **options: Any) -> float:
    return float(nn.functional.cross_entropy(logits, labels, **options))


@pytest.mark.parametrize(
    ("cls", "options", "expected"),
    [
        (Trainer, {}, {}),
        (Trainer, {"gradient_accumulation_steps": 4}, {}),
        (Trainer, {"label_smoothing_factor": 0.2}, {"label_smoothing": 0.2}),
        (Trainer, {"compute_loss_func": summed}, {}),
        (Trainer, {"compute_loss_func": summed, "average_tokens_across_devices": False}, {}),
        (ClassWeights, {}, {"weight": WEIGHTS}),
    ],
)
@pytest.mark.parametrize("container", [dict, BatchEncoding])
def test_it_is_the_mean_over_the_batch(
    tmp_path: Path, cls: type[Trainer], options: dict[str, Any], expected: dict[str, Any], container: type
):
    trainer = tiny_training.trainer(tmp_path, cls=cls, **options)
    model = trainer.model.eval()
    [batch] = tiny_models.cut(tiny_models.examples("bert", 6, dtype=torch.float32), 6)
    logits = model(input_ids=batch["input_ids"]).logits
    handed = container(batch)
    assert float(trainer_loss(trainer)(model, handed)) == pytest.approx(
        cross_entropy(logits, batch["labels"], **expected), rel=1e-6
    )
    assert set(handed) == {"input_ids", "labels"}  # `compute_loss` takes labels out of its own copy


def test_batches_keep_their_containers(tmp_path: Path):
    seen: list[Any] = []

    class Own(Trainer):
        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            seen.append(inputs)
            return model(inputs[0]).mean()

    loss_fn = trainer_loss(tiny_training.trainer(tmp_path, cls=Own, own=nn.Linear(2, 1)))
    for batch in ((torch.ones(3, 2),), [torch.ones(3, 2), {"nested": [torch.ones(1)]}]):
        loss_fn(nn.Linear(2, 1), batch)
        assert type(seen[-1]) is type(batch)


def test_a_loss_function_gets_no_count_where_a_trainer_counts_none(tmp_path: Path):
    counts: list[Any] = []

    def counting(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        counts.append(num_items_in_batch)
        return outputs.logits.mean()

    loss_fn = trainer_loss(tiny_training.trainer(tmp_path, compute_loss_func=counting))
    [batch] = tiny_models.cut(tiny_models.examples("bert", 4, dtype=torch.float32), 4)
    model = tiny_training.model("bert").eval()
    loss_fn(model, {"input_ids": batch["input_ids"]})
    loss_fn(model, {"input_ids": batch["input_ids"], "labels": [{"boxes": torch.ones(2)}] * 4})
    assert counts == [None, None]


def test_it_generates_nothing(tmp_path: Path):
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=13, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    model.generate = None
    args = tiny_training.arguments(tmp_path, Seq2SeqTrainingArguments, predict_with_generate=True)
    loss = trainer_loss(Seq2SeqTrainer(model, args))(
        model.eval(), {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.ones(2, 3, dtype=torch.long)}
    )
    assert loss.requires_grad


def test_a_loss_whose_gradient_is_a_hook_is_refused(tmp_path: Path):
    class Cached(Trainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
            with torch.no_grad():
                loss = model(**inputs).loss
            loss.requires_grad_().register_hook(lambda gradient: None)
            return loss

    [batch] = tiny_models.cut(tiny_models.examples("bert", 4, dtype=torch.float32), 4)
    trainer = tiny_training.trainer(tmp_path, cls=Cached)
    with pytest.raises(MeasurementError, match="GradCache"):
        trainer_loss(trainer)(trainer.model, batch)
