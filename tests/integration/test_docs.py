# SPDX-License-Identifier: Apache-2.0
"""The documents: snippets run and print what stands below them, commands are understood, links lead somewhere."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from markdown_it import MarkdownIt
from transformers import HfArgumentParser, MobileNetV2Model, PreTrainedModel, ResNetModel, TrainingArguments
from typer.testing import CliRunner

from hf_optimizability import OptimizabilityConfig, cli
from hf_optimizability.comparing.arguments import ComparisonArguments
from hf_optimizability.comparing.candidates import parse_candidates
from hf_optimizability.report import figures as plots
from hf_optimizability.tasks.fine_tuning import TASKS, parse_arguments
from tests.support.example_report import make_report
from tests.support.processes import PROCESSES


ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "model_cards/*.md", "benchmarks/results/*.md", "recipes/**/*.md")
    for path in ROOT.glob(pattern)
)
AGAINST_A_HUB = ["docs/publish.md", "model_cards/README.md"]
"""Documents whose snippets tests/publishing/test_documents.py runs."""

WRITTEN = {"README.md": "out/readme/optimizability/report.md", "docs/compare.md": "out/comparison/comparison.html"}
"""A file that the snippets of a document write."""

QUANTITY = ["Formula", "How to read it", "What it does not say", "Cost", "How to get it", "Source"]

SMALL: dict[str, tuple[type[PreTrainedModel], dict[str, Any]]] = {
    "README.md": (ResNetModel, {"embedding_size": 4, "hidden_sizes": [4], "depths": [1], "layer_type": "basic"}),
    "docs/compare.md": (MobileNetV2Model, {"depth_multiplier": 0.1, "min_depth": 4}),
}
"""Documents whose snippets load the carried checkpoint, and what is quick in its place."""

SLOW = {
    "docs/how_to/batch_size.md",  # two measurements of 32 batches; docs/quantities/noise_scale.md has one
    "docs/how_to/learning_rate.md",  # three trainings with the callback; README.md has one
    "docs/how_to/what_to_freeze.md",  # two measurements by block of the carried MobileNetV2, as README.md
}
"""Documents whose snippets take longest; what they call is called by those of another document."""


class Block(NamedTuple):
    """A fenced block: its language, what is in it, and the line of the document before it."""

    language: str
    text: str
    line: int


def tokens(document: Path) -> list[Any]:
    return MarkdownIt().enable("table").parse(document.read_text(encoding="utf-8"))


def blocks(document: Path, *languages: str) -> list[Block]:
    if not any(f"```{language}\n" in document.read_text(encoding="utf-8") for language in languages):
        return []  # parsing all pages takes a second
    fences = [token for token in tokens(document) if token.type == "fence"]
    found = [Block(fence.info, fence.content, fence.map[0] + 1) for fence in fences]
    return [block for block in found if block.language in languages]


def snippets(document: Path) -> Iterator[tuple[Block, str | None]]:
    """Each Python block, and what it shall print: the text block that follows it with nothing in between."""
    both = blocks(document, "python", "text")
    for block, after in pairwise([*both, None]):
        if block.language == "python":
            end = block.line + block.text.count("\n") + 1
            follows = after is not None and after.language == "text" and after.line == end + 2
            yield block, after.text if follows else None


def named(documents: Sequence[Path], *, slow: Collection[str] = ()) -> Any:
    names = [str(path.relative_to(ROOT)) for path in documents]
    marks: dict[str, Any] = dict.fromkeys(slow, pytest.mark.slow)
    params = [
        pytest.param(path, id=name, marks=marks.get(name, ())) for path, name in zip(documents, names, strict=True)
    ]
    return pytest.mark.parametrize("document", params)


def with_a_small_checkpoint(folder: Path, kind: type[PreTrainedModel], options: dict[str, Any]) -> None:
    """Makes the recipes' folder, with few and random weights in place of the carried checkpoint."""
    name = "checkpoints/mobilenet_v2_1.0"
    place, carried = folder / "recipes" / name, ROOT / "recipes" / name
    place.mkdir(parents=True)
    (folder / "recipes" / "data").symlink_to(ROOT / "recipes" / "data")
    (place / "preprocessor_config.json").symlink_to(carried / "preprocessor_config.json")
    kind(kind.config_class(**options)).half().save_pretrained(place)


def run_snippets(document: Path, folder: Path) -> None:
    """Runs them in order, in `folder`; what goes wrong goes into its file `log`."""
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(folder)
    plots.plot_all = lambda report: {}  # takes longer than the runs
    names: dict[str, Any] = {"__name__": "__main__"}
    for block, expected in snippets(document):
        with redirect_stdout(StringIO()) as printed:
            exec(compile("\n" * block.line + block.text, str(document), "exec"), names)
        if expected is not None:
            same = doctest.OutputChecker().check_output(expected, printed.getvalue(), doctest.ELLIPSIS)
            assert same, f"Line {block.line} prints\n{printed.getvalue()}"


@named(
    [path for path in DOCUMENTS if str(path.relative_to(ROOT)) not in AGAINST_A_HUB and [*snippets(path)]], slow=SLOW
)
def test_snippets_run_and_print_what_stands_below_them(document: Path, tmp_path: Path):
    if small := SMALL.get(str(document.relative_to(ROOT))):
        with_a_small_checkpoint(tmp_path, *small)
    run(document, tmp_path)


@pytest.mark.slow
@named([path for path in DOCUMENTS if str(path.relative_to(ROOT)) in SMALL])
def test_snippets_run_on_the_carried_checkpoint(document: Path, tmp_path: Path):
    run(document, tmp_path)


