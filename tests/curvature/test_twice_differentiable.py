# SPDX-License-Identifier: Apache-2.0
"""Cheap second derivatives against torch's own, operation by operation and model by model, and that nothing leaks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from hf_optimizability.curvature.hessian import HessianOperator
from hf_optimizability.curvature.hessian_vector_product import double_backward
from hf_optimizability.curvature.selective_grad import differentiate
from hf_optimizability.curvature.twice_differentiable import CheapSecondDerivatives
from hf_optimizability.model_state.measuring import math_attention
from hf_optimizability.objective.objective import Objective


SMALL = {"vocab_size": 20, "intermediate_size": 12, "max_position_embeddings": 8}


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def derivatives(function: Callable[..., Tensor], inputs: list[Tensor | None]) -> list[Tensor]:
    """Value, gradients, and the second and third derivatives along random directions, by all inputs that have one."""
    generator = torch.Generator().manual_seed(7)
    variables = [x for x in inputs if x is not None and x.requires_grad]
    results = [function(*inputs)]
    scalar = results[0].sin().sum()
    for order in (1, 2, 3):
        pieces = torch.autograd.grad(scalar, variables, create_graph=order < 3, materialize_grads=True)
        results += pieces
        directions = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in variables]
        scalar = sum((piece * direction).sum() for piece, direction in zip(pieces, directions, strict=True))
    return [result.detach() for result in results]


def assert_same(
    function: Callable[..., Tensor],
    inputs: list[Tensor | None],
    *,
    truth: Callable[..., Tensor] | None = None,
    tolerance: float = 1e-10,
) -> None:
    expected = derivatives(truth or function, inputs)
    with CheapSecondDerivatives():
        found = derivatives(function, inputs)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert (one - other).abs().max() <= tolerance * (1 + other.abs().max())


CONVOLUTIONS = [
    (1, {}),
    (1, {"stride": 2, "padding": 1, "dilation": 2}),
    (2, {}),
    (2, {"groups": 2, "padding": (1, 0)}),
    (2, {"groups": 4, "stride": 2, "padding": 1}),  # depthwise
    (2, {"groups": 4, "stride": (1, 2), "dilation": (2, 1)}),
    (2, {"padding": "valid", "stride": 3}),
    (2, {"padding": "same", "dilation": (1, 2)}),
    (3, {"groups": 2, "padding": 1}),
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("dims", "options"), CONVOLUTIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_convolutions(dims: int, options: dict, size: int, bias: bool):
    torch.manual_seed(0)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    x, w = normal(2, 4, *[5, 6, 5][:dims]), normal(8, 4 // options.get("groups", 1), *[size] * dims)
    assert_same(lambda x, w, b: convolve(x, w, b, **options), [x, w, normal(8) if bias else None])


@pytest.mark.parametrize("dims", [2, 3, 4])
def test_batch_normalization_by_running_statistics(dims: int):
    torch.manual_seed(0)
    mean, variance = torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.5

    def normalize(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return F.batch_norm(x, mean, variance, w, b, eps=0.1)

    assert_same(normalize, [normal(4, 3, 2, 2)[(..., *[0] * (4 - dims))], normal(3), normal(3)])
    assert_same(normalize, [normal(4, 3, 2, 2), normal(3), None])


def layer_norm(x: Tensor, shape: list[int], w: Tensor | None, b: Tensor | None, eps: float = 1e-5) -> Tensor:
    """Written out, since torch's own takes mean and variance as constant in the third derivative."""
    over = {"dim": list(range(-len(shape), 0)), "keepdim": True}
    unit = (x - x.mean(**over)) / (x.var(**over, correction=0) + eps).sqrt()
    return unit * (1 if w is None else w) + (0 if b is None else b)


@pytest.mark.parametrize("shape", [[5], [3, 5]])
@pytest.mark.parametrize("leading", [(), (4,), (2, 3)])
def test_layer_normalization(leading: tuple[int, ...], shape: list[int]):
    torch.manual_seed(0)
    x, w, b = normal(*leading, *shape), normal(*shape), normal(*shape)
    for inputs in ([x, w, b], [x, w, None], [x, None, b], [x, None, None]):

        def layer(x: Tensor, w: Tensor | None, b: Tensor | None, *, of: Callable[..., Tensor]) -> Tensor:
            return of(x.sin(), shape, None if w is None else w.exp(), b, eps=0.1) * of(x, shape, w, b, eps=0.1)

        assert_same(partial(layer, of=F.layer_norm), inputs, truth=partial(layer, of=layer_norm))


