# SPDX-License-Identifier: Apache-2.0
"""What trackers store of a run without any network, read back and held against the Trainer's log."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import time
from collections.abc import Callable, Iterator, Sized
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hf_optimizability import OptimizabilityConfig, OptimizabilityTrainer
from hf_optimizability.log_keys import PREFIX
from tests.support import tiny_training


def trained(folder: Path, tracker: str, **settings: str) -> dict[tuple[int, str], float]:
    """The numbers in the log of a run that reported to a tracker, by step and name."""
    config = OptimizabilityConfig(**tiny_training.QUICK)
    options = {"optimizability": config, "report_to": tracker, "run_name": "run", "max_steps": 4, **settings}
    trainer = tiny_training.trainer(folder, cls=OptimizabilityTrainer, **options)
    trainer.train()
    logged = {
        (entry["step"], name): value
        for entry in trainer.optimizability_report().log_history
        for name, value in entry.items()
        if name.startswith(PREFIX)
    }
    assert {step for step, _ in logged} == {0, 2, 4} and len(logged) > 30
    return logged


def settled(read: Callable[[], list[dict[str, Any]]], logged: Sized) -> dict[tuple[int, str], float]:
    """What a tracker has stored, once it is all there: it writes in the background, some of it after it finished."""
    deadline = time.monotonic() + 30
    while len(stored := by_step(read())) < len(logged) and time.monotonic() < deadline:
        time.sleep(0.2)
    return stored


@pytest.mark.usefixtures("quickly")
def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    logged = trained(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    stored = {
        (scalar.step, name.removeprefix("train/")): scalar.value
        for name in events.Tags()["scalars"]
        if PREFIX in name
        for scalar in events.Scalars(name)
    }
    assert stored == pytest.approx(logged, rel=1e-6)


@pytest.mark.usefixtures("quickly")
def test_trackio(tmp_path: Path):
    logged = trained(tmp_path, "trackio", project=tmp_path.name)
    database = Path(os.environ["TRACKIO_DIR"]) / f"{tmp_path.name}.db"

    def read() -> list[dict[str, Any]]:
        if not database.exists():
            return []
        with sqlite3.connect(database) as connection:
            return [json.loads(metrics) for (metrics,) in connection.execute("SELECT metrics FROM metrics")]

    assert settled(read, logged) == pytest.approx(logged, rel=1e-9)


@pytest.mark.usefixtures("quickly")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    logged = trained(tmp_path, "wandb")
    wandb.finish()
    [file] = tmp_path.glob("wandb/offline-run-*/*.wandb")

    def read() -> list[dict[str, Any]]:
        records = map(Record.FromString, leveldb_records(file.read_bytes()[7:], offset=7))
        rows = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
        return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]

    assert settled(read, logged) == pytest.approx(logged, rel=1e-9)


def leveldb_records(content: bytes, *, offset: int) -> Iterator[bytes]:
    """The records of a log in LevelDB's format, after a header: chunks in blocks of 32 KiB."""
    place, chunks = 0, b""
    while place + 7 <= len(content):
        left = 32768 - (place + offset) % 32768
        if left < 7:  # what is too short for a header is padding
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        chunks += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last chunk
            yield chunks
            chunks = b""


def by_step(rows: list[dict[str, Any]]) -> dict[tuple[int, str], float]:
    """What is ours in rows as Transformers' callbacks log them."""
    stored: dict[tuple[int, str], float] = {}
    for row in rows:
        step = int(row.get("train/global_step", -1))
        stored |= {(step, name.removeprefix("train/")): value for name, value in row.items() if PREFIX in name}
    return stored
