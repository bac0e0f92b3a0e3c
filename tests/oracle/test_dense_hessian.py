# SPDX-License-Identifier: Apache-2.0
"""The public API against dense float64 Hessians of the families that users bring, attention as it comes (SDPA)."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest

from hf_optimizability import Measurement, OptimizabilityConfig, measure
from hf_optimizability.objective.parameter_blocks import name_blocks
from tests.support import tiny_models


NAMES = list(tiny_models.MODELS)
FLOAT32_LOSS = ("gpt2", "llama")  # Transformers computes the loss of language models in float32
EXAMPLES = 5
# Distinguishing blocks takes two layers; one family is enough for that.
LAYERS = {name: tiny_models.TWO_LAYERS[name] if name == "bert" else {} for name in NAMES}


class Truth(NamedTuple):
    eigenvalues: np.ndarray
    trace: float
    block_traces: dict[str, float]
    loss: float
    grad_norm: float


@cache
def truth(name: str) -> Truth:
    """From the dense Hessian of the mean over all examples."""
    model = tiny_models.make(name, **LAYERS[name]).eval()
    [batch] = tiny_models.cut(tiny_models.examples(name, EXAMPLES), EXAMPLES)
    hessian = tiny_models.dense_hessian(model, batch)
    named = dict(model.named_parameters())
    owner = np.repeat(np.arange(len(named)), [parameter.numel() for parameter in named.values()])
    diagonal = hessian.diagonal().numpy()
    blocks = {block: diagonal[np.isin(owner, rows)].sum() for block, rows in name_blocks(list(named)).items()}
    model(**batch).loss.backward()
    loss = float(model(**batch).loss.detach())
    grad_norm = math.sqrt(sum(float(p.grad.norm()) ** 2 for p in named.values() if p.grad is not None))
    return Truth(np.linalg.eigvalsh(hessian.numpy()), float(diagonal.sum()), blocks, loss, grad_norm)


@cache
def measured(name: str, *, batch_size: int = 3, **options: object) -> Measurement:
    model = tiny_models.make(name, **LAYERS[name])
    assert model.config._attn_implementation == ("eager" if name == "resnet" else "sdpa")
    config = OptimizabilityConfig(**{"eigen_tolerance": 1e-6, "trace_tolerance": 0.02, "max_hvps": 120, **options})
    measurement = measure(model, tiny_models.cut(tiny_models.examples(name, EXAMPLES), batch_size), config)
    assert measurement.attention == "math"  # not the fallback
    return measurement


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient(name: str):
    precision = 1e-6 if name in FLOAT32_LOSS else 1e-12
    assert measured(name).loss == pytest.approx(truth(name).loss, rel=precision)
    assert measured(name).grad_norm == pytest.approx(truth(name).grad_norm, rel=precision)


@pytest.mark.parametrize("name", NAMES)
def test_lanczos_ends_lie_within_their_residuals(name: str):
    hessian, eigenvalues = measured(name).hessian, truth(name).eigenvalues
    assert hessian.lambda_max.converged and hessian.lambda_min.converged
    rounding = np.abs(eigenvalues).max() * (1e-6 if name in FLOAT32_LOSS else 0)
    assert abs(hessian.lambda_max.value - eigenvalues[-1]) <= hessian.lambda_max.residual + rounding
    assert abs(hessian.lambda_min.value - eigenvalues[0]) <= hessian.lambda_min.residual + rounding
    assert hessian.lambda_max.residual <= 2e-6 * eigenvalues[-1]
    assert hessian.lambda_min.residual <= -2e-6 * eigenvalues[0]
    assert eigenvalues[0] < 0 < eigenvalues[-1]  # so that the two ends differ in sign


@pytest.mark.parametrize(
    "name", [name if name == "resnet" else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_power_iteration_finds_the_largest_algebraic_eigenvalue(name: str):
    estimate = measured(name, eigen_method="power_iteration", eigen_tolerance=0.01, max_hvps=2000).hessian.lambda_max
    assert estimate.low <= truth(name).eigenvalues[-1] <= estimate.high
    assert estimate.residual < 0.25 * truth(name).eigenvalues[-1]


@pytest.mark.parametrize("name", NAMES)
def test_hutchinson_traces_lie_within_four_standard_errors(name: str):
    measurement = measured(name)
    total = measurement.hessian.trace
    assert abs(total.value - truth(name).trace) <= 4 * total.std_error + 1e-12 * abs(total.value)
    for block, trace in truth(name).block_traces.items():
        estimate = measurement.blocks[block].trace
        assert abs(estimate.value - trace) <= 4 * estimate.std_error + 1e-12 * abs(total.value)


# The method is tested on closed forms too, and asks nothing of a model but products, which the tests above compare.
@pytest.mark.parametrize(
    "name", [name if name == "gpt2" else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_traces_with_unit_vectors_are_exact(name: str):
    measurement = measured(name, trace_method="exact", max_hvps=16, batch_size=EXAMPLES)
    assert measurement.hessian.trace.value == pytest.approx(truth(name).trace, rel=1e-6)
    values = {block: values.trace.value for block, values in measurement.blocks.items()}
    assert values == pytest.approx(truth(name).block_traces, rel=1e-6)
