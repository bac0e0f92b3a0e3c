# SPDX-License-Identifier: Apache-2.0
"""A comparison: its data, and the files that show it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import write_atomically
from ..report_data.schema import parse
from .pages import to_html, to_markdown, to_summary
from .results import ComparisonData


if TYPE_CHECKING:
    from typing_extensions import Self


class Comparison(ComparisonData):
    """Candidates fine-tuned under one equal budget, as files and pages; see `ComparisonData`."""

    def save(self, folder: str | Path) -> Path:
        """Write `comparison.json`, `comparison.md` and `comparison.html` into `folder`, each file atomically.

        What is not meant for others is left out; see `published`.

        Returns:
            The path of `comparison.html`.
        """
        folder = Path(folder)
        shown = self.published()
        content = {
            "json": json.dumps(shown.to_dict(), allow_nan=False),
            "md": shown.to_markdown(),
            "html": shown.to_html(),
        }
        for kind, text in content.items():
            write_atomically(folder / f"comparison.{kind}", text.encode())
        return folder / "comparison.html"

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a comparison from `comparison.json` or the folder that holds it.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not a comparison of this version of the package; the message names the file.
        """
        path = Path(path)
        file = path / "comparison.json" if path.is_dir() else path
        try:
            return cls.from_dict(parse(file.read_bytes()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} can't be read as a comparison. {error}") from None

    def to_markdown(self) -> str:
        """Return the comparison as GitHub-flavoured Markdown."""
        return to_markdown(self)

    def to_html(self) -> str:
        """Return the comparison as one page that needs no other file and no network."""
        return to_html(self)

    def summary(self) -> str:
        """Return the ranking as plain text, a line for each candidate."""
        return to_summary(self)
