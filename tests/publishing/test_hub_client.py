# SPDX-License-Identifier: Apache-2.0
"""The requests of a push, one by one, against a Hub on the loopback interface that breaks down at each of them."""

from __future__ import annotations

import json
import re
import threading
import time
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_session
from huggingface_hub.utils import httpx

from hf_optimizability.publishing import hub as hub_module
from hf_optimizability.publishing import hub_client
from hf_optimizability.publishing.hub_client import HubClient, HubError, explained
from hf_optimizability.report import OptimizabilityReport
from hf_optimizability.report_data.provenance import ModelInfo
from tests.support.hub_stub import COMMIT, WRITER, Fault, HubStub, Repository, serve


CARD = b"---\nlicense: mit\n---\n# Ada's\n"
FILES = {"report.json": b"{}", "loss.png": b"\x89PNG"}

STEPS = {
    "info": "GET /api/models/ada/model$",
    "create": "POST /api/repos/create",
    "card": "GET /ada/model/resolve/",
    "validate": "POST /api/validate-yaml",
    "preupload": "POST /api/models/ada/model/preupload/main",
    "batch": "POST /ada/model.git/info/lfs/objects/batch",
    "upload": "PUT /lfs/",
    "verify": "POST /verify",
    "commit": "POST /api/models/ada/model/commit/main",
}
"""Each request of a push, in their order; `create` is made only where there is no repository."""


def publish(**options: Any) -> str:
    """Push files that look like a report's."""
    client = HubClient(repo_id="ada/model", unchanged="All is as it was.", **options)
    report = OptimizabilityReport(model=ModelInfo(id="org/name"))
    return hub_module._commit(client, report, FILES, private=None)


@pytest.fixture(autouse=True)
def one_that_is_there(hub: HubStub) -> None:
    hub.repositories["ada/model"] = Repository.of({"README.md": CARD})


def count(hub: HubStub, step: str) -> int:
    return sum(re.search(STEPS[step], request) is not None for request in hub.requests)


def is_as_before(hub: HubStub) -> bool:
    return "ada/model" not in hub.repositories or hub.repositories["ada/model"].files == {"README.md": CARD}


