# SPDX-License-Identifier: Apache-2.0
"""What a measurement takes on each of many processes: memory, and bytes sent for a product with the Hessian.

The formulas are those of `docs/scaling.md`. Two processes show that they hold: each operation that sends something is
counted, and so are the bytes of all tensors that are alive.

    python benchmarks/scaling.py --check

runs them over gloo on this machine and prints both side by side (half a minute).

    python benchmarks/scaling.py

rewrites the tables of the docs, of models and machines that are not at hand: formulas alone.
"""

from __future__ import annotations

import argparse
import math
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from hf_optimizability import OptimizabilityConfig, linalg
from hf_optimizability.curvature.central_difference import CentralDifferenceHessian
from hf_optimizability.curvature.hessian import HessianOperator
from hf_optimizability.distributed import fsdp
from hf_optimizability.distributed.fsdp import on_shards, unsharded
from hf_optimizability.distributed.process_group import training_process_group
from hf_optimizability.linalg.row_partition import RowPartition
from hf_optimizability.measurement.cost_model import CostModel, HvpCost, allocate_hvps, count_hvps, list_stages
from hf_optimizability.measurement.engines import HvpEngine
from hf_optimizability.measurement.forecast import PeakMemory
from hf_optimizability.measurement.measure import measure_objective
from hf_optimizability.model_state.measuring import measuring
from hf_optimizability.objective.objective import Objective


Route = Literal["DDP", "FSDP2, whole parameters", "FSDP2, shards"]
ROUTES: tuple[Route, ...] = ("DDP", "FSDP2, whole parameters", "FSDP2, shards")
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
WORD = 4  # bytes of a float32
GIGA = 1e9
SIGN_SECONDS = 1.0e-10  # to draw one sign on a CPU, as `--check` found on one core
BESIDES: dict[Route, int] = {"DDP": 4, "FSDP2, whole parameters": 4, "FSDP2, shards": 9}
"""Vectors in addition to those that the forecast counts: the gradient, the optimizer's P, and the weights to come back
from; then the gradient that a product is made from, or, while a difference is taken, the weights to restore, the
direction, the gradients ahead and behind, and one that is added to them."""


@dataclass(frozen=True)
class Case:
    """A model on a machine.

    Attributes:
        name: Of both.
        parameters: n, all of them trained.
        root: Parameters outside the layers (embeddings and head), which stay unsharded from forward to backward pass.
        layer: Parameters of one layer.
        group: R.
        batches: B, of the probe set.
        tokens: In the probe set.
        flops: Of one device in float32, each second.
        bandwidth: Bytes that one device sends each second.
        memory: Bytes of one device.
    """

    name: str
    parameters: float
    root: float
    layer: float
    group: int
    batches: int
    tokens: int
    flops: float
    bandwidth: float
    memory: float


CASES = [
    Case("7B on 8 GPUs", 6.74e9, 2.6e8, 2.02e8, 8, 4, 64 * 512, 5e13, 4.5e11, 8e10),
    Case("70B on 64 GPUs", 6.9e10, 5.2e8, 8.6e8, 64, 4, 64 * 512, 5e13, 5e10, 8e10),
]
"""Decoders of Llama's shapes; the standard profile's 64 examples, of 512 tokens each. H100 of 80 GB: 50 TFLOP/s in
float32, NVLink in one machine, 400 Gb/s for each device between machines."""


def sent_by_product(route: Route, parameters: float, root: float, group: int, batches: int) -> float:
    """Bytes that each rank sends for one product, by collectives along a ring."""
    share = (group - 1) / group
    if route != "FSDP2, shards":
        return 2 * WORD * parameters * share  # one sum
    gathered = parameters + (parameters - root)  # before the forward, and again before the backward pass
    return 2 * batches * WORD * (gathered + parameters) * share


def sent_once(route: Route, parameters: float, group: int) -> float:
    """Bytes that each rank sends to put the parameters together."""
    return WORD * parameters * (group - 1) / group if route == "FSDP2, whole parameters" else 0.0


