# SPDX-License-Identifier: Apache-2.0
"""The page and the Markdown of a comparison: read back, and the page opened in a headless Chromium."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from markdown_it import MarkdownIt

from hf_optimizability import Comparison, OptimizabilityReport
from hf_optimizability.comparing.pages import charts, pareto_front, verdict
from hf_optimizability.comparing.results import Entry, Failure, Run
from hf_optimizability.number_format import format_interval
from hf_optimizability.reasons import Reason
from hf_optimizability.report_data.provenance import ModelInfo
from tests.support.browser import DESKTOP, PHONE
from tests.support.damaged_report import HOSTILE
from tests.support.example_comparison import make_comparison
from tests.support.html_page import read_page


TWO = {"good": 0.9, "bad": 0.5}
SECTIONS = ["Summary", "Cost", "Curves", "Dynamics", "Candidates", "Method"]


def make_hostile() -> Comparison:
    """A comparison that is hostile wherever something comes from outside."""
    comparison = make_comparison(dict(zip(HOSTILE, [0.9] * len(HOSTILE), strict=True)))
    every = "\n".join(HOSTILE)
    for entry in comparison.entries:
        entry.changes = dict.fromkeys(HOSTILE, every)
        for run in entry.runs:
            run.report.model = ModelInfo(id=every, class_name=every)
            run.report.training.update(optimizer=every, learning_rate=every)
    comparison.entries.append(Entry(f"failed {every}", {}, [], Failure(42, Reason("training_failed", error=every))))
    flags = dict.fromkeys(HOSTILE, every)
    comparison.setting = dataclasses.replace(
        comparison.setting, task=every, dataset=every, settings=flags, versions=flags
    )
    return comparison


class TestNumbers:
    def test_ranking_and_pairs(self):
        comparison = make_comparison({"good": 0.9, "alike": 0.895, "bad": 0.5}, failed=True)
        tables = read_page(comparison.to_html()).tables
        ranking = comparison.ranking
        assert [row[:2] for row in tables["Ranking"][1:]] == [["good", "1"], ["alike", "1"], ["bad", "3"]]
        at = {name: ranking.names.index(name) for name in ("good", "bad")}
        row = tables["Two by two"][1 + at["good"]]
        assert row[1 + at["good"]] == ""
        value, low, high = ranking.differences[at["good"]][at["bad"]]
        assert row[1 + at["bad"]] == "> 0.999" + format_interval(100 * value, 100 * low, 100 * high)
        assert float(tables["Ranking"][1][2].partition(" ")[0]) == pytest.approx(100 * ranking.values[0], abs=0.5)

    def test_rows_have_the_cells_of_their_heads(self):
        for label, table in read_page(make_comparison(TWO, failed=True).to_html()).tables.items():
            assert len({len(row) for row in table if row}) <= 1, label

    def test_size_source_and_architecture(self):
        comparison = make_comparison(TWO)
        table = read_page(comparison.to_html()).tables["Candidates by size"]
        assert [row[0] for row in table[1:]] == ["good", "bad", "dropped"]
        assert table[1][1:5] == ["10,000,000", "100 %", "sentence-transformers/all-MiniLM-L6-v2",
                                 "BertForSequenceClassification"]  # fmt: skip
        assert table[3][3] == "none: random weights"

    def test_costs_are_means_over_the_seeds(self):
        table = read_page(make_comparison(TWO).to_html()).tables["Cost"]
        assert table[1] == ["good", "60", "31.0 (28.5 to 33.5)", "4.00", "768 MiB", "yes"]
        assert table[2][2:] == ["61.0 (58.5 to 63.5)", "8.00", "768 MiB", "no"]

    def test_the_front_is_what_none_is_known_to_beat(self):
        def seconds(run: Run) -> float | None:
            return run.train_seconds

        comparison = make_comparison({"cheap": 0.5, "middle": 0.4, "dear": 0.9})
        assert pareto_front(comparison, seconds) == {"cheap", "dear"}
        assert pareto_front(comparison, lambda run: None) == set()
        comparison.setting = dataclasses.replace(comparison.setting, rank_by="loss")
        del comparison.__dict__["ranking"]
        assert pareto_front(comparison, seconds) == {"cheap", "dear"}

    def test_noise_of_the_clock_drives_no_copy_off_the_front(self):
        comparison = make_comparison({"one": 0.8, "copy": 0.8, "worse": 0.5})
        noise = {"one": (30, 33, 36), "copy": (27, 31, 35), "worse": (29, 33, 35)}
        times = {(name, 42 + at): value for name, values in noise.items() for at, value in enumerate(values)}
        names = {id(run): entry.name for entry in comparison.entries for run in entry.runs}
        found = pareto_front(comparison, lambda run: times.get((names[id(run)], run.seed)))
        assert found == {"one", "copy"}
        times.update({("copy", 42 + at): 15 + at for at in range(3)})
        assert pareto_front(comparison, lambda run: times.get((names[id(run)], run.seed))) == {"copy"}

    def test_charts_hold_the_mean_over_the_seeds(self):
        comparison = make_comparison(TWO)
        drawn = {chart["id"]: chart for chart in charts(comparison)}
        assert list(drawn) == ["pareto_training", "pareto_prediction", "loss", "eval_loss", "eval_accuracy",
                               "lambda_max", "trace"]  # fmt: skip
        assert drawn["eval_accuracy"]["series"][0]["y"] == [0.225, 0.45, 0.675, 0.9]
        comparison.entry("good").runs[1].report.log_history[-1]["eval_accuracy"] = 0.3
        assert charts(comparison)[4]["series"][0]["y"][-1] == pytest.approx(0.7)
        measured = [m.hessian.lambda_max.value for m in comparison.entry("good").runs[0].report.measurements]
        assert drawn["lambda_max"]["series"][0]["y"] == pytest.approx(measured, rel=1e-5)

    def test_verdicts(self):
        [told] = verdict(make_comparison(TWO))
        assert told == "good is better than every other candidate, with a probability above 0.999."
        [told] = verdict(make_comparison({"a": 0.9, "b": 0.9, "c": 0.4}))
        assert told.startswith("a and b are statistically tied") and "probability of 0.5." in told
        assert told.endswith("1 other is worse than at least one of them.")

    def test_one_seed_is_admitted(self):
        one, three = make_comparison(TWO, seeds=1), make_comparison(TWO)
        for text in (one.to_html(), one.to_markdown()):
            assert "There was one seed" in text and "say nothing about how another seed would do" in text
        assert "There was one seed" not in three.to_html() + three.to_markdown()

    def test_a_failure_and_what_was_dropped_are_told(self):
        comparison = make_comparison(TWO, failed=True)
        for text in (read_page(comparison.to_html()).text, comparison.to_markdown().replace("\\", "")):
            assert "Out of memory (OutOfMemoryError). Lower --per_device_train_batch_size" in text
            assert "dropped: dropped after round 1" in text

    def test_it_is_the_same_after_a_round_trip(self, tmp_path):
        comparison = make_comparison(TWO, failed=True)
        comparison.save(tmp_path)
        again = Comparison.load(tmp_path)
        assert again.to_html() == comparison.to_html()
        assert again.to_markdown() == comparison.to_markdown()

    def test_markdown_tables_are_tables(self):
        text = make_comparison(TWO, failed=True).to_markdown()
        tokens = MarkdownIt("commonmark").enable("table").parse(text)
        assert sum(token.type == "table_open" for token in tokens) == 5
        assert not re.search(r"\n{3,}", text)


class TestHostile:
    def test_nothing_from_outside_becomes_markup(self):
        plain, hostile = read_page(make_comparison(TWO, failed=True).to_html()), read_page(make_hostile().to_html())
        assert hostile.tags <= plain.tags
        assert hostile.scripts == plain.scripts == 3
        assert hostile.events == [] and set(hostile.links) == set(plain.links)
        assert "<script>window.ran=1</script>" in hostile.text
        assert not re.search("[\u202e\u2066\ud800\x1b]", hostile.text)

    def test_nor_in_markdown(self):
        html = MarkdownIt("commonmark", {"html": True}).enable("table").render(make_hostile().to_markdown())
        assert not re.search(r"<(script|img|svg)", html)

    @pytest.mark.slow
    def test_nothing_runs(self, show):
        page = show(make_hostile().to_html(), size=PHONE)
        for details in page.locator("summary").all():
            details.click()
        assert page.evaluate("window.ran === undefined")
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]


class TestBrowser:
    @pytest.mark.parametrize(
        ("size", "scheme"),
        [
            pytest.param(PHONE, "light", id="phone, light", marks=pytest.mark.slow),
            pytest.param(DESKTOP, "dark", id="desktop, dark", marks=pytest.mark.slow),
            pytest.param(PHONE, "dark", id="phone, dark", marks=pytest.mark.slow),
            pytest.param(DESKTOP, "light", id="desktop, light", marks=pytest.mark.slow),
        ],
    )
    def test_fits_is_quiet_and_accessible(self, show, size, scheme):
        from axe_playwright_python.sync_playwright import Axe

        comparison = make_comparison({"a/rather-long-name-of-a-checkpoint": 0.9, "b": 0.85, "c": 0.5}, failed=True)
        page = show(comparison.to_html(), size=size, scheme=scheme)
        for details in page.locator("summary").all():
            details.click()
        assert page.evaluate("document.documentElement.scrollWidth") == size["width"]
        found = Axe().run(page).response["violations"]
        assert [(rule["id"], rule["nodes"][0]["html"]) for rule in found] == []
        assert page.locator("canvas").count() == 7
        assert [heading.inner_text() for heading in page.locator("h2").all()] == SECTIONS

    def test_the_points_of_the_pareto_plot_bear_their_numbers(self, show):
        page = show(make_comparison(TWO).to_html())
        page.locator("#pareto_training summary").click()
        rows = [row.split("\t") for row in page.locator("#pareto_training table").inner_text().splitlines()]
        assert rows[0] == ["seconds of training", "Pareto front", "1. good", "2. bad"]
        assert rows[1][0] == "31" and rows[1][3] == "–" and rows[2][2] == "–"
        texts = page.evaluate(
            """async () => {
              const texts = [];
              const original = CanvasRenderingContext2D.prototype.fillText;
              CanvasRenderingContext2D.prototype.fillText = function (text, ...at) {
                texts.push(text);
                return original.call(this, text, ...at);
              };
              dispatchEvent(new Event("beforeprint"));
              await new Promise(requestAnimationFrame);
              return texts;
            }"""
        )
        assert {"1", "2"} <= set(texts)


@pytest.mark.parametrize(
    "comparison",
    [
        Comparison(dataclasses.replace(make_comparison(TWO).setting, examples=None), [], []),
        make_comparison({"only": 0.5}),
        make_comparison({f"candidate {i}": 0.5 + i / 50 for i in range(20)}),
    ],
    ids=["empty", "one", "twenty"],
)
def test_any_comparison_has_a_page(comparison: Comparison):
    page = read_page(comparison.to_html())
    assert [text for level, text in page.headings if level == 2] == SECTIONS
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert comparison.to_markdown() and comparison.summary()
    json.dumps(comparison.to_dict(), allow_nan=False)


def test_numbers_that_are_not_known_are_dashes():
    report = OptimizabilityReport(model=ModelInfo(id="org/a"))
    comparison = make_comparison(TWO)
    for entry in comparison.entries:
        entry.runs = [
            dataclasses.replace(run, report=report, train_seconds=None, predict_seconds=None, peak_bytes=None)
            for run in entry.runs
        ]
    assert isinstance(entry.runs[0], Run)
    tables = read_page(comparison.to_html()).tables
    assert tables["Cost"][1] == ["good", "–", "–", "–", "–", "no"]
    assert set(tables["Dynamics"][1][1:]) == {"–"}
