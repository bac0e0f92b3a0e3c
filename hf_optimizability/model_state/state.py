# SPDX-License-Identifier: Apache-2.0
"""The state of a model that measured passes may change: saved, wound back before each pass, and restored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from transformers.utils import logging

from ..errors import MeasurementError
from .snapshot import HOOKS, Snapshot, is_trainer
from .snapshot_tensors import watched_writes


logger = logging.get_logger(__name__)

_TRAINING_PACKAGES = ("accelerate", "hf_optimizability", "torch", "transformers")
"""Packages whose hooks on modules belong to the training itself and are not reported."""

_SKIPPED_ATTRIBUTES = ("train_dataset", "eval_dataset", "optimizer", "lr_scheduler")
"""Attributes of a Trainer that its loss does not write to."""

_WATCHED_PASSES = 16
"""Passes in which new hooks and writes to large frozen tensors are detected: a model makes them in each or in none."""

_borrowed: list[ModelState] = []
"""The states that are borrowed now, the innermost last; `settle` is called where only the model is known."""


class ModelState:
    """Everything that a measured pass may change in a model, and in other objects that its loss uses.

    Buffers, parameters, attributes of modules and configs in any container, random generators: see `Snapshot`.

    Args:
        model: The model.
        others: Objects that the loss may write to as well, such as the Trainer of a `compute_loss`. Their models,
            containers and counters are restored; optimizer, data sets, loaders, callbacks and tokenizer are left alone
            (`snapshot.SKIPPED_TYPES`). A borrowed Trainer logs nothing.

    Attributes:
        hooks_set_aside: Names of the parameters whose gradient hooks are removed while the model is borrowed.
        module_hooks: Names of the modules with hooks of the user's own, which run.
        normalizing: Normalization layers that are in training mode while the model is trained.

    Example:
        >>> model = nn.BatchNorm1d(2)
        >>> with ModelState(model).borrow():
        ...     _ = model.running_mean.add_(1)
        ...     model.training
        False
        >>> model.running_mean, model.training
        (tensor([0., 0.]), True)
    """

    def __init__(self, model: nn.Module, *, others: Sequence[object] = ()):
        self.hooks_set_aside: tuple[str, ...] = ()
        self.module_hooks: tuple[str, ...] = ()
        self.normalizing: tuple[nn.Module, ...] = ()
        self._model = model
        self._others = tuple(others)
        self._entry: Snapshot | None = None
        self._before_pass: Snapshot | None = None
        self._passes = 0
        self._new_hooks: list[tuple[dict[int, Any], list[int]]] = []
        self._adds_hooks = False

    @contextmanager
    def borrow(self) -> Iterator[None]:
        """Switch the model to eval mode without gradients and gradient hooks, and restore everything at exit.

        Raises:
            MeasurementError: At exit, if large frozen tensors were written to undetected, so that values are lost.
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
                    stack.enter_context(_muted(other))
                self.module_hooks = tuple(_module_hooks(self._model))
                for parameter, _ in gradients:
                    parameter.grad = None
                _borrowed.append(self)
                stack.callback(_borrowed.remove, self)
                with self._watched_writes():
                    self.normalizing = _to_eval(self._model)
                yield
            failing = False
        finally:
            entry = self._entry
            self._entry, self._before_pass = outer
            for parameter, gradient in gradients:
                if parameter.grad is not gradient:
                    parameter.grad = gradient
            for module, mode in modes:
                if module.training != mode:  # TorchScript, too, stores its attributes elsewhere
                    module.training = mode
            if lost := entry.restore():
                self._report_lost(lost, failing=failing)

    @property
    def is_borrowed(self) -> bool:
        """Whether the model is borrowed now, through this or another `ModelState`."""
        return bool(self._active_states())

    def rewind(self) -> None:
        """Undo what passes have changed since the model was borrowed; to be called before each pass.

        Trainable weights stay as they are: measurements displace them on purpose. Outside `borrow` this does nothing.
        """
        for registry, keys in self._new_hooks:
            for key in keys:
                registry.pop(key, None)
        self._new_hooks = []
        for state in self._active_states()[-1:]:
            state._rewind()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch a forward pass, so that `rewind` can undo its effects.

        Large frozen tensors are copied before the model writes to them: every operation is intercepted, which takes
        time, so in the first passes only. Hooks that the pass adds to modules are recorded, since the mark by which a
        model knows that it has them is restored as well (Transformers' hooks that capture hidden states and router
        logits).
        """
        self._passes += 1
        early = self._passes <= _WATCHED_PASSES
        recorded = early or self._adds_hooks
        before = [(registry, list(registry)) for registry in self._hook_registries()] if recorded else []
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
        snapshots = [snapshot for state in self._active_states() for snapshot in (state._entry, state._before_pass)]
        return watched_writes(snapshot.tensors for snapshot in snapshots if snapshot is not None)

    def _active_states(self) -> list[ModelState]:
        """Return the borrowed states of this model, the innermost last."""
        return [state for state in _borrowed if state._model is self._model]

    def _rewind(self) -> None:
        if self._before_pass is None:
            self._before_pass = self._snapshot(registries=False)
        elif lost := self._before_pass.restore(thorough=False):
            self._report_lost(lost, failing=False)

    def _snapshot(self, *, registries: bool) -> Snapshot:
        trainable = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        roots = {"model": self._model} | {type(other).__name__: other for other in self._others}
        skipped = [
            vars(other).get(name) for other in self._others if is_trainer(other) for name in _SKIPPED_ATTRIBUTES
        ]
        if registries:
            return Snapshot(roots, copied=trainable, ignored=skipped)
        return Snapshot(roots, ignored=[*trainable, *skipped], registries=False, digests=False)

    @contextmanager
    def _without_gradient_hooks(self) -> Iterator[None]:
        """Empty the registries of hooks on parameters, and fill them again at exit; handles refer to them."""
        named = [(name, hooks) for name, p in self._model.named_parameters() for hooks in _gradient_hooks(p)]
        copies = [dict(hooks) for _, hooks in named]
        self.hooks_set_aside = tuple(dict.fromkeys(name for name, _ in named))
        try:
            for _, hooks in named:
                hooks.clear()
            yield
        finally:
            for (_, hooks), copy in zip(named, copies, strict=True):
                added = dict(hooks)
                hooks.clear()
                hooks.update(copy | added)

    def _report_lost(self, lost: list[str], *, failing: bool) -> None:
        error = MeasurementError("tensors_overwritten", tensors=tuple(lost))
        if not failing:
            raise error
        logger.warning(error.reason)


def settle() -> None:
    """Undo what passes have changed in all borrowed models, and let the next passes start from the changes after this.

    To be called before a borrowed model is changed on purpose (other attention, tensors of another dtype), and before
    it is changed back.
    """
    for state in _borrowed:
        if state._before_pass is not None:
            state._rewind()
            state._before_pass = None


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch a model to eval mode, and restore it at exit with everything that passes have changed."""
    with ModelState(model).borrow():
        yield


