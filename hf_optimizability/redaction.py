# SPDX-License-Identifier: Apache-2.0
"""Takes out of a text what tells who ran the code and where: secrets, paths, the names of user and machine.

A report is made to be shown. What the package writes into it itself names no place; the messages of exceptions, which
it keeps as reasons of failures, may name any.
"""

from __future__ import annotations

import getpass
import os
import re
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")  # those of today have 34
_SECRET_NAME = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)$")
_LEAST_SECRET = 16
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
    """The text without tokens, and with `~` for home directories.

    Args:
        text: Any text.
        secrets: Tokens that are known; those in the environment are found.

    Example:
        >>> redact_secrets("hf_abcdefghijklmnopqrstuvwxyz012345 was refused for /home/ada/model")
        '<secret> was refused for ~/model'
    """
    found = [value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= _LEAST_SECRET]
    for secret in filter(None, [*secrets, *found]):
        text = text.replace(secret, "<secret>")
    text = _HUB_TOKEN.sub("<secret>", text)
    home = str(Path.home())
    if len(home) > 1:  # a container's may be /
        text = re.sub(rf"(?<![\w.-]){re.escape(home)}(?![\w.-])", "~", text)
    return _HOME.sub("~", text)


def anonymize(text: str) -> str:
    """The text without secrets, with the last part of each path only, and without the names of user and machine.

    Example:
        >>> anonymize("FileNotFoundError: '/mnt/ada/secret project/train.csv' (see https://pytorch.org/docs/stable)")
        "FileNotFoundError: '…/train.csv' (see https://pytorch.org/docs/stable)"
    """
    text = redact_secrets(_QUOTED_PATH.sub(r"\g<quote>…/\g<last>\g<quote>", text))  # may hold spaces
    for path in _PATHS:
        text = path.sub(r"…/\g<last>", text)
    for name, instead in _names().items():
        if len(name) > 2 and name.lower() not in _NO_NAMES:
            text = re.sub(rf"(?<![\w.-]){re.escape(name)}(\.[\w-]+)*(?![\w-])", instead, text)
    return text


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """The value with each string in it changed, in nested dicts (but not their keys) and lists."""
    if isinstance(value, dict):
        return {key: map_strings(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [map_strings(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _names() -> dict[str, str]:
    """What stands for the names of this user and this machine."""
    names = {socket.gethostname(): "<host>", socket.gethostname().partition(".")[0]: "<host>"}
    try:
        return {**names, getpass.getuser(): "<user>"}
    except (ImportError, KeyError, OSError):  # a user id without a name, as in some containers
        return names
