# SPDX-License-Identifier: Apache-2.0
"""A comparison that is killed and started again ends with the page that an uninterrupted one has."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_optimizability import Comparison
from hf_optimizability.comparing.results import Run
from hf_optimizability.comparing.training import last_complete_checkpoint


ROOT = Path(__file__).parents[2]
CLOCK = ("seconds", "created", "overhead", "runtime", "per_second")
PROCESS = ("train_loss", "self_check")
"""What each process begins again: the Trainer forgets its mean loss; the self-check is made at the first weights."""


def without_clock(value: Any) -> Any:
    """The value without what the clock and the process say, at any depth."""
    if isinstance(value, dict):
        left_out = {key for key in value if key.endswith(CLOCK) or key in PROCESS}
        return {key: without_clock(held) for key, held in value.items() if key not in left_out}
    return [without_clock(held) for held in value] if isinstance(value, list) else value


def at_no_time(run: Run) -> Run:
    return dataclasses.replace(run, train_seconds=1.0, predict_seconds=0.001)


def page(folder: Path) -> tuple[dict[str, Any], str]:
    """What a comparison holds, and its page, as if all had taken one second."""
    comparison = Comparison.load(folder)
    assert (folder / "comparison.html").read_text() == comparison.to_html()
    for entry in comparison.entries:
        entry.runs = [at_no_time(run) for run in entry.runs]
    return without_clock(comparison.to_dict()), comparison.to_html()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_and_resumed_it_has_the_same_page(tmp_path: Path):
    kills = 10
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.killed_comparison", str(tmp_path), str(kills), "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    killed = re.findall(r"^killed 1, runs (\d+), checkpoints (\d+)$", done.stdout, flags=re.MULTILINE)
    assert len(killed) == kills, done.stdout
    assert any(int(checkpoints) > 0 for _, checkpoints in killed), "it was never killed within a training"
    assert int(killed[-1][0]) < 7, "it was done before it was killed for the last time"
    held, html = page(tmp_path / "killed")
    expected, expected_html = page(tmp_path / "whole")
    assert held == expected
    assert html == expected_html
    assert [len(entry["runs"]) for entry in held["entries"]] == [2, 2, 2, 0]
    assert held["entries"][3]["failure"]["why"]["code"] == "not_loaded"
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_a_torn_checkpoint_is_passed_over(tmp_path: Path):
    for step, content in {5: "{}", 10: "{}", 15: '{"step"', 20: None}.items():
        (tmp_path / f"checkpoint-{step}").mkdir()
        if content is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(content)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-5"]
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
