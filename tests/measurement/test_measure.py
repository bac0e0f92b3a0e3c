# SPDX-License-Identifier: Apache-2.0
"""What a measurement holds besides the Hessian's trace and ends, each against its dense truth."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_optimizability import Measurement, MeasurementError, OptimizabilityConfig, measure
from hf_optimizability.measurement.measure import measure_objective
from hf_optimizability.objective.objective import Objective
from hf_optimizability.objective.parameter_blocks import name_blocks
from hf_optimizability.report import OptimizabilityReport
from tests.support import tiny_models


EXAMPLES = 6
PRECISE: dict[str, Any] = {"eigen_tolerance": 1e-6, "trace_tolerance": 0.02, "max_hvps": 400}
PRECISE_ENDS = {**PRECISE, "trace_tolerance": 0.5}  # where nothing looks at the trace
SHORT = OptimizabilityConfig(max_hvps=16)


def rows(size: int) -> list[dict[str, Tensor]]:
    return tiny_models.cut(tiny_models.examples("bert", EXAMPLES), size)


def bert() -> nn.Module:
    return tiny_models.make("bert")


def gradients(model: nn.Module) -> Tensor:
    [whole] = rows(EXAMPLES)
    pieces = torch.autograd.grad(model(**whole).loss, list(model.parameters()), materialize_grads=True)
    return torch.cat([piece.flatten() for piece in pieces])


@pytest.fixture(scope="module")
def hessian() -> Tensor:
    return tiny_models.dense_hessian(bert().eval(), rows(EXAMPLES)[0])


@pytest.fixture(scope="module")
def with_sgd() -> Measurement:
    model = bert()
    return measure(model, rows(2), SHORT, optimizer=torch.optim.SGD(model.parameters(), lr=0.05))


class TestOptimizer:
    def test_of_sgd_the_sharpness_is_lambda_max_and_the_limit_two_over_the_learning_rate(self, with_sgd: Measurement):
        found = with_sgd
        assert found.optimizer_stability.sharpness == found.hessian.lambda_max
        assert found.optimizer_stability.limit == pytest.approx(40) and found.optimizer_stability.learning_rate == 0.05
        assert found.optimizer_stability.optimizer == "SGD"

    def test_of_adam_it_is_that_of_the_preconditioned_hessian(self, hessian: Tensor):
        model = bert()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-12, eps=1e-3)
        model.eval()(**rows(EXAMPLES)[0]).loss.backward()
        optimizer.step()  # moves the weights by next to nothing
        optimizer.zero_grad()
        found = measure(model, rows(2), OptimizabilityConfig(**PRECISE_ENDS), optimizer=optimizer)
        scale = (gradients(model).abs() + 1e-3).sqrt()  # after one step, v̂ is the squared gradient
        truth = float(torch.linalg.eigvalsh(hessian / scale[:, None] / scale)[-1])
        assert found.optimizer_stability.sharpness.value == pytest.approx(truth, rel=1e-5)
        assert found.optimizer_stability.sharpness.value != pytest.approx(found.hessian.lambda_max.value, rel=0.1)

    def test_the_critical_learning_rate_is_where_the_loss_rises(self, with_sgd: Measurement):
        model, found = bert().eval(), with_sgd.optimizer_stability.critical
        start, step = nn.utils.parameters_to_vector(model.parameters()).detach(), gradients(model)
        losses = []
        for rate in (0.0, found.low, found.high):
            nn.utils.vector_to_parameters(start - rate * step, model.parameters())
            losses.append(float(model(**rows(EXAMPLES)[0]).loss.detach()))
        assert found.converged and losses[1] < losses[0] < losses[2]

    def test_one_that_cannot_be_read_is_refused(self):
        model = bert()
        with pytest.raises(TypeError, match="Rprop"):
            measure(model, rows(2), optimizer=torch.optim.Rprop(model.parameters()))


def test_the_quadratic_model_is_along_the_gradient(hessian: Tensor, with_sgd: Measurement):
    found = with_sgd.quadratic_model
    g = gradients(bert().eval())
    assert found.gradient_squared == pytest.approx(float(g @ g), rel=1e-10)
    assert found.curvature == pytest.approx(float(g @ hessian @ g), rel=1e-8)


def test_the_noise_scale_is_from_the_batches():
    torch.manual_seed(0)
    model, inputs = nn.Linear(3, 1, dtype=torch.float64), 1 + torch.rand(7, 3, dtype=torch.float64)

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) - 5).square().mean()

    found = measure(model, list(inputs[:, None]), loss_fn=loss_fn).noise_scale
    slopes = 2 * (model(inputs) - 5).detach()
    each = torch.cat([slopes * inputs, slopes], dim=1)
    noise = float(each.var(dim=0).sum())
    signal = float(each.mean(dim=0).square().sum()) - noise / 7
    assert found.value == pytest.approx(noise / signal, rel=1e-9) and found.low < found.value < found.high
    assert measure(model, [inputs, inputs], loss_fn=loss_fn).noise_scale is None


def test_block_eigenvalues_are_those_of_the_diagonal_blocks(hessian: Tensor, with_sgd: Measurement):
    model = bert()
    found = measure(model, rows(2), OptimizabilityConfig(**PRECISE_ENDS, block_eigenvalues=True))
    named = dict(model.named_parameters())
    owner = torch.repeat_interleave(
        torch.arange(len(named)), torch.tensor([parameter.numel() for parameter in named.values()])
    )
    for name, indices in name_blocks(list(named)).items():
        inside = torch.isin(owner, torch.tensor(indices))
        eigenvalues = torch.linalg.eigvalsh(hessian[inside][:, inside])
        block = found.blocks[name]
        for estimate, truth in ((block.lambda_max, eigenvalues[-1]), (block.lambda_min, eigenvalues[0])):
            assert abs(estimate.value - float(truth)) <= estimate.residual + 1e-9
        assert block.lambda_max.converged and block.lambda_min.converged
    assert with_sgd.blocks["head"].lambda_max is None


@pytest.mark.parametrize("curvature", ["gauss_newton", "empirical_fisher"])
def test_the_other_curvatures(curvature: str):
    model = bert().eval()
    parameters, outer = list(model.parameters()), []
    for batch in rows(1):
        slopes = [
            torch.autograd.grad(logit, parameters, retain_graph=True, materialize_grads=True)
            for logit in model(**batch).logits[0]
        ]
        jacobian = torch.stack([torch.cat([piece.flatten() for piece in row]) for row in slopes])
        probabilities = model(**batch).logits[0].softmax(-1).detach()
        if curvature == "gauss_newton":
            inner = probabilities.diag() - torch.outer(probabilities, probabilities)
        else:
            residual = probabilities - nn.functional.one_hot(batch["labels"][0], len(probabilities))
            inner = torch.outer(residual, residual)
        outer.append(jacobian.T @ inner @ jacobian)
    truth = torch.stack(outer).mean(dim=0)
    found = measure(model, rows(1), OptimizabilityConfig(**PRECISE, curvature=curvature))
    assert found.curvature == curvature
    assert found.hessian.lambda_max.value == pytest.approx(float(torch.linalg.eigvalsh(truth)[-1]), rel=1e-5)
    assert abs(found.hessian.trace.value - float(truth.trace())) <= 4 * found.hessian.trace.std_error
    assert found.blocks["head"].lambda_max is None and found.engine != "central_difference"


def out_of_memory_above(size: int) -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
    """The model's loss on a device with memory for so many examples."""

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        if len(batch["labels"]) > size:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return model(**batch).loss

    return loss_fn


class TestMemory:
    CONFIG = OptimizabilityConfig(trace_tolerance=1e-9, eigen_tolerance=1e-9, max_hvps=16)

    def test_batches_are_halved_until_they_fit_and_nothing_else_changes(self):
        model = bert()
        found = self.measured(model, 6, memory=2)
        whole = self.measured(model, 6, memory=6)
        assert (found.batch_size, whole.batch_size) == (2, 6)  # 6, 3, 2
        assert found.loss == pytest.approx(whole.loss, rel=1e-10)
        assert found.grad_norm == pytest.approx(whole.grad_norm, rel=1e-10)
        assert found.hessian.lambda_max.value == pytest.approx(whole.hessian.lambda_max.value, rel=1e-8)
        assert found.hessian.trace.value == pytest.approx(whole.hessian.trace.value, rel=1e-8)

    def measured(self, model: nn.Module, size: int, *, memory: int) -> Measurement:
        objective = Objective(model, rows(size), loss_fn=out_of_memory_above(memory))
        return measure_objective(objective, self.CONFIG)[0]

    def test_what_fits_is_what_the_next_measurement_starts_with(self):
        objective = Objective(bert(), rows(4), loss_fn=out_of_memory_above(2))
        _, fitting = measure_objective(objective, self.CONFIG)
        assert fitting.batch_size == 2

    def test_not_even_one_example_fits(self):
        with pytest.raises(MeasurementError, match="a single example"):
            self.measured(bert(), 2, memory=0)

    def test_a_batch_that_cannot_be_cut(self):
        batch = {**rows(4)[0], "table": torch.zeros(7, 2)}

        def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return out_of_memory_above(2)(model, {k: v for k, v in batch.items() if k != "table"})

        with pytest.raises(MeasurementError, match=r"lengths.*probe_batch_size"):
            measure_objective(Objective(bert(), [batch], loss_fn=loss_fn), self.CONFIG)


def test_a_backward_pass_that_is_no_derivative_is_refused():
    class StraightThrough(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            return gradient * ctx.saved_tensors[0].roll(1, dims=-1)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(3, 2))

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        return model[2](StraightThrough.apply(model[1](model[0](batch).tanh()))).square().mean()

    with pytest.raises(MeasurementError, match=r"not its slope|not symmetric"):
        measure(model, [torch.randn(5, 4)], loss_fn=loss_fn)


