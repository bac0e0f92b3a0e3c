# SPDX-License-Identifier: Apache-2.0
"""Find words in code and documents for which the field, or plain English, has better ones. `make quality` runs it.

    python benchmarks/prose.py [ROOT]

reads docstrings, comments, messages, templates and documents, prints `file:line: words → suggestion`, and exits with 1
if there is anything to print.
"""

from __future__ import annotations

import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path


SUGGESTIONS = {
    r"anew|afresh": "again",
    r"told": "distinguished, reported, documented",
    r"tells? \w+ (?:apart|from)|tells?(?= (?:the|its|their|of))": "states, reports, distinguishes",
    r"beside": "next to, in addition to, relative to",
    r"(?:is|are|be|been|was|were) had|had (?:by|from|exactly|only|without|where|for)": "computed, available",
    r"go(?:es|ing|ne)? on|went on": "continue",
    r"(?<!there\s)(?:is|are|was|were) no (?!longer|more|less|further|later|earlier)": "is not a",
    r"dear(?:er|est)?": "expensive",
    r"is no end|no end of": "not fatal, many",
    r"what (?:\w+ )?makes? of|makes? of (?:it|them)": "name the operation",
    r"mend(?:s|ed|ing)?": "fix",
    r"under way": "in progress, current",
    r"dealt|undealt": "distributed",
    r"of use": "useful, needed",
    r"stands? (?:in|below|above|there|for itself)": "is",
    r"(?:whoever|whence|thence|therein|thereof|whereby|lest|aught|naught|amiss|astray)": "say it in plain words",
    r"h[eo]ld(?:s|ing)? against": "compare with",
    r"shall|ought": "must, should",
    r"but for|save for": "except for",
    r"to multiply": "engine, product",
    r"found out": "detected",
    r"sooner": "earlier, faster",
    r"illness(?:es)?|ills": "fault",
    r"the numbers? that|what it holds|what is held": "name what is meant",
}
"""Regular expressions of what to avoid, and what to write instead."""

ALLOWED: dict[str, tuple[str, ...]] = {
    "hf_optimizability/dynamics/stability.py": ("tell spikes from",),  # a note in all reports written so far
}
"""Words that may stay, by file, and why."""

LATER = (
    "README.md",
    "docs/diagnosis.md",
    "docs/prediction.md",
    "docs/published.md",
    "docs/side_by_side.md",
    "docs/prices.md",
)
"""Documents that are yet to be rewritten, or written by a benchmark that is."""

FILES = (
    *("hf_optimizability/**/*.py", "hf_optimizability/**/*.jinja", "recipes/*.py", "benchmarks/*.py", "docs/*.py"),
    *("*.md", "docs/*.md", "docs/how_to/*.md", "docs/quantities/*.md", "docs/reference/*.md"),
)
NO_PROSE = {
    ".py": r"`[^`\n]+`|\{[^{}]*\}|(?m:^ *(?:>>>|\.\.\.) .*$)",
    ".jinja": r"(?s:\{\{.*?\}\}|\{%.*?%\})|<[^>]+>",
    ".md": r"(?ms:^ *```.*?```)|`[^`]+`|\]\([^)]*\)|(?s:\n## \[\d.*)",  # the last: released versions of the changelog
}
QUOTES = re.compile(r"^[a-zA-Z]*(?:\"\"\"|'''|\"|')|(?:\"\"\"|'''|\"|')$|^#")
WORDS = {
    re.compile(rf"\b(?:{pattern})\b".replace(" ", r"\s+"), re.IGNORECASE): better
    for pattern, better in SUGGESTIONS.items()
}


def prose(path: Path) -> str:
    """Return a file's text with all that is not prose blanked out, so that positions stay."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = comments_and_strings(text)
    return re.sub(NO_PROSE[path.suffix], lambda code: re.sub(r"\S", "\0", code[0]), text)


def comments_and_strings(source: str) -> str:
    """Blank out Python code, the marks of comments, and quotes."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    text = list(re.sub(r"\S", "\0", source))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        if kind == "COMMENT" or kind.startswith("FSTRING") or (kind == "STRING" and re.search(r"\s", token.string)):
            start, end = (starts[line - 1] + column for line, column in (token.start, token.end))
            text[start:end] = QUOTES.sub(lambda mark: " " * len(mark[0]), source[start:end])
    return "".join(text)


def findings(root: Path) -> Iterator[str]:
    """Yield what to rewrite, file by file."""
    for path in sorted({path for pattern in FILES for path in root.glob(pattern)}):
        name = path.relative_to(root).as_posix()
        if name in LATER or name == "benchmarks/prose.py":
            continue
        text = prose(path)
        for pattern, better in WORDS.items():
            for match in pattern.finditer(text):
                words = " ".join(match[0].split())
                if words not in ALLOWED.get(name, ()):
                    yield f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {words} → {better}"


if __name__ == "__main__":
    found = list(findings(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parents[1]))
    for line in found:
        print(line)
    sys.exit(bool(found))
