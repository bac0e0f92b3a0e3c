# SPDX-License-Identifier: Apache-2.0
"""A rule that could not be checked says what was missing, and never looks like one that found nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from hf_optimizability.diagnosis.findings import RULES, Diagnosis, Finding, Fine, NotChecked, diagnose
from hf_optimizability.diagnosis.outcome import STATUSES, WORDS, Missing
from hf_optimizability.report import OptimizabilityReport
from hf_optimizability.report.markdown import card_section, to_markdown
from tests.support.example_report import make_estimate, make_report, with_tasks


VERSIONS = sorted((Path(__file__).parents[1] / "report_data" / "versions").glob("*.json"))


def whole() -> OptimizabilityReport:
    """The report of a healthy run in which nothing is missing."""
    report = make_report()
    report.model = dataclasses.replace(report.model, batch_norm=False, classes=2)
    report.training |= {"loss_scale": 1.0, "examples_per_step": 16}
    report.training["optimizer_settings"] |= {"lr": 5e-5}
    scale = dataclasses.replace(make_estimate(35.0, 10.0), low=20.0, high=88.0)
    edit(report, noise_scale=scale)
    return report


def edit(report: OptimizabilityReport, **fields: Any) -> None:
    report.measurements[:] = [dataclasses.replace(measured, **fields) for measured in report.measurements]


def without(change: Callable[[OptimizabilityReport], object]) -> OptimizabilityReport:
    report = whole()
    change(report)
    return report


def with_dynamics(name: str, **values: Any) -> OptimizabilityReport:
    return without(lambda report: report.dynamics[name].update(values))


def with_blocks(number: int) -> OptimizabilityReport:
    report = whole()
    names = list(report.measurements[-1].blocks)
    edit(report, blocks={name: report.measurements[-1].blocks[name] for name in [names[0], *names[-number + 1 :]]})
    return report


def with_logged(losses: int, evaluations: int) -> OptimizabilityReport:
    report = whole()
    report.log_history = [
        *({"loss": 0.7 - step / 100, "step": step} for step in range(1, losses + 1)),
        *({"eval_loss": 0.7 - step / 100, "step": step} for step in range(1, evaluations + 1)),
    ]
    return report


def task_gradients_unknown() -> OptimizabilityReport:
    report = with_tasks(whole(), ["a", "b"])
    for index, measured in enumerate(report.measurements):
        several = measured.multitask
        assert several is not None
        tasks = {name: dataclasses.replace(task, share=None) for name, task in several.tasks.items()}
        conflicts = tuple(dataclasses.replace(pair, cosine=None) for pair in several.conflicts)
        unknown = dataclasses.replace(several, tasks=tasks, conflicts=conflicts)
        report.measurements[index] = dataclasses.replace(measured, multitask=unknown)
    return report


def unknown_traces() -> OptimizabilityReport:
    report = whole()
    last = report.measurements[-1]
    unknown = make_estimate(1.0, float("nan"), kind="std_error")
    edit(report, blocks={name: dataclasses.replace(block, trace=unknown) for name, block in last.blocks.items()})
    return report


def hessian(**changes: Any) -> Callable[[OptimizabilityReport], None]:
    return lambda report: edit(report, hessian=dataclasses.replace(report.measurements[-1].hessian, **changes))


BOTH_LIMITS = ("learning_rate_above_limit", "learning_rate_far_below_limit")
BOTH_BATCHES = ("batch_below_noise_scale", "batch_above_noise_scale")
WIDE = dataclasses.replace(make_estimate(35.0, 10.0), low=1.0, high=1e6)

NOT_CHECKED: list[tuple[tuple[str, ...], NotChecked, OptimizabilityReport]] = [
    # rules, what is missing for them, and a report without it
    (BOTH_LIMITS, NotChecked("optimizer_state"), without(lambda report: edit(report, optimizer_stability=None))),
    (
        BOTH_LIMITS,
        NotChecked("training_mode_sharpness"),
        without(lambda r: setattr(r, "model", dataclasses.replace(r.model, batch_norm=True))),
    ),
    (BOTH_LIMITS, NotChecked("learning_rate"), without(lambda r: r.training["optimizer_settings"].pop("lr"))),
    (("training_unstable",), NotChecked("logged_losses", 5, 6), with_logged(5, 5)),
    (("overfitting",), NotChecked("evaluations", 1, 2), with_logged(9, 1)),
    (("evaluation_unstable",), NotChecked("evaluations", 2, 3), with_logged(9, 2)),
    (
        ("overfitting", "evaluation_unstable"),
        NotChecked("gap"),
        with_dynamics("generalization_gap", std_error=None),
    ),
    (
        ("not_converged",),
        NotChecked("logged_losses", 3, 4),
        with_dynamics("convergence_speed", drop=None, points=3),
    ),
    (
        ("not_converged",),
        NotChecked("loss_fit"),
        with_dynamics(
            "convergence_speed",
            steps_to_90_low=None,
            note="The loss fell, but its scatter is too large to tell how fast.",
        ),
    ),
    (
        ("no_better_than_chance",),
        NotChecked("classes"),
        without(lambda r: setattr(r, "model", dataclasses.replace(r.model, classes=None))),
    ),
    (
        ("batch_norm_statistics",),
        NotChecked("model"),
        without(lambda r: setattr(r, "model", dataclasses.replace(r.model, batch_norm=None))),
    ),
    (
        ("no_better_than_chance", "underfitting"),
        NotChecked("first_measurement"),
        without(lambda r: r.measurements.__delitem__(0)),
    ),
    (("loss_scaled",), NotChecked("trainer"), without(lambda report: report.training.pop("loss_scale"))),
    (("curvature_concentrated",), NotChecked("blocks", 3, 4), with_blocks(3)),
    (("curvature_concentrated",), NotChecked("block_errors"), unknown_traces()),
    (("gradients_exploding", "gradients_vanishing"), NotChecked("blocks", 1, 3), with_blocks(3)),
    (("saddle",), NotChecked("lambda_min"), without(hessian(lambda_min=None))),
    (("saddle",), NotChecked("hessian"), without(lambda report: edit(report, curvature="fisher"))),
    (BOTH_BATCHES, NotChecked("probe_batches", 4), without(lambda report: edit(report, noise_scale=None))),
    (BOTH_BATCHES, NotChecked("probe_batches", 4), without(lambda report: edit(report, noise_scale=WIDE))),
    (BOTH_BATCHES, NotChecked("batch_items"), without(lambda report: report.training.pop("examples_per_step"))),
    (("tasks_conflict", "one_task_dominates"), NotChecked("task_batches"), task_gradients_unknown()),
    (
        ("underfitting", "saddle", "not_converged"),
        NotChecked("final_measurement"),
        without(lambda r: r.measurements.__delitem__(slice(1, None))),
    ),
    (("underfitting",), NotChecked("training"), without(lambda report: report.dynamics.clear())),
    (
        ("errors_wide", "central_differences_off", "measurement_failed", "gradients_dead"),
        NotChecked("measurement"),
        OptimizabilityReport(),
    ),
]


@pytest.mark.parametrize(("rules", "missing", "report"), NOT_CHECKED, ids=lambda value: getattr(value, "missing", ""))
def test_a_rule_says_what_was_missing(rules: tuple[str, ...], missing: NotChecked, report: OptimizabilityReport):
    outcomes = diagnose(report).outcomes
    assert {name: outcomes[name] for name in rules} == dict.fromkeys(rules, missing)
    before = diagnose(whole()).outcomes
    assert all(isinstance(before[name], (Fine, Finding)) for name in rules)


def test_every_rule_and_every_thing_that_can_be_missing_is_tested_above():
    assert {name for rules, *_ in NOT_CHECKED for name in rules} | {"training_unstable"} == {
        rule.__name__ for rule in RULES
    }
    assert {missing.missing for _, missing, _ in NOT_CHECKED} == set(get_args(Missing)) == set(WORDS)


def test_where_nothing_is_missing_all_rules_are_checked():
    report = whole()
    assert {rule.status for rule in report.rules} == {"note", "fine"}
    assert len(report.rules) == len(RULES)
    assert report.verdict.status == "note"
    assert str(report.verdict) == f"No problem and no warning by all {len(RULES)} rules. Also: 1 note."


def finding(name: str, severity: Any, advice: str = "Do this at 1.5e-3. Then that.") -> Finding:
    return Finding(name, severity, f"{name} it is.", ("1",), advice, "")


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ([Fine(), Fine()], "No problem and no warning by all 2 rules."),
        ([Fine(), finding("a", "note")], "No problem and no warning by all 2 rules. Also: 1 note."),
        (
            [Fine(), finding("a", "warning"), finding("b", "problem"), NotChecked("gap"), finding("c", "warning")],
            "Problem: b it is. Do this at 1.5e-3. Also: 2 warnings, 1 of 5 rules could not be checked.",
        ),
        ([finding("a", "warning", "Do it.")], "Warning: a it is. Do it."),
        (
            [NotChecked("blocks", 1, 3), NotChecked("hessian"), NotChecked("hessian"), Fine()],
            "No problem and no warning, but 3 of 4 rules could not be checked: the matrix that was measured is not "
            "the Hessian; the model has too few blocks to compare (1, of 3 needed). Leave `curvature` at 'hessian'.",
        ),
        (
            [NotChecked("gap"), NotChecked("hessian"), NotChecked("trainer"), NotChecked("lambda_min")],
            "No rule could be checked: training and evaluation loss were not "
            "measured alike, with their errors; the matrix that was measured is not the Hessian; and 2 more reasons. "
            "Give the Trainer an `eval_dataset`, and the callback the Trainer.",
        ),
    ],
)
def test_the_verdict_is_one_sentence_with_one_thing_to_do(outcomes: list[Any], verdict: str):
    assert str(Diagnosis({str(index): outcome for index, outcome in enumerate(outcomes)}).verdict) == verdict


def test_a_number_that_is_not_known_is_left_out_of_the_reason():
    assert NotChecked("probe_batches", 4).reason == "so few probe batches (4) do not bound the noise scale"
    assert NotChecked("probe_batches").reason == "so few probe batches do not bound the noise scale"


def test_rules_that_need_attention_come_first():
    outcomes = [Fine(), NotChecked("gap"), finding("a", "note"), finding("b", "problem"), finding("c", "warning")]
    rules = Diagnosis({str(index): outcome for index, outcome in enumerate(outcomes)}).rules
    assert [rule.status for rule in rules] == [*STATUSES]
    assert [rule.missing for rule in rules] == [None, None, None, "gap", None]


def test_terminal_markdown_card_and_json_begin_with_the_verdict(tmp_path: Path):
    report = whole()
    report.training["loss_scale"] = 3.0
    report.training.pop("examples_per_step")
    verdict = "Warning: The loss that was trained is 3.00 times the mean over a step's items."
    assert report.verdict.conclusion == verdict
    assert report.summary().splitlines()[1].startswith(f"Verdict         {verdict}")
    assert to_markdown(report).splitlines()[2].startswith(f"**{verdict}**")
    assert card_section(report).splitlines()[2].startswith(f"**{verdict}**")
    written = json.loads(report.save_json(tmp_path).read_text())
    assert written["verdict"]["sentence"] in verdict and written["verdict"]["status"] == "warning"
    by_name = {rule["name"]: rule for rule in written["rules"]}
    assert by_name["loss_scaled"]["status"] == "warning" and by_name["overfitting"]["status"] == "fine"
    assert by_name["batch_below_noise_scale"]["missing"] == "batch_items"


@pytest.mark.parametrize("file", VERSIONS, ids=lambda file: file.stem)
def test_reports_of_earlier_versions_have_a_verdict_too(file: Path):
    report = OptimizabilityReport.load(file)
    assert len(report.rules) == len(RULES) and report.verdict.sentence in report.to_html().replace("&#39;", "'")
