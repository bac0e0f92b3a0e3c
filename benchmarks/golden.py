# SPDX-License-Identifier: Apache-2.0
"""Whether a commit and the working tree give the same results, to the last bit: `make golden BASE=<commit>`.

    python benchmarks/golden.py main --only lora,fsdp2

runs the cases of `golden_cases.py` in both trees, and compares their reports field by field. What the commit gave is
kept in `out/golden/<commit>`. Ends with 1 if a field differs or is missing, or a case failed in either tree.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple


ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "out" / "golden"
SCRIPTS = [ROOT / "benchmarks" / name for name in ("golden_cases.py", "golden_models.py")]

# A path is the keys from the report's root to a value, joined by dots; dots in a key become colons, list items are
# numbered. In a pattern `*` stands for one key or a part of it, `**` for any number of keys; what lies below the path
# is meant as well. EXCLUDED and CHANGED take the names of either tree.

EXCLUDED: dict[str, str] = {
    "**created": "a date",
    "**versions": "versions",
    "**schema_version": "a version",
    "**seconds": "times: of a measurement, of training, of prediction",
    "**.seconds_per_hvp": "a time",
    "**.overhead": "a share of the training time",
    "**.*_runtime": "a time in the Trainer's log",
    "**.*_per_second": "a speed in the Trainer's log",
    "forecast.*memory": "sizes in memory",
}
"""What is not compared, and why."""

RENAMED: dict[str, str] = {
    "**measurements.*.along_gradient": "**measurements.*.quadratic_model",
    "**measurements.*.step_size": "**measurements.*.optimizer_stability",
    "**measurements.*.several": "**measurements.*.multitask",
    "**measurements.*.engine_error": "**measurements.*.central_difference_error",
    "**measurements.*.left_out": "**measurements.*.unused_embedding_parameters",
    "**measurements.*.items": "**measurements.*.num_items",
    "**multitask.tasks.*.items": "**multitask.tasks.*.num_items",
    "**multitask.tasks.*.along_gradient": "**multitask.tasks.*.curvature_along_gradient",
    "**eigenvalue_checks.*.end": "**eigenvalue_checks.*.which",
}
"""Names in the working tree of fields of the commit, applied in this order; each `*` keeps what it stands for."""

_ONE_GAP = "one train/eval gap and standard error: trainings of a comparison without measurements had another"
CHANGED: dict[str, str] = {
    "entries.*.runs.1.report.dynamics.generalization_gap": _ONE_GAP,
    "entries.*.runs.1.report.log_history.*.optimizability/*_loss*": _ONE_GAP,
    "**.self_check.repeat_error": "added: what rounding leaves between two passes of a batch",
    "**.self_check.count*": "added: by which values examples are counted, where their lengths differ",
    "**config.pool_examples": "added: an option",
    "**config.batch_sharpness": "added: an option",
    "**measurements.*.batch_sharpness": "added: measured on request alone",
    "**measurements.*.batch_sharpness_failure": "added: why there is none, where it was asked for",
    "**measurements.*.optimizer_stability.peak_learning_rate": "added: of the schedule",
    "setting.settings.*": "of flags, those in one table are recorded alone",
    "**.population": "added: the training set that examples were drawn from",
    "**measurements.*.fallback": "a reason by code, in place of a text",
    "**eigenvalue_checks.*.reason": "a reason by code, in place of a text",
    "**failures.*.why": "a reason by code, in place of a text",
    "**failures.*.reason": "reworded: a text",
    "**failures.*.remedy": "reworded: a text",
    "**findings.*.advice": "reworded: a text",
    "**findings.*.evidence": "reworded: intervals in place of ±; their numbers are compared elsewhere",
    "**findings.*.source": "reworded: a text",
    "**verdict": "added: the conclusion in a sentence",
    "**rules": "added: the status of each rule",
    "**model.classes": "added: what the loss of a guess follows from",
    "**data.majority_share": "added: what the accuracy of a guess follows from",
}
"""Fields that may differ or be missing, and why they must."""

_START = "fewer than 100 parameters: Lanczos starts from normal numbers, as random signs may miss an eigenvector"
_SPECTRUM = dict.fromkeys(
    (
        "**measurements.*.hessian",
        "**measurements.*.hvps",
        "**measurements.*.eigenvalue_checks",
        "**measurements.*.central_difference_error",
        "**measurements.*.blocks.*.trace",
        "**measurements.*.multitask.tasks.*.lambda_max",
        "**measurements.*.optimizer_stability.sharpness",
        "**log_history.*.optimizability/h*",
        "**log_history.*.optimizability/sharpness",
        "**log_history.*.optimizability/task/*/hessian*",
        "**findings",
    ),
    _START,
)
CHANGED_IN: dict[str, dict[str, str]] = dict.fromkeys(
    ("regression", "exact_trace", "fallback", "two_tasks", "trainer_tasks", "lora"), _SPECTRUM
)
CHANGED_IN["central_difference"] = dict.fromkeys(
    ("**measurements.*.hessian", "**measurements.*.blocks.*.trace"),
    "the error of central differences is part of that of traces and eigenvalues",
)
"""The same of some cases alone."""

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_CBWR": "COMPATIBLE",  # the same sums wherever in memory a matrix lies
    "PYTHONHASHSEED": "0",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class Difference(NamedTuple):
    """A field that is not the same in both trees; `None` where it is missing."""

    path: str
    base: str | None
    new: str | None


class Outcome(NamedTuple):
    """What came of a case: how many fields were compared, and which differ."""

    fields: int
    differences: list[Difference]


def flatten(data: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path and the `repr` of every value; that of a float tells all its bits, and a NaN from all else."""
    if data and isinstance(data, (dict, list)):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            name = str(key).replace(".", ":")
            yield from flatten(value, f"{path}.{name}" if path else name)
    else:
        yield path, repr(data)


