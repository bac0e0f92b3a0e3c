# SPDX-License-Identifier: Apache-2.0
"""A forecast counts the products and the bytes that a measurement then takes, and leaves nothing behind."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_optimizability import MeasurementError, OptimizabilityConfig, measure
from hf_optimizability.measurement.forecast import Forecast, PeakMemory, forecast
from tests.support import tiny_models


ROWS = tiny_models.cut(tiny_models.examples("bert", 6, dtype=torch.float32), 3)
NEVER = {"eigen_tolerance": 1e-12, "trace_tolerance": 1e-12}
"""Tolerances that float32 does not reach."""


def bert() -> nn.Module:
    return tiny_models.make("bert", dtype=torch.float32)


class Once(nn.Module):
    """The identity, without a second derivative."""

    def forward(self, x: Tensor) -> Tensor:
        return tiny_models.OnceDifferentiable.apply(x)


def perceptron(width: int = 20_000) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, width), nn.Tanh(), nn.Linear(width, 3))


def pairs(examples: int, *, number: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(examples, 20, generator=generator), torch.randn(examples, 3, generator=generator))
        for _ in range(number)
    ]


def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = (tensor.to(next(model.parameters()).dtype) for tensor in batch)
    return F.mse_loss(model(inputs), targets)


@pytest.mark.parametrize("profile", ["light", "standard", "full"])
def test_no_profile_takes_more_products(profile: str):
    config = OptimizabilityConfig(profile=profile)
    expected = forecast(perceptron(5), pairs(4), config, loss_fn=squares)
    assert expected.hvps == config.budget.max_hvps
    assert measure(perceptron(5), pairs(4), config, loss_fn=squares).hvps <= expected.hvps


@pytest.mark.parametrize(
    "options",
    [
        {"block_eigenvalues": True},
        {"engine": "central_difference"},
        pytest.param({"engine": "forward_over_reverse"}, marks=pytest.mark.slow),  # budgeted as by double_backward
        {"curvature": "gauss_newton"},
        pytest.param({"curvature": "empirical_fisher", "profile": "full"}, marks=pytest.mark.slow),
        {"eigen_method": "power_iteration"},
        {"trace_method": "hutch++"},
        {"trace_method": "xtrace"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_measurement_that_never_converges_takes_all_products(options: dict[str, Any]):
    config = OptimizabilityConfig(max_hvps=16, **NEVER, **options)
    expected = forecast(bert(), ROWS, config)
    spare = 1 if config.trace_method == "xtrace" else 0  # it takes two at a time
    assert expected.hvps - spare <= measure(bert(), ROWS, config).hvps <= expected.hvps


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_products_for_the_sharpness_are_counted(optimizer: Any):
    model, config = bert(), OptimizabilityConfig(max_hvps=17, block_eigenvalues=True, **NEVER)
    options = {"optimizer": optimizer(model.parameters(), lr=1e-3)}
    assert forecast(model, ROWS, config, **options).hvps == measure(model, ROWS, config, **options).hvps == 17


def test_the_exact_trace_takes_a_product_for_each_parameter():
    config = OptimizabilityConfig(max_hvps=16, trace_method="exact", **NEVER)
    model = perceptron(5)
    expected = forecast(model, pairs(4), config, loss_fn=squares)
    assert expected.hvps == measure(model, pairs(4), config, loss_fn=squares).hvps == 7 + expected.parameters + 2


def test_the_check_of_a_fallback_counts():
    model = bert()
    model.dropout = Once()
    config = OptimizabilityConfig(max_hvps=16, **NEVER)
    expected = forecast(model, ROWS, config)
    assert expected.hvps == measure(model, ROWS, config).hvps == 18


def test_seconds_are_those_of_each_kind_of_product(monkeypatch: pytest.MonkeyPatch):
    """On a clock by which everything takes a second."""
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr("hf_optimizability.measurement.forecast.time", clock)
    model = bert()
    batches = [ROWS[0], {key: value[:1] for key, value in ROWS[1].items()}]  # 4/3 of the larger one
    options = {"max_hvps": 32, **NEVER}
    plain = forecast(model, batches, OptimizabilityConfig(**options))
    # 11 gradients; 4 examples one by one; 15 products of Lanczos and 2 along the gradient; 15 of the trace, 4 at once.
    assert plain.seconds == pytest.approx(11 + 4 + 4 / 3 * (17 + 15 / 4))
    assert plain.seconds_per_hvp == pytest.approx(4 / 3)
    optimizer = torch.optim.AdamW(model.parameters())
    all_kinds = forecast(model, batches, OptimizabilityConfig(block_eigenvalues=True, **options), optimizer=optimizer)
    # 6 for the sharpness, 6 for the blocks; 9 of Lanczos and 9 of the trace are left.
    assert all_kinds.seconds == pytest.approx(21 + 4 + 4 / 3 * (6 + 6 + 9 + 2 + 9 / 4))


@pytest.mark.parametrize(
    ("options", "examples"),
    [
        ({}, 4),
        pytest.param({}, 80, marks=pytest.mark.slow),
        ({"block_eigenvalues": True}, 4),
        pytest.param({"block_eigenvalues": True}, 80, marks=pytest.mark.slow),
        ({"eigen_method": "power_iteration"}, 4),
        ({"trace_method": "hutch++"}, 4),
        ({"trace_method": "xtrace"}, 4),
        pytest.param({"curvature": "gauss_newton"}, 80, marks=pytest.mark.slow),
        ({"engine": "central_difference"}, 80),
    ],
)
def test_a_measurement_takes_the_memory_that_was_forecast(options: dict[str, Any], examples: int):
    """With few examples the vectors decide, with many the graph."""
    config = OptimizabilityConfig(max_hvps=16, **NEVER, **options)
    expected = forecast(perceptron(), pairs(examples), config, loss_fn=squares)
    with PeakMemory() as memory:
        measure(perceptron(), pairs(examples), config, loss_fn=squares)
    much = 3 if config.trace_method == "hutch++" else 1.5  # it may well find that more vectors would not pay
    assert memory.bytes / 1.2 < expected.peak_memory < much * memory.bytes
    assert expected.peak_memory == expected.vector_memory + expected.graph_memory
    assert expected.vectors * 4 * expected.parameters <= expected.vector_memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_an_optimizer_and_of_copies(dtype: torch.dtype):
    model, config = perceptron().to(dtype), OptimizabilityConfig(max_hvps=16, **NEVER)
    optimizer = torch.optim.AdamW(model.parameters())
    expected = forecast(model, pairs(4), config, loss_fn=squares, optimizer=optimizer)
    with PeakMemory() as memory:
        measure(model, pairs(4), config, loss_fn=squares, optimizer=optimizer)
    assert memory.bytes / 1.1 < expected.peak_memory < 1.5 * memory.bytes


def test_embedding_rows_that_no_token_looks_up_take_no_products():
    def bytes_of(vocabulary: int) -> int:
        model = tiny_models.make("bert", dtype=torch.float32, vocab_size=vocabulary)
        return forecast(model, ROWS, OptimizabilityConfig()).peak_memory

    assert bytes_of(50_000) - bytes_of(10_000) == 2 * 4 * 4 * 40_000  # the gradient, and the copy of the weights


def test_graph_memory_grows_with_the_batch():
    """By the same number of bytes for each example."""

    def bytes_of(examples: int) -> int:
        return forecast(perceptron(), pairs(examples), OptimizabilityConfig(), loss_fn=squares).graph_memory

    small, medium, large = (bytes_of(examples) for examples in (20, 40, 80))
    assert large - medium == 2 * (medium - small)
    assert medium - small > 2 * 20 * 20_000 * 4  # the hidden layer, and its slopes


def test_peak_memory_is_that_of_the_tensors_that_a_graph_keeps():
    rows, features, width, outputs = 50, 7, 30, 3
    x = torch.randn(rows, features)
    W, V = torch.randn(features, width, requires_grad=True), torch.randn(width, outputs, requires_grad=True)
    with PeakMemory() as memory:
        hidden = torch.tanh(x @ W)  # keeps the hidden layer, and for a moment what went into it
    assert memory.bytes == 4 * 2 * rows * width
    with PeakMemory() as memory:
        loss = torch.tanh(x @ W).mm(V).square().sum()  # keeps the outputs too
    assert memory.bytes == 4 * 2 * rows * width
    with PeakMemory() as memory:
        torch.autograd.grad(loss, [V])
    assert 4 * (rows * outputs + width * outputs) < memory.bytes < 4 * (4 * rows * outputs + 2 * width * outputs)
    with PeakMemory() as memory:
        kept = [torch.zeros(10, dtype=torch.float64) for _ in range(3)]
        kept[0].view(2, 5).t()[0].add_(1)  # views, and what is written in place
        hidden.mul(1).sum()
        del kept
        torch.zeros(20)
    assert memory.bytes == 3 * 80 + 4 * rows * width + 4


def test_nothing_is_left_behind():
    model = bert()
    model.train()
    model.bert.encoder.eval()
    optimizer = torch.optim.AdamW(model.parameters())
    model(**ROWS[0]).loss.backward()
    optimizer.step()

    def state() -> list[Any]:
        return [
            [tensor.clone() for tensor in model.state_dict().values()],
            [parameter.grad.clone() for parameter in model.parameters()],
            [value.clone() for held in optimizer.state.values() for value in held.values()],
            [module.training for module in model.modules()],
            [torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].astype(np.int64))],
            [torch.is_grad_enabled(), model.config._attn_implementation == "sdpa"],
        ]

    before = state()
    parameters, python_state = list(model.parameters()), random.getstate()
    forecast(model, ROWS, OptimizabilityConfig(profile="full"), optimizer=optimizer)
    torch.testing.assert_close(state(), before, rtol=0, atol=0)
    assert random.getstate() == python_state
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


def test_it_refuses_what_measure_refuses():
    model = perceptron()
    with pytest.raises(ValueError, match="`batches` is empty"):
        forecast(model, [], loss_fn=squares)
    with pytest.raises(ValueError, match="no_such_block"):
        forecast(model, pairs(4), OptimizabilityConfig(blocks=["no_such_block"]), loss_fn=squares)
    with pytest.raises(TypeError, match="RMSprop"):
        forecast(model, pairs(4), loss_fn=squares, optimizer=torch.optim.RMSprop(model.parameters()))
    with pytest.raises(MeasurementError, match="The loss on the probe set is nan"):
        forecast(model, [(pair[0] * torch.nan, pair[1]) for pair in pairs(4)], loss_fn=squares)
    with pytest.raises(MeasurementError, match="can't be differentiated twice"):
        config = OptimizabilityConfig(engine="double_backward")
        forecast(nn.Sequential(model, Once()), pairs(4), config, loss_fn=squares)


def test_batches_that_do_not_fit_are_halved():
    calls = itertools.count(1)

    def tight(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if next(calls) > 1 and len(batch[0]) > 100:  # the first is the check of the arguments
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return squares(model, batch)

    fitting = forecast(perceptron(), pairs(100), loss_fn=squares)
    assert forecast(perceptron(), pairs(200), loss_fn=tight).peak_memory == fitting.peak_memory


def test_it_reads_as_one_line():
    found = Forecast(
        parameters=22_713_986,
        hvps=64,
        seconds=312.0,
        peak_memory=3 * 2**29,
        vectors=40,
        vector_memory=2**30,
        graph_memory=2**29,
        seconds_per_hvp=0.25,
    )
    assert str(found) == (
        "at most 64 Hessian-vector products with 22.7M parameters, 5.2 min and 1.5 GiB of memory (250 ms a product; "
        "512 MiB for the graph of a batch, 1 GiB for 40 vectors)"
    )
