# SPDX-License-Identifier: Apache-2.0
"""Exact Hessian-vector products on a tiny random model of every architecture that Transformers' auto classes list.

Each model is built as its class builds it by default (nothing switched by hand), trained on one batch, measured in
float32, and multiplied with in float64, where the product is compared with central differences of the gradient. Every
case runs in a process of its own, so that a crash or a time-out is a row of the table like any other.

    python benchmarks/architectures.py                           # all that the results lack
    python benchmarks/architectures.py --only bert,llama --redo  # some again
    python benchmarks/architectures.py --library pyhessian       # the same list with another library's products

Text, and images with one label each, are tried with all libraries; speech, boxes, masks, images with text, series and
router losses with this package alone. Where a loss has no second derivative in torch (CTC), the package multiplies by
central differences: then products and largest eigenvalue are compared with float64, to 5 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import logging
import math
import multiprocessing
import random
import resource
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from architecture_batches import make_batch
from architecture_cases import KINDS, TASKS, Case, all_cases
from architecture_kinds import Batch
from architecture_models import tiny_model
from architecture_sizes import SEED
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from hf_optimizability import Measurement, MeasurementError, OptimizabilityConfig
from hf_optimizability.curvature.central_difference import CentralDifferenceHessian
from hf_optimizability.curvature.hessian import HessianOperator
from hf_optimizability.curvature.layer_decoupled import DecoupledHessian
from hf_optimizability.curvature.twice_differentiable import CheapSecondDerivatives
from hf_optimizability.measurement.measure import measure_objective
from hf_optimizability.model_state.measuring import eager_attention, math_attention, measuring
from hf_optimizability.objective.objective import Objective


RESULTS = Path(__file__).parent / "results" / "architectures.json"


# --- The truth -----------------------------------------------------------------------------------------------------

STEPS = (1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-4, 1e-3)
"""Distances to try along a vector with entries of size 1: most models agree at the first one, to 1e-9."""
TOLERANCE = 1e-6
"""Above the 1e-7 that differences in float64 are good for at the shortest steps."""
FLOOR = 1e-3
"""A parameter tensor with a smaller share of the product than this is judged by the whole product, times this."""


DRAWS = {torch.rand, torch.randn, torch.rand_like, torch.randn_like}
SAMPLERS = {torch._sample_dirichlet, torch._standard_gamma, torch.bernoulli}


class DoublePrecision(TorchFunctionMode):
    """Takes every mention of float32 for float64, such as the casts in softmax, norms and losses.

    Random numbers are drawn in float32, so that they are those of a measurement.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function at the higher precision."""
        if func in DRAWS:
            return func(*args, **{**(kwargs or {}), "dtype": torch.float32}).double()
        if func in SAMPLERS:
            return func(*(arg.float() if isinstance(arg, Tensor) else arg for arg in args), **(kwargs or {})).double()
        func = Tensor.double if func is Tensor.float else func
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)


@contextmanager
def double_precision() -> Iterator[None]:
    """Everything in float64, also where a model's code says float32: else rounding hides what is to be seen."""
    torch.set_default_dtype(torch.float64)
    try:
        with DoublePrecision():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


class HeldDetached(TorchFunctionMode):
    """Gives what a loss detaches the values that it had in the first pass, in the order of the calls.

    A gradient that passes by detached parts (targets by the model itself, reference points) is that of the loss with
    these held fixed, and so is its derivative.
    """

    def __init__(self) -> None:
        super().__init__()
        self._values: list[Tensor] = []
        self._calls = 0
        self._recording = True

    def __enter__(self) -> HeldDetached:
        self._calls, self._recording = 0, not self._values
        return super().__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, or return its result of the first pass."""
        if func is not Tensor.detach:
            return func(*args, **(kwargs or {}))
        if self._recording:
            self._values.append(args[0].detach().clone())
        self._calls += 1
        return self._values[self._calls - 1]


def doubled(value: Any) -> Any:
    """Return a batch in float64, at whatever depth its tensors are."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: doubled(item) for name, item in value.items()}
    return [doubled(item) for item in value] if isinstance(value, list) else value


