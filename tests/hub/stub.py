# SPDX-License-Identifier: Apache-2.0
"""A Hub on the loopback interface: as much of its protocol as a client needs to download a repository."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubStub(ThreadingHTTPServer):
    """Serves folders as repositories at one commit, and remembers what was asked for.

    Attributes:
        repositories: Folder by path on the Hub: `"org/name"` for a model, `"datasets/org/name"` for a data set.
        requests: Method and path of each request, for example `"GET /org/name/resolve/main/config.json"`.
    """

    def __init__(self, repositories: dict[str, Path]):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repositories = repositories
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubStub

    def do_HEAD(self) -> None:
        self.respond()

    def do_GET(self) -> None:
        self.respond()

    def respond(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        for name, folder in self.server.repositories.items():
            kind = "" if name.startswith("datasets/") else "models/"
            if path.startswith(f"/{name}/resolve/"):
                return self.send_content(folder / path.removeprefix(f"/{name}/resolve/").split("/", 1)[1])
            if path.startswith(f"/api/{kind}{name}/tree/"):
                return self.send_json([describe(file) for file in sorted(folder.iterdir())])
            if path in (
                f"/api/{kind}{name}",
                f"/api/{kind}{name}/revision/main",
                f"/api/{kind}{name}/revision/{COMMIT}",
            ):
                files = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
                return self.send_json(
                    {"id": name.removeprefix("datasets/"), "sha": COMMIT, "siblings": files, "tags": []}
                )
        self.send_error_code("RepoNotFound")

    def send_content(self, file: Path) -> None:
        if not file.is_file():
            return self.send_error_code("EntryNotFound")
        content = file.read_bytes()
        self.send_bytes(content, {"ETag": f'"{digest(content)}"', "X-Repo-Commit": COMMIT})

    def send_json(self, answer: object) -> None:
        self.send_bytes(json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def send_bytes(self, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_error_code(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Keeps the requests out of the tests' output; `HubStub.requests` has them."""


def describe(file: Path) -> dict[str, object]:
    content = file.read_bytes()
    return {"type": "file", "path": file.name, "size": len(content), "oid": digest(content)}


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def serve(repositories: dict[str, Path]) -> Iterator[HubStub]:
    """Serves while the block runs."""
    with HubStub(repositories) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
