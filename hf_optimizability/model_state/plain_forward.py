# SPDX-License-Identifier: Apache-2.0
"""Forward passes without what prevents second derivatives: the model's own autocast and reentrant checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils import checkpoint as checkpoints

from ..errors import MeasurementError


@contextmanager
def without_autocast() -> Iterator[None]:
    """Disable `torch.autocast` inside the model too, so that the loss is measured in full precision.

    Derivatives in bfloat16 are neither symmetric nor smooth enough for differences.

    Raises:
        MeasurementError: If a forward pass fails without it.

    Example:
        >>> with without_autocast(), torch.autocast("cpu", dtype=torch.bfloat16):
        ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
        torch.float32
    """
    disabled: list[torch.autocast] = []

    def enter(autocast: torch.autocast) -> torch.autocast:
        if autocast._enabled:
            disabled[:] = [autocast]
        return autocast

    with (
        patch.object(torch.autocast, "__enter__", enter),
        patch.object(torch.autocast, "__exit__", lambda autocast, *error: False),
    ):
        try:
            yield
        except RuntimeError as error:
            if disabled and "dtype" in str(error) and not isinstance(error, MeasurementError):
                raise MeasurementError("needs_autocast", error=error) from error
            raise


@contextmanager
def nonreentrant_checkpoints() -> Iterator[None]:
    """Make `torch.utils.checkpoint(use_reentrant=True)` do what `use_reentrant=False` does.

    Reentrant checkpoints support only `.backward()`, neither `torch.autograd.grad` nor second derivatives. As with
    them, nothing inside has a gradient unless an input has one.

    Example:
        >>> x = torch.ones(1, requires_grad=True)
        >>> with nonreentrant_checkpoints():
        ...     y = checkpoints.checkpoint(torch.sin, x, use_reentrant=True)
        ...     round(float(torch.autograd.grad(y, x)[0]), 4)
        0.5403
    """
    with patch.object(checkpoints, "CheckpointFunction", _NonReentrant):
        yield


class _NonReentrant:
    """A replacement for `torch.utils.checkpoint.CheckpointFunction`."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        if not any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            with torch.no_grad():
                return function(*args)
        return checkpoints.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)