def test_these_are_all_requests_of_a_push(hub: HubStub, monkeypatch: pytest.MonkeyPatch):
    """hf_xet, which has no time-outs, has no part in it, although it is there and wanted."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    del hub.repositories["ada/model"]
    publish()
    order = ["info", "create", "info", *list(STEPS)[2:]]
    assert len(hub.requests) == len(order)
    for step, request in zip(order, hub.requests, strict=True):
        assert re.search(STEPS[step], request)
    assert hub.repositories["ada/model"].files["optimizability/loss.png"] == FILES["loss.png"]


def test_the_requests_are_those_of_the_clients_own_commit(hub: HubStub):
    """Only files in several pieces are not offered."""
    publish()
    ours = sent(hub)
    contents = hub.repositories["ada/model"].files
    hub.repositories["ada/model"] = Repository.of({"README.md": CARD})
    hub.requests.clear()
    hub.bodies.clear()
    hub.large.clear()
    HfApi().create_commit(
        "ada/model",
        [CommitOperationAdd(path, content) for path, content in contents.items()],
        commit_message="Add the optimizability report",
        parent_commit=COMMIT,
    )
    theirs = sent(hub)
    batch = "POST /ada/model.git/info/lfs/objects/batch"
    assert (ours[batch][0].pop("transfers"), theirs[batch][0].pop("transfers")) == (["basic"], ["basic", "multipart"])
    assert ours == theirs


def sent(hub: HubStub) -> dict[str, list[Any]]:
    """What was sent with each request that changes or asks for something, without regard to its order."""
    bodies = {}
    for request, body in zip(hub.requests, hub.bodies, strict=True):
        if request.startswith("PUT"):
            bodies[request] = [body]
        elif request.startswith("POST"):
            lines = [json.loads(line) for line in body.splitlines()]
            files = lines[0].get("files")
            bodies[request] = sorted(files or lines, key=lambda one: json.dumps(one, sort_keys=True))
    return bodies


class TestTimeouts:
    @pytest.mark.parametrize("step", STEPS)
    def test_a_request_that_is_not_answered(self, hub: HubStub, monkeypatch: pytest.MonkeyPatch, step: str):
        monkeypatch.setattr(hub_client, "TIMEOUT", 0.3)
        if step == "create":
            del hub.repositories["ada/model"]
        hub.faults = [Fault(STEPS[step], seconds=60)]
        start = time.monotonic()
        with pytest.raises(HubError, match=r"did not answer in time\. Push again\. All is as it was\.$"):
            publish()
        assert 0.3 < time.monotonic() - start < 3
        assert count(hub, step) == 1  # not asked again
        assert is_as_before(hub)

    @pytest.mark.parametrize(
        ("step", "start"),
        [
            ("info", b""),
            ("info", b"HTTP/1.1 200 OK\r\nX-More: "),
            *((step, b"HTTP/1.1 200 OK\r\nContent-Length: 9000000\r\n\r\n") for step in ("info", "upload", "commit")),
        ],
    )
    def test_an_answer_that_drips(self, hub: HubStub, monkeypatch: pytest.MonkeyPatch, step: str, start: bytes):
        monkeypatch.setattr(hub_client, "PUSH_TIMEOUT", 0.5)
        hub.faults = [Fault(STEPS[step], drips=start)]
        begin = time.monotonic()
        with pytest.raises(HubError, match=r"too slow: it was given up after 0\.5 seconds\. Push again later"):
            publish()
        assert time.monotonic() - begin < 3
        assert is_as_before(hub)

    def test_others_on_the_session_notice_nothing(self, hub: HubStub, monkeypatch: pytest.MonkeyPatch):
        """Nothing is set on it that would need to be taken back."""
        monkeypatch.setattr(hub_client, "TIMEOUT", 0.1)
        session = get_session()
        settings = session.timeout, {name: list(hooks) for name, hooks in session.event_hooks.items()}
        hub.faults = [Fault("whoami", seconds=1, body=b'{"name": "ada"}'), Fault(STEPS["preupload"], seconds=60)]
        answers: list[dict[str, str]] = []
        other = threading.Thread(target=lambda: answers.append(HfApi().whoami(token=WRITER)))
        other.start()
        with pytest.raises(HubError, match="did not answer in time"):
            publish()
        assert other.is_alive()
        other.join()
        assert answers == [{"name": "ada"}]
        assert get_session() is session
        assert (session.timeout, session.event_hooks) == settings


class TestFurtherAttempts:
    @pytest.mark.parametrize(
        ("step", "status"),
        [*((step, 503) for step in STEPS if step not in ("create", "commit")), ("info", 0), ("upload", 0)],
    )
    def test_after_a_short_fault(self, hub: HubStub, step: str, status: int):
        hub.faults = [Fault(STEPS[step], status, times=2)]
        publish()
        assert count(hub, step) == 3
        assert len(hub.repositories["ada/model"].commits) == 2

    @pytest.mark.parametrize("status", [503, 0])
    @pytest.mark.parametrize("step", ["create", "commit"])
    def test_none_where_it_may_have_been_carried_out(self, hub: HubStub, step: str, status: int):
        if step == "create":
            del hub.repositories["ada/model"]
        hub.faults = [Fault(STEPS[step], status)]
        with pytest.raises(HubError):
            publish()
        assert count(hub, step) == 1

    def test_as_late_as_the_hub_asks_for(self, hub: HubStub, monkeypatch: pytest.MonkeyPatch):
        hub.faults = [Fault(STEPS["preupload"], 429, times=1, headers={"Retry-After": "1"})]
        start = time.monotonic()
        publish()
        assert time.monotonic() - start > 1

    @pytest.mark.parametrize("asked", ["31", "3600", "9" * 400])
    def test_none_if_that_is_very_late(self, hub: HubStub, asked: str):
        hub.faults = [Fault(STEPS["preupload"], 429, headers={"Retry-After": asked})]
        with pytest.raises(HubError, match=f"Too many requests.*Wait {asked} seconds"):
            publish()
        assert count(hub, "preupload") == 1

    def test_none_after_the_end_of_the_push(self, hub: HubStub, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(hub_client, "PUSH_TIMEOUT", 2.0)
        hub.faults = [Fault(STEPS["preupload"], 503, headers={"Retry-After": "20"})]
        with pytest.raises(HubError, match="trouble"):
            publish()
        assert count(hub, "preupload") == 1


OTHER_SHAPES = [b"[]", b"null", b"<html>Sign in</html>", b"", b'"x"', b"3", b"{", b"\xff\xfe", b"[" * 100_000]
PARTS: list[tuple[str, Any]] = [
    ("info", {}),
    ("info", {"sha": None}),
    ("info", {"sha": "main"}),
    ("info", {"sha": ["0" * 40]}),
    ("preupload", {"files": None}),
    ("preupload", {"files": []}),
    ("preupload", {"files": [3]}),
    ("preupload", {"files": [{"path": 3}]}),
    ("preupload", {"files": [{"path": f"optimizability/{name}", "uploadMode": "xet"} for name in FILES]}),
    ("batch", {"objects": 3}),
    ("batch", {"objects": []}),
    ("batch", {"objects": [None]}),
    *(
        ("batch", {"objects": [{"oid": "OID", **item}]})
        for item in (
            {"error": "no"},
            {"error": {}},
            {"actions": []},
            {"actions": {}},
            {"actions": {"upload": {"href": None}}},
            {"actions": {"upload": {"href": "http://a:b:c/"}}},
            {"actions": {"upload": {"href": "URL/lfs/x", "header": {"chunk_size": "5"}}}},
            {"actions": {"upload": {"href": "URL/lfs/x", "header": 3}, "verify": 3}},
        )
    ),
    ("commit", {}),
    ("commit", {"commitUrl": None}),
    ("commit", {"commitUrl": "\x1b[31m"}),
    ("commit", {"commitUrl": "javascript:x"}),
]
"""Answers of which only a part has another shape."""


class TestAnswersOfAnotherShape:
    @pytest.mark.parametrize(
        ("step", "bodies"),
        [("info", OTHER_SHAPES), *((step, OTHER_SHAPES[:3]) for step in ("validate", "preupload", "batch", "commit"))],
    )
    def test_are_refused(self, hub: HubStub, step: str, bodies: list[bytes]):
        for body in bodies:
            hub.faults = [Fault(STEPS[step], body=body)]
            with pytest.raises(HubError, match=r"answer can't be read: .*push again later\. All is as it was\.$"):
                publish()
            assert is_as_before(hub)

    def test_in_a_part(self, hub: HubStub):
        oid = hub_client._File("", FILES["loss.png"], large=True).oid
        for step, answer in PARTS:
            body = json.dumps(answer).replace("OID", oid).replace("URL", hub.url)
            hub.faults = [Fault(STEPS[step], body=body.encode())]
            hub.large.clear()
            with pytest.raises(HubError, match=r"answer can't be read: .*push again later\."):
                publish()
            assert is_as_before(hub)

    def test_of_a_pull_request_without_address(self, hub: HubStub):
        hub.faults = [Fault(STEPS["commit"], body=b'{"commitUrl": "https://hub/commit"}')]
        with pytest.raises(HubError, match="it has no `pullRequestUrl`"):
            publish(create_pr=True)

    def test_of_a_refusal(self, hub: HubStub):
        for body in (*OTHER_SHAPES, b'{"errors": 3}', b'{"errors": [3]}', b'{"error": {"x": []}}'):
            hub.faults = [Fault(STEPS["info"], 403, body=body)]
            with pytest.raises(HubError, match=r"The token does not allow that \(403"):
                publish()

    @pytest.mark.parametrize("step", STEPS)
    def test_of_a_refusal_of_each_request(self, hub: HubStub, step: str):
        if step == "create":
            del hub.repositories["ada/model"]
        hub.faults = [Fault(STEPS[step], 403, body=b"[]")]
        with pytest.raises(HubError, match=r"The token does not allow that \(403"):
            publish()
        assert is_as_before(hub)

    def test_a_file_that_the_storage_refuses(self, hub: HubStub):
        oid = hub_client._File("", FILES["loss.png"], large=True).oid
        answer = {"objects": [{"oid": oid, "error": {"code": 422, "message": f"too large for {WRITER}"}}]}
        hub.faults = [Fault(STEPS["batch"], body=json.dumps(answer).encode())]
        with pytest.raises(HubError, match=r"The Hub refuses a file: too large for <secret>\. Resolve this"):
            publish()

    def test_a_redirection_to_nowhere(self, hub: HubStub):
        hub.faults = [Fault(STEPS["upload"], 304)]
        with pytest.raises(HubError, match="answer can't be read: its status is 304"):
            publish()


class TestTheCard:
    @pytest.mark.parametrize("headers", [{}, {"X-Repo-Commit": "f" * 40}], ids=["none", "another"])
    def test_is_not_taken_from_a_sign_in_page(self, hub: HubStub, headers: dict[str, str]):
        hub.faults = [Fault(STEPS["card"], body=b"<html>Sign in</html>", headers=headers)]
        with pytest.raises(HubError, match=r"README\.md does not come from the commit.*sign-in page.*get past it"):
            publish()
        assert is_as_before(hub)

    @pytest.mark.parametrize("status", [302, 307])
    def test_may_lie_elsewhere(self, hub: HubStub, status: int):
        """The Hub says which commit it is from where it sends us there."""
        hub.large["card"] = CARD
        headers = {"Location": "/lfs/card", "X-Repo-Commit": COMMIT}
        hub.faults = [Fault(STEPS["card"], status, headers=headers)]
        publish()
        assert hub.repositories["ada/model"].files["README.md"].startswith(CARD.split(b"---\n#")[0])

    def test_is_not_taken_from_where_someone_else_sends_us(self, hub: HubStub):
        hub.large["card"] = CARD
        hub.faults = [Fault(STEPS["card"], 302, headers={"Location": "/lfs/card", "X-Repo-Commit": "f" * 40})]
        with pytest.raises(HubError, match="does not come from the commit"):
            publish()

    def test_may_be_missing(self, hub: HubStub):
        hub.repositories["ada/model"] = Repository.of({})
        publish()
        assert b"# model\n" in hub.repositories["ada/model"].files["README.md"]


class TestTheToken:
    def test_is_for_the_hub_alone(self, hub: HubStub):
        with serve({}) as storage:
            hub.storage = storage.url
            hub.large = storage.large
            publish()
        assert (storage.requests, storage.tokens) == ([f"PUT /lfs/{next(iter(storage.large))}"], [None])
        assert set(hub.tokens) == {WRITER}

    def test_is_not_shown_by_an_error_that_quotes_it(self, hub: HubStub):
        with pytest.raises(HubError, match=r"Illegal header value .*<secret>"):
            publish(token="opaque-sentinel\n")

    def test_is_not_in_the_client_as_text(self):
        assert WRITER not in repr(HubClient(repo_id="ada/model", unchanged="", token=WRITER))


class TestErrorsOfOurOwn:
    """They are not the Hub's, so nobody is sent to look there."""

    @pytest.mark.parametrize("error", [AttributeError, KeyError, TypeError])
    def test_in_the_card(self, hub: HubStub, monkeypatch: pytest.MonkeyPatch, error: type[Exception]):
        def broken(*args: Any, **options: Any) -> str:
            raise error("ours")

        monkeypatch.setattr(hub_module, "with_report", broken)
        with pytest.raises(error, match="ours"):
            publish()

    def test_in_a_block_that_is_explained(self, hub: HubStub):
        with pytest.raises(TypeError), explained("it", unchanged=""):
            len(3)  # type: ignore[arg-type]

    @pytest.mark.parametrize("body", [b"[]", b"null", b'"x"', b"{}"])
    def test_but_those_of_the_client_are_the_hubs(self, hub: HubStub, body: bytes):
        hub.faults = [Fault("", body=body)]
        with (
            pytest.raises(HubError, match=r"Could not finish it\. The Hub's answer can't be read"),
            explained("it", unchanged=""),
        ):
            HfApi().model_info("ada/model")


def test_a_repository_that_is_made_at_the_same_time(hub: HubStub, monkeypatch: pytest.MonkeyPatch):
    hub.faults = [Fault(STEPS["info"], 404, times=1, headers={"X-Error-Code": "RepoNotFound"})]
    publish()
    assert (count(hub, "create"), count(hub, "commit")) == (1, 1)


def test_a_repository_that_is_being_made(hub: HubStub):
    del hub.repositories["ada/model"]
    says = "Cannot create repo: another conflicting operation is in progress"
    hub.faults = [Fault(STEPS["create"], 409, says=says)]
    with pytest.raises(HubError, match=rf"409: {says}"):
        publish()
    assert count(hub, "create") == 1


def test_a_network_that_takes_no_connections(hub: HubStub, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: Any, **options: Any) -> None:
        raise httpx.ConnectTimeout("timed out")

    monkeypatch.setattr(get_session(), "request", refuse)
    with pytest.raises(HubError, match="did not answer in time"):
        publish()
