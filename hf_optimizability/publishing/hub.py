# SPDX-License-Identifier: Apache-2.0
"""Publish a report on the Hub: its files, a section of the model card, tags and metrics, in one commit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from json import JSONDecodeError
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, get_session, get_token, hf_hub_url
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    build_hf_headers,
    hf_raise_for_status,
    httpx,  # the library that this version of the client is built on: httpx or httpx2, whose errors it raises
    validate_repo_id,
)

from ..files import write_atomically
from ..redaction import map_strings, redact_secrets
from ..report import OptimizabilityReport
from ..report.markdown import ALT_TEXTS, CARD_FOLDER, card_section
from ..report_data.number_format import one_line
from .model_card import ModelCardError, with_report


__all__ = ["HubError", "ModelCardError", "add_to_model_folder", "card_section", "explained", "push"]

TIMEOUT = 60.0
"""Seconds to wait for the Hub to send something; its client has no limit."""

ATTEMPTS = 3
"""Attempts at the commit when the repository changes between reading and writing."""

_TEXTS = ("report.json", "report.md", "report.html")
_FILES = (*_TEXTS, *(f"{plot}.{kind}" for plot in ALT_TEXTS for kind in ("png", "svg")))
"""Files of a report's folder that are published if they exist; other files in it belong to the user."""


