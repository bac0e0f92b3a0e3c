# SPDX-License-Identifier: Apache-2.0
"""IEEE float32 arithmetic: no TF32 and no bfloat16, by torch's old switches and its new ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_torch_version


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Multiply and convolve float32 in float32, where TF32 would keep 10 bits of each factor.

    Convolutions are in TF32 by torch's default, and matrix products with `TrainingArguments(tf32=True)`. Since 2.9
    torch has two sets of switches, and reading an old one raises if it disagrees with the new ones: for example
    `torch.backends.cudnn.flags(...)`, which CTC losses enter. So both sets agree inside; all are restored at exit.

    Example:
        >>> with ieee_float32(), torch.backends.cudnn.flags(enabled=False):
        ...     torch.get_float32_matmul_precision()
        'highest'
    """
    if not is_torch_version(">=", "2.9"):
        with _ieee_by_old_switches():
            yield
        return
    switches = _new_switches()
    values: list[str] = []
    for switch in switches:  # the more general first: the others inherit from it until it is "none"
        values.append(switch.fp32_precision)
        switch.fp32_precision = "none"
    matmul, convolutions_in_tf32 = torch.get_float32_matmul_precision(), _old_cudnn_switch()
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolutions_in_tf32
        for switch, value in zip(switches, values, strict=True):
            switch.fp32_precision = value


def _new_switches() -> list[Any]:
    """Return the objects with an `fp32_precision`: all backends, CUDA's, each kind of operation.

    Without `torch.backends.mkldnn` itself: up to torch 2.13 at least, setting it sets that of all backends.
    """
    backends: Any = torch.backends
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    operations = [backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]
    return [backends, cudnn, *operations]


def _old_cudnn_switch() -> bool:
    """Return `torch.backends.cudnn.allow_tf32`, which can only be read if both new switches agree with it."""
    cudnn: Any = torch.backends.cudnn
    cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "tf32"
    try:
        return cudnn.allow_tf32
    except RuntimeError:  # it disagrees
        return False


@contextmanager
def _ieee_by_old_switches() -> Iterator[None]:
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed
