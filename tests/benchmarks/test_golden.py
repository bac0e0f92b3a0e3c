# SPDX-License-Identifier: Apache-2.0
"""What `make golden` sees, and what it follows or leaves out."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import pytest
from golden import Difference, compare, judge


REPORT: dict[str, Any] = {
    "created": "2026-01-01",
    "measurements": [
        {"loss": 0.1, "seconds": 1.0, "noise": math.nan, "blocks": {"layer.0": {"trace": 3}, "layer.1": {"trace": 4}}},
    ],
    "failures": [],
}


def changed(**values: Any) -> dict[str, Any]:
    report = deepcopy(REPORT)
    report["measurements"][0] |= values
    return report


def test_a_report_is_equal_to_itself():
    assert compare(REPORT, deepcopy(REPORT)) == (5, [])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"loss": math.nextafter(0.1, 1)}, Difference("measurements.0.loss", "0.1", "0.10000000000000002")),
        ({"noise": None}, Difference("measurements.0.noise", "nan", "None")),
        ({"loss": 1}, Difference("measurements.0.loss", "0.1", "1")),
        ({"extra": 1}, Difference("measurements.0.extra", None, "1")),
    ],
)
def test_a_change_is_seen(values: dict[str, Any], expected: Difference):
    assert compare(REPORT, changed(**values)).differences == [expected]


def test_a_missing_field_is_seen():
    new = deepcopy(REPORT)
    del new["measurements"][0]["loss"], new["failures"]
    paths = {(path, new) for path, _, new in compare(REPORT, new).differences}
    assert paths == {("measurements.0.loss", None), ("failures", None)}


def test_the_number_and_the_type_matter():
    assert compare({"x": 1}, {"x": 1.0}).differences == [Difference("x", "1", "1.0")]
    assert compare({"x": 0.0}, {"x": -0.0}).differences == [Difference("x", "0.0", "-0.0")]
    assert compare({"x": []}, {"x": {}}).differences == [Difference("x", "[]", "{}")]


def test_a_rename_is_followed():
    new = deepcopy(REPORT)
    (measurement,) = new["measurements"]
    blocks = measurement.pop("blocks")
    measurement["by_block"] = {name: {"trace_value": block["trace"]} for name, block in blocks.items()}
    renamed = {
        "measurements.*.blocks": "measurements.*.by_block",
        "measurements.*.by_block.*.trace": "measurements.*.by_block.*.trace_value",
    }
    assert compare(REPORT, new, renamed=renamed) == (5, [])
    assert len(compare(REPORT, new, renamed={}).differences) == 4
    measurement["by_block"]["layer.1"]["trace_value"] = 5
    (difference,) = compare(REPORT, new, renamed=renamed).differences
    assert difference == Difference("measurements.0.by_block.layer:1.trace_value", "4", "5")


def test_two_fields_can_not_become_one():
    with pytest.raises(ValueError, match="renamed to one"):
        compare({"a": 1, "b": 1}, {"b": 1}, renamed={"a": "b"})


def test_times_and_dates_are_not_compared():
    assert not compare(REPORT, {**changed(seconds=2.0), "created": "2027-01-01"}).differences


def test_what_must_change_may_be_missing_as_well():
    new = changed(loss=2.0)
    del new["measurements"][0]["blocks"]
    assert not compare(REPORT, new, changed=["measurements.*.loss", "measurements.*.blocks"]).differences
    assert compare(REPORT, new, changed=["measurements.*"]) == (1, [])
    assert len(compare(REPORT, new, changed=["measurement", "loss", "measurements.*.l"]).differences) == 3


def test_a_case_that_fails_in_the_same_way_is_not_equal():
    failed = {"error": {"message": "ValueError: no"}}
    assert judge("a", failed, failed).differences == [
        Difference("the case failed", "ValueError: no", "ValueError: no")
    ]
    assert judge("a", {"report": REPORT}, failed).differences == [
        Difference("the case failed", None, "ValueError: no")
    ]
