# SPDX-License-Identifier: Apache-2.0
"""Central differences against exact products, where they must refuse, and that the weights come back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_optimizability import OptimizabilityConfig, measure
from hf_optimizability.curvature.central_difference import CentralDifferenceHessian
from hf_optimizability.curvature.empirical_risk import HvpCounter
from hf_optimizability.curvature.forward_over_reverse import ForwardOverReverseHessian
from hf_optimizability.curvature.gauss_newton import GaussNewtonOperator, gauss_newton_trace
from hf_optimizability.model_state.measuring import full_precision
from hf_optimizability.objective.objective import Objective
from tests.support import tiny_models


# Of float64; that of language models is computed in float32 by Transformers.
PRECISION = {"bert": 1e-5, "vit": 1e-5, "resnet": 1e-5, "gpt2": 1e-2, "llama": 1e-2}


def columns(size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """One random vector at the lengths of an eigenvector and of a probe."""
    vector = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vector = vector / vector.norm()
    return torch.stack([vector, size**0.5 * vector], dim=1).to(dtype)


def exact(model: nn.Module, batch: dict[str, Tensor], vectors: Tensor) -> Tensor:
    """The products that autograd itself offers, in float64."""
    named = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}

    def loss(*tensors: Tensor) -> Tensor:
        return functional_call(model, dict(zip(named, tensors, strict=True)), kwargs=batch).loss

    sizes = [parameter.numel() for parameter in named.values()]
    products = []
    with sdpa_kernel(SDPBackend.MATH):
        for vector in vectors.T.double():
            pieces = tuple(x.view_as(p) for x, p in zip(vector.split(sizes), named.values(), strict=True))
            _, product = torch.autograd.functional.vhp(loss, tuple(named.values()), pieces)
            products.append(torch.cat([piece.flatten() for piece in product]))
    return torch.stack(products, dim=1)


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_products_under_the_attention_that_a_model_comes_with(name: str):
    rows = tiny_models.examples(name, 4)
    model = tiny_models.make(name).eval()
    [whole] = tiny_models.cut(rows, 4)
    vectors = columns(sum(parameter.numel() for parameter in model.parameters()))
    expected = exact(model, whole, vectors)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    spent: list[int] = []
    operator = CentralDifferenceHessian(Objective(model, tiny_models.cut(rows, 3)).counting(HvpCounter(spent.append)))
    for column, truth in zip(operator.matmat(vectors).T, expected.T, strict=True):
        assert (column - truth).norm() <= PRECISION[name] * truth.norm()
    assert spent == [2]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["bert", "vit", "resnet"])
def test_products_in_float32(name: str):
    [batch] = tiny_models.cut(tiny_models.examples(name, 4), 4)
    model = tiny_models.make(name).eval()
    vectors = columns(sum(parameter.numel() for parameter in model.parameters()))
    expected = exact(model, batch, vectors)
    single = {key: value.float() if value.is_floating_point() else value for key, value in batch.items()}
    product = CentralDifferenceHessian(Objective(model.float(), [single])).matmat(vectors.float())
    assert (product - expected).norm() <= 5e-3 * expected.norm()


@pytest.mark.parametrize("factor", [2.0**-30, 2.0**30])
def test_the_step_does_not_depend_on_the_length_of_the_vector(factor: float):
    model = tiny_models.make("vit").eval()
    operator = CentralDifferenceHessian(Objective(model, tiny_models.cut(tiny_models.examples("vit", 2), 2)))
    vector = columns(operator.size)[:, 0]
    expected = operator.matvec(vector)
    assert (operator.matvec(factor * vector) / factor - expected).norm() <= 1e-8 * expected.norm()


def test_the_zero_vector_and_parameters_that_are_all_zero():
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    inputs = columns(6).reshape(4, 3)
    objective = Objective(model, [(inputs,)], loss_fn=lambda model, batch: model(batch[0]).square().mean())
    product = CentralDifferenceHessian(objective).matmat(
        torch.eye(3, dtype=torch.float64)[:, :2] * torch.tensor([1, 0])
    )
    assert torch.allclose(product[:, 0], (2 / 4 * inputs.T @ inputs)[:, 0], rtol=1e-6)
    assert torch.equal(product[:, 1], torch.zeros(3))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_weights_come_back_bit_for_bit_after_an_error(error: type[BaseException], fails_at: int):
    torch.manual_seed(0)
    model = nn.Linear(50, 50)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    calls = iter(range(1, 5))

    def loss_fn(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        if next(calls) == fails_at:
            assert not torch.equal(model.weight, before[0])
            raise error
        return model(batch[0]).square().mean()

    operator = CentralDifferenceHessian(Objective(model, [(torch.ones(2, 50),)] * 2, loss_fn=loss_fn))
    with pytest.raises(error):
        operator.matvec(torch.ones(operator.size))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_half_precision_is_refused_but_for_float32_copies():
    [batch] = tiny_models.cut(tiny_models.examples("bert", 4), 4)
    model = tiny_models.make("bert").bfloat16().eval()
    objective = Objective(model, [batch])
    with pytest.raises(ValueError, match="full_precision"):
        CentralDifferenceHessian(objective)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with full_precision(model):
        operator = CentralDifferenceHessian(objective)
        vectors = columns(operator.size, torch.float32)
        product = operator.matmat(vectors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    expected = exact(model.double(), batch, vectors)
    assert (product - expected).norm() <= 5e-3 * expected.norm()


@pytest.mark.parametrize("method", ["hutchinson", "exact"])
def test_the_error_of_differences_is_part_of_the_error_of_a_trace(method: str):
    """Probes have no variance where the Hessian is diagonal; differences are off all the same."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.ParameterDict({"a": torch.randn(8, dtype=torch.float64), "b": torch.randn(4, dtype=torch.float64)})

        def loss_fn(model: nn.ParameterDict, batch: torch.Tensor) -> torch.Tensor:
            return (3 * model["a"]).exp().mean() + (3 * model["b"]).exp().sum()

        config = OptimizabilityConfig(engine="central_difference", trace_method=method, max_hvps=64, blocks=["a", "b"])
        found = measure(model, [torch.ones(1)], config, loss_fn=loss_fn)
        diagonals = [(9 * (3 * model["a"]).exp() / 8).detach(), (9 * (3 * model["b"]).exp()).detach()]
        traces = [found.hessian.trace, *(block.trace for block in found.blocks.values())]
        for trace, diagonal in zip(traces, [torch.cat(diagonals), *diagonals], strict=True):
            assert trace.low <= float(diagonal.sum()) <= trace.high
            assert trace.converged and trace.high - trace.low < 1e-4 * trace.value


