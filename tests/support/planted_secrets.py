# SPDX-License-Identifier: Apache-2.0
"""Random secrets, for hypothesis, and where they could be read in files."""

from __future__ import annotations

import base64
import html
import json
import random
import re
import string
import zlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

from hypothesis import strategies as st


LETTERS, DIGITS = string.ascii_letters, string.digits


class Secret(NamedTuple):
    """A text that no one but its owner should read.

    Attributes:
        kind: What it looks like.
        text: The whole.
        parts: What gives it away.
    """

    kind: str
    text: str
    parts: tuple[str, ...]


class _Draw:
    def __init__(self, source: random.Random):
        self.source = source

    def __call__(self, alphabet: str, least: int, most: int | None = None) -> str:
        length = self.source.randint(least, most or least)
        return "".join(self.source.choice(alphabet) for _ in range(length))

    def word(self) -> str:
        """What is found in no file by chance."""
        return "q" + self(string.ascii_lowercase, 11)


def _token(d: _Draw) -> tuple[str, ...]:
    core = d(LETTERS + DIGITS, 34, 40)
    shape = d.source.choice([
        "hf_{}", "api_org_{}", "hf_oauth_{}", "hf_jwt_{}", "sk-{}", "sk-proj-{}", "sk-ant-{}", "pk_{}", "ghp_{}",
        "gho_{}", "github_pat_{}", "glpat-{}", "AKIA{}", "ASIA{}", "AIza{}", "ya29.{}", "xoxb-{}", "xoxp-{}", "npm_{}",
        "pypi-{}", "dop_v1_{}", "SG.{}", "Bearer {}", "Basic {}", "-----BEGIN RSA PRIVATE KEY-----\n{}\n-----END",
    ])  # fmt: skip
    if shape.startswith(("AKIA", "ASIA")):
        core = core.upper()[:16]
    return shape.format(core), core


def _assignment(d: _Draw) -> tuple[str, ...]:
    core = d.word()
    name = d.source.choice(
        ["password", "passwd", "token", "api_key", "secret", "hub_token", "SIGNATURE", "credential"]
    )
    return f"{name}{d.source.choice(['=', ': ', ' = '])}{core}", core


def _url(d: _Draw) -> tuple[str, ...]:
    user, key, host = d.word(), d.word(), d.word()
    scheme = d.source.choice(["https", "http", "ftp", "postgresql", "s3", "hdfs", "ssh", "redis"])
    return f"{scheme}://{user}:{key}@{host}.example.org/x?sig={d.word()}", user, key, host


def _absolute(d: _Draw) -> tuple[str, ...]:
    root, *words = d.source.choice(["/mnt", "/home", "/srv", "/Users", "/"]), d.word(), d.word()
    joined = d.source.choice(["/", " ", "-"]).join(words)
    return f"{root.rstrip('/')}/{joined}/x.{d.source.choice(['csv', 'bin', 'unknown'])}", *words


def _home(d: _Draw) -> tuple[str, ...]:
    word = d.word()
    return d.source.choice(["~/{}", "~{}/x", "~/x/{}", "/home/{}", "/root/{}/x"]).format(word), word


def _relative(d: _Draw) -> tuple[str, ...]:
    word = d.word()
    return d.source.choice(["../{}", "./{}", "../../{}/x.csv", "a/{}/b", "{}/x.jsonl", "data/{}.parquet"]).format(
        word
    ), word


def _windows(d: _Draw) -> tuple[str, ...]:
    word = d.word()
    shape = d.source.choice([r"C:\Users\{}", r"D:\{} x\y", r"C:/{}/x", r"\\server\{}", r"a\{}\x.csv"])
    return shape.format(word), word


def _address(d: _Draw) -> tuple[str, ...]:
    user, host = d.word(), d.word()
    return f"{user}@{host}.{d.source.choice(['com', 'example.org', 'museum'])}", user, host


def _random(d: _Draw) -> tuple[str, ...]:
    alphabet = d.source.choice([
        LETTERS + DIGITS, LETTERS + DIGITS + "-_", string.ascii_lowercase + DIGITS, string.ascii_uppercase + DIGITS,
        "0123456789abcdef",
    ])  # fmt: skip
    text = d(alphabet, 36, 48)
    return text, text


def _sentence(d: _Draw) -> tuple[str, ...]:
    word = d.word()
    return d.source.choice([
        "could not convert string to float: '{} Smith, 41, HIV positive'", "row {} of the training set says: hello",
        "CUDA error on host {}", "naïve {} – «ok»", "{}", "<script>{}</script>", "**{}** | `x`",
    ]).format(word), word  # fmt: skip


LOOK_LIKE_SECRETS: dict[str, Callable[[_Draw], tuple[str, ...]]] = {
    "token": _token,
    "assignment": _assignment,
    "URL": _url,
    "absolute path": _absolute,
    "home": _home,
    "relative path": _relative,
    "Windows path": _windows,
    "address": _address,
    "random": _random,
}
ANYTHING = {**LOOK_LIKE_SECRETS, "sentence": _sentence}
"""What free text may hold, which is anything."""


@st.composite
def secrets(draw: st.DrawFn, kinds: dict[str, Callable[[_Draw], tuple[str, ...]]]) -> Secret:
    kind = draw(st.sampled_from(sorted(kinds)))
    text, *parts = kinds[kind](_Draw(random.Random(draw(st.integers(0, 2**32)))))
    return Secret(kind, text, tuple(parts))


def readable(content: bytes) -> str:
    """Everything that can be read in a file: as it is, with its escapes undone, and what a picture packs."""
    text = content.decode(errors="replace")
    views = [text, html.unescape(text), re.sub(r"\\([^\w\s])", r"\1", text)]
    if text.startswith("{"):
        views += _strings([json.loads(line) for line in ([text] if "\n }" in text else text.splitlines())])
    if content.startswith(b"\x89PNG"):
        views += [part.decode(errors="replace") for part in _unpacked(content)]
    for packed in re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", text):
        views += [part.decode(errors="replace") for part in _unpacked(base64.b64decode(packed))]
    return "\n".join(views)


def _strings(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for key, item in value.items() for text in (key, *_strings(item))]
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []


def _unpacked(png: bytes) -> list[bytes]:
    """The chunks of a PNG that hold text, unpacked."""
    found, at = [], 8
    while at + 8 <= len(png):
        size = int.from_bytes(png[at : at + 4], "big")
        kind, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + size]
        if kind in (b"tEXt", b"iTXt", b"eXIf"):
            found.append(data)
        elif kind == b"zTXt":
            found.append(zlib.decompress(data.partition(b"\0")[2][1:]))
        at += 12 + size
    return found


def leaks(files: dict[str, bytes], planted: Iterable[tuple[str, Secret]]) -> list[str]:
    """Where which secret can be read."""
    texts = {name: readable(content) for name, content in files.items()}
    return [
        f"{name}: {secret.kind} from {place}: {secret.text!r}"
        for place, secret in planted
        for name, text in texts.items()
        if any(part in text for part in secret.parts)
    ]
