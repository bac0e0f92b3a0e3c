# SPDX-License-Identifier: Apache-2.0
"""The Gauss-Newton matrix against JᵀH_ℓJ from dense Jacobians, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BertForQuestionAnswering

from hf_optimizability.curvature import gauss_newton
from hf_optimizability.curvature.empirical_risk import HvpCounter
from hf_optimizability.curvature.gauss_newton import GaussNewtonOperator, gauss_newton_trace, split_trace
from hf_optimizability.curvature.hessian import HessianOperator
from hf_optimizability.curvature.layer_decoupled import DecoupledHessian
from hf_optimizability.errors import WrongDerivativeError
from hf_optimizability.linalg.statistics import jackknife
from hf_optimizability.linalg.trace import MIN_PROBES
from hf_optimizability.model_state.measuring import math_attention
from hf_optimizability.objective.objective import Objective
from tests.support import tiny_models


NAMES = ["bert", "vit", "resnet", "gpt2"]
PRECISION = {"bert": 1e-10, "vit": 1e-10, "resnet": 1e-10, "gpt2": 1e-6}  # the last computes its loss in float32
EXAMPLES = 5


def columns(size: int, number: int = 3) -> Tensor:
    return torch.randn(size, number, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@cache
def dense(name: str) -> Tensor:
    """`JᵀH_ℓJ` of the mean over all labels that count: H_ℓ = diag(p) − ppᵀ for each, as on paper."""
    model = tiny_models.make(name).eval()
    [batch] = tiny_models.cut(tiny_models.examples(name, EXAMPLES), EXAMPLES)
    named = {key: parameter.detach() for key, parameter in model.named_parameters()}
    labels = batch.pop("labels")

    def logits(*tensors: Tensor) -> Tensor:
        output = functional_call(model, dict(zip(named, tensors, strict=True)), kwargs=batch).logits
        if name == "gpt2":
            return output[:, :-1][labels[:, 1:] != -100]
        return output

    with sdpa_kernel(SDPBackend.MATH):
        pieces = torch.autograd.functional.jacobian(logits, tuple(named.values()))
    jacobian = torch.cat([piece.flatten(2) for piece in pieces], dim=2)
    p = logits(*named.values()).softmax(dim=1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("icn,icd,idm->nm", jacobian, curvature, jacobian) / len(p)


def objective(name: str, size: int = 2) -> Objective:
    return Objective(tiny_models.make(name).eval(), tiny_models.cut(tiny_models.examples(name, EXAMPLES), size))


@pytest.mark.parametrize("name", NAMES)
def test_columns_are_multiplied_by_the_dense_matrix(name: str):
    spent: list[int] = []
    operator = GaussNewtonOperator(objective(name).counting(HvpCounter(spent.append)))
    vectors = columns(operator.size)
    expected = dense(name) @ vectors
    with math_attention():
        assert (operator.matmat(vectors) - expected).norm() <= PRECISION[name] * expected.norm()
    assert spent == [3]


@pytest.mark.parametrize("name", NAMES)
def test_exact_traces(name: str):
    lossy = objective(name)
    size = sum(parameter.numel() for parameter in lossy.parameters)
    segments = [[slice(0, 7), slice(50, size)], [slice(7, 50)]]
    with math_attention():
        total, parts = gauss_newton_trace(lossy, segments)
    diagonal = dense(name).diagonal().numpy()
    expected = [diagonal[:7].sum() + diagonal[50:].sum(), diagonal[7:50].sum()]
    assert [part.value for part in parts] == pytest.approx(expected, rel=PRECISION[name])
    assert total.value == pytest.approx(sum(expected), rel=PRECISION[name])
    assert total.converged and total.std_error == 0 and total.low == total.high == total.value


def test_it_is_positive_semidefinite_where_the_hessian_is_not():
    whole = objective("vit", EXAMPLES)
    unit_vectors = torch.eye(sum(parameter.numel() for parameter in whole.parameters), dtype=torch.float64)
    with math_attention():
        matrix = GaussNewtonOperator(whole).matmat(unit_vectors).numpy()
        hessian = HessianOperator(whole).matmat(unit_vectors).numpy()
    assert np.abs(matrix - matrix.T).max() <= 1e-14
    eigenvalues = np.linalg.eigvalsh(matrix)
    assert eigenvalues[0] >= -1e-13 * eigenvalues[-1]
    assert np.linalg.eigvalsh(hessian)[0] < -0.01 * eigenvalues[-1]


LOSSES = {
    "cross-entropy": lambda z, y: functional.cross_entropy(z, y),
    "smoothed": lambda z, y: functional.cross_entropy(z, y, label_smoothing=0.1),
    "squared error": lambda z, y: functional.mse_loss(z, functional.one_hot(y, 3).double()),
    "fourth powers": lambda z, y: (z**4).sum(dim=1).mean(),
    "cosines, not convex": lambda z, y: (2 * z).cos().sum(dim=1).mean(),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_of_a_linear_model_it_is_the_hessian(loss):
    torch.manual_seed(0)
    model = nn.Linear(4, 3, dtype=torch.float64)
    batch = (columns(20).reshape(15, 4), torch.arange(15) % 3)
    linear = Objective(model, [batch], loss_fn=lambda model, batch: loss(model(batch[0]), batch[1]))
    vectors = columns(15)
    hessian = HessianOperator(linear)
    assert torch.allclose(GaussNewtonOperator(linear).matmat(vectors), hessian.matmat(vectors), rtol=1e-10)
    trace = torch.trace(hessian.matmat(torch.eye(15, dtype=torch.float64)))
    assert gauss_newton_trace(linear, [[slice(0, 15)]])[0].value == pytest.approx(float(trace), rel=1e-12)


def test_a_loss_without_curvature_gives_zero():
    model = nn.Linear(4, 3, dtype=torch.float64)
    linear = Objective(model, [(columns(4, 2).T,)], loss_fn=lambda model, batch: model(batch[0]).mean())
    assert torch.equal(GaussNewtonOperator(linear).matmat(columns(15)), torch.zeros(15, 3))
    assert gauss_newton_trace(linear, [[slice(0, 15)]])[0].value == 0


def test_question_answering_has_two_outputs():
    torch.manual_seed(0)
    model = BertForQuestionAnswering(tiny_models.bert(num_labels=2).config).double().eval()
    positions = torch.tensor([0, 3, 5])
    inputs = {"input_ids": torch.arange(18).reshape(3, 6) % 13}
    answers = {"start_positions": positions, "end_positions": positions.flip(0)}
    whole = Objective(model, [{**inputs, **answers}])
    named = {key: parameter.detach() for key, parameter in model.named_parameters()}

    def logits(*tensors: Tensor) -> Tensor:
        output = functional_call(model, dict(zip(named, tensors, strict=True)), kwargs=inputs)
        return torch.stack([output.start_logits, output.end_logits])

    with sdpa_kernel(SDPBackend.MATH):
        pieces = torch.autograd.functional.jacobian(logits, tuple(named.values()))
    jacobian = torch.cat([piece.flatten(3) for piece in pieces], dim=3).flatten(0, 1)
    p = logits(*named.values()).softmax(dim=2).flatten(0, 1)
    curvature = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / 6  # a mean of two losses, of three examples
    expected = torch.einsum("icn,icd,idm->nm", jacobian, curvature, jacobian)
    vectors = columns(len(expected))
    with math_attention():
        product = GaussNewtonOperator(whole).matmat(vectors)
        trace = gauss_newton_trace(whole, [[slice(0, len(expected))]])[0].value
    assert (product - expected @ vectors).norm() <= 1e-10 * (expected @ vectors).norm()
    assert trace == pytest.approx(float(expected.trace()), rel=1e-10)


def test_frozen_and_unused_parameters():
    model = tiny_models.make("vit").eval()
    model.vit.embeddings.requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    operator = GaussNewtonOperator(Objective(model, tiny_models.cut(tiny_models.examples("vit", EXAMPLES), 2)))
    named = dict(tiny_models.make("vit").named_parameters())
    kept = torch.cat([torch.full((p.numel(),), "embeddings" not in name) for name, p in named.items()])
    vectors = columns(operator.size)
    assert operator.size == kept.sum() + 3
    with math_attention():
        product = operator.matmat(vectors)
    assert torch.equal(product[:3], torch.zeros(3, 3))
    assert torch.allclose(product[3:], dense("vit")[kept][:, kept] @ vectors[3:], rtol=1e-9, atol=1e-12)


def test_adapters_of_peft():
    """They reach the logits by the module that they wrap: the matrix of the whole model, pulled back to A and B."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_models.make("bert"), config).double().eval()
    [batch] = tiny_models.cut(tiny_models.examples("bert", EXAMPLES), EXAMPLES)
    adapted = Objective(model, [batch])
    inputs = {"input_ids": batch["input_ids"]}

    def logits(*tensors: Tensor) -> Tensor:
        return functional_call(model, dict(zip(adapted.names, tensors, strict=True)), kwargs=inputs).logits

    point = tuple(parameter.detach() for parameter in adapted.parameters)
    with math_attention():
        pieces = torch.autograd.functional.jacobian(logits, point)
        jacobian = torch.cat([piece.flatten(2) for piece in pieces], dim=2)
        p = logits(*point).softmax(dim=1)
        curvature = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / EXAMPLES
        expected = torch.einsum("icn,icd,idm->nm", jacobian, curvature, jacobian)
        product = GaussNewtonOperator(adapted).matmat(torch.eye(len(expected), dtype=torch.float64)[:, :20])
        trace, _ = gauss_newton_trace(adapted, [[slice(0, len(expected))]])
    assert torch.allclose(product, expected[:, :20], rtol=1e-9, atol=1e-13)
    assert trace.value == pytest.approx(float(expected.trace()), rel=1e-10)


