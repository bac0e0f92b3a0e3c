# SPDX-License-Identifier: Apache-2.0
"""Measurements of which the first of a kind alone is made whole, for tests of when they are made and what for."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from hf_optimizability import Measurement
from hf_optimizability.curvature.gradient import gradient
from hf_optimizability.measurement.measure import measure_objective
from hf_optimizability.model_state.measuring import measuring
from hf_optimizability.training import callback


MADE: dict[str, Measurement] = {}
"""The first measurement of each kind in this process."""


def measure_quickly(patch: pytest.MonkeyPatch) -> None:
    """Let callbacks measure loss and gradient of the probe set alone, once a model of these parameters was measured.

    The rest is that of the first measurement made alike, in whatever test. One that fails is not taken for the first.
    """

    def quickly(
        objective: Any, config: Any, *, pool: Any, steps: Any, optimizer: Any, step: int, epoch: Any, on_products: Any
    ) -> Any:
        assert steps is None, "measured quickly, they would not be gone through"
        del pool
        batches = [batch.items for batch in objective.local_batches]
        parameters = [(name, p.shape, p.dtype) for name, p in zip(objective.names, objective.parameters, strict=True)]
        alike = dataclasses.replace(config, measure_strategy="no", measure_steps=1, report_dir=None)
        key = repr((type(objective.model), parameters, batches, alike, type(optimizer)))
        if key not in MADE:
            MADE[key], objective = measure_objective(objective, config, optimizer=optimizer, on_products=on_products)
        else:
            on_products(MADE[key].hvps)
        first = MADE[key]
        objective = objective.checked(first.self_check)
        with measuring(objective.model, seed=config.probe_seed, state=objective.state):
            point = gradient(objective)
        norm = float(torch.cat([tensor.flatten() for tensor in point.tensors]).norm())
        return dataclasses.replace(first, step=step, epoch=epoch, loss=point.loss, grad_norm=norm), objective

    patch.setattr(callback, "measure_objective", quickly)
