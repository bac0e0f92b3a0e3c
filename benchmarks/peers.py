# SPDX-License-Identifier: Apache-2.0
"""Side by side with PyHessian, hessian-eigenthings and curvlinops: cost, accuracy, and what each takes at all.

    pip install -e '.[peers,vision]' && pip install --no-deps pyhessian && pip uninstall -y torchvision
    python benchmarks/peers.py
    python benchmarks/peers.py --workload text --library curvlinops --rows cost trace

Each row of each library runs in a process of its own, and replaces that row in `benchmarks/results/peers.json`, from
which `docs/side_by_side.md` is drawn; what was stopped can thus continue. The first row of a workload that is judged
waits for the long runs that errors are measured by (an hour; kept under `out/`; `truth.py` makes them). A call that
takes longer than `--limit` seconds is stopped, and recorded with its products. Needs Linux, for the peak memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from features import failure, try_features
from libraries import LIBRARIES, PROBE_BLOCK_SIZE, Call, Ends, HvpEngine, Library, OutOfTimeError, Products, Quadrature
from tables import OURS, markdown, problems
from transformers.utils import logging
from truth import EFFORT, Truth, pooled, truth
from workloads import ROOT, WORKLOADS, Batch, Workload, WorkloadName, load


RESULTS = Path(__file__).parent / "results"
TABLES = ROOT / "docs" / "side_by_side.md"
LIMIT = 120.0
MAX_CALLS = 3  # parts of a row that each have all the time
REPEATS = 5
EIGENVALUE_TARGETS = (0.01, 0.001)
TRACE_TARGETS = (0.1, 0.05)
# From the random weights of the largest eigenvalues, single runs on MobileNetV2 are off by 0.03 to 0.5, whatever their
# length from 5 steps on, and the long runs are known to 0.0003.
DENSITY_TARGET = 0.1
DENSITY_STEPS = 20
DENSITY_RUNS = 10


# The rows: each runs in a process of its own, and returns what goes into the results.


def cost(library: type[Library], name: WorkloadName, products: Products) -> dict[str, Any]:
    """Time and peak memory of one product over those of one gradient, in turn, on one batch."""
    workload = load(name, batches=1)
    workload.gradient()  # warms up
    base = memory()
    gradient_mebibytes = peak_memory(workload.gradient) - base
    default = workload.model.config._attn_implementation
    peer, note = opened(library, workload, products)
    eager = note is not None
    vectors = torch.randn(PROBE_BLOCK_SIZE, workload.size, generator=torch.Generator().manual_seed(0)).T
    base += vectors.nbytes / 2**20
    ways = {}
    for way in peer.ways(vectors):
        multiply, mebibytes = built(way)
        mebibytes -= base
        times = []
        for _ in range(REPEATS):
            if eager:
                workload.model.set_attn_implementation(default)
            gradient = seconds(workload.gradient)
            if eager:
                workload.model.set_attn_implementation("eager")
            times.append((gradient, seconds(multiply) / way.columns))
        ways[way.name] = {
            "seconds": statistics.median(product for _, product in times),
            "gradient_seconds": statistics.median(gradient for gradient, _ in times),
            "time_ratio": statistics.median(product / gradient for gradient, product in times),
            "mebibytes": mebibytes,
            "gradient_mebibytes": gradient_mebibytes,
        }
        del multiply
        workload.model.zero_grad()
        gc.collect()
    return {"note": note, "ways": ways}


def eigenvalues(library: type[Library], name: WorkloadName, products: Products) -> dict[str, Any]:
    """Return the fewest products that give λ_max, and both ends, to the targets."""
    true = truth(name)
    peer, note = opened(library, probe_set(library, name), products)
    found: dict[str, Any] = {"note": note, "targets": {}}
    history: list[Ends] = []
    products.restart()
    try:
        history.extend(peer.ends())
    except OutOfTimeError:
        found |= {"stopped": over(products.seconds), "hvps": len(products.ended)}
    for target in EIGENVALUE_TARGETS:
        for which, ends in (("λ_max", slice(1)), ("both", slice(2))):
            close = partial(within, true=true, ends=ends, target=target)
            found["targets"][f"{which} to {target:.1%}"] = reached(history, close)
    return found


def trace(library: type[Library], name: WorkloadName, products: Products) -> dict[str, Any]:
    """Return the cost of the trace to a standard error of the targets."""
    true = truth(name)
    peer, note = opened(library, probe_set(library, name), products)
    found: dict[str, Any] = {"note": note, "targets": {}}
    products.restart()
    try:
        for target in peer.trace_to(TRACE_TARGETS):
            found["targets"][f"{target['tolerance']:.0%}"] = target | errors(target, true)
    except OutOfTimeError:
        found |= {"stopped": over(products.seconds), "hvps": len(products.ended)}
    return found


def density(library: type[Library], name: WorkloadName, products: Products) -> dict[str, Any]:
    """Return the fewest products, in Lanczos runs of equal length, to come within the target of the density."""
    true = truth(name)
    peer, note = opened(library, probe_set(library, name), products)
    runs: list[Quadrature] = []
    spent: list[list[float]] = []
    products.restart()
    found: dict[str, Any] = {"note": note}
    for number in range(1, DENSITY_RUNS + 1):
        first, started = len(products.ended), products.now()
        try:
            runs.append(peer.quadrature(DENSITY_STEPS))
        except OutOfTimeError:
            found["stopped"] = over(products.seconds)
            break
        spent.append([ended - started for ended in products.ended[first:]])
        for steps in range(1, DENSITY_STEPS + 1):
            distance = true.distance(pooled([peer.density_after(run, steps) for run in runs]))
            if distance <= DENSITY_TARGET:
                return found | {
                    "runs": number,
                    "steps": steps,
                    "hvps": number * steps,
                    "seconds": sum(ended[steps - 1] for ended in spent),
                    "distance": distance,
                }
            found["distance"] = min(distance, found.get("distance", distance))
    return found | {"hvps": len(products.ended), "seconds": products.now()}


def card(library: type[Library], name: WorkloadName, products: Products) -> dict[str, Any]:
    """Everything that a model card shows, by the library's own calls with its own defaults."""
    true = truth(name)
    peer, note = opened(library, probe_set(library, name), products)
    return {"note": note, "calls": [called(call, products, true) for call in peer.card()]}


