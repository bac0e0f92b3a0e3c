# SPDX-License-Identifier: Apache-2.0
"""Snapshots of the mutable state reachable from some objects, restored in place."""

from __future__ import annotations

import io
import logging
import random
import sys
from array import array
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Iterable, Iterator, MutableSet
from contextlib import contextmanager
from functools import partial
from operator import is_
from types import CellType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback, TrainerControl
from transformers.trainer_callback import CallbackHandler

from .snapshot_tensors import TensorValues


SKIPPED_TYPES: tuple[type, ...] = (
    type, ModuleType, logging.Logger, io.IOBase,
    Dataset, DataLoader, Sampler, LRScheduler,
    CallbackHandler, TrainerCallback, TrainerControl, PreTrainedTokenizerBase, ProcessorMixin,
)  # fmt: skip
"""Types of objects that are not traversed (unless they are roots): a forward pass does not write to them, or they are
too large, or others write to them in the meantime."""

SKIPPED_PACKAGES = {
    "PIL", "accelerate", "aim", "clearml", "comet_ml", "datasets", "deepspeed", "evaluate", "hf_optimizability",
    "huggingface_hub", "mlflow", "neptune", "numpy", "pandas", "pyarrow", "ray", "swanlab", "tensorboard",
    "tensorboardX", "tokenizers", "torch", "tqdm", "trackio", "wandb", *sys.stdlib_module_names,
}  # fmt: skip
"""Packages whose objects are not traversed either: they have threads, locks and connections of their own."""

LIBRARIES = {"peft", "sentence_transformers", "transformers", "trl"}
"""Packages whose objects are traversed, but whose classes and functions are not: these hold no training state."""

_WITHOUT_STATE = SKIPPED_PACKAGES | LIBRARIES

MAX_ITEMS = 10_000
"""Entries of the largest container that is traversed; larger ones are data, of which only the entries are restored."""

_LARGE_ARRAY = 2**24
"""Size in bytes from which an array counts as data and is not copied."""

_ATOMIC_TYPES = {
    type(None), bool, int, float, complex, str, bytes, range, slice, torch.dtype, torch.device, torch.Size,
}  # fmt: skip

_BUILT_IN_CONTAINERS = {dict, list, set, deque, bytearray, OrderedDict}

HOOKS = [name for name, value in vars(nn.Module()).items() if "_hooks" in name and isinstance(value, dict)]
"""Names of a module's hook registries."""


class Part(Protocol):
    """The saved content of one mutable object."""

    def restore(self) -> bool:
        """Restore the content of the object; return whether it had changed."""


