# SPDX-License-Identifier: Apache-2.0
"""Secrets in texts for the log, and names that look like a secret and are not published."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

from .log_keys import PREFIX as _PREFIX


_SECRET_VARIABLE = re.compile(
    r"(?:TOKEN|KEY|KEY_ID|SECRET|PASS|PASSWORD|PASSWD|PASSPHRASE|PAT|CREDENTIALS?|AUTH|_PWD)$|^DATABASE_URL$|^PGPASSWORD$",
    re.IGNORECASE,
)
_MIN_SECRET = 12
"""Shorter values of variables such as `SORT_KEY` are hardly secrets, and may be words."""

_TOKEN = re.compile(
    r"""
    (?<![A-Za-z0-9])(?:
        (?:hf|api_org)_[A-Za-z0-9]{20,} | hf_(?:oauth|jwt)_[\w.-]{15,}  # Hugging Face
      | sk-(?:[a-z]+-){0,4}[A-Za-z0-9_]{20,} | pk_\w{16,}               # OpenAI, Anthropic, Stripe
      | gh[pousr]_[A-Za-z0-9]{16,} | github_pat_\w{16,} | glpat-[\w-]{16,}
      | A(?:KI|SI)A[A-Z0-9]{12,} | AIza[\w-]{20,} | ya29\.[\w-]{10,}  # Amazon, Google
      | xox[abeoprs]-[\w-]{10,} | npm_[A-Za-z0-9]{16,} | pypi-[\w-]{16,} | dop_v1_\w{16,} | SG\.[\w-]{10,}
      | eyJ[\w-]{8,}\.[\w.-]+                                       # JSON Web Token
    )
    | -----BEGIN[ ][A-Z ]+-----.*                                    # a private key
    | \b(?:Bearer|Basic)\s+[\w.~+/=-]{6,}
    | (?:pass(?:word|wd|phrase)?|secret|token|api[_-]?key|credentials?|sig(?:nature)?)\s*[=:]\s*(?!…)\S+
    """,
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
_CREDENTIALS = re.compile(r"(?<=://)[^\s/@]+@")
_HOME = re.compile(r"(?<![\w.])(?:/home/|/Users/|\b[A-Za-z]:\\+Users\\+)[^\s/\\'\"`:,;()<>]+|(?<![\w.])/root\b")

_ADDRESS = re.compile(
    r"(?<![A-Za-z0-9+.-])[0-9+.-]*[A-Za-z][A-Za-z0-9+.-]*://|[^\s@]@[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}|[^\s@]@[\w.-]+:"
)
"""URLs, e-mail addresses, and user@host:place. Metrics such as `recall@10` are none of them."""

_EXTENSION = (
    "csv|tsv|jsonl?|txt|parquet|arrow|pt|pth|bin|ckpt|safetensors|gguf|onnx|npy|npz|pkl|zip|gz|tgz|bz2|xz|zst|tar|h5|py"
    "|sh|ipynb|ya?ml|toml|ini|env|md|html?|pdf|docx?|xlsx?|log|db|sqlite|pem|key|png|jpe?g|wav|flac|mp[34]"
)
_PATH = re.compile(
    rf"""
    (?<![A-Za-z0-9])(?:~|\.{{1,2}}(?=[/\\]))[^\s/\\]*[/\\]             # ~/x, ~user/x, ./x, ../x
    | (?:^|[\s=:,;'"(\[<])/[^\s/]*/                                 # /x/
    | // | ^~ | (?:^|[._])/ | (?<![A-Za-z0-9])[A-Za-z]:[\\/] | \\\\\w | \w\\+\w    # C:\\x, \\\\server, x\\y
    | [^/]+/[^/]+/ | /[^/]*\.(?:{_EXTENSION})(?![A-Za-z0-9])          # x/y/z, x/y.csv
    """,
    re.VERBOSE | re.IGNORECASE,
)
_LONGEST_NAME = 1000
"""Anything longer is not a name. The patterns take time that grows with the square of the length."""

_OWN_KEYS = (
    re.compile(rf"({_PREFIX}task/)(.+)(/[a-z_]+)", re.DOTALL),
    re.compile(rf"({_PREFIX}(?:train_grad_norm/)?)(.+)()", re.DOTALL),
)
"""Keys of our own in the log, which hold a name: before it, the name, after it."""
_PAIR_KEY = re.compile(rf"({_PREFIX}task_cosine/)([^/]+)/([^/]+)")
"""Those that hold two names."""

_HEX = re.compile(r"[0-9a-f]{32,}", re.IGNORECASE)
_SHORTEST_TOKEN = 20
_PIECE = re.compile(rf"[A-Za-z0-9+/=_-]{{{_SHORTEST_TOKEN},}}")
_SEPARATOR = re.compile(r"[/_-]")
_RUN = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_MOST_RUNS = 0.25
"""Runs of letters or digits beyond the first in each of several short words, by character, above which they are taken
for a token with separators in it. Of 12,000 names in torch and Transformers none has more; of URL-safe random tokens
99.8 % with 24 characters and all but one in 5,000 with 40, by both rules."""
_USUAL = (
    "abcdgilmnprst", "baeil", "caehklot", "daeios", "eacdefglmnprstvx", "filo", "gaer", "haeio", "iacdeglmnopstvz",
    "ke", "laeilotu", "maeimopu", "nacdegiostv", "ocdlmnoprstuw", "paelort", "qu", "radeimost", "sacehiopstu",
    "taehiorstu", "ualmnprst", "vaei", "ze",
)  # fmt: skip
_USUAL_PAIRS = frozenset(group[0] + second for group in _USUAL for second in group[1:])
"""The 150 most frequent pairs of letters in names of classes, modules and checkpoints."""
_FEWEST_USUAL = 0.4
"""Share of usual pairs below which a long word is taken for a token. Of 7,300 names in torch, Transformers, PEFT and
TRL 10 have fewer; of random tokens 99.7 % with 20 characters and all with 32, of small letters alone 94 and 97 %."""


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


def public_word(text: str) -> str:
    """Return one word as it is, as `public_name` does; a hash in place of more than one, which may be a sentence.

    Example:
        >>> public_word("gauss-newton + hutchinson"), public_word("could not convert: Ada")
        ('gauss-newton + hutchinson', 'private-fb8c1586')
    """
    return _hashed(text) if len(text.replace(" + ", "+").split()) > 1 else public_name(text)


def public_name(name: str) -> str:
    """Return a name as it is; a hash in its place if it looks like a token, a path, a URL or an address.

    Example:
        >>> public_name("bert.encoder.layer.0"), public_name("recall@10"), public_name("org/name")
        ('bert.encoder.layer.0', 'recall@10', 'org/name')
        >>> public_name("/home/ada/secret project")
        'private-2122db86'
    """
    if pair := _PAIR_KEY.fullmatch(name):
        return f"{pair[1]}{_public(pair[2])}/{_public(pair[3])}"
    for key in _OWN_KEYS:
        if found := key.fullmatch(name):
            return found[1] + _public(found[2]) + found[3]
    return _public(name)


def _public(name: str) -> str:
    if not _is_private(name):
        return name
    return _hashed(name)


def _hashed(text: str) -> str:
    return f"private-{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:8]}"


def _is_private(name: str) -> bool:
    if len(name) > _LONGEST_NAME or any(pattern.search(name) for pattern in (_TOKEN, _ADDRESS, _PATH, _HEX)):
        return True
    pieces = [part for piece in _PIECE.findall(name) for part in (piece, *_SEPARATOR.split(piece))]
    if any(_usual_share(piece) < _FEWEST_USUAL for piece in pieces if len(piece) >= _SHORTEST_TOKEN):
        return True
    return any(secret in name for secret in _environment())


def _usual_share(piece: str) -> float:
    """Return the share of usual pairs of letters; for short words that are joined, 1 unless they are jumbled."""
    words = _SEPARATOR.split(piece)
    if (len(words) - 1) * 8 > len(piece):
        inside = sum(max(len(_RUN.findall(word)) - 1, 0) for word in words)
        return 1.0 if inside <= _MOST_RUNS * len(piece) else 0.0
    pairs = [(a, b) for word in words for a, b in pairwise(word)]
    usual = [(a + b).lower() in _USUAL_PAIRS and not (a.islower() and b.isupper()) for a, b in pairs]
    return sum(usual) / len(pairs)


def _environment() -> Iterator[str]:
    """Yield the values of environment variables that are named like a secret."""
    for name in os.environ:
        if _is_secret_variable(name) and len(value := os.environ.get(name, "")) >= _MIN_SECRET:
            yield value


@cache
def _is_secret_variable(name: str) -> bool:
    """Return whether a variable holds a secret, by its name; cached, as every name of a report asks for all."""
    return _SECRET_VARIABLE.search(name) is not None
