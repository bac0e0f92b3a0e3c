# SPDX-License-Identifier: Apache-2.0
"""A stub of the Hub, the real client pointed at it within the tests' own process, and reports rendered once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from transformers.utils import hub as transformers_hub

from hf_optimizability import OptimizabilityReport
from hf_optimizability.publishing import hub_client
from hf_optimizability.report import figures
from tests.support.hub_stub import WRITER, HubStub, serve


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    """An empty Hub that the client takes for the real one, logged in as one who may write."""
    with serve({}) as stub:
        monkeypatch.setattr(constants, "ENDPOINT", stub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", stub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(transformers_hub, "_hf_api", None)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # once per process it asks what it runs in
        monkeypatch.setattr(hub_client, "WAITS", (0.01, 0.01))
        monkeypatch.setenv("HF_TOKEN", WRITER)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        huggingface_hub.close_session()
        yield stub
        huggingface_hub.close_session()


@pytest.fixture(autouse=True, scope="package")
def rendered_once() -> Iterator[None]:
    """Every push renders the report anew; here the same one once."""
    render = OptimizabilityReport.files
    rendered: dict[tuple[object, str], dict[str, bytes]] = {}

    def files(report: OptimizabilityReport) -> dict[str, bytes]:
        key = (figures.plot_all, json.dumps(report.to_dict()))  # some tests draw the plots, most don't
        if key not in rendered:
            if len(rendered) > 20:
                rendered.clear()
            rendered[key] = render(report)
        return dict(rendered[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OptimizabilityReport, "files", files)
        yield
