# SPDX-License-Identifier: Apache-2.0
"""The state in which a model is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..config import OptimizabilityConfig
from ..distributed.fsdp import materialize_parameters
from ..distributed.tensors import reshard
from ..model_state.measuring import full_precision, measuring
from ..objective.objective import Objective
from ..quantities.preconditioner import TensorReader
from .cost_model import measurement_bytes


@contextmanager
def measurement_session(
    objective: Objective, config: OptimizabilityConfig
) -> Iterator[tuple[Objective, TensorReader]]:
    """Hold a model in eval mode, with whole parameters or shards that can be measured, in float32 at least.

    Everything comes back as it was, also on an exception.

    Yields:
        The objective over these parameters, and a function that reads optimizer state in the same layout.

    Raises:
        MeasurementError: If neither whole parameters nor shards can be measured.
    """
    reshard(objective.model)
    required = measurement_bytes(objective, config)
    with (
        measuring(objective.model, seed=config.probe_seed, state=objective.state),
        materialize_parameters(objective, config, required_bytes=required) as (objective, read_tensor),
        full_precision(objective.model),
    ):
        yield objective, read_tensor
