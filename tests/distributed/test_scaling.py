# SPDX-License-Identifier: Apache-2.0
"""The formulas of `docs/scaling.md` against what two processes send and hold; its tables against the formulas."""

from __future__ import annotations

from pathlib import Path

import pytest
import scaling

from tests.support.ranks import results


def checked(rank: int) -> dict[scaling.Route, dict[str, float]]:
    return scaling.check_all()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[scaling.Route, dict[str, float]]]:
    return results(checked, 2, tmp_path_factory.mktemp("scaling"))


@pytest.mark.slow
@pytest.mark.parametrize("route", scaling.ROUTES)
def test_formulas_hold(route: scaling.Route, found: list[dict[scaling.Route, dict[str, float]]]):
    for rank in found:
        numbers = rank[route]
        assert numbers["bytes a product, counted"] == pytest.approx(numbers["bytes a product, formula"], rel=2e-3)
        assert numbers["bytes once, counted"] == pytest.approx(numbers["bytes once, formula"], rel=2e-3)
        assert numbers["memory, counted"] == pytest.approx(numbers["memory, formula"], rel=0.1)


def test_the_documents_tables_are_the_formulas():
    assert f"<!-- tables -->\n{scaling.tables()}<!-- end -->" in Path(scaling.DOCUMENT).read_text()