class Truth:
    """A model in float64 and eval mode, differentiated by torch and differences alone.

    Every pass starts from the same seed, as a measurement does: some models draw numbers in eval mode too.
    """

    def __init__(self, model: PreTrainedModel, batch: Batch):
        self.model = model.double().eval()
        model.config.get_text_config().use_cache = False  # as in training
        self.batch = doubled(batch)
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and module._can_set_experts_implementation():
                module.set_experts_implementation("eager")  # the default one has no float64
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.sizes = [parameter.numel() for parameter in self.parameters]
        self._point = nn.utils.parameters_to_vector(self.parameters).detach()
        self._detached: AbstractContextManager[Any] = nullcontext()

    def hold_detached(self) -> None:
        """Take what the loss detaches for constants from now on."""
        self._detached = HeldDetached()
        self._loss()

    def variables(self) -> Tensor:
        """1 for the entries that autograd reaches, 0 for those that it takes for constants.

        These are padding rows of embeddings, and parameters that the model only uses under `no_grad`.
        """
        gradients = torch.autograd.grad(self._loss(), self.parameters, allow_unused=True)
        masks = [torch.full_like(p, g is not None) for p, g in zip(self.parameters, gradients, strict=True)]
        by_id = {id(p): mask for p, mask in zip(self.parameters, masks, strict=True)}
        for module in self.model.modules():
            padding = vars(module).get("padding_idx")
            weight = id(vars(module)["_parameters"].get("weight"))
            if padding is not None and weight in by_id:
                by_id[weight][padding] = 0
        return nn.utils.parameters_to_vector(masks)

    def disagreement(self, vector: Tensor, product: Tensor) -> float:
        """How far a product is from the derivative of the gradient, at the best of several steps.

        A kink (ReLU, a token that changes its expert) between the two points spoils the differences, so steps get
        shorter until none is crossed. A wrong product agrees at no step: thousands of entries that are equal to six
        digits are not an accident.
        """
        best = math.inf
        for step in STEPS:
            best = min(best, self._deviation(product, self._derivative(vector, step)))
            if best <= TOLERANCE:
                break
        return best

    def gradient_error(self, vector: Tensor) -> float:
        """Return `|∂L/∂v − gᵀv| / ‖g‖` where it does not move with the step, else 0: a kink makes one that does.

        It is not 0 where a model's backward pass is not the derivative of its forward pass, as where a part of the
        loss is detached.
        """
        gradient = self._gradient()
        expected = float(gradient @ vector)
        errors = []
        for step in (1e-4, 1e-5, 1e-6, 1e-7, 1e-8):
            with torch.no_grad():
                wide, narrow = (
                    (float(self._loss(h * vector)) - float(self._loss(-h * vector))) / (2 * h)
                    for h in (step, step / 2)
                )
            errors.append(((4 * narrow - wide) / 3 - expected) / float(gradient.norm()))
        settled = (b for a, b in pairwise(errors) if abs(a - b) <= 0.1 * abs(b))
        return max((abs(error) for error in settled), default=0.0)

    def product_error(self, vector: Tensor, product: Tensor) -> float:
        """Return `‖p − r‖ / ‖r‖`, r the derivative of the gradient, at the best of several steps."""
        references = (self._derivative(vector, step) for step in STEPS[:5])
        return min(float((product - reference).norm() / reference.norm()) for reference in references)

    def largest_eigenvalue(self) -> float:
        """Return λ_max by Lanczos on differences of gradients."""
        size = sum(self.sizes)

        def multiply(vector: np.ndarray) -> np.ndarray:
            direction = torch.from_numpy(vector).flatten()
            length = direction.norm()
            return (self._derivative(direction / length * size**0.5, 1e-7) * length / size**0.5).numpy()

        start = torch.randn(size, generator=torch.Generator().manual_seed(SEED)).numpy()
        operator = LinearOperator((size, size), matvec=multiply, dtype=np.float64)
        return float(eigsh(operator, k=1, which="LA", v0=start, tol=1e-3, return_eigenvectors=False)[0])

    def point(self) -> tuple[float, Tensor]:
        """Return the loss and its gradient."""
        return float(self._loss().detach()), self._gradient()

    def _loss(self, shift: Tensor | float = 0.0) -> Tensor:
        nn.utils.vector_to_parameters(self._point + shift, self.parameters)
        self.model.train().eval()  # LeViT drops what it cached with the graph of another pass
        random.seed(SEED)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        with self._detached:
            return self.model(**self.batch)["loss"]

    def _gradient(self, shift: Tensor | float = 0.0) -> Tensor:
        pieces = torch.autograd.grad(self._loss(shift), self.parameters, materialize_grads=True)
        return torch.cat([piece.flatten() for piece in pieces])

    def _derivative(self, vector: Tensor, step: float) -> Tensor:
        """Central differences of the gradient, extrapolated from two steps (Richardson)."""
        wide, narrow = ((self._gradient(h * vector) - self._gradient(-h * vector)) / (2 * h) for h in (step, step / 2))
        return (4 * narrow - wide) / 3

    def _deviation(self, product: Tensor, reference: Tensor) -> float:
        """Largest over the tensors of `‖p − r‖ / (‖r‖ + FLOOR ‖r of all‖)`; infinite where the reference is zero."""
        whole = float(reference.norm())
        if not whole > 0:
            return math.inf
        pieces = zip(product.split(self.sizes), reference.split(self.sizes), strict=True)
        return max(float((p - r).norm() / (r.norm() + FLOOR * whole)) for p, r in pieces)