class Snapshot:
    """The state of some objects and of everything reachable from them, to be restored later.

    Reachable are the attributes of modules, configs and objects of user-defined classes, containers of any depth,
    closures and defaults of functions, tensors, arrays and random generators. Objects keep their identity: their old
    content is written into them, so that every reference to them sees it. Aliases and cycles are fine.

    Objects of the types in `SKIPPED_TYPES` and of the packages in `SKIPPED_PACKAGES` are not traversed, and objects
    that can't be copied stay as they are (open files, locks, iterators).

    Args:
        roots: The objects, by name; the names begin the paths in messages.
        copied: Tensors to copy whatever their size. Others are copied if they are small, or before a write under
            `watched_writes`; for large ones a digest is stored.
        ignored: Tensors and other objects that may change.
        digests: Whether to read large tensors, so that unwatched writes to them are detected.
        registries: Whether to restore replaced submodules, parameters and hooks as well.

    Example:
        >>> class Model(nn.Module):
        ...     seen = None
        >>> model = Model()
        >>> model.seen, model.scale = [1], torch.ones(1)
        >>> before = Snapshot({"model": model})
        >>> model.seen.append(2); model.scale.mul_(3)
        tensor([3.])
        >>> before.restore()
        []
        >>> model.seen, model.scale
        ([1], tensor([1.]))
    """

    def __init__(
        self,
        roots: dict[str, object],
        *,
        copied: Iterable[Tensor] = (),
        ignored: Iterable[object] = (),
        registries: bool = True,
        digests: bool = True,
    ):
        self._registries = registries
        self._parts: list[Part] = []
        ignored = list(ignored)
        self._seen: dict[int, object] = {id(value): value for value in ignored}  # so ids are not reused
        self._queue: list[tuple[object, str]] = []
        aliased = (value for value in ignored if isinstance(value, Tensor))
        with _plain_torch():
            self.tensors = TensorValues(copied, digests=digests, ignored=aliased)
            for name, root in roots.items():
                self._visit(root, name, root=True)
                while self._queue:
                    self._visit(*self._queue.pop())
            self.tensors.group()

    def restore(self, *, thorough: bool = True) -> list[str]:
        """Restore everything.

        Args:
            thorough: Whether to read large tensors too, to detect unwatched writes.

        Returns:
            The paths of tensors with such writes: their values are lost.

        Raises:
            Exception: The first error of an object whose content could not be restored; all others have been.
        """
        errors: list[Exception] = []
        with _plain_torch():
            for part in self._parts:
                try:
                    part.restore()
                except Exception as error:
                    errors.append(error)
            lost = self.tensors.restore(thorough=thorough)
        if errors:
            raise errors[0]
        return lost

    def _visit(self, value: Any, path: str, root: bool = False) -> None:
        if type(value) in _ATOMIC_TYPES or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self.tensors.add(value, path)
        elif isinstance(value, (dict, list, deque, set, bytearray)):
            self._add_container(value, path)
        elif isinstance(value, (tuple, frozenset)):
            self._enqueue((item, f"{path}[{index}]") for index, item in enumerate(value))
        elif isinstance(value, torch.jit.ScriptModule):  # its attributes are stored elsewhere
            self._enqueue((tensor, f"{path}.{name}") for name, tensor in value.state_dict(keep_vars=True).items())
        elif isinstance(value, nn.Module):
            self._add_module(value, path)
        elif (state := _state_of(value)) is not None:
            self._parts.append(state)
        elif isinstance(value, (FunctionType, MethodType, partial, CellType)):
            self._add_function(value, path)
        elif root or _is_traversed(value):
            self._add_attributes(value, path)

    def _enqueue(self, values: Iterable[tuple[object, str]]) -> None:
        self._queue.extend(pair for pair in values if type(pair[0]) not in _ATOMIC_TYPES)

    def _add_container(self, value: Any, path: str) -> None:
        self._parts.append(_Mapping(value) if isinstance(value, dict) else _Collection(value))
        if not isinstance(value, bytearray) and len(value) <= MAX_ITEMS:
            items = value.items() if isinstance(value, dict) else enumerate(value)
            self._enqueue((item, f"{path}[{key!r}]") for key, item in items if type(item) not in _ATOMIC_TYPES)
        if type(value) not in _BUILT_IN_CONTAINERS:
            self._add_attributes(value, path)

    def _add_module(self, module: nn.Module, path: str) -> None:
        attributes = vars(module)
        names = [name for name in attributes if name not in HOOKS and name not in ("_parameters", "_modules")]
        self._parts.append(_Mapping(attributes))
        self._add_classes(module, path)
        self._enqueue((attributes[name], f"{path}.{name}") for name in names if name != "_buffers")
        for name in ("_parameters", "_buffers", "_modules"):
            members = attributes[name]
            self._enqueue((member, f"{path}.{key}") for key, member in members.items())
            if name == "_buffers" or self._registries:
                self._parts.append(_Members(members))
        hooks = [attributes[name] for name in HOOKS]
        self._enqueue((hook, f"{path}.hooks") for registry in hooks for hook in registry.values())
        if self._registries:
            self._parts.append(_Hooks(hooks))

    def _add_attributes(self, value: Any, path: str) -> None:
        self._add_classes(value, path)
        for name, slot in _slots(type(value)):
            if (content := _slot_content(slot, value)) is not None:
                self._parts.append(_Slot(slot, value, content))
                self._enqueue([(content, f"{path}.{name}")])
        try:
            attributes = vars(value)
        except TypeError:  # it has none
            return
        self._seen[id(attributes)] = attributes
        self._parts.append(_Mapping(attributes))
        self._enqueue((item, f"{path}.{name}") for name, item in attributes.items())

    def _add_classes(self, value: Any, path: str) -> None:
        if id(type(value)) in self._seen:
            return
        for kind in type(value).__mro__:
            seen = id(kind) in self._seen
            self._seen[id(kind)] = kind
            if not seen and _package(kind) not in _WITHOUT_STATE:
                attributes = _ClassAttributes(kind)
                self._parts.append(attributes)
                self._enqueue((content, f"{path}.{name}") for name, content in attributes.before.items())

    def _add_function(self, value: Any, path: str) -> None:
        if isinstance(value, MethodType):
            self._enqueue([(value.__self__, path), (value.__func__, path)])
        elif isinstance(value, partial):
            self._enqueue([(value.func, path), (value.args, path), (value.keywords, path)])
        elif isinstance(value, CellType):
            try:
                content = value.cell_contents
            except ValueError:  # not assigned yet
                return
            self._parts.append(_Cell(value, content))
            self._enqueue([(content, path)])
        elif _package(value) not in _WITHOUT_STATE:
            self._enqueue((cell, path) for cell in value.__closure__ or ())
            self._enqueue((default, path) for default in value.__defaults__ or ())
            self._enqueue([(value.__kwdefaults__, path)])
            if vars(value):
                self._add_attributes(value, path)


