# SPDX-License-Identifier: Apache-2.0
"""A snapshot of the mutable state that can be reached from some objects, and how to put it back in place."""

from __future__ import annotations

import io
import logging
import random
import sys
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


LEFT_ALONE: tuple[type, ...] = (
    type, ModuleType, logging.Logger, io.IOBase,
    Dataset, DataLoader, Sampler, LRScheduler,
    CallbackHandler, TrainerCallback, TrainerControl, PreTrainedTokenizerBase, ProcessorMixin,
)  # fmt: skip
"""Objects that are not looked into (unless they are what a snapshot is taken of): a forward pass has no business with
them, or they are too large, or others write to them meanwhile."""

OTHERS_BUSINESS = {
    "PIL", "accelerate", "aim", "clearml", "comet_ml", "datasets", "deepspeed", "evaluate", "hf_optimizability",
    "huggingface_hub", "mlflow", "neptune", "numpy", "pandas", "pyarrow", "ray", "swanlab", "tensorboard",
    "tensorboardX", "tokenizers", "torch", "tqdm", "trackio", "wandb", *sys.stdlib_module_names,
}  # fmt: skip
"""Packages whose objects are left alone likewise: they have threads, locks and connections of their own."""

LIBRARIES = {"peft", "sentence_transformers", "transformers", "trl"}
"""Packages of which objects are looked into, but neither classes nor functions: these hold no state of a training."""

_WITHOUT_STATE = OTHERS_BUSINESS | LIBRARIES

MAX_ITEMS = 10_000
"""Entries of the largest container that is looked into; larger ones are data, and get their entries back only."""

_LARGE_ARRAY = 2**24
"""Bytes from which on an array is data likewise, and not copied."""

_ATOMS = {
    type(None), bool, int, float, complex, str, bytes, range, slice, torch.dtype, torch.device, torch.Size,
}  # fmt: skip

_BUILT_IN = {dict, list, set, deque, bytearray, OrderedDict}

HOOKS = [name for name, held in vars(nn.Module()).items() if "_hooks" in name and isinstance(held, dict)]
"""Names of the registries of hooks in a module."""


class Part(Protocol):
    """One mutable object, as it was."""

    def put_back(self) -> bool:
        """Give the object its old content back; return whether that had changed."""


