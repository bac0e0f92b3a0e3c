# SPDX-License-Identifier: Apache-2.0
"""The optimizability report: its data, to JSON and back."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import finite, write_atomically
from ..measurement.results import Measurement, MeasurementFailure
from .schema import SCHEMA_VERSION, parse, upgraded


if TYPE_CHECKING:
    from .findings import Finding


@dataclass
class OptimizabilityReport:
    """Everything known about how a checkpoint optimized on a task.

    The report is data: it holds what was measured and what it was measured on, and knows how to become a file.

    Attributes:
        model: `id`, `class`, `parameters`, `trainable_parameters`, `batch_norm` (whether it has any).
        task: `task` (the head's task, from the model class), `loss` (whose loss was measured).
        data: `dataset` (its name), `train_examples`, `eval_examples`, `probe_examples`, `probe_items`,
            `probe_batches`, `probe_fingerprint`.
        training: `optimizer`, its settings, learning rate, batch size and the like; empty outside a Trainer.
        config: The `OptimizabilityConfig` in use.
        versions: Library versions.
        measurements: In the order of the steps.
        failures: Measurements that could not be made.
        dynamics: Results of the training dynamics, by name.
        log_history: The Trainer's log, from which the dynamics were computed and the plots are drawn.
        created: UTC time of writing, ISO 8601.
        schema_version: Layout of the JSON file.
    """

    model: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    failures: list[MeasurementFailure] = field(default_factory=list)
    dynamics: dict[str, Any] = field(default_factory=dict)
    log_history: list[dict[str, Any]] = field(default_factory=list)
    created: str = ""
    schema_version: int = SCHEMA_VERSION

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What the numbers say, worst first; computed from them each time."""
        from .findings import find

        return find(self)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain numbers, strings, lists and dicts; not-finite numbers become `None`."""
        measurements = [measurement.to_dict() for measurement in self.measurements]
        findings = [asdict(finding) for finding in self.findings]
        return finite({**asdict(self), "measurements": measurements, "findings": findings})

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> OptimizabilityReport:
        """Rebuilds a report from `to_dict`, of this version of the package or an earlier one.

        Raises:
            ValueError: If the data was written by a later version of this package, or is damaged.
        """
        data = upgraded(data)
        measurements = [Measurement.from_dict(measurement) for measurement in data["measurements"]]
        failures = [MeasurementFailure(**failure) for failure in data["failures"]]
        held = {key: value for key, value in data.items() if key != "findings"}  # computed anew from the rest
        return cls(**{**held, "measurements": measurements, "failures": failures})

    def save_json(self, folder: str | Path) -> Path:
        """Writes `report.json` alone; at any moment the file holds either the old report or the new one, whole.

        Returns:
            The file's path.
        """
        path = Path(folder) / "report.json"
        write_atomically(path, json.dumps(self.to_dict(), indent=1, allow_nan=False).encode())
        return path

    def save(self, folder: str | Path) -> Path:
        """Writes `report.json`, `report.md`, `report.html` and the plots into `folder`, each file atomically.

        Returns:
            The path of `report.md`.
        """
        from .markdown import to_markdown
        from .plots import plot_all

        folder = Path(folder)
        self.save_json(folder)
        plots = plot_all(self)
        for name, images in plots.items():
            for kind, image in images.items():
                write_atomically(folder / f"{name}.{kind}", image)
        write_atomically(folder / "report.html", self.to_html().encode())
        path = folder / "report.md"
        write_atomically(path, to_markdown(self, plots=list(plots)).encode())
        return path

    @classmethod
    def load(cls, path: str | Path) -> OptimizabilityReport:
        """Reads a report from `report.json` or the folder that holds it.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file was written by a later version of this package, is damaged or is no report; the
                message names the file, what is wrong and what to do.
        """
        path = Path(path)
        file = path / "report.json" if path.is_dir() else path
        try:
            return cls.from_dict(parse(file.read_bytes()))
        except ValueError as error:
            raise ValueError(f"{file} can't be read as a report. {error}") from None

    def to_html(self) -> str:
        """The report as one page that needs no other file and no network."""
        from .html import to_html

        return to_html(self)

    def summary(self) -> str:
        """The report in ten lines of plain text."""
        from .markdown import to_summary

        return to_summary(self)
