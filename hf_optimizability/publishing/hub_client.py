# SPDX-License-Identifier: Apache-2.0
"""A model's repository on the Hub, for one push: every request has a time-out, and every answer is checked.

The requests are those of `HfApi.create_commit`, made here on the session that huggingface_hub shares, with the user's
proxies and certificates. Its own methods can't be bounded: they repeat a request that timed out, sleep for as long as
a `Retry-After` says, upload from threads of their own or by hf_xet, which has no time-outs, and begin a new session
where a connection fails. A limit set on the shared session would meet the requests of others, and miss some of ours.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from json import JSONDecodeError
from typing import Any, TypeVar
from urllib.parse import quote

from huggingface_hub import constants, get_session, get_token, hf_hub_url
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    build_hf_headers,
    fix_hf_endpoint_in_url,
    hf_raise_for_status,
    httpx,  # the library that this version of the client is built on: httpx or httpx2, whose errors it raises
)

from ..number_format import one_line
from ..redaction import redact_secrets


TIMEOUT = 60.0
"""Seconds to wait for the Hub to take or send something."""

CONNECT_TIMEOUT = 10.0
"""Seconds to wait for a connection to one of the Hub's addresses."""

PUSH_TIMEOUT = 600.0
"""Seconds that the requests of one push may take together; a Hub that sends a byte now and then never times out."""

WAITS = (1.0, 2.0, 4.0)
"""Seconds before each further attempt at a request whose connection broke, or for which the Hub had no time."""

LONGEST_WAIT = 30.0
"""Seconds that the Hub may ask for before a further attempt; where it asks for more, the push fails and says so."""

_BUSY = (408, 429, 500, 502, 503, 504)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_URL = re.compile(r"https?://[!-~]+")

_T = TypeVar("_T")


class HubError(RuntimeError):
    """An operation on the Hub failed: which one, why, and what to do about it."""


class RepositoryChangedError(HubError):
    """The repository changed between reading and writing."""


class _RequestError(Exception):
    """A request that came to nothing in another way than an error of the client: why, and what to do about it."""

    def __init__(self, reason: str, remedy: str):
        super().__init__(reason, remedy)
        self.reason = reason
        self.remedy = remedy


