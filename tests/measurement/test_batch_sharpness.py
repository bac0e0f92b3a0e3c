# SPDX-License-Identifier: Apache-2.0
"""Batch sharpness in a measurement: as trained, whatever fits into memory, and never in its way."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hf_optimizability import Measurement, OptimizabilityConfig, OptimizabilityReport, measure
from hf_optimizability.objective.step_batches import StepBatches
from hf_optimizability.report.markdown import to_markdown


CONFIG = OptimizabilityConfig(profile="light", max_hvps=16, probe_examples=16, batch_sharpness=True)


class Net(nn.Module):
    """With BatchNorm, if asked for, in training by the batch's statistics; and dropout."""

    def __init__(self, *, normalize: bool):
        super().__init__()
        middle: nn.Module = nn.BatchNorm1d(6) if normalize else nn.Identity()
        self.layers = nn.Sequential(nn.Linear(4, 6), middle, nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        SIZES.append(len(x))
        return {"loss": nn.functional.cross_entropy(self.layers(x), labels)}


SIZES: list[int] = []
"""Examples in each forward pass."""


def net(*, normalize: bool) -> Net:
    torch.manual_seed(0)
    model = Net(normalize=normalize).double()
    with torch.no_grad():
        model(torch.randn(64, 4, dtype=torch.float64) + 3, torch.zeros(64, dtype=torch.long))
    return model


def loader(number: int = 70, *, size: int = 8) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(number, 4, dtype=torch.float64, generator=generator)
    labels = torch.randint(3, (number,), generator=generator)
    rows = [{"x": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]
    return DataLoader(rows, batch_size=size, shuffle=True)


def by_hand(model: Net, data: DataLoader, diagonal: Tensor | None = None) -> float:
    """The ratio from plain double backward on the same batches, in training mode without dropout."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    parameters = list(model.parameters())
    scale = torch.ones(()) if diagonal is None else diagonal
    steps, above, below = StepBatches(data, seed=CONFIG.probe_seed), 0.0, 0.0
    with steps.reading():
        for [batch] in steps:
            pieces = torch.autograd.grad(model(**batch)["loss"], parameters, create_graph=True)
            g = torch.cat([piece.flatten() for piece in pieces])
            u = g.detach() / scale
            product = torch.cat([piece.flatten() for piece in torch.autograd.grad(g @ u, parameters)])
            above, below = above + float(u @ product), below + float(g.detach() @ u)
    return above / below


def measured(model: nn.Module, data: DataLoader, **options: Any) -> Measurement:
    optimizer = options.pop("optimizer", None)
    return measure(model, None, replace(CONFIG, **options), dataset=data, optimizer=optimizer)


@pytest.mark.parametrize(
    ("normalize", "mode"),
    [
        pytest.param(True, True, id="BatchNorm-train"),
        pytest.param(True, False, id="BatchNorm-eval"),
        pytest.param(False, True, id="none-train", marks=pytest.mark.slow),
        pytest.param(False, False, id="none-eval", marks=pytest.mark.slow),
    ],
)
def test_it_is_that_of_the_loss_as_trained(normalize: bool, mode: bool):
    model, data = net(normalize=normalize).train(mode), loader()
    before = copy.deepcopy(model.state_dict())
    found = measured(model, data).batch_sharpness
    assert found is not None and (found.batches, found.items, found.preconditioned) == (8, 8, None)
    assert found.sharpness.value == pytest.approx(by_hand(model, data), rel=1e-9)
    assert all(module.training == mode for module in model.modules())
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    eval_mode = copy.deepcopy(model)
    eval_mode.train = lambda mode=True: eval_mode  # type: ignore[method-assign]  # a model kept in eval mode
    eval_mode.eval()
    for module in eval_mode.modules():
        module.training = False
    frozen = measured(eval_mode, data).batch_sharpness
    assert frozen is not None
    assert (frozen.sharpness.value == pytest.approx(found.sharpness.value, rel=1e-9)) != normalize


def test_larger_batches_are_summed_over_pieces_unless_they_are_normalized():
    for normalize in (False, True):
        model, data = net(normalize=normalize), loader(size=16)
        values = []
        for size in (16, 3):
            SIZES.clear()
            found = measured(model, data, probe_batch_size=size).batch_sharpness
            assert found is not None and found.batches == 4
            values.append(found.sharpness.value)
        assert values[0] == pytest.approx(values[1], rel=1e-9)
        assert (max(SIZES) == 16) == normalize


def test_adam_meets_it_through_its_preconditioner():
    model, data = net(normalize=False), loader()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for batch in data:
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
    steps = int(optimizer.state[next(model.parameters())]["step"])
    moments = [optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**steps) for p in model.parameters()]
    diagonal = torch.cat([(moment.sqrt() + 1e-8).flatten() for moment in moments])
    found = measured(model, data, optimizer=optimizer).batch_sharpness
    assert found is not None and found.preconditioned is found.as_stepped
    assert found.sharpness.value == pytest.approx(by_hand(model, data), rel=1e-9)
    assert found.preconditioned.value == pytest.approx(by_hand(model, data, diagonal), rel=1e-5)


def test_where_it_is_not_measured(caplog: pytest.LogCaptureFixture):
    model, data = net(normalize=False), loader()
    unasked = measured(model, data, batch_sharpness=False)
    assert unasked.batch_sharpness is unasked.batch_sharpness_failure is None
    for found, reason in [
        (measure(model, [next(iter(data))], CONFIG), "How training draws its batches is not known"),
        (measured(model, loader(size=24)), "It takes 3 batches of 24 examples; an epoch has 2."),
    ]:
        assert found.batch_sharpness is None and reason in str(found.batch_sharpness_failure)
        assert f"Batch sharpness is not measured. {found.batch_sharpness_failure}" in caplog.text
        report = to_markdown(OptimizabilityReport(measurements=[found]))
        assert [reason in line for line in report.splitlines() if line.startswith("| Batch sharpness")] == [True]
        assert Measurement.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    with pytest.raises(ValueError, match="`batch_sharpness` is that of the Hessian"):
        replace(CONFIG, curvature="gauss_newton")


class Broken(nn.Module):
    """Fails on batches of eight, which only batch sharpness has."""

    def __init__(self, error: Exception):
        super().__init__()
        self.weight, self.error = nn.Parameter(torch.ones(4, 1, dtype=torch.float64)), error

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if len(x) == 7:
            raise self.error
        return {"loss": nn.functional.mse_loss(x @ self.weight, labels[:, None].double())}


def test_a_failure_leaves_the_rest_of_the_measurement():
    whole = measured(Broken(RuntimeError("broken on purpose")), loader(size=7), probe_batch_size=4)
    assert whole.batch_sharpness is not None  # pieces of four
    found = measured(Broken(RuntimeError("broken on purpose")), loader(size=7), probe_batch_size=8)
    assert found.batch_sharpness is None and found.hessian.lambda_max.converged
    assert str(found.batch_sharpness_failure).endswith("could not be computed (RuntimeError).")


def test_without_memory_for_its_batches_smaller_ones_are_taken():
    found = measured(Broken(torch.OutOfMemoryError("on purpose")), loader(size=7), probe_batch_size=8)
    plain = measured(Broken(RuntimeError()), loader(size=7), probe_batch_size=4)
    assert found.batch_sharpness is not None and plain.batch_sharpness is not None
    assert found.batch_sharpness.sharpness.value == pytest.approx(plain.batch_sharpness.sharpness.value, rel=1e-9)
