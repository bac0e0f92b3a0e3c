# SPDX-License-Identifier: Apache-2.0
"""Trainings that are measured every two steps, saved, and stopped from outside."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from tests.support.tiny_training import QUICK as QUICK


STEPS = {"measure_strategy": "steps", "measure_steps": 2}


SAVES = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}


class StoppedError(Exception):
    """The run was stopped from outside."""


class StopBefore(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise StoppedError
