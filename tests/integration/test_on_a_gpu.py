# SPDX-License-Identifier: Apache-2.0
"""On a GPU: the numbers of the CPU, a training that goes on as without measuring, and memory that runs out."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.utils.import_utils import enable_tf32

from hf_optimizability import Measurement, OptimizabilityCallback, OptimizabilityConfig, measure
from hf_optimizability.device_memory import free_memory
from hf_optimizability.linalg import lanczos
from hf_optimizability.measurement.measure import measure_objective
from hf_optimizability.objective.objective import Objective
from tests.support import tiny_models, tiny_training
from tests.support.measurement_differences import differences
from tests.support.tiny_training import CONFIG
from tests.support.training_outcome import assert_equal, run


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

GPU = "cuda"
ENGINES = ["double_backward", "forward_over_reverse", "central_difference"]
# Single numbers may be sums that nearly cancel; float32 is summed in another order on each device.
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-7}


def mean_square(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    return model(batch[0]).square().mean()


def on(device: str, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]


def measured(device: str, name: str, dtype: torch.dtype, **options: Any) -> dict[str, Any]:
    """All numbers of a measurement, with those of AdamW's preconditioned Hessian."""
    model = tiny_models.make(name, dtype=dtype).to(device)
    batches = on(device, tiny_models.cut(tiny_models.examples(name, 9, dtype=dtype), 2))
    config = OptimizabilityConfig(**{"max_hvps": 40, **options})
    return numbers(measure(model, batches, config, optimizer=torch.optim.AdamW(model.parameters())))


def numbers(measurement: Measurement) -> dict[str, Any]:
    """But the density's nodes: those next to zero hold on to rounding."""
    found = measurement.to_dict()
    for key in ("nodes", "weights"):
        del found["hessian"]["density"][key]
    return found


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_the_numbers_are_those_of_the_cpu(name: str, engine: str):
    if engine == "forward_over_reverse" and name in ("gpt2", "llama"):
        engine = "auto"  # their tiny losses are in float32 whatever the weights, which both engines see alike
    dtype = torch.float32 if name in ("gpt2", "llama") else torch.float64
    found, expected = (measured(device, name, dtype, engine=engine) for device in (GPU, "cpu"))
    # Rounding is divided by the step of a difference.
    tolerance = TOLERANCES[dtype] * (10 if engine == "central_difference" and dtype == torch.float32 else 1)
    for result in (found, expected):
        result.pop("central_difference_error", None)  # is nothing else than rounding
    assert not differences(found, expected, tolerance=tolerance)


@pytest.mark.parametrize("curvature", ["gauss_newton", "empirical_fisher"])
def test_other_matrices_are_those_of_the_cpu(curvature: str):
    found, expected = (measured(device, "bert", torch.float64, curvature=curvature) for device in (GPU, "cpu"))
    assert not differences(found, expected, tolerance=1e-7)


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_not_in_the_numbers(allowed: bool):
    """A convolution and products wide enough for it; convolutions are in TF32 by torch's default."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64 * 36, 64), nn.Tanh())
    batch = (torch.randn(8, 64, 8, 8),)

    def lambda_max(device: str, dtype: torch.dtype) -> float:
        copied = copy.deepcopy(model).to(device, dtype)
        moved = tuple(tensor.to(device, dtype) for tensor in batch)
        config = OptimizabilityConfig(profile="light", max_hvps=16)
        return measure(copied, [moved], config, loss_fn=mean_square).hessian.lambda_max.value

    enable_tf32(allowed)
    try:
        assert lambda_max(GPU, torch.float32) == pytest.approx(lambda_max("cpu", torch.float64), rel=1e-5)
    finally:
        enable_tf32(False)
        torch.backends.fp32_precision = "none"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_half_precision_weights_are_measured_in_float32(dtype: torch.dtype, attention: str):
    options = {"hidden_size": 64, "num_attention_heads": 4}
    model = tiny_models.make("bert", dtype=dtype, attn_implementation=attention, **options)
    rows = tiny_models.cut(tiny_models.examples("bert", 8), 4)
    found = measure(copy.deepcopy(model).to(GPU), on(GPU, rows), OptimizabilityConfig(max_hvps=24))
    expected = measure(model, rows, OptimizabilityConfig(max_hvps=24))
    assert not differences(numbers(found), numbers(expected), tolerance=1e-3)


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without it, two trainings without any callback end differently already."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def train(folder: Path, name: str, **options: Any) -> dict[str, Any]:
    found = run(tiny_training.trainer(folder, name, use_cpu=False, **options))
    return {**found, "GPU's rng": torch.cuda.get_rng_state()}


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}, {"tf32": True}], ids=str)
@pytest.mark.parametrize("name", ["bert", "mobilenet"])
def test_training_is_the_same(tmp_path: Path, name: str, precision: dict[str, bool], deterministic: None):
    """Bit for bit, also with the scaled loss of fp16, whose scale is part of the training."""
    options = {**precision, "optim": "adamw_torch", "eval_dataset": tiny_training.dataset(name, 8)}
    options |= {"eval_strategy": "steps", "eval_steps": 3}
    plain = train(tmp_path, name, **options)
    callback = OptimizabilityCallback(OptimizabilityConfig(**CONFIG))
    assert_equal(train(tmp_path, name, callbacks=[callback], **options), plain)
    assert len(callback.report.measurements) == 4 and not callback.report.failures


def test_a_compiled_model_is_measured_as_it_is(tmp_path: Path):
    callback = OptimizabilityCallback(OptimizabilityConfig(**CONFIG))
    trainer = tiny_training.trainer(tmp_path, use_cpu=False, torch_compile=True, callbacks=[callback])
    trainer.train()
    assert len(callback.report.measurements) == 4 and not callback.report.failures


def wide() -> tuple[nn.Module, list[tuple[Tensor]]]:
    """A model whose activations, 16 MiB for each of 64 examples, are what takes memory."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)).to(GPU)
    return model, [(torch.randn(64, 2**16, 64, device=GPU),)]


