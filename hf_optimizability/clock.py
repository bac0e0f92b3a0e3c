# SPDX-License-Identifier: Apache-2.0
"""How long training takes, and how long its measurements."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Times training without what is measured in between.

    Args:
        trained: Seconds that the run had trained before this process took it up.
        measured: Seconds that it had measured.
    """

    def __init__(self, *, trained: float = 0.0, measured: float = 0.0):
        self._trained, self._measured_before = trained, measured
        self._begun = self._step_begun = time.perf_counter()
        self._measured = 0.0
        self._steps: list[float] = []

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside is no training."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._measured += time.perf_counter() - started

    def step_ended(self) -> None:
        """A step has ended, and the next one begins."""
        now = time.perf_counter()
        self._steps.append(now - self._step_begun)
        self._step_begun = now

    def go_on(self) -> None:
        """The next step begins now: what was done since the last one ended is no part of it."""
        self._step_begun = time.perf_counter()

    @property
    def step_seconds(self) -> float:
        """What a step takes, data loading included: the median, since the first ones warm up."""
        return statistics.median(self._steps)

    @property
    def train_seconds(self) -> float:
        """Time of training so far."""
        return self._trained + time.perf_counter() - self._begun - self._measured

    @property
    def overhead(self) -> float:
        """Time of the measurements so far, as a share of that of training."""
        return (self._measured_before + self._measured) / self.train_seconds