@pytest.mark.parametrize("leading", [(), (4,), (2, 3)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_layers(leading: tuple[int, ...], bias: bool):
    torch.manual_seed(0)
    assert_same(F.linear, [normal(*leading, 5), normal(3, 5), normal(3) if bias else None])
    assert_same(lambda x, w: F.linear(x, w.tanh()), [normal(*leading, 5), normal(3, 5)])  # no variable: left to torch
    if len(leading) == 1:
        b = normal(3) if bias else normal(*leading, 3)  # which is left to torch
        assert_same(torch.addmm, [b, normal(*leading, 5), normal(5, 3)])
        assert_same(lambda *inputs: torch.addmm(*inputs, beta=2), [b, normal(*leading, 5), normal(5, 3)])


@pytest.mark.parametrize("leading", [(4,), (2, 3)])
def test_results_can_be_written_to(leading: tuple[int, ...]):
    """As the layers of Longformer and Swin v2 do."""
    torch.manual_seed(0)
    x, w, b = normal(*leading, 5), normal(5, 5), normal(5)

    def written_to(y: Tensor) -> Tensor:
        y /= 2
        y[..., 0] = 1
        return y

    assert_same(lambda x, w, b: written_to(F.linear(x, w, b)), [x, w, b])
    assert_same(lambda x, w: written_to(F.linear(x, w)), [x, w])
    assert_same(lambda x, w, b: written_to(torch.addmm(b, x.flatten(0, -2), w)), [x, w, b])
    assert_same(lambda x, w, b: written_to(F.conv1d(x.flatten(0, -2)[None].mT, w[..., None], b)), [x, w, b])
    assert_same(lambda x: written_to(F.gelu(x)), [x])
    assert_same(
        lambda x, w, b: written_to(F.layer_norm(x, [5], b, b)),
        [x, w, b],
        truth=lambda x, w, b: written_to(layer_norm(x, [5], b, b)),
    )
    mean, variance = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    assert_same(lambda x, b: written_to(F.batch_norm(x.flatten(0, -2), mean, variance, b, b)), [x, b])


@pytest.mark.parametrize("held", range(7))
def test_inputs_that_need_no_gradient(held: int):
    """Each non-empty set of x, w and b that varies."""
    torch.manual_seed(0)
    frozen = [bool(held >> place & 1) for place in range(3)]
    convolved = [normal(2, 4, 5, 5), normal(4, 2, 3, 3), normal(4)]
    normalized = [normal(2, 4, 5), normal(4), normal(4)]
    statistics = torch.zeros(4, dtype=torch.float64) + 0.3, torch.ones(4, dtype=torch.float64) * 2
    multiplied = [normal(2, 4, 5), normal(3, 5), normal(3)]
    centred = [normal(3, 4), normal(4), normal(4)]
    for inputs in (convolved, normalized, multiplied, centred):
        for tensor, frozen_here in zip(inputs, frozen, strict=True):
            tensor.requires_grad_(not frozen_here)
    assert_same(lambda x, w, b: F.conv2d(x, w, b, padding=1, groups=2), convolved)
    assert_same(lambda x, w, b: F.batch_norm(x, *statistics, w, b), normalized)
    assert_same(lambda x, w, b: F.layer_norm(x, [4], w, b), centred, truth=lambda x, w, b: layer_norm(x, [4], w, b))
    assert_same(F.linear, multiplied)
    assert_same(lambda x, w, b: torch.addmm(b, x[0], w.T.detach().requires_grad_(w.requires_grad)), multiplied)


def test_a_normalization_of_a_batch_is_told_of_its_statistics():
    """On a GPU, torch's kernel wants those that a fixed one does not have."""

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.native_batch_norm_backward.default:
                assert all(isinstance(statistic, Tensor) for statistic in args[3:7])
                calls.append(func)
            return func(*args, **(kwargs or {}))

    calls: list[Any] = []
    mean, variance = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    with Calls(), CheapSecondDerivatives():
        loss = F.batch_norm(normal(2, 4, 5), mean, variance, normal(4), normal(4)).square().sum()
        loss.backward()
    assert calls


def test_float32_to_rounding_and_every_memory_format():
    torch.manual_seed(0)
    x, w = normal(2, 6, 8, 8, dtype=torch.float32), normal(6, 1, 3, 3, dtype=torch.float32)
    for format in (torch.contiguous_format, torch.channels_last):
        assert_same(lambda x, w, f=format: F.conv2d(x.to(memory_format=f), w, groups=6), [x, w], tolerance=1e-5)
    assert_same(lambda x, w: F.conv2d(x.transpose(2, 3), w, groups=6), [x, w], tolerance=1e-5)


def test_views_of_images():
    torch.manual_seed(0)
    x, w = normal(2, 4, 5, 5), normal(4, 2, 3, 3)
    assert_same(lambda x, w: F.conv2d(x, w, groups=2).view(2, -1).cumsum(1), [x, w])
    assert_same(lambda x, w: F.conv2d(x, w, groups=2).view((8, 9)).cumsum(1), [x, w])
    with CheapSecondDerivatives():
        assert torch.ones(2).view(torch.int32).dtype == torch.ones(2).view(dtype=torch.int32).dtype == torch.int32


class Labelled(Tensor):
    pass


def test_gelu():
    torch.manual_seed(0)
    assert_same(F.gelu, [normal(5, 7)])
    assert_same(lambda x, w: F.gelu(F.gelu(x) @ w), [normal(5, 7), normal(7, 3)])
    assert_same(lambda x: F.gelu(x, approximate="tanh"), [normal(5, 7)])  # left to torch


def test_every_vector_that_shares_a_graph_gets_its_own_product():
    """And a higher derivative is not taken of what the products before it have left to be shared."""
    torch.manual_seed(0)
    x, w, *vectors = normal(5, 7), normal(7, 3), *torch.randn(3, 7, 3, dtype=torch.float64)

    def products() -> list[Tensor]:
        (slope,) = torch.autograd.grad(F.gelu(x @ w).sin().sum(), w, create_graph=True)
        found = [torch.autograd.grad(slope, w, vector, retain_graph=True)[0] for vector in vectors]
        (higher,) = torch.autograd.grad(slope, w, vectors[0], create_graph=True)
        return [*found, *torch.autograd.grad(higher.square().sum(), w)]

    expected = products()
    with CheapSecondDerivatives():
        found = products()
    assert torch.allclose(torch.stack(found), torch.stack(expected), rtol=1e-12)


def test_what_is_left_to_torch():
    torch.manual_seed(0)
    x, w = normal(4, 6, 6), normal(3, 4, 3, 3)
    assert_same(lambda x, w: F.conv2d(x, w), [x, w])  # no batch dimension
    batch, scale = normal(5, 4), normal(4)
    zeros, ones = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    assert_same(lambda x, s: F.batch_norm(x, None, None, s, training=True), [batch, scale])
    assert_same(lambda x: F.batch_norm(x, zeros, ones), [batch])
    with CheapSecondDerivatives(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = F.conv2d(x[None].float(), w.float())
        assert y.dtype == torch.bfloat16 and "Apply" not in y.grad_fn.name()
    with CheapSecondDerivatives():
        y = F.conv2d(x[None].as_subclass(Labelled), w)
        assert type(y) is Labelled and "Apply" not in y.grad_fn.name()
    with CheapSecondDerivatives(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert "native" in F.layer_norm(batch.float(), [4]).grad_fn.name().lower()
    with CheapSecondDerivatives():
        y = F.layer_norm(batch.bfloat16(), [4], scale.float(), scale.float())
        assert y.dtype == torch.bfloat16 and "native" in y.grad_fn.name().lower()
    running = torch.zeros(4, dtype=torch.float64)
    with CheapSecondDerivatives():
        F.batch_norm(batch, running, ones.clone(), scale, training=True)
    assert running.any()


def test_parametrized_weights():
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, groups=4, dtype=torch.float64))
    bias, magnitude, direction = layer.parameters()

    def truth(x: Tensor, *_: Tensor) -> Tensor:  # torch's own second derivative of weight normalization is wrong
        weight = magnitude * direction / direction.square().sum((1, 2, 3), keepdim=True).sqrt()
        return F.conv2d(x, weight, bias, groups=4)

    assert_same(lambda x, *_: layer(x), [normal(2, 4, 5, 5), *layer.parameters()], truth=truth)


def test_errors_of_torch_come_through():
    with CheapSecondDerivatives(), pytest.raises(RuntimeError, match="channels"):
        F.conv2d(torch.ones(1, 2, 5, 5), torch.ones(3, 4, 3, 3))
    with CheapSecondDerivatives(), pytest.raises(RuntimeError, match="padding='same'"):
        F.conv2d(torch.ones(1, 4, 5, 5), torch.ones(3, 4, 3, 3), padding="same", stride=2)
    assert "Convolution" in F.conv2d(normal(1, 4, 5, 5), normal(3, 4, 3, 3)).grad_fn.name()


def mobilenet() -> PreTrainedModel:
    return MobileNetV2ForImageClassification(
        MobileNetV2Config(num_channels=1, depth_multiplier=0.1, min_depth=2, image_size=16, num_labels=3)
    )


def resnet() -> PreTrainedModel:
    return ResNetForImageClassification(
        ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4, 6], depths=[1, 2], num_labels=3)
    )


