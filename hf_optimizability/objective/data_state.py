# SPDX-License-Identifier: Apache-2.0
"""The state of collator, data set and sampler, which is restored after the probe set is drawn."""

from __future__ import annotations

import copy
import ctypes
import io
import logging
import multiprocessing.connection
import queue
import random
import socket
import sys
import sysconfig
import threading
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import CodeType, FunctionType, GeneratorType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ..errors import MeasurementError


MANY = 1000
"""Entries above which a container counts as data: its entries are restored, but not traversed."""

LARGE, ALL_COPIES = 1 << 16, 1 << 24
"""Entries above which an array counts as data and is not copied; entries of all copies together."""

MAX_OBJECTS = 100_000
"""Maximum number of objects that are traversed; all others count as data."""

_OPAQUE = (
    str, bytes, int, float, complex, bool, type(None), range, slice, ModuleType, CodeType, threading.Thread,
    logging.Logger, logging.Handler, torch.nn.Parameter, torch.dtype, torch.device, np.dtype,
)  # fmt: skip
"""Types that are not traversed: reading data does not change them, or their state is not ours."""

_CHANNELS = (socket.socket, multiprocessing.connection.Connection, queue.SimpleQueue)
"""Types that can be read only once."""

_LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))


@runtime_checkable
class Resumable(Protocol):
    """A stream that can restore its position, as in torchdata."""

    def state_dict(self) -> Any:
        """Return its position."""

    def load_state_dict(self, state_dict: Any) -> None:
        """Continue from a position."""


@contextmanager
def preserved_data(dataset: Any, *others: Any, stream: bool = False) -> Iterator[DataState]:
    """Restore, at exit, what reading data changes: counters, caches, queues, random generators, positions.

    Covers everything reachable from the arguments: attributes of objects and of the user's own classes, entries of
    containers, closures, and the globals that the user's own functions name. Small values are copied; large containers
    keep their entries; large arrays count as data. Inside, iterators are replaced by copies.

    Args:
        dataset: The data set.
        others: Collator, sampler.
        stream: Whether the data set is read from its start, so that everything it reads from must be restored.

    Raises:
        MeasurementError: If something can't be restored: an open generator, or a pipe, socket or cursor of a stream.

    Example:
        >>> rng = random.Random(0)
        >>> with preserved_data([rng]):
        ...     first = rng.random()
        >>> first == rng.random()
        True
    """
    state = DataState(dataset, *others, stream=stream)
    try:
        state.save()
        yield state
    finally:
        state.restore()


