# SPDX-License-Identifier: Apache-2.0
"""Takes the pictures of this folder from a report: `python docs/images/take.py out/demo/vision/optimizability`."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright


WIDTH = 1000
PICTURES = {  # first and last element of each, and how wide it is
    "report": ("header", "#loss .plot", WIDTH),
    "stability": ("#stability .charts", "#stability .charts", WIDTH),
    "curvature": ("#curvature .charts", "#curvature .charts", WIDTH),
    "blocks": ("#blocks h3", "#blocks .scroll", WIDTH // 2),
}


def take(page: Page, first: str, last: str, width: int) -> bytes:
    """Screenshot the page from the top of one element to the bottom of another, in few colours."""
    top, end = (page.locator(selector).first.bounding_box() for selector in (first, last))
    assert top is not None and end is not None
    clip = {"x": 0, "y": top["y"], "width": width, "height": end["y"] + end["height"] - top["y"] + 12}
    image = Image.open(io.BytesIO(page.screenshot(full_page=True, clip=clip))).convert("RGB")  # type: ignore[arg-type]
    small = io.BytesIO()
    image.quantize(128, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


def main() -> None:
    """Take all pictures."""
    with sync_playwright() as play, play.chromium.launch(executable_path=shutil.which("chromium")) as browser:
        page = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme="light")
        page.goto((Path(sys.argv[1]).resolve() / "report.html").as_uri())
        page.wait_for_selector("#density canvas")
        for name, place in PICTURES.items():
            Path(__file__).with_name(f"{name}.png").write_bytes(take(page, *place))


if __name__ == "__main__":
    main()
