# SPDX-License-Identifier: Apache-2.0
"""Models that keep state of every kind and change it in each pass, whatever their mode."""

from __future__ import annotations

import random
from array import array
from collections import Counter, OrderedDict, UserDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver
from transformers import GenerationConfig, PreTrainedConfig


@dataclass
class Tracker:
    calls: float = 0.0
    history: list[float] = field(default_factory=list)


class Slotted:
    __slots__ = ("calls", "unset")

    def __init__(self) -> None:
        self.calls = 0.0


class Attributes(dict):
    """A dict subclass with attributes, as configs and outputs often are."""


class Stateful(nn.Module):
    """Two linear layers; what comes between them depends on a state that each pass changes."""

    def __init__(self, make: Callable[[nn.Module], object], use: Callable[[nn.Module, Tensor], Any]):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        made = make(self)
        if not isinstance(made, (nn.Module, nn.Parameter)):
            self.state = made
        self.use = use

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.first(x))
        logits = self.last(hidden * (1 + self.use(self, hidden)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def _buffer(model: nn.Module, value: Tensor, **options: Any) -> nn.Module:
    model.register_buffer("buffer", value, **options)
    return model


def _counted(add: Callable[[nn.Module], object], read: Callable[[nn.Module], Any]) -> Any:
    def use(model: nn.Module, hidden: Tensor) -> Any:
        add(model)
        return 0.1 * read(model)

    return use


def _add_by_data(model: nn.Module) -> None:
    model.buffer.data.add_(1)


def _add_by_numpy(model: nn.Module) -> None:
    model.buffer.numpy()[:] += 1


def _read(model: nn.Module) -> Tensor:
    return model.buffer.clone()


def _class_counter(model: nn.Module) -> nn.Module:
    class Counting(nn.Identity):
        calls = 0
        seen: ClassVar[list[int]] = []

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            self.seen.append(1)
            return x * 0.1 * (self.calls + len(self.seen))

    return add_submodule(model, "counting", Counting())


def _observer(model: nn.Module) -> nn.Module:
    observer = FakeQuantize(MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
    return add_submodule(model, "quantize", observer)


def _noise(model: nn.Module, hidden: Tensor) -> Tensor:
    return torch.rand(hidden.shape, generator=model.state)


def _add_in_place(model: nn.Module, hidden: Tensor) -> Tensor:
    return 0.1 * model.buffer.add_(1).clone()


def _reassign(model: nn.Module) -> None:
    model.buffer = model.buffer + 1


def _enqueue(model: nn.Module, hidden: Tensor) -> Tensor:
    mean = model.buffer.mean()
    with torch.no_grad():
        start = int(model.pointer)
        model.buffer[(torch.arange(len(hidden)) + start) % 5] = hidden.detach()
        model.pointer[0] = (start + len(hidden)) % 5
    return mean


def _queue(model: nn.Module) -> nn.Module:
    model.register_buffer("pointer", torch.zeros(1, dtype=torch.long))
    return _buffer(model, torch.rand(5, 6))


def _codebook(model: nn.Module, hidden: Tensor) -> Tensor:
    nearest = torch.cdist(hidden, model.buffer).argmin(1)
    quantized = model.buffer[nearest] - hidden
    with torch.no_grad():
        for code in nearest.unique():
            model.buffer[code] = 0.9 * model.buffer[code] + 0.1 * hidden[nearest == code].mean(0)
    return quantized.detach()


def add_submodule(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    model.add_module(name, module)
    return model


def _always_training(model: nn.Module) -> nn.Module:
    norm = nn.BatchNorm1d(6)
    norm.train = lambda mode=True: nn.Module.train(norm, True)  # type: ignore[method-assign]
    return add_submodule(model, "norm", norm)


def _frozen(model: nn.Module) -> nn.Module:
    model.average = nn.Parameter(torch.zeros(6), requires_grad=False)
    return model


def _average_in_place(model: nn.Module, hidden: Tensor) -> Tensor:
    model.average.data.mul_(0.9).add_(0.1 * hidden.detach().mean(0))
    return 0.1 * model.average.clone()


def _average_reassigned(model: nn.Module, hidden: Tensor) -> Tensor:
    model.average.data = model.average.data * 0.9 + 0.1 * hidden.detach().mean(0)
    return 0.1 * model.average.clone()


def _hooked(model: nn.Module, register: str, hook: Callable[[Counter, Any], Any]) -> nn.Module:
    seen: Counter = Counter()
    getattr(model.first, register)(lambda module, _, last: hook(seen, last))
    return model


def _activations(seen: Counter, output: Tensor) -> Tensor:
    seen["calls"] += 1
    return output + 0.1 * seen["calls"]


def _config(kind: type) -> Callable[[nn.Module], Any]:
    return lambda model: kind(calls=0)


def _increment(path: str) -> Any:
    """Counts calls in an attribute of the model's state, and uses the count."""
    return lambda model, hidden: _add(model.state, path)


def _add(owner: Any, name: str) -> Any:
    setattr(owner, name, getattr(owner, name) + 1)
    return 0.1 * getattr(owner, name)


def _count(model: nn.Module, hidden: Tensor, *keys: str) -> float:
    held = model.state
    for key in keys[:-1]:
        held = held[key]
    held[keys[-1]] += 1
    return 0.1 * held[keys[-1]]


def _append(model: nn.Module, hidden: Tensor) -> float:
    model.state.append(float(hidden.detach().mean()))
    return sum(model.state)


def _array(model: nn.Module, hidden: Tensor) -> float:
    model.state += 1
    return 0.1 * float(model.state[0])


def _python_array(model: nn.Module, hidden: Tensor) -> float:
    model.state[0] += 1
    return 0.1 * model.state[0]


def _tracked(model: nn.Module, hidden: Tensor) -> float:
    model.state[0].calls += 1
    model.state[0].history.append(model.state[0].calls)
    return 0.1 * sum(model.state[0].history)


def _set(model: nn.Module, hidden: Tensor) -> float:
    model.state.add(len(model.state))
    return 0.1 * len(model.state)


def unchanged(model: nn.Module, hidden: Tensor) -> float:
    return 0.0


KINDS: dict[str, tuple[Callable[[nn.Module], Any], Callable[[nn.Module, Tensor], Any]]] = {
    "buffer in place": (lambda m: _buffer(m, torch.zeros(())), _add_in_place),
    "buffer reassigned": (lambda m: _buffer(m, torch.zeros(())), _counted(_reassign, _read)),
    "buffer by .data": (lambda m: _buffer(m, torch.zeros(())), _counted(_add_by_data, _read)),
    "buffer through numpy": (lambda m: _buffer(m, torch.zeros(1)), _counted(_add_by_numpy, _read)),
    "buffer not saved": (lambda m: _buffer(m, torch.zeros(()), persistent=False), _add_in_place),
    "queue": (_queue, _enqueue),
    "codebook": (lambda m: _buffer(m, torch.rand(5, 6)), _codebook),
    "observer": (_observer, lambda m, h: m.quantize(h)),
    "batch norm in train mode": (_always_training, lambda m, h: m.norm(h)),
    "frozen parameter by .data": (_frozen, _average_in_place),
    "frozen parameter with other .data": (_frozen, _average_reassigned),
    "tensor attribute": (lambda m: torch.zeros(()), lambda m, h: 0.1 * m.state.add_(1).clone()),
    "tensor in a tuple in a list": (lambda m: [(torch.zeros(()),)], lambda m, h: 0.1 * m.state[0][0].add_(1).clone()),
    "array": (lambda m: np.zeros(2), _array),
    "array of Python": (lambda m: array("d", [0.0, 0.0]), _python_array),
    "number": (lambda m: 0, lambda m, h: _add(m, "state")),
    "list": (lambda m: [], _append),
    "deque": (lambda m: deque([0.5], maxlen=3), _append),
    "set": (lambda m: {0}, _set),
    "dict": (lambda m: {"calls": 0}, lambda m, h: _count(m, h, "calls")),
    "ordered dict": (lambda m: OrderedDict(calls=0), lambda m, h: _count(m, h, "calls")),
    "nested dict": (lambda m: {"a": {"calls": 0}}, lambda m, h: _count(m, h, "a", "calls")),
    "user dict": (lambda m: UserDict(calls=0), lambda m, h: _count(m, h, "calls")),
    "attribute of a dict": (lambda m: vars(d := Attributes()).update(calls=0) or d, _increment("calls")),
    "dataclass in a list": (lambda m: [Tracker()], _tracked),
    "slots": (lambda m: Slotted(), _increment("calls")),
    "namespace": (lambda m: SimpleNamespace(calls=0), _increment("calls")),
    "config": (_config(PreTrainedConfig), _increment("calls")),
    "generation config": (_config(GenerationConfig), _increment("calls")),
    "torch generator": (lambda m: torch.Generator().manual_seed(5), _noise),
    "numpy generator": (lambda m: {"rng": np.random.default_rng(5)}, lambda m, h: m.state["rng"].random()),
    "numpy random state": (lambda m: [np.random.RandomState(5)], lambda m, h: m.state[0].rand()),
    "python generator": (lambda m: SimpleNamespace(rng=random.Random(5)), lambda m, h: m.state.rng.random()),
    "counters of a class": (_class_counter, lambda m, h: m.counting(h)),
    "forward hook": (lambda m: _hooked(m, "register_forward_hook", _activations), unchanged),
}  # fmt: skip


class Merging(nn.Linear):
    """As microsoft/LoRA does: `eval()` adds the product to the frozen weight, `train()` takes it out again."""

    def __init__(self) -> None:
        super().__init__(4, 6)
        self.merged = False
        self.a, self.b = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(6, 2))
        self.weight.requires_grad = False

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if mode and self.merged:
            self.weight.data -= self.b @ self.a
        elif not mode and not self.merged:
            self.weight.data += self.b @ self.a
        self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.merged else super().forward(x) + x @ self.a.T @ self.b.T


def batch(rows: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return {"x": torch.randn(rows, 4, generator=generator), "labels": torch.arange(rows) % 3}


def stateful(kind: str) -> Stateful:
    model = Stateful(*KINDS[kind])
    for _ in range(2):  # so that there is a state to lose
        model(**batch())
    return model


def merging() -> Stateful:
    torch.manual_seed(0)
    layer = Merging()
    return Stateful(lambda model: add_submodule(model, "first", layer), unchanged)
