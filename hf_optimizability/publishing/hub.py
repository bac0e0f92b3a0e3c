# SPDX-License-Identifier: Apache-2.0
"""Publish a report on the Hub: its files, a section of the model card, tags and metrics, in one commit."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..files import remove_leftovers, write_atomically
from ..redaction import public_name
from ..report import OptimizabilityReport
from ..report.markdown import CARD_FOLDER, card_section
from .hub_client import HubClient, HubError, RepositoryChangedError
from .model_card import ModelCardError, with_report


__all__ = ["HubError", "ModelCardError", "add_to_model_folder", "card_section", "push"]

ATTEMPTS = 3
"""Attempts at the commit when the repository changes between reading and writing."""


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
    # What else lies in the folder may be of an earlier version, or from elsewhere.
    report = OptimizabilityReport.load(folder).published()
    client = HubClient(
        repo_id=repo_id,
        unchanged=f"The report in {folder} is unchanged.",
        revision=revision,
        create_pr=create_pr,
        token=token,
    )
    return _commit(client, report, report.files(), private=private)


def add_to_model_folder(report: OptimizabilityReport, folder: Path, *, name: str | None = None) -> None:
    """Put a report next to a model that is about to be pushed: the files, and the section in `README.md`.

    The files are written again, whatever lies there.

    Args:
        report: The report.
        folder: Folder of the model and its card.
        name: Name of the model, if the card has none.

    Raises:
        ModelCardError: If the card can't be edited.
        OSError: If a file can't be written.
    """
    report = report.published()
    files = report.files()
    for file, content in files.items():
        remove_leftovers(folder / CARD_FOLDER / file)  # all of the folder is about to be pushed
        write_atomically(folder / CARD_FOLDER / file, content)
    readme = folder / "README.md"
    card = _decoded(readme.read_bytes(), f"in {folder}") if readme.is_file() else ""
    write_atomically(
        readme, with_report(card, report, name=public_name(name or folder.resolve().name), files=files).encode()
    )


def _commit(client: HubClient, report: OptimizabilityReport, files: dict[str, bytes], *, private: bool | None) -> str:
    """Create the commit on the current state of the repository; retry if that changed in between."""
    attempts = 0
    while True:
        attempts += 1
        head = client.head(private=private)
        card = _decoded(client.read_card(head), f"of {client.repo_id}")
        card = with_report(card, report, name=client.repo_id.split("/")[-1], files=files)
        contents = {f"{CARD_FOLDER}/{name}": content for name, content in files.items()} | {"README.md": card.encode()}
        try:
            return client.commit(contents, parent=head, message="Add the optimizability report")
        except RepositoryChangedError:
            if attempts == ATTEMPTS:
                raise


def _decoded(card: bytes, where: str) -> str:
    try:
        return card.decode()
    except UnicodeDecodeError:
        raise ModelCardError(f"README.md {where} is not UTF-8, as the Hub wants it. Save it as UTF-8.") from None
