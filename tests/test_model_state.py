# SPDX-License-Identifier: Apache-2.0
"""State that passes change: it comes back, and each pass starts from the same."""

from __future__ import annotations

import copy
import random
import threading
from collections import Counter, OrderedDict, UserDict, deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import training
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, Trainer

from hf_optimizability import MeasurementError, OptimizabilityConfig, measure, snapshot_tensors
from hf_optimizability.model_state import ModelState, settle
from hf_optimizability.safety import measuring
from hf_optimizability.snapshot import MOST_ITEMS, Snapshot


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


def _observer(model: nn.Module) -> nn.Module:
    observer = FakeQuantize(MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
    return _submodule(model, "quantize", observer)


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


def _submodule(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    model.add_module(name, module)
    return model


def _always_training(model: nn.Module) -> nn.Module:
    norm = nn.BatchNorm1d(6)
    norm.train = lambda mode=True: nn.Module.train(norm, True)  # type: ignore[method-assign]
    return _submodule(model, "norm", norm)


def _frozen(model: nn.Module) -> nn.Module:
    model.average = nn.Parameter(torch.zeros(6), requires_grad=False)
    return model


def _average_in_place(model: nn.Module, hidden: Tensor) -> Tensor:
    model.average.data.mul_(0.9).add_(0.1 * hidden.detach().mean(0))
    return model.average.clone()


def _average_reassigned(model: nn.Module, hidden: Tensor) -> Tensor:
    model.average.data = model.average.data * 0.9 + 0.1 * hidden.detach().mean(0)
    return model.average.clone()


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


def _tracked(model: nn.Module, hidden: Tensor) -> float:
    model.state[0].calls += 1
    model.state[0].history.append(model.state[0].calls)
    return 0.1 * sum(model.state[0].history)


def _set(model: nn.Module, hidden: Tensor) -> float:
    model.state.add(len(model.state))
    return 0.1 * len(model.state)


def none(model: nn.Module, hidden: Tensor) -> float:
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
    "forward hook": (lambda m: _hooked(m, "register_forward_hook", _activations), none),
}  # fmt: skip


def batch(rows: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return {"x": torch.randn(rows, 4, generator=generator), "labels": torch.arange(rows) % 3}


def stateful(kind: str) -> Stateful:
    model = Stateful(*KINDS[kind])
    for _ in range(2):  # so that there is a state to lose
        model(**batch())
    return model


def contents(model: nn.Module) -> list[Any]:
    return [*vars(model).values(), *model.parameters(), *model.buffers()]


def gradient(model: nn.Module, **inputs: Tensor) -> tuple[Tensor, ...]:
    loss = model(**(inputs or batch()))["loss"]
    return loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("fails", [False, True], ids=["", "after an error"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_passes_change_comes_back(kind: str, fails: bool):
    """The next steps of training are those of a twin that was left alone; all objects are the same ones."""
    model, twin = stateful(kind), stateful(kind)
    objects = contents(model)
    state = ModelState(model)
    with pytest.raises(KeyboardInterrupt) if fails else nullcontext(), state.held():
        for rows in (3, 5, 4):
            state.rewind()
            gradient(model, **batch(rows))
        if fails:
            raise KeyboardInterrupt
    assert model.training
    assert all(
        a is b for a, b in zip([*vars(model).values(), *model.parameters(), *model.buffers()], objects, strict=True)
    )
    assert all(same(gradient(model), gradient(twin)) for _ in range(3))


@pytest.mark.parametrize("kind", KINDS)
def test_each_pass_starts_from_the_state_that_was_handed_over(kind: str):
    model = stateful(kind)
    state = ModelState(model)
    first = gradient(copy.deepcopy(model).eval()) if "hook" not in kind else None  # whose closure is not copied
    found = []
    with state.held():
        for _ in range(3):
            state.rewind()
            found.append(gradient(model))
            gradient(model, **batch(5))
    assert same(found[0], found[1]) and same(found[0], found[2])
    assert first is None or same(found[0], first)


def test_annealing_by_calls_has_the_curvature_of_the_next_call():
    """(1 + β) times that of the mean squared error, with β of the first call; β grows with calls that are counted."""

    class Anneal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(6, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            self.calls += 1
            outputs = self.net(x)
            weight = (self.calls / 20).clamp(max=1)
            return {"loss": (outputs - x[:, :4]).square().mean() + weight * outputs.square().mean()}

    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    batches = [{"x": rows} for rows in x.split(8)]
    model = Anneal()
    found = measure(model, batches, OptimizabilityConfig(max_hvps=64))
    inputs = torch.cat([x, torch.ones(32, 1)], 1).double()
    expected = (1 + 1 / 20) * 2 / (32 * 4) * torch.linalg.eigvalsh(inputs.T @ inputs)
    assert found.hessian.lambda_max.value == pytest.approx(float(expected[-1]), rel=1e-4)
    assert float(model.calls) == 0


def test_llama_trains_on_with_the_frequencies_it_had():
    """Dynamic scaling writes others for long batches, and never looks back where it has forgotten that it did."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=13, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=12, max_position_embeddings=8, pad_token_id=0,
            rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
        )
    )  # fmt: skip
    short, long = (torch.arange(2 * length).reshape(2, length) % 10 + 3 for length in (6, 14))
    batches = [{"input_ids": tokens, "labels": tokens} for tokens in (short, long)]
    before = model.model.rotary_emb.inv_freq.clone()
    expected = model(**batches[0]).loss
    losses = [measure(model, order, OptimizabilityConfig(max_hvps=16)).loss for order in (batches, batches[::-1])]
    assert torch.equal(model.model.rotary_emb.inv_freq, before) and torch.equal(model(**batches[0]).loss, expected)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


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


@pytest.mark.parametrize("merged", [False, True], ids=["in train mode", "in eval mode"])
@pytest.mark.parametrize("small", [2**20, 0], ids=["copied", "copied when written"])
def test_layers_that_merge_are_measured_apart_and_left_as_they_were(
    small: int, merged: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(snapshot_tensors, "SMALL", small)
    torch.manual_seed(0)
    layer = Merging()
    model = Stateful(lambda model: _submodule(model, "first", layer), none)
    expected = gradient(copy.deepcopy(model))  # dropout is not there: that of train mode
    model.train(not merged)
    before, modes = layer.weight.clone(), [module.training for module in model.modules()]
    found = measure(model, [batch()], OptimizabilityConfig(max_hvps=16, blocks=["first.[ab]", "last.*"]))
    norms = [float(torch.cat([g.flatten() for g in expected[i:j]]).norm()) for i, j in ((2, 4), (4, 6))]
    assert [block.grad_norm for block in found.blocks.values()][:2] == pytest.approx(norms, rel=2e-5)
    assert torch.equal(layer.weight, before) and layer.merged == merged
    assert [module.training for module in model.modules()] == modes


def test_large_frozen_tensors_are_copied_when_they_are_written_to(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(snapshot_tensors, "SMALL", 0)
    model, twin = stateful("frozen parameter by .data"), stateful("frozen parameter by .data")
    state = ModelState(model)
    with state.held():
        assert state._entry is not None and "average" in [
            v.where.split(".")[-1] for v in state._entry.tensors.unkept()
        ]
        found = []
        for _ in range(3):
            state.rewind()
            with state.watched():
                found.append(gradient(model))
    assert same(found[0], found[1]) and same(found[0], found[2])
    assert same(gradient(model), gradient(twin))


@pytest.mark.parametrize("fails", [False, True])
def test_large_tensors_that_are_changed_unwatched_are_named(fails: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(snapshot_tensors, "SMALL", 0)
    model = stateful("frozen parameter by .data")
    error, message = (KeyError, "went wrong") if fails else (MeasurementError, "model.average")
    with pytest.raises(error, match=message), ModelState(model).held():
        model.average.data.add_(1)
        if fails:
            raise KeyError("went wrong")


def test_trainable_weights_that_a_pass_writes_are_refused_and_come_back():
    def normalize(model: nn.Module, hidden: Tensor) -> float:
        model.last.weight.data.div_(model.last.weight.data.norm())
        return 0.0

    model = Stateful(lambda model: 0, normalize)
    before = model.last.weight.clone()
    with pytest.raises(MeasurementError, match="changes its own weights"):
        measure(model, [batch()], OptimizabilityConfig(max_hvps=16))
    assert torch.equal(model.last.weight, before)


def test_gradient_hooks_on_parameters_are_set_aside_and_come_back_in_order():
    model = Stateful(lambda model: 0, none)
    calls: list[str] = []
    handles = [p.register_hook(lambda g, n=n: calls.append(n) or g * 0.5) for n, p in model.named_parameters()]
    weight = model.last.weight
    weight.register_hook(lambda gradient: calls.append("second"))
    weight.register_post_accumulate_grad_hook(lambda parameter: calls.append("accumulated"))
    state = ModelState(model)
    with state.held():
        assert same(gradient(model), gradient(Stateful(lambda model: 0, none)))
        model(**batch())["loss"].backward()
    assert not calls and all(parameter.grad is None for parameter in model.parameters())
    assert state.set_aside == tuple(dict(model.named_parameters()))
    model(**batch())["loss"].backward()
    assert [call for call in calls if call in ("last.weight", "second", "accumulated")] == [
        "last.weight", "second", "accumulated",
    ]  # fmt: skip
    for handle in handles:
        handle.remove()
    assert len(weight._backward_hooks) == 1


@pytest.mark.parametrize("outputs", [3, 20])
def test_with_gradient_hooks_the_numbers_are_those_of_the_loss(outputs: int):
    """For few outputs, and for many, there are two ways to the trace."""

    def model(hooked: bool) -> nn.Module:
        torch.manual_seed(0)
        net = Stateful(lambda model: _submodule(model, "last", nn.Linear(6, outputs)), none)
        for parameter in net.parameters() if hooked else ():
            parameter.register_hook(lambda gradient: gradient * 0.5)
        return net

    config = OptimizabilityConfig(max_hvps=32)
    found, expected = (measure(model(hooked), [batch(8)], config) for hooked in (True, False))
    assert found.grad_norm == expected.grad_norm
    assert found.hessian.trace.value == expected.hessian.trace.value
    assert found.hessian.lambda_max.value == expected.hessian.lambda_max.value


def test_module_hooks_of_the_user_are_named():
    model = Stateful(lambda model: 0, none)
    model.first.register_forward_hook(lambda *call: None)
    nn.utils.spectral_norm(model.last)  # by a hook of torch's
    state = ModelState(model)
    with state.held():
        pass
    assert state.module_hooks == ("first",) and state.set_aside == ()


def test_a_backward_hook_with_a_state_gets_it_back():
    model = Stateful(lambda model: 0, none)
    seen: list[int] = []

    def scale(module: nn.Module, inputs: Any, outputs: Any) -> Any:
        seen.append(1)
        return tuple(g if g is None else g * (1 + 0.1 * len(seen)) for g in inputs)

    model.last.register_full_backward_hook(scale)
    state, found = ModelState(model), []
    with state.held():
        for _ in range(2):
            state.rewind()
            found.append(gradient(model))
    assert same(*found) and seen == []


def test_a_gradient_that_was_there_stays_the_same_tensor():
    model = Stateful(lambda model: 0, none)
    model(**batch())["loss"].backward()
    before = [(p.grad, p.grad.clone()) for p in model.parameters() if p.grad is not None]
    with ModelState(model).held():
        model(**batch())["loss"].backward()
    found = [parameter.grad for parameter in model.parameters()]
    assert all(now is then and torch.equal(now, value) for now, (then, value) in zip(found, before, strict=True))


def test_changes_on_purpose_stand_until_they_are_taken_back():
    model = stateful("number")
    model.switch = "sdpa"
    state = ModelState(model)
    with state.held():
        state.rewind()
        model.state += 1
        settle()
        model.switch = "eager"
        for _ in range(2):
            state.rewind()
            assert (model.state, model.switch) == (2, "eager")
            model.state += 1
        settle()
        model.switch = "sdpa"
        state.rewind()
        assert (model.state, model.switch) == (2, "sdpa")


def test_what_others_use_is_left_alone(tmp_path: Path):
    """Also where it can't be copied, is huge, or is not a state at all."""
    model = Stateful(lambda model: 0, none)
    lock, rows = threading.Lock(), [[0.0]] * (MOST_ITEMS + 1)
    with (tmp_path / "log").open("w") as file:
        model.things = {"lock": lock, "file": file, "rows": rows, "function": len, "class": Tracker, "self": model}
        model.things["cycle"] = model.things
        before = Snapshot({"model": model})
        model.things["file"].write("kept")
        rows[0].append(1.0)
        del model.things["lock"]
        assert before.put_back() == []
        assert file.tell() == 4
    assert model.things["lock"] is lock and rows[0] == [0.0, 1.0]
    assert not [value for value in before.tensors._values if "rows" in value.where]


class Logging(Trainer):
    """Keeps the number of calls, a running mean and metrics, and logs in its loss."""

    calls = 0
    mean: Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.metrics: dict[str, list[float]] = {"train": [], "eval": []}

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.mean = loss.detach() if self.mean is None else 0.9 * self.mean + 0.1 * loss.detach()
        self.metrics["train"].append(float(self.mean))
        self.log({"part": float(loss.detach())})
        return loss / self.mean * (1 + self.calls)


def test_a_trainer_gets_back_what_its_loss_kept_and_logs_nothing_meanwhile(tmp_path: Path):
    trainer = training.trainer(tmp_path, "bert", Logging)
    other = training.trainer(tmp_path, "bert", Logging)
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model, dict(inputs))
    metrics, mean, value = trainer.metrics, trainer.mean, trainer.mean.clone()
    state, losses = ModelState(trainer.model, others=[trainer]), []
    with state.held():
        for _ in range(3):
            state.rewind()
            losses.append(float(trainer.compute_loss(trainer.model, dict(inputs)).detach()))
        other.log({"part": 1.0})
    assert losses[0] == losses[1] == losses[2]
    assert (trainer.calls, trainer.metrics) == (1, {"train": [float(value)], "eval": []})
    assert trainer.metrics is metrics and trainer.mean is mean and torch.equal(mean, value)
    assert len(trainer.state.log_history) == 1 and len(other.state.log_history) == 1
    assert "log" not in vars(trainer)


def test_measuring_holds_the_state_that_it_is_given():
    model, counter = stateful("number"), Tracker()
    with measuring(model, seed=0, state=ModelState(model, others=[counter])):
        counter.calls += 1
        counter.history.append(1.0)
        model(**batch())
    assert counter == Tracker() and model.state == 2
