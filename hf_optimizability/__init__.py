# SPDX-License-Identifier: Apache-2.0
"""Measures how well a checkpoint optimizes while the Transformers `Trainer` fine-tunes it."""

from typing import TYPE_CHECKING, Any

from .callback import OptimizabilityCallback
from .configuration import OptimizabilityConfig
from .forecast import Forecast, forecast
from .measure import measure
from .measurement import Measurement, MeasurementError
from .report import OptimizabilityReport


if TYPE_CHECKING:
    from .trainer import OptimizabilityTrainer, OptimizabilityTrainerMixin

__version__ = "0.1.0"

__all__ = [
    "Forecast",
    "Measurement",
    "MeasurementError",
    "OptimizabilityCallback",
    "OptimizabilityConfig",
    "OptimizabilityReport",
    "OptimizabilityTrainer",
    "OptimizabilityTrainerMixin",
    "forecast",
    "measure",
]


def __getattr__(name: str) -> Any:
    # `transformers.Trainer` imports `datasets`; only those who use the Trainer subclass pay for that.
    if name in ("OptimizabilityTrainer", "OptimizabilityTrainerMixin"):
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
