# SPDX-License-Identifier: Apache-2.0
"""State that passes change: it comes back, and each pass starts from the same."""

from __future__ import annotations

import copy
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import (
    LevitConfig,
    LevitForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RwkvConfig,
    RwkvForCausalLM,
    Trainer,
)

from hf_optimizability import MeasurementError, OptimizabilityConfig, measure
from hf_optimizability.curvature.central_difference import CentralDifferenceHessian
from hf_optimizability.curvature.forward_over_reverse import ForwardOverReverseHessian
from hf_optimizability.curvature.hessian import HessianOperator, ObjectiveOperator
from hf_optimizability.measurement.measure import measure_objective
from hf_optimizability.model_state import snapshot_tensors
from hf_optimizability.model_state.measuring import measuring
from hf_optimizability.model_state.snapshot import MAX_ITEMS, Snapshot
from hf_optimizability.model_state.state import ModelState, eval_mode, settle
from hf_optimizability.objective.objective import Objective
from tests.support import tiny_training
from tests.support.stateful_models import KINDS, Stateful, Tracker, add_submodule, batch, merging, stateful, unchanged


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
    with pytest.raises(KeyboardInterrupt) if fails else nullcontext(), state.borrow():
        for rows in (3, 5, 4):
            state.rewind()
            gradient(model, **batch(rows))
        if fails:
            raise KeyboardInterrupt
    assert model.training
    assert all(now is then for now, then in zip(contents(model), objects, strict=True))
    assert all(same(gradient(model), gradient(twin)) for _ in range(3))


@pytest.mark.parametrize("kind", KINDS)
def test_each_pass_starts_from_the_state_that_was_handed_over(kind: str):
    model = stateful(kind)
    state = ModelState(model)
    first = gradient(stateful(kind).eval())
    found = []
    with state.borrow():
        for _ in range(3):
            state.rewind()
            found.append(gradient(model))
            gradient(model, **batch(5))
    assert all(same(gradients, first) for gradients in found)


def test_each_module_gets_its_own_mode_back():
    model = nn.Sequential(nn.Dropout(), nn.Dropout()).train()
    model[1].eval()
    with pytest.raises(RuntimeError), eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert [module.training for module in model.modules()] == [True, True, False]


