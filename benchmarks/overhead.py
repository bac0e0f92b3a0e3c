# SPDX-License-Identifier: Apache-2.0
"""What measuring adds to a real fine-tuning run: wall-clock time and peak memory, with over without.

Each run trains in a process of its own: plainly; with the gradient norms of each block logged and nothing measured;
and with all of it at default settings. The three alternate, repeat by repeat, and ratios are those within a repeat.
Runs must be long: the first and the last measurement are always made, and the default budget is 5 % of the training.

    python benchmarks/overhead.py --workload vision --steps 2000 --repeats 3
    python benchmarks/overhead.py --workload text --steps 1500 --repeats 3 --profile light

replaces these rows in `benchmarks/results/overhead.json`, and writes the table beside it anew. Needs Linux, for the
peak memory. On two cores each run above takes about half an hour.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from peers import memory, peak_memory
from transformers import Trainer, TrainingArguments
from transformers.utils import logging
from workloads import BATCH_SIZE, SEED, TITLES, text, vision

from hf_optimizability import OptimizabilityConfig, OptimizabilityTrainer


RESULTS = Path(__file__).parent / "results" / "overhead.json"
WORKLOADS = {"text": (text, 2e-5), "vision": (vision, 1e-3)}
MODES = ("plain", "norms", "measured")
EXAMPLES = 960  # trained on again and again
PROMISED = {"measured": 0.05, "norms": 0.005}
"""Share of the training time that each mode may add."""


def run(name: str, mode: str, steps: int, profile: str) -> dict[str, Any]:
    """One training."""
    logging.set_verbosity_error()
    torch.manual_seed(SEED)
    make, learning_rate = WORKLOADS[name]
    model, batches = make(EXAMPLES // BATCH_SIZE)
    rows = [{key: value[i] for key, value in batch.items()} for batch in batches for i in range(BATCH_SIZE)]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=BATCH_SIZE, learning_rate=learning_rate,
            logging_steps=10, save_strategy="no", use_cpu=True, disable_tqdm=True, seed=SEED,
        )  # fmt: skip
        if mode == "plain":
            trainer = Trainer(model, args, train_dataset=rows)
        else:
            config = OptimizabilityConfig(profile=profile)  # type: ignore[arg-type]
            trainer = OptimizabilityTrainer(model, args, train_dataset=rows, optimizability=config)
            if mode == "norms":
                trainer.remove_callback(trainer.optimizability_callback)
        before, started = memory(), time.perf_counter()
        peak = peak_memory(trainer.train)
        seconds = time.perf_counter() - started
    measurements = []
    if isinstance(trainer, OptimizabilityTrainer):
        measurements = [[m.step, m.hvps, m.seconds] for m in trainer.optimizability_report().measurements]
    return {"seconds": seconds, "mebibytes": peak - before, "measurements": measurements}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown.

    Example:
        >>> runs = {mode: [{"seconds": s, "mebibytes": m, "measurements": []}] for mode, s, m in (
        ...     ("plain", 100.0, 500.0), ("norms", 100.2, 500.0), ("measured", 104.0, 900.0))}
        >>> row = {"steps": 10, "profile": "standard", "threads": 2, "runs": runs}
        >>> print(table({"text": row}).splitlines()[-1])
        | 10 | standard | 1 | +0.20 % | +4.00 % | 0 | × 1.80 |
    """
    lines = [
        "# What measuring adds to a training run",
        "",
        "Wall-clock time and peak memory with over without, medians of ratios within a repeat.",
    ]
    for name, row in results.items():
        runs = row["runs"]
        added = {mode: _median_ratio(runs, mode, "seconds") - 1 for mode in PROMISED}
        cells = [
            str(row["steps"]),
            row["profile"],
            str(len(runs["plain"])),
            f"{added['norms']:+.2%}".replace("%", " %"),
            f"{added['measured']:+.2%}".replace("%", " %"),
            str(statistics.median_low([len(run["measurements"]) for run in runs["measured"]])),
            f"× {_median_ratio(runs, 'measured', 'mebibytes'):.2f}",
        ]
        lines += [
            "",
            f"## {TITLES[name].partition(',')[0]}; threads: {row['threads']}",  # type: ignore[index]
            "",
            "| steps | profile | repeats | gradient norms by block | all | measurements | peak memory |",
            "|--:|---|--:|--:|--:|--:|--:|",
            f"| {' | '.join(cells)} |",
        ]
    return "\n".join(lines) + "\n"


def _median_ratio(runs: dict[str, list[dict[str, Any]]], mode: str, what: str) -> float:
    pairs = zip(runs[mode], runs["plain"], strict=True)
    return statistics.median(run[what] / plain[what] for run, plain in pairs)


def main() -> None:
    """Trains as asked, and writes what came out so far."""
    profiles = get_args(get_type_hints(OptimizabilityConfig)["profile"])
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", choices=profiles, default="standard")
    parser.add_argument("--out", type=Path, default=RESULTS, help="The JSON file; the table goes beside it.")
    arguments = parser.parse_args()
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for name in arguments.workload:
        runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
        for _ in range(arguments.repeats):
            for mode in MODES:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    found = pool.apply(run, (name, mode, arguments.steps, arguments.profile))
                print(name, mode, found, flush=True)
                runs[mode].append(found)
            results[name] = {
                "steps": arguments.steps,
                "profile": arguments.profile,
                "threads": torch.get_num_threads(),
                "runs": runs,
            }
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
            arguments.out.with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