def asymmetry(vectors: Tensor, products: Tensor) -> float:
    """`|uᵀHv − vᵀHu| / (‖u‖ ‖Hv‖)`."""
    (u, v), (Hu, Hv) = vectors.double(), products.double()
    return float((u @ Hv - v @ Hu).abs() / (u.norm() * Hv.norm()))


# --- The libraries -------------------------------------------------------------------------------------------------

OURS = "hf_optimizability"
EXACT = "double_backward"


def measure_once(model: PreTrainedModel, batch: Batch) -> Measurement:
    """Take a whole measurement with 8 products, as the callback does."""
    return measure_objective(Objective(model, [batch]), OptimizabilityConfig(profile="light", max_hvps=16))[0]


def our_products(
    model: PreTrainedModel,
    batch: Batch,
    vectors: Tensor,
    operator: type[HessianOperator | DecoupledHessian] = HessianOperator,
) -> Tensor:
    """`Hv` for each row v, as a measurement makes them."""
    objective = Objective(model, [batch])
    with measuring(model, seed=SEED), CheapSecondDerivatives():
        try:
            with math_attention():
                return operator(objective).matmat(vectors.T).T
        except RuntimeError:
            with eager_attention(model):
                return operator(objective).matmat(vectors.T).T


def block_deviation(truth: Truth, vector: Tensor) -> float:
    """Compare the matrix that the trace is computed from with the Hessian on diagonal blocks, where they must agree.

    That is `(H w)_b`, for w zero outside the block b; 16 parameter tensors are tried.
    """
    blocks = random.Random(SEED).sample(range(len(truth.sizes)), min(16, len(truth.sizes)))
    within = torch.zeros(len(blocks), len(vector))
    for row, block in zip(within, blocks, strict=True):
        row.split(truth.sizes)[block].copy_(vector.split(truth.sizes)[block])
    exact = our_products(truth.model, truth.batch, within)
    decoupled = our_products(truth.model, truth.batch, within, DecoupledHessian)
    floor = TOLERANCE * exact.norm()  # the bias of attention's keys has no curvature: all that is there is rounding
    worst = 0.0
    for right, found, block in zip(exact, decoupled, blocks, strict=True):
        right, found = (row.split(truth.sizes)[block] for row in (right, found))
        worst = max(worst, float((found - right).norm() / (right.norm() + floor)))
    return worst


def difference_products(model: PreTrainedModel, batch: Batch, vectors: Tensor) -> Tensor:
    """Return `Hv` for each row v by central differences, as a measurement makes them where nothing else works."""
    objective = Objective(model, [batch])
    with measuring(model, seed=SEED):
        return CentralDifferenceHessian(objective).matmat(vectors.T).T


