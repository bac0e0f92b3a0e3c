# SPDX-License-Identifier: Apache-2.0
"""Time `import hf_optimizability` and `from transformers import Trainer`, in fresh processes, in turn."""

from __future__ import annotations

import statistics
import subprocess
import sys


ROUNDS = 7
STATEMENTS = {"trainer": "from transformers import Trainer", "ours": "import hf_optimizability"}


def seconds(statement: str) -> float:
    """Time one import takes in a process of its own."""
    script = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    return float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Print the medians."""
    times: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(ROUNDS):
        for name, statement in STATEMENTS.items():
            times[name].append(seconds(statement))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, statement in STATEMENTS.items():
        print(f"{statement:35} {medians[name]:.2f} s")
    print(f"{'difference':35} {medians['ours'] - medians['trainer']:+.2f} s (to stay below +0.30 s)")


if __name__ == "__main__":
    main()
