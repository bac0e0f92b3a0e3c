# SPDX-License-Identifier: Apache-2.0
"""Parameters moved for a while: where they go, and that nothing shows afterwards."""

from __future__ import annotations

import pytest
import torch

from hf_optimizability.curvature.displacement import displaced, restored


def weights() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in ((3, 2), (4,))]


def test_each_parameter_goes_its_own_step():
    first, second = weights()
    before = [first.detach().clone(), second.detach().clone()]
    with displaced([first, second], [torch.ones(3, 2), torch.full((4,), 2.0)], [0.5, -1.0]):
        assert torch.equal(first, before[0] + 0.5) and torch.equal(second, before[1] - 2)
    assert torch.equal(first, before[0]) and torch.equal(second, before[1])


def test_values_come_back_to_the_bit_where_the_pass_raises():
    (weight, _), original = weights(), weights()[0]
    with pytest.raises(RuntimeError, match="pass"), displaced([weight], [torch.full((3, 2), 1e8)], [1.0]):
        raise RuntimeError("pass")
    assert torch.equal(weight, original)


def test_a_graph_that_was_made_before_can_still_be_differentiated():
    weight, _ = weights()
    loss = weight.square().sum()
    with displaced([weight], [torch.ones(3, 2)], [0.5]):
        pass
    with restored([weight]):
        weight.data.zero_()
    (gradient,) = torch.autograd.grad(loss, weight)
    assert torch.equal(gradient, 2 * weight)
