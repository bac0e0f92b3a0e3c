# SPDX-License-Identifier: Apache-2.0
"""The self-check: losses that draw, means over other things than labels, gradients that are not the loss's."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ElectraConfig,
    ElectraForPreTraining,
    LlamaConfig,
    LlamaForCausalLM,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from hf_optimizability import Measurement, MeasurementError, OptimizabilityConfig, measure
from hf_optimizability.curvature.gradient import gradient
from hf_optimizability.measurement.mean_check import check_mean, mean_loss
from hf_optimizability.measurement.slope_check import slope_errors
from hf_optimizability.model_state.measuring import measuring
from hf_optimizability.objective.objective import Objective
from tests.support import tiny_models


CONFIG = OptimizabilityConfig(profile="light", max_hvps=16)
Batch = dict[str, Tensor]


def batches_of(rows: Batch, size: int) -> list[Batch]:
    number = len(next(iter(rows.values())))
    return [{name: values[i : i + size] for name, values in rows.items()} for i in range(0, number, size)]


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def rows(number: int = 12) -> Batch:
    torch.manual_seed(1)
    return {"x": torch.randn(number, 4, dtype=torch.float64), "y": torch.randint(3, (number,))}


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def plain_gradient_norm(model: nn.Module, losses: Callable[[], Tensor]) -> float:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(losses(), parameters, materialize_grads=True)
    return float(torch.cat([gradient.flatten() for gradient in gradients]).norm())


class TestMeans:
    """Each against the model's own loss on all examples at once."""

    def same_however_cut(self, model: nn.Module, whole: Batch, sizes: tuple[int, ...]) -> list[Measurement]:
        found = [measure(model, batches_of(whole, size), CONFIG) for size in sizes]
        model.eval()
        loss = float(model(**whole).loss.detach())
        norm = plain_gradient_norm(model, lambda: model(**whole).loss)
        for measurement in found:
            assert measurement.loss == pytest.approx(loss, rel=1e-5)
            assert measurement.grad_norm == pytest.approx(norm, rel=1e-4)
        return found

    def test_ctc_is_a_mean_over_examples(self):
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        conv = {"conv_dim": (8,), "conv_stride": (4,), "conv_kernel": (8,), "num_conv_pos_embeddings": 4}
        groups = {"num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer"}
        config = Wav2Vec2Config(vocab_size=6, ctc_loss_reduction="mean", **sizes, **conv, **groups)
        labels = torch.randint(1, 6, (4, 5))
        labels[1:3, 2:] = -100
        self.same_however_cut(
            Wav2Vec2ForCTC(config).double(),
            {"input_values": torch.randn(4, 100).double(), "labels": labels},
            (4, 2, 1),
        )

    def test_a_sum_is_measured_on_batches_as_collated(self):
        def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
            return F.cross_entropy(model(batch["x"]), batch["y"], reduction="sum")

        model, whole = net(), rows()
        found = measure(model, batches_of(whole, 6), CONFIG, loss_fn=loss_fn)
        mean_of_batches = sum(float(loss_fn(model, batch).detach()) for batch in batches_of(whole, 6)) / 2
        assert found.loss == pytest.approx(mean_of_batches, rel=1e-10)
        assert found.self_check.unit == "batches" and not found.self_check.can_cut
        assert "as collated" in str(found.self_check)

    def test_attended_positions(self):
        torch.manual_seed(0)
        size = {"vocab_size": 9, "hidden_size": 4, "embedding_size": 4, "num_hidden_layers": 1}
        config = ElectraConfig(num_attention_heads=2, intermediate_size=8, max_position_embeddings=8, **size)
        mask = torch.tensor([[1] * 8, [1] * 7 + [0], [1] * 3 + [0] * 5, [1] * 2 + [0] * 6])
        labels = torch.randint(2, (4, 8))
        whole = {"input_ids": torch.randint(9, (4, 8)), "attention_mask": mask, "labels": labels}
        for found in self.same_however_cut(ElectraForPreTraining(config).double(), whole, (4, 2)):
            assert (found.self_check.unit, found.num_items) == ("attended tokens", 20)

    def test_pixels_that_a_segmentation_ignores(self):
        torch.manual_seed(0)
        config = SegformerConfig(
            num_encoder_blocks=1, depths=[1], sr_ratios=[1], hidden_sizes=[4], num_attention_heads=[1],
            patch_sizes=[7], strides=[4], mlp_ratios=[2], decoder_hidden_size=4, num_labels=3,
        )  # fmt: skip
        labels = torch.randint(3, (4, 8, 8))
        labels[0] = 255
        labels[2, 4:] = 255
        whole = {"pixel_values": torch.randn(4, 3, 8, 8).double(), "labels": labels}
        for found in self.same_however_cut(SegformerForSemanticSegmentation(config).double(), whole, (4, 2, 1)):
            assert found.num_items == int((labels != 255).sum())

    def test_real_labels_of_minus_100_count(self):
        model = tiny_models.make("bert", num_labels=1, problem_type="regression")
        [batch] = tiny_models.cut(tiny_models.examples("bert", 4), 4)
        batch["labels"] = torch.tensor([-100.0, 3.0, -100.0, 0.5], dtype=torch.float64)
        for found in self.same_however_cut(model, batch, (4, 1)):
            assert found.num_items == 4

    @pytest.mark.parametrize("scale", [0.0, 1.0])  # a head of zeros: the losses of all examples are equal
    def test_class_weights_keep_batches_whole(self, scale: float):
        def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
            weights = torch.tensor([1.0, 9.0, 3.0], dtype=torch.float64)
            return F.cross_entropy(model(batch["x"]), batch["y"], weight=weights)

        model, whole = net(), rows(11)
        with torch.no_grad():
            model[2].weight.mul_(scale)
            model[2].bias.mul_(scale)
        found = measure(model, [whole], CONFIG, loss_fn=loss_fn)
        assert found.self_check.unit == "batches"
        objective = Objective(model, [whole], loss_fn=loss_fn).checked(found.self_check)
        with pytest.raises(ValueError, match="must stay as they were collated"):
            objective.cut(1)

    def test_pairs_stay_together(self):
        def preference(model: nn.Module, batch: Batch) -> Tensor:
            chosen, rejected = model(batch["x"])[:, 0].chunk(2)
            return -F.logsigmoid(chosen - rejected).mean()

        model, whole = net(), {"x": rows()["x"]}
        found = measure(model, [whole], CONFIG, loss_fn=preference)
        assert (found.self_check.unit, found.num_items) == ("pairs", 6)
        pieces = Objective(model, [whole], loss_fn=preference).checked(found.self_check).cut(1)
        assert len(pieces.batches) == 6
        assert mean_loss(pieces) == pytest.approx(found.loss, rel=1e-10)

    @pytest.mark.parametrize("fits", [8, 3])
    def test_pairs_are_not_torn_where_memory_is_short(self, fits: int):
        def preference(model: nn.Module, batch: Batch) -> Tensor:
            if len(batch["x"]) > (fits if torch.is_grad_enabled() or fits < 8 else 12):
                raise torch.OutOfMemoryError("made up")
            chosen, rejected = model(batch["x"])[:, 0].chunk(2)
            return -F.logsigmoid(chosen - rejected).mean()

        model, whole = net(), {"x": rows()["x"]}
        chosen, rejected = model(whole["x"])[:, 0].chunk(2)
        if fits == 8:  # a forward pass of all 12 does
            found = measure(model, [whole], CONFIG, loss_fn=preference)
            assert found.loss == pytest.approx(float(-F.logsigmoid(chosen - rejected).mean().detach()), rel=1e-10)
            return
        with pytest.raises(MeasurementError, match=r"Collate fewer examples at a time \(`probe_batch_size`\)"):
            measure(model, [whole], CONFIG, loss_fn=preference)

    def test_a_contrastive_loss_keeps_batches_whole(self):
        def contrastive(model: nn.Module, batch: Batch) -> Tensor:
            similarity = model(batch["x"]) @ model(batch["x"].flip(1)).T
            return F.cross_entropy(similarity, torch.arange(len(similarity)))

        found = measure(net(), batches_of({"x": rows()["x"]}, 6), CONFIG, loss_fn=contrastive)
        assert found.self_check.unit == "batches"


