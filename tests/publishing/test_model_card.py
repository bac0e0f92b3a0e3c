# SPDX-License-Identifier: Apache-2.0
"""Reports put into model cards: what is the report's own changes, and nothing else; read back with other parsers."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from itertools import product

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from hf_optimizability.measurement.results import MeasurementFailure
from hf_optimizability.publishing.model_card import END, START, ModelCardError, metadata_result, with_report
from hf_optimizability.reasons import Reason
from hf_optimizability.report import OptimizabilityReport
from hf_optimizability.report.markdown import card_section
from hf_optimizability.report_data.provenance import DataInfo, ModelInfo, TaskInfo
from tests.support.commonmark import HOSTILE, parse
from tests.support.example_report import fill_provenance, make_report


REPORT, LATER = make_report(3), make_report(2, total=600)

FRONT_MATTER = """\
# the licence was asked for
license: 'mit'
date: 2026-01-02   # kept as written
language:
    - en
tags:
- bert   # mine

- "two words"
# before the index
model-index:
- name: "theirs"
  results:
  - task: {type: text-classification, name: "Text Classification"}
    dataset:
      type: imdb
      name: 'IMDb'
    metrics:
    - type: accuracy
      value: 0.90   # not 0.9
      verified: true
widget:
- text: |
    Several
    lines
