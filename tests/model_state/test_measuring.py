# SPDX-License-Identifier: Apache-2.0
"""The contexts of a measurement: what they hold, and that they let go of it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AttentionInterface,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_optimizability import MeasurementError, OptimizabilityConfig, measure
from hf_optimizability.model_state.measuring import eager_attention, full_precision, preserved_rng, unpatched_forward
from hf_optimizability.objective.probe_set import ProbeSpec, draw_probe_set
from tests.support import tiny_models


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def leaves_after_error(context: AbstractContextManager) -> None:
    with pytest.raises(KeyboardInterrupt), context:
        draw()
        raise KeyboardInterrupt


def test_rng_is_given_back_after_an_error():
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    expected = draw(), draw()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    first = draw()
    leaves_after_error(preserved_rng(1))
    assert (first, draw()) == expected


def test_rng_is_seeded_inside():
    with preserved_rng(7):
        first = draw()
    with preserved_rng(7):
        again = draw()
    assert first == again


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """One of mixed precision; its state is global, so that of other tests must go before, and its own after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_autocast_is_taken_off_and_put_back(accelerator: Accelerator):
    model = accelerator.prepare(nn.Linear(64, 64))
    patched, x = model.forward, torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    exact = nn.functional.linear(x, model.weight, model.bias)
    assert not torch.equal(model(x), exact)
    with unpatched_forward(model):
        assert torch.equal(model(x), exact)
    assert model.forward is patched


def fused_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """A kernel of the kind that MATH can't replace."""
    output, _ = sdpa_attention_forward(*args, **kwargs)
    return tiny_models.OnceDifferentiable.apply(output), None


def test_eager_is_the_fallback_for_attention_that_cannot_be_differentiated_twice():
    AttentionInterface.register("fused", fused_attention)
    batches = tiny_models.cut(tiny_models.examples("vit", 4), 4)
    config = OptimizabilityConfig(max_hvps=16)
    fused = tiny_models.make("vit", attn_implementation="fused")
    measurement = measure(fused, batches, config)
    expected = measure(tiny_models.make("vit"), batches, config)
    assert (measurement.attention, expected.attention) == ("eager", "math")
    assert "once_differentiable" in str(measurement.fallback) and expected.fallback is None
    assert measurement.hessian.lambda_max.value == pytest.approx(expected.hessian.lambda_max.value, rel=1e-5)
    assert fused.config._attn_implementation == "fused"
    assert {module.config._attn_implementation for module in fused.modules() if "config" in vars(module)} == {"fused"}


def test_attention_is_given_back_after_an_error():
    model = tiny_models.make("bert")
    with pytest.raises(KeyboardInterrupt), eager_attention(model):
        assert model.config._attn_implementation == "eager"
        raise KeyboardInterrupt
    assert model.config._attn_implementation == "sdpa"


class Counting:
    """A backend of torch.compile that, like its default, can't be differentiated twice, and counts."""

    def __init__(self) -> None:
        self.compiled = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.compiled += 1
        return lookup_backend("aot_eager")(graph, inputs)


PRECISE = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)  # type: ignore[attr-defined]


def flags(model: nn.Module) -> dict[str, Any]:
    """All that a measurement may switch."""
    modules = list(model.modules())
    configs = [module.config for module in modules if isinstance(module, PreTrainedModel)]
    return {
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "modes": [module.training for module in modules],
        "attention": [config._attn_implementation for config in configs],
        "cache": [config.use_cache for config in configs],
        "checkpointing": [vars(module).get("gradient_checkpointing") for module in modules],
        "checkpointing by": [vars(module).get("_gradient_checkpointing_func") for module in modules],
        "compiled": [module._compiled_call_impl for module in modules],
        "forward": [vars(module).get("forward") for module in modules],
        "precision": [part.fp32_precision for part in PRECISE],
        "hooks": [[*module._forward_hooks, *module._forward_pre_hooks, *module._backward_hooks] for module in modules],
    }


