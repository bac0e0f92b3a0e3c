# SPDX-License-Identifier: Apache-2.0
"""What a comparison has finished, on disk, keyed by the flags that shape it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files import finite, write_atomically
from ..scoring.checkpoint import CheckpointScores
from ..serialization import structure
from .results import Failure, Run


def settings_digest(task: str, settings: Mapping[str, Any], *more: float) -> str:
    """Return eight hexadecimal digits that identify a task, settings and further numbers."""
    text = json.dumps([task, settings, *more], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def cached_scores(file: Path, compute: Callable[[], CheckpointScores], *, retry_failures: bool) -> CheckpointScores:
    """Return the scores in a file; if there are none, compute and write them.

    Args:
        file: Where they are.
        compute: Computes them.
        retry_failures: Whether to compute them again if one is missing.
    """
    if file.exists():
        scores = structure(CheckpointScores, json.loads(file.read_bytes()))
        if not (scores.notes and retry_failures):
            return scores
    scores = compute()
    write_atomically(file, json.dumps(finite(scores.to_dict()), allow_nan=False).encode())
    return scores


def cached_step_seconds(folder: Path, measure: Callable[[Path], float]) -> float:
    """Return the time of a step; if it is not known yet, measure it in a temporary folder and write it."""
    file = folder / "step.json"
    if not file.exists():
        seconds = measure(folder / "timing")
        write_atomically(file, json.dumps({"step_seconds": seconds}).encode())
        shutil.rmtree(folder / "timing", ignore_errors=True)
    return float(json.loads(file.read_bytes())["step_seconds"])


def cached_run(folder: Path, train: Callable[[], Run | Failure], *, retry_failures: bool) -> Run | Failure:
    """Return the run in a folder, or its failure; if it has not ended yet, train and write the result.

    Args:
        folder: Where it is. Its subfolder `training` is removed when the training has ended.
        train: Trains.
        retry_failures: Whether to train again if that failed.
    """
    file = folder / "run.json"
    data = json.loads(file.read_bytes()) if file.exists() else {}
    if not data or ("failure" in data and retry_failures):
        result = train()
        data = {"failure": asdict(result)} if isinstance(result, Failure) else {"run": result.to_dict()}
        write_atomically(file, json.dumps(finite(data), allow_nan=False).encode())
        shutil.rmtree(folder / "training", ignore_errors=True)
        data = json.loads(file.read_bytes())  # with the digits that a later call will find
    return structure(Failure, data["failure"]) if "failure" in data else structure(Run, data["run"])