def matches(patterns: Iterable[str], *paths: str) -> bool:
    """Return whether a pattern matches one of the paths, or what one lies below."""
    return any(_regex(pattern).fullmatch(path) for pattern in patterns for path in paths)


def _regex(pattern: str) -> re.Pattern[str]:
    escaped = re.escape(pattern).replace(r"\*\*", "(.*)").replace(r"\*", "([^.]*)")
    return re.compile(rf"{escaped}(?P<below>(?:\..*)?)")


def rename(path: str, renamed: Mapping[str, str]) -> str:
    """Return what a field of the commit is called in the working tree."""
    for old, new in renamed.items():
        if found := _regex(old).fullmatch(path):
            *kept, below = found.groups()
            path = re.sub(r"\*\*|\*", "{}", new).format(*kept) + below
    return path


def compare(
    base: Any,
    new: Any,
    *,
    renamed: Mapping[str, str] = RENAMED,
    excluded: Iterable[str] = tuple(EXCLUDED),
    changed: Iterable[str] = tuple(CHANGED),
) -> Outcome:
    """Compare two reports field by field."""
    old_names = {rename(path, renamed): path for path, _ in flatten(base)}
    values = {rename(path, renamed): value for path, value in flatten(base)}
    others = dict(flatten(new))
    if len(values) < len(list(flatten(base))):
        raise ValueError("Two fields of the commit are renamed to one.")
    skipped = [*excluded, *changed]
    paths = [path for path in values | others if not matches(skipped, path, old_names.get(path, path))]
    pairs = [Difference(path, values.get(path), others.get(path)) for path in paths]
    return Outcome(len(pairs), [pair for pair in pairs if pair.base != pair.new])


def results(tree: Path, folder: Path, names: Iterable[str], jobs: int) -> dict[str, Any]:
    """Run cases in a tree, and return what each wrote; an error from one that wrote nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(names)
    for name in names:
        (folder / f"{name}.json").unlink(missing_ok=True)
    if names:
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(tree)}
        subprocess.run([sys.executable, SCRIPTS[0], folder, str(jobs), *names], env=environment, check=True)
    return {name: load(folder, name) for name in names}


def load(folder: Path, name: str) -> dict[str, Any]:
    """Return what a case wrote."""
    path = folder / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"error": {"message": "it died"}}
    return found


def base_results(commit: str, names: Iterable[str], jobs: int) -> dict[str, Any]:
    """Return the results of a commit: those kept of the same cases, and the others from a copy of its tree."""
    digest = hashlib.sha256(b"".join(script.read_bytes() for script in SCRIPTS)).hexdigest()[:8]
    folder = KEPT / commit / digest
    missing = [name for name in names if "report" not in load(folder, name)]
    with tempfile.TemporaryDirectory() as copy:
        if missing:
            archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, stdout=subprocess.PIPE)
            subprocess.run(["tar", "-x", "-C", copy], input=archive.stdout, check=True)
        run = results(Path(copy), folder, missing, jobs)
    return {name: run[name] if name in run else load(folder, name) for name in names}


def judge(name: str, base: dict[str, Any], new: dict[str, Any]) -> Outcome:
    """Compare what a case wrote in both trees; one that failed in either is different, even if in the same way."""
    errors = [found["error"]["message"] if "error" in found else None for found in (base, new)]
    if any(errors):
        return Outcome(0, [Difference("the case failed", *errors)])
    return compare(base["report"], new["report"], changed=(*CHANGED, *CHANGED_IN.get(name, ())))


def main() -> None:
    """Run, compare and print."""
    from golden_cases import CASES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="the commit to compare with")
    parser.add_argument("--only", help="names of cases, with commas between them")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(CASES)
    if unknown := set(names) - CASES.keys():
        parser.error(f"there is no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    revision = ["git", "rev-parse", "--verify", f"{options.base}^{{commit}}"]
    commit = subprocess.run(revision, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    base = base_results(commit, names, options.jobs)
    new = results(ROOT, KEPT / "new", names, options.jobs)
    outcomes = {name: judge(name, base[name], new[name]) for name in names}
    print(f"{'case':22}{'fields compared':>16}{'differences':>13}{'seconds':>9}")
    for name, outcome in outcomes.items():
        seconds = new[name].get("took", {}).get("seconds", float("nan"))
        print(f"{name:22}{outcome.fields:16}{len(outcome.differences):13}{seconds:9.1f}")
    for name, outcome in outcomes.items():
        for path, one, other in outcome.differences:
            print(f"{name}: {path}: {one or 'missing'} | {other or 'missing'}")
    sys.exit(any(outcome.differences for outcome in outcomes.values()))


if __name__ == "__main__":
    main()
