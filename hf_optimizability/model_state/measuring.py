# SPDX-License-Identifier: Apache-2.0
"""Contexts that let a measurement use the live model and leave no trace of it, also when it raises."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedConfig, PreTrainedModel

from .float32_precision import ieee_float32
from .plain_forward import nonreentrant_checkpoints, without_autocast
from .plain_layers import plain_layers
from .state import ModelState, settle


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices); hold `preserved_rng` around it."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # `torch.manual_seed` takes 4 ms to note who calls it, for each device
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def rng_state() -> tuple[Any, ...]:
    """Return the states of the generators that `seed_all` seeds, to compare with others."""
    numpy_state = np.random.get_state()
    devices = [torch.cuda.get_rng_state(device) for device in range(torch.cuda.device_count())]
    tensors = [state.numpy().tobytes() for state in (torch.get_rng_state(), *devices)]
    return random.getstate(), numpy_state[1].tobytes(), numpy_state[2], *tensors  # type: ignore[index, union-attr]


@contextmanager
def preserved_rng(seed: int) -> Iterator[None]:
    """Seeds Python, NumPy and torch (all devices) inside, and gives them their old states back after."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            seed_all(seed)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """No key-value cache, as while training: it takes memory, and some are written in place (RWKV)."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    using = [config for config in configs.values() if vars(config).get("use_cache")]
    try:
        for config in using:
            config.use_cache = False
        yield
    finally:
        for config in using:
            config.use_cache = True


@contextmanager
def unpatched_forward(model: nn.Module) -> Iterator[None]:
    """Remove the autocast that accelerate puts around `forward`; an outer autocast(enabled=False) can't undo it."""
    patched = vars(model).get("forward")
    original = vars(model).get("_original_forward")
    if patched is None or original is None:
        yield
        return
    try:
        model.forward = original
        yield
    finally:
        model.forward = patched


@contextmanager
def measuring(model: nn.Module, *, seed: int, state: ModelState | None = None) -> Iterator[None]:
    """Hold everything that a measurement needs: RNG, the model's state, full precision, gradients on, no compilation.

    Compiled, most backward passes can't be differentiated again. And hooks and modes of a measurement would make
    torch.compile compile anew, which counts against its limit: beyond that, training would go on uncompiled.

    Args:
        model: The model, which is in eval mode inside.
        seed: Seed of the RNGs.
        state: What of the model and of other objects comes back after; by default that of the model alone.
    """
    device = next(model.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(preserved_rng(seed))
        stack.enter_context((state or ModelState(model)).held())
        stack.enter_context(without_cache(model))
        stack.enter_context(unpatched_forward(model))
        stack.enter_context(plain_attention(model))
        stack.enter_context(plain_layers(model))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(without_autocast())
        stack.enter_context(nonreentrant_checkpoints())
        stack.enter_context(ieee_float32())
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def math_attention() -> AbstractContextManager[None]:
    """Make `scaled_dot_product_attention` twice differentiable: none of its fused kernels is.

    Must be held around the forward and both backward passes, since activation checkpointing picks the kernel anew.
    """
    return sdpa_kernel(SDPBackend.MATH)


def pretrained(model: nn.Module) -> PreTrainedModel | None:
    """Return the Transformers model inside `model` (itself, or wrapped by PEFT or by hand), or `None`."""
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Switch a model to eager attention, whose operations are all twice differentiable, and back."""
    with _own_attention(model):
        model.set_attn_implementation("eager")
        yield


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Switch a model from kernels that can't be measured with to SDPA, or to eager attention, and back.

    Those are FlashAttention, which takes half precision alone, and FlexAttention, which has no second derivative.
    """
    inner = pretrained(model)
    held = [] if inner is None else [str(config._attn_implementation) for config in _configs(inner)]
    if inner is None or not any(name in implementation for implementation in held for name in ("flash", "flex")):
        yield
        return
    with _own_attention(inner):
        try:
            inner.set_attn_implementation("sdpa")
        except ValueError:  # the model has none
            inner.set_attn_implementation("eager")
        yield


@contextmanager
def _own_attention(model: PreTrainedModel) -> Iterator[None]:
    """Give a model the attention implementation that it has now back after."""
    before = [(config, config._attn_implementation) for config in _configs(model)]
    settle()
    try:
        yield
    finally:
        settle()
        for config, implementation in before:
            config._attn_implementation = implementation


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    modules = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return list({id(module.config): module.config for module in modules}.values())


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Replace half-precision parameters and buffers by float32 copies, and restore them at the end.

    The originals are taken out of their modules, not changed: values, `.grad`, hooks and the optimizer's hold on them
    stay as they are. (A tensor of another dtype put under a parameter by `.data` would drop its gradient accumulator,
    and with it the hooks by which DistributedDataParallel averages gradients.) Tied weights stay tied. Half-precision
    inputs of the model are cast as well. Weights in integers or 8-bit floats mean nothing without their scales and are
    left alone. Parameters must be read anew inside, as `Objective.parameters` does.
    """
    copies: dict[int, Tensor] = {}
    originals: list[tuple[nn.Module, str, Tensor]] = []
    settle()
    cast_inputs = model.register_forward_pre_hook(
        lambda module, args, kwargs: (convert_to_fp32(args), convert_to_fp32(kwargs)), prepend=True, with_kwargs=True
    )
    try:
        for module in model.modules():
            parameters = module.named_parameters(recurse=False, remove_duplicate=False)
            buffers = module.named_buffers(recurse=False, remove_duplicate=False)
            for name, tensor in [*parameters, *buffers]:
                if tensor.dtype in (torch.float16, torch.bfloat16):
                    originals.append((module, name, tensor))
                    setattr(module, name, copies.setdefault(id(tensor), _float32(tensor)))
        yield
    finally:
        settle()
        for module, name, tensor in originals:
            setattr(module, name, tensor)
        cast_inputs.remove()


def _float32(tensor: Tensor) -> Tensor:
    copy = tensor.detach().float()
    return nn.Parameter(copy, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


def quantization(model: nn.Module) -> str | None:
    """How the model's weights are quantized (the method's name, or the dtype they are stored in); `None` if not."""
    inner = pretrained(model)
    if inner is not None and vars(inner).get("is_quantized"):
        return vars(inner)["quantization_method"].lower()  # a string, or an enum of strings
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.ndim > 1}  # Keras keeps seeds as others
    return next((str(dtype) for dtype in dtypes if not dtype.is_floating_point or dtype.itemsize == 1), None)
