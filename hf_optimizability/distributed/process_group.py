# SPDX-License-Identifier: Apache-2.0
"""What differs where several processes train together: sums over ranks, and errors that all of them agree on."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..linalg.communicator import SINGLE_PROCESS, ProcessGroup


Item = TypeVar("Item")


class RankLostError(Exception):
    """A collective that failed: another process has ended or hangs, and nothing can be trained any more."""


def training_process_group(device: torch.device) -> ProcessGroup:
    """The processes of the default process group, as `torchrun` and `accelerate launch` start them; or one alone.

    Args:
        device: Where tensors are that the ranks add up.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return TorchProcessGroup(device) if several else SINGLE_PROCESS


class TorchProcessGroup(ProcessGroup):
    """The ranks of the default process group.

    Before each collective the ranks exchange whether all of them got there. One that failed says so instead, from the
    end of the innermost `propagate_errors` around its failure, and its error is raised on all of them: none waits
    for a rank that is not coming.

    Args:
        device: Where the tensors are, and where the backend wants its own.

    Raises:
        RankLostError: From any collective, if another process has ended or does not answer within the time-out.
    """

    def __init__(self, device: torch.device):
        self.world_size, self.rank = dist.get_world_size(), dist.get_rank()
        self._device = device if dist.get_backend() != "gloo" else torch.device("cpu")
        self._told: BaseException | None = None  # an error of another rank that this one has raised

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """Adds up what the ranks hold, in place; every rank gets the same bits."""
        self.all_reduce_many_([tensor])
        return tensor

    def all_reduce_many_(self, tensors: Sequence[Tensor]) -> None:
        """Adds up each of several tensors, in place."""
        self.barrier(sum(tensor.numel() for tensor in tensors))
        with _collective():
            for tensor in tensors:
                there = tensor.to(self._device)
                dist.all_reduce(there)
                if there is not tensor:
                    tensor.copy_(there)

    def all_gather_interleaved(self, items: list[Item]) -> list[Item]:
        """What all ranks hold, in the order in which it was dealt to them: one to each, again and again."""
        self.barrier()
        held = self._exchange(items)
        return [item for turn in range(max(map(len, held))) for items in held for item in items[turn : turn + 1]]

    @contextmanager
    def propagate_errors(self) -> Iterator[None]:
        """Around what may raise, wherever that is not the end of the work: all ranks raise the same error, or none."""
        self.barrier()
        try:
            yield
            self.barrier()
        except RankLostError:
            raise
        except Exception as error:
            if self._told is not None and self._told in _causes(error):
                self._told = None
                raise
            agreed = self._agree(error)
            if agreed is error:
                raise
            raise agreed from error

    def barrier(self, size: int = 0) -> None:
        """Waits for all ranks; raises the error of one that failed, and on calls that do not fit together."""
        statuses = self._statuses(failed=False, size=size)
        if any(failed for failed, _ in statuses):
            self._told = self._first_error(None)
            raise self._told
        sizes = [size for _, size in statuses]
        if len(set(sizes)) > 1:
            raise RankLostError(f"The ranks have gone different ways: they add up tensors of {sizes} entries.")

    def _agree(self, error: Exception) -> Exception:
        """Tells the others of an error; the first failed rank's is everybody's."""
        self._statuses(failed=True, size=0)
        return self._first_error(error)

    def _statuses(self, *, failed: bool, size: int) -> list[tuple[int, int]]:
        mine = torch.tensor([int(failed), size], device=self._device)
        statuses = [torch.empty_like(mine) for _ in range(self.world_size)]
        with _collective():
            dist.all_gather(statuses, mine)
        return [(failed, size) for failed, size in torch.stack(statuses).tolist()]

    def _first_error(self, error: Exception | None) -> Exception:
        errors = self._exchange(None if error is None else _portable(error))
        index, first = next((index, found) for index, found in enumerate(errors) if found is not None)
        return error if error is not None and index == self.rank else first

    def _exchange(self, held: Item) -> list[Item]:
        everyones: list[Item] = [held] * self.world_size
        with _collective():
            dist.all_gather_object(everyones, held)
        return everyones


@contextmanager
def _collective() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankLostError(f"Another process of the training has ended or does not answer: {error}") from error


def _portable(error: Exception) -> Exception:
    """The error, or what it says where it can't be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