class Snapshot:
    """What some objects and all that can be reached from them hold, to be put back later.

    Reached are the attributes of modules, configs and objects of user-defined classes, containers of any depth, what
    functions hold in closures and defaults, tensors, arrays and random generators. Objects keep their identity: old
    contents are written into them, so that whoever else holds them sees these too. Aliases and cycles are fine.

    Objects of the types in `LEFT_ALONE` and of the packages in `OTHERS_BUSINESS` are not looked into, and what can't
    be copied stays as it is (open files, locks, iterators).

    Args:
        roots: The objects, by name; the names begin the paths in messages.
        whole: Tensors to copy whatever their size. Others are copied if they are small, or when they are about to be
            written to under `watched_writes`; of large ones a digest is kept.
        ignored: Tensors and other objects that may change.
        digests: Whether large tensors are read, so that unwatched changes of them can be seen.
        registries: Whether submodules, parameters and hooks that are put in the place of others are put back as well.

    Example:
        >>> class Model(nn.Module):
        ...     seen = None
        >>> model = Model()
        >>> model.seen, model.scale = [1], torch.ones(1)
        >>> before = Snapshot({"model": model})
        >>> model.seen.append(2); model.scale.mul_(3)
        tensor([3.])
        >>> before.put_back()
        []
        >>> model.seen, model.scale
        ([1], tensor([1.]))
    """

    def __init__(
        self,
        roots: dict[str, object],
        *,
        whole: Iterable[Tensor] = (),
        ignored: Iterable[object] = (),
        registries: bool = True,
        digests: bool = True,
    ):
        self._registries = registries
        self._parts: list[Part] = []
        ignored = list(ignored)
        self._seen: dict[int, object] = {id(value): value for value in ignored}  # which keeps their ids from reuse
        self._waiting: list[tuple[object, str]] = []
        aliased = (value for value in ignored if isinstance(value, Tensor))
        with _plain_torch():
            self.tensors = TensorValues(whole, digests=digests, ignored=aliased)
            for name, root in roots.items():
                self._look_into(root, name, root=True)
                while self._waiting:
                    self._look_into(*self._waiting.pop())
            self.tensors.group()

    def put_back(self, *, thorough: bool = True) -> list[str]:
        """Put everything back.

        Args:
            thorough: Whether large tensors are read as well, to see if they were changed unwatched.

        Returns:
            The paths of those: their values are lost.

        Raises:
            Exception: What an object raised that refuses its old content; all others have theirs by then.
        """
        errors: list[Exception] = []
        with _plain_torch():
            for part in self._parts:
                try:
                    part.put_back()
                except Exception as error:
                    errors.append(error)
            lost = self.tensors.put_back(thorough=thorough)
        if errors:
            raise errors[0]
        return lost

    def _look_into(self, value: Any, where: str, root: bool = False) -> None:
        if type(value) in _ATOMS or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self.tensors.add(value, where)
        elif isinstance(value, (dict, list, deque, set, bytearray)):
            self._add_container(value, where)
        elif isinstance(value, (tuple, frozenset)):
            self._wait((item, f"{where}[{index}]") for index, item in enumerate(value))
        elif isinstance(value, torch.jit.ScriptModule):  # whose attributes lie elsewhere
            self._wait((tensor, f"{where}.{name}") for name, tensor in value.state_dict(keep_vars=True).items())
        elif isinstance(value, nn.Module):
            self._add_module(value, where)
        elif (state := _state_of(value)) is not None:
            self._parts.append(state)
        elif isinstance(value, (FunctionType, MethodType, partial, CellType)):
            self._add_function(value, where)
        elif root or _has_own_state(value):
            self._add_attributes(value, where)

    def _wait(self, values: Iterable[tuple[object, str]]) -> None:
        self._waiting.extend(pair for pair in values if type(pair[0]) not in _ATOMS)

    def _add_container(self, value: Any, where: str) -> None:
        self._parts.append(_Mapping(value) if isinstance(value, dict) else _Collection(value))
        if not isinstance(value, bytearray) and len(value) <= MAX_ITEMS:
            items = value.items() if isinstance(value, dict) else enumerate(value)
            self._wait((item, f"{where}[{key!r}]") for key, item in items if type(item) not in _ATOMS)
        if type(value) not in _BUILT_IN:
            self._add_attributes(value, where)

    def _add_module(self, module: nn.Module, where: str) -> None:
        held = vars(module)
        own = [name for name in held if name not in HOOKS and name not in ("_parameters", "_modules")]
        self._parts.append(_Mapping(held))
        self._add_classes(module, where)
        self._wait((held[name], f"{where}.{name}") for name in own if name != "_buffers")
        for name in ("_parameters", "_buffers", "_modules"):
            members = held[name]
            self._wait((member, f"{where}.{key}") for key, member in members.items())
            if name == "_buffers" or self._registries:
                self._parts.append(_Members(members))
        hooks = [held[name] for name in HOOKS]
        self._wait((hook, f"{where}.hooks") for registry in hooks for hook in registry.values())
        if self._registries:
            self._parts.append(_Hooks(hooks))

    def _add_attributes(self, value: Any, where: str) -> None:
        self._add_classes(value, where)
        for name, slot in _slots(type(value)):
            if (content := _slot_content(slot, value)) is not None:
                self._parts.append(_Slot(slot, value, content))
                self._wait([(content, f"{where}.{name}")])
        try:
            held = vars(value)
        except TypeError:  # it has none
            return
        self._seen[id(held)] = held
        self._parts.append(_Mapping(held))
        self._wait((item, f"{where}.{name}") for name, item in held.items())

    def _add_classes(self, value: Any, where: str) -> None:
        if id(type(value)) in self._seen:
            return
        for kind in type(value).__mro__:
            known = id(kind) in self._seen
            self._seen[id(kind)] = kind
            if not known and _package(kind) not in _WITHOUT_STATE:
                attributes = _ClassAttributes(kind)
                self._parts.append(attributes)
                self._wait((content, f"{where}.{name}") for name, content in attributes.held.items())

    def _add_function(self, value: Any, where: str) -> None:
        if isinstance(value, MethodType):
            self._wait([(value.__self__, where), (value.__func__, where)])
        elif isinstance(value, partial):
            self._wait([(value.func, where), (value.args, where), (value.keywords, where)])
        elif isinstance(value, CellType):
            try:
                content = value.cell_contents
            except ValueError:  # not assigned yet
                return
            self._parts.append(_Cell(value, content))
            self._wait([(content, where)])
        elif _package(value) not in _WITHOUT_STATE:
            self._wait((cell, where) for cell in value.__closure__ or ())
            self._wait((default, where) for default in value.__defaults__ or ())
            self._wait([(value.__kwdefaults__, where)])
            if vars(value):
                self._add_attributes(value, where)


@contextmanager
def _plain_torch() -> Iterator[None]:
    """Let operations of torch be what they are, also where a pass is made inside a transform of `torch.func`."""
    with torch._C.DisableTorchFunction(), temporarily_clear_interpreter_stack():
        yield


def _package(value: Any) -> str:
    return str(value.__module__).partition(".")[0]


def _has_own_state(value: object) -> bool:
    kind = type(value)
    if isinstance(value, LEFT_ALONE) or is_trainer(value):
        return False
    known = isinstance(value, (SimpleNamespace, UserDict, UserList)) or kind.__module__.startswith("torch.optim.")
    return known or _package(kind) not in OTHERS_BUSINESS