class Tied(nn.Module):
    """A tanh network whose second layer is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.twice(torch.tanh(self.first(x))))
        return self.last(torch.tanh(self.twice(hidden)))


def mean_of_cross_entropies(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def network(kind: Callable[[], nn.Module], *, examples: int = 12, size: int = 5, learned: bool = True) -> Objective:
    torch.manual_seed(0)
    model = kind().double()
    x = columns(examples, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
        # Before it has learned, R outweighs G.
        y = model(x).argmax(dim=1) if learned else torch.arange(examples) % 3
    return Objective(model, list(zip(x.split(size), y.split(size), strict=True)), loss_fn=mean_of_cross_entropies)


def dense_hessian(objective: Objective) -> Tensor:
    """Of the mean over all examples, by `torch.autograd.functional`."""
    named = {name: parameter.detach() for name, parameter in objective.model.named_parameters()}
    x, y = (torch.cat(tensors) for tensors in zip(*objective.batches, strict=True))

    def loss(vector: Tensor) -> Tensor:
        pieces = zip(named.items(), vector.split([p.numel() for p in named.values()]), strict=True)
        tensors = {name: piece.view_as(p) for (name, p), piece in pieces}
        return functional.cross_entropy(functional_call(objective.model, tensors, (x,)), y)

    return torch.autograd.functional.hessian(loss, torch.cat([p.flatten() for p in named.values()]))


class Hidden(nn.Module):
    """A tanh network with one hidden layer, and something between its two layers."""

    between: Callable[[Tensor], Tensor] = staticmethod(lambda hidden: hidden)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(torch.tanh(self.first(x))))


class Standardized(Hidden):
    between = staticmethod(lambda hidden: hidden - hidden.mean(0, keepdim=True))


def class_weights(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1], weight=torch.tensor([1.0, 2.0, 5.0]).double())


def information_maximization(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    p = model(batch[0]).softmax(-1)
    mean = p.mean(0)
    return -(p * p.log()).sum(-1).mean() + (mean * mean.log()).sum() + math.log(3)


def mean_prediction(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    mean = model(batch[0]).softmax(-1).mean(0)
    return mean_of_cross_entropies(model, batch) + 0.5 * (mean * mean.log()).sum()


def spread_of_predictions(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return mean_of_cross_entropies(model, batch) + 0.1 * model(batch[0]).var(dim=0, correction=0).sum()


COUPLINGS = {
    "class weights": class_weights,
    "information maximization": information_maximization,
    "mean prediction": mean_prediction,
    "spread of predictions": spread_of_predictions,
    "layer over the batch": mean_of_cross_entropies,
}
COUPLED_LAYERS: dict[str, type[nn.Module]] = {"layer over the batch": Standardized}


def halves(size: int) -> list[list[slice]]:
    return [[slice(0, 9), slice(20, size)], [slice(9, 20)]]


def block_traces(diagonal: Tensor) -> list[float]:
    return [float(sum(diagonal[part].sum() for part in segment)) for segment in halves(len(diagonal))]


class TestSplitTrace:
    def test_of_a_network_with_tied_weights(self):
        """The diagonal, block traces and trace, with as many probes as leave 2 %."""
        tied = network(Tied)
        hessian = dense_hessian(tied)
        spent: list[int] = []
        options = {"tolerance": 0.02, "max_hvps": 1000, "seed": 0}
        tied.hvp_counter = HvpCounter(spent.append)
        result = split_trace(tied, halves(len(hessian)), **options)
        total = result.total
        assert total.converged and total.std_error <= 0.02 * abs(total.value)
        assert total.value == pytest.approx(float(hessian.trace()), abs=4 * total.std_error)
        for segment, truth in zip(result.segments, block_traces(hessian.diagonal()), strict=True):
            assert segment.value == pytest.approx(truth, abs=4 * segment.std_error)
        assert float((result.diagonal - hessian.diagonal()).norm()) <= 2 * total.std_error
        assert (total.method, total.hvps) == ("gauss-newton + hutchinson", sum(spent))
        assert result.frobenius_squared is None

    def test_of_bert(self):
        model = tiny_models.make("bert").eval()
        rows = tiny_models.examples("bert", EXAMPLES)
        [whole] = tiny_models.cut(rows, EXAMPLES)
        labels = model(whole["input_ids"]).logits.argmax(dim=1)
        rows = [{**row, "labels": label} for row, label in zip(rows, labels, strict=True)]
        hessian = tiny_models.dense_hessian(model, {**whole, "labels": labels})
        truths = [float(hessian.trace()), *block_traces(hessian.diagonal())]
        lossy = Objective(model, tiny_models.cut(rows, 2))
        with math_attention():
            result = split_trace(lossy, halves(len(hessian)), tolerance=1e-12, max_hvps=60, seed=0)
        for estimate, truth in zip((result.total, *result.segments), truths, strict=True):
            assert estimate.value == pytest.approx(truth, abs=4 * estimate.std_error)

    def test_the_remainder_is_the_hessian_without_the_gauss_newton_matrix(self):
        """As a matrix, R = H − G, whatever the decoupling then leaves of it."""
        tied = network(Tied)
        identity = torch.eye(sum(parameter.numel() for parameter in tied.parameters), dtype=torch.float64)
        rest = HessianOperator(gauss_newton._WithSlopesHeld(tied)).matmat(identity)
        expected = dense_hessian(tied) - GaussNewtonOperator(tied).matmat(identity)
        assert torch.allclose(rest, expected, atol=1e-12) and float(expected.norm()) > 0.1
        decoupled = DecoupledHessian(gauss_newton._WithSlopesHeld(tied)).matmat(identity)
        assert torch.allclose(decoupled.diagonal(), expected.diagonal(), atol=1e-12)
        assert float(decoupled.norm()) < 0.99 * float(expected.norm())

    def test_networks_of_relus_need_no_probes(self):
        """Linear in each layer's weights, R has no diagonal, and nothing is left of it decoupled."""
        relu = network(lambda: nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)))
        hessian = dense_hessian(relu)
        result = split_trace(relu, halves(len(hessian)), tolerance=1e-3, max_hvps=100, seed=0)
        assert result.total.value == pytest.approx(float(hessian.trace()), rel=1e-10)
        assert result.total.std_error <= 1e-6 * result.total.value
        assert [part.value for part in result.segments] == pytest.approx(block_traces(hessian.diagonal()), rel=1e-10)
        assert torch.allclose(result.diagonal, hessian.diagonal(), atol=1e-10)
        assert (result.total.hvps, result.total.converged) == (MIN_PROBES, True)

    @pytest.mark.parametrize(  # one that stops by its error is the harder case
        "tolerance", [pytest.param(1e-12, marks=pytest.mark.slow, id="fixed"), pytest.param(0.1, id="adaptive")]
    )
    def test_intervals_hold_the_truth_as_often_as_they_say(self, tolerance: float):
        """95 %, give or take what 120 runs can tell (two deviations)."""
        tied = network(Tied, examples=4, size=4)
        hessian = dense_hessian(tied)
        truths = [float(hessian.trace()), *block_traces(hessian.diagonal())]
        held = np.zeros(3)
        for seed in range(120):
            result = split_trace(tied, halves(len(hessian)), tolerance=tolerance, max_hvps=12, seed=seed)
            estimates = (result.total, *result.segments)
            held += [e.low <= truth <= e.high for e, truth in zip(estimates, truths, strict=True)]
        held /= 120
        assert 0.9 <= held[0] <= 0.995 and held.min() >= 0.9, held

    def test_stops_at_the_whole_trace_s_tolerance_or_its_budget(self):
        tied, spent = network(Tied), []
        for tolerance in (10.0, 0.05, 0.02):
            total = split_trace(tied, [[slice(0, 51)]], tolerance=tolerance, max_hvps=2000, seed=0).total
            assert total.converged and total.std_error <= tolerance * abs(total.value)
            spent.append(total.hvps)
        assert MIN_PROBES == spent[0] < spent[1] < spent[2] < 2000
        short = split_trace(tied, [[slice(0, 51)]], tolerance=1e-9, max_hvps=10, seed=0).total
        assert (short.hvps, short.converged) == (10, False)

    def test_its_error_over_the_data(self):
        """Each batch's own dense Hessian has a trace; the jackknife of these, exactly where no probe is needed."""
        layers = lambda: nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 3))  # noqa: E731
        for kind, probes, precision in ((layers, 8, 1e-6), (Tied, 600, 0.05)):
            objective = network(kind, learned=False)
            apart = [
                Objective(objective.model, [batch], loss_fn=mean_of_cross_entropies) for batch in objective.batches
            ]
            diagonals = [dense_hessian(part).diagonal() for part in apart]
            traces = np.array([[float(diagonal.sum()), *block_traces(diagonal)] for diagonal in diagonals])
            expected = [jackknife(column, [5, 5, 2]) for column in traces.T]
            segments = halves(len(diagonals[0]))
            result = split_trace(objective, segments, tolerance=1e-12, max_hvps=probes, seed=0)
            found = [estimate.data_std_error for estimate in (result.total, *result.segments)]
            assert found == pytest.approx(expected, rel=precision)
        whole = network(layers, size=12)
        assert split_trace(whole, [[slice(0, 45)]], tolerance=0.1, max_hvps=8, seed=0).total.data_std_error is None

    def test_single_precision(self):
        tied = network(Tied)
        options = {"tolerance": 1e-12, "max_hvps": 16, "seed": 0}
        double = split_trace(tied, [[slice(0, 51)]], **options).total.value
        tied.model.float()
        tied = Objective(tied.model, [(x.float(), y) for x, y in tied.batches], loss_fn=mean_of_cross_entropies)
        assert split_trace(tied, [[slice(0, 51)]], **options).total.value == pytest.approx(double, rel=1e-4)

    def test_refuses_many_outputs_at_the_first_example(self, monkeypatch: pytest.MonkeyPatch):
        tied = network(Tied)
        monkeypatch.setattr(gauss_newton, "MAX_SPLIT_OUTPUTS", 2)
        passes: list[Tensor] = []
        tied.model.register_forward_hook(lambda module, inputs, output: passes.append(output))
        with pytest.raises(ValueError, match=r"3 outputs.*up to 2.*`hutchinson`"):
            split_trace(tied, [[slice(0, 51)]], tolerance=0.1, max_hvps=8, seed=0)
        assert len(passes) == 2  # the first batch, and its first example
        assert gauss_newton_trace(tied, [[slice(0, 51)]])[0].value > 0

    def test_refuses_a_loss_that_couples_the_examples(self):
        weights = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
        weighted = network(Tied)
        weighted = Objective(
            weighted.model,
            weighted.batches,
            loss_fn=lambda model, batch: functional.cross_entropy(model(batch[0]), batch[1], weight=weights),
        )
        with pytest.raises(ValueError, match="not a mean over examples"):
            split_trace(weighted, [[slice(0, 51)]], tolerance=0.1, max_hvps=8, seed=0)
        with pytest.raises(ValueError, match="not a mean over examples"):
            gauss_newton_trace(weighted, [[slice(0, 51)]])

    @pytest.mark.parametrize("kind", COUPLINGS)
    @pytest.mark.parametrize("head", [0.0, 0.02])
    def test_refuses_couplings_that_leave_values_and_slopes_as_they_are(self, kind: str, head: float):
        """At a head of zero all predictions are alike, and with them the losses, whatever couples the examples."""
        objective = network(COUPLED_LAYERS.get(kind, Hidden), size=6)
        with torch.no_grad():
            for parameter in objective.model.last.parameters():
                parameter.mul_(head)
        objective = Objective(objective.model, objective.batches, loss_fn=COUPLINGS[kind])
        with pytest.raises(ValueError, match="not a mean over examples"):
            split_trace(objective, [[slice(0, 31)]], tolerance=0.1, max_hvps=8, seed=0)

    def test_examples_without_a_label_are_no_coupling(self):
        objective = network(Hidden, size=6)
        unlabelled = {(0, 0), (1, 2), (1, 3)}  # batch and row
        batches = [
            {
                "x": x,
                "labels": torch.tensor([-100 if (i, j) in unlabelled else int(label) for j, label in enumerate(y)]),
            }
            for i, (x, y) in enumerate(objective.batches)
        ]
        loss_fn = lambda model, batch: functional.cross_entropy(model(batch["x"]), batch["labels"])  # noqa: E731
        some = Objective(objective.model, batches, loss_fn=loss_fn)
        kept = [(batch["x"][batch["labels"] >= 0], batch["labels"][batch["labels"] >= 0]) for batch in batches]
        expected = dense_hessian(Objective(objective.model, kept, loss_fn=mean_of_cross_entropies)).trace()
        total = split_trace(some, [[slice(0, 31)]], tolerance=0.01, max_hvps=400, seed=0).total
        assert total.value == pytest.approx(float(expected), abs=4 * total.std_error)

    def test_refuses_a_loss_that_is_not_finite(self):
        tied = network(Tied)
        with torch.no_grad():
            tied.model.last.bias.fill_(torch.nan)
        with pytest.raises(FloatingPointError, match="loss of a batch is not finite"):
            split_trace(tied, [[slice(0, 51)]], tolerance=0.1, max_hvps=8, seed=0)

    def test_refuses_a_penalty_and_quantized_weights(self, monkeypatch: pytest.MonkeyPatch):
        def penalized(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return mean_of_cross_entropies(model, batch) + model.first.weight.square().sum()

        tied = network(Tied)
        options = {"tolerance": 0.1, "max_hvps": 8, "seed": 0}
        with pytest.raises(ValueError, match="otherwise than through"):
            split_trace(Objective(tied.model, tied.batches, loss_fn=penalized), [[slice(0, 51)]], **options)
        monkeypatch.setattr(Objective, "second_derivative_blocker", WrongDerivativeError("quantized", method="GPTQ"))
        with pytest.raises(RuntimeError, match="quantized"):
            split_trace(tied, [[slice(0, 51)]], **options)


def test_the_exact_trace_has_an_error_over_the_data():
    lossy = objective("bert")  # batches of 2, 2 and 1
    rows = tiny_models.cut(tiny_models.examples("bert", EXAMPLES), 2)
    segments = [[slice(0, sum(parameter.numel() for parameter in lossy.parameters))]]
    with math_attention():
        total, [segment] = gauss_newton_trace(lossy, segments)
        apart = [gauss_newton_trace(Objective(lossy.model, [batch]), segments)[0] for batch in rows]
    expected = jackknife([part.value for part in apart], [2, 2, 1])
    assert (
        total.data_std_error == pytest.approx(expected, rel=1e-10) and segment.data_std_error == total.data_std_error
    )
    assert [part.data_std_error for part in apart] == [None] * 3


class TestRefusals:
    def test_a_penalty_on_the_weights(self):
        def loss_fn(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
            return model(batch[0]).square().mean() + 0.01 * model.weight.square().sum()

        penalized = Objective(nn.Linear(2, 2), [(torch.ones(1, 2),)], loss_fn=loss_fn)
        with pytest.raises(ValueError, match="otherwise than through"):
            GaussNewtonOperator(penalized).matvec(torch.ones(6))
        with pytest.raises(ValueError, match="otherwise than through"):
            gauss_newton_trace(penalized, [[slice(0, 6)]])

    def test_a_loss_of_hidden_states(self):
        def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return model(**batch, output_hidden_states=True).hidden_states[-1].square().mean()

        hidden = Objective(tiny_models.make("bert").eval(), objective("bert").batches, loss_fn=loss_fn)
        operator = GaussNewtonOperator(hidden)
        with pytest.raises(ValueError, match="otherwise than through"):
            operator.matvec(torch.ones(operator.size, dtype=torch.float64))

    def test_a_model_that_is_not_called(self):
        def loss_fn(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
            return functional.linear(batch[0], model.weight).square().mean()

        operator = GaussNewtonOperator(Objective(nn.Linear(2, 2), [(torch.ones(1, 2),)], loss_fn=loss_fn))
        with pytest.raises(ValueError, match="does not call the model"):
            operator.matvec(torch.ones(6))

    def test_outputs_without_logits(self):
        model = tiny_models.make("bert").bert.eval()
        batches = [{"input_ids": torch.ones(1, 3, dtype=torch.long)}]
        loss_fn = lambda model, batch: model(**batch).last_hidden_state.square().mean()  # noqa: E731
        operator = GaussNewtonOperator(Objective(model, batches, loss_fn=loss_fn))
        with pytest.raises(ValueError, match="without logits"):
            operator.matvec(torch.ones(operator.size, dtype=torch.float64))

    def test_functions_that_are_once_differentiable(self):
        def loss_fn(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
            return tiny_models.OnceDifferentiable.apply(model(batch[0])).square().mean()

        once = Objective(nn.Linear(2, 2), [(torch.ones(1, 2),)], loss_fn=loss_fn)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            GaussNewtonOperator(once).matvec(torch.ones(6))

    def test_an_exact_trace_of_too_many_outputs_of_an_example(self):
        batch = (torch.ones(5, 1),)
        wide = Objective(nn.Linear(1, 4), [batch], loss_fn=lambda model, batch: model(batch[0]).square().mean())
        gauss_newton_trace(wide, [[slice(0, 8)]], max_outputs=4)
        with pytest.raises(ValueError, match=r"4 outputs.*hutchinson"):
            gauss_newton_trace(wide, [[slice(0, 8)]], max_outputs=3)
