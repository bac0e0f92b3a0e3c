# SPDX-License-Identifier: Apache-2.0
"""When the automatic schedule measures, on made-up clocks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from hf_optimizability import OptimizabilityCallback, OptimizabilityConfig
from hf_optimizability.training.clock import RECENT_STEPS, Clock
from hf_optimizability.training.schedule import affordable
from tests.support import tiny_training


def measured_steps(
    max_steps: int, *, price: Callable[[int], float], step_seconds: float = 1.0, budget: float = 0.05
) -> tuple[list[int], float]:
    """Steps measured in a run whose measurements cost `price(step)` seconds, and the overhead of it all.

    What comes after the last one costs as much again.
    """
    steps, seconds = [0], [price(0)]
    for step in range(1, max_steps):
        options = {"max_steps": max_steps, "budget": budget, "step_seconds": step_seconds}
        if affordable(step, measured_seconds=seconds, **options):
            steps.append(step)
            seconds.append(price(step))
    return [*steps, max_steps], (sum(seconds) + 2 * price(max_steps)) / (max_steps * step_seconds)


@pytest.mark.parametrize("price", [0.5, 3.0, 10.0, 16.0])
def test_stays_within_the_budget_and_uses_it(price: float):
    steps, overhead = measured_steps(1000, price=lambda step: price)
    assert overhead <= 0.05
    assert overhead + 2 * price / 1000 > 0.05  # one more might not have fitted
    assert len(steps) == max(2, int(50 / price) - 2)


def test_measures_most_often_at_first():
    steps, _ = measured_steps(1000, price=lambda step: 5.0)
    gaps = [later - earlier for earlier, later in pairwise(steps)]
    assert gaps == sorted(gaps) and len(gaps) == 7 and gaps[0] < 25 < 200 < gaps[-1]


def test_a_short_run_is_measured_at_both_ends_alone():
    steps, overhead = measured_steps(100, price=lambda step: 5.0)
    assert steps == [0, 100] and overhead == 0.15


def test_prices_that_rise_do_not_break_the_budget():
    _, overhead = measured_steps(1000, price=lambda step: 2.0 + step / 250)
    assert overhead <= 0.05


@pytest.mark.usefixtures("quickly")
def test_the_callback_goes_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Steps of a minute, as it seems, pay for measurements in between."""
    options = {"probe_examples": 4, "max_hvps": 16, "overhead_budget": 0.5, "pool_examples": 0}
    rare, often = (OptimizabilityCallback(OptimizabilityConfig(**options)) for _ in range(2))
    tiny_training.trainer(tmp_path, callbacks=[rare], max_steps=8).train()
    assert [measurement.step for measurement in rare.report.measurements] == [0, 8]
    monkeypatch.setattr("hf_optimizability.training.clock.Clock.step_seconds", 60.0)
    tiny_training.trainer(tmp_path, callbacks=[often], max_steps=8).train()
    assert len(often.report.measurements) > 4
    assert often.report.training["overhead"] > 0


def test_what_failed_at_the_start_is_not_tried_again_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A failure is cheap, so that there would be time for one after each step."""

    def fail(*args: object) -> None:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr("hf_optimizability.training.clock.Clock.step_seconds", 60.0)
    monkeypatch.setattr("hf_optimizability.measurement.measure.gradient", fail)
    callback = OptimizabilityCallback(OptimizabilityConfig(probe_examples=4, max_hvps=16, pool_examples=0))
    tiny_training.trainer(tmp_path, callbacks=[callback], max_steps=8).train()
    assert [failure.step for failure in callback.report.failures] == [0, 8]


def test_a_measurement_that_raises_is_timed_as_well(monkeypatch: pytest.MonkeyPatch):
    seconds = iter([0.0, 10.0, 13.0, 20.0])
    monkeypatch.setattr("hf_optimizability.training.clock.time.perf_counter", lambda: next(seconds))
    clock = Clock()
    with pytest.raises(RuntimeError), clock.paused():
        raise RuntimeError
    assert clock.measured == [3.0] and clock.train_seconds == 17.0


def test_a_clock_goes_on_where_another_stopped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hf_optimizability.training.clock.time.perf_counter", lambda: 50.0)
    clock = Clock(trained=200.0, measured=[4.0, 6.0])
    assert clock.train_seconds == 200.0 and clock.overhead == 0.05


def test_what_a_step_takes_is_told_by_the_recent_ones(monkeypatch: pytest.MonkeyPatch):
    """However long the run: the median of all its steps, taken after each, came to cost more than the measurements."""
    now = [0.0]
    monkeypatch.setattr("hf_optimizability.training.clock.time.perf_counter", lambda: now[0])
    clock = Clock()
    for seconds in [9.0] + [1.0] * 300 + [2.0] * RECENT_STEPS:
        now[0] += seconds
        clock.step_ended()
    assert clock.step_seconds == 2.0
