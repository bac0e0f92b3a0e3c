# SPDX-License-Identifier: Apache-2.0
"""The report as text, read back with a CommonMark parser that knows nothing of how it was written."""

from __future__ import annotations

import dataclasses
import re

import pytest

from hf_optimizability.measurement.results import MeasurementFailure, PopulationMeasurement
from hf_optimizability.number_format import format_estimate, format_number, format_share
from hf_optimizability.reasons import Reason
from hf_optimizability.report import OptimizabilityReport
from hf_optimizability.report.markdown import ALT_TEXTS, escape, to_markdown, to_summary
from hf_optimizability.report.tables import trace_shares
from hf_optimizability.report_data.provenance import DataInfo, ModelInfo, TaskInfo
from tests.support.commonmark import HOSTILE, parse
from tests.support.example_report import fill_provenance, make_estimate, make_measurement, make_report


def tables(text: str) -> list[list[list[str]]]:
    """The text of every cell, by table and row."""
    found: list[list[list[str]]] = []
    for token in parse(text):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            found[-1][-1].append("")
        elif token.type in ("text", "text_special") and found and found[-1] and found[-1][-1]:
            found[-1][-1][-1] += token.content
    return found


def headings(text: str) -> list[str]:
    return [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]


def test_shares_are_of_absolute_traces():
    measurement = make_measurement(blocks=3)
    traces = dict(zip(measurement.blocks, (3.0, -1.0, 0.0), strict=True))
    blocks = {
        name: dataclasses.replace(block, trace=make_estimate(traces[name], 0.1))
        for name, block in measurement.blocks.items()
    }
    shares = trace_shares(dataclasses.replace(measurement, blocks=blocks))
    assert list(shares.values()) == [0.75, -0.25, 0.0]