def profile(library: type[Library], name: WorkloadName, products: Products) -> dict[str, Any]:
    """Where the time of this package's card goes: to passes through the model, by kernels, and to all the rest.

    The rest are the vector work of the estimators and what they decide.
    """
    peer, _ = opened(library, probe_set(library, name), products)
    inside, depth = 0.0, 0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside, depth
            started = time.perf_counter()
            depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                depth -= 1
                inside += 0 if depth else time.perf_counter() - started  # a mode calls `grad` within `grad`

        return call

    [call] = peer.card()
    with (
        patch.object(torch.autograd, "grad", timed(torch.autograd.grad)),
        patch.object(type(peer.model), "forward", timed(type(peer.model).forward)),  # attributes come back
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as kernels,
    ):
        spent = seconds(call.run)
    times = {event.key: event.self_cpu_time_total / 1e6 for event in kernels.key_averages()}
    heavy = sum(time for key, time in times.items() if key.rstrip("_").endswith("mm") or "conv" in key)
    return {"seconds": spent, "passes": inside / spent, "matrix_products": heavy / spent}


def features(library: type[Library], name: WorkloadName, products: Products) -> dict[str, Any]:
    """Return the inputs that the library supports; no workload is needed."""
    return {"outcomes": try_features(library)}


ROWS = {row.__name__: row for row in (cost, eigenvalues, trace, density, card, profile, features)}


def asked_of(row: str, library: str, workload: WorkloadName) -> bool:
    """Whether a row can be made: where the trace and the density are not known, some can't be judged."""
    if row == "profile" and library != OURS:
        return False
    return bool(EFFORT[workload].probes) or row in ("cost", "eigenvalues", "features")


# What the rows share.


