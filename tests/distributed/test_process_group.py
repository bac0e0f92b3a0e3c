# SPDX-License-Identifier: Apache-2.0
"""Sums over ranks, and errors that all ranks agree on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_optimizability import MeasurementError
from hf_optimizability.distributed.process_group import RankLostError, training_process_group
from hf_optimizability.linalg.communicator import SINGLE_PROCESS
from tests.support.ranks import Failed, on_ranks, results


CPU = torch.device("cpu")


def raised(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def checks(rank: int) -> dict[str, Any]:
    """One start of processes for all that works."""
    group = training_process_group(CPU)
    found: dict[str, Any] = {"number": group.world_size, "index": group.rank}
    found["sum"] = group.all_reduce_(torch.full((2, 3), 1.0 + rank)).tolist()
    several = [torch.tensor([rank]), torch.tensor([1.0])]
    group.all_reduce_many_(several)
    found["sum_each"] = [float(tensor) for tensor in several]
    # Ten things dealt to the ranks in turn.
    found["gather"] = group.all_gather_interleaved(list(range(10))[rank :: group.world_size])
    found["one has them"] = group.all_gather_interleaved(["a", "b"] if rank == 0 else [])

    def fail_on(failing: set[int], error: Exception, *, between: bool) -> None:
        with group.propagate_errors():
            group.all_reduce_(torch.ones(1))
            if rank in failing:
                raise error
            if between:
                group.all_reduce_(torch.ones(5))

    memory = torch.OutOfMemoryError("no memory")
    found["told in a collective"] = raised(lambda: fail_on({1}, memory, between=True))
    found["told at the end"] = raised(
        lambda: fail_on({1}, MeasurementError("rows_unreadable", error=KeyError("Reason.")), between=False)
    )
    found["the first one's"] = raised(lambda: fail_on({0, 1}, ValueError(f"of {rank}"), between=True))
    found["can't be sent"] = raised(lambda: fail_on({1}, UnsendableError(), between=True))

    def nested() -> None:
        """What is caught outside of an inner `propagate_errors` is no end; a rank may come to it late or early."""
        with group.propagate_errors():
            with suppress(ValueError), group.propagate_errors():
                if rank == 0:
                    raise ValueError("no")
                group.all_reduce_(torch.ones(2))
            found["went on"] = float(group.all_reduce_(torch.ones(1)))
            if rank == 0:
                raise KeyError("later")
            with group.propagate_errors():
                pass

    found["nested"] = raised(nested)

    def at_the_end_of_both() -> None:
        """The others are done with the inner one when they are told."""
        with group.propagate_errors(), group.propagate_errors():
            group.all_reduce_(torch.ones(1))
            if rank == 0:
                raise ValueError("last")

    found["at the end of both"] = raised(at_the_end_of_both)
    found["after both"] = float(group.all_reduce_(torch.ones(1)))

    def before_another_s() -> None:
        """A collective that is not of the ranks themselves."""
        with group.propagate_errors():
            if rank == 2:
                raise ValueError("before")
            group.barrier()
            torch.distributed.barrier()

    found["before another's"] = raised(before_another_s)

    def changed() -> None:
        """An error of another rank that is raised on as something else."""
        with group.propagate_errors():
            try:
                if rank == 1:
                    raise RuntimeError("at first")
                group.all_reduce_(torch.ones(1))
            except RuntimeError as error:
                raise ValueError("then") from error

    found["changed"] = raised(changed)
    found["after all"] = float(group.all_reduce_(torch.ones(1)))
    return found


class UnsendableError(Exception):
    def __init__(self) -> None:
        super().__init__("stays here")
        self.lock = os.fdopen(os.dup(0))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results(checks, 3, tmp_path_factory.mktemp("ranks"))


def test_sums_and_what_all_hold(found: list[dict[str, Any]]):
    for rank, result in enumerate(found):
        assert (result["number"], result["index"]) == (3, rank)
        assert result["sum"] == [[6.0] * 3] * 2
        assert result["sum_each"] == [3.0, 3.0]
        assert result["gather"] == list(range(10))
        assert result["one has them"] == ["a", "b"]


def test_all_raise_what_one_raises(found: list[dict[str, Any]]):
    for result in found:
        assert result["told in a collective"] == "OutOfMemoryError: no memory"
        assert result["told at the end"].startswith(
            "MeasurementError: The training set's rows can't be read: KeyError"
        )
        assert result["the first one's"] == "ValueError: of 0"
        assert result["can't be sent"] in ("RuntimeError: UnsendableError: stays here", "UnsendableError: stays here")
        assert result["went on"] == 3
        assert result["nested"] == "KeyError: 'later'"
        assert result["at the end of both"] == "ValueError: last"
        assert result["after both"] == 3
        assert result["before another's"] == "ValueError: before"
        assert result["after all"] == 3
    assert {result["changed"] for result in found} <= {"ValueError: then", "RuntimeError: at first"}


def going_apart(rank: int) -> str:
    group = training_process_group(CPU)
    return raised(lambda: group.all_reduce_(torch.ones(1 + rank)))


def dying(rank: int) -> tuple[str, float]:
    group = training_process_group(CPU)
    group.all_reduce_(torch.ones(1))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    with group.propagate_errors():
        group.all_reduce_(torch.ones(1))
    return "went on", time.monotonic() - started


def test_ranks_that_are_out_of_sync_raise(tmp_path: Path):
    for message in results(going_apart, 2, tmp_path):
        assert message == ("RankLostError: Ranks are out of sync: all-reduce called with tensor sizes [1, 2].")


def test_a_rank_that_dies_ends_the_others(tmp_path: Path):
    found = on_ranks(dying, 2, tmp_path)
    assert found[1] is None
    assert isinstance(found[0], Failed) and found[0].kind == RankLostError.__name__
    assert "Another process of the training has ended" in found[0].message


def test_one_process_is_alone():
    assert training_process_group(CPU) is SINGLE_PROCESS
    assert SINGLE_PROCESS.all_gather_interleaved([1]) == [1] and float(SINGLE_PROCESS.all_reduce_(torch.ones(1))) == 1
    with pytest.raises(KeyError), SINGLE_PROCESS.propagate_errors():
        raise KeyError
