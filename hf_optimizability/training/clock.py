# SPDX-License-Identifier: Apache-2.0
"""Time of training, of its steps, and of its measurements."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


RECENT_STEPS = 255
"""How many of the last steps the time of a step is estimated from. It is needed after each step, and the median of all
would take ever longer."""


class StepTimer:
    """Time optimizer steps, data loading included, without what is done between them.

    Attributes:
        seconds: Time of all steps so far.
        recent: Time of each of the last steps.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._step_began = time.perf_counter()

    def restart(self) -> None:
        """Start a step now: the time since the last step ended does not count."""
        self._step_began = time.perf_counter()

    def step_ended(self) -> None:
        """End a step and begin the next one."""
        now = time.perf_counter()
        self.recent.append(now - self._step_began)
        self.seconds += self.recent[-1]
        self._step_began = now

    @property
    def step_seconds(self) -> float:
        """Time of a step: the median of the recent ones, since the first ones warm up."""
        return statistics.median(self.recent)


class Clock(StepTimer):
    """Time training without the measurements made in between.

    Create it where the preparation of measurements starts, and call `begin` where training does.

    Args:
        trained: Seconds of training before a resumed run was interrupted.
        measured: Seconds of each measurement made until then.

    Attributes:
        measured: Seconds of each measurement so far, including failed ones.
        borrowed: Seconds that this process has spent on measurements and on preparing them.
    """

    def __init__(self, *, trained: float = 0.0, measured: Iterable[float] = ()):
        super().__init__()
        self.measured = list(measured)
        self.borrowed = 0.0
        self._trained = trained
        self._created = self._began = self._step_began
        self._measured_before = sum(self.measured)

    def begin(self) -> None:
        """Start training now: all time since the clock was created, measurements included, counts as preparation."""
        self.restart()
        self._began = self._step_began
        self._measured_before = sum(self.measured)
        self.borrowed = self._began - self._created

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the enclosed time from training time."""
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            self.measured.append(seconds)
            self.borrowed += seconds

    @property
    def train_seconds(self) -> float:
        """Time of training so far."""
        measured = sum(self.measured) - self._measured_before
        return self._trained + time.perf_counter() - self._began - measured

    @property
    def overhead(self) -> float:
        """Time of the measurements so far, as a share of that of training."""
        return sum(self.measured) / self.train_seconds
