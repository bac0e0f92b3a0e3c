# SPDX-License-Identifier: Apache-2.0
"""Trainings under real DeepSpeed, up to ZeRO-2: bit for bit as without measurements, and with the numbers of none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_optimizability import OptimizabilityCallback, OptimizabilityConfig
from tests.support import tiny_training
from tests.support.measurement_differences import differences
from tests.support.stopped_training import STEPS


ROOT = Path(__file__).parents[2]
DEEPSPEED = ROOT / ".venv" / "deepspeed"
"""Where `make test-slow` puts it: beside the environment, as everything behaves another way where it is installed."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not DEEPSPEED.exists(), reason="DeepSpeed is not there; `make .venv/deepspeed` gets it"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What two processes measured, in trainings that ended as those without measurements: they check that."""
    folder = tmp_path_factory.mktemp("deepspeed")
    path = f"{DEEPSPEED}{os.pathsep}{ROOT}"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "-m", "tests.support.deepspeed_training", str(folder)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


def test_all_is_measured_but_how_far_an_optimizer_of_deepspeed_may_step(found: dict[str, list[dict[str, Any]]]):
    for name, measurements in found.items():
        assert [measurement["step"] for measurement in measurements] == [0, 2, 4]
        assert all((measurement["optimizer_stability"] is None) == (name != "ZeRO-0") for measurement in measurements)


def test_the_numbers_are_those_of_one_process_without_it(tmp_path: Path, found: dict[str, list[dict[str, Any]]]):
    """Before the first step: then dropout parts them. Where no step is measured, more products go to the Hessian."""
    callback = OptimizabilityCallback(OptimizabilityConfig(**tiny_training.IN_TWO_BATCHES, **STEPS))
    tiny_training.trainer(tmp_path, callbacks=[callback], max_steps=4, learning_rate=1e-3).train()
    expected = callback.report.measurements[0].to_dict()
    zero, one, two = (found[f"ZeRO-{stage}"][0] for stage in (0, 1, 2))
    for measurement in (zero, expected):  # rounding errors
        del measurement["self_check"], measurement["eigenvalue_checks"]
    assert not differences(zero, expected, tolerance=1e-5)
    assert not differences(one["hessian"], two["hessian"], tolerance=0)
    for quantity in ("loss", "grad_norm", "noise_scale"):
        assert not differences(two[quantity], expected[quantity], tolerance=1e-5)
