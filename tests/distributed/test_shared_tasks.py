# SPDX-License-Identifier: Apache-2.0
"""Numbers by task of several processes are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_optimizability import OptimizabilityConfig
from hf_optimizability.distributed.process_group import training_process_group
from hf_optimizability.linalg.communicator import SINGLE_PROCESS, ProcessGroup
from hf_optimizability.measurement.measure import measure_objective
from hf_optimizability.objective.objective import Objective
from tests.support.ranks import results
from tests.support.two_tasks import Heads, cut, of_task, rows


def measured(group: ProcessGroup) -> list[Any]:
    """Of many batches, and of one for each task, which leaves a third rank without any."""
    found = []
    for size in (4, 40):
        batches = [piece for task in (0, 1) for piece in cut(of_task(rows(), task), size)]
        tasks = [str(int(batch["task"][0])) for batch in batches]
        objective = Objective(Heads(), batches, tasks=tasks).shard(group)
        config = OptimizabilityConfig(task_column="task", max_hvps=40)
        found.append(measure_objective(objective, config)[0].to_dict()["multitask"])
    return found


def on_a_rank(rank: int) -> list[Any]:
    return measured(training_process_group(torch.device("cpu")))


def assert_close(one: Any, other: Any, where: str = "") -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_close(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        for index, (x, y) in enumerate(zip(one, other, strict=True)):
            assert_close(x, y, f"{where}/{index}")
    elif isinstance(one, float):
        assert np.isclose(one, other, rtol=1e-7, atol=1e-9), (where, one, other)
    else:
        assert one == other, where


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3])
def test_shared_tasks_are_those_of_one_process(tmp_path: Path, number: int):
    alone = measured(SINGLE_PROCESS)
    for found in results(on_a_rank, number, tmp_path / "ranks"):
        assert_close(found, alone)