def vectors(route: Route, config: OptimizabilityConfig, size: int) -> tuple[int, int]:
    """Vectors of a measurement at most: in all, and without the Lanczos basis, which may lie on the CPU."""
    nothing = HvpCost(0.0, 0)
    prices = CostModel(size, 1, 1, nothing, nothing, None, 0.0)
    engine = HvpEngine("double_backward", config.curvature, "math")
    shares = allocate_hvps(config, engine, preconditions=True)
    stages = list_stages(config, count_hvps(config, engine, shares, size=size, update=False), prices)
    trace = stages[2].vectors  # the stage that has no basis
    return BESIDES[route] + max(stage.vectors for stage in stages), BESIDES[route] + trace


def memory(route: Route, number: int, parameters: float, root: float, layer: float, group: int) -> float:
    """Bytes on each rank for so many vectors, and for the parameters besides the training's own."""
    if route == "FSDP2, shards":  # what FSDP puts together at once: the root, a layer and the next one
        return WORD * (number * parameters / group + root + 2 * layer)
    return WORD * (number * parameters + (parameters if route == "FSDP2, whole parameters" else 0))


class Sent(TorchDispatchMode):
    """Counts the bytes that this rank sends, as along a ring."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        group = dist.get_world_size()
        name = func.name().split("::")[-1].split(".")[0]
        if func.namespace in ("c10d", "_c10d_functional"):
            if name in ("allreduce_", "all_reduce", "all_reduce_"):
                self.bytes += 2 * _bytes(args[0]) * (group - 1) / group
            elif name in ("_reduce_scatter_base_", "reduce_scatter_tensor"):
                self.bytes += _bytes(args[1] if name.startswith("_") else args[0]) * (group - 1) / group
            elif name in ("_allgather_base_", "allgather_"):
                self.bytes += _bytes(args[1]) * (group - 1)
            elif name == "all_gather_into_tensor":
                self.bytes += _bytes(args[0]) * (group - 1)
            elif name not in ("wait_tensor", "_wrap_tensor_autograd", "barrier", "monitored_barrier_"):
                raise NotImplementedError(f"{func.name()} sends something that is not counted.")
        return func(*args, **(kwargs or {}))


def _bytes(tensors: Tensor | list[Tensor]) -> int:
    return sum(t.numel() * t.itemsize for t in ([tensors] if isinstance(tensors, Tensor) else tensors))


WIDTH, DEPTH, BATCHES = 512, 4, 3


def tower(route: Route) -> nn.Module:
    """Build a perceptron whose parameters outweigh everything else."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh()) for _ in range(DEPTH)]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 2, bias=False))
    if route == "DDP":
        return model  # what is measured is the model inside of the wrapper
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the loss."""
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def checked(route: Route) -> dict[str, float]:
    """Return the costs by formula and as counted, on this rank."""
    group = training_process_group(torch.device("cpu"))
    model = tower(route)
    size = sum(parameter.numel() for parameter in model.parameters())
    data = [(torch.randn(2, WIDTH), torch.randn(2, 2)) for _ in range(BATCHES)]
    objective = Objective(model, data, loss_fn=squares).shard(group)
    sent = {}
    with measuring(model, seed=0), Sent() as before:
        if route == "FSDP2, shards":
            with on_shards(objective) as shards:
                operator: Any = CentralDifferenceHessian(shards)
                sent["product"] = _second(operator)
        elif route == "FSDP2, whole parameters":
            with unsharded(model):
                sent["once"] = before.bytes
                sent["product"] = _second(HessianOperator(objective))
        else:
            sent["product"] = _second(HessianOperator(objective))
    config = OptimizabilityConfig(profile="light", eigen_tolerance=1e-12, trace_tolerance=1e-12)  # takes all it may
    free = fsdp.free_memory
    # Their copies in float64 have a fixed length, which is negligible for long vectors.
    linalg.vectors._CHUNK = linalg.trace._CHUNK = 1 << 14
    try:
        fsdp.free_memory = free if route != "FSDP2, shards" else (lambda device: 1)
        optimizer = torch.optim.AdamW(model.parameters())
        with PeakMemory() as peak:
            measure_objective(objective, config, optimizer=optimizer)
    finally:
        fsdp.free_memory = free
    root, layer = 2 * WIDTH, WIDTH**2
    number, _ = vectors(route, config, size)
    return {
        "bytes a product, formula": sent_by_product(route, size, root, group.world_size, BATCHES),
        "bytes a product, counted": sent["product"],
        "bytes once, formula": sent_once(route, size, group.world_size),
        "bytes once, counted": sent.get("once", 0.0),
        "memory, formula": memory(route, number, size, root, layer, group.world_size),
        "memory, counted": peak.bytes,
    }


def _second(operator: Any) -> float:
    """Bytes that a product sends, once the number of items is known."""
    vector = torch.ones(len(operator.rows))
    operator.matvec(vector)
    with Sent() as sent:
        operator.matvec(vector)
    return sent.bytes


def _rank(rank: int, group: int, folder: str, function: Callable[[], Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=group)
    found = function()
    if rank == 0:
        torch.save(found, f"{folder}/found")
    dist.destroy_process_group()


def check_all() -> dict[Route, dict[str, float]]:
    """All routes, in this process."""
    return {route: checked(route) for route in ROUTES}


def on_two_processes() -> dict[Route, dict[str, float]]:
    """Return the results of the first of two processes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(2, folder, check_all), nprocs=2)
        return torch.load(f"{folder}/found")


