# SPDX-License-Identifier: Apache-2.0
"""Numbers of a whole data set from examples drawn of it, against the dense Hessian of all of them."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hf_optimizability import Measurement, MeasurementError, OptimizabilityConfig, forecast, measure
from hf_optimizability.curvature.gradient import gradient
from hf_optimizability.curvature.hessian import HessianOperator
from hf_optimizability.linalg.estimate import Estimate
from hf_optimizability.linalg.spectrum_and_trace import SpectrumAndTrace, estimate_spectrum, estimate_trace
from hf_optimizability.measurement.design import Design
from hf_optimizability.measurement.measure import measurement_session
from hf_optimizability.measurement.pool_pass import SIZE_PROBES, curvature_along, draw_from_pool
from hf_optimizability.measurement.two_sided import Along, _traces, between
from hf_optimizability.objective.objective import Objective
from hf_optimizability.objective.pool import Pool


NUMBER, CONFIG = 160, OptimizabilityConfig(profile="light", probe_examples=48, probe_batch_size=8, max_hvps=40)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@cache
def trained(steps: int = 60) -> tuple[Net, dict[str, Tensor], torch.optim.Optimizer]:
    """A net half trained on examples some of which are far from the others."""
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(NUMBER, 4, dtype=torch.float64)
    x[:6] *= 6
    labels = torch.randint(3, (NUMBER,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x, labels)["loss"].backward()
        optimizer.step()
    return model.eval(), {"x": x, "labels": labels}, optimizer


def problem() -> tuple[Net, dict[str, Tensor]]:
    return trained()[:2]


def loader() -> DataLoader:
    _, columns = problem()
    return DataLoader([{key: column[i] for key, column in columns.items()} for i in range(NUMBER)], batch_size=8)


def found(seed: int, **options: object) -> Measurement:
    return measure(problem()[0], None, replace(CONFIG, probe_seed=seed, **options), dataset=loader())


@cache
def truth() -> dict[str, float]:
    model, columns = problem()
    operator = HessianOperator(Objective(model, [columns]))
    dense = operator.matmat(torch.eye(operator.size, dtype=torch.float64))
    values = torch.linalg.eigvalsh((dense + dense.T) / 2)
    point = gradient(Objective(model, [columns]))
    norm = float(torch.cat([tensor.flatten() for tensor in point.tensors]).norm())
    return {
        "loss": point.loss,
        "grad_norm": norm,
        "trace": float(dense.trace()),
        "lambda_max": float(values[-1]),
        "lambda_min": float(values[0]),
    }


def intervals(measurement: Measurement) -> dict[str, tuple[float, float, float]]:
    assert measurement.population is not None and measurement.hessian.lambda_min is not None
    numbers = {
        "loss": measurement.population.loss,
        "grad_norm": measurement.population.grad_norm,
        "trace": measurement.hessian.trace,
        "lambda_max": measurement.hessian.lambda_max,
        "lambda_min": measurement.hessian.lambda_min,
    }
    return {name: (number.low, number.value, number.high) for name, number in numbers.items()}


@pytest.mark.parametrize(("number", "least"), [(2, 1), pytest.param(60, 52, marks=pytest.mark.slow)])
def test_intervals_hold_the_values_of_all_examples(number: int, least: int):
    draws = [intervals(found(seed)) for seed in range(number)]
    for name, true in truth().items():
        rounding = 1e-6 * abs(true)
        held = sum(draw[name][0] - rounding <= true <= draw[name][2] + rounding for draw in draws)
        assert held >= least, (name, held)
    middle = np.median([abs(draw["lambda_max"][1] / truth()["lambda_max"] - 1) for draw in draws])
    assert middle < 0.1


@cache
def true_noise_scale() -> float:
    model, columns = problem()
    single = [
        gradient(Objective(model, [{key: column[i : i + 1] for key, column in columns.items()}])).tensors
        for i in range(NUMBER)
    ]
    gradients = torch.stack([torch.cat([tensor.flatten() for tensor in tensors]) for tensors in single])
    return float(gradients.var(0).sum() / gradients.mean(0).square().sum())


@pytest.mark.parametrize(
    ("pool", "number", "least"),
    [
        (NUMBER, 2, 1),
        pytest.param(NUMBER, 40, 34, marks=pytest.mark.slow),
        pytest.param(80, 40, 34, marks=pytest.mark.slow),
    ],
)
def test_the_noise_scale_is_that_of_all_examples(pool: int, number: int, least: int):
    found_ones = [found(seed, pool_examples=pool).noise_scale for seed in range(number)]
    assert sum(one.low <= true_noise_scale() <= one.high for one in found_ones) >= least
    if pool == NUMBER:
        assert max(one.high / one.low for one in found_ones) < 3
        assert np.median([abs(one.value / true_noise_scale() - 1) for one in found_ones]) < 0.15


def test_of_all_examples_nothing_is_left_to_chance():
    options = {"trace_method": "exact", "eigen_tolerance": 1e-6, "max_hvps": 80}
    measurement = found(0, probe_examples=NUMBER, **options)
    population = measurement.population
    assert population is not None and population.certain_examples == population.sampled_examples == NUMBER
    for name, (low, value, high) in intervals(measurement).items():
        assert value == pytest.approx(truth()[name], rel=0.01), name
        assert high - low <= 0.01 * abs(value), name
    assert measurement.hessian.trace.data_std_error == 0


def test_a_weighted_sample_is_unbiased():
    """The mean over many draws of loss and gradient is that of all examples."""
    model, columns = problem()
    objective = Objective(model, [columns])
    gradients, losses = [], []
    with measurement_session(objective, CONFIG) as (inside, _):
        for seed in range(40):
            pool = Pool(loader(), examples=NUMBER, seed=seed)
            drawn = draw_from_pool(inside, pool, examples=40, batch_size=8, seed=seed)
            point = gradient(inside.sampled(*drawn))
            losses.append(point.loss)
            gradients.append(torch.cat([tensor.flatten() for tensor in point.tensors]))
    whole = gradient(objective)
    assert np.mean(losses) == pytest.approx(whole.loss, abs=4 * np.std(losses) / 40**0.5)
    true = torch.cat([tensor.flatten() for tensor in whole.tensors])
    errors = (torch.stack(gradients).mean(0) - true) / (torch.stack(gradients).std(0) / 40**0.5)
    assert errors.abs().max() < 5


def test_examples_without_labels_leave_a_sample_unbiased():
    """Where most have none, groups of the others alone would be lost, and the mean be too high."""
    model, columns = problem()
    kept = {key: column[:60].clone() for key, column in columns.items()}
    kept["labels"][torch.arange(60) % 5 > 0] = -100
    rows = DataLoader([{key: column[i] for key, column in kept.items()} for i in range(60)])
    objective, losses, groups = Objective(model, [kept]), [], []
    with measurement_session(objective, CONFIG) as (inside, _):
        for seed in range(60):
            batches, population = draw_from_pool(
                inside, Pool(rows, examples=60, seed=seed), examples=7, batch_size=4, seed=seed
            )
            groups.append(len(population.sample.groups))
            losses.append(gradient(inside.sampled(batches, population)).loss)
    assert np.mean(losses) == pytest.approx(gradient(objective).loss, abs=4 * np.std(losses) / 60**0.5)
    assert np.std(losses) > 0 and min(groups) > 3


def test_curvature_along_a_vector_is_that_of_each_example():
    """Against the Gauss-Newton form of each example, from its Jacobian."""
    model, columns = problem()
    objective = Objective(model, [columns])
    vector = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    vector /= vector.norm()
    with measurement_session(objective, CONFIG) as (inside, _):
        pool = Pool(loader(), examples=NUMBER, seed=0)
        _, population = draw_from_pool(inside, pool, examples=40, batch_size=8, seed=0)
        [(_, found, whole)] = curvature_along(inside, population, [vector], [1.0])
    pieces = vector.split([p.numel() for p in model.parameters()])
    names = [name for name, _ in model.named_parameters()]
    tangents = {name: piece.view_as(p) for name, piece, p in zip(names, pieces, model.parameters(), strict=True)}
    values = dict(model.named_parameters())

    def logits(parameters: dict[str, Tensor]) -> Tensor:
        layers = {name.removeprefix("layers."): value for name, value in parameters.items()}
        return torch.func.functional_call(model.layers, layers, (columns["x"],))

    outputs, moves = torch.func.jvp(logits, (values,), (tangents,))
    probabilities = outputs.softmax(1)
    expected = (probabilities * moves**2).sum(1) - (probabilities * moves).sum(1) ** 2
    assert found.tolist() == pytest.approx(expected[pool.indices].tolist(), rel=0.02, abs=1e-9)
    operator = HessianOperator(objective)
    assert whole.sum() / NUMBER == pytest.approx(float(vector @ operator.matvec(vector)), rel=1e-3)


def test_a_pool_has_the_gradient_and_an_estimate_of_the_trace():
    model, columns = problem()
    objective = Objective(model, [columns])
    with measurement_session(objective, CONFIG) as (inside, _):
        pool = Pool(loader(), examples=NUMBER, seed=0)
        _, population = draw_from_pool(inside, pool, examples=40, batch_size=8, seed=0)
    look, operator = population.look, HessianOperator(objective)
    for tensor, expected in zip(look.gradient, gradient(objective).tensors, strict=True):
        assert torch.allclose(tensor, expected, rtol=1e-9, atol=1e-12)
    assert population.gradient_variance == 0  # the pool is all there is
    dense = operator.matmat(torch.eye(operator.size, dtype=torch.float64))
    generator, forms = torch.Generator().manual_seed(0), []
    for _ in range(SIZE_PROBES):  # the same vectors
        signs = [2.0 * torch.randint(2, p.shape, generator=generator) - 1 for p in model.parameters()]
        vector = torch.cat([piece.flatten() for piece in signs]).double()
        forms.append(float(vector @ dense @ vector))
    assert population.mean(look.sizes + look.bends) == pytest.approx(np.mean(forms), rel=1e-2)
    assert abs(population.mean(look.bends)) > 0.05 * abs(np.mean(forms))  # else this would not see it


def test_a_trace_that_the_pool_knows_has_no_error_over_the_data():
    """What each example has of the trace, put in the place of what the pass over the pool found."""
    model, columns = problem()
    objective = Objective(model, [columns])
    traces = []
    for i in range(NUMBER):
        alone = HessianOperator(Objective(model, [{key: column[i : i + 1] for key, column in columns.items()}]))
        traces.append(float(alone.matmat(torch.eye(alone.size, dtype=torch.float64)).trace()))
    with measurement_session(objective, CONFIG) as (inside, _):
        pool = Pool(loader(), examples=NUMBER, seed=0)
        batches, population = draw_from_pool(inside, pool, examples=40, batch_size=8, seed=0)
        both = np.stack([np.array(traces)[pool.indices]] * 2)
        known = replace(population, look=replace(population.look, size_probes=0 * both, bend_probes=both))
        sampled = inside.sampled(batches, known)
        operator = HessianOperator(sampled)
        segments = [[slice(0, operator.size)]]
        spectrum = estimate_spectrum(operator, tolerance=0.1, max_hvps=8, seed=0)
        trace = estimate_trace(operator, segments, tolerance=0.1, max_hvps=99, seed=0, method="exact")
        [total, _] = _traces(SpectrumAndTrace.of(spectrum, trace), known, Design.of(sampled), tolerance=0.1)
    assert total.value == pytest.approx(truth()["trace"], rel=1e-6) == pytest.approx(np.mean(traces), rel=1e-6)
    assert total.high - total.low < 1e-6 * total.value
    assert abs(trace.total.value / total.value - 1) > 1e-3  # the sample's own


class Bag(nn.Module):
    """The mean of the embeddings of three words, then a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(60, 3), nn.Linear(3, 2)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.words(input_ids).mean(1)))
        return {"loss": nn.functional.cross_entropy(logits, labels)}


