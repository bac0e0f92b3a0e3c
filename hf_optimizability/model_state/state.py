# SPDX-License-Identifier: Apache-2.0
"""The state of a model that measured passes may change: held, and given back as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from transformers.utils import logging

from ..errors import MeasurementError
from .snapshot import HOOKS, Snapshot, is_trainer
from .snapshot_tensors import watched_writes


logger = logging.get_logger(__name__)

_OWN_HOOKS = ("accelerate", "hf_optimizability", "torch", "transformers")
"""Packages whose hooks on modules belong to the machinery of training, and are not named."""

_ALONE = ("train_dataset", "eval_dataset", "optimizer", "lr_scheduler")
"""Attributes of a Trainer that its loss has no business with."""

_WATCHED = 16
"""Passes in which new hooks and writes to large frozen tensors are looked for: who makes them does so in each pass."""

_held: list[ModelState] = []


class ModelState:
    """All that a measured pass may change of a model, and of other objects that its loss works with.

    Buffers, parameters, attributes of modules and configs in whatever container, random generators: see `Snapshot`.

    Args:
        model: The model.
        others: Objects that the loss may write to as well, such as the Trainer of a `compute_loss`. Their models,
            containers and counters come back; optimizer, data sets, loaders, callbacks and tokenizer are left alone
            (`snapshot.LEFT_ALONE`). What a Trainer logs while it is held goes nowhere.

    Attributes:
        set_aside: Names of the parameters whose gradient hooks are set aside while the model is held.
        module_hooks: Names of the modules with hooks of the user's own, which run.

    Example:
        >>> model = nn.BatchNorm1d(2)
        >>> with ModelState(model).held():
        ...     _ = model.running_mean.add_(1)
        ...     model.training
        False
        >>> model.running_mean, model.training
        (tensor([0., 0.]), True)
    """

    def __init__(self, model: nn.Module, *, others: Sequence[object] = ()):
        self.set_aside: tuple[str, ...] = ()
        self.module_hooks: tuple[str, ...] = ()
        self._model = model
        self._others = tuple(others)
        self._entry: Snapshot | None = None
        self._before_pass: Snapshot | None = None
        self._passes = 0
        self._new_hooks: list[tuple[dict[int, Any], list[int]]] = []
        self._adds_hooks = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the model in eval mode, without gradients and gradient hooks; everything comes back at the end.

        Raises:
            MeasurementError: At the end, if values of large frozen tensors were changed in a way that could not be
                seen coming, so that they are lost.
        """
        outer = self._entry, self._before_pass
        self._entry, self._before_pass, self._passes = self._snapshot(registries=True), None, 0
        modes = [(module, module.training) for module in self._model.modules()]
        gradients = [(parameter, parameter.grad) for parameter in self._model.parameters()]
        failing = True
        try:
            with ExitStack() as stack:
                stack.enter_context(self._without_gradient_hooks())
                for other in self._others:
                    stack.enter_context(_silent(other))
                self.module_hooks = tuple(_module_hooks(self._model))
                for parameter, _ in gradients:
                    parameter.grad = None
                _held.append(self)
                stack.callback(_held.remove, self)
                with self._watched_writes():
                    _to_eval(self._model)
                yield
            failing = False
        finally:
            entry = self._entry
            self._entry, self._before_pass = outer
            for parameter, gradient in gradients:
                if parameter.grad is not gradient:
                    parameter.grad = gradient
            for module, mode in modes:
                if module.training != mode:  # of TorchScript too, which keeps its attributes elsewhere
                    module.training = mode
            if lost := entry.put_back():
                self._tell_lost(lost, failing=failing)

    @property
    def is_held(self) -> bool:
        """Whether the model's state is held now, whoever holds it."""
        return bool(self._all_held())

    def rewind(self) -> None:
        """Undo what passes have changed since the model is held; to be called before each pass.

        Trainable weights stay as they are: measurements move them on purpose. Outside of `held` nothing is done.
        """
        for registry, keys in self._new_hooks:
            for key in keys:
                registry.pop(key, None)
        self._new_hooks = []
        for state in self._all_held()[-1:]:
            state._rewind()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Hold around a forward pass, so that the next one can begin as this one did.

        Large frozen tensors are copied before the model writes to them: every operation is looked at, which takes
        time, so in the first passes only. Hooks that the pass adds to modules are noted: the mark by which a model
        knows that it has them is put back as well (Transformers' hooks that capture hidden states and router logits).
        """
        self._passes += 1
        early = self._passes <= _WATCHED
        looked_at = early or self._adds_hooks
        before = [(registry, list(registry)) for registry in self._hook_registries()] if looked_at else []
        try:
            with self._watched_writes() if early else nullcontext():
                yield
        finally:
            changed = [(registry, set(keys)) for registry, keys in before if len(registry) != len(keys)]
            self._new_hooks = [(registry, [key for key in registry if key not in keys]) for registry, keys in changed]
            self._adds_hooks |= bool(self._new_hooks)

    def _hook_registries(self) -> Iterator[dict[int, Any]]:
        for module in self._model.modules():
            attributes = vars(module)
            yield from (attributes[name] for name in HOOKS if name in attributes)

    def _watched_writes(self) -> AbstractContextManager[None]:
        snapshots = [snapshot for state in self._all_held() for snapshot in (state._entry, state._before_pass)]
        return watched_writes(snapshot.tensors for snapshot in snapshots if snapshot is not None)

    def _all_held(self) -> list[ModelState]:
        """Return the states held of this model, whoever holds them, the innermost last."""
        return [state for state in _held if state._model is self._model]

    def _rewind(self) -> None:
        if self._before_pass is None:
            self._before_pass = self._snapshot(registries=False)
        elif lost := self._before_pass.put_back(thorough=False):
            self._tell_lost(lost, failing=False)

    def _snapshot(self, *, registries: bool) -> Snapshot:
        trainable = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        roots = {"model": self._model} | {type(other).__name__: other for other in self._others}
        alone = [vars(other).get(name) for other in self._others if is_trainer(other) for name in _ALONE]
        if registries:
            return Snapshot(roots, whole=trainable, ignored=alone)
        return Snapshot(roots, ignored=[*trainable, *alone], registries=False, digests=False)

    @contextmanager
    def _without_gradient_hooks(self) -> Iterator[None]:
        """Empty the registries of hooks on parameters; they stay in place, as those who hold handles know them."""
        named = [(name, hooks) for name, p in self._model.named_parameters() for hooks in _gradient_hooks(p)]
        copies = [dict(hooks) for _, hooks in named]
        self.set_aside = tuple(dict.fromkeys(name for name, _ in named))
        try:
            for _, hooks in named:
                hooks.clear()
            yield
        finally:
            for (_, hooks), copy in zip(named, copies, strict=True):
                added = dict(hooks)
                hooks.clear()
                hooks.update(copy | added)

    def _tell_lost(self, lost: list[str], *, failing: bool) -> None:
        reason = (
            f"Passes of the model have written to {', '.join(lost[:5])}, which are too large to copy, by a way that "
            "can't be watched (not by operations of torch in a forward pass). Their values can't be put back."
        )
        if failing:
            logger.warning(reason)
        else:
            raise MeasurementError(reason, "Write to them by torch operations, or only in training mode.")


def settle() -> None:
    """Undo what passes have changed of all held models, and let the next ones start from what is changed after this.

    To be called before a held model is changed on purpose (other attention, tensors of another dtype), and before it
    is changed back.
    """
    for state in _held:
        if state._before_pass is not None:
            state._rewind()
            state._before_pass = None


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch a model to eval mode, and give it back as it was, with all that passes have changed."""
    with ModelState(model).held():
        yield


def _to_eval(model: nn.Module) -> None:
    """Switch a model to eval mode without what some do then.

    `train()` drops what was cached in eval mode and takes merged weights apart (loralib). `eval()` may merge them
    again, by which the gradients of the parts would vanish; so modules of such classes are only marked.
    """
    model.train()

    def mark(module: nn.Module) -> None:
        if "train" in vars(module) or "eval" in vars(module):  # someone keeps it in one mode
            module.eval()
            return
        module.training = False
        for child in module.children():
            mark(child)

    mark(model)


def _gradient_hooks(parameter: Tensor) -> list[dict[int, Callable[..., Any]]]:
    registries = (parameter._backward_hooks, parameter._post_accumulate_grad_hooks)
    return [hooks for hooks in registries if hooks]


def _module_hooks(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        registries = (
            module._forward_pre_hooks,
            module._forward_hooks,
            module._backward_pre_hooks,
            module._backward_hooks,
        )
        packages = {_package_of(hook) for hooks in registries for hook in hooks.values()}
        if packages - set(_OWN_HOOKS):
            yield name or type(module).__name__


def _package_of(hook: Any) -> str:
    return str((hook if "__module__" in dir(hook) else type(hook)).__module__).partition(".")[0]


@contextmanager
def _silent(other: object) -> Iterator[None]:
    """Let what a Trainer logs go nowhere; which other Trainers of its class do not notice."""
    if not is_trainer(other):
        yield
        return
    loggers = [other, vars(other)["accelerator"]]
    before = [{name: held for name, held in vars(owner).items() if name == "log"} for owner in loggers]
    try:
        for owner in loggers:
            vars(owner)["log"] = lambda *args, **kwargs: None
        yield
    finally:
        for owner, held in zip(loggers, before, strict=True):
            vars(owner).pop("log")
            vars(owner).update(held)
