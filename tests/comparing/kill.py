# SPDX-License-Identifier: Apache-2.0
"""Compares tiny models in processes that are killed, until one gets through.

    python kill.py FOLDER KILLS SEED

makes a comparison in `FOLDER`/whole, and again in `FOLDER`/killed, where it is killed with SIGKILL at random moments.
All processes are forks of this one, which has imported everything and run nothing: they begin at once.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import tiny_texts

import hf_optimizability.comparing.training
import hf_optimizability.report.plots
from hf_optimizability import compare


hf_optimizability.report.plots.plot_all = lambda report: {}  # the still plots of a single run take most of its time


def comparison(folder: Path, inputs: Path) -> None:
    """A checkpoint whole, with LoRA and with random weights, and one that can't be loaded."""
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
        dataloader_pin_memory=False,
    )


def start(folder: Path, inputs: Path) -> int:
    """Starts a process that compares; its id."""
    process = os.fork()
    if process == 0:
        try:
            comparison(folder, inputs)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(1)
        os._exit(0)
    return process


def main() -> None:
    """Kills, and says at what there was to find: checkpoints and finished runs."""
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    tiny_texts.save_checkpoint(folder / "tiny-bert")
    tiny_texts.save_data(folder / "data.parquet")
    started = time.monotonic()
    assert os.waitpid(start(folder / "whole", folder), 0)[1] == 0
    whole = time.monotonic() - started
    moments = random.Random(seed)
    for _ in range(kills):
        process = start(folder / "killed", folder)
        time.sleep(moments.uniform(0.3, 1) * whole / kills)
        os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        found = [len(list((folder / "killed").rglob(name))) for name in ("run.json", "checkpoint-*")]
        print(f"killed {int(os.WIFSIGNALED(status))}, runs {found[0]}, checkpoints {found[1]}", flush=True)
    assert os.waitpid(start(folder / "killed", folder), 0)[1] == 0
    print("done")


if __name__ == "__main__":
    main()