def test_words_that_the_sample_lacks_are_left_out_of_the_products_alone():
    torch.manual_seed(0)
    model, number = Bag().double().eval(), 120
    columns = {"input_ids": torch.randint(60, (number, 3)), "labels": torch.randint(2, (number,))}
    rows = [{key: column[i] for key, column in columns.items()} for i in range(number)]
    config = replace(CONFIG, probe_examples=16)
    measurement = measure(model, None, config, dataset=DataLoader(rows))
    assert 0 < measurement.unused_embedding_parameters < 180
    operator = HessianOperator(Objective(model, [columns]))
    dense = operator.matmat(torch.eye(operator.size, dtype=torch.float64))
    point = gradient(Objective(model, [columns]))
    vector = torch.cat([tensor.flatten() for tensor in point.tensors])
    largest = float(torch.linalg.eigvalsh(dense)[-1])
    assert measurement.hessian.lambda_max.low <= largest <= measurement.hessian.lambda_max.high
    assert measurement.hessian.trace.low <= float(dense.trace()) <= measurement.hessian.trace.high
    assert measurement.grad_norm == pytest.approx(float(vector.norm()))
    assert measurement.quadratic_model is not None
    assert measurement.quadratic_model.curvature == pytest.approx(float(vector @ dense @ vector), rel=0.05)


