# SPDX-License-Identifier: Apache-2.0
"""Where the examples lie in batches whose values have several lengths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


Path = tuple[Any, ...]
"""The keys and indices that lead from a batch to a value inside it."""

MAX_VARYING, MAX_CONSTANT = 5, 3
"""How many lengths that vary from batch to batch, and how many that do not, are thought to be that of the examples."""


@dataclass(frozen=True)
class Layout:
    """Which dimension of which values has one entry for each example; other values belong to the batch as a whole.

    Attributes:
        axes: The dimension, by the path to the value; of a list 0.
        can_try: Whether a part of the examples may be tried with the other values as they are: not with ones that vary
            with something else, such as another example's length, whose share nothing would show; nor with whole
            numbers, which may be indices of examples: one out of range ends a program on a GPU.
    """

    axes: Mapping[Path, int]
    can_try: bool

    @property
    def names(self) -> tuple[str, ...]:
        """The values, by their keys and indices."""
        return tuple(".".join(map(str, path)) or "the batch" for path in self.axes)

    def count(self, batch: Any) -> int:
        """Return the number of examples."""
        path, axis = next(iter(self.axes.items()))
        value = batch
        for key in path:
            value = value[key]
        return value.size(axis) if isinstance(value, Tensor) else len(value)

    def take(self, batch: Any, indices: Sequence[int]) -> Any:
        """Return some examples as a batch of the same type."""
        return self._take(batch, indices, ())

    def _take(self, value: Any, indices: Sequence[int], path: Path) -> Any:
        if path in self.axes:
            kept = take(indices, value, axis=self.axes[path])
            return kept if isinstance(value, Tensor) else like(value, kept)
        if isinstance(value, Mapping):
            return like(value, {key: self._take(inner, indices, (*path, key)) for key, inner in value.items()})
        if isinstance(value, (list, tuple)):
            return like(value, [self._take(inner, indices, (*path, index)) for index, inner in enumerate(value)])
        return value


def possible_layouts(batches: Sequence[Any]) -> tuple[Layout, ...]:
    """Return where the examples may lie, the likeliest first; nothing if the batches do not differ, or all is clear.

    All is clear where tensors and lists agree on one length. Else it is likeliest one that varies from batch to batch,
    as that of class weights does not; that most values have, in their first dimension or in the second (time goes
    first in recurrent networks); and the smallest one, since patches or tokens in one row outnumber their images.

    Example:
        >>> batches = [(torch.ones(3), torch.ones(n, 2)) for n in (4, 4, 1)]
        >>> [layout.names for layout in possible_layouts(batches)]
        [('1',), ('0',)]
    """
    values = [dict(_values(batch, ())) for batch in batches]
    paths = [path for path in values[0] if all(path in other for other in values)] if values else []
    lengths = {path: tuple(_length(other[path]) for other in values) for path in paths}
    ragged = [path for path in paths if isinstance(values[0][path], list) and len(set(lengths[path])) > 1]
    lengths = {
        path: length
        for path, length in lengths.items()
        if not any(len(outer) < len(path) and path[: len(outer)] == outer for outer in ragged)
    }
    flat = () not in ragged and all(len(path) < 2 for path in lengths)  # a list of values, as it has it
    if len({length for path, length in lengths.items() if path or not flat}) < 2 and () not in ragged:
        return ()
    layouts = {length: _layout(length, lengths, values) for length in dict.fromkeys(lengths.values()) if all(length)}
    varying = [length for length in layouts if len(set(length)) > 1]
    if not varying:
        return ()
    votes = {length: len(layouts[length].axes) for length in layouts}
    varying.sort(key=lambda length: (-votes[length], sum(length)))
    constant = sorted((length for length in layouts if length not in varying), key=lambda length: -votes[length])
    return tuple(layouts[length] for length in (*varying[:MAX_VARYING], *constant[:MAX_CONSTANT]))


def _values(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """Yield the path of each tensor and each list, and the value. A tuple is rather the size of an image."""
    if isinstance(value, Tensor):
        if value.ndim > 0:
            yield path, value
        return
    if isinstance(value, list):
        yield path, value
    pairs = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    )
    for key, inner in pairs:
        yield from _values(inner, (*path, key))


def _length(value: Any) -> int:
    return value.size(0) if isinstance(value, Tensor) else len(value)  # a nested tensor has no `len`


def _layout(length: tuple[int, ...], lengths: Mapping[Path, tuple[int, ...]], values: Sequence[Any]) -> Layout:
    """Return the layout of batches that have these numbers of examples."""
    axes = {path: axis for path in lengths if (axis := _axis(path, length, lengths, values)) is not None}
    inside = [path for path in lengths if not any(path[: len(outer)] == outer for outer in axes)]
    fixed = all(len(set(lengths[path])) == 1 for path in inside)
    whole = [other[path] for path in inside for other in values]
    return Layout(axes, fixed and all(not isinstance(value, Tensor) or value.is_floating_point() for value in whole))


def _axis(
    path: Path, length: tuple[int, ...], lengths: Mapping[Path, tuple[int, ...]], values: Sequence[Any]
) -> int | None:
    """Return the dimension of a value that has these lengths in the batches, if one of the first two has."""
    if lengths[path] == length:
        return 0
    tensors = [other[path] for other in values]
    if not all(isinstance(tensor, Tensor) and tensor.ndim > 1 and not tensor.is_nested for tensor in tensors):
        return None
    return 1 if tuple(tensor.size(1) for tensor in tensors) == length else None


def take(indices: Sequence[int], values: Any, *, axis: int = 0) -> Any:
    """Return some entries of a tensor, or of another sequence as a list; a view where they are neighbours."""
    if not isinstance(values, Tensor):
        return [values[index] for index in indices]
    if values.is_sparse:
        return values.index_select(axis, torch.tensor(indices, device=values.device))
    if values.is_nested:
        return torch.nested.nested_tensor([values[index] for index in indices], layout=values.layout)
    if list(indices) == list(range(indices[0], indices[-1] + 1)):
        return values.narrow(axis, indices[0], len(indices))
    return values.index_select(axis, torch.tensor(indices, device=values.device))


def like(container: Any, content: Any) -> Any:
    """Return a container of the same type with different content."""
    kind: Any = type(container)
    return kind(*content) if "_fields" in vars(kind) else kind(content)  # a named tuple takes its fields one by one