def convnext() -> PreTrainedModel:
    return ConvNextForImageClassification(
        ConvNextConfig(num_channels=1, hidden_sizes=[4, 6], depths=[1, 2], num_stages=2, patch_size=2, num_labels=3)
    )


@pytest.mark.parametrize("make", [mobilenet, resnet, convnext])
def test_hessian_vector_products_of_models(make: Callable[[], PreTrainedModel]):
    torch.manual_seed(0)
    model = make().double().eval()
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    batch = {"pixel_values": torch.randn(3, 1, 16, 16, dtype=torch.float64), "labels": torch.tensor([0, 1, 2])}
    operator = HessianOperator(Objective(model, [batch]))
    vectors = torch.randn(operator.size, 3, dtype=torch.float64)
    expected = operator.matmat(vectors)
    with CheapSecondDerivatives():
        assert (operator.matmat(vectors) - expected).norm() <= 1e-10 * expected.norm()
    assert all(parameter.grad is None for parameter in model.parameters())


def bert() -> PreTrainedModel:
    """Its output weights are tied to the embeddings, whose gradient has values."""
    return BertForMaskedLM(BertConfig(**SMALL, hidden_size=8, num_hidden_layers=2, num_attention_heads=2))


def albert() -> PreTrainedModel:
    """Its layers share their weights."""
    return AlbertForMaskedLM(
        AlbertConfig(**SMALL, hidden_size=8, embedding_size=4, num_hidden_layers=3, num_attention_heads=2)
    )