@cache
def trained_bag() -> tuple[Bag, dict[str, Tensor], torch.optim.Optimizer]:
    """Words of which many are rare, and steps of a few sentences each, so that Adam has seen them seldom."""
    torch.manual_seed(0)
    model, frequency = Bag().double(), 1 / torch.arange(1, 61)
    words = torch.multinomial(frequency, 3 * NUMBER, replacement=True).view(NUMBER, 3)
    columns = {"input_ids": words, "labels": torch.randint(2, (NUMBER,))}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(30):
        chosen = torch.randint(NUMBER, (8,))
        optimizer.zero_grad()
        model(words[chosen], columns["labels"][chosen])["loss"].backward()
        optimizer.step()
    return model.eval(), columns, optimizer


WITH_ADAM = {"trained": trained, "before the first step": partial(trained, 0), "rare words": trained_bag}


@cache
def dense_hessian(name: str) -> Tensor:
    """The Hessian over all examples, by torch."""
    model, columns, _ = WITH_ADAM[name]()
    names, parameters = zip(*model.named_parameters(), strict=True)

    def loss(vector: Tensor) -> Tensor:
        pieces = vector.split([p.numel() for p in parameters])
        tensors = {n: piece.view_as(p) for n, piece, p in zip(names, pieces, parameters, strict=True)}
        return torch.func.functional_call(model, tensors, (), columns)["loss"]

    return torch.func.hessian(loss)(torch.cat([p.detach().flatten() for p in parameters]))


