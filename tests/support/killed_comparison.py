# SPDX-License-Identifier: Apache-2.0
"""Compares tiny models in processes that are killed, until one gets through.

    python -m tests.support.killed_comparison FOLDER KILLS SEED

makes a comparison in `FOLDER`/whole, and again in `FOLDER`/killed, where it is killed with SIGKILL at random moments.
All processes are forks of this one, which has imported everything and run nothing: they begin at once.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import hf_optimizability.comparing.training
import hf_optimizability.report.figures
from hf_optimizability import compare
from tests.support import tiny_texts


def comparison(folder: Path, inputs: Path) -> None:
    """A checkpoint whole, with LoRA and with random weights, and one that can't be loaded."""
    hf_optimizability.report.figures.plot_all = lambda report: {}  # takes most of the time
    candidates = ["method=full", "method=lora", "random_weights=True", f"model_name_or_path={inputs / 'missing'}"]
    compare(
        candidates,
        model_name_or_path=str(inputs / "tiny-bert"),
        train_file=str(inputs / "data.parquet"),
        validation_file=str(inputs / "data.parquet"),
        text_column_name=["sentence"],
        ignore_mismatched_sizes=True,
        cache_dir=str(inputs / "cache"),
        output_dir=str(folder),
        budget_steps=60,
        seeds=2,
        save_seconds=0,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        probe_examples=4,
        max_hvps=16,
        pool_examples=0,
        dataloader_pin_memory=False,
    )


def start(action: Callable[..., object], *args: object) -> int:
    """Starts a process that does something; its id."""
    process = os.fork()
    if process == 0:
        try:
            action(*args)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(1)
        os._exit(0)
    return process


def succeed(action: Callable[..., object], *args: object) -> None:
    """Does something in a process of its own: threads of this one might hold locks, which a fork keeps for ever."""
    assert os.waitpid(start(action, *args), 0)[1] == 0


def found(folder: Path) -> set[Path]:
    """What a comparison has got to: checkpoints, and trainings that are done."""
    return {*folder.glob("runs/*/*/*/training/checkpoint-*"), *folder.glob("runs/*/*/*/run.json")}


def main() -> None:
    """Kills at random moments after random numbers of checkpoints and finished trainings, and tells what was there."""
    inputs, kills, moments = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    succeed(tiny_texts.save_checkpoint, inputs / "tiny-bert")
    succeed(tiny_texts.save_data, inputs / "data.parquet")
    succeed(comparison, inputs / "whole", inputs)
    for _ in range(kills):
        process = start(comparison, inputs / "killed", inputs)
        seen, more = found(inputs / "killed"), moments.randint(1, 80 // kills)
        number = len(seen)
        while len(seen) < number + more and os.waitpid(process, os.WNOHANG) == (0, 0):
            time.sleep(0.002)
            seen |= found(inputs / "killed")
        time.sleep(moments.uniform(0, 0.05))
        os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        names = [path.name for path in found(inputs / "killed")]
        done = names.count("run.json")
        print(f"killed {int(os.WIFSIGNALED(status))}, runs {done}, checkpoints {len(names) - done}", flush=True)
    succeed(comparison, inputs / "killed", inputs)
    print("done")


if __name__ == "__main__":
    main()