def levit() -> tuple[PreTrainedModel, list[dict[str, Tensor]]]:
    """A model that caches biases in eval mode, with the graph by which they depend on its parameters."""
    torch.manual_seed(0)
    config = LevitConfig(
        image_size=32, num_channels=1, hidden_sizes=[8, 8, 8], num_attention_heads=[1, 1, 1], depths=[1, 1, 1],
        key_dim=[4, 4, 4], down_ops=[["Subsample", 4, 2, 2, 2, 2]] * 2, num_labels=3,
    )  # fmt: skip
    model = LevitForImageClassification(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    images = torch.randn(4, 1, 32, 32, dtype=torch.float64)
    return model, [{"pixel_values": images[i : i + 2], "labels": torch.tensor([i, 1])} for i in (0, 2)]


def caches(model: nn.Module) -> list[dict[str, Tensor]]:
    return [
        vars(module)["attention_bias_cache"] for module in model.modules() if "attention_bias_cache" in vars(module)
    ]


@pytest.mark.parametrize("evaluated", [False, True], ids=["trained", "evaluated"])
@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [(HessianOperator, 1e-10), (ForwardOverReverseHessian, 1e-10), (CentralDifferenceHessian, 1e-5)],
)
def test_cached_biases_are_computed_in_each_pass_and_the_cache_is_left_as_it_was(
    kind: type[ObjectiveOperator], tolerance: float, evaluated: bool
):
    model, batches = levit()
    if evaluated:
        with torch.no_grad():
            model.eval()(**batches[0])
    before = [(cache, dict(cache)) for cache in caches(model)]
    assert all(len(cache) == evaluated for cache in caches(model))
    operator = kind(Objective(model, batches))
    vector = torch.randn(operator.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with eval_mode(model):
        product = operator.matvec(vector)
    assert all(now is then and now == held for now, (then, held) in zip(caches(model), before, strict=True))
    assert model.training != evaluated

    twin, _ = levit()
    for module in twin.eval().modules():
        module.training = "attention_bias_cache" in vars(module)  # biases are not cached; nothing else differs
    named = {name: parameter.detach() for name, parameter in twin.named_parameters()}

    def loss(*tensors: Tensor) -> Tensor:
        parameters = dict(zip(named, tensors, strict=True))
        return sum(functional_call(twin, parameters, kwargs=batch).loss for batch in batches) / 2

    pieces = vector.split([parameter.numel() for parameter in named.values()])
    vectors = tuple(piece.view_as(p) for piece, p in zip(pieces, named.values(), strict=True))
    _, rows = torch.autograd.functional.hvp(loss, tuple(named.values()), vectors)
    expected = torch.cat([row.flatten() for row in rows])
    assert (product - expected).norm() <= tolerance * expected.norm()


def rwkv() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A model that divides weights of its later layers by two when it is first run in eval mode."""
    torch.manual_seed(0)
    model = RwkvForCausalLM(
        RwkvConfig(vocab_size=9, hidden_size=4, intermediate_size=6, num_hidden_layers=2, rescale_every=1)
    )
    tokens = torch.arange(10).reshape(2, 5) % 9
    return model, {"input_ids": tokens, "labels": tokens}


def test_weights_that_the_model_changes_come_back_with_the_note_of_it():
    model, batch = rwkv()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(MeasurementError, match="changes its own weights"):
        measure(model, [batch], OptimizabilityConfig(max_hvps=16))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.rwkv.layers_are_rescaled and model.training


def test_frozen_weights_that_the_model_changes_come_back_with_the_note_of_it():
    model, batch = rwkv()
    model.rwkv.requires_grad_(False)
    expected = model(**batch).logits
    with eval_mode(model):
        model(**batch, use_cache=False)
        assert model.rwkv.layers_are_rescaled
    assert not model.rwkv.layers_are_rescaled and model.training
    assert torch.equal(model(**batch).logits, expected)


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


@pytest.mark.parametrize("merged", [False, True], ids=["in train mode", "in eval mode"])
@pytest.mark.parametrize("small", [2**20, 0], ids=["copied", "copied when written"])
def test_layers_that_merge_are_measured_apart_and_left_as_they_were(
    small: int, merged: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(snapshot_tensors, "SMALL", small)
    model = merging()
    layer: Any = model.first
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
    with state.borrow():
        assert state._entry is not None and "average" in [
            v.path.split(".")[-1] for v in state._entry.tensors.uncopied()
        ]
        found = []
        for _ in range(3):
            state.rewind()
            with state.watched():
                found.append(gradient(model))
    assert same(found[0], found[1]) and same(found[0], found[2])
    assert same(gradient(model), gradient(twin))


def test_large_frozen_tensors_come_back_from_one_measurement_after_another(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(snapshot_tensors, "SMALL", 0)
    model, twin = stateful("frozen parameter by .data"), stateful("frozen parameter by .data")
    objective, config = Objective(model, [batch()]), OptimizabilityConfig(max_hvps=16)
    first, second = (measure_objective(objective, config)[0] for _ in range(2))
    assert first.hessian.lambda_max.value == second.hessian.lambda_max.value
    assert same(gradient(model), gradient(twin))


@pytest.mark.parametrize("fails", [False, True])
def test_large_tensors_that_are_changed_unwatched_are_named(fails: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(snapshot_tensors, "SMALL", 0)
    model = stateful("frozen parameter by .data")
    error, message = (KeyError, "went wrong") if fails else (MeasurementError, "model.average")
    with pytest.raises(error, match=message), ModelState(model).borrow():
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
    model = Stateful(lambda model: 0, unchanged)
    calls: list[str] = []
    handles = [p.register_hook(lambda g, n=n: calls.append(n) or g * 0.5) for n, p in model.named_parameters()]
    weight = model.last.weight
    weight.register_hook(lambda gradient: calls.append("second"))
    weight.register_post_accumulate_grad_hook(lambda parameter: calls.append("accumulated"))
    state = ModelState(model)
    with state.borrow():
        assert same(gradient(model), gradient(Stateful(lambda model: 0, unchanged)))
        model(**batch())["loss"].backward()
    assert not calls and all(parameter.grad is None for parameter in model.parameters())
    assert state.hooks_set_aside == tuple(dict(model.named_parameters()))
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
        net = Stateful(lambda model: add_submodule(model, "last", nn.Linear(6, outputs)), unchanged)
        for parameter in net.parameters() if hooked else ():
            parameter.register_hook(lambda gradient: gradient * 0.5)
        return net

    config = OptimizabilityConfig(max_hvps=32)
    found, expected = (measure(model(hooked), [batch(8)], config) for hooked in (True, False))
    assert found.grad_norm == expected.grad_norm
    assert found.hessian.trace.value == expected.hessian.trace.value
    assert found.hessian.lambda_max.value == expected.hessian.lambda_max.value


def test_module_hooks_of_the_user_are_named():
    model = Stateful(lambda model: 0, unchanged)
    model.first.register_forward_hook(lambda *call: None)
    nn.utils.spectral_norm(model.last)  # by a hook of torch's
    state = ModelState(model)
    with state.borrow():
        pass
    assert state.module_hooks == ("first",) and state.hooks_set_aside == ()


def test_a_backward_hook_with_a_state_gets_it_back():
    model = Stateful(lambda model: 0, unchanged)
    seen: list[int] = []

    def scale(module: nn.Module, inputs: Any, outputs: Any) -> Any:
        seen.append(1)
        return tuple(g if g is None else g * (1 + 0.1 * len(seen)) for g in inputs)

    model.last.register_full_backward_hook(scale)
    state, found = ModelState(model), []
    with state.borrow():
        for _ in range(2):
            state.rewind()
            found.append(gradient(model))
    assert same(*found) and seen == []


def test_a_gradient_that_was_there_stays_the_same_tensor():
    model = Stateful(lambda model: 0, unchanged)
    model(**batch())["loss"].backward()
    before = [(p.grad, p.grad.clone()) for p in model.parameters() if p.grad is not None]
    with ModelState(model).borrow():
        model(**batch())["loss"].backward()
    found = [parameter.grad for parameter in model.parameters()]
    assert all(now is then and torch.equal(now, value) for now, (then, value) in zip(found, before, strict=True))


def test_changes_on_purpose_stand_until_they_are_taken_back():
    model = stateful("number")
    model.switch = "sdpa"
    state = ModelState(model)
    with state.borrow():
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


def test_what_a_pass_adds_is_taken_away():
    model = stateful("list")
    before = set(vars(model)), set(model._buffers), set(model._modules), len(model._forward_hooks)
    with ModelState(model).borrow():
        model.extra = torch.ones(1)
        model.register_buffer("late", torch.ones(1))
        model.add_module("more", nn.Linear(1, 1))
        model.register_forward_hook(lambda *call: None)
    assert (set(vars(model)), set(model._buffers), set(model._modules), len(model._forward_hooks)) == before


@pytest.mark.parametrize("trained", [False, True])
def test_hidden_states_are_captured_once_in_each_pass(trained: bool):
    """Transformers puts up hooks in a model's first pass and marks it: with the mark alone put back they pile up."""
    torch.manual_seed(0)
    size = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=12, num_hidden_layers=3, **size))
    data = {"input_ids": torch.arange(12)[None], "output_hidden_states": True}
    if trained:
        model(**data)
    counted: list[int] = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        hidden = model(**batch).hidden_states
        counted.append(len(hidden))
        return hidden[2].square().mean()

    before = [len(module._forward_hooks) for module in model.modules()]
    objective = Objective(model, [data], loss_fn=loss_fn)
    with measuring(model, seed=0, state=objective.state):
        losses = [float(loss.detach()) for _ in range(20) for loss, _ in objective.losses()]
    assert set(counted) == {4} and len(set(losses)) == 1
    assert [len(module._forward_hooks) for module in model.modules()] == before