@cache
def true_sharpness(name: str) -> float:
    """Of P = √v̂ + ε, from the second moment v of all examples' gradients; before the first step, v̂ = g²."""
    model, columns, optimizer = WITH_ADAM[name]()
    squares = []
    for parameter, slope in zip(
        model.parameters(), torch.autograd.grad(model(**columns)["loss"], list(model.parameters())), strict=True
    ):
        state = optimizer.state.get(parameter)
        squares.append(slope**2 if not state else state["exp_avg_sq"] / (1 - 0.999 ** float(state["step"])))
    scale = (torch.cat([square.flatten() for square in squares]).sqrt() + 1e-8).rsqrt()
    return float(torch.linalg.eigvalsh(scale[:, None] * dense_hessian(name) * scale)[-1])


def drawn_with_adam(name: str, seed: int, **options: object) -> Measurement:
    model, columns, optimizer = WITH_ADAM[name]()
    rows = [{key: column[i] for key, column in columns.items()} for i in range(NUMBER)]
    config = replace(CONFIG, block_eigenvalues=True, probe_seed=seed, **{"max_hvps": 60, **options})
    return measure(model, None, config, dataset=DataLoader(rows), optimizer=optimizer)


def sharpness_and_blocks(name: str, measurement: Measurement) -> dict[str, tuple[Estimate, float]]:
    """Each estimate, and what it is over all examples."""
    assert measurement.optimizer_stability is not None
    found = {"sharpness": (measurement.optimizer_stability.sharpness, true_sharpness(name))}
    end = 0
    for block_name, block in measurement.blocks.items():
        start, end = end, end + block.parameters
        dense = dense_hessian(name)[start:end, start:end]
        smallest, *_, largest = torch.linalg.eigvalsh(dense).tolist()
        assert block.lambda_max is not None and block.lambda_min is not None
        found[f"trace of {block_name}"] = block.trace, float(dense.trace())
        found[f"λ_max of {block_name}"] = block.lambda_max, largest
        found[f"λ_min of {block_name}"] = block.lambda_min, smallest
    return found


