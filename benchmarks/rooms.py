# SPDX-License-Identifier: Apache-2.0
"""The rooms of the package and the imports between them; run as a script, draw docs/images/rooms.svg.

The order of the rooms stands once, in docs/architecture.md. tests/test_rooms.py enforces it.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_optimizability"
PAGE = ROOT / "docs/architecture.md"
PICTURE = ROOT / "docs/images/rooms.svg"

Module = tuple[str, ...]
"""A module's name, split at the dots, without the package's."""


def read_order(page: Path = PAGE) -> list[list[str]]:
    """Return the rooms from top to bottom, level by level, as the first `text` block of the page lists them."""
    block = re.search(r"```text\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert block, f"{page} has no block with the order of the rooms"
    return [re.findall(r"\w+", level) for level in block[1].split(">")]


def modules(package: Path = PACKAGE) -> dict[Module, Path]:
    """Return the package's modules; that of a folder has the name of its `__init__.py`."""
    return {path.relative_to(package).with_suffix("").parts: path for path in sorted(package.rglob("*.py"))}


def imported(package: Path = PACKAGE) -> dict[Module, set[Module]]:
    """Return for each module those it imports, at the top of the file or inside of functions."""
    files = modules(package)

    def resolve(name: Module) -> Module | None:
        return next((module for module in (name, (*name, "__init__")) if module in files), None)

    def targets(module: Module) -> Iterator[Module | None]:
        for node in ast.walk(ast.parse(files[module].read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [tuple(alias.name.split(".")) for alias in node.names]
                yield from (resolve(name[1:]) for name in names if name[0] == package.name)
            elif isinstance(node, ast.ImportFrom):
                parts = tuple(node.module.split(".")) if node.module else ()
                if node.level:
                    base = (*module[: len(module) - node.level], *parts)
                elif parts[0] == package.name:
                    base = parts[1:]
                else:
                    continue
                yield from (resolve((*base, alias.name)) or resolve(base) for alias in node.names)

    return {module: {target for target in targets(module) if target} - {module} for module in files}


def cycles(graph: dict[Module, set[Module]]) -> list[set[Module]]:
    """Return the groups of modules that import each other, directly or through others."""
    reach = {module: set(targets) for module, targets in graph.items()}
    for middle in graph:
        for module in graph:
            if middle in reach[module]:
                reach[module] |= reach[middle]
    groups = {frozenset(m for m in reach[module] if module in reach[m]) for module in graph if module in reach[module]}
    return [set(group) for group in groups]


def draw(picture: Path = PICTURE) -> None:
    """Draw the rooms as floors and, to the right, how many imports of each floor below a floor has."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    *above, ground = read_order()
    floor = {room: room for level in above for room in level} | dict.fromkeys(ground, "foundation")
    place = {name: number for number, name in enumerate(dict.fromkeys(floor.values()))}
    graph = {module: targets for module, targets in imported().items() if module[0] in floor}
    sizes = Counter(floor[module[0]] for module in graph if module[-1] != "__init__")
    links = Counter(
        (floor[module[0]], floor[target[0]])
        for module, targets in graph.items()
        for target in targets
        if target[0] in floor
    )
    ink, paper, accent = "#1f2933", "#fbfaf7", "#2a6f97"
    plt.rcParams.update({"svg.hashsalt": "rooms", "font.family": "DejaVu Sans", "font.size": 11})
    figure, axes = plt.subplots(figsize=(10, 8), facecolor=paper)
    axes.set(xlim=(-7.8, len(place) + 0.5), ylim=(len(place) - 0.3, -4))
    axes.axis("off")
    for name, row in place.items():
        size = f"{sizes[name]} module{'s' * (sizes[name] > 1)}"
        axes.barh(row, 6.8, 0.84, left=-7.7, color="#dbe3e9")
        axes.text(-7.5, row, name, color=ink, weight="bold", va="center")
        axes.text(-1.1, row, size, color=ink, va="center", ha="right", size=9)
        axes.text(
            row - 0.1, -0.8, name, color=ink, rotation=55, va="bottom", ha="left", rotation_mode="anchor", size=10
        )
        axes.plot([-0.9, len(place) - 0.5], [row + 0.5] * 2, color="#e3e8ec", linewidth=0.8, zorder=0)
        axes.plot([row - 0.25, row + 0.25], [row, row], color="#7b8794", linewidth=1.5)
    for (name, target), count in links.items():
        if name != target:
            share = (count / max(links.values())) ** 0.5
            axes.scatter(place[target], place[name], s=130 + 330 * share, color=accent, linewidth=0)
            axes.text(place[target], place[name], str(count), color="white", va="center", ha="center", size=9)
    axes.text(-7.7, -2.4, "Imports from the room\nof a row to the room\nof a column", color=ink, va="center")
    figure.savefig(picture, bbox_inches="tight", facecolor=paper, metadata={"Date": None})


if __name__ == "__main__":
    draw()
    print(PICTURE.relative_to(ROOT))