@contextmanager
def _plain_torch() -> Iterator[None]:
    """Run torch operations plainly, also if a pass is inside a transform of `torch.func`."""
    with torch._C.DisableTorchFunction(), temporarily_clear_interpreter_stack():
        yield


def _package(value: Any) -> str:
    return str(value.__module__).partition(".")[0]


def _is_traversed(value: object) -> bool:
    kind = type(value)
    if isinstance(value, SKIPPED_TYPES) or is_trainer(value):
        return False
    allowed = isinstance(value, (SimpleNamespace, UserDict, UserList)) or kind.__module__.startswith("torch.optim.")
    return allowed or _package(kind) not in SKIPPED_PACKAGES


def is_trainer(value: object) -> bool:
    """Return whether an object is a Transformers Trainer, without its expensive import."""
    return any((base.__module__, base.__name__) == ("transformers.trainer", "Trainer") for base in type(value).__mro__)


def _is_descriptor(value: object) -> bool:
    """Return whether an attribute is a descriptor, such as a method or a property."""
    return any("__get__" in vars(base) for base in type(value).__mro__)


def _slots(kind: type) -> Iterator[tuple[str, Any]]:
    for base in kind.__mro__:
        names = vars(base).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if name in vars(base) and not name.startswith("__") and _package(base) not in SKIPPED_PACKAGES:
                yield name, vars(base)[name]


def _slot_content(slot: Any, value: object) -> Any:
    try:
        return slot.__get__(value)
    except AttributeError:  # not assigned yet
        return None


def _state_of(value: Any) -> _State | _Array | None:
    """Return the saved content of a generator or an array; `None` for other objects."""
    if isinstance(value, Generator):
        return _State(value.get_state().clone(), value.set_state)
    if isinstance(value, np.random.Generator):
        return _State(value.bit_generator.state, partial(setattr, value.bit_generator, "state"))
    if isinstance(value, np.random.BitGenerator):
        return _State(value.state, partial(setattr, value, "state"))
    if isinstance(value, np.random.RandomState):
        return _State(value.get_state(legacy=False), value.set_state)
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return _State(value.getstate(), value.setstate)
    if isinstance(value, np.ndarray) and value.flags.writeable and value.nbytes < _LARGE_ARRAY:
        return _Array(value)
    if isinstance(value, array) and len(value) * value.itemsize < _LARGE_ARRAY:
        return _State(value[:], partial(value.__setitem__, slice(None)))
    return None


