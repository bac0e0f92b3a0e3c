# SPDX-License-Identifier: Apache-2.0
"""The page: its text read back with Python's parser, and the whole of it in a headless Chromium."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
from typing import Any

import pytest

from hf_optimizability.diagnosis.findings import Diagnosis, Finding, Fine, NotChecked
from hf_optimizability.measurement.results import MeasurementFailure
from hf_optimizability.number_format import format_estimate, format_interval, format_number
from hf_optimizability.reasons import Reason
from hf_optimizability.report import OptimizabilityReport
from hf_optimizability.report.figures import plot_blocks, plot_gradient_norm
from tests.support.blank_plots import leave_plots_undrawn
from tests.support.browser import DESKTOP, PHONE
from tests.support.damaged_report import HOSTILE
from tests.support.example_report import fill_provenance, make_report, with_tasks
from tests.support.html_page import read_page


SECTIONS = [
    "Summary",
    "Findings",
    "Numbers",
    "Convergence",
    "Stability",
    "Generalization",
    "Gradient",
    "Curvature",
    "Blocks",
    "Method and prices",
]


def make_hostile() -> OptimizabilityReport:
    """A report that is hostile wherever it can be."""
    report = make_report(2, failures=1)
    every = "\n".join(HOSTILE)
    names = dict(zip(HOSTILE, list(report.measurements[-1].blocks.values()) * 2, strict=False))
    report.measurements = [
        dataclasses.replace(measured, blocks=names, engine=every, attention=every, dtype=every, curvature=every)
        for measured in report.measurements
    ]
    fill_provenance(report, every)
    for part in (report.training, report.versions, report.config):
        part.update(dict.fromkeys(HOSTILE, every))
    report = with_tasks(report, HOSTILE[:3])
    for entry in report.log_history:
        entry.update({f"optimizability/train_grad_norm/{name}": 0.5 for name in HOSTILE})
    report.dynamics["stability"][every] = {**report.dynamics["stability"]["loss"], "note": every}
    report.dynamics["generalization_gap"].update(metric_gaps={every: 0.1}, note=every)
    report.dynamics["convergence_speed"]["note"] = every
    report.failures.append(
        MeasurementFailure(step=1, epoch=None, why=Reason("rows_taken_away", values={"place": every, "kind": every}))
    )
    report.created = every
    return report


class TestText:
    def test_sections_in_order(self):
        page = read_page(make_report(failures=1).to_html())
        assert [text for level, text in page.headings if level == 1] == [
            "Optimizability of sentence-transformers/all-MiniLM-L6-v2 on text-classification"
        ]
        assert [text for level, text in page.headings if level == 2] == SECTIONS
        assert page.title == page.headings[0][1]
        sections = [section.replace("Method and prices", "Method").lower() for section in SECTIONS]
        assert [link for link in page.links if link.startswith("#") and "finding-" not in link] == [
            "#summary",
            *(f"#{section}" for section in sections),
        ]

    @pytest.mark.parametrize(
        "report",
        [OptimizabilityReport(), make_report(0, failures=2), make_report(1), make_report(20, blocks=30)],
        ids=["empty", "all failed", "one", "large"],
    )
    def test_every_link_leads_somewhere_and_every_id_is_one(self, report):
        page = read_page(report.to_html())
        assert len(page.ids) == len(set(page.ids))
        assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
        assert [text for level, text in page.headings if level == 2] == SECTIONS
        assert "None" not in page.text.replace("None. An effect within", "").replace("None,", "")

    @pytest.mark.parametrize("report", [OptimizabilityReport(), make_report(failures=1)], ids=["empty", "full"])
    def test_no_marker_of_the_template_is_left(self, report):
        html = re.sub(r"<(script|style)>.*?</\1>", "", report.to_html(), flags=re.DOTALL)
        assert "Optimizability of" in html and "</footer>" in html
        assert re.findall(r"{{|}}|{%|%}|{#|#}", html) == []

    def test_a_large_report_is_a_small_file(self):
        report = make_report(20, blocks=30)
        report.log_history *= 400  # steps come again and again: 13,000 entries
        assert len(report.to_html()) < 1_200_000
        assert len(make_report().to_html()) < 160_000

    def test_tables_hold_the_numbers_with_their_errors(self):
        report = make_report(4, blocks=5)
        last = report.measurements[-1]
        tables = read_page(report.to_html()).tables
        parts = tables.pop("Parts of the intervals")
        rows = {row[0]: row[1:] for table in tables.values() for row in table}
        assert rows["Hessian trace"][1] == format_estimate(last.hessian.trace)
        assert rows["λ_max"][1] == format_estimate(last.hessian.lambda_max)
        assert ["λ_max", "–", "–", "0.031", "32", "lanczos", "yes"] in parts
        assert rows["Sharpness"][1] == format_estimate(last.optimizer_stability.sharpness)
        assert rows["Gradient noise scale"] == ["at least 20", "35 (20 to 89)"]
        assert rows["Half-life of the loss, in steps"] == [format_interval(68.4, 55.2, 88.1)]
        assert [row[0] for row in tables["Blocks at the last step"][1:]] == list(last.blocks)
        assert [row[0] for row in tables["All measurements"][1:]] == ["0", "100", "200", "300"]
        trace_map = tables["Hessian trace by block"]
        assert trace_map[0] == ["Block", "step 0", "step 100", "step 200", "step 300"]
        assert trace_map[-1][-1] == format_estimate(last.blocks["head"].trace)
        relative = tables["Gradient norm relative to the weights, ‖g_b‖/‖θ_b‖"][-1][-1]
        head = last.blocks["head"]
        assert relative == format_number(head.grad_norm / head.weight_norm, digits=2)
        for label, table in tables.items():
            assert len({len(row) for row in table if row}) <= 1, label

    def test_shades_order_the_values(self):
        report = make_report(3)
        html = report.to_html()
        shades = [(float(text), int(shade)) for shade, text in re.findall(r'class="rise(\d)">([^<]+)<', html)]
        assert [shade for _, shade in sorted(shades)] == sorted(shade for _, shade in shades)
        assert {shade for _, shade in shades} >= {1, 6}
        signs = re.findall(r'class="(plus|minus)\d">(-?)', html.partition('id="blocks"')[2])
        sure = [b.trace for m in report.measurements for b in m.blocks.values() if b.trace.low * b.trace.high > 0]
        assert len(signs) == len(sure) < 24 and all((kind == "minus") == bool(minus) for kind, minus in signs)

    def test_the_plane_of_the_landscape_is_a_map_with_the_top_up(self):
        report = make_report(3)
        html = report.to_html()
        page, last = read_page(html), report.measurements[-1]
        plane = last.landscape.eigenvectors
        table = page.tables["Loss over the plane of q₁ and q₂, step 300"]
        assert table[0][1:] == [f"{s:.1f}" for s in plane.axes[0].at]
        assert [row[0] for row in table[1:]] == [f"{s:.1f}" for s in reversed(plane.axes[1].at)]
        for row, losses in zip(table[1:], reversed(plane.losses), strict=True):
            assert row[1:] == [format_number(loss, digits=3) for loss in losses]
        [shaded] = re.findall(r"Table: Loss over the plane of q₁ and q₂, step 300.*?</table>", html, flags=re.DOTALL)
        cells = re.findall(r'class="(plus|minus|zero)(\d?)">([^<]+)<', shaded)
        assert len(cells) == 121
        for kind, _, text in cells:
            change = float(text) - last.loss
            assert kind == ("plus" if change > 0 else "minus") or abs(change) < 1e-3
        assert {rank for kind, rank, _ in cells if kind == "plus"} >= {"3", "6"}
        assert "Loss over the plane of q₁ and q₂, step 0" in page.tables
        assert "Loss over the plane of q₁ and q₂, step 150" not in page.tables
        bare = [dataclasses.replace(measurement, landscape=None) for measurement in report.measurements]
        assert "andscape" not in read_page(dataclasses.replace(report, measurements=bare).to_html()).text

    def test_verdict_findings_and_the_status_of_each_rule_stand_above_all_plots(self, monkeypatch):
        told = Finding(
            "too_high", "problem", "The rate is <too> high.", ("η = 3 (2 to 4)",), "Lower it.", "Cohen 2021"
        )
        noted = dataclasses.replace(told, name="saddle", severity="note", sentence="A saddle.")
        outcomes = {
            "saddle": noted,
            "too_high": told,
            "overfitting": NotChecked("evaluations", 1, 2),
            "tasks_conflict": Fine("One task was measured."),
        }
        monkeypatch.setattr("hf_optimizability.report.html.diagnose", lambda report: Diagnosis(outcomes))
        html = make_report(2).to_html()
        page = read_page(html)
        assert page.text.count("The rate is <too> high.") == 2
        assert page.text.count("A saddle.") == 1
        assert "Also: 1 note, 1 of 4 rules could not be checked." in page.text.replace("\xa0", " ")
        assert [row[:3] for row in page.tables["Rules"][1:]] == [
            ["Too high", "Problem", "See the finding."],
            ["Saddle", "Note", "See the finding."],
            ["Overfitting", "Not checked", "the log has too few evaluation losses (1, of 2 needed)"],
            ["Tasks conflict", "Fine", "One task was measured."],
        ]
        order = [
            html.index(text) for text in ('class="verdict problem"', 'id="finding-too_high"', "<details>", "<figure")
        ]
        assert order == sorted(order)
        assert {"finding-too_high", "finding-saddle"} <= set(page.ids)
        for text in ("η = 3 (2 to 4)", "Lower it.", "Source: Cohen 2021"):
            assert text in page.text.replace("\xa0", " ")

    def test_what_did_not_converge_is_marked_and_explained(self):
        assert "†" not in make_report().to_html()
        assert "† Not converged" in make_report(1, converged=False).to_html()

    def test_the_policy_names_each_script_and_the_style_by_its_hash(self):
        html = make_report(1).to_html()
        [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
        inline = re.findall(r"<(style|script)>(.*?)</\1>", html, flags=re.DOTALL)
        assert [kind for kind, _ in inline] == ["style", "script", "script"]
        for _, content in inline:
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in policy
        assert policy.startswith("default-src 'none';")
        assert "unsafe" not in policy

    def test_carries_the_licence_of_what_it_carries(self):
        assert "The MIT License (MIT)\n\nCopyright (c) 2022 Leon Sorokin" in make_report(1).to_html()

    def test_nothing_from_outside_becomes_markup(self):
        plain = read_page(with_tasks(make_report(2, failures=1), ["a", "b", "c"]).to_html())
        hostile = read_page(make_hostile().to_html())
        assert hostile.tags <= plain.tags
        assert hostile.scripts == plain.scripts == 3
        assert hostile.events == []
        assert set(hostile.links) <= set(plain.links) | {
            link for link in hostile.links if link.startswith("#finding-")
        }
        assert "<script>window.ran=1</script>" in hostile.text
        assert not re.search("[\u202e\u2066\ud800\x1b]", hostile.text)

    def test_a_hostile_report_is_saved_whole(self, tmp_path, monkeypatch):
        leave_plots_undrawn(monkeypatch)  # names in plots are drawn below
        make_hostile().save(tmp_path)
        assert OptimizabilityReport.load(tmp_path).to_dict() == make_hostile().published().to_dict()
        assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".html", ".png", ".svg"}
        assert all("script" not in path.name for path in tmp_path.iterdir())


def test_hostile_block_names_are_drawn_as_text():
    report = make_hostile()
    for plot in (plot_blocks, plot_gradient_norm):
        assert plot(report) is not None


COUNT = """async ([id, color]) => {
  await new Promise(requestAnimationFrame);
  const canvas = document.querySelector(`#${id} canvas`);
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", {willReadFrequently: true});
  copy.drawImage(canvas, 0, 0);
  const {data} = copy.getImageData(0, 0, canvas.width, canvas.height);
  let count = 0;
  for (let i = 0; i < data.length; i += 4)
    count += color.every((channel, j) => Math.abs(data[i + j] - channel) < 3) && data[i + 3] === 255;
  return count;
}"""
BLUE, LIGHT_BLUE = [0x00, 0x72, 0xB2], [0x56, 0xB4, 0xE9]


def count(page: Any, chart: str, color: list[int]) -> int:
    """How many pixels of a plot are of that colour."""
    return int(page.evaluate(COUNT, [chart, color]))


class TestBrowser:
    @pytest.mark.parametrize(
        ("size", "scheme"),
        [
            pytest.param(PHONE, "dark", id="phone-dark"),
            *(
                pytest.param(size, scheme, id=f"{name}-{scheme}", marks=pytest.mark.slow)
                for name, size, scheme in (
                    ("desktop", DESKTOP, "light"),
                    ("phone", PHONE, "light"),
                    ("desktop", DESKTOP, "dark"),
                )
            ),
        ],
    )
    def test_fits_is_quiet_and_accessible(self, show, size, scheme):
        from axe_playwright_python.sync_playwright import Axe

        page = show(make_report(3, failures=1, converged=False).to_html(), size=size, scheme=scheme)
        for details in page.locator("summary").all():
            details.click()
        assert page.evaluate("document.documentElement.scrollWidth") == size["width"]
        found = Axe().run(page).response["violations"]
        assert [(rule["id"], rule["nodes"][0]["html"]) for rule in found] == []
        assert page.locator("canvas").count() == 12
        assert count(page, "loss", BLUE if scheme == "light" else LIGHT_BLUE) > 200

    @pytest.mark.parametrize(
        "report",
        [
            pytest.param(OptimizabilityReport(), id="empty", marks=pytest.mark.slow),
            pytest.param(make_report(0, failures=2), id="all failed", marks=pytest.mark.slow),
            pytest.param(make_report(1), id="one", marks=pytest.mark.slow),
            pytest.param(make_report(20, blocks=30), id="large"),  # the widest
        ],
    )
    def test_any_report_fits_a_phone(self, show, report):
        page = show(report.to_html(), size=PHONE)
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]

    def test_the_table_of_a_plot_holds_its_numbers(self, show):
        report = make_report(3)
        page = show(report.to_html())
        page.locator("#eigenvalues summary").click()
        rows = [row.split("\t") for row in page.locator("#eigenvalues table").inner_text().splitlines()]
        assert rows[0] == ["optimizer step", "λ_max, 95 % interval", "λ_min, 95 % interval"]
        for row, measurement in zip(rows[1:], report.measurements, strict=True):
            top = measurement.hessian.lambda_max
            assert row[1] == format_estimate(top)

    def test_keys_read_the_points(self, show):
        page = show(make_report(3).to_html())
        page.locator("#eigenvalues .plot").focus()
        page.keyboard.press("End")
        last = page.locator("#eigenvalues > .live").inner_text()
        assert last.startswith(
            "optimizer step 300: λ_max, 95 % interval 4.058 (4.026 to 4.089), λ_min, 95 % interval -"
        )
        page.keyboard.press("ArrowLeft")
        assert page.locator("#eigenvalues > .live").inner_text().startswith("optimizer step 150: ")

    def test_the_pointer_shows_values_and_the_legend_hides_a_line(self, show):
        page = show(make_report(3).to_html())
        page.locator("#loss .plot").scroll_into_view_if_needed()
        box = page.locator("#loss .plot").bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        entry = page.locator("#loss .legend button").first
        assert re.fullmatch(r"training log 0\.\d+", entry.inner_text())
        page.mouse.move(0, 0)
        before = count(page, "loss", BLUE)
        entry.click()
        assert entry.get_attribute("aria-pressed") == "false"
        assert count(page, "loss", BLUE) == 0 < before
        entry.click()
        assert count(page, "loss", BLUE) == before

    def test_colors_follow_the_scheme_and_paper_is_light(self, show):
        page = show(make_report(2).to_html(), scheme="dark")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert count(page, "loss", BLUE) > 0 == count(page, "loss", LIGHT_BLUE)
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert count(page, "loss", LIGHT_BLUE) > 0 == count(page, "loss", BLUE)
        page.emulate_media(color_scheme="light")
        page.wait_for_timeout(500)  # the page is told of it, and draws anew
        assert count(page, "loss", BLUE) > 0 == count(page, "loss", LIGHT_BLUE)

    def test_nothing_hostile_runs(self, show):
        page = show(make_hostile().to_html(), size=PHONE)
        for details in page.locator("summary").all():
            details.click()
        assert page.evaluate("window.ran === undefined")
        assert page.evaluate("document.scripts.length") == 3
        assert page.locator("img, svg, iframe, object").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        label = page.locator("#gradient_norm .legend button", has_text="window.ran=1").first
        assert "<script>window.ran=1</script>" in label.inner_text()

    def test_the_policy_stops_what_would_get_in(self, show):
        foreign = (
            "<script>window.ran = 1</script><img src='data:,' onerror='window.ran = 1'><b style='color: red'>x</b>"
        )
        html = make_report(1).to_html()
        page = show(html.replace("</main>", f"{foreign}</main>"), errors=True)
        page.wait_for_timeout(100)
        assert page.evaluate("window.ran === undefined")
        assert page.evaluate("getComputedStyle(document.querySelector('b')).color") != "rgb(255, 0, 0)"
        loose = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
        page = show(loose.replace("</main>", f"{foreign}</main>"), errors=True)
        page.wait_for_timeout(100)
        assert page.evaluate("window.ran === 1")  # without the policy it does run: the test can fail

    def test_data_in_the_page_is_the_reports(self, show):
        page = show(make_report(2).to_html())
        data = json.loads(page.evaluate("document.getElementById('chart-data').textContent"))
        assert [chart["id"] for chart in data][:2] == ["loss", "stability_margin"]