class TestMarkdown:
    def test_ends_with_the_versions(self):
        last = to_markdown(make_report()).splitlines()[-1]
        assert last.endswith("+00:00 with hf\\_optimizability 0.1.0, torch 2.13.0, transformers 5.23.0.")

    def test_sections_in_order(self):
        assert headings(to_markdown(make_report(failures=1))) == [
            "Findings",
            "Numbers",
            "Convergence",
            "Stability",
            "Generalization",
            "Gradient and curvature",
            "Failures",
            "How it was measured",
        ]

    def test_words_are_aligned_left_and_numbers_right(self):
        lines = to_markdown(make_report(failures=1)).splitlines()
        alignment = {line.split(" |")[0]: lines[lines.index(line) + 1] for line in lines if line.startswith("| ")}
        assert alignment["| Step"] == "|:--|:--|:--|"
        assert alignment["| Block"] == "|:--|--:|--:|--:|--:|--:|"

    def test_summary_table_compares_first_and_last(self):
        report = make_report()
        first, last = report.measurements[0].hessian, report.measurements[-1].hessian
        _, (header, *rows), *_ = tables(to_markdown(report))
        assert header[:3] == ["", "step 0", "step 300"]
        cells = {row[0]: row[1:3] for row in rows}
        assert cells["Loss"] == ["0.7000", "0.1774"]
        for name, ends in {
            "Hessian trace": (first.trace, last.trace),
            "λ_max": (first.lambda_max, last.lambda_max),
            "λ_min": (first.lambda_min, last.lambda_min),
        }.items():
            assert cells[name] == [format_estimate(end) for end in ends]

    def test_measurement_and_block_tables_are_complete(self):
        report = make_report(4, blocks=5)
        found = {table[0][0]: table for table in tables(to_markdown(report))}
        blocks, measurements = found["Block"], found["Step"]
        assert [row[0] for row in blocks[1:]] == list(report.measurements[-1].blocks)
        head = report.measurements[-1].blocks["head"]
        assert blocks[-1][1] == "770"
        assert float(blocks[-1][3]) == pytest.approx(head.grad_norm / head.weight_norm, rel=5e-3)
        assert [row[0] for row in measurements[1:]] == ["0", "100", "200", "300"]
        assert {len(row) for row in measurements} == {9}

    def test_says_which_numbers_are_those_of_the_whole_training_set(self):
        report = make_report(1)
        [measured] = report.measurements
        loss = make_estimate(0.2, 0.01)
        population = PopulationMeasurement(1600, 1600, 64, 3, loss, loss, (0.1, 0.2, 0.3), (7,))
        report.measurements = [dataclasses.replace(measured, population=population)]
        others = "Critical learning rate, … by the quadratic model: of the 64 examples measured."
        assert f"Of the training loss over all 1,600 examples. {others}" in to_markdown(report)

    def test_steps_and_spectrum_are_given_with_their_errors(self):
        report = make_report(2)
        last = report.measurements[-1]
        rows = {row[0]: row[1:3] for table in tables(to_markdown(report)) for row in table if len(row) == 4}
        for name, estimate in {
            "Sharpness": last.optimizer_stability.sharpness,
            "‖H‖_F": last.hessian.density.frobenius_norm,
        }.items():
            assert rows[name][1] == format_estimate(estimate)
        assert rows["Gradient noise scale"] == ["at least 20", "35 (20 to 89)"]
        assert rows["Critical learning rate"][1] == "2.60e-4 (2.30e-4 to 2.90e-4)"
        assert rows["Its predicted decrease"][1] == format_number(last.quadratic_model.predicted_decrease)
        mass = last.hessian.density.negative_mass
        assert rows["Negative eigenvalues"][1] == format_share(mass.value, mass.low, mass.high)

    def test_the_landscape_is_told_with_its_units(self):
        report = make_report(3, converged=False)
        text = to_markdown(report, plots=["landscape"])
        rows = {row[0]: row[1:3] for table in tables(text) for row in table if len(row) == 4}
        ends = [measurement.landscape for measurement in report.measurements[::2]]
        for index, q in enumerate(("q₁", "q₂")):
            planes = [landscape.eigenvectors for landscape in ends]
            assert rows[f"Eigenvalue of {q}"] == [format_estimate(plane.eigenvalues[index]) for plane in planes]
            lengths = [format_number(plane.axes[index].length, digits=3) for plane in planes]
            assert rows[f"One unit along {q}"] == lengths
        returns = [-2 * landscape.update.axis.slope / landscape.update.axis.curvature for landscape in ends]
        assert rows["… by the quadratic model"] == [format_number(back) for back in returns]
        bare = [dataclasses.replace(measurement, landscape=None) for measurement in report.measurements]
        plain = to_markdown(dataclasses.replace(report, measurements=bare))
        assert "landscape" not in plain and "by the quadratic model" not in plain

    def test_the_price_is_told_beside_the_training(self):
        report = make_report(2)
        rows = {row[0]: row[1:] for table in tables(to_markdown(report)) for row in table}
        assert rows["Price"] == ["112 HVPs in 14.6 s"]
        report.training["overhead"] = 0.0432
        rows = {row[0]: row[1:] for table in tables(to_markdown(report)) for row in table}
        assert rows["Price"] == ["112 HVPs in 14.6 s, 4.3 % of the training time"]

    def test_what_is_not_known_is_left_out_or_a_dash(self):
        [measurement] = make_report(1).measurements
        bare = dataclasses.replace(
            measurement,
            hessian=dataclasses.replace(measurement.hessian, density=None),
            **dict.fromkeys(["quadratic_model", "noise_scale", "optimizer_stability"]),
        )
        text = to_markdown(OptimizabilityReport(measurements=[bare]))
        rows = {row[0]: row[1:] for table in tables(text) for row in table}
        assert rows["Best step along −g"][0] == rows["Gradient noise scale"][0] == "–"
        assert "Sharpness" not in rows and "## The spectrum" not in text

    def test_every_table_is_rectangular_and_no_value_is_python_none(self):
        text = to_markdown(make_report(failures=2), plots=list(ALT_TEXTS))
        assert "None" not in text
        assert len(tables(text)) == 14
        for table in tables(text):
            assert len({len(row) for row in table}) == 1

    @pytest.mark.parametrize(
        "report",
        [
            OptimizabilityReport(),
            make_report(0),
            make_report(0, failures=2),
            make_report(1),
            dataclasses.replace(make_report(2), dynamics={}),
            dataclasses.replace(make_report(2), training={}, versions={}, data=DataInfo(), config={}, log_history=[]),
        ],
        ids=["nothing", "no measurement", "all failed", "one", "no dynamics", "no trainer"],
    )
    def test_any_part_may_be_empty(self, report):
        text = to_markdown(report)
        assert text.startswith("# Optimizability of ")
        assert "\n\n\n" not in text
        assert ("Nothing was measured." in text) == (not report.measurements)
        assert ("## Failures" in text) == bool(report.failures)
        assert ("## Gradient and curvature" in text) == bool(report.measurements)
        assert len(to_summary(report).splitlines()) <= 11

    def test_every_dynamics_value_may_be_none(self):
        report = make_report()
        dynamics = report.dynamics
        empty = {name: dict.fromkeys(values) for name, values in dynamics.items() if name != "stability"}
        empty["stability"] = {name: dict.fromkeys(values) for name, values in dynamics["stability"].items()}
        report = dataclasses.replace(report, dynamics=empty)
        assert "None" not in to_markdown(report)
        assert [label for label in ("Convergence", "Stability", "Gap") if label in to_summary(report)] == []

    def test_a_report_read_from_json_renders_the_same(self):
        report = make_report(2, failures=1)
        again = OptimizabilityReport.from_dict(report.to_dict())
        assert to_markdown(again) == to_markdown(report)
        assert to_summary(again) == to_summary(report)

    def test_dagger_marks_what_did_not_converge_and_nothing_else(self):
        assert "†" not in to_markdown(make_report())
        text = to_markdown(make_report(1, converged=False))
        rows = {row[0]: row[1] for row in tables(text)[1][1:]}
        assert {name: value.endswith(" †") for name, value in rows.items()} == {
            "Loss": False,
            "Gradient norm ‖g‖": False,
            "Hessian trace": True,
            "λ_max": False,
            "λ_min": True,
            "Gradient noise scale": False,
        }
        assert "\n† Not converged" in text

    def test_power_iteration_has_no_lambda_min(self):
        measurement = make_measurement()
        hessian = dataclasses.replace(measurement.hessian, lambda_min=None, ritz_values=(), ritz_weights=())
        report = OptimizabilityReport(measurements=[dataclasses.replace(measurement, hessian=hessian)])
        assert ["λ_min", "–"] in [row[:2] for row in tables(to_markdown(report))[1]]
        assert "λ_max; λ_min    12.630 (12.598 to 12.662); –" in to_summary(report)

    def test_a_block_of_zero_weights_has_no_relative_gradient(self):
        measurement = make_measurement(blocks=3)
        blocks = {**measurement.blocks, "head": dataclasses.replace(measurement.blocks["head"], weight_norm=0.0)}
        report = OptimizabilityReport(measurements=[dataclasses.replace(measurement, blocks=blocks)])
        table = next(table for table in tables(to_markdown(report)) if table[0][0] == "Block")
        assert table[-1][3] == "–"

    def test_shows_the_plots_that_exist(self, tmp_path):
        make_report().save(tmp_path)
        text = (tmp_path / "report.md").read_text(encoding="utf-8")
        images = [token for token in parse(text) if token.type == "image"]
        assert {str(image.attrs["src"]) for image in images} == {path.name for path in tmp_path.glob("*.png")}
        assert len(images) == 9
        assert "](gradient_norm.png)" in text  # an escaped address is not every renderer's fare
        assert all(image.content for image in images)
        assert "![" not in to_markdown(make_report())


