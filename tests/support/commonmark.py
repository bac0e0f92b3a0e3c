# SPDX-License-Identifier: Apache-2.0
"""Markdown read back with a parser that knows nothing of how it was written."""

from __future__ import annotations

from markdown_it import MarkdownIt
from markdown_it.token import Token


HOSTILE = "a|b <script>alert(1)</script> `c` *d* __e__ [f](http://g) ![h](i) $j$ ~~k~~ &lt; \\| \n# l\n\n- m\x1b[31m"


def parse(text: str) -> list[Token]:
    """The document's tokens, inline ones in place of their container."""
    blocks = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)
    return [token for block in blocks for token in (block.children if block.children is not None else [block])]
