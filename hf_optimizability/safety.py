# SPDX-License-Identifier: Apache-2.0
"""Contexts that let a measurement use the live model and leave no trace of it, also when it raises."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel


@contextmanager
def preserved_rng(seed: int) -> Iterator[None]:
    """Seeds Python, NumPy and torch (all devices) inside, and gives them their old states back after."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switches dropout off and holds running statistics still; each module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def unpatched_forward(model: nn.Module) -> Iterator[None]:
    """Takes off the autocast that accelerate puts around `forward`; an outer autocast(enabled=False) can't undo it."""
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
def measuring(model: nn.Module, *, seed: int) -> Iterator[None]:
    """Everything that a measurement needs held: RNG, eval mode, full precision, gradients on."""
    device = next(model.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(preserved_rng(seed))
        stack.enter_context(eval_mode(model))
        stack.enter_context(unpatched_forward(model))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.enable_grad())
        yield


def math_attention() -> AbstractContextManager[None]:
    """Makes `scaled_dot_product_attention` twice differentiable: none of its fused kernels is.

    Must be held around the forward and both backward passes, since activation checkpointing picks the kernel anew.
    """
    return sdpa_kernel(SDPBackend.MATH)


def pretrained(model: nn.Module) -> PreTrainedModel | None:
    """The Transformers model inside `model` (itself, or wrapped by PEFT or by hand), or `None`."""
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Switches a model to eager attention, whose operations are all twice differentiable, and back."""
    configs = {id(module.config): module.config for module in model.modules() if isinstance(module, PreTrainedModel)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
