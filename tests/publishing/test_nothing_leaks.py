# SPDX-License-Identifier: Apache-2.0
"""No secret reaches a published byte, neither from free text, whatever it says, nor as a name that looks like one."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hf_optimizability import OptimizabilityCallback, OptimizabilityReport
from hf_optimizability.comparing.candidates import parse_candidates
from hf_optimizability.comparing.comparison import Comparison
from hf_optimizability.comparing.results import Failure, Run, Scores
from hf_optimizability.comparing.runner import _why
from hf_optimizability.errors import MeasurementError
from hf_optimizability.publishing.hub import add_to_model_folder, push
from hf_optimizability.report import figures
from hf_optimizability.report.markdown import card_section
from hf_optimizability.report_data.schema import parse
from hf_optimizability.scoring.checkpoint import CheckpointScores
from tests.support.blank_plots import PNG
from tests.support.example_comparison import make_comparison
from tests.support.example_report import make_report, with_tasks
from tests.support.hub_stub import HubStub
from tests.support.planted_secrets import ANYTHING, LOOK_LIKE_SECRETS, Secret, leaks, secrets


PLOT_ALL = figures.plot_all  # which most tests do without

Data = dict[str, Any]


class Case(NamedTuple):
    """A report with secrets, and where which of them was planted."""

    data: Data
    planted: list[tuple[str, Secret]]

    def __repr__(self) -> str:
        return f"Case(…, {self.planted})"


def short(data: Data) -> str:
    """The report with one measurement, without the long lists of numbers, which take most of the time."""
    data["measurements"] = [
        {
            **one,
            "landscape": None,
            "hessian": {**one["hessian"], "density": None, "ritz_values": [], "ritz_weights": []},
        }
        for one in data["measurements"][:1]
    ]
    data["log_history"] = data["log_history"][:4]
    return json.dumps(data)


VERSION_5 = short(with_tasks(make_report(1, blocks=2, failures=1), ["a", "b"]).to_dict())
VERSION_4 = short(json.loads((Path(__file__).parents[1] / "report_data/versions/version_4_tasks.json").read_text()))
COMPARISON = make_comparison({"a": 0.8, "b": 0.6}, seeds=1, failed=True)
for entry in COMPARISON.entries:
    entry.runs = [
        Run(
            one.seed,
            OptimizabilityReport.from_dict(json.loads(VERSION_5)),
            Scores(one.scores.losses[:5], one.scores.correct[:5]),
        )
        for one in entry.runs
        if one.scores is not None
    ]
FREE, NAMES = secrets(ANYTHING), secrets(LOOK_LIKE_SECRETS)


def cases(number: int) -> settings:
    return settings(
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
        phases=[Phase.generate],  # secrets are random numbers, which do not shrink
        max_examples=number,
    )


def every(data: Any, key: str) -> Iterator[Data]:
    """Each dict within that has the key."""
    if isinstance(data, dict):
        if key in data:
            yield data
        data = list(data.values())
    if isinstance(data, list):
        for item in data:
            yield from every(item, key)


def set_everywhere(key: str) -> Callable[[Data, str], None]:
    def plant(data: Data, text: str) -> None:
        for holder in every(data, key):
            holder[key] = text

    return plant


def set_at(*path: str | int) -> Callable[[Data, str], None]:
    def plant(data: Data, text: str) -> None:
        holder: Any = data
        for step in path[:-1]:
            holder = holder.setdefault(step, {}) if isinstance(holder, dict) else holder[step]
        holder[path[-1]] = text

    return plant


def logged(value: Callable[[str], Any], *, key: str | None = None) -> Callable[[Data, str], None]:
    def plant(data: Data, text: str) -> None:
        data["log_history"].append({"step": 7, key or f"eval_{text}_loss": value(text)})

    return plant


def renamed(old: str) -> Callable[[Data, str], None]:
    """Give a block or a task another name, wherever it has one."""

    def plant(data: Data, text: str) -> None:
        def walk(value: Any) -> Any:
            if isinstance(value, dict):
                return {
                    text if key == old else key.replace(f"grad_norm/{old}", f"grad_norm/{text}"): walk(item)
                    for key, item in value.items()
                }
            if isinstance(value, list):
                return [walk(item) for item in value]
            return text if value == old else value

        for part in ("measurements", "log_history", "dynamics"):
            data[part] = walk(data[part])

    return plant


FINE = {"status": "fine"}
FREE_TEXT: dict[str, Callable[[Data, str], None]] = {
    "a note of the dynamics": set_everywhere("note"),
    "words of a failure": set_at("failures", 0, "reason"),
    "remedy of a failure": set_at("failures", 0, "remedy"),
    "values of a failure": lambda data, text: data["failures"][0]["why"].update(values={"operation": f"at {text}"}),
    "unknown values of a failure": set_at("failures", 0, "why", "values", "text"),
    "findings": lambda data, text: data["findings"][0].update(sentence=text, advice=text, evidence=[text]),
    "verdict": lambda data, text: data.update(verdict=dict.fromkeys(("sentence", "todo", "more"), text) | FINE),
    "rules": lambda data, text: data["rules"][0].update(name=text, because=text, remedy=text),
    "a string in the log": logged(lambda text: text, key="note"),
    "a list in the log": logged(lambda text: [text], key="samples"),
    "a dict in the log": logged(lambda text: {text: text}, key="table"),
    "unknown options": set_at("config", "report_dir"),
    "unknown training arguments": set_at("training", "hub_token"),
    "unknown fields of the model": set_at("model", "path"),
    "unknown fields of the data": set_at("data", "train_file"),
    "unknown dynamics": set_at("dynamics", "mine"),
    "unknown fields of the dynamics": set_at("dynamics", "convergence_speed", "why"),
}
IDENTIFIERS: dict[str, Callable[[Data, str], None]] = {
    "model": set_at("model", "id"),
    "class": set_at("model", "class"),
    "task of the model": set_at("task", "task"),
    "loss": set_at("task", "loss"),
    "data set": set_at("data", "dataset"),
    "fingerprint": set_at("data", "probe_fingerprint"),
    "optimizer": set_at("training", "optimizer"),
    "schedule": set_at("training", "lr_scheduler_type"),
    "settings of the optimizer": lambda data, text: data["training"].update(optimizer_settings={text: 1.0}),
    "option": set_at("config", "task_column"),
    "list of options": lambda data, text: data["config"].update(blocks=[text, [text]]),
    "dict of options": lambda data, text: data["config"].update(blocks={text: text}),
    "version": set_at("versions", "torch"),
    "library": lambda data, text: data["versions"].update({text: "1"}),
    "time": set_at("created"),
    "engine": set_everywhere("engine"),
    "precision": set_everywhere("dtype"),
    "attention": set_everywhere("attention"),
    "method": set_everywhere("method"),
    "hooks": lambda data, text: data["measurements"][0]["self_check"].update(module_hooks=[text]),
    "block": renamed("head"),
    "task": renamed("a"),
    "metric": logged(lambda text: 0.5),
    "metric gap": lambda data, text: data["dynamics"]["generalization_gap"].update(metric_gaps={text: 0.1}),
    "series": lambda data, text: data["dynamics"]["stability"].update({text: data["dynamics"]["stability"]["loss"]}),
    "parameters of a failure": lambda data, text: data["failures"][0].update(
        why={"code": "tensors_overwritten", "error": None, "values": {"tensors": [text, "b"]}, "because": None}
    ),
    "reason behind another": lambda data, text: data["failures"][0].update(why={
        "code": "no_model_loss", "error": None, "values": {},
        "because": {"code": "fp8_layer", "error": None, "values": {"layer": text, "library": text}, "because": None},
    }),
}  # fmt: skip
OF_VERSION_4: dict[str, Callable[[Data, str], None]] = {
    "failure": lambda data, text: data["failures"].append(
        {"step": 3, "epoch": 0.5, "reason": f"OSError: {text}", "remedy": text}
    ),
    "failure that begins with it": lambda data, text: data["failures"].append(
        {"step": 3, "epoch": 0.5, "reason": text, "remedy": ""}
    ),
    "fallback": set_everywhere("fallback"),
    "reason of a check": lambda data, text: data["measurements"][0]["eigenvalue_checks"][0].update(reason=text),
    **{name: FREE_TEXT[name] for name in ("a note of the dynamics", "a string in the log", "unknown options")},
}


@st.composite
def planted(draw: st.DrawFn, version: str, *groups: tuple[dict[str, Any], st.SearchStrategy[Secret]]) -> Any:
    """A report with secrets in all places, and a list of them; where two share a field, the later one has it."""
    data, done = json.loads(version), []
    for places, kinds in groups:
        for place in draw(st.permutations(sorted(places))):
            secret = draw(kinds)
            places[place](data, secret.text)
            done.append((place, secret))
    return Case(data, done)


REPORTS = st.one_of(
    planted(VERSION_5, (FREE_TEXT, FREE), (IDENTIFIERS, NAMES)),
    planted(VERSION_5, (FREE_TEXT, FREE), (IDENTIFIERS, NAMES)),
    planted(VERSION_4, (OF_VERSION_4, FREE)),
)


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "drawn" in request.node.name:
        monkeypatch.setattr(figures, "plot_all", PLOT_ALL)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # hundreds of them take longer than all else


def load(data: Data) -> OptimizabilityReport:
    """The report as `load` reads it."""
    return OptimizabilityReport.from_dict(parse(json.dumps(data).encode()))


def shown(report: OptimizabilityReport) -> dict[str, bytes]:
    """The bytes of all files, and of the section in a card."""
    report = report.published()
    files = report.files()
    return {**files, "card": card_section(report, files=list(files)).encode()}


def check_report(case: Case, *, drawn: bool = False) -> None:
    data, secret = case
    files = shown(load(data))
    assert len(files["loss.svg"]) > 10_000 or not drawn
    assert not leaks(files, secret)


@cases(70)
@given(REPORTS)
def test_a_report(case: Case):
    check_report(case)


@pytest.mark.slow
@cases(1200)
@given(REPORTS)
def test_many_reports(case: Case):
    check_report(case)


@cases(1)
@given(planted(VERSION_5, (IDENTIFIERS, NAMES), (FREE_TEXT, FREE)))
def test_a_drawn_report(case: Case):
    check_report(case, drawn=True)


@pytest.mark.slow
@cases(25)
@given(REPORTS)
def test_many_drawn_reports(case: Case):
    check_report(case, drawn=True)


def error_of(secret: Secret, *, deep: bool, code: str) -> Exception:
    """An exception whose text is the secret, behind a few others."""
    error: Exception = OSError(secret.text)
    for cls in (ValueError, RuntimeError) if deep else ():
        error, cause = cls(f"{error}, {secret.text}"), error
        error.__cause__ = cause
    return error if code == "raw" else MeasurementError(code, error=error)


ERRORS = st.builds(
    lambda secret, deep, code: (error_of(secret, deep=deep, code=code), secret),
    FREE, st.booleans(), st.sampled_from(["raw", "unexpected", "model_fails", "rows_unreadable", "no_model_loss"]),
)  # fmt: skip


def check_failures(errors: list[tuple[Exception, Secret]], named: Secret) -> None:
    """As the callback records them, in memory and as written."""
    callback = OptimizabilityCallback()
    callback.report = load(json.loads(VERSION_5))
    run, state = SimpleNamespace(ended=True), SimpleNamespace(epoch=0.5)
    kind = type(named.text.replace("\0", ""), (Exception,), {})
    for step, error in enumerate([*(error for error, _ in errors), kind("x")]):
        callback._record_failure(cast(Any, run), error, step, cast(Any, state))
    because = MeasurementError("fp8_layer", layer=named.text, library=f"{named.text} x").why
    fallback = MeasurementError("no_second_derivative", error=errors[0][0], because=because).why
    report = callback.report
    report.measurements[0] = dataclasses.replace(report.measurements[0], fallback=fallback)
    secret = [("error", secret) for _, secret in errors] + [("name", named)]
    assert not leaks(shown(report), secret)


CAUGHT = (st.lists(ERRORS, min_size=1, max_size=4), NAMES)


@cases(12)
@given(*CAUGHT)
def test_errors(errors: list[tuple[Exception, Secret]], named: Secret):
    check_failures(errors, named)


@pytest.mark.slow
@cases(300)
@given(*CAUGHT)
def test_many_errors(errors: list[tuple[Exception, Secret]], named: Secret):
    check_failures(errors, named)


UNRECORDED = ("token", "hub_token", "train_file", "run_name", "hub_model_id", "output_dir", "logging_dir", "project")


def check_comparison(
    name: Secret,
    flag: str,
    free: Secret,
    checkpoint: Secret,
    note: tuple[Exception, Secret],
    report: Case,
    again: bool,
) -> None:
    if "path" in checkpoint.kind or checkpoint.kind == "home":  # the last part of which is the checkpoint's name
        checkpoint = checkpoint._replace(text=f"{checkpoint.text}/mine")
    given_name: Any = {"name": name.text, flag: free.text}
    candidates = parse_candidates([given_name, {flag: free.text, "model_name_or_path": checkpoint.text}, "org/a"])
    entries = COMPARISON.entries
    why = _why("It failed.", note[0])
    shared = {flag: free.text, "text_column_name": [free.text], "dataset_config_name": checkpoint.text,
              "blocks": [checkpoint.text], "config_overrides": {free.text: free.text}, free.text: 1}  # fmt: skip
    setting = dataclasses.replace(
        COMPARISON.setting, settings=shared, dataset=name.text, task=checkpoint.text, versions={name.text: name.text}
    )
    run = dataclasses.replace(entries[0].runs[0], report=load(report[0]))
    comparison = Comparison(
        setting,
        [
            dataclasses.replace(entries[0], name=candidates[0].name, changes=dict(candidates[0].changes), runs=[run]),
            dataclasses.replace(entries[1], name=name.text, changes=shared, runs=[],
                scores=CheckpointScores(notes={"logme": why, name.text: why})),
            dataclasses.replace(entries[1], runs=[], name=candidates[1].name, changes=candidates[1].public_changes),
            dataclasses.replace(entries[-1], failure=Failure(1, why)),
        ],
        [dataclasses.replace(one, kept=(name.text,)) for one in COMPARISON.rounds],
    )  # fmt: skip
    with TemporaryDirectory() as folder:
        comparison.save(folder)
        if again:
            Comparison.load(folder).save(folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    assert len(files) == 3
    secret = [("name", name), (flag, free), ("checkpoint", checkpoint), ("note", note[1]), *report[1]]
    assert not leaks(files, secret)


COMPARED = st.tuples(NAMES, st.sampled_from(UNRECORDED), FREE, NAMES, ERRORS, REPORTS, st.booleans())


@cases(10)
@given(COMPARED)
def test_a_comparison(case: Any):
    check_comparison(*case)


@pytest.mark.slow
@cases(300)
@given(COMPARED)
def test_many_comparisons(case: Any):
    check_comparison(*case)


def check_push(hub: HubStub, case: Case, file: Secret, *, link: bool) -> None:
    """What lies in the folder is from elsewhere: `report.json` as planted, pages and pictures that no one drew."""
    data, secret = case
    private = file.text.encode(errors="replace")
    hub.repositories.clear()
    hub.large.clear()
    hub.bodies.clear()
    with TemporaryDirectory() as name:
        folder = Path(name, "report")
        folder.mkdir()
        (folder / "report.json").write_text(json.dumps(data))
        (folder.parent / "private").write_bytes(private)
        pages = ("report.html", "report.md", "loss.png", "loss.svg", "curvature.png", "gradient_norm.svg", "README.md")
        for page in pages:
            if link:
                (folder / page).symlink_to(folder.parent / "private")
            else:
                (folder / page).write_bytes((PNG if page.endswith("png") else b"") + private)
        push(folder, "ada/model")
        assert (folder.parent / "private").read_bytes() == private

        model = Path(name, "model")
        (model / "optimizability").mkdir(parents=True)
        for page in pages:
            (model / "optimizability" / page).symlink_to(folder.parent / "private")
        add_to_model_folder(load(data), model)
        assert (folder.parent / "private").read_bytes() == private
        written = {
            path.name: path.read_bytes() for path in model.rglob("*") if path.is_file() and not path.is_symlink()
        }
    sent = {f"request {index}": body for index, body in enumerate(hub.bodies)}
    files = hub.repositories["ada/model"].files
    assert {"report.json", "README.md"} <= written.keys()
    assert not leaks({**files, **sent, **written}, [*secret, ("file", file)])


PUSHED = (REPORTS, FREE, st.booleans())


@cases(8)
@given(*PUSHED)
def test_a_push(hub: HubStub, case: Case, file: Secret, link: bool):
    check_push(hub, case, file, link=link)


@pytest.mark.slow
@cases(200)
@given(*PUSHED)
def test_many_pushes(hub: HubStub, case: Case, file: Secret, link: bool):
    check_push(hub, case, file, link=link)


@pytest.mark.parametrize("places", [FREE_TEXT, IDENTIFIERS, OF_VERSION_4], ids=["free text", "names", "version 4"])
def test_every_place_is_one_that_loads(places: dict[str, Callable[[Data, str], None]]):
    """Otherwise the tests above would show nothing."""
    for plant in places.values():
        data = json.loads(VERSION_4 if places is OF_VERSION_4 else VERSION_5)
        plant(data, "sentinel")
        load(data)
        assert "sentinel" in json.dumps(data)
