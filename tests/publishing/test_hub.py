# SPDX-License-Identifier: Apache-2.0
"""Pushing a report, with the real client against a Hub on the loopback interface."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
import traceback
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, constants

from hf_optimizability.publishing import hub_client
from hf_optimizability.publishing.hub import HubError, ModelCardError, push
from hf_optimizability.redaction import public_name
from hf_optimizability.report import OptimizabilityReport
from tests.support.example_report import make_report
from tests.support.hub_stub import READER, WRITER, Fault, HubStub, Repository


CARD = b"---\r\nlicense: mit # kept\r\n---\r\n# Ada's model\r\n\r\nText.\r\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawing takes a second, so all tests share one report; it stands for a page, too."""
    folder = tmp_path_factory.mktemp("saved")
    make_report(2).save(folder)
    (folder / "report.html").write_text("<!doctype html><title>Report</title>")
    (folder / "notes.txt").write_text("mine, not for the Hub")
    (folder / "report-1.json").write_text("of an earlier run")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "report")


def test_a_new_repository(hub: HubStub, folder: Path):
    url = push(folder, "ada/new")
    repository = hub.repositories["ada/new"]
    assert not repository.private
    assert [commit.summary for commit in repository.commits] == ["initial commit", "Add the optimizability report"]
    assert url == f"{hub.url}/ada/new/commit/{repository.commits[-1].sha}"
    names = [f"optimizability/{name}" for name in OptimizabilityReport.load(folder).files()]
    assert sorted(repository.files) == sorted([".gitattributes", "README.md", *names])
    left = {path.name for path in folder.iterdir()} - {Path(name).name for name in names}
    assert left == {"notes.txt", "report-1.json"}
    for name in names:
        assert repository.files[name] == OptimizabilityReport.load(folder).files()[Path(name).name]
    card = ModelCard(repository.files["README.md"].decode())
    assert card.data.tags == ["optimizability"]
    assert card.data.model_name == "new"
    trace = OptimizabilityReport.load(folder).measurements[-1].hessian.trace
    values = {result.metric_type: (result.metric_value, result.metric_args) for result in card.data.eval_results}
    value, args = values["optimizability_hessian_trace"]
    assert value == pytest.approx(trace.value, rel=1e-5)
    assert (args["step"], args["low"], args["high"]) == (
        300,
        *(pytest.approx(e, rel=1e-5) for e in (trace.low, trace.high)),
    )
    assert card.text.startswith("# new\n")
    for link in ("loss.png", "curvature.png", "report.md", "report.html", "report.json"):
        assert f"(optimizability/{link})" in card.text


def test_private_where_asked_for(hub: HubStub, folder: Path):
    push(folder, "ada/secret", private=True)
    assert hub.repositories["ada/secret"].private
    push(folder, "ada/secret")
    assert len(hub.repositories["ada/secret"].commits) == 2


def test_a_repository_that_is_there_keeps_what_it_has(hub: HubStub, folder: Path):
    weights = bytes(range(256))
    hub.repositories["ada/old"] = Repository.of({"README.md": CARD, "model.safetensors": weights})
    push(folder, "ada/old", private=True)
    repository = hub.repositories["ada/old"]
    assert not repository.private
    assert repository.files["model.safetensors"] == weights
    card = repository.files["README.md"]
    before, after = CARD.split(b"---\r\n# Ada")
    assert card.startswith(before) and b"\r\n---\r\n# Ada" + after in card
    assert card.count(b"\n") == card.count(b"\r\n")
    assert not [request for request in hub.requests if "repos/create" in request]


def test_pushing_again(hub: HubStub, folder: Path):
    push(folder, "ada/again")
    commits = hub.repositories["ada/again"].commits
    url = push(folder, "ada/again")
    assert len(commits) == 2 and url.endswith(commits[-1].sha)

    card = commits[-1].files["README.md"]
    later = OptimizabilityReport.load(folder)
    later.measurements = later.measurements[:1]
    later.save_json(folder)
    push(folder, "ada/again")
    assert len(commits) == 3
    assert commits[-1].files["README.md"] != card
    make_report(2).save_json(folder)
    push(folder, "ada/again")
    assert len(commits) == 4 and commits[-1].files["README.md"] == card


def test_pull_requests(hub: HubStub, folder: Path):
    hub.repositories["grace/model"] = Repository.of({"README.md": CARD})
    with pytest.raises(HubError, match=r"does not allow that \(403.*open a pull request"):
        push(folder, "grace/model")
    url = push(folder, "grace/model", create_pr=True)
    repository = hub.repositories["grace/model"]
    assert url == f"{hub.url}/grace/model/discussions/1"
    assert repository.files == {"README.md": CARD}
    assert "optimizability/report.json" in repository.branches["refs/pr/1"][-1].files
    with pytest.raises(HubError, match="No such repository"):
        push(folder, "grace/other", create_pr=True)
    assert "grace/other" not in hub.repositories