class Given(nn.Module):
    """The loss function for a model that gives its loss itself."""

    reduction = "mean"

    def forward(self, loss: Tensor, _: Tensor) -> Tensor:
        """Return the loss."""
        return loss


class Loss(nn.Module):
    """A model's own loss as its output, for libraries that call the model with one argument."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """Return the mean loss of a batch."""
        return self.model(**batch)["loss"]


def pyhessian_products(model: PreTrainedModel, batch: Batch, vectors: Tensor) -> Tensor:
    """PyHessian, given the batch as the input and a criterion that passes the loss through."""
    module = importlib.import_module("pyhessian.hessian")
    model.zero_grad()  # it takes gradients that are there for part of its own
    hessian = module.hessian(Loss(model), lambda loss, _: loss, data=(batch, None), cuda=False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sizes = [parameter.numel() for parameter in parameters]
    rows = []
    for vector in vectors:
        pieces = [piece.view_as(p) for piece, p in zip(vector.split(sizes), parameters, strict=True)]
        product = module.hessian_vector_product(hessian.gradsH, hessian.params, pieces)
        rows.append(torch.cat([piece.flatten() for piece in product]))
    return torch.stack(rows)


def hessian_eigenthings_products(model: PreTrainedModel, batch: Batch, vectors: Tensor) -> Tensor:
    """hessian-eigenthings with the loss it has for Transformers."""
    package = importlib.import_module("hessian_eigenthings")
    operator = package.HessianOperator(model.eval(), [batch], package.hf_lm_loss())
    return torch.stack([operator.matvec(vector) for vector in vectors])


def curvlinops_products(model: PreTrainedModel, batch: Batch, vectors: Tensor) -> Tensor:
    """Curvlinops, given the batch as the input and a loss function that passes the loss through."""
    package = importlib.import_module("curvlinops")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    data = [(batch, torch.zeros(2))]
    loss = Loss(model).eval()
    operator = package.HessianLinearOperator(loss, Given(), parameters, data, batch_size_fn=lambda _: 2)
    return (operator @ vectors.T).T


LIBRARIES: dict[str, Callable[[PreTrainedModel, Batch, Tensor], Tensor]] = {
    OURS: our_products,
    "pyhessian": pyhessian_products,
    "hessian_eigenthings": hessian_eigenthings_products,
    "curvlinops": curvlinops_products,
}


# --- The check -----------------------------------------------------------------------------------------------------

FLOAT32_TOLERANCE = 1e-3
GRADIENT_TOLERANCE = 1e-4
DETACHED = 1e-8
"""A gradient that is off from the slope of the loss by more than this passes by a part that is detached."""
MEASURED_TOLERANCE = 1e-2
DIFFERENCE_TOLERANCE = 0.05
Outcome = Literal["works", "differences", "raises", "crashes", "wrong", "traces", "no Hessian", "excluded"]
RIGHT = ("works", "differences")


@dataclass(frozen=True)
class Row:
    """What became of one case.

    Attributes:
        task: The list that it is on.
        model_type: The name in the list.
        class_name: The class in the list.
        outcome: `"works"`; `"differences"`: right, by central differences; `"raises"`: the library says that it
            can't; `"crashes"`: an error that is not the package's own, a time-out or a dead process; `"wrong"`: the
            product disagrees; `"traces"`: the measurement changed the model; `"no Hessian"`: the model's backward
            pass is not the derivative of its forward pass, and the library says nothing; `"excluded"`: the model
            can't be built, or not trained on one batch.
        reason: Why it does not work.
        parameters: Number of trainable parameters.
        attention: The attention implementation that the model came with.
        error: Largest deviation from the truth of a product of this package in float64, see `Truth.disagreement`,
            and of the matrix that it has the trace from, see `block_deviation`.
        float32_error: `‖H₃₂v − H₆₄v‖ / ‖H₆₄v‖` of the library's products in float32.
        asymmetry: `|uᵀHv − vᵀHu| / (‖u‖ ‖Hv‖)` of the library's products in float32.
        seconds: For two products in float32.
    """

    task: str
    model_type: str
    class_name: str
    outcome: Outcome
    reason: str = ""
    parameters: int = 0
    attention: str = ""
    error: float | None = None
    float32_error: float | None = None
    asymmetry: float | None = None
    seconds: float | None = None


def state(model: PreTrainedModel) -> dict[str, Any]:
    """All that a measurement must leave alone, by kind."""
    modules = dict(model.named_modules())
    configs = {id(m.config): m.config for m in modules.values() if isinstance(m, PreTrainedModel)}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    numpy_state: Any = np.random.get_state()
    others = {name: {k: v for k, v in vars(m).items() if not k.startswith("_")} for name, m in modules.items()}
    return {
        "parameters": {name: p.detach().clone() for name, p in parameters.items()},
        "places": [(name, p.data_ptr(), p.requires_grad) for name, p in parameters.items()],
        "buffers": {name: b.clone() for name, b in model.named_buffers(remove_duplicate=False)},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()},
        "modes": [module.training for module in modules.values()],
        "attributes": copied(others),
        "attention": [config._attn_implementation for config in configs.values()],
        "configurations": [config.to_json_string(use_diff=False) for config in configs.values()],
        "random numbers": (torch.get_rng_state(), numpy_state[1].tolist(), numpy_state[2], random.getstate()),
    }


def copied(value: Any) -> Any:
    """Copy numbers, strings and tensors in plain containers; leave out everything else they hold."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [copied(item) for item in value]
    return value if isinstance(value, (bool, int, float, str)) else None


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


