# SPDX-License-Identifier: Apache-2.0
"""The loss of a Trainer as a function of model and batch, against losses written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BatchEncoding, BertConfig, BertForTokenClassification, Trainer
from transformers.trainer_pt_utils import LabelSmoother

from hf_optimizability.errors import MeasurementError
from hf_optimizability.objective.example_losses import ExampleLosses
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


def bert_for_tokens() -> BertForTokenClassification:
    options = {"vocab_size": 13, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForTokenClassification(BertConfig(**options, intermediate_size=6, num_labels=3))


def half_ignored(name: str, number: int = 6) -> dict[str, Tensor]:
    """A batch with ignored labels, more in one example than in another, and in the last none but these."""
    [batch] = tiny_models.cut(tiny_models.examples("gpt2" if name == "tokens" else name, number), number)
    if name == "tokens":
        batch["labels"] = batch["input_ids"] % 3
    if batch["labels"].ndim == 2:
        for row, labels in enumerate(batch["labels"]):
            labels[: row + 1] = -100
    batch["labels"][-1] = -100
    return batch


@pytest.mark.parametrize("name", ["bert", "tokens", "llama"])
def test_label_smoothing_tells_examples_apart(tmp_path: Path, name: str):
    """The Trainer's own number, item by item, from a Trainer that stays as it was."""
    own = bert_for_tokens() if name == "tokens" else tiny_training.model(name)
    trainer = tiny_training.trainer(
        tmp_path, "bert" if name == "tokens" else name, own=own, label_smoothing_factor=0.2
    )
    model, batch, attributes = own.double().eval(), half_ignored(name), list(vars(trainer).items())

    def truth(batch: dict[str, Tensor]) -> float:
        return float(trainer.compute_loss(model, dict(batch)).detach())

    assert type(trainer.label_smoother) is LabelSmoother
    with ExampleLosses(6) as apart:
        loss = trainer_loss(trainer)(model, batch)
    assert float(loss.detach()) == pytest.approx(truth(batch), rel=1e-6)
    labels = batch["labels"][..., 1:] if name == "llama" else batch["labels"].reshape(6, -1)
    items = (labels != -100).sum(1).tolist()
    sums = [
        truth({key: value[i : i + 1] for key, value in batch.items()}) * n if n else 0.0 for i, n in enumerate(items)
    ]
    assert (apart.by_example(loss) * sum(items)).tolist() == pytest.approx(sums, rel=1e-5)
    with pytest.raises(IndexError):
        trainer_loss(trainer)(model, {**batch, "input_ids": batch["input_ids"] + 99})
    assert [(key, id(value)) for key, value in vars(trainer).items()] == [(key, id(v)) for key, v in attributes]


def test_label_smoothing_of_ones_own_is_left_alone(tmp_path: Path):
    class Halved(LabelSmoother):
        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().__call__(*args, **kwargs) / 2

    trainer, batch = tiny_training.trainer(tmp_path, label_smoothing_factor=0.2), half_ignored("bert")
    model, loss_fn = trainer.model.eval(), trainer_loss(trainer)
    with torch.no_grad():
        whole = float(loss_fn(model, batch))
        trainer.label_smoother = Halved(0.2)
        assert float(loss_fn(model, batch)) == pytest.approx(whole / 2, rel=1e-6)
