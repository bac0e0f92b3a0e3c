# SPDX-License-Identifier: Apache-2.0
"""Dynamics of logs that a Trainer writes, and the three modules on their own."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import hf_optimizability.dynamics
from hf_optimizability.dynamics import compute_dynamics
from tests.support import tiny_training


LOG = [
    *({"loss": 1 + 2 * 0.5 ** (step / 40), "grad_norm": 1.0, "learning_rate": 1e-3, "step": step}
      for step in range(10, 210, 10)),
    {"eval_loss": 2.0, "eval_accuracy": 0.5, "eval_runtime": 1.0, "eval_samples_per_second": 9.0, "step": 55},
    {"eval_loss": 1.5, "eval_accuracy": 0.7, "eval_runtime": 0.9, "eval_steps_per_second": 9.0, "step": 110},
    {"eval_loss": 1.75, "eval_accuracy": 0.6, "eval_runtime": 1.1, "eval_model_preparation_time": 9.0, "step": 200},
    {"train_runtime": 9.0, "train_loss": 1.4, "train_steps_per_second": 22.0, "total_flos": 1e9, "step": 200},
]  # fmt: skip
ALIKE = {
    "optimizability/train_loss": 1.0,
    "optimizability/train_loss_std_error": 0.03,
    "optimizability/eval_loss": 1.5,
    "optimizability/eval_loss_std_error": 0.04,
    "optimizability/gap_examples": 64,
    "optimizability/train_accuracy": 0.75,
    "optimizability/eval_accuracy": 0.5,
    "optimizability/train_only": 1.0,
    "step": 200,
}


class TestCurves:
    def test_each_goes_to_its_measure(self):
        dynamics = compute_dynamics(LOG)
        assert dynamics["convergence_speed"]["half_life"] == pytest.approx(40, rel=1e-6)
        assert list(dynamics["stability"]) == ["loss", "eval_loss", "eval_accuracy"]
        assert {name: series["setbacks"] for name, series in dynamics["stability"].items()} == {
            "loss": 0, "eval_loss": 1, "eval_accuracy": 1,
        }  # fmt: skip
        assert dynamics["stability"]["eval_loss"]["largest_setback"] == 0.5

    def test_the_later_of_two_values_at_a_step_counts(self):
        again = compute_dynamics([*LOG, {"eval_loss": 1.25, "step": 200}])
        assert again["stability"]["eval_loss"]["comparisons"] == 2
        assert again["stability"]["eval_loss"]["setbacks"] == 0

    def test_named_evaluation_sets(self):
        log = [{"eval_a_loss": 1.0 + i, "eval_a_f1": 0.1 * i, "eval_a_runtime": 1.0, "step": i} for i in range(3)]
        dynamics = compute_dynamics(log)
        assert {name: series["setbacks"] for name, series in dynamics["stability"].items()} == {
            "loss": 0, "eval_a_loss": 2, "eval_a_f1": 0,
        }  # fmt: skip


class TestGap:
    def test_from_losses_measured_alike(self):
        gap = compute_dynamics([*LOG, ALIKE])["generalization_gap"]
        assert gap["measured_alike"] is True
        assert (gap["loss_gap"], gap["step"], gap["examples"]) == (0.5, 200, 64)
        assert gap["std_error"] == pytest.approx(0.05)
        assert gap["metric_gaps"] == {"accuracy": 0.25}
        # The best eval loss comes from the log: it was not measured on the same examples.
        assert (gap["best_eval_loss"], gap["best_step"], gap["rise_since_best"]) == (1.5, 110, 0.25)
        assert gap["note"] == ""

    def test_from_the_log(self):
        gap = compute_dynamics(LOG)["generalization_gap"]
        assert gap["measured_alike"] is False
        assert gap["loss_gap"] == pytest.approx(1.75 - (1 + 2 * 0.5 ** (200 / 40)))
        assert gap["significant"] is None and gap["metric_gaps"] == {}
        assert "running mean" in gap["note"] and "dropout" in gap["note"]

    def test_the_train_loss_is_not_from_the_future(self):
        gap = compute_dynamics([entry for entry in LOG if entry["step"] <= 55] + LOG[6:8])["generalization_gap"]
        assert gap["step"] == 55
        assert gap["train_loss"] == pytest.approx(1 + 2 * 0.5 ** (50 / 40))

    def test_no_train_loss_before_the_evaluation(self):
        gap = compute_dynamics([{"eval_loss": 1.0, "step": 0}, {"loss": 2.0, "step": 1}])["generalization_gap"]
        assert (gap["train_loss"], gap["loss_gap"], gap["best_eval_loss"]) == (None, None, 1.0)

    def test_unknown_errors_measured_alike(self):
        unknown = {"optimizability/train_loss_std_error": None, "optimizability/eval_loss_std_error": math.nan}
        gap = compute_dynamics([ALIKE | unknown])["generalization_gap"]
        assert (gap["loss_gap"], gap["std_error"], gap["best_eval_loss"]) == (0.5, None, None)
        assert "standard errors" in gap["note"] and "No eval_loss" in gap["note"]


@pytest.mark.parametrize(
    "log",
    [
        [],
        [{"train_runtime": 1.0, "train_loss": 0.0, "step": 3}],
        [{"loss": math.nan, "grad_norm": math.inf, "step": step} for step in range(9)],
        [{"eval_loss": 1.0, "eval_runtime": 1.0, "step": 0}],
        [{"loss": 1.0, "step": 5}, {"eval_loss": math.inf, "eval_matrix": [[1, 2]], "eval_name": "a", "step": 5}],
        [{"eval_accuracy": 0.5, "step": 5}],
        [{"loss": 0.0, "step": step} for step in range(20)],
    ],
    ids=["nothing", "end only", "diverged", "eval at start", "odd metrics", "no eval loss", "zero loss"],
)
def test_any_log_has_all_keys_and_says_what_lacks(log):
    dynamics = compute_dynamics(log)
    full = compute_dynamics([*LOG, ALIKE])
    assert dynamics.keys() == full.keys()
    assert dynamics["convergence_speed"].keys() == full["convergence_speed"].keys()
    assert dynamics["generalization_gap"].keys() == full["generalization_gap"].keys()
    assert dynamics["stability"]["loss"].keys() == full["stability"]["loss"].keys()
    assert dynamics["convergence_speed"]["note"] and dynamics["generalization_gap"]["note"]
    json.dumps(dynamics, allow_nan=False)


def test_log_of_a_real_run(tmp_path):
    def compute_metrics(prediction):
        return {"accuracy": np.mean(prediction.predictions.argmax(-1) == prediction.label_ids)}

    trainer = tiny_training.trainer(
        tmp_path,
        max_steps=12,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=4,
        eval_on_start=True,
        eval_dataset=tiny_training.dataset("bert", 8),
        compute_metrics=compute_metrics,
    )
    trainer.train()
    log = trainer.state.log_history
    dynamics = json.loads(json.dumps(compute_dynamics(log), allow_nan=False))

    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == dynamics["convergence_speed"]["points"] == 12
    rises = sum(later > earlier for earlier, later in pairwise(losses))
    assert dynamics["stability"]["loss"]["setbacks"] == rises > 0
    assert list(dynamics["stability"]) == ["loss", "eval_loss", "eval_accuracy"]
    assert dynamics["stability"]["eval_accuracy"]["comparisons"] == 3
    eval_losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    gap = dynamics["generalization_gap"]
    assert (gap["step"], gap["best_eval_loss"]) == (12, min(eval_losses))
    assert gap["loss_gap"] == pytest.approx(eval_losses[-1] - losses[-1])


SINGLE_PROCESS = """
import sys, evaluate
folder, calls = sys.argv[1], {
    "convergence_speed": dict(step=list(range(0, 100, 5)), loss=[1 + 0.5 ** (s / 10) for s in range(0, 100, 5)]),
    "stability": dict(step=[1, 2, 3], value=[1.0, 3.0, 2.0], greater_is_better=True),
    "generalization_gap": dict(
        step=[1], train_loss=[1.0], eval_loss=[1.5], train_std_error=[None], eval_std_error=[None]
    ),
}
results = {name: evaluate.load(f"{folder}/{name}.py").compute(**columns) for name, columns in calls.items()}
assert abs(results["convergence_speed"]["half_life"] - 10) < 1e-5, results
assert results["stability"]["setbacks"] == 1, results
assert results["generalization_gap"]["loss_gap"] == 0.5, results
assert "hf_optimizability" not in sys.modules
"""


@pytest.mark.slow
def test_modules_load_alone_and_offline(tmp_path):
    folder = Path(hf_optimizability.dynamics.__file__).parent
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-W", "error::UserWarning", "-c", SINGLE_PROCESS, str(folder)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
