# SPDX-License-Identifier: Apache-2.0
"""Runs a function on several processes that train together, as `torchrun` starts them, over gloo."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.blank_plots import leave_plots_undrawn
from tests.support.processes import PROCESSES


TIMEOUT = timedelta(seconds=90)


def on_ranks(function: Callable[..., Any], number: int, folder: Path, *args: Any) -> list[Any]:
    """What `function(rank, *args)` returns, or raises, on each rank; `None` from one that died.

    Args:
        function: A function of a module, that a new process can import.
        number: How many ranks.
        folder: An empty folder of this test.
        args: For the function.
    """
    folder.mkdir(parents=True, exist_ok=True)
    processes = [PROCESSES.Process(target=_rank, args=(r, number, folder, function, args)) for r in range(number)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    alive = [process for process in processes if process.is_alive()]
    for process in alive:
        process.kill()
    assert not alive, f"{len(alive)} of {number} ranks hang"
    places = [folder / f"{rank}.pickle" for rank in range(number)]
    return [pickle.loads(place.read_bytes()) if place.exists() else None for place in places]


def results(function: Callable[..., Any], number: int, folder: Path, *args: Any) -> list[Any]:
    """As `on_ranks`, where no rank may fail."""
    found = on_ranks(function, number, folder, *args)
    for rank, result in enumerate(found):
        assert not isinstance(result, Failed), f"rank {rank}: {result.trace}"
    return found


class Failed:
    """An exception on a rank."""

    def __init__(self, error: BaseException):
        self.kind = type(error).__name__
        self.message = str(error)
        self.trace = "".join(traceback.format_exception(error))


def _rank(rank: int, number: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    leave_plots_undrawn(pytest.MonkeyPatch())
    torch.set_num_threads(1)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
    os.environ |= {name: str(value) for name, value in numbers.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # asked for, but not used: the store is a file
    dist.init_process_group("gloo", f"file://{folder}/store", timeout=TIMEOUT, rank=rank, world_size=number)
    try:
        found = function(rank, *args)
    except BaseException as error:
        found = Failed(error)
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(found))
    if not isinstance(found, Failed):
        dist.destroy_process_group()
