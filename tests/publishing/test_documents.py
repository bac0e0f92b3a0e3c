# SPDX-License-Identifier: Apache-2.0
"""The snippets of the pages about publishing, run in their order against a Hub on the loopback interface."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from hf_optimizability.publishing.model_card import END, START
from tests.support.example_report import make_report
from tests.support.hub_stub import HubStub, Repository


ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the snippets run: with a report, and a card."""
    make_report(2).save_json(tmp_path / "out/optimizability")
    (tmp_path / "README.md").write_text("# Mine\n")
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    monkeypatch.chdir(tmp_path)


def run(page: str) -> None:
    snippets = re.findall(r"^```py(?:thon)?\n(.*?)^```", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    assert snippets
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(compile(snippet, page, "exec"), names)


def test_publish(hub: HubStub, capsys: pytest.CaptureFixture[str]):
    hub.repositories["grace/her-model"] = Repository.of({"README.md": b"# Hers\n"})
    run("docs/publish.md")
    printed = capsys.readouterr().out
    mine, hers = hub.repositories["ada/my-model"], hub.repositories["grace/her-model"]
    assert printed.startswith(
        f"{hub.url}/ada/my-model/commit/{mine.commits[-1].sha}\n{hub.url}/grace/her-model/discussions/1\n"
    )
    assert "optimizability/report.json" in hers.branches["refs/pr/1"][-1].files
    assert "# Mine\n\n<!-- optimizability:start -->\n## Optimizability\n" in printed


def test_model_cards(capsys: pytest.CaptureFixture[str]):
    run("model_cards/README.md")
    assert "\n## Optimizability\n" in capsys.readouterr().out


def test_the_template_is_a_card():
    text = (ROOT / "model_cards/template.md").read_text()
    card = ModelCard(text.replace("{{ card_data }}", "license: mit").replace("{{ model_name }}", "Name"))
    assert card.data.license == "mit"
    assert text.index(START) < text.index(END)


def test_the_page_tells_what_there_is():
    """Messages and names in the page are those of the code."""
    page = (ROOT / "docs/publish.md").read_text()
    code = (ROOT / "hf_optimizability/publishing/hub_client.py").read_text().lower()
    messages = re.findall(r"^\| ([a-z][^|(]*?) \(", page.split("## When it fails")[1], flags=re.MULTILINE)
    assert len(messages) == 9
    for message in messages:
        assert message.lower() in code