def examine(case: Case, library: str = OURS, say: Callable[[str], object] = id) -> Row:
    """Build, train, measure and check one case; pass the name of each stage to `say` as it starts."""
    say("build")
    model = tiny_model(case)
    batch = make_batch(case, model)
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    attention = model.config._attn_implementation
    say("train")
    train(model, batch)
    changed: list[str] = []
    measured: Measurement | None = None
    if library == OURS:
        say("measure")
        before, error = state(model), None
        try:
            measured = measure_once(model, batch)
        except Exception as raised:
            error = raised
        after = state(model)
        changed = [kind for kind in before if not same(before[kind], after[kind])]
        if error is not None:
            return failure(case, library, "measure", error, changed)

    say("check")
    twin = tiny_model(case)
    twin.load_state_dict(model.state_dict())  # training has moved running statistics
    truth = Truth(twin, batch)
    if measured is not None and measured.engine != EXACT:
        outcome, reason, off = judge_differences(measured, model, batch, truth, changed)
        row = Row(case.task, case.model_type, case.class_name, outcome, reason, count, attention)
        return dataclasses.replace(row, float32_error=off)
    with double_precision():
        vectors = torch.randn(2, count, generator=torch.Generator().manual_seed(SEED)) * truth.variables()
        products = our_products(truth.model, truth.batch, vectors)
        deviation = block_deviation(truth, vectors[0]) if library == OURS else 0.0
        deviation = max(deviation, *(truth.disagreement(v, Hv) for v, Hv in zip(vectors, products, strict=True)))
        gradient_error = 0.0 if deviation <= TOLERANCE else truth.gradient_error(vectors[0])
        detached = gradient_error > DETACHED
        if detached:
            truth.hold_detached()
            deviation = max(truth.disagreement(v, Hv) for v, Hv in zip(vectors, products, strict=True))
        off = 0.0 if measured is None else measured_deviation(measured, truth)
    say("multiply")
    started = time.perf_counter()
    found = LIBRARIES[library](model, batch, vectors.float()).double()
    seconds = time.perf_counter() - started
    rounding = float((found - products).norm() / products.norm())
    outcome, reason = judge(deviation, rounding, gradient_error, changed, off=off)
    if detached and outcome == "works":
        reason = "the Hessian of the loss with its detached parts held fixed, as its gradient is"
    return Row(
        case.task,
        case.model_type,
        case.class_name,
        outcome,
        reason,
        parameters=count,
        attention=attention,
        error=deviation,
        float32_error=rounding,
        asymmetry=asymmetry(vectors, found),
        seconds=seconds,
    )


