# SPDX-License-Identifier: Apache-2.0
"""A row in the table of quantities is all that it takes to show one."""

from __future__ import annotations

import dataclasses

import pytest

from hf_optimizability import cli
from hf_optimizability.measurement import quantities_table
from hf_optimizability.measurement.quantities_table import QUANTITIES, Quantity
from hf_optimizability.measurement.results import NOT_CONVERGED_NOTE, PopulationMeasurement
from hf_optimizability.publishing import model_card
from hf_optimizability.report import OptimizabilityReport, charts, figures, markdown, panels, tables
from hf_optimizability.training import log_entry
from tests.support.example_report import make_estimate, make_measurement, make_report


READERS = (quantities_table, tables, panels, markdown, model_card, log_entry)

ROW = Quantity(
    name="gradient_skewness",
    get=lambda measurement: make_estimate(0.5 + measurement.step, 0.25, kind="std_error"),
    label="Gradient skewness",
    reading="Positive: a few large entries.",
    section="gradient",
    logged_error="std_error",
    card=True,
    metric="Skewness of the gradient",
    tile=True,
    summary="Skewness",
    plot="gradient_skewness",
)
"""A quantity that does not exist."""


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> OptimizabilityReport:
    for module in READERS:
        monkeypatch.setattr(module, "QUANTITIES", (*QUANTITIES, ROW))
    monkeypatch.setitem(markdown.ALT_TEXTS, "gradient_skewness", "Made when the module is imported.")
    return make_report(2)


def test_a_new_quantity_is_shown_everywhere(report: OptimizabilityReport):
    first, _ = report.measurements
    assert log_entry.log_entry(first)["optimizability/gradient_skewness"] == 0.5
    assert log_entry.log_entry(first)["optimizability/gradient_skewness_std_error"] == 0.25
    row = "Gradient skewness | between 0.010 and 0.99 | 300.50 (300.01 to 300.99) |"
    assert f"{row} Positive: a few large entries. |" in markdown.to_markdown(report)
    assert row in markdown.card_section(report)
    html = report.to_html()
    assert '<th scope="row">Gradient skewness<small>Positive: a few large entries.</small></th>' in html
    assert "<dt>Skewness of the gradient</dt>" in html
    assert "Skewness        between 0.010 and 0.99 → 300.50 (300.01 to 300.99)" in report.summary()
    assert "Gradient skewness     300.50 (300.01 to 300.99)" in cli._table(make_report(1))
    result = model_card.metadata_result(report)
    assert "gradient_skewness" in [chart["id"] for chart in charts.charts(report)]
    assert "gradient_skewness" in figures.plot_all(report)
    assert "](gradient_skewness.png)" in markdown.to_markdown(report, plots=["gradient_skewness"])
    assert result is not None and result["metrics"][-1]["type"] == "optimizability_gradient_skewness"


def test_an_optional_quantity_that_was_not_measured_has_no_row(report: OptimizabilityReport):
    row = dataclasses.replace(ROW, get=lambda measurement: None)
    assert [one for one in tables.QUANTITIES if one.name == row.name] == [ROW]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "QUANTITIES", (*QUANTITIES, row))
        assert "skewness" not in markdown.to_markdown(report).lower()


@pytest.mark.parametrize("converged", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_printed_measurement_has_the_numbers_of_the_card(converged: bool, sampled: bool):
    measurement, about = make_measurement(converged=converged), "the mean loss over these 64 items"
    if sampled:
        loss, norm = make_estimate(0.5, 0.1, kind="std_error"), make_estimate(3.0, 0.2, kind="std_error")
        population = PopulationMeasurement(60_000, 2560, 64, 7, loss, norm, (0.1, 0.2, 0.3, 0.4, 0.5), (3, 1))
        measurement = dataclasses.replace(measurement, population=population)
        about = "the training loss, from a random 2,560 of 60,000 examples, measured on 64 of them"
    lines = str(measurement).splitlines()
    assert lines[:2] == [f"Of {about}; in parentheses: 95 % intervals.", ""]
    rows = [f"{row.label:<22}{row.cells[0]}" for row in tables.card_rows([measurement])]
    assert lines[2:] == rows + ([] if measurement.converged else ["", NOT_CONVERGED_NOTE])
    assert measurement.converged == converged


def test_names_are_unique():
    names = [quantity.name for quantity in QUANTITIES]
    assert len(names) == len(set(names))


def test_every_value_of_a_full_measurement_is_known():
    measurement = make_measurement()
    assert [quantity.name for quantity in QUANTITIES if quantity.get(measurement) is None] == []