def _to_eval(model: nn.Module) -> tuple[nn.Module, ...]:
    """Switch a model to eval mode without the side effects that `eval()` has in some models.

    `train()` drops caches of eval mode and unmerges weights (loralib). `eval()` may merge them again, so that the
    gradients of the factors would vanish; so modules are only marked.

    Returns:
        The normalization layers that `train()` put into training mode.
    """
    model.train()
    normalizing = tuple(module for module in model.modules() if isinstance(module, _NormBase) and module.training)

    def mark(module: nn.Module) -> None:
        if "train" in vars(module) or "eval" in vars(module):  # replaced to keep the module in one mode
            module.eval()
            return
        module.training = False
        for child in module.children():
            mark(child)

    mark(model)
    return normalizing


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
        if packages - set(_TRAINING_PACKAGES):
            yield name or type(module).__name__


def _package_of(hook: Any) -> str:
    return str((hook if "__module__" in dir(hook) else type(hook)).__module__).partition(".")[0]


@contextmanager
def _muted(other: object) -> Iterator[None]:
    """Discard what a Trainer logs, without an effect on other Trainers of its class."""
    if not is_trainer(other):
        yield
        return
    loggers = [other, vars(other)["accelerator"]]
    originals = [{name: log for name, log in vars(owner).items() if name == "log"} for owner in loggers]
    try:
        for owner in loggers:
            vars(owner)["log"] = lambda *args, **kwargs: None
        yield
    finally:
        for owner, original in zip(loggers, originals, strict=True):
            vars(owner).pop("log")
            vars(owner).update(original)