def measured_deviation(measured: Measurement, truth: Truth) -> float:
    """Return how far loss, ‖g‖² and gᵀHg of a measurement are off, relative to their sizes.

    They are from different passes: where each draws other random numbers, they do not fit together. gᵀHg is compared
    with a product in float64, since products have been compared with differences before.
    """
    loss, gradient = truth.point()
    squared = float(gradient @ gradient)
    off = max(abs(measured.loss - loss) / abs(loss), abs(measured.grad_norm**2 - squared) / squared)
    if measured.quadratic_model is None:
        return off
    product = our_products(truth.model, truth.batch, gradient[None])[0]
    along = float(gradient @ product)
    size = max(abs(along), 0.01 * squared**0.5 * float(product.norm()))
    return max(off, abs(measured.quadratic_model.curvature - along) / size)


def judge_differences(
    measured: Measurement, model: PreTrainedModel, batch: Batch, truth: Truth, changed: Sequence[str]
) -> tuple[Outcome, str, float]:
    """Return outcome, reason and the error of a product, for a measurement by central differences in float32."""
    vector = torch.randn(sum(truth.sizes), generator=torch.Generator().manual_seed(SEED))
    with double_precision():
        vector = vector.double() * truth.variables()
    found = difference_products(model, batch, vector.float()[None])[0].double()
    with double_precision():
        error = truth.product_error(vector, found)
        largest = truth.largest_eigenvalue()
    estimate = measured.hessian.lambda_max
    off = abs(estimate.value - largest) / abs(largest)
    if estimate.value < largest and not estimate.converged:
        off = 0.0  # Lanczos approaches it from below
    if error > DIFFERENCE_TOLERANCE:
        return "wrong", f"by central differences, and off by {error:.0e}", error
    if off > DIFFERENCE_TOLERANCE:
        return "wrong", f"λ_max is {estimate.value:.4g} by central differences, in truth {largest:.4g}", error
    if changed:
        return "traces", "changed: " + ", ".join(changed), error
    return "differences", f"{measured.fallback}", error


def train(model: PreTrainedModel, batch: Batch) -> None:
    """One backward pass, as a training step makes it.

    Raises:
        ValueError: If the model gives no finite loss.
    """
    loss = model(**batch).get("loss")
    if loss is None:
        raise ValueError("the model returns no loss")
    loss.backward()
    if not torch.isfinite(loss):
        raise ValueError(f"the loss is {float(loss)}")


def judge(
    deviation: float, rounding: float, gradient_error: float, changed: Sequence[str], *, off: float = 0.0
) -> tuple[Outcome, str]:
    """Outcome and reason, the gravest first."""
    if gradient_error > GRADIENT_TOLERANCE and deviation > TOLERANCE:
        return "no Hessian", f"the model's gradient is not that of its loss: off by {gradient_error:.0e}"
    if not deviation <= TOLERANCE:
        return "wrong", f"deviates by {deviation:.0e} in float64"
    if not rounding <= FLOAT32_TOLERANCE:
        return "wrong", f"deviates by {rounding:.0e} in float32"
    if not off <= MEASURED_TOLERANCE:
        return "wrong", f"loss, gradient or curvature along it deviate by {off:.0e} in a measurement"
    if changed:
        return "traces", "changed: " + ", ".join(changed)
    return "works", ""


# --- One process for each case -------------------------------------------------------------------------------------


def run(case: Case, library: str = OURS, *, seconds: float = 180, memory: int = 8 << 30) -> Row:
    """Examine a case in a separate process with limited time and memory."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(case, library, sender, memory))
    process.start()
    sender.close()
    deadline, stage = time.monotonic() + seconds, ""
    try:
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            message = receiver.recv()
            if isinstance(message, Row):
                return message
            stage = message
        return failure(case, library, stage, f"took more than {seconds:.0f} s")
    except EOFError:
        process.join()
        return failure(case, library, stage, f"the process died with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def work(case: Case, library: str, pipe: Connection, memory: int) -> None:
    """Run the child process: send the stages, then the row."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    stage = ""

    def say(name: str) -> None:
        nonlocal stage
        stage = name
        pipe.send(name)

    try:
        pipe.send(examine(case, library, say))
    except Exception as error:
        pipe.send(failure(case, library, stage, error))


