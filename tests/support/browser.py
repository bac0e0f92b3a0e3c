# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium that shows a page and records its errors and requests."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip(
            "No Chromium on this machine: install it (Debian: apt-get install chromium) to test the page in it."
        )
    from playwright.sync_api import sync_playwright

    quiet = ["disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
    quiet += ["no-sandbox", "disable-component-update", "disable-sync"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=[f"--{flag}" for flag in quiet])
        yield chromium
        chromium.close()


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens a page and gives it back; in the end there was no error, and no request but for the page itself."""
    contexts, troubles, requests = [], [], []

    def show(html: str, *, size: dict[str, int] = DESKTOP, scheme: str = "light", errors: bool = False) -> Any:
        file = tmp_path / "report.html"
        file.write_text(html, encoding="utf-8")
        context = browser.new_context(viewport=size, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        if not errors:
            page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: troubles.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.as_uri())
        return page

    yield show
    for context in contexts:
        context.close()
    assert troubles == []
    assert set(requests) == {(tmp_path / "report.html").as_uri()}
