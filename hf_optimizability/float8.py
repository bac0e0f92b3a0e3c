# SPDX-License-Identifier: Apache-2.0
"""Linear layers that multiply in 8-bit floating point, measured in full precision like those under autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

from torch import nn

from .measurement import MeasurementError


_OTHERS = {"transformer_engine": "Transformer Engine", "msamp": "MS-AMP"}
"""Libraries of 8-bit layers that are no `nn.Linear`, by their modules."""


@contextmanager
def full_precision_linears(model: nn.Module) -> Iterator[None]:
    """Let torchao's 8-bit linear layers multiply as `nn.Linear` inside: their weights are in full precision.

    Rounded to 8 bits, a loss is a staircase, and its gradient is not its slope.

    Raises:
        MeasurementError: If the model has layers of Transformer Engine or MS-AMP, whose plain form is not known.

    Example:
        >>> with full_precision_linears(nn.Linear(2, 1)):
        ...     pass
    """
    replaced = []
    for name, module in model.named_modules():
        library, _, inner = type(module).__module__.partition(".")
        if library in _OTHERS:
            raise MeasurementError(
                f"`{name}` is a layer of {_OTHERS[library]}, which multiplies in 8-bit floating point: its loss is a "
                "staircase, whose gradient is not its slope.",
                "Train in FP8 with torchao (accelerate's `fp8_backend: AO`), whose layers are measured in full "
                "precision, or measure a copy of the model with `nn.Linear` layers.",
            )
        if library == "torchao" and inner.startswith("float8") and isinstance(module, nn.Linear):
            replaced.append(module)
    held = [vars(module).get("forward") for module in replaced]
    try:
        for module in replaced:
            vars(module)["forward"] = MethodType(nn.Linear.forward, module)
        yield
    finally:
        for module, forward in zip(replaced, held, strict=True):
            if forward is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = forward