class TestExamplesLearntByHeart:
    CONFIG = OptimizabilityConfig(profile="light")

    def learnt(self, margin: float) -> tuple[nn.Module, dict[str, Tensor]]:
        """A classifier in float32, its last margins `margin` times as large: as if it had learnt for longer."""
        model = tiny_models.make("bert", **tiny_models.TWO_LAYERS["bert"]).eval().float()
        [batch] = rows(EXAMPLES)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(300):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        with torch.no_grad():
            for parameter in model.classifier.parameters():
                parameter *= margin
        return model, batch

    @pytest.mark.slow  # the next one goes further
    def test_are_measured_for_all_their_rounding(self):
        """Second derivatives are symmetric to 5e-4 here, and to 1e-13 in float64."""
        model, batch = self.learnt(2.3)
        found = measure(model, [batch], self.CONFIG)
        exact = measure(copy.deepcopy(model).double(), [batch], self.CONFIG)
        assert found.loss < 1e-6
        assert found.hessian.lambda_max.value == pytest.approx(exact.hessian.lambda_max.value, rel=0.1)

    def test_are_not_where_nothing_but_rounding_is_left(self):
        model, batch = self.learnt(4.0)
        with pytest.raises(MeasurementError, match="near 0 that rounding"):
            measure(model, [batch], self.CONFIG)


def test_all_of_it_comes_back_from_json(tmp_path):
    model = bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)  # an infinite limit
    config = OptimizabilityConfig(max_hvps=40, block_eigenvalues=True)
    measurement = measure(model, rows(2), config, optimizer=optimizer)
    assert measurement.optimizer_stability.limit == float("inf")
    report = OptimizabilityReport(measurements=[measurement])
    json.loads(report.save_json(tmp_path).read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    [loaded] = OptimizabilityReport.load(tmp_path).measurements
    assert loaded == measurement


class ManyTensors(nn.Module):
    def __init__(self, number: int):
        super().__init__()
        torch.manual_seed(0)
        self.tensors = nn.ParameterList(torch.randn(2) for _ in range(number))
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(x + torch.stack(list(self.tensors)).sin().sum(0)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize(
    "options", [{}, {"block_eigenvalues": True, "blocks": ["tensors*"]}, {"landscape": True}], ids=str
)
def test_names_are_looked_up_in_proportion_to_their_number(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]):
    look_up = nn.Module.get_parameter
    calls = 0

    def counted(module: nn.Module, name: str) -> nn.Parameter:
        nonlocal calls
        calls += 1
        return look_up(module, name)

    monkeypatch.setattr(nn.Module, "get_parameter", counted)
    batch = {"x": torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), "labels": torch.arange(6) % 3}
    per_product = []
    for number in (20, 80):
        calls = 0
        model = ManyTensors(number)
        found = measure(
            model,
            [batch],
            OptimizabilityConfig(profile="light", **options),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        )
        per_product.append(calls / found.hvps)
    assert per_product[1] < 6 * per_product[0]


@pytest.mark.parametrize("factor", [1e-20, 1e-10, 1e10])
def test_a_loss_that_is_scaled_scales_the_numbers(factor: float):
    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch)["loss"] * factor

    batch = {"x": torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), "labels": torch.arange(6) % 3}
    config = OptimizabilityConfig(profile="light")
    expected = measure(ManyTensors(2), [batch], config)
    found = measure(ManyTensors(2), [batch], config, loss_fn=loss_fn)
    assert found.grad_norm == pytest.approx(factor * expected.grad_norm, rel=1e-5)
    assert found.hessian.lambda_max.value == pytest.approx(factor * expected.hessian.lambda_max.value, rel=1e-4)
    assert found.quadratic_model.curvature == pytest.approx(factor**3 * expected.quadratic_model.curvature, rel=1e-4)
    assert [check.verdict for check in found.eigenvalue_checks] == ["agrees", "agrees"]


def test_parameters_of_several_dtypes_in_one_block():
    batch = {"x": torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), "labels": torch.arange(6) % 3}
    config = OptimizabilityConfig(profile="light", blocks=["*"])
    expected = measure(ManyTensors(3), [batch], config)
    mixed = ManyTensors(3)
    mixed.tensors[1] = nn.Parameter(mixed.tensors[1].detach().double())
    found = measure(mixed, [batch], config, loss_fn=mixed_loss)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    assert found.hessian.lambda_max.value == pytest.approx(expected.hessian.lambda_max.value, rel=1e-3)


def mixed_loss(model: ManyTensors, batch: dict[str, Tensor]) -> Tensor:
    shift = torch.stack([tensor.float() for tensor in model.tensors]).sin().sum(0)
    return nn.functional.cross_entropy(model.head(torch.tanh(batch["x"] + shift)), batch["labels"])


def test_memory_that_does_not_suffice_for_the_first_pass():
    objective_of_two = measure(bert(), rows(4), SHORT, loss_fn=out_of_memory_above(2))
    assert objective_of_two.batch_size == 2
    with pytest.raises(MeasurementError, match="smaller batches are not known to have the same mean"):
        measure(bert(), rows(2), SHORT, loss_fn=out_of_memory_above(1))
    with pytest.raises(MeasurementError, match="a single example"):
        measure(bert(), rows(2), SHORT, loss_fn=out_of_memory_above(0))
