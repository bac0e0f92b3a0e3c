# SPDX-License-Identifier: Apache-2.0
"""Low-precision linear layers in full precision, with the weights that training updates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn

from ..errors import MeasurementError


_UNSUPPORTED = {"transformer_engine": "Transformer Engine", "msamp": "MS-AMP"}
"""Libraries whose 8-bit layers are not `nn.Linear`, by module."""


@contextmanager
def plain_layers(model: nn.Module) -> Iterator[None]:
    """Make low-precision linear layers compute in full precision, and restore them at exit.

    torchao's 8-bit layers compute as `nn.Linear`: their weights are in full precision, and a loss rounded to 8 bits is
    a step function. The 4-bit layers of bitsandbytes keep the format of training: on some CPUs they would pack their
    weights into another one in eval mode.

    Raises:
        MeasurementError: If the model has layers of Transformer Engine or MS-AMP.

    Example:
        >>> with plain_layers(nn.Linear(2, 1)):
        ...     pass
    """
    changes = [(vars(module), _changes(name, module)) for name, module in model.named_modules()]
    originals = [{name: attrs[name] for name in change.keys() & attrs.keys()} for attrs, change in changes]
    try:
        for attributes, change in changes:
            attributes.update(change)
        yield
    finally:
        for (attributes, change), original in zip(changes, originals, strict=True):
            for name in change:
                del attributes[name]
            attributes.update(original)


def _changes(name: str, module: nn.Module) -> dict[str, Any]:
    """Return the attributes with which a layer computes in full precision."""
    library, _, inner = type(module).__module__.partition(".")
    if library in _UNSUPPORTED:
        raise MeasurementError("fp8_layer", layer=name, library=_UNSUPPORTED[library])
    if library == "torchao" and inner.startswith("float8") and isinstance(module, nn.Linear):
        return {"forward": MethodType(nn.Linear.forward, module)}
    if library == "bitsandbytes" and "support_avx512bf16_for_cpu" in vars(module):
        return {"support_avx512bf16_for_cpu": False}
    return {}