def failure(case: Case, library: str, stage: str, error: Exception | str, changed: Sequence[str] = ()) -> Row:
    """Return the row of a case that failed at a stage, with what it left changed."""
    reason = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    reason = " ".join(reason.split())[:300] + (" Changed: " + ", ".join(changed) if changed else "")
    outcome: Outcome = "raises" if isinstance(error, MeasurementError) or library != OURS else "crashes"
    if stage in ("build", "train") or (stage == "check" and library != OURS):  # then there is no truth
        outcome = "excluded"
    return Row(case.task, case.model_type, case.class_name, outcome, f"{stage}: {reason}")


# --- Results -------------------------------------------------------------------------------------------------------

SIGNS: dict[Outcome, str] = {
    "works": "✓",
    "differences": "✓ by differences",
    "raises": "raises",
    "crashes": "**crashes**",
    "wrong": "**wrong**",
    "traces": "**traces**",
    "no Hessian": "no Hessian",
    "excluded": "–",
}


def load(path: Path) -> dict[str, list[Row]]:
    """Load the rows of each library; none if it has no file yet."""
    if not path.exists():
        return {}
    return {library: [Row(**row) for row in rows] for library, rows in json.loads(path.read_text()).items()}


def save(results: dict[str, list[Row]], path: Path) -> None:
    """Write the results, and the tables next to them."""
    data = {library: [dataclasses.asdict(row) for row in rows] for library, rows in results.items()}
    path.write_text(json.dumps(data, indent=1) + "\n")
    path.with_suffix(".md").write_text(to_markdown(results))


def to_markdown(results: dict[str, list[Row]]) -> str:
    """All tables: totals, what does not work, what is excluded, and every architecture."""
    every = results.get(OURS, [])
    ours, others = ([row for row in every if row.task in tasks] for tasks in (TASKS, KINDS))
    trained = [row for row in ours if row.outcome != "excluded"]
    errors = [row.error for row in trained if row.outcome == "works" and row.error is not None]
    lines = [
        "# Architectures",
        "",
        "A tiny random model of every class that Transformers' auto classes list, built as it is by default, measured",
        f"in float32 and checked in float64 against central differences of the gradient (tolerance {TOLERANCE:.0e} of",
        f"each parameter tensor; largest error of those that work: {max(errors, default=0):.0e}). Written by",
        f"`benchmarks/architectures.py`; torch {torch.__version__}, transformers {transformers.__version__}.",
        "",
        "Of those that can be built and trained on one batch:",
        "",
        *totals(results),
        "",
        "Other kinds of input and of loss, tried with this package alone (by differences: torch has no second",
        f"derivative of the loss; products and largest eigenvalue agree with float64 to {DIFFERENCE_TOLERANCE:.0%}):",
        "",
        *totals_by_kind(others),
        "",
        "## What does not work",
        "",
        "| library | task | model type | class | outcome | reason |",
        "|---|---|---|---|---|---|",
    ]
    for row in [*trained, *others]:
        if row.outcome not in (*RIGHT, "excluded"):
            lines.append(cells(OURS, row.task, row.model_type, row.class_name, SIGNS[row.outcome], row.reason))
    for library, rows in results.items():
        if library != OURS:
            lines += [cells(library, *reason, f"{number} ×") for reason, number in common_reasons(rows)]
    lines += ["", "## What can't be built or trained", ""]
    lines += ["| task | model type | class | reason |", "|---|---|---|---|"]
    excluded = (row for row in every if row.outcome == "excluded")
    lines += [cells(row.task, row.model_type, row.class_name, row.reason) for row in excluded]
    lines += ["", "## Every architecture", "", *matrix(ours), "", "## Every architecture of the other kinds", ""]
    lines += ["| kind | model type | class | outcome | parameters | error |", "|---|---|---|---|---|---|"]
    for row in others:
        if row.outcome != "excluded":
            error = row.float32_error if row.error is None else row.error
            found = "" if error is None else f"{error:.0e}"
            sign = SIGNS[row.outcome]
            lines.append(cells(row.task, row.model_type, row.class_name, sign, f"{row.parameters:,}", found))
    lines.append("")
    return "\n".join(lines)