def run(document: Path, tmp_path: Path) -> None:
    """Runs the snippets of a document in a process of their own; they pass, and write what they should."""
    if not (tmp_path / "recipes").exists():
        (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    make_report(2).save_json(tmp_path / "out/demo/vision/optimizability")  # the demo takes minutes
    process = PROCESSES.Process(target=run_snippets, args=(document, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()[-3000:]
    assert (tmp_path / WRITTEN.get(str(document.relative_to(ROOT)), "")).exists()


def test_a_snippet_that_prints_something_else_is_found_out(tmp_path: Path):
    document = tmp_path / "wrong.md"
    document.write_text("```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n")
    process = PROCESSES.Process(target=run_snippets, args=(document, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == 1 and "Line 1 prints\n2" in (tmp_path / "log").read_text()


def commands(document: Path) -> list[list[str]]:
    """The words of each command; in a console, they stand behind a $."""
    found = []
    for block in blocks(document, "bash", "console"):
        for line in block.text.replace("\\\n", "").splitlines():
            if block.language == "bash" or line.startswith("$ "):
                found.append(shlex.split(line.removeprefix("$ "), comments=True))
    return [words for words in found if words]


@named([path for path in DOCUMENTS if commands(path)])
def test_commands_are_understood(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("model_cards", "recipes"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.setattr(cli, "_run", lambda task, args, **options: understand(task, args))
    monkeypatch.setattr(cli, "_measure", lambda task, args, **options: understand(task, args))
    monkeypatch.setattr(cli, "_compare", lambda task, args, **options: understand_candidates(task, args))
    monkeypatch.setattr("hf_optimizability.publishing.hub.push", lambda *args, **options: "https://hub")
    monkeypatch.setattr("hf_optimizability.OptimizabilityReport.save", lambda *args: None)
    for program, *words in commands(document):
        if program == "hf-optimizability":
            if words[0] in ("report", "push"):
                make_report(1).save_json(tmp_path / words[1])
            result = CliRunner().invoke(cli.app, words)
            assert result.exit_code == 0, f"{words}: {result.output}"
        elif program == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
            assert set(words) <= set(targets), words
        elif program == "python":
            assert (ROOT / words[0]).is_file(), words
            if words[0].startswith("recipes/") and "--help" not in words:
                understand_recipe(Path(words[0]).stem, words[1:], monkeypatch)
        else:
            assert program in ("cp", "hf", "mkdir", "pip"), program


class Understood(Exception):  # noqa: N818
    """A recipe has read its flags, and shall go no further."""


def understand_recipe(name: str, args: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe reads the flags itself."""

    def parse(*kinds: Any) -> None:
        parse_arguments(HfArgumentParser(kinds), list(args))
        raise Understood

    recipe = importlib.import_module(name)
    monkeypatch.setattr(recipe, "parse_flags", parse)
    with pytest.raises(Understood):
        recipe.main()


def understand_candidates(task_name: str | None, args: Sequence[str]) -> None:
    """The candidates come first; each has its own flags and those that all share."""
    given = [*takewhile(lambda word: not word.startswith("-"), args)]
    for candidate in parse_candidates(given):
        understand(task_name, [*candidate.flags, *args[len(given) :]], ComparisonArguments)


def understand(task_name: str | None, args: Sequence[str], *further: Any) -> None:
    """Reads the flags as the command and the recipes do; where no task is named, they must fit one."""
    reasons = []
    for task in TASKS:
        if task_name in (None, task.NAME):
            kinds: Any = (task.ModelArguments, task.DataArguments, OptimizabilityConfig, TrainingArguments, *further)
            try:
                parse_arguments(HfArgumentParser(kinds), list(args))
                return
            except (ValueError, SystemExit) as error:
                reasons.append(str(error))
    raise ValueError(f"{args}: {reasons}")


def test_a_flag_that_there_is_not_is_found_out():
    with pytest.raises(ValueError, match="--no_such_flag"):
        understand(None, ["--model_name_or_path=a", "--dataset_name=b", "--output_dir=c", "--no_such_flag=1"])


@named(DOCUMENTS)
def test_links_lead_to_files(document: Path):
    inline = [child for token in tokens(document) for child in token.children or []]
    addresses = [address for child in inline if (address := child.attrs.get("href") or child.attrs.get("src"))]
    for address in addresses:
        path = str(address).partition("#")[0]
        assert re.match(r"https?://|$", path) or (document.parent / path).exists(), address


@named([path for path in DOCUMENTS if path.parent.name == "quantities" and path.name != "index.md"])
def test_every_page_of_a_quantity_tells_the_same_things(document: Path):
    titles = [after.content for token, after in pairwise(tokens(document)) if token.tag == "h2" and token.nesting == 1]
    assert titles == QUANTITY
    assert [*snippets(document)]


@pytest.mark.slow
def test_the_pages_build_without_a_warning_and_need_no_network(tmp_path: Path):
    """Links to headings, and docstrings, are checked by this."""
    pytest.importorskip("sphinx", reason="`make docs` needs Python 3.11")
    site, scratch = tmp_path / "site", tmp_path / "scratch"
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", scratch, "-c", "docs", ".", site],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    pages = list(site.glob("**/*.html"))
    assert site / "docs/reference/measuring.html" in pages
    for page in pages:
        loaded = re.findall(r"<(?:img|link|script|iframe)\b[^>]*(?:src|href)=\"([^\"]*)\"", page.read_text())
        assert not [address for address in loaded if "//" in address], page