def test_tensors_of_every_layout_and_modules_of_torchscript_are_given_back():
    model = nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.BatchNorm1d(2)))
    tensors = {
        "sparse": torch.eye(3).to_sparse(), "view": torch.zeros(9)[1:4], "transposed": torch.rand(2, 3).T,
        "flags": torch.zeros(3, dtype=torch.bool), "complex": torch.ones(2, dtype=torch.complex64).conj(),
        "nan": torch.tensor([float("nan"), 0.0]), "half": torch.zeros(3, dtype=torch.bfloat16),
    }  # fmt: skip
    vars(model).update(tensors)
    model.expanded, model.empty, model.meta = torch.zeros(1).expand(5), torch.empty(0), torch.empty(3, device="meta")
    model.nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    state = ModelState(model)
    with state.borrow():
        for _ in range(2):
            state.rewind()
            for tensor in tensors.values():
                tensor.mul_(0) if tensor.is_sparse else tensor.fill_(1)
            model[1].running_mean.add_(1)
            assert not model[1].training
    assert model[1].training and torch.equal(model[1].running_mean, torch.zeros(2))
    for name, tensor in tensors.items():
        assert torch.equal(tensor.to_dense().nan_to_num(7.0), before[name].to_dense().nan_to_num(7.0)), name


def test_what_others_use_is_left_alone(tmp_path: Path):
    """Also where it can't be copied, is huge, or is not a state at all."""
    model = Stateful(lambda model: 0, unchanged)
    lock, rows = threading.Lock(), [[0.0]] * (MAX_ITEMS + 1)
    with (tmp_path / "log").open("w") as file:
        model.things = {"lock": lock, "file": file, "rows": rows, "function": len, "class": Tracker, "self": model}
        model.things["cycle"] = model.things
        before = Snapshot({"model": model})
        model.things["file"].write("kept")
        rows[0].append(1.0)
        del model.things["lock"]
        assert before.restore() == []
        assert file.tell() == 4
    assert model.things["lock"] is lock and rows[0] == [0.0, 1.0]
    assert not [value for value in before.tensors._values if "rows" in value.path]


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
    trainer = tiny_training.trainer(tmp_path, "bert", Logging)
    other = tiny_training.trainer(tmp_path, "bert", Logging)
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model, dict(inputs))
    metrics, mean, value = trainer.metrics, trainer.mean, trainer.mean.clone()
    state, losses = ModelState(trainer.model, others=[trainer]), []
    with state.borrow():
        for _ in range(3):
            state.rewind()
            losses.append(float(trainer.compute_loss(trainer.model, dict(inputs)).detach()))
        other.log({"part": 1.0})
    assert losses[0] == losses[1] == losses[2]
    assert (trainer.calls, trainer.metrics) == (1, {"train": [float(value)], "eval": []})
    assert trainer.metrics is metrics and trainer.mean is mean and torch.equal(mean, value)
    assert len(trainer.state.log_history) == 1 and len(other.state.log_history) == 1
    assert "log" not in vars(trainer)


def test_a_trainer_that_a_model_holds_is_not_looked_into(tmp_path: Path):
    trainer = tiny_training.trainer(tmp_path, "bert")
    trainer.model.owner = trainer
    with ModelState(trainer.model).borrow():
        trainer.state.log_history.append({"step": 1})
    assert trainer.state.log_history == [{"step": 1}] and trainer.model.owner is trainer


def test_measuring_holds_the_state_that_it_is_given():
    model, counter = stateful("number"), Tracker()
    with measuring(model, seed=0, state=ModelState(model, others=[counter])):
        counter.calls += 1
        counter.history.append(1.0)
        model(**batch())
    assert counter == Tracker() and model.state == 2


def test_an_alias_does_not_put_back_weights_that_are_moved_on_purpose():
    layer = nn.utils.spectral_norm(nn.Linear(2, 2))  # keeps its weight as an attribute too
    state = ModelState(layer)
    with state.borrow():
        state.rewind()
        moved = layer.weight_orig.detach() + 1
        with torch.no_grad():
            layer.weight_orig.add_(1)
        state.rewind()
        assert torch.equal(layer.weight_orig, moved)
