# SPDX-License-Identifier: Apache-2.0
"""What a measurement by each profile costs on two real checkpoints, and what the forecast said of it.

A model is measured on as many examples as the profile asks for. The cost is the time of `measure` over that of one
gradient (a forward and a backward pass as Transformers runs them by default) over the same examples, the median of
some before and some after. Memory is the most that the process holds, on top of what it held after a gradient. Each
row runs in a process of its own.

    python benchmarks/profiles.py [--workload vision text] [--profile light standard full]

replaces these rows in `benchmarks/results/profiles.json`, and rewrites `docs/prices.md`. Needs Linux, for the
peak memory. On one core `light` takes half a minute to two, `full` over an hour for MiniLM.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
from pathlib import Path
from typing import Any

import torch
from peers import memory, peak_memory, seconds
from transformers.utils import logging
from workloads import BATCH_SIZE, ROOT, TITLES, Workload, WorkloadName, load, text, vision

from hf_optimizability import Measurement, OptimizabilityConfig, measure
from hf_optimizability.config import PROFILES
from hf_optimizability.measurement.forecast import Forecast, forecast


RESULTS = Path(__file__).parent / "results" / "profiles.json"
TABLE = ROOT / "docs" / "prices.md"
BATCHES = {"text": text, "vision": vision}
REPEATS = 3
MEBIBYTE = 2**20


def row(name: WorkloadName, profile: str, forecast_only: bool) -> dict[str, Any]:
    """One measurement by a profile, and its forecast; or the forecast alone."""
    logging.disable_progress_bar()
    config = OptimizabilityConfig(profile=profile)  # type: ignore[arg-type]
    _, batches = BATCHES[name](config.budget.probe_examples // BATCH_SIZE)
    workload = Workload(name, load(name).model, batches)
    workload.gradient()  # warms up
    gradients = [seconds(workload.gradient) for _ in range(REPEATS)]
    found: dict[str, Any] = {}
    if not forecast_only:
        measured: list[Measurement] = []
        before = memory()
        peak = peak_memory(lambda: measured.append(measure(workload.model, batches, config)))
        gradients += [seconds(workload.gradient) for _ in range(REPEATS)]
        found = {name: getattr(measured[0], name) for name in ("seconds", "hvps", "converged")}
        found["mebibytes"] = peak - before
    expected: list[Forecast] = []
    forecast_seconds = seconds(lambda: expected.append(forecast(workload.model, batches, config)))
    return {
        "examples": config.budget.probe_examples,
        "threads": torch.get_num_threads(),
        "gradient_seconds": statistics.median(gradients),
        **found,
        "forecast": {
            "took_seconds": forecast_seconds,
            "seconds": expected[0].seconds,
            "hvps": expected[0].hvps,
            "mebibytes": expected[0].peak_memory / MEBIBYTE,
        },
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as Markdown.

    Example:
        >>> said = {"took_seconds": 4.0, "seconds": 80.0, "hvps": 32, "mebibytes": 500.0}
        >>> row = {"examples": 32, "threads": 1, "gradient_seconds": 0.5, "seconds": 60.0, "hvps": 24}
        >>> row |= {"converged": True, "mebibytes": 450.0, "forecast": said}
        >>> print(table({"text": {"light": row}}).splitlines()[-1])
        | light | 32 | 120 | 24 of at most 32 | yes | 60.0 s of at most 80.0 s | 450 (forecast: 500) | 8.0 |
    """
    lines = [
        "# What a measurement costs",
        "",
        "Time in gradients over the same examples; products; memory on top of the model's, in MiB; and what the "
        "forecast said beforehand, and took itself.",
        "",
    ]
    for name, rows in results.items():
        threads = ", ".join(sorted({str(row["threads"]) for row in rows.values()}))
        lines += [
            f"## {TITLES[name]}; threads: {threads}",  # type: ignore[index]
            "",
            "| profile | examples | gradients | products | converged | time | memory | forecast takes, in gradients |",
            "|---|--:|--:|--:|--:|--:|--:|--:|",
        ]
        lines += [f"| {' | '.join([profile, *_cells(rows[profile])])} |" for profile in PROFILES if profile in rows]
        lines.append("")
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> list[str]:
    said, gradient = row["forecast"], row["gradient_seconds"]
    took = f"{said['took_seconds'] / gradient:.1f}"
    if "seconds" not in row:
        most = [f"at most {said['seconds'] / gradient:.0f}", f"at most {said['hvps']}", "–"]
        return [str(row["examples"]), *most, f"at most {said['seconds']:.0f} s", f"{said['mebibytes']:.0f}", took]
    return [
        str(row["examples"]),
        f"{row['seconds'] / gradient:.0f}",
        f"{row['hvps']} of at most {said['hvps']}",
        "yes" if row["converged"] else "no",
        f"{row['seconds']:.1f} s of at most {said['seconds']:.1f} s",
        f"{row['mebibytes']:.0f} (forecast: {said['mebibytes']:.0f})",
        took,
    ]


def main() -> None:
    """Measures what was asked for, and writes all that was measured so far."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workload", nargs="+", choices=list(BATCHES), default=list(BATCHES))
    parser.add_argument("--profile", nargs="+", choices=list(PROFILES), default=list(PROFILES))
    parser.add_argument("--forecast_only", action="store_true", help="Measure nothing.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="The JSON file.")
    parser.add_argument("--table", type=Path, default=TABLE, help="The Markdown file.")
    arguments = parser.parse_args()
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for name in arguments.workload:
        for profile in arguments.profile:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found = pool.apply(row, (name, profile, arguments.forecast_only))
            print(name, profile, found, flush=True)
            results.setdefault(name, {})[profile] = found
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
            arguments.table.write_text(table(results))


if __name__ == "__main__":
    main()