@dataclass(frozen=True, kw_only=True)
class HubClient:
    """A model's repository on the Hub, for one push.

    Attributes:
        repo_id: The repository, `"user/name"`.
        unchanged: A sentence for error messages on what is safe.
        revision: The branch; defaults to `main`.
        create_pr: Whether the commit becomes a pull request.
        token: Token with write access; defaults to that of the user's login.
        deadline: When to give up, by `time.monotonic()`.
    """

    repo_id: str
    unchanged: str
    revision: str | None = None
    create_pr: bool = False
    token: str | None = field(default=None, repr=False)
    deadline: float = field(default_factory=lambda: time.monotonic() + PUSH_TIMEOUT)

    def head(self, *, private: bool | None = None) -> str:
        """Return the last commit of the branch. A repository that is not there is made, except for a pull request.

        Args:
            private: Whether a new repository is private; defaults to the setting of the organization.

        Raises:
            HubError: If the Hub can't be reached, refuses, or answers something else.
        """
        with self._explained():
            try:
                return self._head()
            except RepositoryNotFoundError:
                if self.create_pr or self.revision is not None:
                    raise
            self._create(private)
            return self._head()

    def read_card(self, head: str) -> bytes:
        """Return README.md as of a commit; empty if there is none.

        Raises:
            HubError: If the Hub can't be reached, refuses, or something else answers in its place.
        """
        with self._explained():
            url = hf_hub_url(self.repo_id, "README.md", revision=head, endpoint=constants.ENDPOINT)
            try:
                response = self._send("GET", url)
            except RemoteEntryNotFoundError:
                return b""
            # It says so itself, or where it sends us to another server.
            commits = [one.headers.get("X-Repo-Commit") for one in (*response.history, response)]
            if head not in commits:
                raise _unreadable("README.md does not come from the commit that was asked for")
            return response.content

    def commit(self, contents: dict[str, bytes], *, parent: str, message: str) -> str:
        """Put files into one commit, unless the repository has all of them as they are.

        Args:
            contents: By path in the repository; `README.md` is one of them.
            parent: The commit that this one follows.
            message: First line of its message.

        Returns:
            URL of the commit or the pull request; of `parent` if there was nothing to change.

        Raises:
            RepositoryChangedError: If `parent` is no longer the last commit.
            HubError: If the Hub can't be reached, refuses, or answers something else.
        """
        with self._explained():
            self._validate(contents["README.md"])
            files = self._changed(contents)
            if not files:
                return f"{constants.ENDPOINT}/{self.repo_id}/commit/{parent}"
            self._upload([file for file in files if file.large])
            header = {"summary": message, "description": "", "parentCommit": parent}
            lines = [{"key": "header", "value": header}, *(file.as_line() for file in files)]
            answer = self._send_json(
                "POST",
                f"{self._api}/commit/{self._branch}",
                retry=False,  # it may have been carried out
                params=self._params,
                headers={"Content-Type": "application/x-ndjson"},
                content=b"".join(json.dumps(line).encode() + b"\n" for line in lines),
            )
            url = _member(answer, "pullRequestUrl" if self.create_pr else "commitUrl", str)
            if not _URL.fullmatch(url):
                raise _unreadable("the commit has no URL")
            return url

    def _explained(self) -> AbstractContextManager[None]:
        return explained(f"pushing the report to {self.repo_id}", unchanged=self.unchanged, token=self.token)

    @property
    def _api(self) -> str:
        return f"{constants.ENDPOINT}/api/models/{self.repo_id}"

    @property
    def _branch(self) -> str:
        return quote(self.revision or "main", safe="")

    @property
    def _params(self) -> dict[str, str]:
        return {"create_pr": "1"} if self.create_pr else {}

    def _head(self) -> str:
        answer = self._send_json("GET", self._api if self.revision is None else f"{self._api}/revision/{self._branch}")
        commit = _member(answer, "sha", str)
        if not _COMMIT.fullmatch(commit):
            raise _unreadable("it names no commit")
        return commit

    def _create(self, private: bool | None) -> None:
        organization, _, name = self.repo_id.rpartition("/")
        wanted: dict[str, str | None] = {"name": name, "organization": organization or None}
        if private is not None:
            wanted["visibility"] = "private" if private else "public"
        try:
            self._send("POST", f"{constants.ENDPOINT}/api/repos/create", retry=False, json=wanted)
        except HfHubHTTPError as error:
            if error.response.status_code != 409 or "conflicting operation" in str(error):
                raise
            # Someone else was faster; `head` sees whether it is there.

    def _validate(self, card: bytes) -> None:
        """Ask the Hub what it thinks of the card's front matter."""
        url = f"{constants.ENDPOINT}/api/validate-yaml"
        try:
            answer = self._send_json("POST", url, json={"content": card.decode(), "repoType": "model"})
        except BadRequestError as error:
            if not error.server_message:
                raise
            reason = f"Invalid metadata in README.md: {error.server_message}."
            raise _RequestError(reason, "Fix the YAML front matter of the card and push again.") from error
        if not isinstance(answer, dict):
            raise _unreadable("it does not say whether the card's front matter is valid")

    def _changed(self, contents: dict[str, bytes]) -> list[_File]:
        """Return the files that the repository does not have as they are, nor ignores."""
        described = [
            {"path": path, "sample": base64.b64encode(content[:512]).decode(), "size": len(content)}
            for path, content in contents.items()
        ]
        answer = self._send_json(
            "POST", f"{self._api}/preupload/{self._branch}", params=self._params, json={"files": described}
        )
        told = {_member(one, "path", str): one for one in _member(answer, "files", list)}
        files = []
        for path, content in contents.items():
            kind = _member(told.get(path), "uploadMode", str)
            if kind not in ("lfs", "regular"):
                raise _unreadable("it does not say how to upload a file")
            file = _File(path, content, large=kind == "lfs" and len(content) > 0)
            if not told[path].get("shouldIgnore") and told[path].get("oid") != file.oid:
                files.append(file)
        return files

    def _upload(self, files: list[_File]) -> None:
        """Bring files to the large file storage, each in one piece, unless it has them already."""
        if not files:
            return
        by_oid = {file.oid: file.content for file in files}
        answer = self._send_json(
            "POST",
            f"{constants.ENDPOINT}/{self.repo_id}.git/info/lfs/objects/batch",
            headers=dict.fromkeys(("Accept", "Content-Type"), "application/vnd.git-lfs+json"),
            json={
                "operation": "upload",
                "transfers": ["basic"],
                "objects": [{"oid": oid, "size": len(content)} for oid, content in by_oid.items()],
                "hash_algo": "sha256",
                **({} if self.create_pr else {"ref": {"name": self.revision or "main"}}),
            },
        )
        told = {_member(one, "oid", str): one for one in _member(answer, "objects", list)}
        for oid, content in by_oid.items():
            one = told.get(oid)
            if one is None:
                raise _unreadable("it does not say where to upload a file to")
            if "error" in one:
                reason = f"The Hub refuses a file: {_member(_member(one, 'error', dict), 'message', str)}."
                raise _RequestError(reason, "Resolve this and push again.")
            if one.get("actions") is not None:
                self._upload_one(oid, content, _member(one, "actions", dict))

    def _upload_one(self, oid: str, content: bytes, actions: dict[str, Any]) -> None:
        upload = _member(actions, "upload", dict)
        header = upload.get("header")
        if isinstance(header, dict) and header.get("chunk_size") is not None:
            raise _unreadable("it wants a file in several pieces, which was not offered")
        self._send("PUT", _member(upload, "href", str), content=content)
        if actions.get("verify") is not None:
            url = _member(_member(actions, "verify", dict), "href", str)
            self._send("POST", url, json={"oid": oid, "size": len(content)})

    def _send_json(self, method: str, url: str, **options: Any) -> Any:
        response = self._send(method, url, **options)
        try:
            return response.json()
        except (ValueError, RecursionError):
            raise _unreadable("it is not JSON") from None

    def _send(
        self,
        method: str,
        url: str,
        *,
        retry: bool = True,
        headers: dict[str, str] | None = None,
        **options: Any,
    ) -> httpx.Response:
        """Send a request and return the answer, which is a success.

        Args:
            method: For example `"GET"`.
            url: Absolute address.
            retry: Whether to try again after a broken connection or while the Hub is busy.
            headers: More headers.
            options: As in `httpx.request`.

        Raises:
            HfHubHTTPError: If the Hub refuses.
            httpx.HTTPError: If the connection breaks or nothing comes for too long.
            _RequestError: If the push takes too long.
        """
        url = fix_hf_endpoint_in_url(url, constants.ENDPOINT)
        # The token is for the Hub alone, not for the storage that it sends us to.
        token = self.token if url.startswith(f"{constants.ENDPOINT}/") else False
        waits = iter(WAITS if retry else ())
        while True:
            try:
                response = _request(method, url, deadline=self.deadline, token=token, headers=headers, **options)
                _raise_for_status(response)
                return response
            except httpx.HTTPError as error:
                seconds = _wait_after(error, next(waits, None))
                if seconds is None or time.monotonic() + seconds > self.deadline:
                    raise
            time.sleep(seconds)


