# SPDX-License-Identifier: Apache-2.0
"""Pretends that whole parameters do not fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hf_optimizability.distributed import fsdp


@contextmanager
def little_memory() -> Iterator[None]:
    """Whole parameters do not fit."""
    free, fsdp.free_memory = fsdp.free_memory, lambda device: 1
    try:
        yield
    finally:
        fsdp.free_memory = free
