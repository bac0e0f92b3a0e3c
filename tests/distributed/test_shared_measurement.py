# SPDX-License-Identifier: Apache-2.0
"""A measurement that several processes share is that of one process."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import AdamW

from hf_optimizability import OptimizabilityConfig
from hf_optimizability.curvature.gauss_newton import gauss_newton_trace
from hf_optimizability.distributed.process_group import training_process_group
from hf_optimizability.linalg.communicator import SINGLE_PROCESS, ProcessGroup
from hf_optimizability.measurement.measure import measure_objective
from hf_optimizability.model_state.measuring import math_attention
from hf_optimizability.objective.objective import Objective
from tests.support import tiny_models
from tests.support.measurement_differences import differences
from tests.support.ranks import results


CPU = torch.device("cpu")
OPTIONS: dict[str, dict[str, Any]] = {
    "all": {"block_eigenvalues": True, "num_eigenvalues": 2},
    "landscape": {"landscape": True},
    "central_difference": {"engine": "central_difference"},
    "forward_over_reverse": {"engine": "forward_over_reverse"},
    "gauss_newton": {"curvature": "gauss_newton", "trace_method": "xtrace"},
    "empirical_fisher": {"curvature": "empirical_fisher"},
    "power_iteration": {"eigen_method": "power_iteration"},
    "hutch++": {"trace_method": "hutch++"},
}
# GPT-2 computes its loss in float32 whatever its weights are; nine examples in batches of two are five uneven parts,
# of which two ranks get three and two; a single batch leaves a rank without any.
CASES = [
    *[("bert", torch.float64, 2, name) for name in OPTIONS],
    ("bert", torch.float32, 2, "all"),
    ("resnet", torch.float64, 2, "all"),
    ("gpt2", torch.float32, 2, "all"),
    ("gpt2", torch.float32, 9, "landscape"),
    ("bert", torch.float64, 9, "all"),
    ("gpt2", torch.float32, 9, "all"),
]
TOLERANCES = {torch.float32: 2e-5, torch.float64: 1e-10}


LIKE_OTHERS = [
    ("bert", torch.float64, 2, "power_iteration"),
    ("bert", torch.float64, 2, "landscape"),
    ("bert", torch.float64, 2, "forward_over_reverse"),
    ("bert", torch.float64, 2, "hutch++"),
    ("bert", torch.float64, 2, "empirical_fisher"),
    ("bert", torch.float32, 2, "all"),
    ("bert", torch.float64, 9, "all"),
    ("gpt2", torch.float32, 2, "all"),
    ("gpt2", torch.float32, 9, "all"),
    ("resnet", torch.float64, 2, "all"),
]
"""Cases that take long, or are near enough to others, to be left to `make test-slow`, which starts three processes."""


def cases_on(processes: int) -> list[tuple[Any, ...]]:
    return [case for case in CASES if processes > 2 or case not in LIKE_OTHERS]


def measured(group: ProcessGroup, name: str, dtype: torch.dtype, batch_size: int, options: str) -> dict[str, Any]:
    model = tiny_models.make(name, dtype=dtype)
    rows = tiny_models.examples(name, 9, dtype=dtype)
    objective = Objective(model, tiny_models.cut(rows, batch_size)).shard(group)
    config = OptimizabilityConfig(max_hvps=16, trace_tolerance=0.05, **OPTIONS[options])
    found = measure_objective(objective, config, optimizer=AdamW(model.parameters(), lr=1e-3))[0].to_dict()
    _drop_rounding(found)
    if options == "empirical_fisher":  # several of its Ritz values are 0 to rounding, in any order
        nodes, weights = (np.array(found["hessian"]["density"].pop(key)) for key in ("nodes", "weights"))
        found["hessian"]["density"]["above 0"] = weights[np.abs(nodes) > 1e-9].tolist()
    return found


def _drop_rounding(measurement: dict[str, Any]) -> dict[str, Any]:
    """Leave out the numbers that are rounding errors."""
    for name in ("mean_error", "slope_errors", "repeat_error"):
        del measurement["self_check"][name]
    for check in measurement["eigenvalue_checks"]:
        del check["differences"]
    measurement["central_difference_error"] = measurement["central_difference_error"] and round(
        measurement["central_difference_error"], 6
    )
    return measurement


def on_a_rank(rank: int) -> dict[str, Any]:
    group = training_process_group(CPU)
    found: dict[str, Any] = {str(case): measured(group, *case) for case in cases_on(group.world_size)}
    found["exact trace"] = exact_trace(group)
    found["memory"] = with_little_memory(group)
    return found


def exact_trace(group: ProcessGroup) -> list[float]:
    model = tiny_models.make("bert").eval()
    objective = Objective(model, tiny_models.cut(tiny_models.examples("bert", 9), 2)).shard(group)
    size = sum(parameter.numel() for parameter in objective.parameters)
    with math_attention():
        total, [first, _] = gauss_newton_trace(objective, [[slice(0, 99)], [slice(99, size)]])
    return [total.value, total.data_std_error or math.nan, first.value, first.data_std_error or math.nan]


class Small(nn.Module):
    """A model that takes one or two examples at a time, and runs out of memory with more."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.line(x).tanh()


def with_little_memory(group: ProcessGroup) -> dict[str, Any]:
    """Only the rank that gets the large batch runs out of memory; both halve theirs."""
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(size, 3, generator=generator),) for size in (1, 4, 1)]
    objective = Objective(Small(), batches, loss_fn=lambda model, batch: model(batch[0]).square().mean())
    found, objective = measure_objective(objective.shard(group), OptimizabilityConfig(profile="light"))
    measurement = _drop_rounding(found.to_dict())
    del measurement["eigenvalue_checks"], measurement["hvps"]  # an eigenvalue near 0 takes one step or three to check
    return {
        "measurement": measurement,
        "sizes": [len(batch[0]) for batch in objective.batches],
    }


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results(on_a_rank, request.param, tmp_path_factory.mktemp("ranks"))


def test_is_that_of_one_process(found: list[dict[str, Any]]):
    torch.set_num_threads(1)
    first, *others = found
    for case in cases_on(len(found)):
        expected = measured(SINGLE_PROCESS, *case)
        for result in found:
            tolerance = 1e-6 if case[3] == "central_difference" else TOLERANCES[case[1]]  # they magnify rounding
            assert not differences(result[str(case)], expected, tolerance=tolerance), case
        for result in others:  # to the last bit, or the ranks would part
            assert not differences(result[str(case)], first[str(case)], tolerance=0), case


def test_the_exact_trace(found: list[dict[str, Any]]):
    for result in found:
        assert result["exact trace"] == pytest.approx(exact_trace(SINGLE_PROCESS), rel=1e-10)


def test_memory_that_one_rank_lacks(found: list[dict[str, Any]]):
    expected = with_little_memory(SINGLE_PROCESS)
    assert expected["sizes"] == [1, 2, 2, 1]
    assert sorted(size for result in found for size in result["memory"]["sizes"]) == [1, 1, 2, 2]
    for result in found:
        assert not differences(result["memory"]["measurement"], expected["measurement"], tolerance=1e-5)
