# SPDX-License-Identifier: Apache-2.0
"""What measuring adds to a real fine-tuning run: wall-clock time and peak memory, with over without.

One training at default settings is timed step by step. In each pair of neighbouring steps one, by lot, is without the
gradient norms of the blocks: what these add is the median difference within the pairs. What measuring adds is all the
time that the callback takes, relative to as many steps at the cost of those without. So both sides of each
ratio come from the same minutes of one process, whatever else the machine does. Peak memory is that of two steps, in a
process each with and without.

The run must be long: the first and the last measurement are always made, and are to fit into 5 % of the training time.
Small inputs, and few of them (the probe set has 64 examples, or as many as there are), make both cheap and the run
short enough to wait for:

    python benchmarks/overhead.py --steps 5000 --examples 16

adds a run to each row in `benchmarks/results/overhead.json`, and rewrites the table next to it. Needs Linux, for the
peak
memory. On one idle core that takes about a quarter of an hour; with 960 examples and 20000 steps, an hour.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peers import memory, peak_memory
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging
from workloads import BATCH_SIZE, SEED, text, vision

from hf_optimizability import OptimizabilityTrainer


RESULTS = Path(__file__).parent / "results" / "overhead.json"
WORKLOADS = {
    "text": (partial(text, tokens=6), "MiniLM-L6 on sentences of 6 tokens"),
    "vision": (partial(vision, pixels=32), "MobileNetV2 on MNIST at 32 px"),
}
MEMORY_STEPS = 2
LEARNING_RATE = 1e-6  # so that thousands of steps on few examples do not end where loss and curvature vanish
INTRODUCTION = """From `python benchmarks/overhead.py`, which says how it is measured. Measuring: all that the callback
does at default settings, as a share of the training time without it. Norms: what the gradient norms of the blocks add
to a step whose norms are logged, by the clock within pairs of neighbouring steps; and to training as a whole if each
10th step is logged, or each 500th as is the Trainer's default. Memory: the peak of the training with over without."""


class Mark(NamedTuple):
    """A moment of the training: which event, before or after the measuring callback, in seconds of wall and CPU."""

    event: str
    after: bool
    wall: float
    cpu: float


class Marks(TrainerCallback):
    """Notes the time of events; one goes before the measuring callback, one after it."""

    def __init__(self, marks: list[Mark], *, after: bool):
        self._marks, self._after = marks, after

    def _note(self, event: str) -> None:
        self._marks.append(Mark(event, self._after, time.perf_counter(), time.process_time()))

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Before the first step."""
        self._note("begin")

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Record the time. From one call to the next, less the callback, is a step: loading, training, logging."""
        self._note("step")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """After each step."""
        self._note("step end")

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """After the last step."""
        self._note("end")


class Alternating(OptimizabilityTrainer):
    """Takes the gradient norms at one step of each pair, as if it were a step to log."""

    with_norms: Sequence[bool]

    def _is_logged(self) -> bool:
        return self.with_norms[self.state.global_step]


