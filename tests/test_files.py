# SPDX-License-Identifier: Apache-2.0
"""A run that is killed leaves the old report or the new one, never a torn one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hf_optimizability import OptimizabilityConfig, OptimizabilityReport, OptimizabilityTrainer
from hf_optimizability.files import write_atomically
from tests.support import tiny_training
from tests.support.blank_plots import leave_plots_undrawn
from tests.support.processes import PROCESSES


ROOT = Path(__file__).parents[1]

WRITING = """
import sys
from pathlib import Path
from hf_optimizability.files import write_atomically
content = {"a": b"A" * 4_000_000, "b": b"B" * 4_000_000}
while True:
    for letter in "ab":
        write_atomically(Path(sys.argv[1]), content[letter])
"""


def start(script: str, argument: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", script, str(argument)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def wait_for(file: Path, process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + 120
    while not file.exists():
        assert process is None or process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline, f"{file} did not appear"
        time.sleep(0.01)


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()


def test_a_kill_while_writing_leaves_a_whole_file(tmp_path: Path):
    file = tmp_path / "file"
    for delay in (0.0, 0.003, 0.011, 0.023, 0.037, 0.05):
        process = start(WRITING, file)
        wait_for(tmp_path / ".file.tmp", process)
        wait_for(file, process)
        time.sleep(delay)
        kill(process)
        content = file.read_bytes()
        assert content in (b"A" * 4_000_000, b"B" * 4_000_000)


def measuring(folder: Path) -> None:
    """Measures without end."""
    config = OptimizabilityConfig(**{**tiny_training.CONFIG, "measure_steps": 1})
    leave_plots_undrawn(pytest.MonkeyPatch())
    torch.set_num_threads(1)
    tiny_training.trainer(folder, cls=OptimizabilityTrainer, optimizability=config, max_steps=10_000).train()


def test_a_kill_while_measuring_leaves_a_report_that_loads(tmp_path: Path):
    report = tmp_path / "optimizability" / "report.json"
    process = PROCESSES.Process(target=measuring, args=(tmp_path,))
    process.start()
    wait_for(report)
    time.sleep(0.5)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    loaded = OptimizabilityReport.load(report)
    assert len(loaded.measurements) >= 1
    assert [measurement.step for measurement in loaded.measurements] == list(range(len(loaded.measurements)))


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "file"
    write_atomically(file, b"old")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, b"new")
    assert file.read_bytes() == b"old"


def test_numbers_that_json_cannot_hold_become_null(tmp_path: Path):
    report = OptimizabilityReport(dynamics={"x": {"low": float("nan"), "high": [float("inf")]}})
    path = report.save_json(tmp_path)
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["dynamics"] == {"x": {"low": None, "high": [None]}}


def test_a_report_of_a_later_version_is_refused(tmp_path: Path):
    path = OptimizabilityReport(schema_version=99).save_json(tmp_path)
    with pytest.raises(ValueError, match=r"schema version 99.*Upgrade hf-optimizability"):
        OptimizabilityReport.load(path)