def tables() -> str:
    """Return the tables of the docs."""
    lines = []
    for case in CASES:
        n, R = case.parameters, case.group
        gradient = 6 * n * case.tokens / R / case.flops
        lines += [
            f"**{case.name}**: n = {n:.3g}, R = {R}, B = {case.batches}.",
            "",
            "| | vectors, GB a rank | without the basis | sent a product, GB | s sending | s computing | fits |",
            "|---|--:|--:|--:|--:|--:|---|",
        ]
        for route in ROUTES:
            sent = sent_by_product(route, n, case.root, R, case.batches)
            numbers = vectors(route, OptimizabilityConfig(), 10**9)
            all_of_it, least = (memory(route, number, n, case.root, case.layer, R) for number in numbers)
            own = 16 * n / (1 if route == "DDP" else R)
            fits = "yes" if own + all_of_it < case.memory else "no"
            if fits == "no" and own + least < case.memory:
                fits = "basis on the CPU"
            lines.append(
                f"| {route} | {all_of_it / GIGA:.0f} | {least / GIGA:.0f} | {sent / GIGA:.0f} "
                f"| {sent / case.bandwidth:.2g} | {2 * gradient:.2g} | {fits} |"
            )
        drawing = n * SIGN_SECONDS
        at_once = WORD * (case.root + 2 * case.layer)
        least_ranks = math.ceil((16 + WORD * numbers[1]) * n / (case.memory - at_once))
        lines += [
            "",
            f"Shards fit from {least_ranks} GPUs on, with the basis on the CPU. "
            f"Drawing a random vector takes each rank {drawing:.0f} s.",
            "",
        ]
    return "\n".join(lines)


def sign_seconds(size: int = 8 * 10**8) -> float:
    """How long drawing takes for each sign, on a rank that has next to none of them."""
    rows = RowPartition(size, (slice(0, 1),))
    started = time.perf_counter()
    rows.rademacher(generator=torch.Generator().manual_seed(0), dtype=torch.float32, device=torch.device("cpu"))
    return (time.perf_counter() - started) / size


def main() -> None:
    """Check the formulas, or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="run two processes and count")
    if parser.parse_args().check:
        for route, found in on_two_processes().items():
            print(route)
            for name, value in found.items():
                print(f"  {name:28}{value / 1e6:10.4f} MB")
        print(f"drawing a sign takes {sign_seconds():.1e} s")
        return
    text = re.sub(r"(?<=<!-- tables -->\n).*(?=<!-- end -->)", lambda _: tables(), DOCUMENT.read_text(), flags=re.S)
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    main()
