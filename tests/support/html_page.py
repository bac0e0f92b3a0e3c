# SPDX-License-Identifier: Apache-2.0
"""The page read back with Python's HTML parser, which knows nothing of how it was written."""

from __future__ import annotations

from html.parser import HTMLParser


class Page(HTMLParser):
    """What a page holds.

    Attributes:
        tags: Names of its elements.
        scripts: How many script elements.
        events: Attributes that would run something.
        ids: All ids, in order.
        links: All addresses.
        headings: Level and text.
        tables: Text of every cell, by label of the table, and row.
        title: Text of the title element.
        text: All text but scripts' and styles'.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.scripts = 0
        self.events: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.headings: list[tuple[int, str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.title = self.text = ""
        self._open: list[str] = []
        self._label = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.scripts += tag == "script"
        self.events += [name for name in values if name.startswith("on") or name == "style"]
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values[name] for name in ("href", "src", "action") if name in values]
        if tag not in ("meta", "br", "img", "link", "input"):
            self._open.append(tag)
        if tag == "div" and values.get("role") == "region":
            self._label = values["aria-label"].removeprefix("Table: ")
        elif tag == "table":
            self.tables[self._label] = []
        elif tag == "tr":
            self.tables[self._label].append([])
        elif tag in ("td", "th"):
            self.tables[self._label][-1].append("")
        elif tag in ("h1", "h2", "h3"):
            self.headings.append((int(tag[1]), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        inside = set(self._open)
        if inside & {"script", "style"}:
            return
        self.text += data
        if "title" in inside:
            self.title += data
        elif inside & {"td", "th"} and "small" not in inside:
            self.tables[self._label][-1][-1] += data.replace("\xa0", " ")
        elif inside & {"h1", "h2", "h3"}:
            level, text = self.headings[-1]
            self.headings[-1] = (level, text + data)


def read_page(html: str) -> Page:
    """Reads the page; fails where an element is not closed."""
    page = Page()
    page.feed(html)
    page.close()
    assert page._open == []
    return page
