# SPDX-License-Identifier: Apache-2.0
"""`report.json`: its schema, checked with another validator; older and damaged files."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import report_schema as report_schema_script
from hypothesis import HealthCheck, assume, given, settings

from hf_optimizability.curvature.eigenvalue_check import EigenvalueCheck
from hf_optimizability.diagnosis.findings import SEVERITIES
from hf_optimizability.measurement.results import Measurement
from hf_optimizability.report import SCHEMA_VERSION, OptimizabilityReport
from hf_optimizability.report.markdown import card_section, to_markdown
from hf_optimizability.report_data.schema import report_schema, upgraded
from tests.support.blank_plots import leave_plots_undrawn
from tests.support.damaged_report import HOSTILE, damaged, places, to_json
from tests.support.example_report import make_report, with_tasks
from tests.support.html_page import read_page


OLDER = [Path(__file__).parent / "versions" / f"version_{version}.json" for version in range(1, SCHEMA_VERSION)]
"""Each written by a commit of this package that had that version, from a tiny BERT."""

VERSION_1 = OLDER[0]
WITH_TASKS = Path(__file__).parent / "versions" / "version_4_tasks.json"
PUBLISHED = sorted(Path(__file__).parents[2].glob("model_cards/*/optimizability/report.json"))

CHECKS: dict[str, Any] = {
    "self_check": None,
    "eigenvalue_checks": [],
    "population": None,
    "batch_sharpness": None,
    "batch_sharpness_failure": None,
}
"""Fields that came later."""

REPORT: dict[str, Any] = json.loads(json.dumps(make_report(2, blocks=3, failures=1).to_dict()))
WITH_EVERYTHING: dict[str, Any] = json.loads(
    json.dumps(with_tasks(make_report(2, blocks=3, failures=1), ["a", "b", "c"]).to_dict())
)
for one in WITH_EVERYTHING["measurements"]:
    for points in ("grid", "density"):
        del one["hessian"]["density"][points][12:]  # 336 of them would take most of the damage and of the time
ORACLE = jsonschema.Draft202012Validator(report_schema())
QUIET = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    max_examples=60,
)


def betas_are_a_number(data: Any) -> None:
    data["training"]["optimizer_settings"]["betas"] = 0.9


def learning_rate_is_a_string(data: Any) -> None:
    data["training"]["learning_rate"] = "2e-5"


def settings_are_lists(data: Any) -> None:
    data["training"]["optimizer_settings"] = {"lr": [1e-3], "momentum": [0.9], "weight_decay": [[]], "foreach": None}


def a_task_is_missing_in_conflicts(data: Any) -> None:
    data["measurements"][0]["multitask"]["conflicts"].pop()


def a_task_is_only_in_conflicts(data: Any) -> None:
    data["measurements"][0]["multitask"]["conflicts"][0]["first"] = "other"


def a_block_is_missing_in_a_task(data: Any) -> None:
    data["measurements"][0]["multitask"]["tasks"]["a"]["blocks"].popitem()


def a_block_is_missing_in_conflicts(data: Any) -> None:
    data["measurements"][0]["multitask"]["conflicts"][0]["blocks"].popitem()


def no_difference_was_tried(data: Any) -> None:
    check = EigenvalueCheck("lambda_max", 2.0, (), (), "agrees")
    data["measurements"][-1]["eigenvalue_checks"] = [dataclasses.asdict(check)]


def no_blocks(data: Any) -> None:
    data["measurements"][0]["blocks"] = {}


def no_tasks(data: Any) -> None:
    data["measurements"][0]["multitask"] = {"tasks": {}, "conflicts": []}


def blocks_differ_between_measurements(data: Any) -> None:
    data["measurements"][0]["blocks"]["other"] = data["measurements"][0]["blocks"].popitem()[1]


def tasks_differ_between_measurements(data: Any) -> None:
    data["measurements"][-1]["multitask"] = None


def options_are_nested(data: Any) -> None:
    data["config"]["blocks"] = functools.reduce(lambda inner, _: [inner], range(300), [])


def an_entry_of_the_log_is_nested(data: Any) -> None:
    data["log_history"][0]["x"] = functools.reduce(lambda inner, _: {"": inner}, range(900), {})


def all_numbers_are(value: Any) -> Any:
    def damage(data: Any) -> None:
        for holder, key in list(places(data)):
            if isinstance(holder[key], float):
                holder[key] = value

    damage.__name__ = f"all numbers are {value}"
    return damage


DAMAGE = (
    betas_are_a_number, learning_rate_is_a_string, settings_are_lists, a_task_is_missing_in_conflicts,
    a_task_is_only_in_conflicts, a_block_is_missing_in_a_task, a_block_is_missing_in_conflicts, no_blocks, no_tasks,
    options_are_nested, an_entry_of_the_log_is_nested, no_difference_was_tried,
    blocks_differ_between_measurements, tasks_differ_between_measurements,
    *map(all_numbers_are, (0, -1, 1e300, -1e300, 5e-324, 10**18, None)),
)  # fmt: skip


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_plots_undrawn(monkeypatch)


def changed(**values: Any) -> dict[str, Any]:
    return {**copy.deepcopy(REPORT), **values}


WITH_A_SENTENCE = {**REPORT["failures"][0], "why": {**REPORT["failures"][0]["why"], "error": "no file"}}


def renamed_back(measurement: Any) -> Any:
    """The measurement with the names of version 4."""
    old = {
        "num_items": "items",
        "quadratic_model": "along_gradient",
        "curvature_along_gradient": "along_gradient",
        "optimizer_stability": "step_size",
        "multitask": "several",
        "central_difference_error": "engine_error",
        "unused_embedding_parameters": "left_out",
        "which": "end",
    }
    if isinstance(measurement, dict):
        later = "peak_learning_rate"
        return {old.get(name, name): renamed_back(value) for name, value in measurement.items() if name != later}
    return [renamed_back(item) for item in measurement] if isinstance(measurement, list) else measurement


class TestSchema:
    def test_is_a_valid_schema(self):
        jsonschema.Draft202012Validator.check_schema(report_schema())

    @pytest.mark.parametrize(
        "report",
        [
            OptimizabilityReport(),
            make_report(0, failures=2),
            make_report(1, converged=False),
            make_report(3, failures=1),
            with_tasks(make_report(2), ["a", "<b>|`x`\n"]),
            OptimizabilityReport(log_history=[{"loss": float("nan"), "step": 1, "eval_f1": 0.5}]),
        ],
        ids=["empty", "all failed", "one", "full", "several tasks", "odd log"],
    )
    def test_every_report_is_valid_and_comes_back_the_same(self, report, tmp_path):
        data = json.loads(report.save_json(tmp_path).read_bytes())
        ORACLE.validate(data)
        assert OptimizabilityReport.load(tmp_path).to_dict() == report.to_dict()

    def test_is_that_of_the_dataclasses(self):
        written = json.dumps(report_schema(), indent=2, ensure_ascii=False) + "\n"
        assert written == report_schema_script.text(), "The result dataclasses have changed: run `make schema`."

    def test_knows_every_field(self):
        schema = report_schema()
        assert schema["additionalProperties"] is False
        fields = {field.name for field in dataclasses.fields(OptimizabilityReport)}
        assert set(schema["required"]) == fields | {"findings"}
        assert set(schema["properties"]) == fields | {"findings", "rules", "verdict"}
        definition = schema["$defs"]["Measurement"]
        assert definition["additionalProperties"] is False
        assert set(definition["properties"]) == {field.name for field in dataclasses.fields(Measurement)} | {
            "converged"
        }

    def test_versions_and_severities_are_those_of_the_code(self):
        schema = report_schema()
        assert schema["properties"]["schema_version"]["enum"] == [SCHEMA_VERSION]
        assert tuple(schema["$defs"]["Finding"]["properties"]["severity"]["enum"]) == SEVERITIES

    @QUIET
    @given(damaged(REPORT))
    def test_our_check_agrees_with_jsonschema(self, data):
        assume(data.get("schema_version") == SCHEMA_VERSION)
        try:
            upgraded(data)
        except ValueError as error:
            told = re.search("different lengths|other blocks than|not one for each pair", str(error))
            assert told or not ORACLE.is_valid(data)
        else:
            ORACLE.validate(data)


class TestOlderVersions:
    def test_version_1_loads_with_its_numbers(self):
        written = json.loads(VERSION_1.read_bytes())
        report = OptimizabilityReport.load(VERSION_1)
        assert written["schema_version"] == 1
        assert report.schema_version == SCHEMA_VERSION
        for measurement, old in zip(report.measurements, written["measurements"], strict=True):
            assert measurement.hessian.trace.value == old["hessian"]["trace"]["value"]
            assert measurement.hessian.lambda_min.residual == old["hessian"]["lambda_min"]["residual"]
            assert {name: block.grad_norm for name, block in measurement.blocks.items()} == {
                name: block["grad_norm"] for name, block in old["blocks"].items()
            }
            assert measurement.noise_scale is measurement.optimizer_stability is measurement.hessian.density is None

    def test_version_2_loads_with_its_numbers(self):
        written = json.loads(OLDER[1].read_bytes())
        report = OptimizabilityReport.load(OLDER[1])
        assert written["schema_version"] == 2
        assert [measurement.landscape for measurement in report.measurements] == [None] * 2
        data = json.loads(json.dumps(report.to_dict()))
        assert [renamed_back(measurement) for measurement in data["measurements"]] == [
            {**old, **CHECKS, "landscape": None, "several": None} for old in written["measurements"]
        ]

    def test_version_3_loads_with_its_numbers(self):
        written = json.loads(OLDER[2].read_bytes())
        report = OptimizabilityReport.load(OLDER[2])
        assert written["schema_version"] == 3
        data = json.loads(json.dumps(report.to_dict()))
        assert [renamed_back(measurement) for measurement in data["measurements"]] == [
            {**old, **CHECKS, "several": None} for old in written["measurements"]
        ]
        assert data["measurements"][-1]["landscape"]["update"] is not None

    @pytest.mark.parametrize("file", [OLDER[3], WITH_TASKS], ids=["one task", "tasks"])
    def test_version_4_loads_with_its_numbers(self, file):
        written = json.loads(file.read_bytes())
        report = OptimizabilityReport.load(file)
        assert written["schema_version"] == 4
        assert (report.measurements[0].multitask is None) == (file != WITH_TASKS)
        assert report.measurements[0].eigenvalue_checks[0].which == "lambda_max"
        data = json.loads(json.dumps(report.to_dict()))
        for measurement, old in zip(data["measurements"], written["measurements"], strict=True):
            for name, value in {"repeat_error": None, "counted_by": [], "count_in_doubt": False}.items():
                old["self_check"].setdefault(name, value)  # came later
            old.setdefault("population", None)
            old.setdefault("batch_sharpness", None)
            old.setdefault("batch_sharpness_failure", None)
            assert renamed_back(measurement) == old

    @pytest.mark.parametrize("file", [WITH_TASKS, *PUBLISHED], ids=lambda file: file.parents[1].name)
    def test_each_is_valid_in_the_present_layout(self, file):
        ORACLE.validate(json.loads(json.dumps(OptimizabilityReport.load(file).to_dict())))

    @pytest.mark.parametrize("file", OLDER, ids=lambda file: file.stem)
    def test_each_renders(self, file, tmp_path, monkeypatch):
        if file != VERSION_1:  # which has the fewest of the fields that plots need
            leave_plots_undrawn(monkeypatch)
        report = OptimizabilityReport.load(file)
        assert report.schema_version == SCHEMA_VERSION
        ORACLE.validate(json.loads(json.dumps(report.to_dict())))
        report.save(tmp_path)
        assert "BertForSequenceClassification on text-classification" in (tmp_path / "report.html").read_text()

    def test_a_damaged_old_one_is_told(self, tmp_path):
        data = json.loads(VERSION_1.read_bytes())
        del data["measurements"][0]["hessian"]
        (tmp_path / "report.json").write_bytes(to_json(data))
        with pytest.raises(ValueError, match=r"not in the layout of schema version 1 \(KeyError: 'hessian'\)"):
            OptimizabilityReport.load(tmp_path)


class TestDamaged:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", r"not valid JSON .* Restore the file"),
            (to_json(REPORT)[:5000], r"not valid JSON .* Restore the file"),
            (b"\xff\xfe{}", r"not valid JSON \('utf-8' codec .* Restore the file"),
            (b"[" * 100_000, r"nested too deep for a report\. Restore the file"),
            (b"[1, 2]", r"holds a list, not a report\. Pass the `report\.json`"),
            (b"{}", r"`schema_version` is None, not a number from 1 to 5\. Restore"),
            (to_json(changed(schema_version=True)), r"`schema_version` is True"),
            (to_json(changed(schema_version=SCHEMA_VERSION + 1)), r"reads up to 5\. Upgrade hf-optimizability"),
            (to_json(changed(measurements=None)), r"report\.measurements is None, not of type array\. Restore"),
            (to_json(changed(more=1)), r"report\.more is not known"),
            (to_json(changed(log_history=[{"loss": 1.0}])), r"report\.log_history\[0\] lacks 'step'"),
            (to_json(changed(log_history=[{"step": -1}])), r"report\.log_history\[0\]\.step is -1, less than 0"),
            (
                to_json(changed(failures=[WITH_A_SENTENCE])),
                r"report\.failures\[0\]\.why\.error is 'no file', not of the form",
            ),
            (to_json(changed(created=HOSTILE[0] * 10)), None),
            (b'{"schema_version": 3, "created": NaN}', r"the number NaN is not finite"),
            (b'{"schema_version": 3, "created": 1e999}', r"the number 1e999 is not finite"),
            (b'{"schema_version": 3, "created": ' + b"9" * 5000 + b"}", r"the number 9+… is too large"),
        ],
    )
    def test_the_error_names_the_file_what_is_wrong_and_what_to_do(self, content, message, tmp_path):
        file = tmp_path / "report.json"
        file.write_bytes(content)
        if message is None:
            OptimizabilityReport.load(file)
            return
        with pytest.raises(ValueError, match=message) as raised:
            OptimizabilityReport.load(tmp_path)
        assert str(raised.value).startswith(f"{file} can't be read as a report. ")
        assert len(str(raised.value)) < len(str(file)) + 250
        assert raised.value.__suppress_context__  # no traceback from inside

    def test_lists_that_go_together_have_one_length(self):
        data = copy.deepcopy(REPORT)
        data["measurements"][1]["hessian"]["ritz_weights"].pop()
        with pytest.raises(ValueError, match=r"measurements\[1\].hessian has `ritz_values` and `ritz_weights`"):
            OptimizabilityReport.from_dict(data)

    @pytest.mark.parametrize("slice_", ["update", "eigenvectors"])
    def test_slices_have_a_loss_for_each_place(self, slice_):
        data = copy.deepcopy(REPORT)
        data["measurements"][1]["landscape"][slice_]["losses"].pop()
        with pytest.raises(
            ValueError, match=r"measurements\[1\].landscape has axes and `losses` of different lengths"
        ):
            OptimizabilityReport.from_dict(data)

    def test_a_file_that_is_not_there_is_told_as_such(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            OptimizabilityReport.load(tmp_path)

    @settings(QUIET, max_examples=50)
    @given(damaged(WITH_EVERYTHING))
    def test_a_damaged_report_is_a_clear_error_or_a_harmless_page(self, tmp_path_factory, undrawn, data):
        check_damaged(tmp_path_factory.getbasetemp() / "damaged.json", data)

    @pytest.mark.slow
    @pytest.mark.timeout(1200)
    @settings(QUIET, max_examples=3000)
    @given(damaged(WITH_EVERYTHING))
    def test_many_damaged_reports(self, tmp_path_factory, undrawn, data):
        check_damaged(tmp_path_factory.getbasetemp() / "damaged.json", data)

    def test_what_a_training_may_record_otherwise_renders(self, tmp_path, undrawn):
        """A rate for each of several parts, and a log with words in it."""
        data = copy.deepcopy(REPORT)
        assert data["measurements"][-1]["optimizer_stability"] and data["training"]["optimizer_settings"]["betas"]
        rates = {"lr": [1e-3, 1e-4], "momentum": [0.9, 0.9], "beta1": [0.9], "dampening": [], "nesterov": None}
        for optimizer in ("AdamW", "SGD"):
            data["training"] |= {"optimizer": optimizer, "optimizer_settings": rates}
            for key in ("learning_rate", "eval_accuracy", "optimizability/eval_loss"):
                data["log_history"].append({"step": 40, key: "1e-3"})
            check_damaged(tmp_path / "report.json", data)
            OptimizabilityReport.from_dict(data)

    @pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
    def test_what_loads_renders(self, tmp_path, undrawn, damage):
        data = copy.deepcopy(WITH_EVERYTHING)
        damage(data)
        check_damaged(tmp_path / "damaged.json", data)


def check_damaged(file: Path, data: Any) -> None:
    """What loads, renders."""
    file.write_bytes(to_json(data))
    try:
        report = OptimizabilityReport.load(file)
    except ValueError as error:
        assert re.match(rf"{re.escape(str(file))} can't be read as a report\. .*\.$", str(error))
        return
    page = read_page(report.to_html())
    assert page.scripts == 3
    assert page.tags <= PLAIN.tags
    assert page.events == []
    assert "<script" not in to_markdown(report) and "<script" not in card_section(report)
    report.summary().encode()
    assert all(finding.sentence for finding in report.findings)
    published = report.published()
    assert json.loads(published.files()["report.json"]) == published.to_dict()
    assert OptimizabilityReport.from_dict(json.loads(json.dumps(report.to_dict()))).to_dict() == report.to_dict()


PLAIN = read_page(make_report(2, blocks=3, failures=1, converged=False).to_html())
"""The page of a report without hostile strings, with everything that a page may hold."""
