# SPDX-License-Identifier: Apache-2.0
"""Low-precision linear layers in the form that is measured: full precision, and the weights as training has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn

from ..errors import MeasurementError


_OTHERS = {"transformer_engine": "Transformer Engine", "msamp": "MS-AMP"}
"""Libraries of 8-bit layers that are no `nn.Linear`, by their modules."""


@contextmanager
def plain_layers(model: nn.Module) -> Iterator[None]:
    """Let low-precision linear layers multiply plainly inside.

    torchao's 8-bit layers multiply as `nn.Linear`, as those under autocast do: their weights are in full precision,
    and rounded to 8 bits a loss is a staircase. The 4-bit layers of bitsandbytes keep their weights as they train: on
    some CPUs they pack them into another format in eval mode.

    Raises:
        MeasurementError: If the model has layers of Transformer Engine or MS-AMP, whose plain form is not known.

    Example:
        >>> with plain_layers(nn.Linear(2, 1)):
        ...     pass
    """
    changes = [(vars(module), _changes(name, module)) for name, module in model.named_modules()]
    held = [{name: attributes[name] for name in change.keys() & attributes.keys()} for attributes, change in changes]
    try:
        for attributes, change in changes:
            attributes.update(change)
        yield
    finally:
        for (attributes, change), before in zip(changes, held, strict=True):
            for name in change:
                del attributes[name]
            attributes.update(before)


def _changes(name: str, module: nn.Module) -> dict[str, Any]:
    """Return the attributes by which a layer multiplies plainly."""
    library, _, inner = type(module).__module__.partition(".")
    if library in _OTHERS:
        raise MeasurementError(
            f"`{name}` is a layer of {_OTHERS[library]}, which multiplies in 8-bit floating point: its loss is a "
            "staircase, whose gradient is not its slope.",
            "Train in FP8 with torchao (accelerate's `fp8_backend: AO`), whose layers are measured in full "
            "precision, or measure a copy of the model with `nn.Linear` layers.",
        )
    if library == "torchao" and inner.startswith("float8") and isinstance(module, nn.Linear):
        return {"forward": MethodType(nn.Linear.forward, module)}
    if library == "bitsandbytes" and "support_avx512bf16_for_cpu" in vars(module):
        return {"support_avx512bf16_for_cpu": False}
    return {}
