# SPDX-License-Identifier: Apache-2.0
"""Contexts that let a measurement borrow the live model and leave no trace, also when it raises."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
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
    """Seed Python, NumPy and torch (all devices); use it inside `preserved_rng`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # `torch.manual_seed` takes 4 ms per device to record its caller
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def rng_state() -> tuple[Any, ...]:
    """Return the states of the generators that `seed_all` seeds, in a form that can be compared."""
    numpy_state = np.random.get_state()
    devices = [torch.cuda.get_rng_state(device) for device in range(torch.cuda.device_count())]
    tensors = [state.numpy().tobytes() for state in (torch.get_rng_state(), *devices)]
    return random.getstate(), numpy_state[1].tobytes(), numpy_state[2], *tensors  # type: ignore[index, union-attr]


@contextmanager
def preserved_rng(seed: int) -> Iterator[None]:
    """Seed Python, NumPy and torch (all devices), and restore their states at exit."""
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
    """Switch off the key-value cache, as in training: it takes memory, and some models write to it in place (RWKV)."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    cached = [config for config in configs.values() if vars(config).get("use_cache")]
    try:
        for config in cached:
            config.use_cache = False
        yield
    finally:
        for config in cached:
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
    """Borrow a model: seeded RNG, eval mode, full precision, gradients on, no compilation; restore all at exit.

    Most compiled backward passes can't be differentiated again, and the hooks and modes of a measurement would trigger
    recompilation, which counts against torch.compile's limit: beyond it, training would continue uncompiled.

    Args:
        model: The model, in eval mode inside.
        seed: Seed of the RNGs.
        state: The state of the model and of other objects to restore; by default that of the model alone.
    """
    device = next(model.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(preserved_rng(seed))
        stack.enter_context((state or ModelState(model)).borrow())
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


@contextmanager
def batch_statistics(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Let normalization layers of a borrowed model use the statistics of the batch, as in training.

    Args:
        layers: `ModelState.normalizing`. What a pass writes to their buffers is wound back before the next.
    """
    settle()
    try:
        for layer in layers:
            layer.training = True
        yield
    finally:
        settle()
        for layer in layers:
            layer.training = False


def math_attention() -> AbstractContextManager[None]:
    """Make `scaled_dot_product_attention` twice differentiable, as none of its fused kernels is.

    Must be active during the forward and both backward passes: activation checkpointing selects the kernel again.
    """
    return sdpa_kernel(SDPBackend.MATH)


def pretrained(model: nn.Module) -> PreTrainedModel | None:
    """Return the Transformers model inside `model` (itself, or wrapped by PEFT or by hand), or `None`."""
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Switch a model to eager attention, which is twice differentiable, and back at exit."""
    with _preserved_attention(model):
        model.set_attn_implementation("eager")
        yield


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Switch a model from unsupported attention kernels to SDPA or eager attention, and back at exit.

    Unsupported are FlashAttention, which takes only half precision, and FlexAttention, without second derivatives.
    """
    inner = pretrained(model)
    kernels = [] if inner is None else [str(config._attn_implementation) for config in _configs(inner)]
    if inner is None or not any(name in kernel for kernel in kernels for name in ("flash", "flex")):
        yield
        return
    with _preserved_attention(inner):
        try:
            inner.set_attn_implementation("sdpa")
        except ValueError:  # the model does not support it
            inner.set_attn_implementation("eager")
        yield


@contextmanager
def _preserved_attention(model: PreTrainedModel) -> Iterator[None]:
    """Restore a model's attention implementation at exit."""
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
    """Replace half-precision parameters and buffers by float32 copies, and restore the originals at exit.

    The originals are removed from their modules, not changed: values, `.grad`, hooks and the optimizer's references
    remain. (Assigning a tensor of another dtype to `.data` would drop a parameter's gradient accumulator, and with it
    the hooks by which DistributedDataParallel averages gradients.) Tied weights stay tied. Half-precision inputs of
    the model are cast as well. Weights in integers or 8-bit floats are meaningless without their scales and are left
    alone. Look parameters up again inside, as `Objective.parameters` does.
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
    """Return how the model's weights are quantized (the method, or the dtype they are stored in); `None` if not."""
    inner = pretrained(model)
    if inner is not None and vars(inner).get("is_quantized"):
        return vars(inner)["quantization_method"].lower()  # a string, or an enum of strings
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.ndim > 1}  # Keras has 1-d seeds
    return next((str(dtype) for dtype in dtypes if not dtype.is_floating_point or dtype.itemsize == 1), None)