@dataclass(frozen=True)
class _File:
    """A file of a commit."""

    path: str
    content: bytes = field(repr=False)
    large: bool

    @property
    def oid(self) -> str:
        """The name that the Hub has for this content."""
        if self.large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    def as_line(self) -> dict[str, Any]:
        if self.large:
            value = {"path": self.path, "algo": "sha256", "oid": self.oid, "size": len(self.content)}
            return {"key": "lfsFile", "value": value}
        content = base64.b64encode(self.content).decode()
        return {"key": "file", "value": {"path": self.path, "encoding": "base64", "content": content}}


@contextmanager
def explained(what: str, *, unchanged: str, token: str | None = None) -> Iterator[None]:
    """Turn errors on the Hub inside the block into one that says what failed, why, and what to do.

    Args:
        what: What the block does.
        unchanged: A sentence on what is safe.
        token: The token in use; no message shows it.

    Raises:
        HubError: If the client raises an error.
    """
    try:
        yield
    except (AttributeError, TypeError) as error:
        if not _is_of_the_client(error):
            raise
        raised: Exception = error
    except (_RequestError, httpx.HTTPError, KeyError, OSError, RuntimeError, ValueError) as error:
        raised = error
    else:
        return
    why, remedy = _explanation(raised, token)
    message = one_line(f"Could not finish {what}. {why} {remedy} {unchanged}")
    # An error may quote a token that holds a line break with that escaped.
    message = redact_secrets(message, secrets=[token and token.strip(), get_token()])
    changed = isinstance(raised, HfHubHTTPError) and raised.response.status_code in (409, 412)
    # The client's traceback is long, and may show the server's answer, which may echo the request.
    raise (RepositoryChangedError if changed else HubError)(message) from None


def _request(
    method: str,
    url: str,
    *,
    deadline: float,
    token: str | bool | None,
    headers: dict[str, str] | None,
    **options: Any,
) -> httpx.Response:
    """Return the answer to one request, which may take until the deadline.

    Time-outs begin again with each byte, and there is none for looking up a name. So the request is made in a thread,
    which nobody waits for when the time is over.
    """
    limits = httpx.Timeout(TIMEOUT, connect=min(CONNECT_TIMEOUT, TIMEOUT))
    answer: Future[httpx.Response] = Future()

    def ask() -> None:
        try:
            # Here too the client may ask the Hub: it renews the token of a login, and looks up what it runs in.
            ours = build_hf_headers(token=token, library_name="hf-optimizability", headers=headers)
            answer.set_result(get_session().request(method, url, timeout=limits, headers=ours, **options))
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=ask, name="push to the Hub", daemon=True).start()
    if not wait([answer], timeout=max(deadline - time.monotonic(), 0)).done:
        reason = f"The Hub is too slow: it was given up after {PUSH_TIMEOUT:g} seconds."
        raise _RequestError(reason, "Push again later.")
    try:
        return answer.result()
    except httpx.InvalidURL:
        raise _unreadable("it names an address that is none") from None


