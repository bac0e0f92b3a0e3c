# SPDX-License-Identifier: Apache-2.0
"""Forward-over-reverse products against dense Hessians, and what they refuse."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification, PreTrainedModel

from hf_optimizability.curvature.central_difference import CentralDifferenceHessian
from hf_optimizability.curvature.empirical_risk import HvpCounter
from hf_optimizability.curvature.forward_over_reverse import ForwardOverReverseHessian
from hf_optimizability.curvature.hessian import HessianOperator
from hf_optimizability.model_state.measuring import math_attention
from hf_optimizability.objective.objective import Objective
from tests.support import tiny_models


# Transformers computes the loss of language models in float32.
PRECISION = {"bert": 1e-10, "vit": 1e-10, "resnet": 1e-10, "gpt2": 1e-6, "llama": 1e-6}


def columns(size: int, number: int = 3) -> Tensor:
    return torch.randn(size, number, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_columns_are_multiplied_by_the_dense_hessian(name: str):
    rows = tiny_models.examples(name, 5)
    model = tiny_models.make(name).eval()
    [whole] = tiny_models.cut(rows, 5)
    dense = tiny_models.dense_hessian(model, whole)
    spent: list[int] = []
    operator = ForwardOverReverseHessian(Objective(model, tiny_models.cut(rows, 2)).counting(HvpCounter(spent.append)))
    vectors = columns(len(dense))
    with math_attention():
        product = operator.matmat(vectors)
    assert (product - dense @ vectors).norm() <= PRECISION[name] * (dense @ vectors).norm()
    assert spent == [3]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def deberta() -> PreTrainedModel:
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=tiny_models.VOCABULARY, hidden_size=4, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=6, max_position_embeddings=8, num_labels=3, relative_attention=True, position_buckets=4,
        pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm", share_att_key=True,
    )  # fmt: skip
    return DebertaV2ForSequenceClassification(config).double()


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "deberta"])
def test_layer_norm_and_eager_attention(name: str):
    """Against torch's own double backward: layer norm is where other ways to combine the two modes are wrong."""
    model = deberta() if name == "deberta" else tiny_models.make(name, attn_implementation="eager")
    [batch] = tiny_models.cut(tiny_models.examples("bert" if name == "deberta" else name, 3), 3)
    named = {name: parameter.detach() for name, parameter in model.eval().named_parameters()}
    operator = ForwardOverReverseHessian(Objective(model, [batch]))
    vector = columns(operator.size, 1)[:, 0]
    pieces = zip(named.values(), vector.split([parameter.numel() for parameter in named.values()]), strict=True)

    def loss(*tensors: Tensor) -> Tensor:
        return functional_call(model, dict(zip(named, tensors, strict=True)), kwargs=batch).loss

    _, rows = torch.autograd.functional.hvp(loss, tuple(named.values()), tuple(v.view_as(p) for p, v in pieces))
    expected = torch.cat([row.flatten() for row in rows])
    assert (operator.matvec(vector) - expected).norm() <= 1e-6 * expected.norm()  # some compute softmax in float32


