# SPDX-License-Identifier: Apache-2.0
"""A run that is killed leaves the old report or the new one, never a torn one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from hf_optimizability import OptimizabilityConfig, OptimizabilityReport, OptimizabilityTrainer
from hf_optimizability.files import back_up, finite, read_regular, write_atomically
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


READING = """
import sys, time
from pathlib import Path
from hf_optimizability.files import write_atomically
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    write_atomically(Path(sys.argv[1]), sys.argv[3].encode() * 300_000)
"""


def torn_reads(file: Path, seconds: float) -> tuple[int, int]:
    """Reads of a file that two processes write, and how many of them found neither's content."""
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", READING, str(file), str(seconds), letter],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for letter in "ab"
    ]
    while not file.exists():
        assert all(writer.poll() is None for writer in writers)
    reads = torn = 0
    while any(writer.poll() is None for writer in writers):
        content = file.read_bytes()
        reads += 1
        torn += content not in (b"a" * 300_000, b"b" * 300_000)
    assert [writer.returncode for writer in writers] == [0, 0]
    return reads, torn


def test_two_writers_of_one_file_leave_it_whole(tmp_path: Path):
    reads, torn = torn_reads(tmp_path / "file", 3)
    assert reads > 100 and torn == 0
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.slow
def test_two_writers_of_one_file_leave_it_whole_for_a_minute(tmp_path: Path):
    reads, torn = torn_reads(tmp_path / "file", 60)
    assert reads > 2000 and torn == 0


def test_links_are_replaced_and_not_followed(tmp_path: Path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    (tmp_path / "file").symlink_to(victim)
    write_atomically(tmp_path / "file", b"ours")
    assert victim.read_bytes() == b"mine"
    assert (tmp_path / "file").read_bytes() == b"ours" and not (tmp_path / "file").is_symlink()


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o664])
def test_permissions_stay(mode: int, tmp_path: Path):
    file = tmp_path / "file"
    file.write_bytes(b"old")
    file.chmod(mode)
    write_atomically(file, b"new")
    assert file.stat().st_mode & 0o777 == mode


def test_a_new_file_has_the_usual_permissions(tmp_path: Path):
    (tmp_path / "usual").write_bytes(b"")
    write_atomically(tmp_path / "file", b"")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "file"
    file.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, b"new")
    assert os.listdir(tmp_path) == ["file"] and file.read_bytes() == b"old"


def test_only_regular_files_are_read(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    assert read_regular(tmp_path / "file") == b"content"
    for name in ("link", "pipe", "missing", ""):
        assert read_regular(tmp_path / name) is None


def test_backups_of_several_processes_do_not_meet(tmp_path: Path):
    """Each of many starts at once either has the report under a name of its own or has none."""
    report = tmp_path / "report.json"
    contents = {str(number) for number in range(200)}

    def start(content: str) -> Path | None:
        write_atomically(report, content.encode())
        return back_up(report)

    with ThreadPoolExecutor(8) as pool:
        kept = [path for path in pool.map(start, sorted(contents)) if path is not None]
    assert len(set(kept)) == len(kept) and not report.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in kept)
    assert all(path.read_text() in contents for path in kept)


@pytest.mark.slow
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
    settings = {"eps": float("nan"), "betas": [float("inf"), 0.9]}
    path = OptimizabilityReport(training={"optimizer_settings": {"eps": float("nan")}}).save_json(tmp_path)
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["training"] == {
        "optimizer_settings": {"eps": None}
    }
    assert finite({"x": settings}) == {"x": {"eps": None, "betas": [None, 0.9]}}


def test_a_report_of_a_later_version_is_refused(tmp_path: Path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps({**OptimizabilityReport().to_dict(), "schema_version": 99}))
    with pytest.raises(ValueError, match=r"schema version 99.*Upgrade hf-optimizability"):
        OptimizabilityReport.load(path)
