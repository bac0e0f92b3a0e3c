# SPDX-License-Identifier: Apache-2.0
"""Canaries: each private attribute of torch's FSDP2 that we use exists, and does what we rely on."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import hf_optimizability
from hf_optimizability import MeasurementError
from hf_optimizability.distributed import fsdp_internals
from hf_optimizability.distributed.fsdp_internals import (
    GROUP_ATTRIBUTES,
    PARAMETER_ATTRIBUTES,
    STATE_ATTRIBUTES,
    collectives_are_synchronized,
    require_known_internals,
    shard_precision,
    synchronized_collectives,
    without_unshard_hooks,
)
from hf_optimizability.distributed.tensors import full_tensor, reshard
from hf_optimizability.linalg.communicator import ProcessGroup
from tests.support.ranks import results


BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
INPUTS = torch.linspace(-1, 1, 12).view(4, 3)


def plain_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def sharded_model(policy: MixedPrecisionPolicy | None = None) -> Any:
    """A model with a group of its own for the first layer, and one for what is left."""
    model = plain_model()
    options: dict[str, Any] = {"mesh": init_device_mesh("cpu", (2,)), "mp_policy": policy or MixedPrecisionPolicy()}
    fully_shard(model[0], **options)
    return fully_shard(model, **options)


def groups_of(model: nn.Module) -> list[Any]:
    return fsdp_internals._groups(model)


def backward(model: nn.Module) -> list[Tensor]:
    model(INPUTS).square().sum().backward()
    return gradients(model)


def gradients(model: nn.Module) -> list[Tensor]:
    return [full_tensor(cast(Tensor, parameter.grad)) for parameter in model.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def the_state_of_modules_sharded_together_is_one() -> None:
    """`_get_fsdp_state`."""
    model = plain_model()
    fully_shard([model[0], model[2]], mesh=init_device_mesh("cpu", (2,)))
    assert model[0]._get_fsdp_state() is model[2]._get_fsdp_state()
    assert len(fsdp_internals._states(model)) == 1


def groups_hold_each_parameter_once() -> None:
    """`_fsdp_param_groups` and `fsdp_params`."""
    model = sharded_model()
    assert [len(group.fsdp_params) for group in groups_of(model)] == [2, 2]


def the_root_is_known_after_a_pass() -> None:
    """`_is_root`."""
    model = sharded_model()
    model(INPUTS)
    assert model._get_fsdp_state()._is_root and not model[0]._get_fsdp_state()._is_root


def gradients_are_those_of_the_shards_precision() -> None:
    """`_mp_policy`, `mp_policy` and `_init_mp_dtypes`; `all_gather_outputs` and `_unsharded_param` are made again."""
    expected = backward(plain_model())
    model = sharded_model(BFLOAT16)
    rounded = backward(model)
    assert model(INPUTS).dtype == torch.bfloat16 and not equal(rounded, expected)
    reshard(model)
    model.zero_grad()
    with shard_precision(model):
        assert equal(backward(model), expected)
    model.zero_grad()
    assert equal(backward(model), rounded)
    assert model._get_fsdp_state()._mp_policy == groups_of(model)[0].mp_policy == BFLOAT16


def dtypes_follow_the_policy_of_the_group() -> None:
    """`_init_mp_dtypes`."""
    model = sharded_model(BFLOAT16)
    model(INPUTS)
    group = groups_of(model)[0]
    assert group.fsdp_params[0].param_dtype == torch.bfloat16
    group.mp_policy = MixedPrecisionPolicy()
    group._init_mp_dtypes()
    assert group.fsdp_params[0].param_dtype is None


def buffers_appear_with_the_first_pass_and_keep_their_dtype() -> None:
    """`all_gather_outputs` and `_unsharded_param`."""
    model = sharded_model(BFLOAT16)
    parameter = groups_of(model)[0].fsdp_params[0]
    assert parameter.all_gather_outputs == [] and "_unsharded_param" not in vars(parameter)
    model(INPUTS)
    assert parameter._unsharded_param.dtype == parameter.all_gather_outputs[0].dtype == torch.bfloat16
    buffers = parameter.all_gather_outputs
    reshard(model)
    with shard_precision(model):
        model(INPUTS)
        assert parameter._unsharded_param.dtype == torch.float32
    assert parameter.all_gather_outputs is buffers and parameter._unsharded_param.dtype == torch.bfloat16


def switches_are_those_of_the_public_setters() -> None:
    """`reduce_grads`, `all_reduce_grads`, `gradient_divide_factor` and `_state_ctx.is_last_backward`."""
    expected = backward(sharded_model())
    model = sharded_model()
    backward(model)  # which finds the root
    model.zero_grad()
    model.set_requires_gradient_sync(False)
    model.set_gradient_divide_factor(2.0)
    model.set_is_last_backward(False)
    group = groups_of(model)[0]
    switches = group.reduce_grads, group.all_reduce_grads, group.gradient_divide_factor
    assert switches == (False, False, 2.0) and not model._get_fsdp_state()._state_ctx.is_last_backward
    with shard_precision(model):
        assert equal(backward(model), expected)
    assert (group.reduce_grads, group.all_reduce_grads, group.gradient_divide_factor) == switches
    assert not model._get_fsdp_state()._state_ctx.is_last_backward


def what_micro_batches_have_accumulated_is_set_aside() -> None:
    """`unsharded_accumulated_grad`."""
    expected = backward(plain_model())
    model = sharded_model(BFLOAT16)
    model.set_requires_gradient_sync(False)
    model(INPUTS).square().sum().backward()
    accumulated = [p.unsharded_accumulated_grad for group in groups_of(model) for p in group.fsdp_params]
    assert all(gradient is not None for gradient in accumulated)
    with shard_precision(model):
        assert equal(backward(model), expected)
    after = [p.unsharded_accumulated_grad for group in groups_of(model) for p in group.fsdp_params]
    assert all(a is b for a, b in zip(after, accumulated, strict=True))


class Counter(ProcessGroup):
    """A process group that counts its barriers."""

    barriers = 0

    def barrier(self) -> None:
        self.barriers += 1


def collectives_go_through_those_of_the_group() -> None:
    """`_all_gather_comm` and `_reduce_scatter_comm`, with `allocate`."""
    model, counter = sharded_model(), Counter()
    expected = backward(sharded_model())
    with synchronized_collectives(model, counter):
        assert collectives_are_synchronized(model)
        output = model(INPUTS)
        gathers = counter.barriers
        output.square().sum().backward()
    assert gathers == 2 and counter.barriers > gathers
    assert equal(gradients(model), expected)
    assert not collectives_are_synchronized(model)


def a_pass_that_broke_off_leaves_nothing_behind() -> None:
    """`reset_iter_state`."""
    expected = backward(plain_model())
    model = sharded_model()

    def fail(*call: Any) -> None:
        raise KeyError("in the middle")

    hook = model[2].register_forward_hook(fail)
    with pytest.raises(KeyError), shard_precision(model):
        model(INPUTS)
    hook.remove()
    assert equal(backward(model), expected)


def hooks_are_found_by_their_module() -> None:
    """Hooks on modules, which `fully_shard` registers from `torch.distributed.fsdp`."""
    model = sharded_model()

    def hooks() -> list[int]:
        return [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]

    before = hooks()
    assert sum(before) == 4
    with without_unshard_hooks(model):
        assert sum(hooks()) == 0
    assert hooks() == before


def an_unknown_torch_is_refused_by_name() -> None:
    model = sharded_model()
    require_known_internals(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsdp_internals, "GROUP_ATTRIBUTES", (*GROUP_ATTRIBUTES, "_renamed"))
        with pytest.raises(MeasurementError, match=r"does not have: `_renamed`\. Free memory"):
            require_known_internals(model)


CANARIES: list[Callable[[], None]] = [
    the_state_of_modules_sharded_together_is_one,
    groups_hold_each_parameter_once,
    the_root_is_known_after_a_pass,
    gradients_are_those_of_the_shards_precision,
    dtypes_follow_the_policy_of_the_group,
    buffers_appear_with_the_first_pass_and_keep_their_dtype,
    switches_are_those_of_the_public_setters,
    what_micro_batches_have_accumulated_is_set_aside,
    collectives_go_through_those_of_the_group,
    a_pass_that_broke_off_leaves_nothing_behind,
    hooks_are_found_by_their_module,
    an_unknown_torch_is_refused_by_name,
]


def outcomes(rank: int) -> dict[str, str]:
    """One start of processes for all."""
    found = {}
    for canary in CANARIES:
        try:
            canary()
            found[canary.__name__] = "passed"
        except Exception:
            found[canary.__name__] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return results(outcomes, 2, tmp_path_factory.mktemp("canaries"))


@pytest.mark.parametrize("name", [canary.__name__ for canary in CANARIES])
def test_what_we_rely_on_holds(name: str, found: list[dict[str, str]]):
    for outcome in found:
        assert outcome[name] == "passed", outcome[name]


def test_no_other_file_names_them():
    others = (
        "_get_fsdp_state",
        "_unsharded_param",
        "is_last_backward",
        "reset_iter_state",
        r"torch\.distributed\.fsdp\._",
    )
    names = re.compile("|".join((*others, *STATE_ATTRIBUTES, *GROUP_ATTRIBUTES, *PARAMETER_ATTRIBUTES)))
    package = Path(hf_optimizability.__file__).parent
    found = {path.name for path in package.rglob("*.py") if names.search(path.read_text(encoding="utf-8"))}
    assert found == {"fsdp_internals.py"}
