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
    """Time training without what is measured in between.

    Make one where preparing the measurements starts, and call `begin` where training does.

    Args:
        trained: Seconds that the run had trained before this process took it up.
        measured: Seconds that each of its measurements had taken.

    Attributes:
        measured: Seconds of each measurement so far, those that failed included.
        borrowed: Seconds that this process has spent on measurements and on preparing them.
    """

    def __init__(self, *, trained: float = 0.0, measured: Iterable[float] = ()):
        self.measured = list(measured)
        self.borrowed = 0.0
        self._trained = trained
        self._made = self._since = self._step_begun = time.perf_counter()
        self._earlier = sum(self.measured)
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)

    def begin(self) -> None:
        """Training begins now: what was done since the clock was made, measurements included, prepared it."""
        self._since = self._step_begun = time.perf_counter()
        self._earlier = sum(self.measured)
        self.borrowed = self._since - self._made

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside is no training."""
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            self.measured.append(seconds)
            self.borrowed += seconds

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
        return self._trained + time.perf_counter() - self._since - (sum(self.measured) - self._earlier)

    @property
    def overhead(self) -> float:
        """Time of the measurements so far, as a share of that of training."""
        return sum(self.measured) / self.train_seconds
