# SPDX-License-Identifier: Apache-2.0
"""`hf-optimizability push` with the real client against a Hub on the loopback interface."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_optimizability.cli import app
from tests.support.example_report import make_report
from tests.support.hub_stub import READER, WRITER, HubStub


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    make_report(1).save(folder)
    return str(folder)


def test_push_prints_where_the_commit_is(hub: HubStub, folder: str) -> None:
    result = CliRunner().invoke(app, ["push", folder, "ada/new", "--private"])
    repository = hub.repositories["ada/new"]
    assert (result.exit_code, result.stdout) == (0, f"{hub.url}/ada/new/commit/{repository.commits[-1].sha}\n")
    assert repository.private
    assert repository.files["optimizability/report.json"] == Path(folder, "report.json").read_bytes()


def test_push_as_a_pull_request_for_machines(hub: HubStub, folder: str) -> None:
    CliRunner().invoke(app, ["push", folder, "ada/new"])
    make_report(2).save_json(folder)
    result = CliRunner().invoke(app, ["push", folder, "ada/new", "--create-pr", "--json"])
    assert json.loads(result.stdout) == {"url": f"{hub.url}/ada/new/discussions/1"}


@pytest.mark.parametrize(
    ("words", "token", "message"),
    [
        (["ada/new"], READER, "The token does not allow that"),
        (["ada/new"], "", "Log in with `hf auth login`"),
        (["ada/new", "--revision", "nowhere"], WRITER, "Create the branch first"),
        (["not a name"], WRITER, "not the name of a repository"),
    ],
)
def test_a_push_that_fails_ends_with_1_and_shows_no_token(
    words: list[str], token: str, message: str, hub: HubStub, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--revision" in words:
        CliRunner().invoke(app, ["push", folder, "ada/new"])
    monkeypatch.setenv("HF_TOKEN", token)
    result = CliRunner().invoke(app, ["push", folder, *words])
    assert result.exit_code == 1 and result.stderr.startswith("Error: ")
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not token or token not in result.output


def test_a_folder_without_a_report(hub: HubStub, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["push", str(tmp_path), "ada/new"])
    assert result.exit_code == 1 and "There is no report.json in" in result.stderr
    assert not hub.requests