@pytest.mark.parametrize("name", WITH_ADAM)
def test_sharpness_and_blocks_of_all_examples_have_no_error_over_the_data(name: str):
    options = {"trace_method": "exact", "eigen_tolerance": 1e-6, "max_hvps": 100, "probe_batch_size": 40}
    measurement = drawn_with_adam(name, 0, probe_examples=NUMBER, **options)
    for of_what, (estimate, true) in sharpness_and_blocks(name, measurement).items():
        room = 0.03 * max(abs(true), 0.1 * measurement.hessian.lambda_max.value)
        assert true - room <= estimate.low <= true + room / 20, of_what
        assert true - room / 20 <= estimate.high <= true + room, of_what
        assert estimate.data_std_error == 0, of_what


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "widest"), [("trained", 1.5), ("before the first step", 2), ("rare words", math.inf)]
)
def test_intervals_hold_sharpness_and_blocks_of_all_examples(name: str, widest: float):
    held, widths = [], []
    for seed in range(60):
        found = sharpness_and_blocks(name, drawn_with_adam(name, seed))
        held.append([e.low - 1e-6 * abs(true) <= true <= e.high + 1e-6 * abs(true) for e, true in found.values()])
        widths.append(found["sharpness"][0].high / found["sharpness"][0].low)
    shares = dict(zip(found, np.mean(held, axis=0), strict=True))
    assert shares["sharpness"] >= 0.93 and min(shares.values()) >= 0.85, shares
    assert np.mean(list(shares.values())) >= 0.93
    assert np.median(widths) <= widest
    assert (max(widths) == math.inf) == (name == "rare words")


def test_a_sharpness_that_draw_and_pool_find_too_low_is_moved_by_the_error_of_the_draw():
    found, true = sharpness_and_blocks("trained", drawn_with_adam("trained", 3))["sharpness"]
    assert found.data_std_error is not None
    assert found.low < true < found.high < 1.3 * true and found.high - 1.96 * found.data_std_error < true


def test_a_sharpness_has_no_upper_end_where_the_sample_lacks_words_that_adam_has_not_seen():
    found, true = sharpness_and_blocks("rare words", drawn_with_adam("rare words", 0))["sharpness"]
    assert found.low < true / 1000 and str(found).startswith("at least") and not found.converged


def test_eigenvalues_of_blocks_have_the_error_of_a_pool_that_is_a_part_of_the_set():
    measurement = drawn_with_adam("trained", 0, pool_examples=80, probe_examples=80)
    for block in measurement.blocks.values():
        assert block.lambda_max is not None and block.lambda_max.data_std_error > 0.1 * block.lambda_max.value


def test_traces_of_blocks_sum_to_the_trace():
    measurement = found(1)
    of_blocks = [block.trace for block in measurement.blocks.values()]
    assert len(of_blocks) == 2
    assert sum(trace.value for trace in of_blocks) == pytest.approx(measurement.hessian.trace.value, rel=1e-9)


@pytest.mark.parametrize(("number", "least"), [(2, 1), pytest.param(40, 33, marks=pytest.mark.slow)])
def test_a_part_of_the_set_as_pool_has_an_error_of_its_own(number: int, least: int):
    held = dict.fromkeys(truth(), 0)
    for seed in range(number):
        measurement = found(seed, pool_examples=80)
        assert measurement.population is not None
        assert measurement.population.pool_examples == 80 and measurement.population.examples == NUMBER
        for name, (low, _, high) in intervals(measurement).items():
            held[name] += low <= truth()[name] <= high
    assert min(held.values()) >= least, held


@pytest.mark.parametrize("preconditions", [False, True])
def test_no_more_products_than_are_asked_for(preconditions: bool):
    """Of blocks with their eigenvalues, too."""
    model = copy.deepcopy(problem()[0])
    optimizer = torch.optim.Adam(model.parameters()) if preconditions else None
    options = {"trace_tolerance": 1e-6, "eigen_tolerance": 1e-6, "block_eigenvalues": preconditions}
    config = replace(CONFIG, max_hvps=16, **options)
    found = measure(model, None, config, dataset=loader(), optimizer=optimizer)
    assert 12 <= found.hvps <= 16 and math.isfinite(found.hessian.trace.high - found.hessian.trace.low)
    assert (found.optimizer_stability is not None) == preconditions


