# SPDX-License-Identifier: Apache-2.0
"""Which room may import which: only from those below it (docs/architecture.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_optimizability


PACKAGE = Path(hf_optimizability.__file__).parent
BASE = {"model_state", "config", "log_keys", "device_memory", "files", "redaction", "errors", "serialization"}
ROOMS: tuple[set[str], ...] = (
    {"cli"},
    {"comparing"},
    {"tasks"},
    {"training"},
    {"publishing"},
    {"report"},
    {"diagnosis"},
    {"report_data"},
    {"dynamics", "scoring"},
    {"measurement"},
    {"distributed"},
    {"objective"},
    {"quantities"},
    {"curvature"},
    {"linalg"},
    BASE,
)
"""From the top to the bottom; those in one set do not import each other, but for the base."""


def imports(path: Path) -> Iterator[tuple[str, ...]]:
    """Yield the modules of the package that a file imports, without the package's name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = parts[: len(parts) - node.level]
            module = tuple((node.module or "").split(".")) if node.module else ()
            yield from (
                (*base, *module, alias.name) for alias in node.names if (*base, *module, alias.name)[0] in levels()
            )
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE.name + "."):
            yield tuple((node.module or "").split("."))[1:]


def levels() -> dict[str, int]:
    return {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ("__main__.py",))


def test_every_module_is_in_a_room():
    found = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in modules()} - {"__init__"}
    assert found == set(levels())


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_go_down(path: Path):
    level = levels()
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":  # the public names
        return
    for target in imports(path):
        if target[0] in (room, "__version__"):
            continue
        same_base = room in BASE and target[0] in BASE
        assert level[target[0]] > level[room] or same_base, f"{room} imports {'.'.join(target)}"


def test_no_module_imports_itself_through_others():
    graph = {}
    names = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in modules()}
    for name, path in names.items():
        targets = {target if target in names else target[:-1] for target in imports(path)}
        graph[name] = {target for target in targets if target in names and target != name}
    done: set[tuple[str, ...]] = set()

    def visit(name: tuple[str, ...], trail: tuple[tuple[str, ...], ...]) -> None:
        assert name not in trail, " -> ".join(".".join(step) for step in (*trail, name))
        if name not in done:
            for target in graph[name]:
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())
