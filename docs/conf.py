# SPDX-License-Identifier: Apache-2.0
"""How `make docs` builds these pages: Sphinx, with the repository as its source, so that links work as on GitHub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from hf_optimizability import __version__


project = "hf_optimizability"
copyright = "the hf_optimizability authors, Apache-2.0"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "model_cards/README.md",
    "benchmarks/results/*.md",
]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 3

html_theme = "furo"  # brings its own fonts and scripts: the pages need no network
html_title = f"hf_optimizability {release}"
html_copy_source = False

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_ivar = True
python_maximum_signature_line_length = 88

LINK = re.compile(r"\[([^\]]+)\]\(([^):#]+)(?:#[^)]*)?\)")
LISTED = re.compile(r"^(?:- |\| )\[([^\]]+)\]\(([^)#]+)\.md\)", flags=re.MULTILINE)


def add_contents(app: Sphinx, name: str, source: list[str]) -> None:
    """List in the sidebar what an index lists, section by section."""
    if not name.endswith("index"):
        return
    for section in source[0].split("\n## "):
        if listed := LISTED.findall(section):
            caption = f":caption: {section.splitlines()[0]}\n" if name == root_doc else ""
            pages = "\n".join(f"{title} <{path}>" for title, path in listed)
            source[0] += f"\n```{{toctree}}\n:hidden:\n{caption}\n{pages}\n```\n"


def keep_links_within(app: Sphinx, name: str, source: list[str]) -> None:
    """Reduce links to folders, and to Markdown outside of the pages, to their text; they work on GitHub alone."""

    def kept(link: re.Match[str]) -> str:
        path = Path(os.path.normpath(Path(app.srcdir, name).parent / link[2]))
        page = path.relative_to(app.srcdir).with_suffix("").as_posix()
        stays = not path.is_dir() and (path.suffix != ".md" or not path.exists() or page in app.env.found_docs)
        return link[0] if stays else link[1]

    source[0] = LINK.sub(kept, source[0])


def as_restructured_text(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Translate `code` as in Markdown, and [`links`] as Transformers writes them."""
    lines[:] = re.sub(r"\[?(?<!`)`~?([^`]+)`(?!`)\]?", r"``\1``\\ ", "\n".join(lines)).splitlines()


def setup(app: Sphinx) -> None:
    """Register the functions above with Sphinx."""
    app.connect("source-read", add_contents)
    app.connect("source-read", keep_links_within)
    app.connect("autodoc-process-docstring", as_restructured_text, priority=400)
