# SPDX-License-Identifier: Apache-2.0
"""The optimizability report: its data, what follows from them, and the files that show both."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import finite, write_atomically
from ..report_data.data import ReportData
from ..report_data.published import published
from ..report_data.schema import parse


if TYPE_CHECKING:
    from typing_extensions import Self

    from ..diagnosis.findings import Diagnosis, Finding, RuleStatus, Verdict


class OptimizabilityReport(ReportData):
    """A report with the conclusions drawn from its data, and the files that show both; see `ReportData`."""

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What the numbers say, worst first; computed from them each time."""
        return self._diagnosis.findings

    @property
    def rules(self) -> tuple[RuleStatus, ...]:
        """What came of each rule: its finding's severity, fine, or why it could not be checked."""
        return self._diagnosis.rules

    @property
    def verdict(self) -> Verdict:
        """The conclusion in a sentence, with the one thing to do."""
        return self._diagnosis.verdict

    @property
    def _diagnosis(self) -> Diagnosis:
        from ..diagnosis.findings import diagnose

        return diagnose(self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts; not-finite numbers become `None`."""
        found = self._diagnosis
        derived = {
            "verdict": asdict(found.verdict),
            "findings": [asdict(finding) for finding in found.findings],
            "rules": [asdict(rule) for rule in found.rules],
        }
        return {**super().to_dict(), **finite(derived)}

    def published(self) -> Self:
        """Return the report as it is written and published: what the schema's marks allow; see docs/security.md."""
        return type(self).from_dict(published({**super().to_dict(), "findings": []}))

    def save_json(self, folder: str | Path) -> Path:
        """Write `report.json` alone; at any moment the file holds either the old report or the new one, whole.

        What is not meant for others is left out; see `published`.

        Returns:
            The file's path.
        """
        path = Path(folder) / "report.json"
        write_atomically(path, json.dumps(self.published().to_dict(), indent=1, allow_nan=False).encode())
        return path

    def save(self, folder: str | Path) -> Path:
        """Write `report.json`, `report.md`, `report.html` and the plots into `folder`, each file atomically.

        What is not meant for others is left out; see `published`.

        Returns:
            The path of `report.md`.
        """
        folder = Path(folder)
        for name, content in self.published().files().items():
            write_atomically(folder / name, content)
        return folder / "report.md"

    def files(self) -> dict[str, bytes]:
        """Return the files that show the report, by name."""
        from .figures import plot_all
        from .markdown import to_markdown

        plots = plot_all(self)
        return {
            "report.json": json.dumps(self.to_dict(), indent=1, allow_nan=False).encode(),
            **{f"{name}.{kind}": image for name, images in plots.items() for kind, image in images.items()},
            "report.html": self.to_html().encode(),
            "report.md": to_markdown(self, plots=list(plots)).encode(),
        }

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a report from `report.json` or the folder that holds it.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file was written by a later version of this package, is damaged or is not a report; the
                message names the file, what is wrong and what to do.
        """
        path = Path(path)
        file = path / "report.json" if path.is_dir() else path
        try:
            return cls.from_dict(parse(file.read_bytes()))
        except ValueError as error:
            raise ValueError(f"{file} can't be read as a report. {error}") from None

    def to_html(self) -> str:
        """Return the report as one page that needs no other file and no network."""
        from .html import to_html

        return to_html(self)

    def summary(self) -> str:
        """Return the report in ten lines of plain text."""
        from .markdown import to_summary

        return to_summary(self)
