# SPDX-License-Identifier: Apache-2.0
"""TRL's trainers: their fused losses in plain operations, against losses written out in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.utils as trl_utils
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from hf_optimizability import OptimizabilityConfig, OptimizabilityTrainerMixin, measure
from hf_optimizability.errors import MeasurementError
from hf_optimizability.training.trainer_loss import trainer_loss
from hf_optimizability.training.unfused_losses import unfused_losses
from tests.support import tiny_trl


def written_out(model: nn.Module, batch: dict[str, Any], loss_type: str) -> Tensor:
    """The mean over the labels that are not ignored, from the model's own logits."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1].double()
    labels = batch["labels"][:, 1:]
    taken = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != -100]
    return -(taken * taken.exp().detach()).mean() if loss_type == "dft" else -taken.mean()


def gradient(loss: Tensor, model: nn.Module, *, create_graph: bool = False) -> Tensor:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    pieces = torch.autograd.grad(loss, parameters, create_graph=create_graph, materialize_grads=True)
    return torch.cat([piece.flatten() for piece in pieces])


def product(loss: Tensor, model: nn.Module) -> Tensor:
    """The Hessian times a vector, by double backward."""
    first = gradient(loss, model, create_graph=True)
    generator = torch.Generator().manual_seed(0)
    return gradient(first @ torch.randn(len(first), generator=generator, dtype=first.dtype), model)


def gemma() -> nn.Module:
    return tiny_trl.language_model(config=Gemma2Config, cls=Gemma2ForCausalLM, head_dim=4, final_logit_softcapping=2.0)


def cohere() -> nn.Module:
    return tiny_trl.language_model(config=Cohere2Config, cls=Cohere2ForCausalLM, logit_scale=0.3)


def gpt2(seed: int = 0) -> nn.Module:
    return tiny_trl.language_model(seed, GPT2Config, GPT2LMHeadModel)


def gpt2_reward() -> nn.Module:
    return tiny_trl.language_model(0, GPT2Config, GPT2ForSequenceClassification, num_labels=1)


LORA = LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)


@pytest.mark.parametrize(
    ("make", "rows", "options"),
    [
        pytest.param(tiny_trl.language_model, tiny_trl.TEXTS, {}, id="default"),
        pytest.param(gemma, tiny_trl.TEXTS, {}, id="softcapped logits"),
        pytest.param(cohere, tiny_trl.TEXTS, {}, id="scaled logits"),
        pytest.param(tiny_trl.language_model, tiny_trl.TEXTS, {"loss_type": "dft"}, id="dft"),
        pytest.param(tiny_trl.language_model, tiny_trl.TEXTS, {"packing": True}, id="packed"),
        pytest.param(
            tiny_trl.language_model, tiny_trl.TEXTS, {"padding_free": True, "max_length": None}, id="padding-free"
        ),
        pytest.param(tiny_trl.language_model, tiny_trl.COMPLETIONS, {}, id="completion only"),
        pytest.param(tiny_trl.language_model, tiny_trl.TEXTS, {"peft_config": LORA}, id="LoRA"),
    ],
)
def test_sft_has_the_same_loss_gradient_and_second_derivative(
    tmp_path: Path, make: Any, rows: list[dict[str, Any]], options: dict[str, Any]
):
    trainer = tiny_trl.trainer(tmp_path, SFTTrainer, SFTConfig, rows, make(), **options)
    model, batch = trainer.model.double().eval(), tiny_trl.first_batch(trainer)
    fused = trainer.compute_loss(model, dict(batch))
    with sdpa_kernel(SDPBackend.MATH):
        plain = trainer_loss(trainer)(model, batch)
        expected = written_out(model, batch, trainer.args.loss_type)
        assert plain.dtype == torch.float64
        assert float(plain.detach()) == pytest.approx(float(expected.detach()), rel=1e-10)
        assert float(plain.detach()) == pytest.approx(float(fused.detach()), rel=1e-5)  # it is in float32
        torch.testing.assert_close(gradient(fused, model), gradient(expected, model), rtol=1e-4, atol=1e-5)
        fused = None
        plain, expected = trainer_loss(trainer)(model, batch), written_out(model, batch, trainer.args.loss_type)
        torch.testing.assert_close(product(plain, model), product(expected, model), rtol=1e-8, atol=1e-10)


def test_every_output_of_the_fused_head_has_its_plain_form():
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(6, 4), torch.randn(9, 4), torch.randn(9)
    targets = (hidden @ weight.T + bias).argmax(-1)
    targets[:3] = torch.tensor([0, 3, 8])
    names = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    arguments = (hidden, weight, bias, targets, 0.7, 4, 3.0, 1.3, names)
    fused = trl_utils._ChunkedLogProbFunction.apply(*arguments)
    with unfused_losses():
        plain = trl_utils._ChunkedLogProbFunction.apply(*arguments)
    assert any(fused[4]) and not all(fused[4])
    for expected, found in zip(fused, plain, strict=True):
        torch.testing.assert_close(found, expected)