class TestEscaping:
    @pytest.fixture
    def hostile(self) -> str:
        """A report that is hostile wherever it can be."""
        report = make_report(2)
        report.measurements = [
            dataclasses.replace(measured, blocks={HOSTILE: measured.blocks["head"]})
            for measured in report.measurements
        ]
        fill_provenance(report, HOSTILE)
        report.training[HOSTILE] = report.versions[HOSTILE] = report.config[HOSTILE] = HOSTILE
        report.dynamics["stability"][HOSTILE] = {**report.dynamics["stability"]["loss"], "note": HOSTILE}
        report.dynamics["generalization_gap"]["metric_gaps"] = {HOSTILE: 0.1}
        report.failures.append(
            MeasurementFailure(
                step=1, epoch=None, why=Reason("rows_taken_away", values={"place": HOSTILE, "kind": HOSTILE})
            )
        )
        report.created = HOSTILE
        return to_markdown(report)

    def test_nothing_from_outside_becomes_markup(self, hostile):
        plain = to_markdown(make_report(2, failures=1))
        own = {token.type for token in parse(plain)}
        assert {token.type for token in parse(hostile)} - own <= {"text_special"}
        for kind in ("link_open", "em_open", "code_inline"):
            count = [sum(token.type == kind for token in parse(text)) for text in (plain, hostile)]
            assert count[0] == count[1], kind
        assert "<script" not in hostile
        assert "\x1b" not in hostile
        assert not re.search(r"(?<!\\)\$", hostile)  # GitHub's mathematics

    def test_it_reads_as_it_was(self, hostile):
        expected = HOSTILE.replace("\n# l\n\n- m\x1b", "# l - m ")
        cells = [cell for table in tables(hostile) for row in table for cell in row]
        assert cells.count(expected) >= 10
        for table in tables(hostile):
            assert len({len(row) for row in table}) == 1

    def test_summary_is_plain_lines(self):
        report = OptimizabilityReport(model=ModelInfo(id="a\nb\x1b[31m\r\tc"), task=TaskInfo(task="t"))
        assert to_summary(report).splitlines()[0] == "Optimizability  a b [31m c on t"

    def test_escape_keeps_harmless_text(self):
        assert escape("org/Model-1.5 (v2), 30 % † λ") == "org/Model-1.5 (v2), 30 % † λ"