@pytest.mark.parametrize("padding_idx", [1, -4])
def test_padding_rows_are_constant(padding_idx: int):
    """As for the optimizer, which never gets a gradient of them: neither a row nor a column of the Hessian."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 2, padding_idx=padding_idx), nn.Flatten(), nn.Linear(6, 2)).double()
    nn.init.normal_(model[0].weight)
    model[0].padding_idx = padding_idx  # a module counts from the start, the function that it calls from the end too
    ids, labels = torch.tensor([[0, 1, 3], [1, 4, 3]]), torch.tensor([0, 1])
    weight, head, bias = (parameter.detach() for parameter in model.parameters())
    trained = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]).double()[:, None]

    def loss(vector: Tensor) -> Tensor:
        free, head, bias = (piece.view(shape) for piece, shape in zip(vector.split([10, 12, 2]), shapes, strict=True))
        rows = trained * free + (1 - trained) * weight
        return functional.cross_entropy(rows[ids].flatten(1) @ head.T + bias, labels)

    shapes = [weight.shape, head.shape, bias.shape]
    dense = torch.autograd.functional.hessian(loss, torch.cat([weight.flatten(), head.flatten(), bias]))
    objective = Objective(
        model, [(ids, labels)], loss_fn=lambda model, batch: functional.cross_entropy(model(batch[0]), batch[1])
    )
    torch.testing.assert_close(ForwardOverReverseHessian(objective).matmat(torch.eye(24).double()), dense)


def test_tied_frozen_and_unused_parameters():
    model = tiny_models.make("gpt2").eval()
    assert model.lm_head.weight is model.transformer.wte.weight
    model.transformer.h[0].requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    objective = Objective(model, tiny_models.cut(tiny_models.examples("gpt2", 3), 3))
    exact, operator = HessianOperator(objective), ForwardOverReverseHessian(objective)
    vectors = columns(exact.size)
    with math_attention():
        expected, product = exact.matmat(vectors), operator.matmat(vectors)
    assert (product - expected).norm() <= 1e-6 * expected.norm()
    assert torch.equal(product[:3], torch.zeros(3, 3))  # a model's own parameters come before those of its modules
    assert model.lm_head.weight is model.transformer.wte.weight


def test_adapters_of_peft():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_models.make("bert"), config).double().eval()
    objective = Objective(model, tiny_models.cut(tiny_models.examples("bert", 5), 3))
    exact = HessianOperator(objective)
    vectors = columns(exact.size)
    assert any("lora_A" in name for name in objective.names) and any("classifier" in name for name in objective.names)
    with math_attention():
        expected = exact.matmat(vectors)
        product = ForwardOverReverseHessian(objective).matmat(vectors)
    assert (product - expected).norm() <= 1e-10 * expected.norm()
    difference = CentralDifferenceHessian(objective).matmat(vectors)
    assert (difference - expected).norm() <= 1e-5 * expected.norm()


def test_pairs_of_sum_and_count_are_one_mean():
    torch.manual_seed(0)
    model = nn.Linear(3, 2, dtype=torch.float64)
    inputs, labels = columns(7), torch.tensor([0, 1, -100, 1, 0, -100, 1])

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return functional.cross_entropy(model(batch[0]), batch[1], reduction="sum"), (batch[1] != -100).sum()

    whole = ForwardOverReverseHessian(Objective(model, [(inputs, labels)], loss_fn=loss_fn))
    parts = ForwardOverReverseHessian(Objective(model, [(inputs, labels)], loss_fn=loss_fn).cut(3))
    vectors = columns(8)
    assert torch.allclose(parts.matmat(vectors), whole.matmat(vectors), rtol=1e-12, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "loss",
    [
        functional.mse_loss,
        nn.MSELoss,
        functional.huber_loss,
        partial(functional.huber_loss, delta=0.3),
        partial(functional.mse_loss, weight=torch.rand(6, 2, dtype=torch.float64)),
        partial(functional.huber_loss, weight=torch.rand(6, 2, dtype=torch.float64)),
    ],
)
def test_losses_whose_backward_pass_has_no_forward_mode(loss: Any, reduction: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    inputs, targets = columns(6), torch.randn(6, 2, dtype=torch.float64)

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if loss is nn.MSELoss:
            return nn.MSELoss(reduction=reduction)(model(batch[0]), batch[1])
        return loss(model(batch[0]), batch[1], reduction=reduction)

    objective = Objective(model, [(inputs, targets)], loss_fn=loss_fn)
    exact = HessianOperator(objective)
    vectors = columns(exact.size)
    product, expected = ForwardOverReverseHessian(objective).matmat(vectors), exact.matmat(vectors)
    torch.testing.assert_close(product, expected, rtol=1e-10, atol=1e-12)


def test_attention_without_forward_mode_is_refused():
    model = tiny_models.make("bert").eval()
    operator = ForwardOverReverseHessian(Objective(model, tiny_models.cut(tiny_models.examples("bert", 2), 2)))
    with pytest.raises(RuntimeError, match="forward AD"):
        operator.matvec(torch.ones(operator.size, dtype=torch.float64))


def test_custom_functions_without_forward_mode_are_refused():
    def loss_fn(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        return tiny_models.OnceDifferentiable.apply(model(batch[0])).square().mean()

    operator = ForwardOverReverseHessian(Objective(nn.Linear(2, 2), [(torch.ones(1, 2),)], loss_fn=loss_fn))
    with pytest.raises(RuntimeError):
        operator.matvec(torch.ones(6))


def test_a_product_that_is_not_finite_is_refused():
    point = nn.ParameterDict({"x": torch.zeros(2)})
    objective = Objective(point, [(torch.ones(1),)], loss_fn=lambda model, batch: model["x"].abs().pow(1.5).sum())
    with pytest.raises(FloatingPointError, match="not finite"):
        ForwardOverReverseHessian(objective).matvec(torch.ones(2))