def test_what_is_replaced_comes_back_also_from_an_error():
    held = dict(vars(trl_utils))
    with pytest.raises(ZeroDivisionError), unfused_losses():
        assert vars(trl_utils) != held
        raise ZeroDivisionError
    assert vars(trl_utils) == held


CONFIG = OptimizabilityConfig(
    profile="light", max_hvps=24, measure_strategy="no", probe_examples=8, probe_batch_size=8
)


def with_mixin(cls: type) -> type:
    return type(f"Measuring{cls.__name__}", (OptimizabilityTrainerMixin, cls), {})


def test_sft_is_measured_as_the_model_itself(tmp_path: Path):
    made = tiny_trl.trainer(
        tmp_path,
        with_mixin(SFTTrainer),
        SFTConfig,
        tiny_trl.TEXTS[:8],
        tiny_trl.language_model(),
        optimizability=CONFIG,
    )
    made.train()
    found = made.optimizability_report().measurements[0]
    [batch] = [made.data_collator([made.train_dataset[index] for index in range(8)])]
    expected = measure(tiny_trl.language_model(), [batch], CONFIG)
    assert (found.engine, found.fallback) == ("double_backward", None)
    assert found.num_items == expected.num_items
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.hessian.lambda_max.value == pytest.approx(expected.hessian.lambda_max.value, rel=1e-5)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_dpo_is_measured_exactly(tmp_path: Path, loss_type: str):
    """Its head gives mean logits without a gradient, for the metrics."""
    made = tiny_trl.trainer(
        tmp_path, DPOTrainer, DPOConfig, tiny_trl.PAIRS, tiny_trl.language_model(),
        ref_model=tiny_trl.language_model(1), loss_type=loss_type,
    )  # fmt: skip
    found = measure(made.model, [tiny_trl.first_batch(made)], CONFIG, loss_fn=trainer_loss(made))
    assert (found.engine, found.fallback, found.num_items) == ("double_backward", None, len(tiny_trl.PAIRS))


def test_another_layout_of_trl_falls_back_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    known = trl_utils._ChunkedLogProbFunction

    class Other(known):
        @staticmethod
        def forward(ctx: Any, hidden: Tensor, weight: Tensor, *others: Any) -> Any:
            return known.forward(ctx, hidden, weight, *others)

    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", Other)
    warned: list[str] = []
    monkeypatch.setattr("hf_optimizability.training.unfused_losses.logger.warning_once", warned.append)
    made = tiny_trl.trainer(tmp_path, SFTTrainer, SFTConfig, tiny_trl.TEXTS, tiny_trl.language_model())
    found = measure(made.model, [tiny_trl.first_batch(made)], CONFIG, loss_fn=trainer_loss(made))
    assert found.engine == "central_difference" and "is `mm`" in str(found.fallback)
    assert len(warned) == 1 and "`trl.trainer.utils._ChunkedLogProbFunction` differs from the version" in warned[0]


@pytest.mark.parametrize(
    ("cls", "config", "rows", "make"),
    [
        pytest.param(DPOTrainer, DPOConfig, tiny_trl.PAIRS, gpt2, id="DPO"),
        pytest.param(KTOTrainer, KTOConfig, tiny_trl.LABELLED, gpt2, id="KTO"),
        pytest.param(RewardTrainer, RewardConfig, tiny_trl.PAIRS, gpt2_reward, id="reward"),
    ],
)
def test_preferences_have_a_second_derivative(tmp_path: Path, cls: type, config: type, rows: Any, make: Any):
    more = {} if cls is RewardTrainer else {"ref_model": make(1).double()}
    if cls is KTOTrainer:
        more["loss_type"] = "apo_zero_unpaired"  # the default subtracts a divergence that it detaches
    made = tiny_trl.trainer(tmp_path, cls, config, rows, make(), **more)
    model, batch = made.model.double().eval(), tiny_trl.first_batch(made)
    loss_fn, parameters = trainer_loss(made), [p for p in made.model.parameters() if p.requires_grad]
    assert float(loss_fn(model, batch).detach()) == pytest.approx(
        float(made.compute_loss(model, dict(batch))), rel=1e-5
    )
    with sdpa_kernel(SDPBackend.MATH):
        found = product(loss_fn(model, batch), model)
        generator, slopes = torch.Generator().manual_seed(0), []
        direction = torch.randn(len(found), generator=generator, dtype=found.dtype)
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                for parameter, piece in zip(parameters, direction.split([p.numel() for p in parameters]), strict=True):
                    parameter.add_(step * piece.view_as(parameter))
            slopes.append(gradient(loss_fn(model, batch), model))
    torch.testing.assert_close(found, (slopes[0] - slopes[1]) / 2e-5, rtol=1e-5, atol=1e-7)


def test_a_trainer_that_generates_is_refused_by_name():
    class GRPOTrainer:
        __module__ = "trl.trainer.grpo_trainer"

    class Own(GRPOTrainer):
        pass

    with pytest.raises(MeasurementError, match="GRPOTrainer generates the completions"):
        trainer_loss(Own())