def later(folder: Path) -> None:
    """Change the report."""
    report = OptimizabilityReport.load(folder)
    report.training["max_steps"] = 1 + (report.training.get("max_steps") or 0)
    report.save_json(folder)


def test_a_pull_request_that_is_open_is_added_to(hub: HubStub, folder: Path):
    push(folder, "ada/model")
    later(folder)
    push(folder, "ada/model", create_pr=True)
    branches = hub.repositories["ada/model"].branches
    later(folder)
    push(folder, "ada/model", revision="refs/pr/1")
    assert (len(branches["main"]), len(branches["refs/pr/1"])) == (2, 4)
    with pytest.raises(HubError, match="no such revision"):
        push(folder, "ada/model", revision="draft")


class TestFaults:
    """Each leaves the report as it was and the Hub without half a commit; a second push finishes."""

    @pytest.fixture(autouse=True)
    def one_that_is_there(self, hub: HubStub) -> None:
        hub.repositories["ada/model"] = Repository.of({"README.md": CARD})

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            (Fault("commit/main", 401), r"does not accept the token \(401: as told to\)\. Create a new one"),
            (Fault("commit/main", 403), r"does not allow that \(403: as told to\)\. Use one with write access"),
            (Fault("commit/main", 404), r"No such repository.*\(404: as told to\)\. Check the name"),
            (Fault("commit/main", 409), r"keeps changing meanwhile \(409: as told to\)\. Push again"),
            (Fault("commit/main", 412), r"keeps changing meanwhile \(412: as told to\)\. Push again"),
            (Fault("commit/main", 429, headers={"Retry-After": "77"}), r"Too many requests.*Wait 77 seconds"),
            (Fault("commit/main", 413), r"The Hub refuses \(413: as told to\)"),
            (Fault("models/ada/model$", 400), r"The Hub refuses \(400: as told to\)\. Resolve this and push again"),
            (Fault("models/ada/model$", 500), r"The Hub has trouble \(500: as told to\)\. Push again later"),
            (Fault("commit/main", 503), r"The Hub has trouble \(503: as told to\)\. Push again later"),
            (Fault("commit/main", 0), r"The connection to the Hub broke"),
            (Fault("resolve/.*README", 0), r"The connection to the Hub broke"),
            (Fault("resolve/.*README", 503), r"The Hub has trouble"),  # not taken for a repository without a card
            (Fault("validate-yaml", 500), r"The Hub has trouble \(500"),
            (Fault("PUT /lfs", 403), r"does not allow that \(403"),
            (Fault("objects/batch", 404), r"No such repository"),
        ],
        ids=lambda value: f"{value.status} at {value.pattern}" if isinstance(value, Fault) else "",
    )
    def test_is_explained(self, hub: HubStub, folder: Path, fault: Fault, message: str):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        hub.faults = [fault]
        with pytest.raises(
            HubError, match=f"^Could not finish pushing the report to ada/model. .*{message}"
        ) as caught:
            push(folder, "ada/model")
        assert str(caught.value).endswith(f"The report in {folder} is unchanged.")
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert hub.repositories["ada/model"].files == {"README.md": CARD}
        hub.faults = []
        push(folder, "ada/model")
        assert len(hub.repositories["ada/model"].commits) == 2

    def test_slow(self, hub: HubStub, folder: Path, monkeypatch: pytest.MonkeyPatch):
        commits = hub.repositories["ada/model"].commits
        with monkeypatch.context() as patch:
            patch.setattr(hub_client, "TIMEOUT", 1.0)
            hub.faults = [Fault("commit/main", seconds=2.5, times=1)]
            with pytest.raises(HubError, match=r"did not answer in time. Push again"):
                push(folder, "ada/model")
        assert len(commits) == 1
        deadline = time.monotonic() + 30
        while len(commits) < 2 and time.monotonic() < deadline:  # the commit happens all the same
            time.sleep(0.1)
        assert push(folder, "ada/model").endswith(commits[-1].sha)
        assert len(commits) == 2

    def test_an_answer_that_is_lost_after_the_commit(self, hub: HubStub, folder: Path):
        hub.faults = [Fault("commit/main", 0, after=True, times=1)]
        with pytest.raises(HubError, match="connection to the Hub broke"):
            push(folder, "ada/model")
        push(folder, "ada/model")
        assert len(hub.repositories["ada/model"].commits) == 2

    def test_a_commit_in_between_is_met_by_reading_again(self, hub: HubStub, folder: Path):
        """Not overwritten: the card that is edited is the one that the commit replaces."""
        repository = hub.repositories["ada/model"]
        other = dataclasses.replace(repository.commits[0], sha="f" * 40, files={"README.md": CARD + b"Grace's.\r\n"})
        calls = []

        def interfere(fault: Fault, request: str) -> None:
            if "preupload" in request and not calls:
                calls.append(request)
                repository.commits.append(other)

        hub.fault_of = lambda request: interfere(Fault(""), request)  # type: ignore[method-assign]
        push(folder, "ada/model")
        assert [len(repository.commits), *calls] == [3, "POST /api/models/ada/model/preupload/main"]
        assert b"Grace's.\r\n" in repository.files["README.md"]

    def test_the_client_rides_out_a_short_fault(self, hub: HubStub, folder: Path):
        hub.faults = [Fault("preupload", 503, times=1)]
        push(folder, "ada/model")
        assert len(hub.repositories["ada/model"].commits) == 2

    def test_a_port_where_no_one_listens(self, hub: HubStub, folder: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(HubError, match=r"connection to the Hub broke.*Check your network connection"):
            push(folder, "ada/model")

    def test_offline(self, hub: HubStub, folder: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set\). Unset it"):
            push(folder, "ada/model")

    @pytest.mark.parametrize("name", ["ada/model", "ada/new", "ada/private"])
    def test_no_token(self, hub: HubStub, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str):
        hub.repositories["ada/private"] = Repository.of({}, private=True)
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(HubError, match=r"not logged in \(401.*Log in with `hf auth login`"):
            push(folder, name)
        push(folder, name, token=WRITER)
        assert "optimizability/report.json" in hub.repositories[name].files

    def test_a_token_that_may_only_read(self, hub: HubStub, folder: Path):
        with pytest.raises(HubError, match=r"does not allow that \(403"):
            push(folder, "ada/model", token=READER)
        with pytest.raises(HubError, match=r"does not allow that \(403"):
            push(folder, "ada/new", token=READER)

    def test_a_token_that_is_unknown(self, hub: HubStub, folder: Path):
        with pytest.raises(HubError, match=r"does not accept the token \(401"):
            push(folder, "ada/model", token="hf_unknown")


STATUSES = (400, 401, 403, 404, 409, 412, 413, 416, 418, 422, 429, 500, 502, 503, 504)
BODIES = (b"", b"[]", b"null", b"<html>", b'{"sha": null}', b'{"id": 1}', b'"x"')
STEPS = {
    "info": "models/ada/model$",
    "card": "resolve",
    "validate": "validate-yaml",
    "preupload": "preupload",
    "batch": "objects/batch",
    "upload": "PUT /lfs",
    "verify": "/verify",
    "commit": "commit/main",
}


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_no_fault_costs_anything(hub: HubStub, folder: Path, step: str, monkeypatch: pytest.MonkeyPatch):
    """Each answer to each request is an error that says so, or does no harm; what is on the disk stays as it is."""
    monkeypatch.setattr(hub_client, "TIMEOUT", 0.3)
    (folder.parent / "README.md").write_bytes(CARD)
    before = {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()}
    pattern = STEPS[step]
    faults = [
        *(Fault(pattern, status) for status in STATUSES),
        *(Fault(pattern, body=body) for body in BODIES),
        Fault(pattern, 0),
        Fault(pattern, seconds=60),
        Fault(pattern, drips=b"HTTP/1.1 200 OK\r\nContent-Length: 9000000\r\n\r\n"),
    ]
    harmless = []
    for fault in faults:
        # Only the last one ends by the limit of the push as a whole.
        monkeypatch.setattr(hub_client, "PUSH_TIMEOUT", 60.0 if fault.drips is None else 5.0)
        hub.repositories["ada/model"] = Repository.of({"README.md": CARD})
        hub.faults = [fault]
        hub.large.clear()
        try:
            push(folder, "ada/model")
        except HubError as error:
            assert str(error).endswith(f"The report in {folder} is unchanged.") and WRITER not in str(error)
            assert hub.repositories["ada/model"].files == {"README.md": CARD}
        else:
            harmless.append(fault.body)
        assert {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()} == before
    # What is not read may be anything. After 409 and 412 at `verify` a second attempt finds the files there.
    expected = {"validate": [b'{"sha": null}', b'{"id": 1}'], "verify": [None, None, *BODIES]}
    assert harmless == expected.get(step, [])


class TestWrongArguments:
    def test_no_report(self, hub: HubStub, tmp_path: Path):
        with pytest.raises(FileNotFoundError, match=r"no report.json in .*Pass the folder"):
            push(tmp_path, "ada/model")

    @pytest.mark.parametrize("name", ["<script>", "../../x", "a/b/c", "", "a b", "ada/mo\ndel", "https://hf.co/a/b"])
    def test_no_name_of_a_repository(self, hub: HubStub, folder: Path, name: str):
        with pytest.raises(ValueError, match="`repo_id` is not the name of a repository, such as 'user/my-model'"):
            push(folder, name)
        assert not hub.requests

    @pytest.mark.parametrize("card", [b"---\ntags: [a\n---\n", b"\xff\xfe", b"<!-- optimizability:start -->\n"])
    def test_a_card_that_can_not_be_edited(self, hub: HubStub, folder: Path, card: bytes):
        hub.repositories["ada/model"] = Repository.of({"README.md": card})
        with pytest.raises(ModelCardError):
            push(folder, "ada/model")
        assert hub.repositories["ada/model"].files == {"README.md": card}
        assert not [request for request in hub.requests if "preupload" in request]


def test_what_the_hub_does_not_want_in_a_card(hub: HubStub, folder: Path):
    """What is wrong with the rest of a card stays the author's to mend."""
    result = b"{task: {}, dataset: {type: /a b, name: x}, metrics: []}"
    bad = b"---\nmodel-index:\n- name: x\n  results:\n  - " + result + b"\n---\n"
    hub.repositories["ada/model"] = Repository.of({"README.md": bad})
    with pytest.raises(HubError, match=r"Invalid metadata in README.md.*fails to match the required pattern"):
        push(folder, "ada/model")


@pytest.mark.parametrize(
    "dataset", ["/mnt/ada/x y.csv", "a: b", "!!python/object/apply:os.system", "---", "{{ x }}", ""]
)
def test_the_hub_takes_any_name_of_a_data_set(hub: HubStub, folder: Path, dataset: str):
    report = OptimizabilityReport.load(folder)
    report.data = dataclasses.replace(report.data, dataset=dataset)
    report.save_json(folder)
    push(folder, "ada/model")
    front_matter = hub.repositories["ada/model"].files["README.md"].decode().split("\n---\n")[0]
    [result] = yaml.safe_load(front_matter)["model-index"][0]["results"]
    assert result["dataset"]["name"] == (public_name(dataset) or "unknown")


TOKEN = "opaque-sentinel-of-a-token"
FAULTS = [(pattern, status) for pattern in ("models/ada/model$", "resolve", "validate", "commit/main")
          for status in (0, 400, 401, 403, 404, 409, 412, 429, 500)
          if (pattern, status) != ("validate", 400)]  # fmt: skip
"""Each answer to each of the requests; what the Hub says of front matter with 400 is no fault."""

KINDS = [("models/ada/model$", 401), ("resolve", 500), ("validate", 0), ("commit/main", 400)]
"""One for each request, of the kinds that reach the message in other ways."""


@pytest.mark.parametrize(
    ("way", "faults"),
    [
        pytest.param("argument", KINDS, id="argument"),
        pytest.param("environment", KINDS, id="environment"),
        pytest.param("file", KINDS, id="file"),
        # 35 pushes, all of which go the ways of those above.
        *(pytest.param(way, FAULTS, id=f"{way}, every fault", marks=pytest.mark.slow)
          for way in ("argument", "environment", "file")),
    ],
)  # fmt: skip
def test_tokens_show_up_nowhere(
    hub: HubStub,
    folder: Path,
    way: str,
    faults: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
):
    """Through every fault, though the Hub's answers quote the token back; nor in what is published."""
    for library in ("huggingface_hub", "transformers"):
        monkeypatch.setattr(logging.getLogger(library), "propagate", True)
    monkeypatch.delenv("HF_TOKEN")
    argument = None
    if way == "argument":
        argument = TOKEN
    elif way == "environment":
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    else:
        Path(constants.HF_TOKEN_PATH).write_text(TOKEN)
    report = (folder / "report.json").read_text()
    (folder / "report.json").write_text(report.replace("MiniLM", f"MiniLM {TOKEN} {WRITER}"))
    hub.repositories["ada/model"] = Repository.of({})
    messages = []
    for pattern, status in faults:
        hub.faults = [Fault(pattern, status, says=f"Bearer {TOKEN} is not welcome")]
        with pytest.raises(HubError) as caught:
            push(folder, "ada/model", token=argument)
        messages += [str(caught.value), *traceback.format_exception(caught.value)]
    assert any("<secret> is not welcome" in message for message in messages)
    said = "".join([*messages, caplog.text, *capfd.readouterr()])
    assert TOKEN not in said

    hub.faults = []
    hub.writers.add(TOKEN)
    push(folder, "ada/model", token=argument)
    published = b"".join(hub.repositories["ada/model"].files.values())
    assert b'"id": "private-' in published
    assert TOKEN.encode() not in published and WRITER.encode() not in published
