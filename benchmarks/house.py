# SPDX-License-Identifier: Apache-2.0
"""Count what makes this code hard to read, at an earlier commit and in the working tree.

    python benchmarks/house.py BASE [--sample N --seed S]

writes benchmarks/results/house.md. With `--sample`, print names and docstrings drawn at random instead.
"""

from __future__ import annotations

import argparse
import ast
import io
import random
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rooms import ROOT, Module, cycles, imported, modules, read_order


RESULTS = ROOT / "benchmarks/results/house.md"
QUANTITY = "noise_scale"
START: Module = ("measurement", "measure")

FORMER_ROOMS = {
    "distributed": "parallel fsdp supported",
    "measurement": "measure engines by_task forecast stages memory mean_check slope_check found_eigenvalues",
    "model_state": "safety snapshot snapshot_tensors float32_precision plain_forward plain_layers",
    "objective": "objective batches probe task_split blocks padding_rows data_state self_check",
    "publishing": "hub model_card",
    "training": "trainer callback schedule clock history trainer_loss loss_scale unfused_losses generalization "
    "provenance stopping",
    "config": "configuration",
    "redaction": "privacy",
    "curvature": "gradients",
}
"""Which room the modules at the top level went to."""

IMPERATIVES = set(
    """
    accept accumulate activate add adjust align all-gather all-reduce allocate append apply approximate arrange
    assemble assert assign attach average back-date backpropagate balance bin bind block borrow bound broadcast build
    cache calculate call cancel cap cast catch center change check choose clamp classify clean clear clip clone close
    collect combine compare compile complete compose compress compute concatenate configure connect continue convert
    copy correct count create cross-validate cut decide declare decode decompose define deflate delete derive describe
    detach detect determine differentiate disable discard display distribute divide draw drop emit empty enable encode
    end enforce ensure enter escape estimate evaluate exchange exclude execute exit expand export extend extract feed
    fetch fill filter find fine-tune finish fit flag flatten fold follow forbid force forecast format forward free
    freeze gather generate get give group grow guard halve handle have hide hold identify ignore import improve include
    increase infer inform initialize insert install integrate interleave interpolate invert iterate join judge keep
    label launch lay leave let limit link list load locate lock log look lower make map mark mask match materialize
    measure merge mirror mock move multiply name narrow normalize note open orthonormalize override overwrite pad parse
    pass patch permute pick pin place plan plot pop postpone prefer prefix prepare preserve prevent print produce
    profile project propagate provide prune publish push put quote raise randomize rank read rebuild receive record
    recover redact reduce refuse register reject release reload remove rename render renumber reorder repeat replace
    replay report represent reproduce request require rescale reset reshape reshard resolve restart restore restrict
    resume retry return reverse rewrite roll rotate round run sample save say scale scan schedule score search seed
    select send separate serialize set shade shard share shift show shrink shuffle shut sign simulate skip solve sort
    spend split stack stand start step stop store stream strip subtract suggest sum summarize suppress swap switch
    synchronize take tell time tokenize track train transform translate traverse trim truncate try turn undo unfreeze
    unpack unset update upload use validate verify visit wait walk warn watch wind wrap write yield zero
    """.split()  # noqa: SIM905
)
"""Verbs that open docstrings."""


