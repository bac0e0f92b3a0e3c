# SPDX-License-Identifier: Apache-2.0
"""The preconditioner, the stability limit and the update against what the optimizers do."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from transformers.optimization import Adafactor

from hf_optimizability.linalg.lanczos import lanczos
from hf_optimizability.linalg.operator import DenseOperator, PreconditionedOperator
from hf_optimizability.quantities.preconditioner import optimizer_update, read_preconditioner


Parameters = list[nn.Parameter]
LR = 0.01


def adafactor(parameters: Parameters, **options: object) -> Adafactor:
    settings = {"lr": LR, "relative_step": False, "scale_parameter": False}
    return Adafactor(parameters, **{**settings, **options})


OPTIMIZERS: dict[str, Callable[[Parameters], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=LR, weight_decay=0.1),
    "heavy ball": lambda p: SGD(p, lr=LR, momentum=0.9),
    "dampened": lambda p: SGD(p, lr=LR, momentum=0.8, dampening=0.4),
    "nesterov": lambda p: SGD(p, lr=LR, momentum=0.9, nesterov=True),
    "adam": lambda p: Adam(p, lr=LR, weight_decay=0.1),
    "adamw": lambda p: AdamW(p, lr=LR, betas=(0.8, 0.99), weight_decay=0.1),
    "fused adamw": lambda p: AdamW(p, lr=LR, fused=True),
    "amsgrad": lambda p: Adam(p, lr=LR, amsgrad=True, eps=1e-3),
    "adafactor": lambda p: adafactor(p, weight_decay=0.1),
    "adafactor, scaled": lambda p: adafactor(p, scale_parameter=True, beta1=0.9),
}


@pytest.fixture(params=OPTIMIZERS)
def make(request: pytest.FixtureRequest) -> Callable[[Parameters], Optimizer]:
    return OPTIMIZERS[request.param]


def make_parameters(dtype: torch.dtype = torch.float64) -> Parameters:
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 4), (5,), (), (2, 3, 2)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def random_like(parameters: Parameters, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in parameters]


def joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def take_step(optimizer: Optimizer, parameters: Parameters, gradients: list[Tensor]) -> Tensor:
    """A real step; what it took off the parameters."""
    before = joined(parameters).clone()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()
    return before - joined(parameters)


def assert_same(left: object, right: object) -> None:
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right)
    else:
        assert left == right


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_the_update_is_what_the_next_step_takes(make: Callable[[Parameters], Optimizer], steps: int):
    parameters = make_parameters()
    optimizer = make(parameters)
    for seed in range(steps):
        take_step(optimizer, parameters, random_like(parameters, seed))
    gradients = random_like(parameters, 100)
    update = optimizer_update(optimizer, parameters, gradients)
    assert torch.allclose(LR * update, take_step(optimizer, parameters, gradients), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("steps", [0, 3])
def test_reading_changes_nothing(make: Callable[[Parameters], Optimizer], steps: int):
    parameters = make_parameters(torch.float32)
    optimizer = make(parameters)
    for seed in range(steps):
        take_step(optimizer, parameters, random_like(parameters, seed))
    gradients = random_like(parameters, 100)
    before = copy.deepcopy((optimizer.state_dict(), joined(parameters), gradients))
    grads = [parameter.grad for parameter in parameters]
    optimizer_update(optimizer, parameters, gradients)
    read_preconditioner(optimizer, parameters, gradients=gradients)
    assert_same(before[0], optimizer.state_dict())
    assert_same(dict(enumerate(before[2])), dict(enumerate(gradients)))
    assert torch.equal(before[1], joined(parameters))
    assert all(parameter.grad is grad for parameter, grad in zip(parameters, grads, strict=True))


def test_the_update_is_exact_at_a_learning_rate_that_float32_weights_do_not_feel():
    parameters = make_parameters(torch.float32)
    gradients = random_like(parameters, 0)
    update = optimizer_update(SGD(parameters, lr=1e-9), parameters, gradients)
    assert update.dtype == torch.float32 and torch.allclose(update, joined(gradients), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam_steps_along_its_momentum_over_the_preconditioner(amsgrad: bool):
    parameters = make_parameters()
    optimizer = AdamW(parameters, lr=LR, amsgrad=amsgrad, weight_decay=0, eps=1e-3)
    for seed in range(9):  # shrinking gradients, so that amsgrad's maximum matters
        gradients = [tensor / 2**seed for tensor in random_like(parameters, seed)]
        taken = take_step(optimizer, parameters, gradients)
    average = joined([optimizer.state[parameter]["exp_avg"] for parameter in parameters]) / (1 - 0.9**9)
    diagonal = read_preconditioner(optimizer, parameters).diagonal
    assert torch.allclose(taken, LR * average / diagonal, rtol=1e-12)


@pytest.mark.parametrize("scaled", [False, True])
def test_adafactor_steps_along_the_gradient_over_the_preconditioner(scaled: bool):
    parameters = make_parameters()
    optimizer = adafactor(parameters, clip_threshold=1e9, scale_parameter=scaled)
    for seed in range(4):
        gradients = random_like(parameters, seed)
        taken = take_step(optimizer, parameters, gradients)
    diagonal = read_preconditioner(optimizer, parameters).diagonal
    assert torch.allclose(taken, LR * joined(gradients) / diagonal, rtol=1e-12)


def test_adafactor_where_no_gradient_came():
    weight = torch.nn.Parameter(torch.ones(3, 2))
    gradient = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 0.0]])  # a row and a column of zeros
    diagonal = read_preconditioner(adafactor([weight]), [weight], gradients=[gradient]).diagonal
    assert (diagonal > 0).all()


def test_before_the_first_step_it_is_what_one_step_makes_it(make: Callable[[Parameters], Optimizer]):
    parameters = make_parameters()
    optimizer = make(parameters)
    gradients = random_like(parameters, 3)
    before = read_preconditioner(optimizer, parameters, gradients=gradients).diagonal
    take_step(optimizer, parameters, gradients)
    assert torch.allclose(before, read_preconditioner(optimizer, parameters).diagonal, rtol=1e-6)


@pytest.mark.parametrize("share", [0.98, 1.02])
@pytest.mark.parametrize(
    "name", ["sgd", "heavy ball", "dampened", "nesterov", "adam", "adafactor", "adafactor, beta1"]
)
def test_descent_with_a_held_preconditioner_is_stable_up_to_the_limit(name: str, share: float):
    """On ½Σcᵢxᵢ², c = κP with κ just below or above the limit; two groups, one at a tenth of the learning rate."""
    torch.manual_seed(0)
    fast, slow = (nn.Parameter(1e-3 * tensor.detach().clone()) for tensor in make_parameters()[:2])
    groups = [{"params": [fast], "lr": LR}, {"params": [slow], "lr": LR / 10}]
    optimizer: Optimizer
    if name == "adam":
        optimizer = Adam(groups, betas=(0.9, 1 - 1e-12))
        for parameter in (fast, slow):
            moment = 1 + torch.rand_like(parameter)
            state = {"step": torch.tensor(1e9), "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": moment}
            optimizer.state[parameter] = state
    elif "adafactor" in name:
        optimizer = adafactor(groups, clip_threshold=1e9, beta1=0.9 if "beta1" in name else None)
        held = {"step": 10**15, "RMS": 0.0, "exp_avg": torch.zeros_like(fast)}
        row, column = torch.tensor([1.0, 2.0, 5.0]).double(), torch.tensor([1.0, 3.0, 1.0, 2.0]).double()
        optimizer.state[fast] = {**held, "exp_avg_sq_row": row, "exp_avg_sq_col": column}
        optimizer.state[slow] = {**held, "exp_avg": torch.zeros_like(slow), "exp_avg_sq": 1 + torch.rand_like(slow)}
    else:
        settings = {key: value for key, value in OPTIMIZERS[name]([fast]).defaults.items() if key != "weight_decay"}
        optimizer = SGD(groups, **settings)
    preconditioner = read_preconditioner(optimizer, [fast, slow])
    assert preconditioner.learning_rate == LR
    curvatures = share * preconditioner.limit * preconditioner.diagonal
    fast_curvature, slow_curvature = curvatures[: fast.numel()].view_as(fast), curvatures[fast.numel() :]
    sizes = [float(joined([fast, slow]).norm())]
    while sizes[0] / 10 < sizes[-1] < 100 * sizes[0] and len(sizes) < 1500:
        take_step(optimizer, [fast, slow], [fast_curvature * fast.detach(), slow_curvature * slow.detach()])
        sizes.append(float(joined([fast, slow]).norm()))
    assert (sizes[-1] <= sizes[0] / 10) if share < 1 else (sizes[-1] >= 100 * sizes[0])


def test_under_a_schedule_of_a_rate_of_zero_all_parameters_count_alike():
    weight, bias = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))
    optimizer = SGD([weight, bias], lr=0.0)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # it adds `initial_lr`
    preconditioner = read_preconditioner(optimizer, [weight, bias])
    assert preconditioner.limit == float("inf")
    assert preconditioner.diagonal.tolist() == [1.0, 1.0, 1.0]


def test_at_learning_rate_zero_nothing_is_unstable_and_the_direction_is_known():
    weight, bias = make_parameters()[:2]
    optimizer = SGD([{"params": [weight], "lr": 0.4}, {"params": [bias], "lr": 0.1}])
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 10, 1.0))  # a warm-up: 0 at its start
    gradients = random_like([weight, bias], 0)
    preconditioner = read_preconditioner(optimizer, [weight, bias])
    assert preconditioner.learning_rate == 0 and preconditioner.limit == float("inf")
    assert preconditioner.peak_learning_rate == 0.4
    assert preconditioner.diagonal.tolist() == pytest.approx([1.0] * 12 + [4.0] * 5)
    update = optimizer_update(optimizer, [weight, bias], gradients)
    assert torch.allclose(update, joined([gradients[0], gradients[1] / 4]))


def test_parameters_that_do_not_move_have_no_curvature():
    weight, bias = make_parameters()[:2]
    optimizer = SGD([{"params": [weight]}, {"params": [bias], "lr": 0.0}], lr=0.4)
    diagonal = read_preconditioner(optimizer, [bias, weight]).diagonal
    operator = PreconditionedOperator(DenseOperator(torch.ones(17, 17, dtype=torch.float64)), diagonal)
    product = operator.matvec(torch.ones(17, dtype=torch.float64))
    assert product.tolist() == pytest.approx([0.0] * 5 + [12.0] * 12)


def test_the_operator_has_the_eigenvalues_of_the_inverse_times_the_matrix():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(30, 30, generator=generator, dtype=torch.float64)
    matrix = matrix + matrix.T
    diagonal = 0.1 + 3 * torch.rand(30, generator=generator, dtype=torch.float64)
    truth = torch.linalg.eigvals(matrix / diagonal[:, None]).real
    run = lanczos(PreconditionedOperator(DenseOperator(matrix), diagonal), tolerance=1e-10, max_hvps=30, seed=0)
    assert run.lambda_max.value == pytest.approx(float(truth.max()), rel=1e-9)
    assert run.lambda_min.value == pytest.approx(float(truth.min()), rel=1e-9)


def test_accelerates_wrapper_is_seen_through():
    parameters = make_parameters(torch.float32)
    optimizer = AdamW(parameters, lr=LR)
    gradients = random_like(parameters, 0)
    wrapped = Accelerator(cpu=True).prepare_optimizer(optimizer)
    found = read_preconditioner(wrapped, parameters, gradients=gradients)
    assert found.name == "AdamW"
    assert torch.equal(found.diagonal, read_preconditioner(optimizer, parameters, gradients=gradients).diagonal)


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_parameters_that_the_optimizer_does_not_hold_stay_where_they_are(kind: type[Optimizer]):
    parameters = make_parameters()
    optimizer, gradients = kind(parameters[1:3], lr=0.1), random_like(parameters, 0)
    ends = [sum(parameter.numel() for parameter in parameters[:index]) for index in (1, 3)]
    held = read_preconditioner(optimizer, parameters[1:3], gradients=gradients[1:3]).diagonal
    found = read_preconditioner(optimizer, parameters, gradients=gradients).diagonal
    assert torch.equal(found[ends[0] : ends[1]], held) and found.isinf().sum() == len(found) - len(held)
    update = optimizer_update(optimizer, parameters, gradients)
    assert torch.equal(update[ends[0] : ends[1]], optimizer_update(optimizer, parameters[1:3], gradients[1:3]))
    assert (update[: ends[0]] == 0).all() and (update[ends[1] :] == 0).all()


class Counting(AdamW):
    """Raises its weight decay at each step, by a count that the class has and a list that the group has."""

    steps = 0

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        type(self).steps += 1
        self.param_groups[0]["decays"].append(type(self).steps)
        self.param_groups[0]["weight_decay"] = 0.01 * type(self).steps
        return super().step(closure)


def test_what_a_step_keeps_on_its_class_or_in_its_group_comes_back():
    parameters = make_parameters()
    optimizer = Counting([{"params": parameters, "decays": []}], lr=LR)
    gradients = random_like(parameters, 0)
    read_preconditioner(optimizer, parameters, gradients=gradients)
    optimizer_update(optimizer, parameters, gradients)
    assert Counting.steps == 0 and optimizer.param_groups[0]["decays"] == []


def test_what_can_not_be_read_is_refused():
    parameters = make_parameters()
    with pytest.raises(TypeError, match=r"RMSprop .* supported are SGD, Adam, AdamW, Adafactor"):
        read_preconditioner(RMSprop(parameters), parameters)
    with pytest.raises(TypeError, match="relative_step=False"):
        optimizer_update(Adafactor(parameters), parameters, random_like(parameters, 0))
    with pytest.raises(ValueError, match="holds none of the parameters"):
        read_preconditioner(SGD(parameters[1:3]), [parameters[0], parameters[3]])
    with pytest.raises(ValueError, match=r"position 0.*Pass `gradients`"):
        read_preconditioner(Adam(parameters), parameters)
    with pytest.raises(ValueError, match="differ in momentum"):
        read_preconditioner(SGD([{"params": parameters[:1]}, {"params": parameters[1:], "momentum": 0.9}]), parameters)
    with pytest.raises(ValueError, match="not positive"):
        PreconditionedOperator(DenseOperator(torch.eye(2)), torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="operator size 2"):
        PreconditionedOperator(DenseOperator(torch.eye(2)), torch.ones(3))
