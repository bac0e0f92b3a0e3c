# SPDX-License-Identifier: Apache-2.0
"""A Hub on the loopback interface: as much of its protocol as its client needs to download, and to push.

Written after the requests that the client makes and what it reads of the answers. It keeps repositories as lists of
commits, checks tokens, front matter and parent commits as the Hub does, and breaks down on demand.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


COMMIT = "0123456789abcdef0123456789abcdef01234567"
"""The first commit of each repository that is served from a folder."""

WRITER = "hf_writerwriterwriterwriterwriterwri"
READER = "hf_readerreaderreaderreaderreaderrea"
"""Tokens of the user `ada`, who may read and write what is hers, and one that may only read."""

LARGE = (".png", ".safetensors", ".bin")
"""What goes by LFS, as the Hub's `.gitattributes` have it."""


@dataclass
class Commit:
    """A state of a repository: its files in full."""

    sha: str
    files: dict[str, bytes]
    summary: str = "initial commit"


@dataclass
class Repository:
    """Commits by branch; `main` is there from the start, a pull request is the branch `refs/pr/<number>`."""

    branches: dict[str, list[Commit]]
    private: bool = False

    @classmethod
    def of(cls, files: dict[str, bytes], **options: Any) -> Repository:
        return cls({"main": [Commit(COMMIT, files)]}, **options)

    @property
    def commits(self) -> list[Commit]:
        return self.branches["main"]

    @property
    def files(self) -> dict[str, bytes]:
        """What is on `main` now."""
        return self.commits[-1].files

    def at(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        every = [commit for commits in self.branches.values() for commit in commits]
        return next((commit for commit in every if commit.sha == revision), None)


@dataclass(eq=False)
class Fault:
    """What happens instead of an answer, to the next `times` requests whose `"METHOD /path"` the pattern finds.

    Attributes:
        pattern: Regular expression.
        status: Of the answer; 0: the connection is cut in the middle of it.
        seconds: To wait before anything else.
        says: Message in the answer.
        headers: Of the answer.
        after: Whether the request is carried out first, and only its answer is lost.
        body: The answer in full, with that status.
        drips: The beginning of an answer, which goes on with a byte now and then and never ends.
    """

    pattern: str
    status: int = 200
    times: int = 1_000
    seconds: float = 0.0
    says: str = "as told to"
    headers: dict[str, str] = field(default_factory=dict)
    after: bool = False
    body: bytes | None = None
    drips: bytes | None = None


class HubStub(ThreadingHTTPServer):
    """Serves repositories, and remembers what was asked for.

    Attributes:
        repositories: By path on the Hub: `"org/name"` for a model, `"datasets/org/name"` for a data set.
        requests: Method and path of each request, for example `"GET /org/name/resolve/main/config.json"`.
        bodies: What came with them.
        tokens: What each of them was authorized with.
        storage: Where large files are to be uploaded to; defaults to this server.
        closing: Set when the tests are done with it; faults that take long end then.
        writers: Tokens of `ada` that may write.
        faults: What to do wrong.
    """

    daemon_threads = True

    def __init__(self, repositories: dict[str, Path | Repository]):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repositories = {
            name: repository
            if isinstance(repository, Repository)
            else Repository.of({file.name: file.read_bytes() for file in sorted(repository.iterdir())})
            for name, repository in repositories.items()
        }
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.bodies: list[bytes] = []
        self.tokens: list[str | None] = []
        self.storage = self.url
        self.closing = threading.Event()
        self.writers = {WRITER}
        self.faults: list[Fault] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fault_of(self, request: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and re.search(fault.pattern, request):
                fault.times -= 1
                return fault
        return None

    def handle_error(self, *args: object) -> None:
        """Clients that give up are part of the tests."""


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each body waits 40 ms for an acknowledgement of its headers
    server: HubStub

    def respond(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.query = parse_qs(urlsplit(self.path).query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(f"{self.command} {path}")
        self.server.bodies.append(self.body)
        self.server.tokens.append(self.token())
        self.fault = self.server.fault_of(f"{self.command} {path}")
        if self.fault is not None:
            self.server.closing.wait(self.fault.seconds)
            if self.fault.drips is not None:
                return self.drip(self.fault.drips)
            if self.fault.body is not None:
                return self.send_bytes(self.fault.body, self.fault.headers, status=self.fault.status)
            if self.fault.status >= 300:
                return self.send_error_code("Told", self.fault.status, self.fault.says, self.fault.headers)
            if self.fault.status == 0 and not self.fault.after:
                return self.cut()
        self.route(path)

    do_HEAD = do_GET = do_POST = do_PUT = respond  # noqa: N815 -- names of the base class

    def route(self, path: str) -> None:
        if path == "/api/validate-yaml":
            return self.validate(json.loads(self.body)["content"])
        if path == "/api/repos/create":
            return self.create(json.loads(self.body))
        if path.startswith("/lfs/"):
            if self.command == "GET":
                return self.send_bytes(self.server.large[path.removeprefix("/lfs/")], {})
            self.server.large[path.removeprefix("/lfs/")] = self.body
            return self.send_json({})
        if path == "/verify":
            return self.send_json({})
        for name, repository in self.server.repositories.items():
            api = f"/api/{name}" if name.startswith("datasets/") else f"/api/models/{name}"
            for prefix, answer in {
                f"/{name}/resolve/": self.resolve,
                f"{api}/tree/": self.tree,
                f"{api}/revision/": self.info,
                f"{api}/preupload/": self.preupload,
                f"{api}/commit/": self.commit,
                f"/{name}.git/info/lfs/objects/batch": self.large_files,
                api: self.info,
            }.items():
                if path == prefix or (prefix.endswith("/") and path.startswith(prefix)):
                    if not self.may(name, repository, write=answer in (self.preupload, self.commit)):
                        return None
                    return answer(name, repository, path.removeprefix(prefix) if prefix != path else "main")
        self.send_error_code("RepoNotFound")

    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def may(self, name: str, repository: Repository, *, write: bool) -> bool:
        """Whether the token allows it; answers if it does not."""
        token = self.token()
        if token not in (None, READER, *self.server.writers):
            self.send_error_code("", 401, "Invalid credentials in Authorization header")
        elif repository.private and token is None:
            self.send_error_code("RepoNotFound", 401, "Repository not found")
        elif write and token is None:
            self.send_error_code("", 401, "Invalid username or password.")
        elif write and (token == READER or not (name.startswith("ada/") or self.is_pull_request())):
            self.send_error_code("", 403, "You don't have the rights to write to this repository")
        else:
            return True
        return False

    def is_pull_request(self) -> bool:
        """Whether it makes one or adds to one; who made it is not looked at."""
        return "create_pr" in self.query or "/refs/pr/" in unquote(self.path)

    def validate(self, content: str) -> None:
        found = re.match(r"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|$))", content)
        errors = []
        try:
            data = yaml.safe_load(found.group(2)) if found else {}
            if not isinstance(data.get("tags", []), list):
                errors.append('"tags" must be an array')
            for model in data.get("model-index", []):
                for result in model["results"]:
                    kind = result["dataset"]["type"]
                    if not re.fullmatch(r"(?:[\w-]+/)?[\w.-]+", kind):
                        errors.append(f'"dataset.type" with value "{kind}" fails to match the required pattern')
                    assert result["task"]["type"] and isinstance(result["dataset"]["name"], str) and model["name"]
                    assert all({"type", "value"} <= metric.keys() for metric in result["metrics"])
        except (yaml.YAMLError, AssertionError, AttributeError, KeyError, TypeError) as error:
            errors.append(f"{type(error).__name__}: {error}")
        answer = {"errors": [{"message": error} for error in errors], "warnings": []}
        self.send_json(answer, status=400 if errors else 200)

    def create(self, wanted: dict[str, Any]) -> None:
        organization = wanted.get("organization") or "ada"
        name = f"{organization}/{wanted['name']}"
        if self.token() not in (READER, *self.server.writers):
            return self.send_error_code("", 401, "Invalid username or password.")
        if self.token() == READER or organization != "ada":
            return self.send_error_code("", 403, f"You don't have the rights to create a model under {organization}")
        if name in self.server.repositories:
            return self.send_json(
                {"error": "You already created this", "url": f"{self.server.url}/{name}"}, status=409
            )
        self.server.repositories[name] = Repository.of(
            {".gitattributes": b"*.png filter=lfs"}, private=wanted.get("visibility") == "private"
        )
        self.send_json({"url": f"{self.server.url}/{name}"})

    def info(self, name: str, repository: Repository, revision: str) -> None:
        commit = repository.at(revision)
        if commit is None:
            return self.send_error_code("RevisionNotFound")
        self.send_json(
            {
                "id": name.removeprefix("datasets/"),
                "sha": commit.sha,
                "siblings": [{"rfilename": file} for file in commit.files],
                "private": repository.private,
                "tags": [],
            }
        )

    def tree(self, name: str, repository: Repository, revision: str) -> None:
        commit = repository.at(revision.partition("/")[0])
        assert commit is not None
        self.send_json(
            [
                {"type": "file", "path": path, "size": len(content), "oid": digest(content)}
                for path, content in commit.files.items()
            ]
        )

    def resolve(self, name: str, repository: Repository, rest: str) -> None:
        revision, _, path = rest.partition("/")
        commit = repository.at(revision)
        if commit is None:
            return self.send_error_code("RevisionNotFound")
        if path not in commit.files:
            return self.send_error_code("EntryNotFound")
        content = commit.files[path]
        self.send_bytes(content, {"ETag": f'"{digest(content)}"', "X-Repo-Commit": commit.sha})

    def preupload(self, name: str, repository: Repository, revision: str) -> None:
        commit = repository.at(revision)
        if commit is None:
            return self.send_error_code("RevisionNotFound")
        files = []
        for file in json.loads(self.body)["files"]:
            large = file["path"].endswith(LARGE)
            known = commit.files.get(file["path"])
            oid = None if known is None else hashlib.sha256(known).hexdigest() if large else digest(known)
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send_json({"files": files})

    def large_files(self, name: str, repository: Repository, rest: str) -> None:
        objects = json.loads(self.body)["objects"]
        for one in objects:
            if one["oid"] not in self.server.large:
                one["actions"] = {
                    "upload": {"href": f"{self.server.storage}/lfs/{one['oid']}"},
                    "verify": {"href": f"{self.server.url}/verify"},
                }
        self.send_json({"transfer": "basic", "objects": objects})

    def commit(self, name: str, repository: Repository, revision: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        before = repository.at(revision)
        if before is None:
            return self.send_error_code("RevisionNotFound")
        header = lines[0]["value"]
        if header.get("parentCommit", before.sha) != before.sha:
            return self.send_error_code("", 412, "A commit has happened since. Please refresh and try again.")
        files = dict(before.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        after = Commit(digest(self.body + before.sha.encode()), files, header["summary"])
        answer = {"commitUrl": f"{self.server.url}/{name}/commit/{after.sha}", "commitOid": after.sha}
        if "create_pr" in self.query:
            number = len(repository.branches)
            repository.branches[f"refs/pr/{number}"] = [*repository.branches[revision], after]
            answer["pullRequestUrl"] = f"{self.server.url}/{name}/discussions/{number}"
        else:
            repository.branches[revision].append(after)
        if self.fault is not None and self.fault.after:
            return self.cut()
        self.send_json(answer)

    def cut(self) -> None:
        """Half an answer, and the connection is gone."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{")
        self.wfile.flush()
        self.close_connection = True

    def drip(self, start: bytes) -> None:
        """An answer that never ends, though something comes all the time."""
        self.wfile.write(start)
        while not self.server.closing.wait(0.02):
            self.wfile.write(b"x")
        self.close_connection = True

    def send_json(self, answer: object, *, status: int = 200) -> None:
        self.send_bytes(json.dumps(answer).encode(), {"Content-Type": "application/json"}, status=status)

    def send_bytes(self, content: bytes, headers: dict[str, str], *, status: int = 200) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_error_code(
        self, code: str, status: int = 404, says: str = "", headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        told = {"X-Error-Code": code, "X-Error-Message": says, "X-Repo-Commit": COMMIT, **(headers or {})}
        for key, value in {**told, "Content-Length": "0"}.items():
            if value:
                self.send_header(key, value)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Keeps the requests out of the tests' output; `HubStub.requests` has them."""


def digest(content: bytes) -> str:
    """As git names a file."""
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()


@contextmanager
def serve(repositories: dict[str, Path | Repository]) -> Iterator[HubStub]:
    """Serves while the block runs."""
    with HubStub(repositories) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.closing.set()
            hub.shutdown()
            thread.join()