def is_trainer(value: object) -> bool:
    """Return whether an object is a Transformers Trainer, whose import loads data sets and more."""
    return any((base.__module__, base.__name__) == ("transformers.trainer", "Trainer") for base in type(value).__mro__)


def _is_descriptor(value: object) -> bool:
    """Whether it makes something else of an access by its name, as methods and properties do."""
    return any("__get__" in vars(base) for base in type(value).__mro__)


def _slots(kind: type) -> Iterator[tuple[str, Any]]:
    for base in kind.__mro__:
        names = vars(base).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if name in vars(base) and not name.startswith("__") and _package(base) not in OTHERS_BUSINESS:
                yield name, vars(base)[name]


def _slot_content(slot: Any, value: object) -> Any:
    try:
        return slot.__get__(value)
    except AttributeError:  # not assigned yet
        return None


def _state_of(value: Any) -> _State | _Array | None:
    """How to keep what a generator or an array holds; `None` for other objects."""
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
    return None


class _Mapping:
    """A dict, or the attributes of an object."""

    def __init__(self, held: dict[Any, Any]):
        self._held = held
        self._keys, self._values = list(held), list(held.values())

    def put_back(self) -> bool:
        held = self._held
        if self._is_same():
            return False
        kind: Any = OrderedDict if isinstance(held, OrderedDict) else dict
        for key in held.keys() - set(self._keys):
            kind.__delitem__(held, key)
        for key, value in zip(self._keys, self._values, strict=True):
            kind.__setitem__(held, key, value)
        if not self._is_same():  # in another order
            kind.clear(held)
            kind.update(held, zip(self._keys, self._values, strict=True))
        return True

    def _is_same(self) -> bool:
        held = self._held
        same = len(held) == len(self._keys) and all(map(is_, held.values(), self._values))
        return same and all(map(is_, held, self._keys))


class _Members(_Mapping):
    """The parameters, buffers or submodules of a module; where FSDP swaps shards and whole parameters, it may."""

    def put_back(self) -> bool:
        if any(isinstance(value, DTensor) for value in (*self._held.values(), *self._values)):
            return False
        return super().put_back()


class _Hooks:
    """The registries of hooks of a module, most of them empty."""

    def __init__(self, registries: list[dict[int, Any]]):
        self._registries = registries
        self._filled = {index: _Mapping(registry) for index, registry in enumerate(registries) if registry}

    def put_back(self) -> bool:
        changed = [self._filled[index].put_back() for index in self._filled]
        added = [held for index, held in enumerate(self._registries) if held and index not in self._filled]
        for held in added:
            held.clear()
        return any(changed) or bool(added)


class _Collection:
    """A list, a deque, a set or a bytearray."""

    def __init__(self, held: Any):
        self._held = held
        self._items = list(held)

    def put_back(self) -> bool:
        held, items = self._held, self._items
        if isinstance(held, MutableSet):
            same = len(held) == len(items) and all(item in held for item in items)
        else:
            same = len(held) == len(items) and all(map(is_, held, items))
        if not same:
            kind: Any = next(base for base in (list, deque, set, bytearray) if isinstance(held, base))
            kind.clear(held)
            (kind.update if kind is set else kind.extend)(held, items)
        return not same


class _Cell:
    """A variable of a closure."""

    def __init__(self, cell: CellType, content: object):
        self._cell = cell
        self._content = content

    def put_back(self) -> bool:
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

    def put_back(self) -> bool:
        changed = _slot_content(self._slot, self._owner) is not self._content
        if changed:
            self._slot.__set__(self._owner, self._content)
        return changed


class _ClassAttributes:
    """What a class holds but for methods, properties and the like."""

    def __init__(self, kind: type):
        self._kind = kind
        self.held = self._now()

    def put_back(self) -> bool:
        now = self._now()
        for name in now.keys() - self.held.keys():
            delattr(self._kind, name)
        changed = [name for name, content in self.held.items() if now.get(name, self) is not content]
        for name in changed:
            setattr(self._kind, name, self.held[name])
        return bool(changed)

    def _now(self) -> dict[str, Any]:
        found = vars(self._kind).items()
        return {name: held for name, held in found if not (name.startswith(("__", "_abc_")) or _is_descriptor(held))}


class _State:
    """The state of a random generator."""

    def __init__(self, state: Any, restore: Callable[[Any], object]):
        self._state = state
        self._restore = restore

    def put_back(self) -> bool:
        self._restore(self._state)
        return False


class _Array:
    """A NumPy array."""

    def __init__(self, array: np.ndarray):
        self._array = array
        self._copy = array.copy()

    def put_back(self) -> bool:
        np.copyto(self._array, self._copy)
        return True
