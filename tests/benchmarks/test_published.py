# SPDX-License-Identifier: Apache-2.0
"""The published table is what the reports in `model_cards/` say."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import published
import pytest

from hf_optimizability.publishing.model_card import with_report
from hf_optimizability.report import OptimizabilityReport


CARDS = published.ROOT / "model_cards"
FOLDERS = sorted(path.parent for path in CARDS.glob("*/settings.json"))
SOURCES = json.loads((CARDS / "sources.json").read_text())


def test_the_page_is_what_the_reports_say():
    assert published.PAGE.read_text(encoding="utf-8") == published.page(CARDS)


def test_it_holds_the_numbers_of_every_report():
    """Read from the JSON itself."""
    rows = re.findall(r"^\| ([^|]+) \| (\S+) \| ([\d,]+) \| ([\d.e-]+) \|", published.PAGE.read_text(), flags=re.M)
    expected = []
    for folder in FOLDERS:
        report = json.loads((folder / "optimizability" / "report.json").read_text())
        for measurement in (report["measurements"][0], report["measurements"][-1]):
            names = [name.replace("_", r"\_") for name in (report["model"]["id"], report["data"]["dataset"])]
            expected.append((*names, measurement["step"], pytest.approx(measurement["loss"], rel=1e-3)))
    assert [(model, data, int(step), float(loss)) for model, data, step, loss in rows] == expected


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
class TestCards:
    def test_the_section_and_the_metrics_are_those_of_the_report(self, folder: Path):
        card = (folder / "README.md").read_text(encoding="utf-8")
        report = OptimizabilityReport.load(folder / "optimizability")
        files = [path.name for path in (folder / "optimizability").iterdir()]
        assert with_report(card, report, name=folder.name, files=files) == card

    def test_every_link_leads_somewhere(self, folder: Path):
        for page in (folder / "README.md", folder / "optimizability" / "report.md"):
            for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
                assert link.startswith("https://") or (page.parent / link).exists(), link

    def test_names_no_place(self, folder: Path):
        for path in folder.rglob("*"):
            if path.suffix in (".md", ".json", ".html"):
                text = path.read_text(encoding="utf-8")
                assert not re.search(r"(?<![\w.])/(work|root|home|tmp|Users)/", text), path.name

    def test_checkpoint_and_data_have_a_source(self, folder: Path):
        report = OptimizabilityReport.load(folder / "optimizability")
        assert set(published.origins(report)) <= SOURCES.keys()


@pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if source["origin"].startswith("../")])
def test_what_is_carried_has_the_published_hash(name: str):
    file = CARDS / SOURCES[name]["origin"] / SOURCES[name]["file"]
    assert hashlib.sha256(file.read_bytes()).hexdigest() == SOURCES[name]["sha256"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_each_of_them_is_small(folder: Path):
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 1_000_000
