# SPDX-License-Identifier: Apache-2.0
"""Measures how well a checkpoint optimizes while the Transformers `Trainer` fine-tunes it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .comparing.comparison import Comparison as Comparison
    from .comparing.runner import compare as compare
    from .config import OptimizabilityConfig as OptimizabilityConfig
    from .errors import MeasurementError as MeasurementError
    from .measurement.forecast import Forecast as Forecast
    from .measurement.forecast import forecast as forecast
    from .measurement.measure import measure as measure
    from .measurement.results import Measurement as Measurement
    from .report import OptimizabilityReport as OptimizabilityReport
    from .training.callback import OptimizabilityCallback as OptimizabilityCallback
    from .training.trainer import OptimizabilityTrainer as OptimizabilityTrainer
    from .training.trainer import OptimizabilityTrainerMixin as OptimizabilityTrainerMixin

__version__ = "0.1.0"

_MODULES = {
    "Comparison": "comparing.comparison",
    "Forecast": "measurement.forecast",
    "Measurement": "measurement.results",
    "MeasurementError": "errors",
    "OptimizabilityCallback": "training.callback",
    "OptimizabilityConfig": "config",
    "OptimizabilityReport": "report",
    "OptimizabilityTrainer": "training.trainer",
    "OptimizabilityTrainerMixin": "training.trainer",
    "compare": "comparing.runner",
    "forecast": "measurement.forecast",
    "measure": "measurement.measure",
}
"""Where each public name is defined."""

__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    # torch and Transformers take seconds to import, and `--help` needs neither.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
