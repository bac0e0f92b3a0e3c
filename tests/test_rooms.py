# SPDX-License-Identifier: Apache-2.0
"""The rooms import only downwards, in the order of docs/architecture.md."""

from __future__ import annotations

import pytest
import rooms


ORDER = rooms.read_order()
LEVELS = {room: level for level, names in enumerate(ORDER) for room in names}
GRAPH = {
    module: targets for module, targets in rooms.imported().items() if module not in (("__init__",), ("__main__",))
}


def test_every_module_is_in_a_room():
    assert {module[0] for module in GRAPH} == set(LEVELS)


@pytest.mark.parametrize("module", GRAPH, ids=".".join)
def test_imports_only_go_down(module: rooms.Module):
    room = module[0]
    for target in GRAPH[module] - {("__init__",)}:  # where the version is
        below = LEVELS[target[0]] > LEVELS[room]
        foundation = room in ORDER[-1] and target[0] in ORDER[-1]
        assert below or foundation or target[0] == room, f"{room} imports {'.'.join(target)}"


def test_no_module_imports_itself_through_others():
    assert rooms.cycles({module: targets - {("__init__",)} for module, targets in GRAPH.items()}) == []


def test_a_cycle_is_found():
    a, b, c = ("a",), ("b",), ("c",)
    assert rooms.cycles({a: {b}, b: {c}, c: {b}}) == [{b, c}]
