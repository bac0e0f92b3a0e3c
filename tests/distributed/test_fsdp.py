# SPDX-License-Identifier: Apache-2.0
"""FSDP2 on two and three processes: the numbers of one process, and a training that goes on as without measuring."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from launch import results
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

from hf_optimizability import Measurement, MeasurementError, OptimizabilityConfig, fsdp, measure
from hf_optimizability.curvature.central_difference import CentralDifferenceHessian
from hf_optimizability.curvature.operators import HessianOperator
from hf_optimizability.fsdp import on_shards, unsharded
from hf_optimizability.gradients import gradient
from hf_optimizability.objective import Objective
from hf_optimizability.parallel import training_ranks
from hf_optimizability.safety import math_attention, measuring
from hf_optimizability.supported import require_supported


MODELS = ["bert", "gpt2"]  # gpt2 has tied weights, and examples with different numbers of ignored labels
NUMBER = 7  # examples; in batches of 3 the last one leaves ranks without a share
CONFIG = OptimizabilityConfig(profile="light", max_hvps=16)
ON_SHARDS = OptimizabilityConfig(profile="light", max_hvps=16, engine="central_difference")


def sharded(name: str, policy: MixedPrecisionPolicy | None = None, **options: Any) -> nn.Module:
    """A model whose layers are sharded one by one. No dimension of 13, 7 or 4 can be cut into three equal pieces."""
    model = tiny_models.make(name, **options)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.bert.encoder.layer if name == "bert" else model.transformer.h:
        fully_shard(layer, mesh=mesh, mp_policy=policy or MixedPrecisionPolicy())
    return fully_shard(model, mesh=mesh, mp_policy=policy or MixedPrecisionPolicy())


def batches(name: str, **options: Any) -> list[dict[str, Tensor]]:
    return tiny_models.cut(tiny_models.examples(name, NUMBER, **options), 3)


def directions(size: int) -> Tensor:
    return torch.randn(size, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@contextmanager
def little_memory() -> Iterator[None]:
    """Whole parameters do not fit."""
    free, fsdp.free_memory = fsdp.free_memory, lambda device: 1
    try:
        yield
    finally:
        fsdp.free_memory = free


def products(name: str) -> dict[str, list[float]]:
    """The Hessian times two vectors by both routes, of what is sharded."""
    model = sharded(name)
    objective = Objective(model, batches(name)).shared(training_ranks(torch.device("cpu")))
    found = {}
    with measuring(model, seed=0), unsharded(model), math_attention():
        operator = HessianOperator(objective, ranks=objective.ranks)
        found["unsharded"] = operator.matmat(directions(operator.size)).tolist()
    with measuring(model, seed=0), on_shards(objective) as shards:
        differences = CentralDifferenceHessian(shards, rows=shards.rows)
        whole = torch.zeros(differences.size, 2, dtype=torch.float64)
        here = [i for part in differences.rows.here for i in range(part.start, part.stop)]
        whole[here] = differences.matmat(differences.rows.of(directions(differences.size)))
        found["on shards"] = objective.ranks.sum(whole).tolist()
        found["rows"] = [len(differences.rows), sum(p.numel() for p in shards.parameters)]
    return found


def measurement(name: str, config: OptimizabilityConfig, shard: Callable[..., nn.Module], **options: Any) -> Any:
    """All numbers of a measurement, with the optimizer's part, one step into training."""
    model = shard(name, **options)
    optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "lr": 1e-3}])
    data = batches(name, **options)
    model.eval()
    model(**data[0]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return numbers(measure(model, data, config, optimizer=optimizer))


def numbers(found: Measurement) -> dict[str, float]:
    flat: dict[str, float] = {}

    def flatten(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                flatten(inner, f"{name}.{key}")
        elif isinstance(value, (list, tuple)):
            for index, inner in enumerate(value):
                flatten(inner, f"{name}.{index}")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[name] = float(value)

    data = found.to_dict()
    flatten({key: value for key, value in data.items() if key not in ("seconds", "hessian")}, "")
    hessian = found.hessian
    for key in ("trace", "lambda_max", "lambda_min"):
        estimate = getattr(hessian, key)
        flat |= {f"{key}.value": estimate.value, f"{key}.data": estimate.data_std_error or 0.0}
    flat |= {"trace.error": hessian.trace.std_error, "frobenius": hessian.density.frobenius_norm.value}
    return flat


def training(interrupt: Callable[[nn.Module], None] | None) -> str:
    """Digest of this rank's shards and optimizer state after a few steps, between which something is measured."""
    model = sharded("bert", dtype=torch.float32, policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(4)
    data = batches("bert", dtype=torch.float32)
    for step in range(3):
        for index, batch in enumerate(data):
            model.set_requires_gradient_sync(index == len(data) - 1)
            model(**batch).loss.backward()
            if interrupt is not None and step == 1 and index != 1:
                interrupt(model)
        optimizer.step()
        optimizer.zero_grad()
    digest = hashlib.sha256(str(torch.rand(1)).encode())
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        for tensor in (parameter.detach(), state["exp_avg"], state["exp_avg_sq"]):
            digest.update(tensor.to_local().contiguous().numpy().tobytes())
    return digest.hexdigest()


def interruption(model: nn.Module, *, shards: bool, fails: bool) -> None:
    calls = 0

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        if fails and calls == 4:
            model(**batch)  # a pass that gets no backward pass
            raise KeyError("in the middle")
        return model(**batch).loss

    with little_memory() if shards else nullcontext():
        try:
            measure(model, batches("bert", dtype=torch.float32)[::2], CONFIG, loss_fn=loss_fn)
        except MeasurementError as error:
            assert fails and "in the middle" in str(error), error
        else:
            assert not fails


def in_full_precision(shards: bool) -> list[float]:
    """The gradient of a model that trains in bfloat16."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    model = sharded("bert", dtype=torch.float32, policy=policy)
    data = batches("bert", dtype=torch.float32)
    model(**data[0]).loss.backward()
    objective = Objective(model, data).shared(training_ranks(torch.device("cpu")))
    if shards:
        with measuring(model, seed=0), on_shards(objective) as objective:
            return objective.rows.ranks.gather([float(t.square().sum()) for t in gradient(objective).tensors])
    with measuring(model, seed=0), unsharded(model):
        return [float(tensor.square().sum()) for tensor in gradient(objective, ranks=objective.ranks).tensors]


def refusal(action: Callable[[], Any]) -> str:
    try:
        action()
    except (MeasurementError, ValueError) as error:
        return str(error)
    return "none"


def refusals() -> dict[str, str]:
    world = torch.distributed.get_world_size()
    mesh, replicas = init_device_mesh("cpu", (world,)), init_device_mesh("cpu", (1, world), mesh_dim_names=("replicate", "shard"))
    found = {}

    def on_the_shards_of(model: nn.Module, config: OptimizabilityConfig = ON_SHARDS) -> str:
        with little_memory():
            return refusal(lambda: measure(model, batches("bert", dtype=torch.float32), config))

    found["bfloat16"] = on_the_shards_of(sharded("bert", dtype=torch.bfloat16))
    found["replicas"] = on_the_shards_of(fully_shard(tiny_models.make("bert", dtype=torch.float32), mesh=replicas))
    gauss_newton = OptimizabilityConfig(curvature="gauss_newton")
    found["gauss_newton"] = on_the_shards_of(sharded("bert", dtype=torch.float32), gauss_newton)
    found["fsdp1"] = refusal(lambda: require_supported(FullyShardedDataParallel(nn.Linear(4, 4))))

    def split(name: str, module: nn.Module, mesh: Any) -> None:
        for key, parameter in module.named_parameters(recurse=False):
            module.register_parameter(key, nn.Parameter(distribute_tensor(parameter, mesh, [Shard(0)])))

    tensor_parallel = distribute_module(nn.Linear(6, 6), mesh, split)
    found["tensor parallel"] = refusal(lambda: require_supported(tensor_parallel))
    assert Replicate()
    return found


def checks(rank: int) -> dict[str, Any]:
    """One start of processes for all."""
    t = time.time()
    found: dict[str, Any] = {name: products(name) for name in MODELS}
    print("products", time.time()-t); t = time.time()
    found["measure"] = measurement("gpt2", CONFIG, sharded)
    print("measure", time.time()-t); t = time.time()
    with little_memory():
        found["measure on shards"] = measurement("gpt2", CONFIG, sharded)
    print("measure on shards", time.time()-t); t = time.time()
    found["float32"] = measurement("bert", CONFIG, sharded, dtype=torch.float32)
    print("measure float32", time.time()-t); t = time.time()
    found["training"] = training(None)
    for shards in (False, True):
        for fails in (False, True):
            found[f"training {shards} {fails}"] = training(partial(interruption, shards=shards, fails=fails))
    print("training", time.time()-t); t = time.time()
    for shards in (False, True):
        found[f"precision {shards}"] = in_full_precision(shards)
    print("precision", time.time()-t); t = time.time()
    found["refusals"] = refusals()
    print("refusals", time.time()-t); t = time.time()
    assert not any(isinstance(m, FSDPModule) for m in tiny_models.make("bert").modules())
    return found


@pytest.fixture(scope="module", params=[2, 3])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results(checks, request.param, tmp_path_factory.mktemp("fsdp"))


if __name__ == "__main__":
    import sys, time
    import launch
    t = time.time()
    import tempfile
    r = launch.on_ranks(checks, int(sys.argv[1]), Path(tempfile.mkdtemp()))
    for x in r:
        if isinstance(x, launch.Failed): print(x.trace)
    print(time.time() - t, math.pi)
    torch.save(r, "/tmp/found.pt")
