# SPDX-License-Identifier: Apache-2.0
"""How long training takes, and how long its measurements."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


RECENT_STEPS = 255
"""How many of the last steps tell what a step takes. It is asked after each: the median of all takes ever longer."""


class Clock:
    """Times training without what is measured in between.

    Args:
        trained: Seconds that the run had trained before this process took it up.
        measured: Seconds that each of its measurements had taken.

    Attributes:
        measured: Seconds of each measurement so far, those that failed included.
    """

    def __init__(self, *, trained: float = 0.0, measured: Iterable[float] = ()):
        self.measured = list(measured)
        # As if all had been done by now.
        self._begun = time.perf_counter() - trained - sum(self.measured)
        self._step_begun = time.perf_counter()
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside is no training."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.measured.append(time.perf_counter() - started)

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
        """What a step takes, data loading included: the median of the recent ones, since the first ones warm up."""
        return statistics.median(self._steps)

    @property
    def train_seconds(self) -> float:
        """Time of training so far."""
        return time.perf_counter() - self._begun - sum(self.measured)

    @property
    def overhead(self) -> float:
        """Time of the measurements so far, as a share of that of training."""
        return sum(self.measured) / self.train_seconds
