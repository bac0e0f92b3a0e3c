# SPDX-License-Identifier: Apache-2.0
"""Measures how well a checkpoint optimizes while the Transformers `Trainer` fine-tunes it."""

import sys
from importlib import import_module
from types import ModuleType
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
    "Forecast": "forecast",
    "Measurement": "measurement",
    "MeasurementError": "measurement",
    "OptimizabilityCallback": "callback",
    "OptimizabilityConfig": "configuration",
    "OptimizabilityReport": "report",
    "OptimizabilityTrainer": "trainer",
    "OptimizabilityTrainerMixin": "trainer",
    "compare": "comparing.running",
    "forecast": "forecast",
    "measure": "measure",
}
"""Where each public name is defined."""

__all__ = [*_MODULES]


class _Package(ModuleType):
    """Loads a public name when it is first used: torch and Transformers take seconds, and `--help` needs neither."""

    def __getattr__(self, name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing `.measure` or `.forecast` would put the module where the function of that name belongs.
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *__all__]


sys.modules[__name__].__class__ = _Package