class TestDraws:
    def test_each_batch_has_one_draw_in_all_passes(self):
        model = net()

        def denoising(model: nn.Module, batch: Batch) -> Tensor:
            return (model(batch["x"] + torch.randn_like(batch["x"])) ** 2).mean()

        batches = batches_of(rows(), 6)
        before = torch.get_rng_state()
        config = OptimizabilityConfig(profile="light", max_hvps=64, eigen_tolerance=1e-3)
        found = [measure(model, batches, config, loss_fn=denoising) for _ in range(2)]
        assert torch.equal(before, torch.get_rng_state())
        assert found[0].self_check.draws and not found[0].self_check.can_cut
        assert found[0].loss == found[1].loss
        objective = Objective(model, batches_of(rows(), 6), loss_fn=denoising, seed=CONFIG.probe_seed)
        draws = []
        for index, batch in enumerate(objective.batches):
            torch.manual_seed(CONFIG.probe_seed + index)
            draws.append(batch["x"] + torch.randn_like(batch["x"]))

        def loss_at(*weights: Tensor) -> Tensor:
            named = dict(zip(dict(model.named_parameters()), weights, strict=True))
            return sum((functional_call(model, named, (x,)) ** 2).mean() for x in draws) / 2

        weights = tuple(parameter.detach() for parameter in model.parameters())
        blocks = torch.autograd.functional.hessian(loss_at, weights)
        hessian = torch.cat(
            [
                torch.cat([block.reshape(w.numel(), -1) for block in row], 1)
                for w, row in zip(weights, blocks, strict=True)
            ]
        )
        assert found[0].hessian.lambda_max.value == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-2)

    def test_masked_autoencoder(self):
        torch.manual_seed(0)
        size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        decoder = {f"decoder_{name}": value for name, value in size.items()}
        model = ViTMAEForPreTraining(ViTMAEConfig(image_size=8, patch_size=2, **size, **decoder))
        batches = [{"pixel_values": torch.randn(3, 3, 8, 8)} for _ in range(2)]
        first, second = (measure(model, batches, CONFIG) for _ in range(2))
        assert first.self_check.draws
        assert first.hessian.lambda_max == second.hessian.lambda_max

    def test_random_numbers_without_an_effect_are_no_draw(self):
        """Layer drop, for instance, asks for a number in eval mode too."""

        def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
            torch.rand(())
            return cross_entropy(model, batch)

        check = measure(net(), [rows()], CONFIG, loss_fn=loss_fn).self_check
        assert not check.draws and check.can_cut and check.repeat_error == 0

    @pytest.mark.parametrize("size", [1e-15, 1e-9, 1e-3])
    def test_a_draw_is_seen_however_small(self, size: float):
        def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
            return cross_entropy(model, batch) * (1 + size * torch.rand((), dtype=torch.float64))

        check = measure(net(), [rows()], CONFIG, loss_fn=loss_fn).self_check
        assert check.draws and check.repeat_error == 0
        assert "random numbers in eval mode" in str(check)

    @pytest.mark.parametrize("draws", [False, True])
    def test_rounding_of_a_kernel_is_reported(self, draws: bool):
        """A sum in any order: the same batch has two losses that differ by 1e-8, whatever the seed."""
        calls = itertools.count()

        def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
            noise = 1e-3 * torch.rand((), dtype=torch.float64) if draws else 0
            return cross_entropy(model, batch) * (1 + noise + 1e-8 * (next(calls) % 5))

        check = measure(net(), [rows()], CONFIG, loss_fn=loss_fn).self_check
        assert check.draws == draws
        assert 1e-8 < check.repeat_error < 5e-8
        assert "a kernel is not deterministic" in str(check)

    def test_a_loss_that_never_repeats_is_refused(self):
        calls = itertools.count()

        def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
            return cross_entropy(model, batch) * (1 + 1e-3 * next(calls))

        with pytest.raises(MeasurementError, match=r"differs by .* between two passes"):
            measure(net(), [rows()], CONFIG, loss_fn=loss_fn)


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return -gradient