class HubError(RuntimeError):
    """An operation on the Hub failed: which one, why, and what to do about it."""


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Put a report into a model's repository, in one commit.

    `report.json`, `report.md`, `report.html` and the plots go into its folder `optimizability`. The model card gets a
    section "Optimizability", the tag `optimizability`, and trace, eigenvalues and noise scale as `model-index`
    metrics; [`~hf_optimizability.publishing.model_card.with_report`] says what stays as it is. Pushing again replaces
    all of this; pushing an unchanged report creates no commit.

    Args:
        folder: Where `OptimizabilityReport.save` wrote the report.
        repo_id: The repository, `"user/name"`. It is created if it does not exist, except for a pull request.
        private: Whether a new repository is private; defaults to the setting of your organization.
        create_pr: Whether to propose the commit as a pull request, for repositories without write access.
        revision: The branch; `"refs/pr/3"` adds to pull request 3.
        token: Token with write access; defaults to that of your login.

    Returns:
        URL of the commit or the pull request; of the last commit if there was nothing to change.

    Raises:
        FileNotFoundError: If there is no `report.json` in `folder`.
        ValueError: If `repo_id` is not a valid name of a repository.
        ModelCardError: If the repository's card can't be edited; nothing was changed.
        HubError: If the Hub can't be reached or refuses.

    Example:
        >>> push("out/sst2/optimizability", "user/my-model")  # doctest: +SKIP
        'https://huggingface.co/user/my-model/commit/…'
    """
    folder = Path(folder)
    if not (folder / "report.json").is_file():
        raise FileNotFoundError(
            f"There is no report.json in {str(folder)!r}. Pass the folder that the report was saved to, such as "
            "'out/optimizability'."
        )
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"`repo_id` is not the name of a repository, such as 'user/my-model'. {error}") from None
    # Older reports may still hold secrets or home directories.
    clean = partial(redact_secrets, secrets=[token, get_token()])
    report = OptimizabilityReport.from_dict(map_strings(OptimizabilityReport.load(folder).to_dict(), clean))
    files = {name: (folder / name).read_bytes() for name in _FILES if (folder / name).is_file()}
    files |= {name: clean(content.decode()).encode() for name, content in files.items() if name in _TEXTS}
    api = HfApi(token=token, library_name="hf-optimizability")
    unchanged = f"The report in {folder} is unchanged."
    with explained(f"pushing the report to {repo_id}", unchanged=unchanged, token=token), _timeout():
        info = _commit(api, repo_id, report, files, private=private, create_pr=create_pr, revision=revision)
    return info.pr_url or info.commit_url


def add_to_model_folder(
    report: OptimizabilityReport, folder: Path, *, report_folder: Path, name: str | None = None
) -> None:
    """Put a report next to a model that is about to be pushed: the files, and the section in `README.md`.

    Args:
        report: The report.
        folder: Folder of the model and its card.
        report_folder: Folder of the report; its files are copied unless they are in place already.
        name: Name of the model, if the card has none.

    Raises:
        ModelCardError: If the card can't be edited.
        OSError: If a file can't be written.
    """
    target = folder / CARD_FOLDER
    names = [file for file in _FILES if (report_folder / file).is_file()]
    if report_folder.resolve() != target.resolve():
        target.mkdir(parents=True, exist_ok=True)
        for file in names:
            shutil.copyfile(report_folder / file, target / file)
    readme = folder / "README.md"
    card = readme.read_bytes().decode() if readme.is_file() else ""
    write_atomically(readme, with_report(card, report, name=name or folder.resolve().name, files=names).encode())


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
    except ModelCardError:
        raise
    except (httpx.HTTPError, KeyError, OSError, RuntimeError, ValueError) as error:
        why, remedy = _explanation(error, token)
        message = one_line(f"Could not finish {what}. {why} {remedy} {unchanged}")
        # The client's traceback is long, and may show the server's answer, which may echo the request.
        raise HubError(redact_secrets(message, secrets=[token, get_token()])) from None


def _commit(
    api: HfApi,
    repo_id: str,
    report: OptimizabilityReport,
    files: dict[str, bytes],
    *,
    private: bool | None,
    create_pr: bool,
    revision: str | None,
) -> CommitInfo:
    """Create the commit on the current state of the repository; retry if that changed in between."""
    attempts = 0
    while True:
        attempts += 1
        try:
            head = api.model_info(repo_id, revision=revision).sha
        except RepositoryNotFoundError:
            if create_pr or revision is not None:
                raise
            api.create_repo(repo_id, private=private, exist_ok=True)
            head = api.model_info(repo_id).sha
        card = with_report(_read_card(api, repo_id, head), report, name=repo_id.split("/")[-1], files=files)
        contents = {f"{CARD_FOLDER}/{name}": content for name, content in files.items()} | {"README.md": card.encode()}
        try:
            return api.create_commit(
                repo_id,
                [CommitOperationAdd(path, content) for path, content in contents.items()],
                commit_message="Add the optimizability report",
                revision=revision,
                create_pr=create_pr,
                parent_commit=head,
            )
        except HfHubHTTPError as error:
            if error.response.status_code not in (409, 412) or attempts == ATTEMPTS:
                raise


def _read_card(api: HfApi, repo_id: str, revision: str | None) -> str:
    """Return the repository's README.md with its line breaks; empty if there is none."""
    url = hf_hub_url(repo_id, "README.md", revision=revision, endpoint=api.endpoint)
    # Not `hf_hub_download`: its errors for an unreachable Hub and for a missing file are hard to distinguish.
    response = get_session().get(url, headers=build_hf_headers(token=api.token, library_name=api.library_name))
    try:
        hf_raise_for_status(response)
    except RemoteEntryNotFoundError:
        return ""
    try:
        return response.content.decode()
    except UnicodeDecodeError:
        raise ModelCardError(f"README.md of {repo_id} is not UTF-8, as the Hub wants it. Save it as UTF-8.") from None


@contextmanager
def _timeout() -> Iterator[None]:
    """Set a time limit on the Hub's client, which has none."""
    client = get_session()
    before = client.timeout
    client.timeout = httpx.Timeout(TIMEOUT)
    try:
        yield
    finally:
        client.timeout = before


def _explanation(error: Exception, token: str | None) -> tuple[str, str]:
    """Return why something failed, and what to do about it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, (httpx.HTTPError, OfflineModeIsEnabled)):
        cause = cause.__cause__  # uploads of large files wrap what happened to them
    if isinstance(error, ValueError) and cause is not None:
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
    if isinstance(error, JSONDecodeError):
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
