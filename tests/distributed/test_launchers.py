# SPDX-License-Identifier: Apache-2.0
"""The recipes, unchanged, as `torchrun` and `accelerate launch` start them; and models spread over devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import dispatch_model

from hf_optimizability import OptimizabilityConfig, OptimizabilityReport, measure
from tests.support import tiny_models
from tests.support.measurement_differences import differences
from tests.support.training_outcome import assert_equal


ROOT = Path(__file__).parents[2]
ARGUMENTS = {
    "model_name_or_path": str(ROOT / "recipes/checkpoints/mobilenet_v2_1.0"),
    "dataset_name": str(ROOT / "recipes/data/mnist_5k"),
    "image_size": 32,
    "max_train_samples": 24,
    "max_eval_samples": 6,
    "do_train": True,
    "do_eval": True,
    "max_steps": 2,
    "gradient_accumulation_steps": 2,
    "profile": "light",
    "probe_examples": 6,
    "probe_batch_size": 2,
    "max_hvps": 16,
    "pool_examples": 0,
    "use_cpu": True,
    "disable_tqdm": True,
}


LAUNCHERS = {
    "python": [],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    "accelerate launch": [
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
        "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0",
    ],
}  # fmt: skip
"""One process, and two. Accelerate starts several on the CPU as it does on GPUs, or by MPI."""


def report(folder: Path, launcher: str) -> OptimizabilityReport:
    """A recipe's report, with the same examples in a step by one process and by two."""
    folder.mkdir()
    processes = 1 if launcher == "python" else 2
    arguments = {**ARGUMENTS, "output_dir": str(folder), "per_device_train_batch_size": 4 // processes}
    (folder / "arguments.json").write_text(json.dumps(arguments))
    done = subprocess.run(
        [sys.executable, *LAUNCHERS[launcher], "recipes/image_classification.py", str(folder / "arguments.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Report:") == 1  # one process tells where it is
    return OptimizabilityReport.load(folder / "optimizability")


@pytest.mark.slow
def test_a_recipe_on_two_processes_measures_what_one_does(tmp_path: Path):
    one = report(tmp_path / "one", "python")
    for launcher in ("torchrun", "accelerate launch"):
        two = report(tmp_path / launcher, launcher)
        assert [measurement.step for measurement in two.measurements] == [0, 2] and not two.failures
        assert two.training["examples_per_step"] == one.training["examples_per_step"]  # as two processes have them
        assert two.data.probe.fingerprint == one.data.probe.fingerprint
        first, expected = (found.measurements[0].to_dict() for found in (two, one))
        for measurement in (first, expected):
            for check in measurement["eigenvalue_checks"]:
                del check["differences"]  # full of rounding in float32
        assert not differences(first, expected, tolerance=1e-5), launcher


def test_a_model_that_is_spread_over_devices():
    """By accelerate's hooks, as `device_map` does; here all of the devices are the CPU."""
    batches = tiny_models.cut(tiny_models.examples("vit", 6), 2)
    config = OptimizabilityConfig(max_hvps=16)
    expected = measure(tiny_models.make("vit"), batches, config).to_dict()
    places = {"vit.embeddings": "cpu", "vit.layers": "cpu", "vit.layernorm": "cpu", "classifier": "cpu"}
    spread = dispatch_model(tiny_models.make("vit"), places, main_device="cpu", force_hooks=True)
    assert "_hf_hook" in vars(spread.classifier)
    before = {name: tensor.clone() for name, tensor in spread.state_dict().items()}
    assert not differences(measure(spread, batches, config).to_dict(), expected, tolerance=0)
    assert_equal(dict(spread.state_dict()), before)
