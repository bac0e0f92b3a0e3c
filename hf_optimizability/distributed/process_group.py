# SPDX-License-Identifier: Apache-2.0
"""Process groups: sums over ranks, and errors that are raised on all of them."""

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
    """A failed collective: another process has ended or hangs, so that training can't continue."""


def training_process_group(device: torch.device) -> ProcessGroup:
    """Return the default process group, as `torchrun` and `accelerate launch` start it, or a single process.

    Args:
        device: The device of the tensors to all-reduce.
    """
    distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return TorchProcessGroup(device) if distributed else SINGLE_PROCESS


class TorchProcessGroup(ProcessGroup):
    """The default process group.

    Before each collective the ranks exchange their status. A rank that has failed reports it at the end of the
    innermost `propagate_errors` around its failure, and its error is raised on all ranks, so that none waits for it.

    Args:
        device: The device of the tensors, and of the messages unless the backend is gloo.

    Raises:
        RankLostError: From any collective, if another process has ended or does not answer within the time-out.
    """

    def __init__(self, device: torch.device):
        self.world_size, self.rank = dist.get_world_size(), dist.get_rank()
        self._device = device if dist.get_backend() != "gloo" else torch.device("cpu")
        self._remote_error: BaseException | None = None  # of another rank, raised here as well

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place; every rank gets the same bits."""
        self.all_reduce_many_([tensor])
        return tensor

    def all_reduce_many_(self, tensors: Sequence[Tensor]) -> None:
        """Sum each of several tensors over the ranks, in place."""
        self.barrier(sum(tensor.numel() for tensor in tensors))
        with _collective():
            for tensor in tensors:
                message = tensor.to(self._device)
                dist.all_reduce(message)
                if message is not tensor:
                    tensor.copy_(message)

    def all_gather_interleaved(self, items: list[Item]) -> list[Item]:
        """All-gather the items and interleave them round-robin (the inverse of `items[rank::world_size]`)."""
        self.barrier()
        lists = self._exchange(items)
        return [item for turn in range(max(map(len, lists))) for items in lists for item in items[turn : turn + 1]]

    @contextmanager
    def propagate_errors(self) -> Iterator[None]:
        """Make all ranks raise the same exception if any of them raises."""
        self.barrier()
        try:
            yield
            self.barrier()
        except RankLostError:
            raise
        except Exception as error:
            if self._remote_error is not None and self._remote_error in _causes(error):
                self._remote_error = None
                raise
            first = self._report(error)
            if first is error:
                raise
            raise first from error

    def barrier(self, size: int = 0) -> None:
        """Wait for all ranks; raise the error of one that failed, or if the ranks are out of sync."""
        statuses = self._statuses(failed=False, size=size)
        if any(failed for failed, _ in statuses):
            self._remote_error = self._first_error(None)
            raise self._remote_error
        sizes = [size for _, size in statuses]
        if len(set(sizes)) > 1:
            raise RankLostError(f"Ranks are out of sync: all-reduce called with tensor sizes {sizes}.")

    def _report(self, error: Exception) -> Exception:
        """Report an error to the other ranks; return that of the first failed rank, which all raise."""
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
        index, first = next((index, other) for index, other in enumerate(errors) if other is not None)
        return error if error is not None and index == self.rank else first

    def _exchange(self, item: Item) -> list[Item]:
        items: list[Item] = [item] * self.world_size
        with _collective():
            dist.all_gather_object(items, item)
        return items


@contextmanager
def _collective() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankLostError(f"Another process of the training has ended or does not answer: {error}") from error


def _portable(error: Exception) -> Exception:
    """Return the error, or one with its message if it can't be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and the errors it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
