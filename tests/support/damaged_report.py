# SPDX-License-Identifier: Apache-2.0
"""Damaged reports, for hypothesis."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st


HOSTILE = (
    "<script>window.ran=1</script>",
    "</script><script>window.ran=1</script>",
    "<img src=x onerror=window.ran=1>",
    "\"'><svg onload=window.ran=1>",
    "--><!--",
    "../../x",
    "---\n- a: b",
    "\u202egnp.exe\u2066",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:window.ran=1",
    "\ud800",
    "x" * 3000,
)
"""What must stay text, wherever it stands."""

VALUES: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(HOSTILE),
    st.sampled_from([None, True, False, 0, 1, -1, 2.0, 10**15, 1e300, -1e300, 5e-324, -0.0, [], {}, [[]], {"": {}}]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(-(10**17), 10**17),
    st.text(max_size=8),
)


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in nested data with each of its keys or positions."""
    for key in data if isinstance(data, dict) else range(len(data)):
        yield data, key
        if isinstance(data[key], (dict, list)):
            yield from places(data[key])


@st.composite
def damaged(draw: st.DrawFn, report: dict[str, Any], *, most: int = 3) -> dict[str, Any]:
    """The report with up to `most` values replaced, lost, doubled or moved to a hostile name."""
    data = copy.deepcopy(report)
    for _ in range(draw(st.integers(1, most))):
        everywhere = list(places(data))
        if not everywhere:
            break
        # Half of the time near the top: most of the places are points of some long list.
        deep = draw(st.booleans())
        container, key = everywhere[draw(st.integers(0, len(everywhere) - 1))] if deep else _near(draw, data)
        how = draw(st.sampled_from(["replace", "replace", "lose", "rename", "double"]))
        if how == "replace":
            container[key] = copy.deepcopy(draw(VALUES))  # which the next change may be made within
        elif how == "lose":
            del container[key]
        elif isinstance(container, dict):
            container[draw(st.sampled_from(HOSTILE))] = copy.deepcopy(container[key])
            if how == "rename":
                del container[key]
        else:
            container.insert(key, copy.deepcopy(container[key]))
    return data


def _near(draw: st.DrawFn, data: Any) -> tuple[Any, Any]:
    """A place found by going down at random, so that each level is as likely as the next."""
    while True:
        key = draw(st.sampled_from(sorted(data))) if isinstance(data, dict) else draw(st.integers(0, len(data) - 1))
        if not data[key] or not isinstance(data[key], (dict, list)) or draw(st.booleans()):
            return data, key
        data = data[key]


def to_json(data: Any) -> bytes:
    return json.dumps(data).encode()