class _Mapping:
    """The entries of a dict, or the attributes of an object."""

    def __init__(self, target: dict[Any, Any]):
        self._target = target
        self._keys, self._values = list(target), list(target.values())

    def restore(self) -> bool:
        target = self._target
        if self._is_same():
            return False
        kind: Any = OrderedDict if isinstance(target, OrderedDict) else dict
        for key in target.keys() - set(self._keys):
            kind.__delitem__(target, key)
        for key, value in zip(self._keys, self._values, strict=True):
            kind.__setitem__(target, key, value)
        if not self._is_same():  # in another order
            kind.clear(target)
            kind.update(target, zip(self._keys, self._values, strict=True))
        return True

    def _is_same(self) -> bool:
        target = self._target
        same = len(target) == len(self._keys) and all(map(is_, target.values(), self._values))
        return same and all(map(is_, target, self._keys))


class _Members(_Mapping):
    """The parameters, buffers or submodules of a module, unless FSDP swaps shards and whole parameters there."""

    def restore(self) -> bool:
        if any(isinstance(value, DTensor) for value in (*self._target.values(), *self._values)):
            return False
        return super().restore()


class _Hooks:
    """The hook registries of a module, most of them empty."""

    def __init__(self, registries: list[dict[int, Any]]):
        self._registries = registries
        self._filled = {index: _Mapping(registry) for index, registry in enumerate(registries) if registry}

    def restore(self) -> bool:
        changed = [self._filled[index].restore() for index in self._filled]
        added = [hooks for index, hooks in enumerate(self._registries) if hooks and index not in self._filled]
        for hooks in added:
            hooks.clear()
        return any(changed) or bool(added)


class _Collection:
    """The items of a list, a deque, a set or a bytearray."""

    def __init__(self, target: Any):
        self._target = target
        self._items = list(target)

    def restore(self) -> bool:
        target, items = self._target, self._items
        if isinstance(target, MutableSet):
            same = len(target) == len(items) and all(item in target for item in items)
        else:
            same = len(target) == len(items) and all(map(is_, target, items))
        if not same:
            kind: Any = next(base for base in (list, deque, set, bytearray) if isinstance(target, base))
            kind.clear(target)
            (kind.update if kind is set else kind.extend)(target, items)
        return not same


class _Cell:
    """A variable of a closure."""

    def __init__(self, cell: CellType, content: object):
        self._cell = cell
        self._content = content

    def restore(self) -> bool:
        changed = self._cell.cell_contents is not self._content
        if changed:
            self._cell.cell_contents = self._content
        return changed


class _Slot:
    """An attribute of an object without `__dict__`."""

    def __init__(self, slot: Any, owner: object, content: object):
        self._slot = slot
        self._owner = owner
        self._content = content

    def restore(self) -> bool:
        changed = _slot_content(self._slot, self._owner) is not self._content
        if changed:
            self._slot.__set__(self._owner, self._content)
        return changed


class _ClassAttributes:
    """The attributes of a class, without methods, properties and other descriptors."""

    def __init__(self, kind: type):
        self._kind = kind
        self.before = self._current()

    def restore(self) -> bool:
        now = self._current()
        for name in now.keys() - self.before.keys():
            delattr(self._kind, name)
        changed = [name for name, content in self.before.items() if now.get(name, self) is not content]
        for name in changed:
            setattr(self._kind, name, self.before[name])
        return bool(changed)

    def _current(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in vars(self._kind).items()
            if not (name.startswith(("__", "_abc_")) or _is_descriptor(value))
        }


class _State:
    """The state of a random generator."""

    def __init__(self, state: Any, restore: Callable[[Any], object]):
        self._state = state
        self._restore = restore

    def restore(self) -> bool:
        self._restore(self._state)
        return False


class _Array:
    """A NumPy array."""

    def __init__(self, array: np.ndarray):
        self._array = array
        self._copy = array.copy()

    def restore(self) -> bool:
        np.copyto(self._array, self._copy)
        return True