def opened(library: type[Library], workload: Workload, products: Products) -> tuple[Library, str | None]:
    """Open the library on a workload and try one product; use eager attention where the default one fails.

    Returns:
        The library, and how it failed with the default attention, if it did.
    """
    vector = torch.ones(workload.size)
    try:
        peer = library(workload.model, workload.batches, Products())
        peer.product(vector)
    except Exception as error:
        if not workload.model._supports_sdpa:
            raise
        note = failure(error)
    else:
        peer.products = products
        return library(workload.model, workload.batches, products), None
    workload.model.set_attn_implementation("eager")
    return library(workload.model, workload.batches, products), note


def probe_set(library: type[Library], name: WorkloadName) -> Workload:
    """Return the workload, with its probe set as one batch where that is the library's fastest."""
    workload = load(name)
    if library.one_batch:
        whole = {key: torch.cat([batch[key] for batch in workload.batches]) for key in workload.batches[0]}
        return Workload(workload.name, workload.model, [cast(Batch, whole)])
    return workload


def built(way: HvpEngine) -> tuple[Callable[[], object], float]:
    """Return an action that computes a product, and the peak memory of building and running it once."""
    made = []

    def build_and_multiply() -> None:
        made.append(way.build())
        made[0]()

    mebibytes = peak_memory(build_and_multiply)
    return made[0], mebibytes


def called(call: Call, products: Products, true: Truth) -> dict[str, Any]:
    """Return a call's results, errors and cost; or how it failed, and its products until then."""
    products.restart()
    first, started = len(products.ended), products.now()
    found: dict[str, Any]
    try:
        found = call.run()
        found |= errors(found, true)
    except OutOfTimeError:
        found = {"failed": over(products.seconds)}
    except Exception as error:
        found = {"failed": failure(error)}
    found |= {"call": call.text, "hvps": len(products.ended) - first, "seconds": products.now() - started}
    if call.planned and found["hvps"]:
        found["planned_hvps"] = call.planned
        found["expected_seconds"] = found["seconds"] * max(1.0, call.planned / found["hvps"])
    return {key: value for key, value in found.items() if key not in ("nodes", "weights")}


def errors(found: dict[str, Any], true: Truth) -> dict[str, float]:
    """Return the true errors of what was computed: relative ones, and the distance of densities."""
    relative = {}
    for name in ("lambda_max", "lambda_min", "trace"):
        if name in found:
            value = true.trace.value if name == "trace" and true.trace else getattr(true, name)
            relative[f"{name}_error"] = abs(found[name] - value) / abs(value)
    if "nodes" in found:
        run = Quadrature(torch.tensor(found["nodes"]).numpy(), torch.tensor(found["weights"]).numpy())
        relative["distance"] = true.distance(run)
    return relative


def over(limit: float) -> str:
    """Describe a call that was stopped."""
    return f"> {limit:.0f} s"


def within(found: Ends, *, true: Truth, ends: slice, target: float) -> bool:
    """Whether λ_max, λ_min or both are relatively as close as the target."""
    pairs = [(found.lambda_max, true.lambda_max), (found.lambda_min, true.lambda_min)][ends]
    return all(value is not None and abs(value - known) <= target * abs(known) for value, known in pairs)


def reached(history: Iterable[Ends], enough: Callable[[Ends], bool]) -> dict[str, Any] | None:
    """Where a run has come close enough and stays so, in the run that needs the fewest products; `None` if none does.

    Example:
        >>> run = [Ends("a", hvps, float(hvps), value, None) for hvps, value in enumerate([9.0, 7.0, 9.1, 9.0], 1)]
        >>> reached(run, lambda ends: abs(ends.lambda_max - 9) < 0.5)["hvps"]
        3
    """
    found = []
    for _, run in groupby(history, key=lambda ends: ends.run):
        arrived = None
        for ends in run:
            arrived = (arrived or ends) if enough(ends) else None
        if arrived is not None:
            found.append(arrived)
    return min(found, key=lambda ends: ends.hvps)._asdict() if found else None


