# SPDX-License-Identifier: Apache-2.0
"""Errors that a model's own backward pass raises."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager


_RUNS_BACKWARD = "_engine_run_backward"
"""The function of torch through which every backward pass is run."""


class BackwardError(RuntimeError):
    """An error of a backward pass, of whatever type."""


def raised_in_backward(error: BaseException) -> bool:
    """Return whether an error was raised in a backward pass.

    Example:
        >>> import torch
        >>> class Broken(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         return x.clone()
        ...     @staticmethod
        ...     def backward(ctx, gradient):
        ...         raise KeyError("a table")
        >>> try:
        ...     Broken.apply(torch.ones(1, requires_grad=True)).backward()
        ... except KeyError as error:
        ...     print(raised_in_backward(error))
        True
    """
    return any(frame.f_code.co_name == _RUNS_BACKWARD for frame, _ in traceback.walk_tb(error.__traceback__))


@contextmanager
def backward_errors_unified() -> Iterator[None]:
    """Raise any error of a backward pass inside as a `RuntimeError`, which autograd raises for a missing derivative.

    Raises:
        BackwardError: With the type and the message of the error, which is its cause.
    """
    try:
        yield
    except (RuntimeError, FloatingPointError):
        raise
    except Exception as error:
        if not raised_in_backward(error):
            raise
        raise BackwardError(f"{type(error).__name__}: {error}") from error
