# SPDX-License-Identifier: Apache-2.0
"""FSDP2 on two and three processes: the numbers of one process, and a training that goes on as without measuring."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

from hf_optimizability import Measurement, MeasurementError, OptimizabilityConfig, measure
from hf_optimizability.curvature.central_difference import CentralDifferenceHessian
from hf_optimizability.curvature.gradient import gradient
from hf_optimizability.curvature.hessian import HessianOperator
from hf_optimizability.distributed.fsdp import on_shards, unsharded
from hf_optimizability.distributed.fsdp_internals import collectives_are_synchronized
from hf_optimizability.distributed.process_group import training_process_group
from hf_optimizability.distributed.supported import require_supported
from hf_optimizability.distributed.tensors import norms_over_ranks
from hf_optimizability.model_state.measuring import math_attention, measuring
from hf_optimizability.objective.objective import Objective
from tests.support import tiny_models
from tests.support.little_memory import little_memory
from tests.support.ranks import results


MODELS = ["bert", "gpt2"]  # gpt2 has tied weights, and examples with different numbers of ignored labels
ROUNDING = re.compile(r"^\.self_check|^\.eigenvalue_checks\.\d+\.differences")
"""Numbers that are rounding errors, or full of them: another CPU has others."""

NUMBER = 7  # examples; in batches of 3 the last one leaves ranks without a share
CONFIG = OptimizabilityConfig(profile="light", max_hvps=16, landscape=True)
ALL_INTERRUPTIONS = [*itertools.product([False, True], repeat=2)]
INTERRUPTIONS = [(False, False), (True, True)]
"""Whether on shards, and whether the measurement fails; all of them on three processes, by `make test-slow`."""

ON_SHARDS = {2: replace(CONFIG, landscape=False), 3: CONFIG}
"""By the number of processes: slices through the landscape take long."""


def whole(name: str, *, frozen: bool = False, **options: Any) -> nn.Module:
    model = tiny_models.make(name, **options)
    if frozen:  # else one process leaves out the rows that are not looked up, and draws shorter vectors
        model.bert.embeddings.requires_grad_(False)
    return model


def sharded(name: str, policy: MixedPrecisionPolicy | None = None, **options: Any) -> nn.Module:
    """A model whose layers are sharded one by one. No dimension of 13, 7 or 4 can be cut into three equal pieces."""
    model = whole(name, **options)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.bert.encoder.layer if name == "bert" else model.transformer.h:
        fully_shard(layer, mesh=mesh, mp_policy=policy or MixedPrecisionPolicy())
    return fully_shard(model, mesh=mesh, mp_policy=policy or MixedPrecisionPolicy())


def batches(name: str, **options: Any) -> list[dict[str, Tensor]]:
    return tiny_models.cut(tiny_models.examples(name, NUMBER, **options), 3)


def directions(size: int) -> Tensor:
    return torch.randn(size, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def products(name: str) -> dict[str, list[float]]:
    """The Hessian times two vectors by both routes, of what is sharded."""
    model = sharded(name, **tiny_models.TWO_LAYERS[name])
    objective = Objective(model, batches(name)).shard(training_process_group(torch.device("cpu")))
    found = {}
    with measuring(model, seed=0), unsharded(model), math_attention():
        operator = HessianOperator(objective)
        found["unsharded"] = operator.matmat(directions(operator.size)).tolist()
    with measuring(model, seed=0), on_shards(objective) as shards:
        differences = CentralDifferenceHessian(shards)
        whole = torch.zeros(differences.size, 2, dtype=torch.float64)
        here = [i for part in differences.rows.local for i in range(part.start, part.stop)]
        whole[here] = differences.matmat(differences.rows.select(directions(differences.size)))
        found["on shards"] = objective.group.all_reduce_(whole).tolist()
        found["rows"] = [len(differences.rows), sum(p.numel() for p in shards.parameters)]
    return found


def measurement(name: str, config: OptimizabilityConfig, shard: Callable[..., nn.Module], **options: Any) -> Any:
    """All numbers of a measurement, with the optimizer's part, one step into training."""
    model = shard(name, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = batches(name, **options)
    model.eval()
    model(**data[0]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return numbers(measure(model, data, config, optimizer=optimizer))


def sums(model: nn.Module) -> tuple[float, str]:
    """The loss of a model whose loss is a sum over the examples, and what it is taken for a mean over."""

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch).loss * len(batch["labels"])

    config = OptimizabilityConfig(profile="light", max_hvps=16, engine="central_difference")
    # Two ranks would split a batch of two as its halves are split.
    pairs = tiny_models.cut(tiny_models.examples("bert", 6), 2)
    found = measure(model, pairs, config, loss_fn=loss_fn)
    return found.loss, found.self_check.unit


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
                assert not collectives_are_synchronized(model)
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
        if fails and calls == 3:
            model(**batch)  # a pass that gets no backward pass
            raise KeyError("in the middle")
        return model(**batch).loss

    config = ON_SHARDS[torch.distributed.get_world_size()]
    with little_memory() if shards else nullcontext():
        try:
            measure(model, batches("bert", dtype=torch.float32)[:1], config, loss_fn=loss_fn)
        except MeasurementError as error:
            assert fails and "in the middle" in str(error), error
        else:
            assert not fails


def failing_on_one_rank(model: nn.Module, *, place: str) -> None:
    """Measures on shards, where the last rank's pass breaks off in a layer while the others go on."""
    fails = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    failing = ValueError if place != "memory" else torch.OutOfMemoryError
    passes = itertools.count(1)  # a plain number in a hook's closure would be wound back before each pass

    def fail(*call: Any) -> None:
        if next(passes) == 3 and fails:
            raise failing("in the middle")

    layer = model.bert.encoder.layer[0].attention
    register = layer.register_full_backward_hook if place == "backward" else layer.register_forward_hook
    hook = register(fail)
    try:
        with little_memory():
            measure(model, batches("bert", dtype=torch.float32)[:1], ON_SHARDS[2])
    except MeasurementError as error:
        assert place != "memory" and "in the middle" in str(error), error
    else:
        assert place == "memory" and next(passes) > 4  # goes on with smaller pieces
    finally:
        hook.remove()


def in_full_precision(shards: bool) -> list[float]:
    """The gradient of a model that trains in bfloat16."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    model = sharded("bert", dtype=torch.float32, policy=policy)
    data = batches("bert", dtype=torch.float32)
    model(**data[0]).loss.backward()
    objective = Objective(model, data).shard(training_process_group(torch.device("cpu")))
    if shards:
        with measuring(model, seed=0), on_shards(objective) as objective:
            return objective.rows.group.all_gather_interleaved(
                [float(t.square().sum()) for t in gradient(objective).tensors]
            )
    with measuring(model, seed=0), unsharded(model):
        return [float(tensor.square().sum()) for tensor in gradient(objective).tensors]


def gradient_norms() -> dict[str, float]:
    """Of the gradients as training leaves them."""
    model = sharded("bert").eval()
    model(**batches("bert")[0]).loss.backward()
    head = [parameter.grad for name, parameter in model.named_parameters() if "classifier" in name]
    return {name: float(norm) for name, norm in norms_over_ranks({"head": head, "one": head[:1]}).items()}


def refusal(action: Callable[[], Any]) -> str:
    try:
        action()
    except (MeasurementError, ValueError) as error:
        return str(error)
    return "none"


def refusals() -> dict[str, str]:
    world = torch.distributed.get_world_size()
    mesh, replicas = (
        init_device_mesh("cpu", (world,)),
        init_device_mesh("cpu", (1, world), mesh_dim_names=("replicate", "shard")),
    )
    found = {}

    def on_the_shards_of(model: nn.Module, config: OptimizabilityConfig = CONFIG) -> str:
        with little_memory():
            return refusal(lambda: measure(model, batches("bert", dtype=torch.float32), config))

    found["bfloat16"] = on_the_shards_of(sharded("bert", dtype=torch.bfloat16))
    found["replicas"] = on_the_shards_of(fully_shard(tiny_models.make("bert", dtype=torch.float32), mesh=replicas))
    gauss_newton = OptimizabilityConfig(curvature="gauss_newton")
    found["gauss_newton"] = on_the_shards_of(sharded("bert", dtype=torch.float32), gauss_newton)

    def split(name: str, module: nn.Module, mesh: Any) -> None:
        for key, parameter in module.named_parameters(recurse=False):
            module.register_parameter(key, nn.Parameter(distribute_tensor(parameter, mesh, [Shard(0)])))

    tensor_parallel = distribute_module(nn.Linear(6, 6), mesh, split)
    found["tensor parallel"] = refusal(lambda: require_supported(tensor_parallel))
    return found


def checks(rank: int) -> dict[str, Any]:
    """One start of processes for all."""
    found: dict[str, Any] = {"products": {name: products(name) for name in MODELS}}
    found["unsharded"] = measurement("gpt2", CONFIG, sharded)
    config = ON_SHARDS[torch.distributed.get_world_size()]
    found["float32"] = measurement("bert", config, sharded, dtype=torch.float32)
    with little_memory():
        found["on shards"] = measurement("bert", config, partial(sharded, frozen=True))
        found["sums"] = sums(sharded("bert", dtype=torch.float64))
    found["training"] = training(None)
    for shards, fails in ALL_INTERRUPTIONS if torch.distributed.get_world_size() > 2 else INTERRUPTIONS:
        interrupt = partial(interruption, shards=shards, fails=fails)
        found[f"training, {shards=}, {fails=}"] = training(interrupt)
    places = ["forward", "backward", "memory"][: torch.distributed.get_world_size()]  # the last one takes long
    found["one fails"] = {place: training(partial(failing_on_one_rank, place=place)) for place in places}
    found["norms"] = gradient_norms()
    found["precision"] = {shards: in_full_precision(shards) for shards in (False, True)}
    found["refusals"] = refusals()
    return found


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results(checks, request.param, tmp_path_factory.mktemp("fsdp"))


@cache
def alone(name: str, dtype: torch.dtype, *, landscape: bool, as_on_shards: bool = False) -> dict[str, float]:
    """The measurement of one process."""
    config = replace(CONFIG, landscape=landscape, engine="central_difference" if as_on_shards else "auto")
    return measurement(name, config, partial(whole, frozen=as_on_shards), dtype=dtype)


@pytest.mark.parametrize("name", MODELS)
def test_products_are_those_of_the_dense_hessian(name: str, found: list[dict[str, Any]]):
    model = tiny_models.make(name, **tiny_models.TWO_LAYERS[name]).eval()
    hessian = tiny_models.dense_hessian(model, tiny_models.cut(tiny_models.examples(name, NUMBER), NUMBER)[0])
    truth = hessian @ directions(len(hessian))

    def error(product: list[list[float]]) -> float:
        return float((torch.tensor(product, dtype=torch.float64) - truth).norm() / truth.norm())

    # GPT-2 computes its loss in float32, which central differences magnify.
    exact, differences = {"bert": (1e-14, 1e-7), "gpt2": (1e-6, 1e-2)}[name]
    for result in found:
        assert error(result["products"][name]["unsharded"]) < exact
        assert error(result["products"][name]["on shards"]) < differences


def test_shards_are_uneven_and_each_row_is_somewhere(found: list[dict[str, Any]]):
    lengths = [result["products"]["bert"]["rows"] for result in found]
    assert all(rows == entries for rows, entries in lengths)
    assert len({rows for rows, _ in lengths}) > 1
    assert sum(rows for rows, _ in lengths) == sum(
        p.numel() for p in tiny_models.make("bert", **tiny_models.TWO_LAYERS["bert"]).parameters()
    )


def test_whole_parameters_give_the_numbers_of_one_process(found: list[dict[str, Any]]):
    for result in found:
        assert_close(result["unsharded"], alone("gpt2", torch.float64, landscape=True), 1e-10)
        landscape = ON_SHARDS[len(found)].landscape
        assert_close(result["float32"], alone("bert", torch.float32, landscape=landscape), 1e-5)


def test_shards_give_the_numbers_of_central_differences_in_one_process(found: list[dict[str, Any]]):
    landscape = ON_SHARDS[len(found)].landscape
    expected = alone("bert", torch.float64, landscape=landscape, as_on_shards=True)
    exact = [".loss", ".grad_norm", ".noise_scale.value", ".blocks.head.grad_norm", ".blocks.layer.0.weight_norm"]
    for result in found:
        measured = result["on shards"]
        # How far a difference is off says itself how far it is off from one process to the next.
        assert measured.pop(".central_difference_error") == pytest.approx(
            expected[".central_difference_error"], abs=1e-7
        )
        assert_close(
            measured, {key: value for key, value in expected.items() if key != ".central_difference_error"}, 1e-5
        )
        assert_close({key: measured[key] for key in exact}, {key: expected[key] for key in exact}, 1e-10)


def test_on_shards_a_loss_that_is_no_mean_is_kept_whole(found: list[dict[str, Any]]):
    """The ranks split no batch of it, since their shares would not add up to it."""
    loss, unit = sums(whole("bert"))
    for result in found:
        assert result["sums"] == (pytest.approx(loss, rel=1e-10), unit)
    assert unit == "batches"


def assert_close(measured: dict[str, float], expected: dict[str, float], tolerance: float) -> None:
    measured, expected = (
        {key: value for key, value in numbers.items() if not ROUNDING.search(key)} for numbers in (measured, expected)
    )
    assert measured.keys() == expected.keys()
    for key, value in expected.items():
        assert measured[key] == pytest.approx(value, rel=tolerance, abs=1e-3 * tolerance), key


def test_training_goes_on_bit_for_bit(found: list[dict[str, Any]]):
    """In mixed precision, measured between micro-batches that have accumulated, and before an optimizer's step."""
    for result in found:
        interrupted = [digest for name, digest in result.items() if name.startswith("training, ")]
        assert len(interrupted) >= 2 and set(interrupted) == {result["training"]}
    assert len({result["training"] for result in found}) == len(found)


def test_a_pass_that_fails_on_one_rank_fails_on_all(found: list[dict[str, Any]]):
    """And training goes on bit for bit."""
    for result in found:
        assert len(result["one fails"]) == len(found)
        assert set(result["one fails"].values()) == {result["training"]}


def test_norms_of_gradients_in_training(found: list[dict[str, Any]]):
    model = whole("bert")
    model.eval()
    model(**batches("bert")[0]).loss.backward()
    weight, bias = model.classifier.weight.grad, model.classifier.bias.grad
    for result in found:
        assert result["norms"]["one"] == pytest.approx(float(weight.norm()), rel=1e-10)
        assert result["norms"]["head"] == pytest.approx(float(torch.cat([weight.flatten(), bias]).norm()), rel=1e-10)


def test_mixed_precision_is_set_aside(found: list[dict[str, Any]]):
    model = whole("bert", dtype=torch.float32).eval()
    tensors = gradient(Objective(model, batches("bert", dtype=torch.float32))).tensors
    truth = sum(float(tensor.square().sum()) for tensor in tensors)
    with torch.autocast("cpu", torch.bfloat16):
        tensors = gradient(Objective(model, batches("bert", dtype=torch.float32))).tensors
    assert sum(float(tensor.square().sum()) for tensor in tensors) != pytest.approx(truth, rel=1e-4)
    for result in found:
        assert sum(result["precision"][False]) == pytest.approx(truth, rel=1e-6)
        assert sum(result["precision"][True]) == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("bfloat16", "the shards are in torch.bfloat16"),
        ("replicas", "over all processes"),
        ("gauss_newton", "on shards only the Hessian can be computed"),
        ("tensor parallel", "tensor parallelism"),
    ],
)
def test_what_can_not_be_measured_is_told(case: str, message: str, found: list[dict[str, Any]]):
    for result in found:
        assert message in result["refusals"][case]
