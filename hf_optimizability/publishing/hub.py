# SPDX-License-Identifier: Apache-2.0
"""Publishes a report on the Hub: its files, a section of the model card, tags and metrics, in one commit."""

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
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, httpx, validate_repo_id

from ..files import write_atomically
from ..redaction import map_strings, redact_secrets
from ..report import OptimizabilityReport
from ..report.markdown import ALT_TEXTS, CARD_FOLDER, card_section
from ..report_data.number_format import one_line
from .model_card import ModelCardError, with_report


__all__ = ["HubError", "ModelCardError", "add_to_model_folder", "card_section", "explained", "push"]

PATIENCE = 60.0
"""Seconds to wait for the Hub to send something. Its client would wait for ever."""

ATTEMPTS = 3
"""How often to make the commit when the repository changes between reading and writing."""

_TEXTS = ("report.json", "report.md", "report.html")
_FILES = (*_TEXTS, *(f"{plot}.{kind}" for plot in ALT_TEXTS for kind in ("png", "svg")))
"""What is published of a report's folder, where it is there; what else may lie in it is the user's own."""


class HubError(RuntimeError):
    """Something that could not be done on the Hub: what, why, and what to do about it."""


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Puts a report into a model's repository, in one commit.

    `report.json`, `report.md`, `report.html` and the plots go into its folder `optimizability`. The model card gets a
    section "Optimizability", the tag `optimizability`, and trace, eigenvalues and noise scale as `model-index`
    metrics; [`~hf_optimizability.publishing.model_card.with_report`] says what stays as it is. Pushing again replaces
    all of this; pushing what is there already makes no commit.

    Args:
        folder: Where `OptimizabilityReport.save` wrote the report.
        repo_id: The repository, `"user/name"`. It is made if it is not there, unless for a pull request.
        private: Whether a repository that is made is private; by default as your organization has it.
        create_pr: Whether to propose the commit as a pull request, for repositories that you may not write to.
        revision: The branch; `"refs/pr/3"` adds to pull request 3.
        token: Token that may write; by default the one you are logged in with.

    Returns:
        URL of the commit, or of the pull request. Of the last commit, where there was nothing to change.

    Raises:
        FileNotFoundError: If there is no `report.json` in `folder`.
        ValueError: If `repo_id` can't be a repository.
        ModelCardError: If the repository's card can't be edited; nothing was changed then.
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
        raise ValueError(f"`repo_id` is no name of a repository, such as 'user/my-model'. {error}") from None
    # A report may be older than the rule that none holds secrets or home directories.
    clean = partial(redact_secrets, secrets=[token, get_token()])
    report = OptimizabilityReport.from_dict(map_strings(OptimizabilityReport.load(folder).to_dict(), clean))
    files = {name: (folder / name).read_bytes() for name in _FILES if (folder / name).is_file()}
    files |= {name: clean(content.decode()).encode() for name, content in files.items() if name in _TEXTS}
    api = HfApi(token=token, library_name="hf-optimizability")
    kept = f"The report in {folder} is as it was."
    with explained(f"pushing the report to {repo_id}", kept=kept, token=token), _patience():
        info = _commit(api, repo_id, report, files, private=private, create_pr=create_pr, revision=revision)
    return info.pr_url or info.commit_url


def add_to_model_folder(
    report: OptimizabilityReport, folder: Path, *, report_folder: Path, name: str | None = None
) -> None:
    """Puts a report beside a model that is about to be pushed: the files, and the section in `README.md`.

    Args:
        report: The report.
        folder: Where the model and its card are.
        report_folder: Where the report was saved to; its files are copied unless they lie in place.
        name: Name of the model, where the card has none.

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
def explained(what: str, *, kept: str, token: str | None = None) -> Iterator[None]:
    """Says of what goes wrong on the Hub inside the block what it was, why, and what to do.

    Args:
        what: What the block does.
        kept: What is safe.
        token: The token in use; no message will show it.

    Raises:
        HubError: For what the client raises when it can't do its work.
    """
    try:
        yield
    except ModelCardError:
        raise
    except (httpx.HTTPError, KeyError, OSError, RuntimeError, ValueError) as error:
        why, remedy = _explanation(error, token)
        message = one_line(f"Failed at {what}. {why} {remedy} {kept}")
        # The client's traceback is long, and may show what the server answered: an echo of the request, say.
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
    """Makes the commit on what the repository holds now; once more, if that changed in between."""
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
    """The repository's README.md with its line breaks; empty if there is none."""
    url = hf_hub_url(repo_id, "README.md", revision=revision, endpoint=api.endpoint)
    # Not `hf_hub_download`: what that says of a Hub out of reach is hard to tell from a file that is not there.
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
def _patience() -> Iterator[None]:
    """Gives the Hub's client, which waits for ever, a limit."""
    client = get_session()
    before = client.timeout
    client.timeout = httpx.Timeout(PATIENCE)
    try:
        yield
    finally:
        client.timeout = before


def _explanation(error: Exception, token: str | None) -> tuple[str, str]:
    """Why something failed, and what to do about it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, (httpx.HTTPError, OfflineModeIsEnabled)):
        cause = cause.__cause__  # uploads of large files wrap what happened to them
    if isinstance(error, ValueError) and cause is not None:
        return str(error), "Mend the front matter of the card and push again."
    if isinstance(cause, HfHubHTTPError):
        return _refusal(cause, token)
    if isinstance(cause, OfflineModeIsEnabled):
        return "The Hub may not be reached (HF_HUB_OFFLINE is set).", "Unset it and push again."
    if isinstance(cause, httpx.TimeoutException):
        return "The Hub did not answer in time.", "Push again."
    if isinstance(cause, httpx.HTTPError):
        reason = str(cause) or type(cause).__name__
        return f"The connection to the Hub broke: {reason}.", "Look at your network, and push again."
    if isinstance(error, JSONDecodeError):
        return "The Hub's answer can't be read.", "Push again later."
    return f"{type(error).__name__}: {error}.", "See to that and push again."


def _refusal(error: HfHubHTTPError, token: str | None) -> tuple[str, str]:
    """What the Hub's refusal means, and what to do about it."""
    status = error.response.status_code
    said = f"{status}: {error.server_message}" if error.server_message else str(status)
    if isinstance(error, RevisionNotFoundError):
        return f"There is no such revision ({said}).", "Make the branch first, or leave `revision` out."
    if status in (401, 404) and not (token or get_token()):
        return f"You are not logged in ({said}).", "Log in with `hf auth login`, or pass a token that may write."
    if status == 401:
        return f"The Hub does not accept the token ({said}).", "Make a new one that may write, and log in with it."
    if status == 403:
        return f"The token may not do that ({said}).", "Use one that may write there, or open a pull request."
    if status == 404:
        return f"No such repository, or the token may not see it ({said}).", "Check the name and the token."
    if status in (409, 412):
        return f"The repository keeps changing meanwhile ({said}).", "Push again."
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        return f"Too many requests ({said}).", f"Wait {wait} seconds and push again." if wait else "Push again later."
    if status >= 500:
        return f"The Hub has trouble ({said}).", "Push again later."
    return f"The Hub refuses ({said}).", "See to that and push again."
