# SPDX-License-Identifier: Apache-2.0
"""Which engine a measurement takes, what it says of it, and in what precision it is made."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_optimizability import Measurement, MeasurementError, OptimizabilityConfig, measure
from hf_optimizability.objective.parameter_blocks import name_blocks
from tests.support import tiny_models


ROWS = tiny_models.cut(tiny_models.examples("bert", 6, dtype=torch.float32), 3)
WHOLE = {key: torch.cat([batch[key] for batch in ROWS]) for key in ROWS[0]}


def bert(dtype: torch.dtype = torch.float32) -> nn.Module:
    return tiny_models.make("bert", dtype=dtype)


class Once(nn.Module):
    """The identity, by default without a second derivative."""

    function: type[torch.autograd.Function] = tiny_models.OnceDifferentiable

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


def bert_once() -> nn.Module:
    model = bert()
    model.dropout = Once()
    return model


def config(**options: object) -> OptimizabilityConfig:
    return OptimizabilityConfig(**{"trace_tolerance": 0.05, "max_hvps": 64, **options})  # type: ignore[arg-type]


@cache
def plain() -> Measurement:
    return measure(bert(), ROWS, config())


def test_the_exact_engine_is_the_first_choice():
    measurement = plain()
    assert (measurement.engine, measurement.attention) == ("double_backward", "math")
    assert measurement.fallback is None
    assert measurement.central_difference_error is None


def test_auto_falls_back_to_differences_and_says_why():
    exact = plain()
    measurement = measure(bert_once(), ROWS, config())
    assert measurement.engine == "central_difference"
    assert "once_differentiable" in str(measurement.fallback)
    assert 0 < measurement.central_difference_error < 0.05
    assert measurement.hessian.lambda_max.value == pytest.approx(exact.hessian.lambda_max.value, rel=0.02)
    errors = measurement.hessian.trace.std_error + exact.hessian.trace.std_error
    assert abs(measurement.hessian.trace.value - exact.hessian.trace.value) < 4 * errors


def test_differences_across_kinks_are_refused():
    torch.manual_seed(0)
    hidden = [layer for _ in range(6) for layer in (nn.Linear(400, 400), nn.ReLU())]
    model = nn.Sequential(nn.Linear(20, 400), nn.ReLU(), *hidden, Once(), nn.Linear(400, 1))
    batch = (torch.randn(200, 20), torch.randn(200, 1))

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    with pytest.raises(MeasurementError, match="kinks"):
        measure(model, [batch], config(), loss_fn=loss_fn)


def test_differences_that_were_asked_for_are_held_against_the_exact_product():
    measurement = measure(bert(), ROWS, config(engine="central_difference"))
    assert measurement.fallback is None
    assert 0 < measurement.central_difference_error < 0.05


def test_an_engine_that_was_asked_for_is_not_replaced():
    with pytest.raises(MeasurementError, match="once_differentiable"):
        measure(bert_once(), ROWS, config(engine="double_backward"))


class FailsLater(torch.autograd.Function):
    """The identity, whose backward pass fails from some call on."""

    passes = itertools.count()

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if next(FailsLater.passes) >= 0:
            raise RuntimeError("broken on purpose")
        return gradient


@pytest.mark.parametrize("options", [{}, {"engine": "double_backward"}, {"curvature": "gauss_newton"}], ids=str)
@pytest.mark.parametrize("works", [0, 2, 14])
def test_a_backward_pass_that_fails_is_not_blamed_on_the_engine(options: dict[str, Any], works: int):
    FailsLater.passes = itertools.count(-works)
    model = bert()
    model.dropout = Once()
    model.dropout.function = FailsLater
    with pytest.raises(MeasurementError, match="broken on purpose") as refused:
        measure(model, ROWS, config(**options))
    assert refused.value.remedy.startswith("Call `loss.backward()` on the same batch several times")


class NotTwice(torch.autograd.Function):
    """The identity, whose backward pass can't be differentiated, and says so in its own way."""

    error: BaseException

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return NotTwice.Slope.apply(gradient)

    class Slope(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            raise NotTwice.error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no"),
        KeyError("no"),
        pytest.param(AssertionError("no"), marks=pytest.mark.slow),
        pytest.param(ZeroDivisionError("no"), marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_any_error_of_a_second_backward_pass_leads_to_the_next_engine(error: Exception):
    NotTwice.error = error
    model = bert()
    model.dropout = Once()
    model.dropout.function = NotTwice
    found = measure(model, ROWS, config(max_hvps=16))
    assert found.engine == "central_difference" and found.fallback.error == type(error).__name__
    with pytest.raises(MeasurementError, match=f"differentiated twice: {type(error).__name__}"):
        measure(model, ROWS, config(engine="double_backward"))


def test_a_keyboard_interrupt_in_a_backward_pass_is_not_kept():
    NotTwice.error = KeyboardInterrupt()
    model = bert()
    model.dropout = Once()
    model.dropout.function = NotTwice
    with pytest.raises(KeyboardInterrupt):
        measure(model, ROWS, config())


@cache
def true_traces() -> dict[str, float]:
    """From the dense Hessian, of all and of each block."""
    model = bert().double().eval()
    diagonal = tiny_models.dense_hessian(model, WHOLE).diagonal()
    named = dict(model.named_parameters())
    traces = [float(piece.sum()) for piece in diagonal.split([parameter.numel() for parameter in named.values()])]
    blocks = {block: sum(traces[row] for row in rows) for block, rows in name_blocks(list(named)).items()}
    return {"all": sum(traces), **blocks}


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_every_trace_method_gives_the_trace_and_its_blocks(method: str):
    found = measure(bert(), ROWS, config(trace_method=method))
    estimates = {"all": found.hessian.trace, **{name: block.trace for name, block in found.blocks.items()}}
    assert estimates.keys() == true_traces().keys()
    for name, truth in true_traces().items():
        assert abs(estimates[name].value - truth) < 5 * estimates[name].std_error + 1e-4


def test_half_precision_weights_are_measured_in_float32():
    model = bert(torch.bfloat16)
    measurement = measure(model, ROWS, config(max_hvps=16))
    same = measure(bert(torch.bfloat16).float(), ROWS, config(max_hvps=16))
    assert measurement.dtype == "float32"
    assert measurement.hessian.lambda_max.value == pytest.approx(same.hessian.lambda_max.value, rel=1e-4)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def with_words() -> nn.Module:
    model = bert()
    model.dropout = Once()
    model.dropout.function = SaysWords
    return model


class SaysWords(torch.autograd.Function):
    """Its backward pass can't be differentiated, and says why in words of its own, in the form of torch's."""

    words = ""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if gradient.requires_grad:
            raise RuntimeError(SaysWords.words)
        return gradient


@pytest.mark.parametrize(
    ("words", "operation"),
    [
        ("derivative for aten::mm is not implemented", "mm"),
        ("cdist(): no derivative", "cdist"),
        ("derivative for aten::sentinel is not implemented", ""),
        ("sentinel(): no such patient", ""),
    ],
)
def test_a_report_names_operations_of_torch_alone(words: str, operation: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SaysWords, "words", words)
    with pytest.raises(MeasurementError) as raised:
        measure(with_words(), ROWS, config(engine="double_backward"))
    why = raised.value.why
    assert why.values["operation"] == operation and why.error == "RuntimeError"
    assert measure(with_words(), ROWS, config(max_hvps=16)).fallback.values["operation"] == operation
