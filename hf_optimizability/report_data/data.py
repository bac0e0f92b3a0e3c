# SPDX-License-Identifier: Apache-2.0
"""The data of a report, to plain data and back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..files import finite
from ..measurement.results import Measurement, MeasurementFailure
from ..serialization import structure
from .provenance import DataInfo, ModelInfo, TaskInfo
from .schema import SCHEMA_VERSION, upgraded


if TYPE_CHECKING:
    from typing_extensions import Self


DERIVED = ("verdict", "findings", "rules")
"""What JSON holds that follows from the rest."""


@dataclass
class ReportData:
    """The data of a report on how a checkpoint optimized on a task.

    `OptimizabilityReport` adds conclusions and writes files.

    Attributes:
        model: The model that was trained.
        task: Its task, and whose loss was measured.
        data: Name and sizes of the data.
        training: Optimizer, its settings, learning rate, batch size and the like, as the Trainer and the optimizer
            name them; empty outside a Trainer.
        config: The options of `OptimizabilityConfig` in use, by name, as the version that measured had them.
        versions: Library versions.
        measurements: In the order of the steps.
        failures: Measurements that could not be made.
        dynamics: Results of the training dynamics, by name.
        log_history: The Trainer's log, from which the dynamics were computed and the plots are drawn.
        created: UTC time of writing, ISO 8601.
        schema_version: Layout of the JSON file.
    """

    model: ModelInfo = field(default_factory=ModelInfo)
    task: TaskInfo = field(default_factory=TaskInfo)
    data: DataInfo = field(default_factory=DataInfo)
    training: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    failures: list[MeasurementFailure] = field(default_factory=list)
    dynamics: dict[str, Any] = field(default_factory=dict)
    log_history: list[dict[str, Any]] = field(default_factory=list)
    created: str = ""
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts; not-finite numbers become `None`."""
        results = {
            "measurements": [measurement.to_dict() for measurement in self.measurements],
            "failures": [failure.to_dict() for failure in self.failures],
        }
        provenance = {"model": self.model.to_dict(), "data": self.data.to_dict()}
        return finite({**asdict(replace(self, measurements=[], failures=[])), **provenance, **results})

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Rebuild a report from `to_dict`, of this version of the package or an earlier one.

        Raises:
            ValueError: If the data was written by a later version of this package, or is damaged.
        """
        data = upgraded(data)
        return structure(cls, {name: value for name, value in data.items() if name not in DERIVED})
