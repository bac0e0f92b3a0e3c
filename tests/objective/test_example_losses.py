# SPDX-License-Identifier: Apache-2.0
"""The losses of single examples against passes of each example alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from hf_optimizability.objective.example_losses import ExampleLosses


SIZE = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20}
WEIGHTS = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)

Case = Callable[[], tuple[torch.nn.Module, dict[str, Tensor]]]


def classification(problem: str) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    model = BertForSequenceClassification(
        BertConfig(**SIZE, num_labels=1 if problem == "regression" else 4, problem_type=problem)
    )
    labels = {
        "regression": torch.randn(3),
        "single_label_classification": torch.tensor([0, 3, 1]),
        "multi_label_classification": torch.randint(2, (3, 4)).float(),
    }[problem]
    return model, {"input_ids": torch.randint(20, (3, 5)), "labels": labels}


def token_classification() -> tuple[torch.nn.Module, dict[str, Tensor]]:
    labels = torch.tensor([[0, 1, -100, -100], [1, 1, 1, 0], [-100, 0, 1, -100]])
    model = BertForTokenClassification(BertConfig(**SIZE, num_labels=2))
    return model, {"input_ids": torch.randint(20, (3, 4)), "labels": labels}


def language_modelling() -> tuple[torch.nn.Module, dict[str, Tensor]]:
    ids = torch.randint(20, (3, 6))
    labels = ids.clone()
    labels[0, 3:] = -100
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2)), {
        "input_ids": ids,
        "labels": labels,
    }


def question_answering() -> tuple[torch.nn.Module, dict[str, Tensor]]:
    positions = {"start_positions": torch.tensor([0, 2, 1]), "end_positions": torch.tensor([1, 3, 4])}
    return BertForQuestionAnswering(BertConfig(**SIZE)), {"input_ids": torch.randint(20, (3, 5)), **positions}


CASES: dict[str, Case] = {
    "regression": lambda: classification("regression"),
    "classes": lambda: classification("single_label_classification"),
    "several labels": lambda: classification("multi_label_classification"),
    "tokens": token_classification,
    "language model": language_modelling,
    "question answering": question_answering,
}


def items(batch: dict[str, Tensor], *, shifted: bool) -> list[int]:
    """The items of each example."""
    labels = batch.get("labels")
    if labels is None or labels.dim() == 1 or labels.is_floating_point():
        return [1] * 3
    return ((labels[:, 1:] if shifted else labels) != -100).sum(1).tolist()


@pytest.mark.parametrize("name", CASES)
def test_they_are_those_of_each_example_alone(name: str):
    torch.manual_seed(0)
    model, batch = CASES[name]()
    model = model.double().eval()
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    counts = items(batch, shifted=name == "language model")
    alone = [float(model(**{key: value[i : i + 1] for key, value in batch.items()}).loss) for i in range(3)]
    parts = torch.tensor([loss * count / sum(counts) for loss, count in zip(alone, counts, strict=True)])
    with ExampleLosses(3) as apart:
        loss = model(**batch).loss
    assert apart.by_example(loss).tolist() == pytest.approx(parts.tolist(), rel=1e-6)
    assert float(loss) == pytest.approx(float(parts.sum()), rel=1e-6)
    with ExampleLosses(3, WEIGHTS) as weighted:
        loss = model(**batch).loss
    assert float(loss) == pytest.approx(float((WEIGHTS * parts).sum()), rel=1e-6)
    assert weighted.by_example(loss) is not None


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "cross_entropy": lambda z: F.cross_entropy(z, torch.tensor([0, 2, -100])),
    "label smoothing": lambda z: F.cross_entropy(z, torch.tensor([0, 2, 1]), label_smoothing=0.1),
    "soft labels": lambda z: F.cross_entropy(z, torch.full((3, 4), 0.25, dtype=torch.float64)),
    "summed": lambda z: F.cross_entropy(z, torch.tensor([0, 2, 1]), reduction="sum") / 3,
    "mse_loss": lambda z: F.mse_loss(z, torch.ones_like(z)),
    "bce": lambda z: F.binary_cross_entropy_with_logits(z, torch.ones_like(z)),
    "huber": lambda z: F.huber_loss(z, torch.full_like(z, 0.7), delta=0.9),
    "smooth_l1": lambda z: F.smooth_l1_loss(z, torch.full_like(z, 0.7), beta=0.9),
}


@pytest.mark.parametrize("name", LOSSES)
def test_curvature_is_that_of_autograd(name: str):
    torch.manual_seed(0)
    outputs, moves = torch.randn(2, 3, 4, dtype=torch.float64)
    with ExampleLosses(3) as apart:
        loss = LOSSES[name](outputs)
    hessian = torch.autograd.functional.hessian(LOSSES[name], outputs)
    expected = torch.einsum("ij,ijkl,kl->i", moves, hessian, moves)
    call = apart.calls[0]
    shaped = [moves.reshape(call.outputs.shape)]
    found = apart.curvature_by_example(loss, [call.outputs], shaped)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-12)
    elsewhere = apart.losses_at(loss, [(outputs + moves).reshape(call.outputs.shape)])
    assert float(elsewhere.sum()) == pytest.approx(float(LOSSES[name](outputs + moves)))


def test_curvature_where_the_loss_is_exactly_0():
    outputs, moves = torch.ones(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    with ExampleLosses(3) as apart:
        loss = 12 * F.mse_loss(outputs, torch.ones_like(outputs))  # the sum over items
    found = apart.curvature_by_example(loss, [outputs.flatten()], [moves.flatten()])
    assert found.tolist() == pytest.approx((2 * moves.square().sum(1)).tolist())


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: F.cross_entropy(z, torch.tensor([0, 1, 1]), weight=torch.tensor([1.0, 2.0])),
        lambda z: F.binary_cross_entropy_with_logits(z, torch.ones_like(z), pos_weight=torch.tensor([1.0, 2.0])),
        lambda z: z.logsumexp(1).mean(),
        lambda z: F.cross_entropy(z[:2], torch.tensor([0, 1])),
        lambda z: F.mse_loss(z, torch.ones_like(z), weight=torch.full_like(z, 2.0)),
        lambda z: F.huber_loss(z, torch.ones_like(z), weight=torch.full_like(z, 2.0)),
        lambda z: F.smooth_l1_loss(z, torch.ones(3, 1)),
    ],
    ids=[
        "class weights",
        "positive weights",
        "none of torch's",
        "of fewer items",
        "weighted squares",
        "weighted Huber",
        "of one target for several outputs",
    ],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_other_losses_are_not_known(loss: Callable[[Tensor], Tensor]):
    outputs = torch.randn(3, 2)
    with ExampleLosses(3) as apart:
        found = loss(outputs)
    assert apart.by_example(found) is None
    assert float(found) == pytest.approx(float(loss(outputs)))