def gpt2() -> PreTrainedModel:
    """Its layers are `addmm`."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2, n_positions=8))


@pytest.mark.parametrize("make", [bert, albert, gpt2])
def test_hessian_vector_products_of_transformers(make: Callable[[], PreTrainedModel]):
    torch.manual_seed(0)
    ids = torch.randint(1, 20, (3, 6))
    objective = Objective(make().double().eval(), [{"input_ids": ids, "labels": ids}])
    with math_attention():
        operator = HessianOperator(objective)
        vectors = torch.randn(operator.size, 3, dtype=torch.float64)
        expected = operator.matmat(vectors)
        with CheapSecondDerivatives():
            for _ in range(2):  # with a graph of its own, and with one that is kept
                assert (operator.matmat(vectors) - expected).norm() <= 1e-10 * expected.norm()


def test_values_that_something_else_reads_are_computed():
    """A weight made of parameters, whose gradient goes on to these, and a loss that reads gradients."""
    torch.manual_seed(0)
    x, w, v = normal(4, 3), normal(2, 3), normal(5, 2)

    def made() -> Tensor:
        return F.conv1d(x[..., None], w.tanh()[..., None], v[0].exp()).square().sum() + v.square().sum()

    def penalized() -> Tensor:
        loss = F.linear(F.linear(x, w).tanh(), v).square().mean()
        return loss + torch.autograd.grad(loss, w, create_graph=True)[0].square().sum().sqrt()

    vectors = [[torch.randn_like(w), torch.randn_like(v)]]
    for loss in (made, penalized):
        [expected] = double_backward(loss(), [w, v], vectors)
        with CheapSecondDerivatives():
            [found] = double_backward(loss(), [w, v], vectors)
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, other, rtol=1e-10)


def matrix_products(action: Callable[[], object]) -> int:
    with torch.profiler.profile() as profile:
        action()
    kinds = ("aten::mm", "aten::addmm", "aten::addmm_")
    return sum(event.count for event in profile.key_averages() if event.key in kinds)


def test_no_more_than_what_is_asked_is_computed():
    x, *layers = normal(4, 3), normal(3, 3), normal(3, 3), normal(3, 3)

    def loss() -> Tensor:
        hidden = x.detach()
        for layer in layers:
            hidden = F.linear(hidden, layer).sin()
        return hidden.sum()

    ones = [[layer.detach() for layer in layers]]
    plain = matrix_products(lambda: list(double_backward(loss(), layers, ones)))
    with CheapSecondDerivatives():
        cheap = matrix_products(lambda: list(double_backward(loss(), layers, ones)))
        last = matrix_products(lambda: differentiate(loss(), layers[-1:]))
    assert plain - cheap == len(layers)  # the values of the gradient
    assert last == len(layers) + 2  # forward, and back through the last one alone


def test_no_convolution_is_taken_apart_by_groups():
    x, w = normal(2, 64, 4, 4), normal(64, 1, 3, 3)
    calls = {}
    for context in (nullcontext(), CheapSecondDerivatives()):
        with torch.profiler.profile() as profile, context:
            list(double_backward(F.conv2d(x, w, groups=64).sin().sum(), [x, w], [[x.detach(), w.detach()]]))
        calls[type(context)] = sum(event.count for event in profile.key_averages() if "convolution" in event.key)
    assert calls[CheapSecondDerivatives] <= 40 < 64 < calls[nullcontext]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_behind(error: type[BaseException]):
    x, w = normal(2, 4, 5, 5), normal(4, 1, 3, 3)
    before = F.conv2d, F.batch_norm, torch.conv2d
    with pytest.raises(error), CheapSecondDerivatives():
        assert F.conv2d(x, w, groups=4).grad_fn.name() == "_ApplyBackward"
        raise error
    assert (F.conv2d, F.batch_norm, torch.conv2d) == before
    assert F.conv2d(x, w, groups=4).grad_fn.name() == "ConvolutionBackward0"
    assert torch.overrides._get_current_function_mode() is None


def test_a_compiled_module_gives_the_same_values_inside_and_after():
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, 3, groups=4, dtype=torch.float64)
    compiled = torch.compile(layer, backend="eager")
    x = normal(2, 4, 5, 5)
    expected = layer(x)
    assert torch.allclose(compiled(x), expected)
    with CheapSecondDerivatives():
        assert torch.allclose(compiled(x), expected)
    assert compiled(x).grad_fn.name() == "ConvolutionBackward0" and torch.allclose(compiled(x), expected)


def test_strided_vectors_are_read_right():
    """Columns of a matrix: torch 2.13 misreads a strided batch-norm weight of channels-last images."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 2, 3)).double()
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 2)
    images, model = torch.randn(3, 2, 5, 5, dtype=torch.float64), model.eval()
    parameters = list(model.parameters())
    columns = torch.randn(sum(p.numel() for p in parameters), 3, dtype=torch.float64)
    vectors = {}
    for name, rows in {"strided": columns.T, "contiguous": columns.T.contiguous()}.items():
        split = rows[0].split([p.numel() for p in parameters])
        vectors[name] = [piece.as_strided(p.shape, [s * piece.stride(0) for s in p.stride()])
                         for piece, p in zip(split, parameters, strict=True)]  # fmt: skip
    assert vectors["strided"][2].stride() == (3,)
    products = {}
    for name, vector in vectors.items():
        with CheapSecondDerivatives():
            [products[name]] = double_backward(model(images).square().sum(), parameters, [vector])
    for strided, contiguous in zip(products["strided"], products["contiguous"], strict=True):
        assert torch.allclose(strided, contiguous, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dim", [0, 2, None])
def test_weight_normalization_has_its_second_derivative(dim: int | None):
    """Torch's own is wrong in 2.13: `torch._weight_norm` fails `gradgradcheck`."""
    torch.manual_seed(0)
    layer = nn.Conv1d(2, 3, 2).double()
    torch.nn.utils.parametrizations.weight_norm(layer, dim=dim)
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    parameters = list(layer.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * torch.randn_like(parameter))

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        with CheapSecondDerivatives():
            named = dict(zip(dict(layer.named_parameters()), tensors, strict=True))
            return torch.func.functional_call(layer, named, (x,)).tanh().square().sum()

    plain = layer(x)
    with CheapSecondDerivatives():
        assert torch.allclose(layer(x), plain)
    inputs = tuple(parameter.detach().requires_grad_() for parameter in parameters)
    assert torch.autograd.gradgradcheck(loss, inputs)