class TestSlopes:
    def test_gradient_reversal_is_refused_by_name(self):
        def adversarial(model: nn.Module, batch: Batch) -> Tensor:
            hidden = model[1](model[0](batch["x"]))
            return F.cross_entropy(model[2](_Reversed.apply(hidden)), batch["y"])

        with pytest.raises(MeasurementError, match=r"not its slope.*`0\.\w+`.*gradient reversal"):
            measure(net(), [rows()], CONFIG, loss_fn=adversarial)

    def test_a_detached_part_is_refused_by_name(self):
        def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
            return F.cross_entropy(model[2](model[1](model[0](batch["x"])).detach()), batch["y"])

        with pytest.raises(MeasurementError, match=r"exactly 0 by `0\.weight`, `0\.bias`.*detached"):
            measure(net(), [rows()], CONFIG, loss_fn=loss_fn)

    def test_a_detached_loss_is_refused_along_whatever_direction(self):
        def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
            return cross_entropy(model, batch).detach() + 0 * model[0].weight.sum()

        for seed in range(12):  # along random signs the slope of some is hardly any
            with pytest.raises(MeasurementError, match="exactly 0 everywhere"):
                measure(net(seed), [rows()], CONFIG, loss_fn=loss_fn)

    def test_a_part_that_is_detached_here_and_not_there_is_refused(self):
        """What is missing may be nearly orthogonal to the gradient, with whatever sign for each tensor."""

        def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
            hidden = model[0](batch["x"])
            loss = F.cross_entropy(model[2](model[1](hidden).detach()), batch["y"])
            return loss + F.mse_loss(hidden.mean(1), batch["x"][:, 0])

        for seed in range(12):
            with pytest.raises(MeasurementError, match="not its slope"):
                measure(net(seed), [rows()], CONFIG, loss_fn=loss_fn)

    def test_a_part_that_is_detached_is_refused_where_the_rest_is_at_its_least(self):
        """What is missing drowns in rounding if it is compared with the gradient, which is near 0."""
        model, batch = nn.Linear(4, 1), {"x": rows(48)["x"].float()}
        target = torch.sin(batch["x"][:, :1])
        least = torch.linalg.lstsq(torch.cat([batch["x"], torch.ones(48, 1)], 1), target).solution[:, 0]
        with torch.no_grad():
            model.weight.copy_(least[None, :4])
            model.bias.copy_(least[4:])

        def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
            penalty = sum(p.square().sum() for p in model.parameters())
            return F.mse_loss(model(batch["x"]), torch.sin(batch["x"][:, :1])) + 0.01 * penalty.detach()

        with pytest.raises(MeasurementError, match="not its slope"):
            measure(model, [batch], CONFIG, loss_fn=loss_fn)

    @pytest.mark.parametrize("gain", [3.0, 30.0])
    def test_a_part_that_is_detached_from_a_parameter_that_is_0_is_refused(self, gain: float):
        class Shifted(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net, self.shift = net(), nn.Parameter(torch.zeros(8, dtype=torch.float64))

        def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
            shift = torch.cat([model.shift[:4], model.shift[4:].detach()]).view(2, 4).sum(0)
            return F.cross_entropy(model.net(batch["x"] + gain * shift), batch["y"])

        with pytest.raises(MeasurementError, match="not its slope"):
            measure(Shifted(), [rows()], CONFIG, loss_fn=loss_fn)

    @pytest.mark.parametrize("scale", [1e-6, 1e6])
    def test_scales_that_differ_are_not_refused(self, scale: float):
        model = net()
        with torch.no_grad():
            model[2].weight *= scale
        assert measure(model, [rows()], CONFIG, loss_fn=cross_entropy).self_check is not None

    def test_half_detached_is_refused(self):
        def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
            logits = model(batch["x"])
            return F.cross_entropy(0.5 * logits + 0.5 * logits.detach(), batch["y"])

        with pytest.raises(MeasurementError, match="not its slope: they differ by 100%"):
            measure(net(), [rows()], CONFIG, loss_fn=loss_fn)

    def test_a_loss_that_runs_its_own_backward_is_refused(self):
        def cached(model: nn.Module, batch: Batch) -> Tensor:
            loss = cross_entropy(model, batch).detach().requires_grad_()
            loss.register_hook(lambda gradient: None)
            return loss

        with pytest.raises(MeasurementError, match=r"exactly 0 everywhere.*GradCache"):
            measure(net(), [rows()], CONFIG, loss_fn=cached)

    def test_a_gradient_that_is_zero_by_right_is_not_refused(self):
        class LowRank(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Parameter(torch.ones(4, 1, dtype=torch.float64))
                self.b = nn.Parameter(torch.zeros(1, 3, dtype=torch.float64))

            def forward(self, x: Tensor) -> Tensor:
                return x @ self.a @ self.b

        assert measure(LowRank(), [rows()], CONFIG, loss_fn=cross_entropy).grad_norm > 0  # by `a` it is 0
        saddle = LowRank()
        with torch.no_grad():
            saddle.a.zero_()
        assert measure(saddle, [rows()], CONFIG, loss_fn=cross_entropy).grad_norm == 0
        perfect = measure(
            nn.Linear(4, 3).double(), [rows()], CONFIG, loss_fn=lambda model, batch: 0 * model(batch["x"]).sum()
        )
        assert perfect.loss == perfect.grad_norm == 0

    def test_kinks_are_not_refused(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
        batch = {name: values.float() if name == "x" else values for name, values in rows(64).items()}
        errors = measure(model, [batch], CONFIG, loss_fn=cross_entropy).self_check.slope_errors
        assert all(error is None or error < 0.02 for error in errors)

    @pytest.mark.parametrize("detached", [0.0, 0.75])
    def test_a_gradient_at_a_kink_is_one_of_two_slopes(self, detached: float):
        def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
            output = model(batch["x"])
            output = detached * output.detach() + (1 - detached) * output
            return F.relu(output - 1).mean() + output.mean()

        model = nn.Linear(1, 1, bias=False).double()
        with torch.no_grad():
            model.weight.fill_(1)  # behind the kink the slope is 1, ahead of it 2, and of central differences 1.5
        batch = {"x": torch.ones(2, 1, dtype=torch.float64)}
        if detached:  # the gradient is a quarter of the smaller slope
            with pytest.raises(MeasurementError, match="not its slope"):
                measure(model, [batch], CONFIG, loss_fn=loss_fn)
        else:
            assert measure(model, [batch], CONFIG, loss_fn=loss_fn).self_check.slope_errors == (None, None)

    @pytest.mark.parametrize(("activation", "lr", "steps"), [(nn.ReLU, 0.05, 3000), (nn.SiLU, 0.5, 200)])
    def test_examples_learnt_by_heart_are_not_refused(self, activation: type[nn.Module], lr: float, steps: int):
        """Losses of 1e-5, which rounding of probabilities near 1 changes by some per cent; ReLU rests on a kink."""
        model, batch = _learnt(activation, lr=lr, steps=steps)
        found = measure(model, batches_of(batch, 7), CONFIG, loss_fn=cross_entropy)
        exact = copy.deepcopy(model).double()
        norm = plain_gradient_norm(exact, lambda: F.cross_entropy(exact(batch["x"].double()), batch["y"]))
        assert found.loss < 1e-4
        assert found.grad_norm == pytest.approx(norm, rel=1e-2)

    def test_targets_that_are_large_are_not_refused(self):
        """Prices of houses: a step changes the loss by less than rounding does."""
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        batch = {"x": rows()["x"].float(), "y": 2e5 + 1e3 * torch.randn(12, 1)}
        found = measure(model, [batch], CONFIG, loss_fn=lambda model, batch: F.mse_loss(model(batch["x"]), batch["y"]))
        inputs = torch.cat([batch["x"], torch.ones(12, 1)], dim=1).double()
        assert found.hessian.lambda_max.value == pytest.approx(
            float(torch.linalg.eigvalsh(2 * inputs.T @ inputs / 12)[-1]), rel=1e-4
        )
        assert {check.verdict for check in found.eigenvalue_checks} == {"not checked"}

    def test_dead_units_that_a_step_brings_to_life_are_no_slope(self):
        model = nn.Sequential(nn.Linear(1, 64), nn.ReLU(), nn.Linear(64, 2))
        torch.manual_seed(0)
        with torch.no_grad():
            model[0].weight.fill_(1e4)
            model[0].bias.fill_(-1e4 - 1)  # all units are dead by a hair
            model[2].weight.normal_(std=1e4)
        batch = {"x": torch.ones(8, 1), "y": torch.tensor([0, 1] * 4)}
        objective = Objective(model, [batch], loss_fn=cross_entropy)
        with measuring(model, seed=0, state=objective.state):
            point = gradient(objective)
            assert point.tensors[0].norm() == 0
            slope_errors(objective, point)

    @pytest.mark.parametrize("tied", [True, False])
    def test_a_padding_token_in_the_middle_of_a_row_is_not_refused(self, tied: bool):
        """The end of a turn, as chats have it: torch makes no gradient for its lookup, which the loss depends on."""
        torch.manual_seed(0)
        size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=12, num_key_value_heads=2, pad_token_id=2, tie_word_embeddings=tied, **size)
        )
        tokens = torch.randint(3, 12, (4, 6))
        tokens[:, 3] = 2
        found = measure(model, [{"input_ids": tokens, "labels": tokens}], CONFIG)
        norm = plain_gradient_norm(model.eval(), lambda: model(input_ids=tokens, labels=tokens).loss)
        assert found.grad_norm == pytest.approx(norm, rel=1e-4)
        assert max(found.self_check.slope_errors) < 0.01


def _learnt(activation: type[nn.Module], *, lr: float, steps: int) -> tuple[nn.Module, Batch]:
    """Return a network and the examples that it has learnt by heart."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), activation(), nn.Linear(16, 16), activation(), nn.Linear(16, 3))
    inputs = torch.randn(32, 5, generator=torch.Generator().manual_seed(0))
    batch = {"x": inputs, "y": (inputs.sum(1) > 0).long() + (inputs[:, 0] > 1).long()}
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()
    return model, batch


def test_batches_that_the_loss_writes_to_come_back():
    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model, {"x": batch["x"].mul_(0.5), "y": batch.pop("y")})

    model, whole = net(), rows()
    kept = {name: values.clone() for name, values in whole.items()}
    found = measure(model, [whole], CONFIG, loss_fn=loss_fn)
    assert whole.keys() == kept.keys() and all(torch.equal(whole[name], kept[name]) for name in kept)
    assert found.loss == pytest.approx(cross_entropy(model, {**kept, "x": kept["x"] / 2}).item(), rel=1e-12)


def test_price():
    """At most 5 % of a standard measurement: a forward pass is a third of a gradient, a product two and a half."""
    calls: list[bool] = []

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return cross_entropy(model, batch)

    objective = Objective(net(), batches_of(rows(), 6), loss_fn=loss_fn)
    with measuring(objective.model, seed=0, state=objective.state):
        point = gradient(objective)
        calls.clear()
        check_mean(objective)
        slope_errors(objective, point)
    assert not any(calls)
    standard = OptimizabilityConfig(profile="standard").budget.max_hvps
    assert len(calls) / 2 / 3 <= 0.05 * 2.5 * standard


def test_bert_for_classification_is_a_mean_over_examples():
    model = BertForSequenceClassification(
        BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    )
    batch = {"input_ids": torch.randint(9, (4, 3)), "labels": torch.tensor([0, 1, 1, 0])}
    check = measure(model, [batch], CONFIG).self_check
    assert check.unit == "items" and check.can_cut and not check.draws and check.mean_error < 0.01
    assert str(check).startswith(
        "the mean over items of a batch is that of its halves; the gradient is the slope of the loss"
    )
