# SPDX-License-Identifier: Apache-2.0
"""Remove from a text what reveals who ran the code and where: secrets, paths, names of user and machine.

Reports are made to be shared. The package itself writes no paths into them, but messages of exceptions, which are
stored as reasons of failures, may contain any.
"""

from __future__ import annotations

import getpass
import os
import re
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")  # today's have 34
_SECRET_NAME = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)$")
_MIN_SECRET = 16
"""Shorter values of variables such as `SORT_KEY` are hardly secrets, and may be words."""

_HOME = re.compile(r"(?<![\w.])(/home/|/Users/|\b[A-Za-z]:\\+Users\\+)[^\s/\\'\"`:,;()<>]+|(?<![\w.])/root\b")
_PART = r"[^\s/\\'\"`:,;()<>|*?\[\]]+"
_QUOTED_PATH = re.compile(r"(?P<quote>['\"])(?:~|[A-Za-z]:)?[/\\][^'\"\n]*[/\\](?P<last>[^'\"\n/\\]+)[/\\]*(?P=quote)")
_PATHS = (
    re.compile(rf"(?:(?<![\w:/.…~])|(?<=file://))~?(?:/{_PART})+/(?P<last>{_PART})/?"),
    re.compile(rf"(?<!\w)~/(?P<last>{_PART})/?"),
    re.compile(rf"(?<![\w\\])(?:[A-Za-z]:|~|\\)(?:\\+{_PART})*\\+(?P<last>{_PART})"),
)
_NO_NAMES = {"root", "user", "localhost", "admin"}


def redact_secrets(text: str, *, secrets: Iterable[str | None] = ()) -> str:
    """Return the text without tokens, and with `~` for home directories.

    Args:
        text: Any text.
        secrets: Known tokens; those in the environment are found.

    Example:
        >>> redact_secrets("hf_abcdefghijklmnopqrstuvwxyz012345 was refused for /home/ada/model")
        '<secret> was refused for ~/model'
    """
    tokens = [value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= _MIN_SECRET]
    for secret in filter(None, [*secrets, *tokens]):
        text = text.replace(secret, "<secret>")
    text = _HUB_TOKEN.sub("<secret>", text)
    home = str(Path.home())
    if len(home) > 1:  # a container's may be /
        text = re.sub(rf"(?<![\w.-]){re.escape(home)}(?![\w.-])", "~", text)
    return _HOME.sub("~", text)


def anonymize(text: str) -> str:
    """Return the text without secrets, names of user and machine, and all but the last part of each path.

    Example:
        >>> anonymize("FileNotFoundError: '/mnt/ada/secret project/train.csv' (see https://pytorch.org/docs/stable)")
        "FileNotFoundError: '…/train.csv' (see https://pytorch.org/docs/stable)"
    """
    text = redact_secrets(_QUOTED_PATH.sub(r"\g<quote>…/\g<last>\g<quote>", text))  # may hold spaces
    for path in _PATHS:
        text = path.sub(r"…/\g<last>", text)
    for name, replacement in _names().items():
        if len(name) > 2 and name.lower() not in _NO_NAMES:
            text = re.sub(rf"(?<![\w.-]){re.escape(name)}(\.[\w-]+)*(?![\w-])", replacement, text)
    return text


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Return the value with each string in it changed, in nested dicts (but not their keys) and lists."""
    if isinstance(value, dict):
        return {key: map_strings(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [map_strings(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _names() -> dict[str, str]:
    """Return the replacements for the names of this user and this machine."""
    names = {socket.gethostname(): "<host>", socket.gethostname().partition(".")[0]: "<host>"}
    try:
        return {**names, getpass.getuser(): "<user>"}
    except (ImportError, KeyError, OSError):  # a user id without a name, as in some containers
        return names