def test_a_product_that_is_not_finite_is_refused():
    point = nn.ParameterDict({"x": torch.zeros(2)})
    objective = Objective(point, [(torch.ones(1),)], loss_fn=lambda model, batch: model["x"].sqrt().sum())
    with pytest.raises(FloatingPointError, match="not finite"):
        CentralDifferenceHessian(objective).matvec(torch.ones(2))


class DequantizedProduct(torch.autograd.Function):
    """x Wᵀ of int8 weights, with a backward pass that can't be differentiated, as kernels have it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return x @ (weight.to(x.dtype) * scale).T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return gradient @ (weight.to(gradient.dtype) * scale), None, None


class QuantizedLinear(nn.Module):
    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.register_buffer("scale", linear.weight.detach().abs().amax() / 127)
        quantized = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(quantized, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return DequantizedProduct.apply(x, self.weight, self.scale) + self.bias


class LowRankAdapter(nn.Module):
    def __init__(self, base: nn.Module, size: int):
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(1)
        self.A = nn.Parameter(torch.randn(2, size, generator=generator, dtype=torch.float64) / 2)
        self.B = nn.Parameter(torch.randn(size, 2, generator=generator, dtype=torch.float64) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.A.T @ self.B.T


def adapted(wrap: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """A tiny BERT whose value projections are wrapped, with adapters on top as the only parameters that train."""
    model = tiny_models.make("bert").eval().requires_grad_(False)
    for layer in model.bert.encoder.layer:
        layer.attention.self.value = LowRankAdapter(wrap(layer.attention.self.value), 4)
    return model


@pytest.fixture
def quantized() -> nn.Module:
    model = adapted(QuantizedLinear)
    model.is_quantized, model.quantization_method = True, "bitsandbytes"
    return model


def test_adapters_on_a_quantized_model(quantized: nn.Module):
    def dequantized(linear: nn.Linear) -> nn.Linear:
        exact, twin = QuantizedLinear(linear), nn.Linear(4, 4, dtype=torch.float64)
        twin.load_state_dict({"weight": exact.weight.double() * exact.scale, "bias": linear.bias})
        return twin.requires_grad_(False)

    [batch] = tiny_models.cut(tiny_models.examples("bert", 4), 4)
    operator = CentralDifferenceHessian(Objective(quantized, [batch]))
    vectors = columns(operator.size)
    expected = exact(adapted(dequantized), batch, vectors)
    assert (operator.matmat(vectors) - expected).norm() <= 1e-5 * expected.norm()


def test_exact_engines_refuse_a_quantized_model(quantized: nn.Module):
    objective = Objective(quantized, tiny_models.cut(tiny_models.examples("bert", 4), 4))
    for refuse in (
        lambda: ForwardOverReverseHessian(objective),
        lambda: GaussNewtonOperator(objective),
        lambda: gauss_newton_trace(objective, [[slice(0, 32)]]),
    ):
        with pytest.raises(RuntimeError, match=r"bitsandbytes.*central_difference"):
            refuse()
