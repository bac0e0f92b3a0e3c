# SPDX-License-Identifier: Apache-2.0
"""Secrets in texts for the log, and names that look like a secret and are not published."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

from .log_keys import PREFIX as _PREFIX


_SECRET_VARIABLE = re.compile(
    r"(?:TOKEN|KEY|KEY_ID|SECRET|PASS|PASSWORD|PASSWD|PASSPHRASE|PAT|CREDENTIALS?|AUTH)$|^DATABASE_URL$|^PGPASSWORD$",
    re.IGNORECASE,
)
_MIN_SECRET = 12
"""Shorter values of variables such as `SORT_KEY` are hardly secrets, and may be words."""

_TOKEN = re.compile(
    r"""
    (?<![A-Za-z0-9])(?:
        (?:hf|api_org|hf_oauth|hf_jwt)_[A-Za-z0-9][\w.-]{15,}       # Hugging Face
      | sk-(?:[a-z]+-)*[A-Za-z0-9_]{20,} | pk_\w{16,}               # OpenAI, Anthropic, Stripe
      | gh[pousr]_[A-Za-z0-9]{16,} | github_pat_\w{16,} | glpat-[\w-]{16,}
      | A(?:KI|SI)A[A-Z0-9]{12,} | AIza[\w-]{20,} | ya29\.[\w-]{10,}  # Amazon, Google
      | xox[abeoprs]-[\w-]{10,} | npm_[A-Za-z0-9]{16,} | pypi-[\w-]{16,} | dop_v1_\w{16,} | SG\.[\w-]{10,}
      | eyJ[\w-]{8,}\.[\w.-]+                                       # JSON Web Token
    )
    | -----BEGIN[ ][A-Z ]+-----.*                                    # a private key
    | \b(?:Bearer|Basic)\s+[\w.~+/=-]{6,}
    | (?:pass(?:word|wd|phrase)?|secret|token|api[_-]?key|credentials?|sig(?:nature)?)\s*[=:]\s*\S+
    """,
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
_CREDENTIALS = re.compile(r"(?<=://)[^\s/@]+@")
_HOME = re.compile(r"(?<![\w.])(?:/home/|/Users/|\b[A-Za-z]:\\+Users\\+)[^\s/\\'\"`:,;()<>]+|(?<![\w.])/root\b")

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|[^\s@]+@[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}|[^\s@]+@[\w.-]+:")
"""URLs, e-mail addresses, and user@host:place. Metrics such as `recall@10` are none of them."""

_EXTENSION = (
    "csv|tsv|jsonl?|txt|parquet|arrow|pt|pth|bin|ckpt|safetensors|npy|npz|pkl|zip|gz|tar|h5|py|ipynb|ya?ml|md|log|pem"
    "|key|png|jpe?g|wav|mp3"
)
_PATH = re.compile(
    rf"""
    (?:^|[\s=:,;'"(\[<])(?:~|\.{{1,2}}(?=[/\\])|(?=/))[^\s/]*/        # /x, ~/x, ~user/x, ./x, ../x
    | ^~ | ^/ | \b[A-Za-z]:[\\/] | \\\\\w | \w\\\w+\\               # C:\\x, \\\\server, x\\y\\z
    | [^/]+/[^/]+/ | /[^/]*\.(?:{_EXTENSION})\b                       # x/y/z, x/y.csv
    """,
    re.VERBOSE | re.IGNORECASE,
)
_OWN_KEYS = (
    re.compile(rf"({_PREFIX}task/)(.+)(/[a-z_]+)", re.DOTALL),
    re.compile(rf"({_PREFIX}(?:train_grad_norm/)?)(.+)()", re.DOTALL),
)
"""Keys of our own in the log, which hold a name: before it, the name, after it."""

_PIECE = re.compile(r"[A-Za-z0-9+=]{20,}")
_HEX = re.compile(r"[0-9a-f]{32,}", re.IGNORECASE)
_LARGEST_CHANGE = 0.3
"""Share of neighbours of another kind (small letter, capital, digit) from which on a long word is taken for a token.
`Wav2Vec2ForSequenceClassification` has 0.19, random letters and digits 0.5."""


def redact_secrets(text: str, *, secrets: Iterable[str | None] = ()) -> str:
    """Return the text without tokens, and with `~` for home directories.

    Args:
        text: Any text.
        secrets: Known tokens; those in the environment are found.

    Example:
        >>> redact_secrets("hf_abcdefghijklmnopqrstuvwxyz012345 was refused for /home/ada/model")
        '<secret> was refused for ~/model'
    """
    for secret in filter(None, [*secrets, *_environment()]):
        text = text.replace(secret, "<secret>")
    text = _CREDENTIALS.sub("<secret>@", _TOKEN.sub("<secret>", text))
    home = str(Path.home())
    if len(home) > 1:  # a container's may be /
        text = re.sub(rf"(?<![\w.-]){re.escape(home)}(?![\w.-])", "~", text)
    return _HOME.sub("~", text)


def public_name(name: str) -> str:
    """Return a name as it is; a hash in its place if it looks like a token, a path, a URL or an address.

    Example:
        >>> public_name("bert.encoder.layer.0"), public_name("recall@10"), public_name("org/name")
        ('bert.encoder.layer.0', 'recall@10', 'org/name')
        >>> public_name("/home/ada/secret project")
        'private-2122db86'
    """
    for key in _OWN_KEYS:
        if found := key.fullmatch(name):
            return found[1] + _public(found[2]) + found[3]
    return _public(name)


def _public(name: str) -> str:
    if not _is_private(name):
        return name
    return f"private-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"


def _is_private(name: str) -> bool:
    if any(pattern.search(name) for pattern in (_TOKEN, _ADDRESS, _PATH, _HEX)):
        return True
    if any(_change(piece) >= _LARGEST_CHANGE for piece in _PIECE.findall(name)):
        return True
    return any(secret in name for secret in _environment())


def _change(word: str) -> float:
    """Return the share of neighbours of another kind; a capital before a small letter begins a word."""
    kinds = ["0" if char.isdigit() else "A" if char.isupper() else "a" for char in word]
    return sum(a != b and (a, b) != ("A", "a") for a, b in pairwise(kinds)) / (len(word) - 1)


def _environment() -> Iterator[str]:
    """Yield the values of environment variables that are named like a secret."""
    for name, value in os.environ.items():
        if _SECRET_VARIABLE.search(name) and len(value) >= _MIN_SECRET:
            yield value