def _raise_for_status(response: httpx.Response) -> None:
    try:
        hf_raise_for_status(response)
    except (AttributeError, TypeError, RecursionError, UnicodeDecodeError):  # it expects JSON of a certain shape
        raise HfHubHTTPError(str(response.status_code), response=response) from None
    if not response.is_success:  # a redirection to nowhere
        raise _unreadable(f"its status is {response.status_code}")


def _wait_after(error: httpx.HTTPError, seconds: float | None) -> float | None:
    """Return the seconds to wait before the next attempt; `None` if there should be none."""
    if seconds is None or isinstance(error, httpx.ConnectError):
        return None
    if not isinstance(error, HfHubHTTPError):
        return seconds if isinstance(error, (httpx.NetworkError, httpx.RemoteProtocolError)) else None
    if error.response.status_code not in _BUSY:
        return None
    asked = error.response.headers.get("Retry-After", "")
    wanted = max(seconds, float(asked)) if asked.isdecimal() else seconds
    return wanted if wanted <= LONGEST_WAIT else None


def _member(answer: object, name: str, kind: type[_T]) -> _T:
    """Return what an answer of the Hub should hold."""
    value = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(value, kind):
        raise _unreadable(f"it has no `{name}`")
    return value


def _unreadable(why: str) -> _RequestError:
    return _RequestError(
        f"The Hub's answer can't be read: {why}.",
        "If a proxy or a sign-in page answers in its place, get past it; else push again later.",
    )


def _is_of_the_client(error: Exception) -> bool:
    """Return whether the client's own code raised an error: an answer had another shape than it expects."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals["__name__"]).partition(".")[0] == "huggingface_hub"


def _explanation(error: Exception, token: str | None) -> tuple[str, str]:
    """Return why something failed, and what to do about it."""
    if isinstance(error, _RequestError):
        return error.reason, error.remedy
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, (httpx.HTTPError, OfflineModeIsEnabled)):
        cause = cause.__cause__  # uploads of large files wrap what happened to them
    if isinstance(error, ValueError) and cause not in (None, error):  # the client's words for refused front matter
        return str(error), "Fix the YAML front matter of the card and push again."
    if isinstance(cause, HfHubHTTPError):
        return _refusal(cause, token)
    if isinstance(cause, OfflineModeIsEnabled):
        return "The Hub may not be reached (HF_HUB_OFFLINE is set).", "Unset it and push again."
    if isinstance(cause, httpx.TimeoutException):
        return "The Hub did not answer in time.", "Push again."
    if isinstance(cause, httpx.HTTPError):
        reason = str(cause) or type(cause).__name__
        return f"The connection to the Hub broke: {reason}.", "Check your network connection and push again."
    lookup = isinstance(error, (AttributeError, KeyError, TypeError))
    if isinstance(error, JSONDecodeError) or (lookup and _is_of_the_client(error)):
        return "The Hub's answer can't be read.", "Push again later."
    return f"{type(error).__name__}: {error}.", "Resolve this and push again."


def _refusal(error: HfHubHTTPError, token: str | None) -> tuple[str, str]:
    """Return what the Hub's refusal means, and what to do about it."""
    status = error.response.status_code
    answer = f"{status}: {error.server_message}" if error.server_message else str(status)
    if isinstance(error, RevisionNotFoundError):
        return f"There is no such revision ({answer}).", "Create the branch first, or omit `revision`."
    if status in (401, 404) and not (token or get_token()):
        return f"You are not logged in ({answer}).", "Log in with `hf auth login`, or pass a token with write access."
    if status == 401:
        return (
            f"The Hub does not accept the token ({answer}).",
            "Create a new one with write access, and log in with it.",
        )
    if status == 403:
        return f"The token does not allow that ({answer}).", "Use one with write access, or open a pull request."
    if status == 404:
        return f"No such repository, or the token can't see it ({answer}).", "Check the name and the token."
    if status in (409, 412):
        return f"The repository keeps changing meanwhile ({answer}).", "Push again."
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        return (
            f"Too many requests ({answer}).",
            f"Wait {wait} seconds and push again." if wait else "Push again later.",
        )
    if status >= 500:
        return f"The Hub has trouble ({answer}).", "Push again later."
    return f"The Hub refuses ({answer}).", "Resolve this and push again."
