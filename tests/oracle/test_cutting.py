# SPDX-License-Identifier: Apache-2.0
"""The same examples, however cut into batches, give the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hf_optimizability import Measurement, OptimizabilityConfig, measure
from tests.support import tiny_models


EXAMPLES = 5
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}


def numbers(measurement: Measurement) -> dict[str, float]:
    hessian = measurement.hessian
    scale = max(abs(hessian.lambda_max.value), abs(hessian.lambda_min.value))
    return {
        "loss": measurement.loss,
        "grad_norm": measurement.grad_norm,
        "lambda_max": hessian.lambda_max.value / scale,
        "lambda_min": hessian.lambda_min.value / scale,
        "trace": hessian.trace.value / scale,
        **{f"{name} grad_norm": block.grad_norm for name, block in measurement.blocks.items()},
        **{f"{name} trace": block.trace.value / scale for name, block in measurement.blocks.items()},
    }


def causal_loss(logits: Tensor, labels: Tensor, **kwargs: object) -> Tensor:
    """Transformers' own one computes in float32 whatever the dtype of the model."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float64], ids=str)
@pytest.mark.parametrize(
    "name", ["bert", "resnet", "gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vit", "llama"))]
)
def test_partition_does_not_matter(name: str, dtype: torch.dtype):
    rows = tiny_models.examples(name, EXAMPLES, dtype=dtype)
    model = tiny_models.make(name, dtype=dtype)
    if name in ("gpt2", "llama"):
        model.loss_function = causal_loss
    # A tolerance that is never met, so that each cut spends the same products.
    config = OptimizabilityConfig(eigen_tolerance=1e-12, trace_tolerance=1e-12, max_hvps=16)
    results = {size: numbers(measure(model, tiny_models.cut(rows, size), config)) for size in (EXAMPLES, 1, 3)}
    for size in (1, 3):
        assert results[size] == pytest.approx(results[EXAMPLES], rel=TOLERANCES[dtype], abs=TOLERANCES[dtype])


def test_the_items_are_the_labels_that_count():
    rows = tiny_models.examples("gpt2", EXAMPLES)
    measurement = measure(tiny_models.make("gpt2"), tiny_models.cut(rows, 4), OptimizabilityConfig(max_hvps=16))
    counted = sum(int((row["labels"][1:] != -100).sum()) for row in rows)
    assert measurement.num_items == counted < 5 * EXAMPLES