class DataState:
    """The state that `preserved_data` restores.

    Args:
        dataset: As for `preserved_data`.
        others: As for `preserved_data`.
        stream: As for `preserved_data`.
    """

    def __init__(self, dataset: Any, *others: Any, stream: bool):
        self._dataset, self._roots, self._stream = dataset, (dataset, *others), stream
        self._seen: dict[int, Any] = {}  # references the objects, so that their ids are not reused
        self._forks: dict[int, Any] = {}
        self._copied = 0
        self._restores: list[Callable[[], Any]] = []

    def save(self) -> None:
        """Save the state of the roots and of everything reachable from them.

        Raises:
            MeasurementError: If something can't be restored.
        """
        pending = deque((type(root).__name__, root) for root in self._roots)
        while pending and len(self._seen) < MAX_OBJECTS:
            place, value = pending.popleft()
            if isinstance(value, _OPAQUE) or id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            pending.extend((f"{place}{name}", held) for name, held in self._save(place, value))

    def knows(self, iterator: Any) -> bool:
        """Return whether the state of an iterator is restored."""
        return id(iterator) in self._seen or any(iterator is fork for fork in self._forks.values())

    def restore(self) -> None:
        """Restore everything, in reverse order.

        Raises:
            MeasurementError: If the state of an object can't be set. All others are restored.
        """
        failures = []
        while self._restores:
            try:
                self._restores.pop()()
            except Exception as error:
                failures.append(error)
        if failures:
            raise MeasurementError("data_not_restored", error=failures[0]) from failures[0]

    def _save(self, place: str, value: Any) -> Iterator[tuple[str, Any]]:
        """Save how to restore one object; yield what it refers to."""
        if (restore := _random_state(value)) is not None:
            self._restores.append(restore)
        elif isinstance(value, (Tensor, np.ndarray)):
            self._save_array(value)
        elif isinstance(value, (array, bytearray)):
            if len(value) <= LARGE:
                self._restores.append(partial(value.__setitem__, slice(None), value[:]))
        elif isinstance(value, io.IOBase):
            self._save_file(place, value)
        elif any(value is fork for fork in self._forks.values()):
            yield from (("", part) for part in _parts(value))
        elif isinstance(value, _CHANNELS) or _is_native_iterator(value):
            self._refuse(place, value)  # an iterator that can't be replaced by a copy
        else:
            yield from self._save_entries(place, value)
            yield from self._save_attributes(place, value)
            yield from self._save_code(place, value)

    def _save_entries(self, place: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            yield from self._save_mapping(place, value)
        elif isinstance(value, (list, deque)):
            before = list(value)
            self._restores.append(partial(_refill_sequence, value, before))
            if len(before) <= MANY:
                for index, item in enumerate(before):
                    replacement = self._readable(f"{place}[{index}]", item)
                    if replacement is not item:
                        value[index] = replacement
                    yield f"[{index}]", replacement
        elif isinstance(value, set):
            self._restores.append(partial(_refill_set, value, set(value)))
        elif isinstance(value, (tuple, frozenset)) and len(value) <= MANY:
            yield from (("[…]", item) for item in value)

    def _save_mapping(self, place: str, held: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
        """Save a dict's entries, or an object's attributes."""
        before = dict(held)
        self._restores.append(partial(_refill_mapping, held, before))
        if len(before) <= MANY:
            for name, item in before.items():
                replacement = self._readable(f"{place}.{name}", item)
                if replacement is not item:
                    held[name] = replacement
                yield f".{name}", replacement

    def _save_attributes(self, place: str, value: Any) -> Iterator[tuple[str, Any]]:
        """Save an object's attributes, and those of its class."""
        if isinstance(value, type):
            if _is_user_code(value.__module__):
                yield from self._save_class(place, value)
            return
        attributes = _attributes(value)
        if attributes is not None:
            yield from self._save_mapping(place, attributes)
        for kind in type(value).__mro__:
            yield "", kind
            for name, slot in vars(kind).items():
                if isinstance(slot, MemberDescriptorType) and "__slots__" in vars(kind):
                    with suppress(AttributeError):  # not assigned
                        held = slot.__get__(value)
                        self._restores.append(partial(slot.__set__, value, held))
                        yield f".{name}", held

    def _save_class(self, place: str, kind: type) -> Iterator[tuple[str, Any]]:
        before = {name: held for name, held in vars(kind).items() if not name.startswith("__")}
        self._restores.append(partial(_refill_class, kind, before))
        for name, held in vars(kind).items():
            inside = held.__func__ if isinstance(held, (staticmethod, classmethod)) else held
            inside = held.fget if isinstance(held, property) else inside
            yield f".{name}", inside

    def _save_code(self, place: str, value: Any) -> Iterator[tuple[str, Any]]:
        """Save what a function reads in addition to its arguments."""
        if isinstance(value, MethodType):
            yield from (("", value.__self__), ("", value.__func__))
        elif isinstance(value, partial):
            yield from (("", value.func), ("", value.args), ("", value.keywords))
        elif isinstance(value, FunctionType):
            yield from (("", value.__defaults__), ("", value.__kwdefaults__))
            for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
                with suppress(ValueError):  # an empty cell
                    held = cell.cell_contents
                    self._restores.append(partial(setattr, cell, "cell_contents", held))
                    cell.cell_contents = replacement = self._readable(f"{place}.{name}", held)
                    yield f".{name}", replacement
            if _is_user_code(value.__module__):
                yield from self._save_globals(place, value.__globals__, set(_names(value.__code__)))

    def _save_globals(self, place: str, held: dict[str, Any], names: set[str]) -> Iterator[tuple[str, Any]]:
        for name in names & held.keys():
            self._restores.append(partial(held.__setitem__, name, held[name]))
            held[name] = replacement = self._readable(f"{place}.{name}", held[name])
            yield f".{name}", replacement

    def _save_array(self, value: Tensor | np.ndarray) -> None:
        """Copy a small array; a large one is data."""
        if isinstance(value, np.ndarray):
            size, plain = value.size, value.flags.writeable and not value.dtype.hasobject
        else:
            size = value.numel()
            plain = type(value) is Tensor and value.layout is torch.strided and not (value.is_nested or value.is_meta)
        if plain and size <= LARGE and self._copied + size <= ALL_COPIES:
            self._copied += size
            self._restores.append(partial(_refill_array, value, _copy(value)))

    def _save_file(self, place: str, file: io.IOBase) -> None:
        """Save a file's position."""
        if file.closed or not file.readable():
            return
        try:
            self._restores.append(partial(file.seek, file.tell()))
        except OSError:  # a pipe, or a text file that is being read line by line
            self._refuse(place, file)

    def _readable(self, place: str, value: Any) -> Any:
        """Return the value to read from inside: a copy of an iterator, anything else as it is."""
        if not _is_native_iterator(value):
            return value
        if id(value) not in self._forks:
            try:
                self._forks[id(value)] = _fork(value)
            except TypeError:
                self._refuse(place, value)
                return value
            self._seen[id(value)] = value
        return self._forks[id(value)]

    def _refuse(self, place: str, value: Any) -> None:
        """Raise if rows that are read from an object would be missing in training."""
        if not (self._stream or isinstance(value, GeneratorType)):
            return  # a cursor or a connection of an indexed data set: each row is requested by its number
        stream = self._dataset
        # That of Datasets counts rows, but continues from the present position of its source.
        if not isinstance(stream, Resumable) or type(stream).__module__.startswith("datasets."):
            raise MeasurementError("rows_taken_away", place=place, kind=type(value).__name__)
        self._restores.insert(0, partial(stream.load_state_dict, copy.deepcopy(stream.state_dict())))


def _random_state(value: Any) -> Callable[[], Any] | None:
    """Return a function that restores a random generator or a ctypes number; `None` for other objects."""
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, np.random.RandomState):
        return partial(value.set_state, value.get_state())
    if isinstance(value, np.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, np.random.BitGenerator):
        return partial(setattr, value, "state", value.state)
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return partial(value.setstate, value.getstate())
    if isinstance(value, ctypes._SimpleCData):
        return partial(setattr, value, "value", value.value)
    return None


def _attributes(value: Any) -> dict[str, Any] | None:
    try:
        return vars(value)
    except TypeError:  # an object with slots, or an extension type
        return None


def _is_native_iterator(value: Any) -> bool:
    """Return whether an iterator is implemented in C, so that its state is not in attributes."""
    if not isinstance(value, Iterator) or isinstance(value, io.IOBase):
        return False
    step = next(vars(kind)["__next__"] for kind in type(value).__mro__ if "__next__" in vars(kind))
    return not isinstance(step, FunctionType)


def _fork(value: Any) -> Any:
    """Return a copy of an iterator over the same objects.

    Raises:
        TypeError: If it can't be copied.
    """
    if not _is_native_iterator(value):
        return value
    kind, arguments, *state = _reduced(value)
    forked = kind(*map(_fork, arguments))
    if state and state[0] is not None:
        forked.__setstate__(tuple(map(_fork_state, state[0])) if isinstance(state[0], tuple) else state[0])
    return forked


def _parts(value: Any) -> Iterator[Any]:
    """Yield the objects that a copied iterator reads from."""
    if not _is_native_iterator(value):
        yield value
        return
    _, arguments, *state = _reduced(value)
    for part in (*arguments, *(state[0] if state and isinstance(state[0], tuple) else ())):
        yield from _parts(part)


def _reduced(value: Any) -> tuple[Any, ...]:
    if type(value).__reduce__ is object.__reduce__:
        raise TypeError(f"{type(value).__name__} can't be copied")
    return value.__reduce__()


def _fork_state(value: Any) -> Any:
    return list(value) if isinstance(value, list) else _fork(value)  # `cycle` appends to its list


def _is_user_code(module: str | None) -> bool:
    """Return whether a module is the user's own and not from a library."""
    if module is None or module not in sys.modules:
        return False
    file = vars(sys.modules[module]).get("__file__")
    if file is None:
        return module == "__main__"
    return not file.startswith(_LIBRARIES) and module.split(".")[0] != __package__


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names that a function and its nested functions use."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _same(a: Iterable[Any], b: Iterable[Any]) -> bool:
    return all(x is y for x, y in zip(a, b, strict=False))


def _refill_mapping(held: dict[Any, Any], before: dict[Any, Any]) -> None:
    if list(held) == list(before):
        for name, value in before.items():
            if held[name] is not value:
                held[name] = value
    else:
        kind = OrderedDict if isinstance(held, OrderedDict) else dict
        kind.clear(held)
        kind.update(held, before)


def _refill_sequence(held: list[Any] | deque[Any], before: list[Any]) -> None:
    if len(held) != len(before) or not _same(held, before):
        held.clear()
        held.extend(before)


def _refill_set(held: set[Any], before: set[Any]) -> None:
    if held != before:
        held.clear()
        held.update(before)


def _refill_class(kind: type, before: dict[str, Any]) -> None:
    for name in [name for name in vars(kind) if not name.startswith("__") and name not in before]:
        delattr(kind, name)
    for name, value in before.items():
        if vars(kind).get(name) is not value:
            setattr(kind, name, value)


def _copy(value: Tensor | np.ndarray) -> Tensor | np.ndarray:
    return value.detach().clone() if isinstance(value, Tensor) else value.copy()


def _refill_array(held: Tensor | np.ndarray, before: Tensor | np.ndarray) -> None:
    if isinstance(held, Tensor) and isinstance(before, Tensor):
        if not torch.equal(held, before):
            with torch.no_grad():
                held.copy_(before)
    elif isinstance(held, np.ndarray) and isinstance(before, np.ndarray) and held.tobytes() != before.tobytes():
        held[...] = before
