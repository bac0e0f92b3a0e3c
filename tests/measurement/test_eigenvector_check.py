# SPDX-License-Identifier: Apache-2.0
"""Eigenvalues checked along their own vectors, and products that are not those of a Hessian."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from hf_optimizability import MeasurementError, OptimizabilityConfig, measure
from hf_optimizability.curvature.eigenvalue_check import check_eigenvalues
from hf_optimizability.linalg.operator import DenseOperator
from hf_optimizability.measurement.forecast import forecast
from hf_optimizability.measurement.measure import measure_objective
from hf_optimizability.objective.objective import Objective
from hf_optimizability.report import OptimizabilityReport
from tests.support import tiny_models


PRECISE = OptimizabilityConfig(eigen_tolerance=1e-4, max_hvps=200)


class Detached(torch.autograd.Function):
    """x³, whose gradient is right and whose second derivative is missing: symmetric, but not the Hessian."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * 3 * ctx.saved_tensors[0].detach() ** 2


class Halved(torch.autograd.Function):
    """x³, whose gradient is right and whose second derivative is half of what it should be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return gradient * 1.5 * (x**2 + x.detach() ** 2)


class Cube(torch.autograd.Function):
    """x³, with all its derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * 3 * ctx.saved_tensors[0] ** 2


class Skewed(torch.autograd.Function):
    """sin x, whose gradient is right and whose second derivative is that of another entry."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        other = ctx.saved_tensors[0].roll(1, dims=-1)
        return gradient * (ctx.saved_tensors[0].cos().detach() + other - other.detach())


class Net(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor], *, size: int = 6):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, size), nn.Linear(size, 3)
        self.between = between

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.last(self.between(torch.tanh(self.first(x))))
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def batch(number: int = 12, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    x = torch.randn(number, 4, generator=torch.Generator().manual_seed(1))
    return {"x": x.to(dtype), "labels": torch.arange(number) % 3}


def dense(model: nn.Module, **data: Tensor) -> Tensor:
    """Eigenvalues of the Hessian, by differences of gradients in float64."""
    model = copy.deepcopy(model).double().eval()
    parameters = list(model.parameters())
    data = {name: value.double() if value.is_floating_point() else value for name, value in data.items()}

    def gradient() -> Tensor:
        loss = model(**data)["loss"]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, materialize_grads=True)])

    rows = []
    for parameter in parameters:
        for index in range(parameter.numel()):
            entry = parameter.data.view(-1)[index : index + 1]
            before = entry.clone()
            ahead, behind = (entry.copy_(before + step) is not None and gradient() for step in (1e-5, -1e-5))
            entry.copy_(before)
            rows.append((ahead - behind) / 2e-5)
    hessian = torch.stack(rows)
    return torch.linalg.eigvalsh((hessian + hessian.T) / 2)


class TestExactProducts:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("name", tiny_models.MODELS)
    def test_agree_with_one_difference_for_both_ends(self, name: str, dtype: torch.dtype):
        model, rows = tiny_models.make(name, dtype=dtype), tiny_models.examples(name, 4, dtype=dtype)
        found = measure(model, tiny_models.cut(rows, 4), OptimizabilityConfig(profile="light"))
        assert found.engine == "double_backward"
        assert [(check.which, check.verdict) for check in found.eigenvalue_checks] == [
            ("lambda_max", "agrees"),
            ("lambda_min", "agrees"),
        ]
        assert [len(check.differences) for check in found.eigenvalue_checks] == [1, 1]
        assert found.eigenvalue_checks[0].value == found.hessian.lambda_max.value

    @pytest.mark.parametrize("engine", ["auto", "central_difference"])
    def test_the_products_are_counted_and_forecast(self, engine: str):
        config = OptimizabilityConfig(profile="light", engine=engine, trace_tolerance=1e-9, eigen_tolerance=1e-9)
        spent: list[int] = []
        found, _ = measure_objective(Objective(Net(torch.sin), [batch()]), config, on_products=spent.append)
        assert found.hvps == sum(spent) <= forecast(Net(torch.sin), [batch()], config).hvps

    def test_of_power_iteration_the_largest_alone(self):
        found = measure(Net(torch.sin), [batch()], OptimizabilityConfig(eigen_method="power_iteration"))
        assert [(check.which, check.verdict) for check in found.eigenvalue_checks] == [("lambda_max", "agrees")]

    @pytest.mark.parametrize("curvature", ["gauss_newton", "empirical_fisher"])
    def test_of_other_matrices_there_are_no_differences(self, curvature: str):
        config = OptimizabilityConfig(profile="light", curvature=curvature)
        assert measure(Net(torch.sin), [batch()], config).eigenvalue_checks == ()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_that_lack_a_second_derivative_are_refused(self, dtype: torch.dtype):
        model = Net(lambda hidden: Detached.apply(hidden)).to(dtype)
        with pytest.raises(MeasurementError, match=r"by differences of the gradient.*`Detached`") as refused:
            measure(model, [batch(dtype=dtype)], PRECISE)
        assert "central_difference" in refused.value.remedy
        found = measure(model, [batch(dtype=dtype)], dataclasses.replace(PRECISE, engine="central_difference"))
        truth = dense(model, **batch())
        assert found.hessian.lambda_max.value == pytest.approx(float(truth[-1]), rel=5e-3)

    def test_beside_kinks_that_lie_within_the_steps_are_kept(self):
        """One unit switches at 1e-9 of where it is: the gradient jumps, the second derivative does not know."""
        model = nn.Linear(1, 2, bias=False).double()
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[1.0], [1.0]]))

        def loss_fn(model: nn.Module, data: Tensor) -> Tensor:
            first, second = model(data)[0]
            return first.square() + 0.5 * second.square() + 1e-3 * torch.relu(first - 1 - 1e-9)

        found = measure(model, [torch.ones(1, 1).double()], PRECISE, loss_fn=loss_fn)
        assert found.hessian.lambda_max.value == pytest.approx(2.0)
        top = found.eigenvalue_checks[0]
        assert (
            top.verdict == "moves with the step"
            and len(top.differences) == 2
            and top.reason.code == "kinks_within_steps"
        )

    @pytest.mark.slow
    def test_beside_kinks_so_many_that_differences_settle_are_kept(self):
        """The mean of |w − t| over a grid of t bends, though none of its terms does."""
        model = nn.Linear(1, 1, bias=False).double()
        nn.init.ones_(model.weight)
        grid = 1 + torch.linspace(-1e-4, 1.003e-4, 100_001, dtype=torch.float64)[:, None]

        def loss_fn(model: nn.Module, data: Tensor) -> Tensor:
            return model.weight.square().sum() + 1e-4 * (model.weight - data).abs().mean()

        found = measure(model, [grid], dataclasses.replace(PRECISE, trace_method="exact"), loss_fn=loss_fn)
        assert found.hessian.lambda_max.value == pytest.approx(2.0)
        [top, *_] = found.eigenvalue_checks
        assert top.verdict == "not checked" and top.reason.code == "kinks_settle"
        assert top.differences[0] == pytest.approx(3, rel=0.01)

    def test_that_lack_a_second_derivative_are_refused_beside_kinks(self):
        """Dense kinks alone explain differences that settle elsewhere; a custom function next to them does as well."""
        model = Net(lambda hidden: torch.relu(Detached.apply(hidden)))
        with pytest.raises(MeasurementError, match=r"by differences of the gradient.*`Detached`"):
            measure(model, [batch()], PRECISE)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_custom_functions_next_to_kinks_are_told_apart_by_their_second_derivative(self, dtype: torch.dtype):
        """Along eigenvectors kinks make differences move, which excuses anything; along no vector all of it moves."""
        for seed in range(4):
            torch.manual_seed(seed)
            layers = nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)
            trunk = nn.Sequential(*layers).to(dtype)
            data = {"x": torch.randn(64, 4, dtype=dtype), "labels": torch.randint(3, (64,))}
            config = OptimizabilityConfig(max_hvps=16, probe_seed=seed)

            def loss_fn(model: nn.Module, data: dict[str, Tensor], cube: Any) -> Tensor:
                return functional.cross_entropy(model[-1](cube.apply(model[:-1](data["x"]))), data["labels"])

            found = measure(trunk, [data], config, loss_fn=partial(loss_fn, cube=Cube))
            assert found.engine == "double_backward" and found.fallback is None
            with pytest.raises(MeasurementError, match=r"differentiated wrongly.*`Halved`"):
                measure(trunk, [data], config, loss_fn=partial(loss_fn, cube=Halved))

    def test_a_second_derivative_that_is_wrong_away_from_both_ends_is_refused(self):
        """The trace would be wrong: the ends are those of a quadratic, which has nothing to do with it."""

        def loss_fn(model: nn.ParameterDict, data: Tensor) -> Tensor:
            return 50 * model["a"][0] ** 2 - 50 * model["a"][1] ** 2 + Halved.apply(model["b"]).sum()

        model = nn.ParameterDict({"a": torch.ones(2).double(), "b": torch.linspace(0.5, 1.5, 20).double()})
        with pytest.raises(MeasurementError, match=r"differentiated wrongly.*`Halved`"):
            measure(model, [torch.ones(1)], OptimizabilityConfig(max_hvps=64), loss_fn=loss_fn)

    @pytest.mark.slow
    def test_beside_a_normalization_of_almost_nothing_are_kept(self):
        """Mask tokens of 0 under a LayerNorm (epsilon 1e-12): the Hessian is 1e13, and another 1e-9 further on."""
        torch.manual_seed(0)
        size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        decoder = {f"decoder_{name}": value for name, value in size.items()}
        images = {"image_size": 16, "patch_size": 4, "num_channels": 1, "mask_ratio": 0.5, "initializer_range": 0.5}
        model = ViTMAEForPreTraining(ViTMAEConfig(**size, **decoder, **images)).double()
        pixels = torch.randn(8, 1, 16, 16).double()
        batches = [{"pixel_values": pixels[:4]}, {"pixel_values": pixels[4:]}]
        found = measure(model, batches, OptimizabilityConfig(max_hvps=64, probe_seed=2))
        check = found.eigenvalue_checks[1]
        assert check.verdict == "agrees" and check.value < -1e13 and check.error < 0.01

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_an_eigenvalue_of_zero_is_never_refused(self, dtype: torch.dtype):
        """Fewer examples than parameters: the smallest eigenvalue is rounding."""
        data = torch.randn(5, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
        model = nn.Linear(20, 1).to(dtype)
        loss_fn = lambda model, data: (model(data)[:, 0] - 1).square().mean()  # noqa: E731
        found = measure(model, [data], PRECISE, loss_fn=loss_fn)
        top, bottom = found.eigenvalue_checks
        assert top.verdict == "agrees" and bottom.verdict in ("agrees", "not checked")
        assert abs(found.hessian.lambda_min.value) < 1e-5 * found.hessian.lambda_max.value

    def test_in_json_and_pages(self, tmp_path):
        measurement = measure(Net(torch.sin), [batch()], OptimizabilityConfig(profile="light"))
        report = OptimizabilityReport(measurements=[measurement])
        report.save(tmp_path)
        assert OptimizabilityReport.load(tmp_path).measurements[0].eigenvalue_checks == measurement.eigenvalue_checks
        assert "Eigenvalues along their own vectors | λ" in (tmp_path / "report.md").read_text()
        assert "Eigenvalues along their own vectors" in (tmp_path / "report.html").read_text()
        older = {k: v for k, v in measurement.to_dict().items() if k != "eigenvalue_checks"}
        assert type(measurement).from_dict(older).eigenvalue_checks == ()


class TestDifferences:
    def test_of_a_network_of_relus_are_refused(self):
        torch.manual_seed(0)
        settings = {
            "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32, "vocab_size": 13,
            "max_position_embeddings": 64, "word_embed_proj_dim": 8, "dropout": 0.0, **tiny_models.TOKEN_IDS,
        }  # fmt: skip
        model = OPTForCausalLM(OPTConfig(**settings))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        ids = torch.randint(3, 13, (4, 6), generator=torch.Generator().manual_seed(0))
        data = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        with pytest.raises(MeasurementError, match="kinks"):
            measure(model, [data], OptimizabilityConfig(engine="central_difference"))

    def test_of_routed_experts_are_refused(self):
        torch.manual_seed(2)
        settings = {
            "vocab_size": 13, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "intermediate_size": 8, "max_position_embeddings": 16, "num_experts_per_tok": 1,
            "num_local_experts": 4, **tiny_models.TOKEN_IDS,
        }  # fmt: skip
        model = MixtralForCausalLM(MixtralConfig(**settings))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        ids = torch.randint(3, 13, (16, 12), generator=torch.Generator().manual_seed(0))
        with pytest.raises(MeasurementError, match=r"not an eigenvalue.*routing"):
            measure(model, [{"input_ids": ids, "labels": ids}], OptimizabilityConfig(engine="central_difference"))

    @pytest.mark.parametrize("engine", ["auto", "central_difference"])
    def test_across_a_kink_along_the_eigenvector_alone_are_refused(self, engine: str):
        """Random vectors move this weight too little to meet the kink; the eigenvector moves nothing else."""
        model = nn.Linear(100, 1, bias=False).double()
        with torch.no_grad():
            model.weight.fill_(1.0)
        curvature = torch.ones(100).double()
        centre = torch.full((100,), 0.9).double()
        curvature[0], centre[0] = 30.0, 1.0
        kink = 1 + 2e-5  # within the step along the first axis, of 6e-5; that of random vectors is a tenth there

        def loss_fn(model: nn.Module, data: Tensor) -> Tensor:
            w = model.weight[0]
            smooth = 0.5 * (curvature * tiny_models.OnceDifferentiable.apply(w - centre) ** 2).sum()
            return smooth + 0.01 * torch.relu(w[0] - kink)

        with pytest.raises(MeasurementError, match="not an eigenvalue") as refused:
            measure(model, [torch.ones(1, 1)], OptimizabilityConfig(engine=engine), loss_fn=loss_fn)
        assert ("once_differentiable" in refused.value.reason) == (engine == "auto")

    def test_their_error_is_the_largest_along_all_vectors(self):
        found = measure(Net(torch.sin), [batch()], dataclasses.replace(PRECISE, engine="central_difference"))
        along = max(check.error for check in found.eigenvalue_checks)
        assert found.central_difference_error >= along > 0
        assert [check.verdict for check in found.eigenvalue_checks] == ["agrees", "agrees"]

    @pytest.mark.parametrize("seed", range(3))
    def test_their_error_is_part_of_the_intervals_of_both_ends(self, seed: int):
        torch.manual_seed(seed)
        model = Net(torch.sin)
        truth = dense(model, **batch())
        budget = {"max_hvps": 60, "eigen_tolerance": 1e-6}  # what is left is the error of the differences
        found = measure(model, [batch()], OptimizabilityConfig(engine="central_difference", **budget)).hessian
        for end, value in ((found.lambda_max, float(truth[-1])), (found.lambda_min, float(truth[0]))):
            assert end.low <= value <= end.high
            assert end.high - end.low < 0.1 * abs(end.value) and not end.converged

    def test_take_over_where_second_derivatives_are_not_symmetric(self):
        model = Net(lambda hidden: Skewed.apply(hidden))
        found = measure(model, [batch()], PRECISE)
        truth = dense(model, **batch())
        assert found.engine == "central_difference" and found.central_difference_error < 0.05
        assert found.hessian.lambda_max.value == pytest.approx(float(truth[-1]), rel=5e-3)
        assert found.hessian.lambda_min.value == pytest.approx(float(truth[0]), rel=2e-2)
        assert (
            "not symmetric" in str(found.fallback)
            and "`Skewed`" in str(found.fallback)
            and "`first.weight`" in str(found.fallback)
        )
        with pytest.raises(MeasurementError, match=r"not symmetric.*`Skewed`.*central_difference"):
            measure(model, [batch()], dataclasses.replace(PRECISE, engine="double_backward"))


class TestVerdicts:
    MATRIX = DenseOperator(torch.diag(torch.tensor([-1.0, 5.0], dtype=torch.float64)))
    ENDS = tuple(torch.eye(2, dtype=torch.float64).flip(0))

    def test_a_second_step_is_tried_for_those_alone_that_need_it(self):
        by_step = {1.0: 5.5, 0.5: 5.02}
        found = check_eigenvalues(
            [5.0, -1.0],
            self.ENDS,
            lambda step: DenseOperator(torch.diag(torch.tensor([-1.0, by_step[step]], dtype=torch.float64))),
            steps=[1.0, 0.5, 0.25],
        )
        assert [check.verdict for check in found] == ["agrees", "agrees"]
        assert [check.differences for check in found] == [(5.5, 5.02), (-1.0,)]
        assert found[0].error == pytest.approx(0.004)

    @pytest.mark.parametrize(("kinks", "verdict", "tried"), [(True, "moves with the step", 2), (False, "agrees", 3)])
    def test_a_third_step_is_not_tried_where_kinks_alone_explain_the_first_two(
        self, kinks: bool, verdict: str, tried: int
    ):
        by_step = {1.0: 7.0, 0.5: 6.0, 0.25: 5.02}
        [top] = check_eigenvalues(
            [5.0],
            self.ENDS[:1],
            lambda step: DenseOperator(torch.diag(torch.tensor([-1.0, by_step[step]], dtype=torch.float64))),
            steps=[1.0, 0.5, 0.25],
            has_kinks_alone=lambda: kinks,
        )
        assert (top.verdict, len(top.differences)) == (verdict, tried)

    @pytest.mark.parametrize(
        ("values", "verdicts"),
        [
            ([5.0, -1.0], ["agrees", "agrees"]),
            ([5.04, -1.2], ["agrees", "disagrees"]),
            ([6.0, -1.03], ["disagrees", "not checked"]),
        ],
    )
    def test_settled_differences(self, values: list[float], verdicts: list[str]):
        found = check_eigenvalues(values, self.ENDS, lambda step: self.MATRIX, steps=[1.0, 0.5, 0.25])
        assert [check.verdict for check in found] == verdicts


@pytest.mark.parametrize("wrong", [False, True])
def test_along_rows_of_padding_tokens_differences_decide_nothing(wrong: bool):
    """Tied weights, and the end of each turn as the padding token: torch makes no gradient for its lookup."""
    torch.manual_seed(0)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=12, num_key_value_heads=2, pad_token_id=2, tie_word_embeddings=True, **size)
    )
    tokens = torch.randint(3, 12, (4, 6))
    tokens[:, 1::2] = 2

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        output = model(**batch)
        return output.loss + (10 * Halved.apply(1 + output.logits).mean() if wrong else 0)

    batches = [{"input_ids": tokens, "labels": tokens}]
    if wrong:
        with pytest.raises(MeasurementError, match="differentiated wrongly"):
            measure(model, batches, OptimizabilityConfig(max_hvps=30, engine="double_backward"), loss_fn=loss_fn)
        return
    found = measure(model, batches, OptimizabilityConfig(max_hvps=30))
    assert found.engine == "double_backward"
    assert found.eigenvalue_checks[0].reason.code == "padding_rows"


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_rounding_of_a_large_gradient_is_no_wrong_eigenvalue(scale: float):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    inputs = torch.randn(16, 4)
    batch = (inputs, scale * torch.randn(16, 1))
    found = measure(model, [batch], PRECISE, loss_fn=lambda model, batch: (model(batch[0]) - batch[1]).square().mean())
    ones = torch.cat([inputs, torch.ones(16, 1)], dim=1).double()
    assert found.hessian.lambda_max.value == pytest.approx(
        float(torch.linalg.eigvalsh(2 * ones.T @ ones / 16)[-1]), rel=1e-4
    )
    assert found.eigenvalue_checks[0].verdict == ("agrees" if scale == 1 else "not checked")
