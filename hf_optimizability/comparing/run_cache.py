# SPDX-License-Identifier: Apache-2.0
"""What a comparison has finished, on disk, keyed by the flags that shape it."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from transformers.utils import logging

from ..files import finite, write_atomically
from ..report_data.schema import parse
from ..scoring.checkpoint import CheckpointScores
from ..serialization import structure
from .results import Failure, Run


logger = logging.get_logger(__name__)

Result = TypeVar("Result")


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
    cached = _read(file, lambda data: structure(CheckpointScores, data))
    if cached is not None and not (cached.notes and retry_failures):
        return cached
    scores = compute()
    write_atomically(file, json.dumps(finite(scores.to_dict()), allow_nan=False).encode())
    return scores


def cached_step_seconds(folder: Path, measure: Callable[[Path], float]) -> float:
    """Return the time of a step; if it is not known yet, measure it in a temporary folder and write it."""
    file = folder / "step.json"
    cached = _read(file, _step_seconds)
    if cached is not None:
        return cached
    seconds = measure(folder / "timing")
    write_atomically(file, json.dumps({"step_seconds": seconds}).encode())
    shutil.rmtree(folder / "timing", ignore_errors=True)
    return seconds


def cached_run(folder: Path, train: Callable[[], Run | Failure], *, retry_failures: bool) -> Run | Failure:
    """Return the run in a folder, or its failure; if it has not ended yet, train and write the result.

    Args:
        folder: Where it is. Its subfolder `training` is removed when the training has ended.
        train: Trains.
        retry_failures: Whether to train again if that failed.
    """
    file = folder / "run.json"
    cached = _read(file, _ended)
    if cached is not None and not (isinstance(cached, Failure) and retry_failures):
        return cached
    result = train()
    data = {"failure": asdict(result)} if isinstance(result, Failure) else {"run": result.to_dict()}
    content = json.dumps(finite(data), allow_nan=False).encode()
    write_atomically(file, content)
    shutil.rmtree(folder / "training", ignore_errors=True)
    return _ended(parse(content))  # with the digits that a later call will find


@dataclass(frozen=True)
class _StepTime:
    step_seconds: float


def _step_seconds(data: Any) -> float:
    """Return the time of a step from plain data."""
    seconds = structure(_StepTime, data).step_seconds
    if not 0 < seconds < math.inf:
        raise ValueError(f"A step takes {seconds} seconds.")
    return seconds


def _ended(data: Any) -> Run | Failure:
    """Return a run, or its failure, from plain data."""
    if isinstance(data, Mapping) and "failure" in data:
        return structure(Failure, data["failure"])
    if not isinstance(data, Mapping) or "run" not in data:
        raise ValueError("It holds neither a run nor a failure.")
    return structure(Run, data["run"])


def _read(file: Path, build: Callable[[Any], Result]) -> Result | None:
    """Return what a file of the cache holds; `None`, and a warning by name, if it is missing or damaged."""
    if not file.exists():
        return None
    try:
        return build(parse(file.read_bytes()))
    except (OSError, ValueError) as error:
        logger.warning(f"{file} can't be read, so that it is made again. {error}")
        return None