def make_trainer(name: str, cls: type[Trainer], folder: str, *, steps: int, examples: int) -> Trainer:
    """Build a Trainer on a real checkpoint. It logs at each step, so that pairs differ by the norms alone."""
    logging.set_verbosity_error()
    torch.manual_seed(SEED)
    make, _ = WORKLOADS[name]
    model, batches = make(math.ceil(examples / BATCH_SIZE))
    rows = [{key: value[i] for key, value in batch.items()} for batch in batches for i in range(BATCH_SIZE)][:examples]
    args = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE,
        logging_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True, seed=SEED,
    )  # fmt: skip
    trainer = cls(model, args, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    return trainer


def time_run(name: str, steps: int, examples: int) -> dict[str, Any]:
    """One training with all of it at default settings, timed."""
    lots = random.Random(SEED)
    pairs = [lots.sample([True, False], 2) for _ in range(steps // 2)]
    marks: list[Mark] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(name, Alternating, folder, steps=2 * len(pairs), examples=examples)
        trainer.with_norms = [kind for pair in pairs for kind in pair]
        measuring = trainer.pop_callback(trainer.optimizability_callback)
        for callback in (Marks(marks, after=False), measuring, Marks(marks, after=True)):
            trainer.add_callback(callback)
        trainer.train()
    found = {clock: shares(marks, trainer.with_norms, clock=clock) for clock in ("wall", "cpu")}
    report = trainer.optimizability_report()
    assert not report.failures
    measurements = [[m.step, m.hvps, round(m.seconds, 2)] for m in report.measurements]
    return {
        "steps": 2 * len(pairs),
        "examples": examples,
        **found,
        "told": report.training["overhead"],
        "measurements": measurements,
    }


def shares(marks: list[Mark], with_norms: Sequence[bool], *, clock: str) -> dict[str, float]:
    """Return what the callback and the norms took, relative to steps without norms.

    Args:
        marks: Of the whole training, in their order.
        with_norms: For each step, whether its norms were taken.
        clock: "wall" or "cpu".

    Returns:
        Median seconds of a step without norms and the quartiles of it, what the callback added to the training, what
        the norms add to a step that takes them and the standard error of that; the latter as shares.

    Example:
        >>> times = [("begin", 0, 0), ("begin", 1, 3), ("step", 0, 3), ("step", 1, 3), ("step end", 0, 13),
        ...          ("step end", 1, 14), ("step", 0, 15), ("step", 1, 15), ("step end", 0, 24), ("step end", 1, 24),
        ...          ("end", 0, 24), ("end", 1, 26)]
        >>> marks = [Mark(event, bool(after), second, 0) for event, after, second in times]
        >>> found = shares(marks, [True, False], clock="wall")  # steps of 11 s with, 9 s without; callback 3 + 1 + 2 s
        >>> found["step"], round(found["measured"], 3), round(found["norms"], 3)
        (9, 0.333, 0.222)
    """
    steps: list[float] = []
    callback = 0.0
    for mark, following in pairwise(marks):
        if mark.event == "step" and not mark.after:
            steps.append(0)
        elapsed = getattr(following, clock) - getattr(mark, clock)
        if following.after:
            callback += elapsed
        elif steps:
            steps[-1] += elapsed
    plain = [seconds for seconds, kind in zip(steps, with_norms, strict=True) if not kind]
    signed = [seconds if kind else -seconds for seconds, kind in zip(steps, with_norms, strict=True)]
    differences = [one + other for one, other in zip(signed[::2], signed[1::2], strict=True)]
    step, added = statistics.median(plain), statistics.median(differences)
    deviation = 1.4826 * statistics.median(abs(difference - added) for difference in differences)
    return {
        "step": step,
        "quartiles": statistics.quantiles(plain, n=4)[::2] if len(plain) > 1 else [step, step],
        "measured": callback / (statistics.fmean(plain) * len(steps)),
        "norms": added / step,
        "norms_error": 1.2533 * deviation / math.sqrt(len(differences)) / step,
    }


def peak(name: str, measured: bool, examples: int) -> float:
    """MiB that a short training holds at its peak, beyond what was held before it."""
    with tempfile.TemporaryDirectory() as folder:
        cls = OptimizabilityTrainer if measured else Trainer
        trainer = make_trainer(name, cls, folder, steps=MEMORY_STEPS, examples=examples)
        before = memory()
        return peak_memory(trainer.train) - before


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown.

    Example:
        >>> clock = {"step": 0.1, "quartiles": [0.09, 0.12], "measured": 0.04, "norms": 0.02, "norms_error": 0.001}
        >>> run = {"examples": 64, "steps": 9000, "wall": clock, "cpu": clock, "measurements": [[0, 40, 8.0]] * 2}
        >>> row = {"threads": 1, "runs": [run], "plain_mebibytes": [500.0], "measured_mebibytes": [900.0]}
        >>> print(table({"text": row}).splitlines()[-1])
        | 64 | 9000 | 0.100 s (0.090–0.120) | 2, 8.0 s | 4.00 % (4.00 %) | 2.00 ± 0.10 % | 0.200 % | 0.004 % | × 1.80 |
    """
    lines = ["# What measuring adds to a training run", "", INTRODUCTION]
    for name, row in results.items():
        memory = statistics.median(row["measured_mebibytes"]) / statistics.median(row["plain_mebibytes"])
        lines += [
            "",
            f"## {WORKLOADS[name][1]}, batches of {BATCH_SIZE}; threads: {row['threads']}",
            "",
            "| examples | steps | a step (quartiles) | measurements | measuring (CPU time) "
            "| norms at a step | each 10th | each 500th | memory |",
            "|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for run in row["runs"]:
            wall, seconds = run["wall"], [measurement[2] for measurement in run["measurements"]]
            cells = [
                str(run["examples"]),
                str(run["steps"]),
                "{:.3f} s ({:.3f}–{:.3f})".format(wall["step"], *wall["quartiles"]),
                f"{len(seconds)}, {statistics.median(seconds):.1f} s",
                f"{100 * wall['measured']:.2f} % ({100 * run['cpu']['measured']:.2f} %)",
                f"{100 * wall['norms']:.2f} ± {100 * wall['norms_error']:.2f} %",
                *(f"{100 * wall['norms'] / every:.3f} %" for every in (10, 500)),
                f"× {memory:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a separate process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    """Trains as asked, and writes what came out so far."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--examples", type=int, default=960, help="Size of the training set, trained on repeatedly.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="The JSON file; the table goes next to it.")
    arguments = parser.parse_args()
    for name in arguments.workload:
        results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        row = results.setdefault(name, {"threads": torch.get_num_threads(), "runs": []})
        for measured in (False, True):
            row[f"{'measured' if measured else 'plain'}_mebibytes"] = [
                apart(peak, name, measured, arguments.examples) for _ in range(2)
            ]
        row["runs"].append(apart(time_run, name, arguments.steps, arguments.examples))
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(table(results))
        print(table(results), flush=True)


if __name__ == "__main__":
    main()