@pytest.mark.parametrize("ending", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("attention", ["sdpa", "fused"])
def test_every_flag_is_left_as_it_was(
    monkeypatch: pytest.MonkeyPatch, ending: type[BaseException] | None, attention: str
):
    """Frozen weights, modules in eval mode, checkpointing, a key-value cache, `.grad`; SDPA or the eager fallback."""
    AttentionInterface.register("fused", fused_attention)
    model = tiny_models.make("llama", attn_implementation=attention).train()
    model.model.layers[0].mlp.requires_grad_(False).eval()
    model.gradient_checkpointing_enable()
    model.config.use_cache = True
    batches = tiny_models.cut(tiny_models.examples("llama", 4), 2)
    model(**batches[0]).loss.backward()
    before, values = flags(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if ending is not None:

        def fail(*args: object, **kwargs: object) -> None:
            raise ending

        monkeypatch.setattr(
            "hf_optimizability.measurement.curvature_pass.estimate_spectrum", fail
        )  # after the first products
    expected = {None: nullcontext(), RuntimeError: pytest.raises(MeasurementError)}
    with expected.get(ending) or pytest.raises(KeyboardInterrupt):
        measure(model, batches, OptimizabilityConfig(max_hvps=16))
    assert flags(model) == before
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("wrapped", "ending"),
    [
        # Each way to compile, and each of two ends; all pairs by `make test-slow`.
        pytest.param(wrapped, ending, marks=[] if wrapped == (ending is None) else pytest.mark.slow)
        for wrapped in (True, False)
        for ending in (None, RuntimeError)
    ]
    + [pytest.param(wrapped, KeyboardInterrupt, marks=pytest.mark.slow) for wrapped in (True, False)],
    ids=lambda value: ("model.compile()", "torch.compile(model)")[value] if isinstance(value, bool) else None,
)
def test_a_compiled_model_is_measured_as_it_is_and_not_compiled_anew(
    monkeypatch: pytest.MonkeyPatch, wrapped: bool, ending: type[BaseException] | None
):
    torch.compiler.reset()
    batches = tiny_models.cut(tiny_models.examples("bert", 4), 2)
    config = OptimizabilityConfig(max_hvps=16)
    backend, model = Counting(), tiny_models.make("bert").train()
    compiled = torch.compile(model, backend=backend) if wrapped else model
    if not wrapped:
        model.compile(backend=backend)
    for _ in range(2):  # the first call notes the kind of problem in the config, so that the second compiles anew
        compiled(**batches[0]).loss.backward()
    before, number = flags(model), backend.compiled
    assert number > 0
    with monkeypatch.context() as broken:
        if ending is None:
            found = measure(compiled, batches, config)
            expected = measure(tiny_models.make("bert"), batches, config)
            assert found.engine == "double_backward" and found.fallback is None
            assert found.hessian.lambda_max.value == pytest.approx(expected.hessian.lambda_max.value, rel=1e-9)
        else:

            def fail(*args: object, **kwargs: object) -> None:
                raise ending

            broken.setattr("hf_optimizability.measurement.curvature_pass.estimate_spectrum", fail)
            with pytest.raises(MeasurementError if ending is RuntimeError else ending):
                measure(compiled, batches, config)
    assert flags(model) == before
    compiled(**batches[0]).loss.backward()
    assert backend.compiled == number


@pytest.mark.parametrize("ending", [None, RuntimeError, KeyboardInterrupt])
def test_drawing_the_probe_set_leaves_loader_and_sampler_where_they_are(ending: type[BaseException] | None):
    """In the middle of an epoch, with examples that are augmented at random."""

    class Augmented(Dataset):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> Tensor:
            return index + torch.rand(())

    def seen(draws: bool) -> list[list[float]]:
        torch.manual_seed(0)
        broken: list[type[BaseException]] = []

        def collate(rows: list[Tensor]) -> list[float]:
            if broken:
                raise broken[0]
            return [float(row) for row in rows]

        generator = torch.Generator().manual_seed(1)
        loader = Accelerator(cpu=True).prepare(
            DataLoader(Augmented(), batch_size=2, shuffle=True, generator=generator, collate_fn=collate)
        )
        batches = iter(loader)
        found = [next(batches)]
        if draws:
            broken.extend([] if ending is None else [ending])
            with nullcontext() if ending is None else pytest.raises(ending):
                draw_probe_set(loader, ProbeSpec(6, batch_size=3, seed=5))
            broken.clear()
        return [*found, *batches, *loader]

    assert seen(draws=True) == seen(draws=False)


def half(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A model whose config says its dtype, as `from_pretrained` leaves it, and a batch in that dtype."""
    if name == "t5":
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(
            T5Config(vocab_size=9, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=2, decoder_start_token_id=0)
        )
        tokens = torch.arange(12).reshape(3, 4) % 9
        batch = {"input_ids": tokens, "labels": tokens}
    else:
        model = tiny_models.make(name)
        [batch] = tiny_models.cut(tiny_models.examples(name, 3, dtype=dtype), 3)
    model.to(dtype).eval().config.dtype = dtype
    return model, batch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*tiny_models.MODELS, "t5"])
def test_full_precision_computes_in_float32_and_gives_the_same_tensors_back(name: str, dtype: torch.dtype):
    model, batch = half(name, dtype)
    model(**batch).loss.backward()
    tensors = [*model.parameters(), *model.buffers()]
    values = [tensor.clone() for tensor in tensors]
    gradients = [parameter.grad for parameter in model.parameters()]
    twin, _ = half(name, dtype)
    twin = twin.float()
    twin.config.dtype = torch.float32
    single = {key: value.float() if value.is_floating_point() else value for key, value in batch.items()}
    with full_precision(model):
        assert model.dtype == torch.float32
        assert torch.equal(model(**batch).logits, twin(**single).logits)
        assert not {p.dtype for p in [*model.parameters(), *model.buffers()]} & {torch.bfloat16, torch.float16}
    assert all(a is b for a, b in zip([*model.parameters(), *model.buffers()], tensors, strict=True))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tensors, values, strict=True))
    assert all(p.grad is gradient for p, gradient in zip(model.parameters(), gradients, strict=True))
    assert not model._forward_pre_hooks


def test_full_precision_keeps_ties_names_and_what_is_frozen():
    model, _ = half("gpt2", torch.bfloat16)
    model.transformer.h[0].requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with full_precision(model):
        assert model.lm_head.weight is model.transformer.wte.weight
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert model.lm_head.weight is model.transformer.wte.weight


def test_full_precision_keeps_gradient_accumulators_and_their_hooks():
    """DistributedDataParallel averages gradients in such hooks."""
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    model = nn.ParameterDict({"x": parameter})
    accumulator = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
    calls: list[int] = []
    accumulator.register_hook(lambda *gradients: calls.append(1))
    with full_precision(model):
        torch.autograd.grad(model["x"].sum(), model["x"])
    model["x"].sum().backward()
    assert calls == [1]


def test_full_precision_leaves_float32_integers_and_8_bit_floats_alone():
    model = nn.Module()
    for index, dtype in enumerate([torch.float32, torch.float64, torch.int8, torch.uint8, torch.float8_e4m3fn]):
        model.register_parameter(f"p{index}", nn.Parameter(torch.ones(2).to(dtype), requires_grad=False))
    before = list(model.parameters())
    with full_precision(model):
        assert all(a is b for a, b in zip(model.parameters(), before, strict=True))


def test_full_precision_reaches_recurrent_layers():
    model = nn.LSTM(2, 2).bfloat16()
    with full_precision(model):
        assert model(torch.ones(1, 1, 2))[0].dtype == torch.float32
    assert model(torch.ones(1, 1, 2, dtype=torch.bfloat16))[0].dtype == torch.bfloat16


def test_full_precision_is_left_after_an_error():
    model = nn.Linear(2, 2).bfloat16()
    weight = model.weight
    with pytest.raises(KeyboardInterrupt), full_precision(model):
        assert model.weight.dtype == torch.float32
        raise KeyboardInterrupt
    assert model.weight is weight and not model._forward_pre_hooks
