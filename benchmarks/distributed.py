# SPDX-License-Identifier: Apache-2.0
"""What a second process saves: the same measurement by one process and by two, with one thread each.

    python benchmarks/distributed.py

writes `benchmarks/results/distributed.json` and the table next to it. Needs two cores with nothing else on them; takes
about a quarter of an hour.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from transformers.utils import logging
from workloads import BATCH_SIZE, TITLES, load, text, vision

from hf_optimizability import OptimizabilityConfig
from hf_optimizability.distributed.process_group import TorchProcessGroup
from hf_optimizability.linalg.communicator import SINGLE_PROCESS, Item
from hf_optimizability.measurement.measure import measure_objective
from hf_optimizability.objective.objective import Objective


RESULTS = Path(__file__).parent / "results" / "distributed.json"
BATCHES = {"text": text, "vision": vision}
PROCESSES = (1, 2)
CPU = torch.device("cpu")


class Timed(TorchProcessGroup):
    """Counts what goes from rank to rank, and how long the ranks are at it, waiting for each other included."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.seconds, self.bytes, self.sums = 0.0, 0, 0

    def all_reduce_many_(self, tensors: Sequence[Tensor]) -> None:
        """Sum each of several tensors over the ranks, in place."""
        started = time.perf_counter()
        super().all_reduce_many_(tensors)
        self.seconds += time.perf_counter() - started
        self.bytes += sum(tensor.nbytes for tensor in tensors)
        self.sums += 1

    def all_gather_interleaved(self, items: list[Item]) -> list[Item]:
        """Return the items of all ranks."""
        started = time.perf_counter()
        found = super().all_gather_interleaved(items)
        self.seconds += time.perf_counter() - started
        return found


def run(rank: int, number: int, name: str, profile: str, folder: str) -> None:
    """One rank of one measurement; the first one writes what it took."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    if number > 1:
        dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=number)
    group = Timed() if number > 1 else SINGLE_PROCESS
    config = OptimizabilityConfig(profile=profile)  # type: ignore[arg-type]
    _, batches = BATCHES[name](config.budget.probe_examples // BATCH_SIZE)
    model = load(name).model  # type: ignore[arg-type]
    objective = Objective(model, batches).shard(group)
    next(objective.losses())[0].backward()  # warms up
    model.zero_grad()
    group.all_reduce_(torch.zeros(1))
    measurement = measure_objective(objective, config)[0]
    hessian = measurement.hessian
    found: dict[str, Any] = {
        "seconds": measurement.seconds,
        "hvps": measurement.hvps,
        "values": [hessian.trace.value, hessian.lambda_max.value, measurement.loss],
    }
    if isinstance(group, Timed):
        found |= {"communication": group.seconds / measurement.seconds, "bytes": group.bytes, "sums": group.sums}
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))


def run_apart(index: int, name: str, profile: str, folder: str) -> None:
    """Run the same in one process while another runs: what the machine leaves to each."""
    own = Path(folder, str(index))
    own.mkdir()
    run(0, 1, name, profile, str(own))


def time_apart(name: str, profile: str) -> float:
    """Mean seconds of two measurements at the same time, of two processes that share nothing."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_apart, (name, profile, folder), nprocs=2)
        return statistics.fmean(json.loads(path.read_text())["seconds"] for path in Path(folder).glob("*/found.json"))


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown: by workload, a row for each profile.

    Example:
        >>> one, two = {"seconds": 90.0, "hvps": 30, "values": [1.0]}, {"seconds": 45.0, "hvps": 30, "values": [1.0]}
        >>> two |= {"communication": 0.04, "bytes": 2**30, "sums": 60}
        >>> light = {"examples": 32, "runs": {"1": [one], "2": [two]}, "apart": [100.0]}
        >>> print(table({"text": {"light": light}}).splitlines()[-1])
        | light | 32 | 30 | 1 | 90.0 s | 45.0 s | **2.00** | 1.80 | 4 % | 1024 MiB in 60 sums | 0e+00 |
    """
    lines = [
        "# What a second process saves",
        "",
        "One measurement by one process and by two, one thread each; medians. Communication holds the time in which "
        "one rank waits for the other. The machine's limit: what two processes would gain that shared nothing, by the "
        "time that two whole measurements take at once.",
    ]
    for name, by_profile in results.items():
        lines += [
            "",
            f"## {TITLES[name].partition(',')[0]}",  # type: ignore[index]
            "",
            "| profile | examples | products | repeats | one process | two | speed-up | the machine's limit "
            "| communication | summed by a rank | largest relative difference |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
            *(f"| {profile} | {' | '.join(_cells(row))} |" for profile, row in by_profile.items()),
        ]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    one, two = (row["runs"][str(number)] for number in PROCESSES)
    seconds = [statistics.median(run["seconds"] for run in runs) for runs in (one, two)]
    last = two[-1]
    pairs = zip(one[-1]["values"], last["values"], strict=True)
    return [
        str(row["examples"]),
        str(last["hvps"]),
        str(len(two)),
        *(f"{value:.1f} s" for value in seconds),
        f"**{seconds[0] / seconds[1]:.2f}**",
        f"{2 * seconds[0] / statistics.median(row['apart']):.2f}",
        f"{100 * statistics.median(run['communication'] for run in two):.0f} %",
        f"{last['bytes'] / 2**20:.0f} MiB in {last['sums']} sums",
        f"{max(abs(a - b) / abs(a) for a, b in pairs):.0e}",
    ]


def main() -> None:
    """Measures in turn by one process and by two, and writes what came out so far."""
    profiles = get_args(get_type_hints(OptimizabilityConfig)["profile"])
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workload", nargs="+", choices=list(BATCHES), default=list(BATCHES))
    parser.add_argument("--profile", choices=profiles, default="light")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="The JSON file; the table goes next to it.")
    arguments = parser.parse_args()
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    examples = OptimizabilityConfig(profile=arguments.profile).budget.probe_examples
    for name in arguments.workload:
        load(name)  # makes it, if that has not been done
        runs: dict[str, list[dict[str, Any]]] = {str(number): [] for number in PROCESSES}
        apart = []
        for _ in range(arguments.repeats):
            apart.append(time_apart(name, arguments.profile))
            for number in PROCESSES:
                with tempfile.TemporaryDirectory() as folder:
                    mp.spawn(run, (number, name, arguments.profile, folder), nprocs=number)
                    runs[str(number)].append(json.loads(Path(folder, "found.json").read_text()))
                print(name, number, runs[str(number)][-1], flush=True)
        results.setdefault(name, {})[arguments.profile] = {"examples": examples, "runs": runs, "apart": apart}
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