def cells(*texts: str) -> str:
    """One row of a table."""
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def totals(results: dict[str, list[Row]]) -> list[str]:
    """Tabulate how many architectures work, by library and task."""
    lines = [cells("library", *TASKS, "all"), "|---" * (len(TASKS) + 2) + "|"]
    for library, rows in results.items():
        counts = []
        for task in [*TASKS, None]:
            counted = [row for row in rows if row.task in TASKS and row.outcome != "excluded"]
            outcomes = [row.outcome for row in counted if task in (row.task, None)]
            works = outcomes.count("works")
            share = f" = {works / len(outcomes):.1%}" if task is None and outcomes else ""
            counts.append(f"{works} of {len(outcomes)}{share}")
        lines.append(cells(library, *counts))
    return lines


def totals_by_kind(rows: Sequence[Row]) -> list[str]:
    """Return a table of what became of each kind, and of all."""
    lines = ["| kind | tried | right | of these by differences | refused | wrong | can't be built or trained |"]
    lines.append("|---" * 7 + "|")
    for kind in [*KINDS, None]:
        counts = Counter[str](row.outcome for row in rows if kind in (row.task, None))
        excluded = counts.pop("excluded", 0)
        tried, refused = sum(counts.values()), counts["raises"]
        right = sum(counts[outcome] for outcome in RIGHT)
        share = f" = {right / tried:.1%}" if kind is None and tried else ""
        numbers = [tried, f"{right}{share}", counts["differences"], refused, tried - right - refused, excluded]
        lines.append(cells(kind or "all", *map(str, numbers)))
    return lines


def common_reasons(rows: Sequence[Row]) -> list[tuple[tuple[str, str, str, str], int]]:
    """Return the most frequent failures, each with one example."""
    failed = [row for row in rows if row.outcome not in ("works", "excluded")]
    examples: dict[tuple[str, str], Row] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for row in failed:
        kind = (SIGNS[row.outcome], row.reason[:60])
        counts[kind] += 1
        examples.setdefault(kind, row)
    return [
        ((e.task, e.model_type, e.class_name, f"{sign}: {e.reason[:160]}"), number)
        for (sign, _), number, e in ((kind, number, examples[kind]) for kind, number in counts.most_common(8))
    ]


def matrix(rows: Sequence[Row]) -> list[str]:
    """Tabulate results, with a row for each model type and a column for each task."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        found.setdefault(row.model_type, {}).setdefault(row.task, []).append(SIGNS[row.outcome])
    lines = [cells("model type", *TASKS), "|---" * (len(TASKS) + 1) + "|"]
    return lines + [cells(name, *(", ".join(found[name].get(task, [])) for task in TASKS)) for name in sorted(found)]


def main() -> None:
    """Run the cases that the results lack; write the results after every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=LIBRARIES, default=OURS, help="whose products to check")
    parser.add_argument("--only", help="model types or class names, with commas between them")
    parser.add_argument("--tasks", help="lists to go through, with commas between them; by default all")
    parser.add_argument("--redo", action="store_true", help="run again what the results have")
    parser.add_argument("--seconds", type=float, default=180, help="the longest a case may take")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to read and write them")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    results = load(arguments.results)
    rows = {Case(row.task, row.model_type, row.class_name): row for row in results.get(arguments.library, [])}
    only = set((arguments.only or "").split(","))
    listed = TASKS if arguments.library != OURS else {**TASKS, **KINDS}
    tasks = listed if arguments.tasks is None else arguments.tasks.split(",")
    for case in all_cases():
        if case.task not in tasks:
            continue
        wanted = arguments.only is None or only & {case.model_type, case.class_name}
        if not wanted or (case in rows and not arguments.redo):
            continue
        row = rows[case] = run(case, arguments.library, seconds=arguments.seconds)
        print(f"{case}: {row.outcome} {row.reason}", flush=True)
        results[arguments.library] = [rows[case] for case in all_cases() if case in rows]
        save(results, arguments.results)


if __name__ == "__main__":
    main()