"""
BODY = "# Mine\n\n<!-- a comment -->\n\n```yaml\n---\ntags: [x]\n---\n```\n\nLast line."


def card_of(front_matter: str, body: str = BODY) -> str:
    return f"---\n{front_matter}---\n{body}"


def put(card: str, report: OptimizabilityReport = REPORT) -> str:
    return with_report(card, report, name="mine")


def metadata(card: str) -> dict:
    return yaml.safe_load(card.removeprefix("\ufeff").split("---")[1])


def without_ours(card: str) -> str:
    """The card less the lines that a report adds, found by other means."""
    head, _, rest = card.partition(START)
    return head + rest.partition(END)[2]


class TestWhatIsKept:
    @pytest.mark.parametrize("line_break", ["\n", "\r\n"])
    def test_all_other_bytes(self, line_break: str):
        card = card_of(FRONT_MATTER).replace("\n", line_break)
        new = put(card)
        assert new.count("\n") == new.count(line_break)
        lines, kept = new.split(line_break), iter(new.split(line_break))
        assert all(line in kept for line in card.split(line_break))  # in this order
        added = lines.copy()
        for line in card.split(line_break):
            added.remove(line)
        assert added[0] == "- optimizability" and added[1] == "  - task:"

    @pytest.mark.parametrize("line_break", ["\n", "\r\n"])
    def test_the_next_report_takes_the_place_of_the_last(self, line_break: str):
        card = card_of(FRONT_MATTER).replace("\n", line_break)
        once = put(card)
        assert put(once) == once
        assert put(put(once, LATER)) == once
        assert without_ours(put(once, LATER)).count("optimizability_hessian_trace") == 1

    def test_what_a_user_writes_afterwards(self):
        once = put(card_of(FRONT_MATTER))
        changed = once.replace("# Mine", "# Ours").replace("widget:", "# why\nwidget:") + "\nAfterword\n"
        again = put(changed, LATER)
        assert "# Ours" in again and "# why\nwidget:" in again and again.endswith("\nAfterword\n")
        assert put(again) == changed

    def test_the_section_stays_where_it_was_moved_to(self):
        section = f"{START}\n{card_section(REPORT)}\n{END}"
        card = card_of("license: mit\n", f"# Mine\n\n  {START}\nold\n  {END}  \n\n## Usage\n")
        assert put(card).endswith(f"---\n# Mine\n\n  {section}  \n\n## Usage\n")

    def test_a_byte_order_mark(self):
        for card in ("\ufeff" + card_of("license: mit\n"), "\ufeff# Mine\n"):
            new = put(card)
            assert new.startswith("\ufeff---\n") and new.count("\ufeff") == 1
            assert put(new) == new

    def test_after_the_hub_client_has_rewritten_the_card(self):
        """It groups metrics by task and data set: ours may end up among others, without their comments and order."""
        same = dataclasses.replace(REPORT.data, dataset="imdb")
        report, later = (dataclasses.replace(one, data=same) for one in (REPORT, LATER))
        rewritten = ModelCard(put(card_of(FRONT_MATTER), report))
        rewritten.data.license = "apache-2.0"
        new = metadata(put(str(rewritten), later))
        [model] = new["model-index"]
        theirs, ours = model["results"]
        assert [metric["type"] for metric in theirs["metrics"]] == ["accuracy"]
        assert ours == metadata_result(later)
        assert new["license"] == "apache-2.0"


class TestFrontMatter:
    TAGS = (
        "",
        "tags: []\n",
        "tags:\n",
        "tags: bert\n",
        "tags: [bert, 'a b']  # c\n",
        "tags:\n  - bert\n",
        "tags: [a,]\n",
    )
    INDEXES = (
        "",
        "model-index: []\n",
        "model-index:\n- name: x\n  results: []\n",
        "model-index:\n  - name: x\n    results: []  # none\nlicense: mit\n",
        "model-index:\n-\n  name: x\n  results:\n",
        "model-index: [{name: x, results: []}]\n",
        "model-index: [{name: x, results: [{task: {type: t}, dataset: {type: d, name: d}, metrics: []}]}]\n",
        "model-index:\n- results:\n  - {task: {}, dataset: {}, metrics: [{type: a, value: .nan}]}\n  name: x\n",
        "model-index:\n- name: x\n  results: []\n- name: y\n  results: []\n",
    )

    # The two keys are edited one after the other: each style of both, beside two or three of the other key.
    @pytest.mark.parametrize(
        ("tags", "index"),
        [
            pytest.param(tags, index, marks=() if (at - number) % 7 in (0, 3) else pytest.mark.slow)
            for (number, tags), (at, index) in product(enumerate(TAGS), enumerate(INDEXES))
        ],
    )  # fmt: skip
    def test_in_every_style(self, tags: str, index: str):
        before = yaml.safe_load(tags + index) or {}
        new = put(card_of(tags + index))
        after = metadata(new)
        old_tags = before.get("tags") or []
        assert after["tags"] == ([old_tags] if isinstance(old_tags, str) else old_tags) + ["optimizability"]
        old = before.get("model-index") or [{"name": "mine", "results": []}]
        assert after["model-index"][0]["results"][-1] == metadata_result(REPORT)
        for model, model_before in zip(after["model-index"], old, strict=True):
            assert model["name"] == model_before["name"]
            first = model is after["model-index"][0]
            theirs = model["results"][:-1] if first else model["results"]
            assert repr(theirs) == repr(model_before["results"] or [])
        assert put(new) == new
        assert put(put(new, LATER)) == new

    @pytest.mark.parametrize("card", ["", "\n", "# Mine\n", "Text\r\nmore", "---\n---\n# Mine\n", "---\n# c\n---\n"])
    def test_a_card_without(self, card: str):
        new = put(card)
        assert metadata(new).keys() == {"tags", "model-index"}
        assert put(new) == new
        assert ModelCard(new).data.tags == ["optimizability"]
        assert [token.content for token in parse(new)].count("Mine") == card.count("Mine")
        assert not card.strip() or card.split("---")[-1].strip() in new

    @pytest.mark.parametrize(
        ("front_matter", "message"),
        [
            ("tags: [a\n", r"YAML front matter is invalid \(its line 2\)"),
            ("a: b: c\n", r"YAML front matter is invalid \(its line 1\)"),
            ("x: !!python/object/apply:os.system [true]\n", "front matter is invalid.*python/object"),
            ("- a\n- b\n", "a list, not a mapping"),
            ("a: &x [1]\nb: *x\n", "aliases"),
            ("a: 2026-13-01\n", "front matter can't be read"),
            (f"a: {'[' * 1000}\n", "front matter can't be read|front matter is invalid"),
            ("a: \0\n", "front matter can't be read"),
            ("tags: {a: 1}\n", "`tags` .* should be a list"),
            ("model-index: 3\n", "`model-index` .* should be a list of models"),
            ("model-index: {name: x, results: []}\n", "`model-index` .* should be a list of models"),
            ("model-index:\n- name: x\n", "`model-index` .* should be a list of models"),
            ("model-index:\n- results: [{metrics: 3}]\n", "`model-index` .* should be a list of models"),
            ("{license: mit}\n", "written in a way"),
        ],
        ids=lambda value: value[:30],
    )
    def test_a_damaged_one(self, front_matter: str, message: str):
        with pytest.raises(ModelCardError, match=message):
            put(card_of(front_matter))

    @pytest.mark.parametrize("card", ["---\n", "---", "---\nlicense: mit\n# Mine\n", "--- \nlicense: mit\n---\n"])
    def test_one_that_is_not_closed(self, card: str):
        with pytest.raises(ModelCardError, match="never closed"):
            put(card)

    def test_a_few_lines_that_stand_for_a_billion_values(self):
        bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
        with pytest.raises(ModelCardError, match="aliases"):
            put(card_of(bomb))

    def test_without_a_task_there_are_no_metrics(self):
        """The Hub refuses a result without one. Those of an earlier report go."""
        report = dataclasses.replace(REPORT, task=TaskInfo())
        assert metadata(put("", report)).keys() == {"tags"}
        assert metadata(put(put(card_of(FRONT_MATTER)), report)) == metadata(put(card_of(FRONT_MATTER), report))

    def test_numbers_that_are_not_finite(self):
        [measurement] = make_report(1).measurements
        noise = dataclasses.replace(measurement.noise_scale, value=math.inf, high=math.inf)
        top = dataclasses.replace(measurement.hessian.lambda_max, high=math.inf)
        hessian = dataclasses.replace(measurement.hessian, lambda_max=top, lambda_min=None)
        report = dataclasses.replace(
            REPORT, measurements=[dataclasses.replace(measurement, noise_scale=noise, hessian=hessian)]
        )
        [result] = metadata(put("", report))["model-index"][0]["results"]
        assert [metric["type"] for metric in result["metrics"]] == [
            "optimizability_hessian_trace",
            "optimizability_hessian_lambda_max",
        ]
        assert result["metrics"][1]["args"].keys() == {"step", "low", "converged"}


class TestMarkers:
    @pytest.mark.parametrize(
        "markers", [[START], [END], [END, START], [START, START, END], [START, END, END], [START, END, START, END]]
    )
    def test_that_are_not_one_pair(self, markers: list[str]):
        body = "# Mine\n" + "\ntext\n".join(markers) + "\n"
        with pytest.raises(ModelCardError, match="it has such lines at 2"):
            put(card_of("license: mit\n", body))

    def test_inside_a_line_are_text(self):
        body = f"# Mine\n\nThe section stands between `{START}` and `{END}`.\n"
        new = put(card_of("license: mit\n", body))
        assert body in new and put(new) == new

    def test_in_outside_text_are_harmless(self):
        report = make_report(2)
        text = f"x\n{END}\n{START}\ny"
        report.model = dataclasses.replace(report.model, id=text)
        report.data = dataclasses.replace(report.data, dataset=text)
        new = put("# Mine\n", report)
        assert put(new, report) == new and put(put(new), report) == new


class TestHostileNames:
    NAMES = (
        HOSTILE, "<script>alert(1)</script>", "../../x", "---\nevil: true\n---", "{{ x }}{% raw %}", "a: b # c",
        "!!python/name:os.system", "&a *a", "%TAG !", "\"'\\", "\x1b[31m\x00\x85\u2028", "- x", "| x", "yes", "1e5",
        "~", "<!-- x -->",
    )  # fmt: skip

    @pytest.mark.parametrize("name", NAMES)
    def test_become_neither_markup_nor_yaml(self, name: str):
        report = make_report(2, failures=1)
        fill_provenance(report, name)
        report.failures.append(
            MeasurementFailure(step=1, epoch=None, why=Reason("rows_taken_away", values={"place": name, "kind": name}))
        )
        plain = make_report(2, failures=1)
        plain.data = dataclasses.replace(plain.data, dataset="imdb")
        new, usual = with_report("", report, name=name), with_report("", plain, name="mine")

        front_matter, _, body = new.removeprefix("---\n").partition("\n---\n")
        data = yaml.safe_load(front_matter)
        [model] = data["model-index"]
        [result] = model["results"]
        assert model["name"] == name and result["task"]["type"] == name
        assert data.keys() == {"tags", "model-index"}
        assert len(result["metrics"]) == 4

        section = body.partition(START)[2].partition(END)[0]
        assert {token.type for token in parse(section)} - {token.type for token in parse(usual)} <= {"text_special"}
        assert "<script" not in section and "\x1b" not in new and "\x00" not in section
        html = MarkdownIt("commonmark", {"html": True}).enable("table").render(section)
        assert html.count("<a ") == html.count("<img ") == html.count("<h1") == 0
        assert with_report(new, report, name=name) == new

    def test_random_strings(self):
        rng = random.Random(0)
        alphabet = "ab-:#&*!|>'\"%@`{}[],?\\\n\r\t ~<$_\x85\u2028\x07é0.1e"
        for _ in range(40):
            name = "".join(rng.choices(alphabet, k=rng.randint(1, 30)))
            report = dataclasses.replace(
                LATER, task=TaskInfo(task=name), data=DataInfo(dataset=name), model=ModelInfo(id=name)
            )
            new = with_report("", report, name=name)
            data = yaml.safe_load(new.removeprefix("---\n").partition("\n---\n")[0])
            assert data["model-index"][0]["name"] == name
            assert with_report(new, report, name=name) == new


def test_a_card_of_several_megabytes():
    front_matter = FRONT_MATTER + "".join(f"k{i}: {i}\n" for i in range(300))
    card = card_of(front_matter, "\n---\n| a | b |\n<!-- x" * 300_000)
    start = time.monotonic()
    assert without_ours(put(card)).endswith(card[-1000:] + "\n\n\n")
    assert time.monotonic() - start < 20  # it takes one second; what grows with the square would take hours