def functions(package: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the package's functions and methods."""
    for path in modules(package).values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node


def openings(package: Path) -> list[str]:
    """Return the first lines of all docstrings of functions and methods, properties aside."""
    documented = (
        node for node in functions(package) if not any("property" in ast.unparse(mark) for mark in node.decorator_list)
    )
    return [text.splitlines()[0] for node in documented if (text := ast.get_docstring(node))]


def imperative(opening: str) -> bool:
    """Return whether a docstring begins with a verb in the imperative."""
    return re.split(r"[^\w-]", opening.lower())[0] in IMPERATIVES


def room(module: Module) -> str:
    """Return the room of a module, or the one it went to."""
    former = (name for name, members in FORMER_ROOMS.items() if module[0] in members.split())
    return module[0] if len(module) > 1 else next(former, module[0])


def model_calls(package: Path) -> list[tuple[str, bool]]:
    """Return the calls on the path of `measure` that pass `model` to another room, and whether that room is higher.

    They are the calls, in modules that the one with `measure` imports directly or through others, of a name imported
    from another room, with an argument `model` or `….model`.
    """
    graph, files = imported(package), modules(package)
    height = {name: -level for level, names in enumerate(read_order()) for name in names}
    reached, todo = set[Module](), [START if START in files else START[1:]]
    while todo:
        reached.add(module := todo.pop())
        todo += graph[module] - reached - {("__init__",)}
    calls = []
    for module in sorted(reached):
        tree = ast.parse(files[module].read_text(encoding="utf-8"))
        origin = {
            alias.asname or alias.name: target
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
            for target in graph[module]
            if target[-1] in (alias.name, (node.module or "").split(".")[-1])
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and any(
                map(_is_model, [*node.args, *(word.value for word in node.keywords)])
            ):
                target = origin.get(ast.unparse(node.func).split(".")[0])
                if target and room(target) != room(module):
                    higher = height.get(room(target), 0) > height.get(room(module), 0)
                    calls.append((f"{'.'.join(module)}:{node.lineno} {ast.unparse(node.func)}", higher))
    return calls


def _is_model(argument: ast.expr) -> bool:
    return ast.unparse(argument).split(".")[-1] == "model"


def naming(package: Path, quantity: str) -> list[str]:
    """Return the files of the package that name a quantity."""
    texts = (path for path in package.rglob("*") if path.suffix in (".py", ".jinja", ".json", ".js"))
    named = (path for path in texts if re.search(rf"\b{quantity}\b", path.read_text(encoding="utf-8")))
    return sorted(path.relative_to(package).as_posix() for path in named)


def dialect(root: Path) -> list[str]:
    """Return what this tree's prose check finds in another."""
    command = [sys.executable, str(ROOT / "benchmarks/prose.py"), str(root)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()


def numbers(root: Path) -> dict[str, str]:
    """Return what is counted, in the order of the table."""
    package = root / "hf_optimizability"
    graph = {
        module: targets - {("__init__",)} for module, targets in imported(package).items() if module != ("__init__",)
    }
    calls, texts = model_calls(package), openings(package)
    links = [(module, target) for module, targets in graph.items() for target in targets]
    return {
        "modules at the top level": str(sum(len(module) == 1 for module in graph) - (("__main__",) in graph)),
        "imports of one module by another": str(len(links)),
        "of these, between rooms": str(sum(room(module) != room(target) for module, target in links)),
        "pairs of rooms that import each other's modules": str(
            len({(room(module), room(target)) for module, target in links} - {(room(m), room(m)) for m in graph})
        ),
        "import cycles": str(len(cycles(graph))),
        "calls that pass `model` to another room": str(len(calls)),
        "of these, to a room higher up": str(sum(higher for _, higher in calls)),
        f"files that name `{QUANTITY}`": str(len(naming(package, QUANTITY))),
        "docstrings of functions in the imperative": f"{sum(map(imperative, texts)) / len(texts):.1%} of {len(texts)}",
        "words that the prose check finds": str(len(dialect(root))),
    }


def sample(root: Path, count: int, seed: int) -> list[str]:
    """Draw names of functions and classes, and openings of docstrings."""
    package, generator = root / "hf_optimizability", random.Random(seed)
    names = sorted({node.name for node in functions(package) if not node.name.startswith("__")})
    draws = [(names, "names"), (sorted(set(openings(package))), "docstrings")]
    return [f"**{title}**: " + "; ".join(generator.sample(texts, count)) for texts, title in draws]


def write_table(base: str, before: dict[str, str], now: dict[str, str], left: list[str]) -> None:
    """Write both columns, and below them the words that are left."""
    rows = [f"| {title} | {before[title]} | {now[title]} |" for title in before]
    table = ["# The house in numbers", "", f"`python benchmarks/house.py {base}` wrote this page.", ""]
    table += [f"| | {base[:8]} | now |", "|:--|--:|--:|", *rows, "", *(f"- {line}" for line in left)]
    RESULTS.write_text("\n".join(table).rstrip() + "\n", encoding="utf-8")
    print("\n".join(table))


def main() -> None:
    """Count, or draw samples."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", help="the commit to compare with")
    parser.add_argument("--sample", type=int, metavar="N", help="print N names and N docstrings of each tree instead")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    archive = subprocess.run(["git", "archive", options.base], cwd=ROOT, capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        if options.sample:
            for title, root in (("Before", Path(folder)), ("Now", ROOT)):
                print(f"{title}\n\n" + "\n\n".join(sample(root, options.sample, options.seed)) + "\n")
        else:
            write_table(options.base, numbers(Path(folder)), numbers(ROOT), dialect(ROOT))


if __name__ == "__main__":
    main()