class TestSummary:
    def test_at_most_eleven_aligned_lines_and_the_failures(self):
        lines = to_summary(make_report(failures=3, converged=False)).splitlines()
        assert len(lines) == 12
        assert all(line[14:16] == "  " and line[16] != " " for line in lines)
        assert [line[:14].strip() for line in lines] == [
            "Optimizability",
            "Verdict",
            "About",
            "Loss",
            "Gradient norm",
            "Hessian trace",
            "λ_max; λ_min",
            "Convergence",
            "Stability",
            "Gap",
            "Cost",
            "Failed",
        ]

    def test_says_what_was_found(self):
        text = to_summary(make_report(failures=1))
        assert "sentence-transformers/all-MiniLM-L6-v2 on text-classification" in text
        assert "0.7000 (step 0) → 0.1774 (step 300)" in text
        assert "half-life 68 (55 to 89) steps, 90 % of the drop after 227 (190 to 281) steps" in text
        assert "loss: 3 setbacks in 29 comparisons" in text
        assert "eval loss - train loss = 0.081 (0.039 to 0.124), more than chance" in text
        assert "3 measurements, 168 HVPs, 21.9 s, all converged" in text
        assert "1, the last at step 100: The loss can't be differentiated twice (NotImplementedError). Leave" in text

    def test_counts_what_did_not_converge(self):
        assert "1 measurement, 56 HVPs, 7.31 s, 1 did not converge (†)" in to_summary(make_report(1, converged=False))

    def test_a_long_reason_is_cut_but_the_remedy_stays(self):
        failure = MeasurementFailure(
            step=5, epoch=None, why=Reason("fp8_layer", values={"layer": "layer" * 100, "library": "x"})
        )
        line = to_summary(OptimizabilityReport(failures=[failure])).splitlines()[-1]
        assert len(line) < 450
        assert "… Train in FP8 with torchao" in line