def test_memory_is_given_back():
    model, batches = wide()
    before = torch.cuda.memory_allocated()
    measure(model, batches, OptimizabilityConfig(profile="light", max_hvps=16), loss_fn=mean_square)
    assert torch.cuda.memory_allocated() - before < 2**22  # libraries' workspaces


def test_batches_are_halved_until_they_fit():
    model, batches = wide()
    objective = Objective(model, batches, loss_fn=mean_square)
    config = OptimizabilityConfig(profile="light", max_hvps=16)
    torch.cuda.reset_peak_memory_stats()
    expected, whole = measure_objective(objective, config)
    room = torch.cuda.max_memory_allocated() / 3
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(
        (room + torch.cuda.memory_allocated()) / torch.cuda.get_device_properties(0).total_memory
    )
    try:
        found, cut = measure_objective(objective, config)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert cut.batch_size < whole.batch_size == 64
    for name in ("lambda_max", "trace"):
        value, other = (getattr(each.hessian, name).value for each in (found, expected))
        assert value == pytest.approx(other, rel=1e-3)


def test_a_basis_that_does_not_fit_lies_on_the_cpu(monkeypatch: pytest.MonkeyPatch):
    expected = measured(GPU, "bert", torch.float64)
    monkeypatch.setattr(lanczos, "free_memory", lambda device: 10**9 if device.type == "cpu" else 1)
    assert not differences(measured(GPU, "bert", torch.float64), expected, tolerance=1e-7)


def test_what_torch_keeps_counts_as_free():
    torch.cuda.empty_cache()
    before = free_memory(torch.device(GPU))
    held = torch.empty(2**30, dtype=torch.uint8, device=GPU)
    assert before - free_memory(torch.device(GPU)) == pytest.approx(2**30, rel=0.05)
    del held  # torch keeps it
    assert before - free_memory(torch.device(GPU)) < 2**26


@pytest.fixture
def nccl(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("nccl", f"file://{tmp_path}/store", rank=0, world_size=1, device_id=torch.device(GPU, 0))
    yield
    dist.destroy_process_group()


def test_shards_over_nccl(nccl: None):
    """One rank of it: a single GPU has no more."""
    batches = on(GPU, tiny_models.cut(tiny_models.examples("bert", 8, dtype=torch.float32), 2))
    config = OptimizabilityConfig(profile="light", max_hvps=16)
    found = []
    for shard in (False, True):
        model = tiny_models.make("bert", dtype=torch.float32).to(GPU)
        model.bert.embeddings.requires_grad_(False)  # else whole ones leave out the rows that are not looked up
        if shard:
            mesh = init_device_mesh(GPU, (1,))
            for layer in model.bert.encoder.layer:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        found.append(numbers(measure(model, batches, config)))
    assert not differences(*found, tolerance=1e-4)
