# SPDX-License-Identifier: Apache-2.0
"""Values of tensors, saved cheaply: small ones are copied at once, large ones before the first write."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._ops import OpOverload
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .write_counter import write_count


SMALL = 2**20
"""Size in bytes of the largest tensor that is copied at once."""

_DIGEST_SUMS = 1024
"""Number of sums in the digest of a large tensor."""


class TensorValue:
    """The saved value of one tensor.

    Attributes:
        tensor: The tensor itself.
        path: Its path, for messages.
        memory: The memory of its entries, also if other memory is assigned to `.data`.
        storage: Address of that memory's storage.
        grouped: Whether the copy belongs to a group of small tensors.
        copy: Its entries; `None` for a large tensor that was not written to under `watched_writes`.
    """

    def __init__(self, tensor: Tensor, path: str, *, whole: bool, digests: bool):
        self.tensor = tensor
        self.path = path
        self.memory = tensor.detach()
        self.storage = _address(tensor)
        self.copy: Tensor | None = None
        self.plain = _is_plain(tensor)
        self._version = write_count(tensor)
        self._digest: Tensor | None = None
        small = tensor.numel() * tensor.itemsize <= SMALL
        self.grouped = small and self.plain and tensor.is_contiguous()
        if not self.grouped and (whole or small):
            self.save()
        elif not self.grouped and self.plain and digests:
            self._digest = digest(self.memory)

    def save(self) -> None:
        """Copy the entries, if there is no copy yet."""
        if self.copy is None:
            self.copy = self.memory.clone()

    def moved(self) -> bool:
        """Return whether other memory was assigned to `.data`."""
        if not self.plain:
            return False
        now, then = self.tensor, self.memory
        return now.data_ptr() != then.data_ptr() or now.shape != then.shape or now.dtype != then.dtype

    def written(self, *, thorough: bool) -> bool:
        """Return whether a bit of the entries has changed; large tensors are compared only if `thorough`."""
        version_changed = write_count(self.tensor) != self._version
        if not self.plain:
            return version_changed
        if self.copy is not None:
            return not torch.equal(as_bytes(self.memory), as_bytes(self.copy))
        if self._digest is None:
            return version_changed
        return (thorough or version_changed) and not torch.equal(digest(self.memory), self._digest)

    def restore(self, *, thorough: bool) -> bool:
        """Restore memory and entries; return whether that was possible."""
        if self.moved():
            self.tensor.data = self.memory
        if self.grouped and self.copy is None:  # its group is unchanged
            return True
        if self.written(thorough=thorough):
            if self.copy is None:
                return False
            with torch.no_grad():
                self.tensor.copy_(self.copy)
        self._version = write_count(self.tensor)
        return True


class TensorValues:
    """The values of many tensors.

    Args:
        copied: Tensors to copy whatever their size.
        digests: Whether to store digests of large tensors.
        ignored: Tensors that may change, through any alias.
    """

    def __init__(self, whole: Iterable[Tensor], *, digests: bool, ignored: Iterable[Tensor] = ()):
        self._digests = digests
        self._ignored = {_address(tensor) for tensor in ignored} - {0}
        self._whole = {id(tensor) for tensor in whole}
        self._values: list[TensorValue] = []
        self._single: list[TensorValue] = []
        self._groups: list[_Group] = []

    def add(self, tensor: Tensor, path: str) -> None:
        """Keep the value of a tensor; not of one without entries, or that can't be written to."""
        if _address(tensor) in self._ignored:
            return  # an alias, as spectral normalization keeps one of its weight
        if not (tensor.is_meta or tensor.is_inference() or tensor.is_nested) and tensor.numel():
            self._values.append(TensorValue(tensor, path, whole=id(tensor) in self._whole, digests=self._digests))

    def group(self) -> None:
        """Lay small tensors together, so that all of a device are copied and compared at once."""

        def device(value: TensorValue) -> str:
            return str(value.tensor.device)

        small = sorted((value for value in self._values if value.grouped), key=device)
        self._single = [value for value in self._values if not value.grouped]
        self._groups = [_Group(list(values)) for _, values in groupby(small, device)]

    def restore(self, *, thorough: bool) -> list[str]:
        """Restore the values; return the paths of those that are lost."""
        suspects = self._single + [value for group in self._groups for value in group.suspects()]
        return [value.path for value in suspects if not value.restore(thorough=thorough)]

    def uncopied(self) -> list[TensorValue]:
        """Return the tensors without a copy."""
        return [value for value in self._single if value.copy is None and value.plain]


class _Group:
    """Small tensors of one device, with one copy of all."""

    def __init__(self, values: list[TensorValue]):
        self._values = values
        self._bytes = [as_bytes(value.memory) for value in values]
        self._copy = torch.cat(self._bytes)

    def suspects(self) -> list[TensorValue]:
        """Return the tensors that may have changed: all, or only those with other memory."""
        if torch.equal(torch.cat(self._bytes), self._copy):
            return [value for value in self._values if value.moved()]
        pieces = self._copy.split([len(entries) for entries in self._bytes])
        for value, piece in zip(self._values, pieces, strict=True):
            value.copy = piece.clone().view(value.memory.dtype).view(value.memory.shape)
        return self._values


def _is_plain(tensor: Tensor) -> bool:
    """Return whether the entries are stored plainly in strided memory."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )


def _address(tensor: Tensor) -> int:
    """Return the address of a tensor's storage; 0 if it is not plain."""
    return tensor.untyped_storage().data_ptr() if _is_plain(tensor) and not is_functorch_wrapped_tensor(tensor) else 0


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor: a view if it is contiguous."""
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


def digest(tensor: Tensor) -> Tensor:
    """Return sums of the bits of a tensor, as a checksum.

    Example:
        >>> digest(torch.zeros(3)), digest(torch.tensor([0.0, 0.0, -0.0]))
        (tensor([0]), tensor([2147483648]))
    """
    pieces = as_bytes(tensor)
    if pieces.storage_offset() % 8:
        pieces = pieces.clone()
    words = len(pieces) // 8
    long = pieces[: words * 8].view(torch.int64)
    rows = long[: words - words % _DIGEST_SUMS].view(_DIGEST_SUMS, -1).sum(1) if words >= _DIGEST_SUMS else long[:0]
    remainder = long[words - words % _DIGEST_SUMS :] if words >= _DIGEST_SUMS else long
    tail = torch.zeros(8, dtype=torch.uint8, device=pieces.device)
    tail[: len(pieces) - words * 8] = pieces[words * 8 :]
    return torch.cat([rows, remainder.sum()[None] + tail.view(torch.int64)])


def watched_writes(values: Iterable[TensorValues]) -> AbstractContextManager[Any]:
    """Copy each large tensor before an operation inside writes to it, through any alias."""
    watched: dict[int, list[TensorValue]] = {}
    for tensors in values:
        for value in tensors.uncopied():
            watched.setdefault(value.storage, []).append(value)
    return _Watch(watched) if watched else nullcontext()


class _Watch(TorchDispatchMode):
    supports_higher_order_operators = True  # they run unchanged

    def __init__(self, watched: Mapping[int, list[TensorValue]]):
        super().__init__()
        self._watched = watched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, OpOverload) and func._schema.is_mutable:
            for tensor in _written(func._schema, args, kwargs):
                for value in self._watched.get(tensor.untyped_storage().data_ptr(), ()):
                    value.save()
        return func(*args, **kwargs)


def _written(schema: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            argument_value = args[index] if index < len(args) else kwargs.get(argument.name)
            for leaf in tree_leaves(argument_value):
                if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor) and leaf.layout is torch.strided:
                    yield leaf