def seconds(action: Callable[[], object]) -> float:
    """Time of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def memory(pid: int | str = "self", *, peak: bool = False) -> float:
    """Return the memory of a process in MiB, now or its peak since `peak_memory` began to watch."""
    key = "VmHWM" if peak else "VmRSS"
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    return 0.0  # a process that has just ended


def peak_memory(action: Callable[[], object]) -> float:
    """Return the peak memory of this process during a call, in MiB."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak before
    action()
    return memory(peak=True)


# The command: one process a row, results merged into one file.


def run_row(row: str, library: str, workload: WorkloadName, *, limit: float, max_mebibytes: float) -> dict[str, Any]:
    """Run one row in a separate process, within limits of time and memory."""
    command = [sys.executable, __file__, "--limit", str(limit), "--child", row, library, workload]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as complaints:
        with subprocess.Popen(command, stdout=output, stderr=complaints, env=environment) as process:
            stopped = watch(process, limit=limit, max_mebibytes=max_mebibytes)
        output.seek(0)
        complaints.seek(0)
        said = [json.loads(line) for line in output if line.startswith("{")]
        last_complaint = (complaints.read().strip().splitlines() or [""])[-1]
    result = next((line["result"] for line in said if "result" in line), None)
    if result is not None:
        return result
    hvps = max((line["hvps"] for line in said), default=0)
    return {"failed": stopped or f"ends with code {process.returncode}: {last_complaint}", "hvps": hvps}


def watch(process: subprocess.Popen[Any], *, limit: float, max_mebibytes: float) -> str | None:
    """Wait for a process; end it if it exceeds a limit of memory or time, and return which."""
    started = time.perf_counter()
    while process.poll() is None:
        time.sleep(0.5)
        try:
            used = memory(process.pid)
        except OSError:
            continue
        stopped = f"over {max_mebibytes / 1024:.0f} GiB" if used > max_mebibytes else None
        if time.perf_counter() - started > (MAX_CALLS + 1) * limit:  # a product does not end
            stopped = over(limit)
        if stopped:
            process.kill()
            process.wait()
            return stopped
    return None


def child(row: str, library: str, workload: WorkloadName, *, limit: float) -> None:
    """One row, in its own process; prints how many products it has made, and at last the result."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        result = ROWS[row](LIBRARIES[library], workload, Products(seconds=limit, announce=True))
    except OutOfTimeError:
        result = {"failed": over(limit)}
    except Exception as error:
        result = {"failed": failure(error)}
    print(json.dumps({"result": result}), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the requested rows; return 1 if this package missed its targets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=WORKLOADS)
    parser.add_argument("--library", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--limit", type=float, default=LIMIT, help="Seconds after which a call is stopped.")
    parser.add_argument("--max_gib", type=float, default=16, help="End a row that takes more memory.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="Folder of peers.json.")
    parser.add_argument("--tables", type=Path, default=TABLES, help="The Markdown file.")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        child(*options.child, limit=options.limit)
        return 0

    options.out.mkdir(exist_ok=True)
    options.tables.parent.mkdir(exist_ok=True)
    file = options.out / "peers.json"
    results = json.loads(file.read_text()) if file.exists() else {"truth": {}, "rows": {}}
    packages = ("torch", "transformers", *(LIBRARIES[library].package for library in options.library))
    results.setdefault("versions", {}).update({name: version(name) for name in packages})
    limit = max(options.limit, results.get("machine", {}).get("limit", 0))
    results["machine"] = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "limit": limit}
    for workload in options.workload:
        if set(options.rows) - {"cost", "features"}:
            results["truth"][workload] = truth(workload).summary()
        else:
            load(workload)
        for row in options.rows:
            for library in options.library:
                if not asked_of(row, library, workload) or (row == "features" and workload != options.workload[0]):
                    continue
                print(f"{workload}: {row} of {library}", flush=True)
                place = results["rows"].setdefault("any" if row == "features" else workload, {}).setdefault(row, {})
                place[library] = run_row(
                    row, library, workload, limit=options.limit, max_mebibytes=options.max_gib * 1024
                )
                file.write_text(json.dumps(results, indent=1) + "\n")
                options.tables.write_text(markdown(results))
    print(markdown(results))
    wrong = problems(results)
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