def test_no_more_products_than_forecast_with_an_exact_trace():
    model, config = problem()[0], replace(CONFIG, max_hvps=16, trace_method="exact", eigen_tolerance=1e-9)
    expected = forecast(model, None, config, dataset=loader())
    assert measure(model, None, config, dataset=loader()).hvps == expected.hvps == 5 + expected.parameters + 6


class Torn(list):
    """Rows of which one can't be read."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index == 7:
            raise OSError("torn off")
        return super().__getitem__(index)


def test_a_row_that_cannot_be_read_is_left_out():
    model, columns = problem()
    population = measure(model, None, CONFIG, dataset=DataLoader(Torn(loader().dataset), batch_size=8)).population
    rest = torch.arange(NUMBER) != 7
    assert population is not None and population.examples == population.pool_examples == NUMBER - 1
    losses = nn.functional.cross_entropy(model.layers(columns["x"]), columns["labels"], reduction="none")[rest]
    assert population.loss.value == pytest.approx(float(losses.mean().detach()), rel=1e-6)
    hardest = torch.arange(NUMBER)[rest][losses.argsort(descending=True)]
    assert list(population.hardest) == hardest[:10].tolist()


@pytest.mark.slow  # integration tests compare runs to the last bit
def test_the_same_seed_has_the_same_numbers():
    assert intervals(found(3)) == intervals(found(3)) != intervals(found(4))


def test_losses_that_depend_on_several_examples_are_refused():
    model, _ = problem()

    def coupled(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model.layers(batch["x"])
        return nn.functional.cross_entropy(logits - logits.mean(0), batch["labels"])

    with pytest.raises(MeasurementError, match="losses of single examples"):
        measure(model, None, CONFIG, dataset=loader(), loss_fn=coupled)


def test_a_term_of_a_few_batches_is_refused():
    """One that the batches to draw from do not have, but one of the pool: of examples that are alike."""
    model, columns = problem()
    batches = [{key: column[start : start + 8] for key, column in columns.items()} for start in (32, 40)]

    def contrastive(model: Net, batch: dict[str, Tensor], *, coupled: bool) -> Tensor:
        logits = model.layers(batch["x"])
        loss = nn.functional.cross_entropy(logits, batch["labels"])
        if coupled and (batch["x"] == columns["x"][0]).all(1).any():
            loss = loss + 0.1 * (logits @ logits.T).mean()
        return loss

    def drawn(*, coupled: bool) -> None:
        objective = Objective(model, batches, loss_fn=partial(contrastive, coupled=coupled))
        with measurement_session(objective, CONFIG) as (inside, _):
            draw_from_pool(inside, Pool(loader(), examples=NUMBER, seed=0), examples=40, batch_size=8, seed=0)

    drawn(coupled=False)
    with pytest.raises(MeasurementError, match="losses of single examples"):
        drawn(coupled=True)


def test_a_term_that_halves_show_is_refused_from_any_batch():
    """The first batch does not show it, nor by how much an item's loss counts."""
    model, columns = problem()
    batches = [{key: column[start : start + 8] for key, column in columns.items()} for start in (32, 0)]

    def centred(model: Net, batch: dict[str, Tensor]) -> Tensor:
        logits = model.layers(batch["x"])
        if (batch["x"] == columns["x"][0]).all(1).any():
            logits = logits - logits.mean(0)
        return nn.functional.cross_entropy(logits, batch["labels"])

    objective = Objective(model, batches, loss_fn=centred)
    with measurement_session(objective, CONFIG) as (inside, _), pytest.raises(MeasurementError, match="more than one"):
        draw_from_pool(inside, Pool(loader(), examples=NUMBER, seed=0), examples=40, batch_size=8, seed=0)


def penalized(model: Net, batch: dict[str, Tensor], *, centre: dict[str, Tensor]) -> Tensor:
    distance = sum((p - centre[name]).square().sum() for name, p in model.named_parameters())
    return model(**batch)["loss"] + 50 * distance


@pytest.mark.parametrize("aside", [0.0, 1.0])
def test_a_term_in_the_weights_alone_is_refused_with_a_pool_and_measured_without(aside: float):
    """Also at its centre, where it is 0 and has no gradient."""
    model, columns = problem()
    loss_fn = partial(penalized, centre={name: p.detach() + aside for name, p in model.named_parameters()})
    with pytest.raises(MeasurementError, match="penalty on the weights"):
        measure(model, None, CONFIG, dataset=loader(), loss_fn=loss_fn)
    with_term = measure(model, [columns], CONFIG, loss_fn=loss_fn).hessian.trace
    of_term = 100 * sum(p.numel() for p in model.parameters())
    assert of_term > 5 * truth()["trace"]  # so that none of it may be missing
    assert with_term.low <= truth()["trace"] + of_term <= with_term.high


@pytest.mark.parametrize("loss", ["cross_entropy", "mse_loss"])
def test_where_all_weights_are_zero(loss: str):
    """The second loss is 0, too."""
    model, columns = nn.Linear(4, 3).double(), problem()[1]
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        outputs = model(batch["x"])
        if loss == "mse_loss":
            return nn.functional.mse_loss(outputs, torch.zeros_like(outputs))
        return nn.functional.cross_entropy(outputs, batch["labels"])

    measurement = measure(model, None, replace(CONFIG, probe_seed=2), dataset=loader(), loss_fn=loss_fn)
    operator = HessianOperator(Objective(model, [columns], loss_fn=loss_fn))
    dense = operator.matmat(torch.eye(operator.size, dtype=torch.float64))
    for estimate, true in [
        (measurement.hessian.trace, float(dense.trace())),
        (measurement.hessian.lambda_max, float(torch.linalg.eigvalsh(dense)[-1])),
    ]:
        assert estimate.low <= true <= estimate.high and estimate.high < 4 * true


def test_a_single_group_has_no_interval():
    rows = [loader().dataset[i] for i in range(3)]
    config = replace(CONFIG, probe_examples=2, probe_batch_size=2)
    measurement = measure(problem()[0], None, config, dataset=DataLoader(rows))
    for estimate in (measurement.hessian.lambda_max, measurement.hessian.trace):
        assert "(no interval)" in str(estimate) and math.isfinite(estimate.value)
        assert not estimate.converged


@pytest.mark.parametrize("options", [{"engine": "central_difference"}, {"curvature": "empirical_fisher"}])
def test_products_that_are_not_apart_are_refused(options: dict[str, str]):
    with pytest.raises(ValueError, match="pass `batches`"):
        measure(problem()[0], None, replace(CONFIG, **options), dataset=loader())
    with pytest.raises(ValueError, match="products by batch"):
        replace(CONFIG, pool_examples=99, **options)


class Once(torch.autograd.Function):
    """The identity, whose derivative can't be differentiated."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


def test_a_pool_needs_a_second_derivative():
    def loss_fn(model: Net, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(Once.apply(model.layers(batch["x"])), batch["labels"])

    with pytest.raises(MeasurementError, match="no second derivative"):
        measure(problem()[0], None, CONFIG, dataset=loader(), loss_fn=loss_fn)


def test_the_outer_end_is_beyond_the_curvature_along_the_vector():
    """Also where the sample's eigenvalue is below it."""
    sample = Estimate(1.0, 1.0, 1.0, "lanczos", 8, True, residual=0.0)
    assert between(sample, Along(2.0, 0.1, 0.5, freedom=math.inf), largest=True).high == pytest.approx(2.98, abs=0.01)


def test_a_data_set_has_one_loss():
    with pytest.raises(ValueError, match="one loss on whole parameters"):
        measure(problem()[0], None, OptimizabilityConfig(task_column="task"), dataset=loader())


@pytest.mark.parametrize("both", [True, False])
def test_either_batches_or_a_data_set(both: bool):
    model, columns = problem()
    with pytest.raises(ValueError, match="either `batches`"):
        measure(model, [columns] if both else None, dataset=loader() if both else None)
