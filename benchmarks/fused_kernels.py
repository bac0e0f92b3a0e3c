# SPDX-License-Identifier: Apache-2.0
"""How a loss that runs through the kernels people train with is measured.

    python benchmarks/fused_kernels.py

prints the table of docs/reference/kernels.md; a test holds that page to it. Kernels that need a GPU, or a library that
is not a dependency, are tried by stand-ins: the same replacement of a layer or a loss, the same way to make gradients.
"""

from __future__ import annotations

import importlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from hf_optimizability import MeasurementError, OptimizabilityConfig, measure
from hf_optimizability.training.trainer_loss import trainer_loss


VOCABULARY = 13
CONFIG = OptimizabilityConfig(profile="light", max_hvps=150, eigen_tolerance=1e-4)
HEADER = ("kernel", "tried", "how it is measured", "largest eigenvalue, off the plain model's")


@dataclass(frozen=True)
class Case:
    """A kernel, and how it is put in the place of a plain operation.

    Attributes:
        kernel: Its name, and how one gets it.
        tried: What was run here.
        change: Changes a model, and returns a loss function, or `None` for the model's own.
        plain: Changes the model that it is compared with.
    """

    kernel: str
    tried: str
    change: Callable[[LlamaForCausalLM], Any]
    plain: Callable[[LlamaForCausalLM], None] = lambda made: None


def model() -> LlamaForCausalLM:
    """Build a tiny Llama with weights large enough that its Hessian is not near zero."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=1, pad_token_id=2, **sizes))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def batch() -> dict[str, Tensor]:
    """Rows of different lengths."""
    tokens = torch.randint(3, VOCABULARY, (6, 8), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(8) < torch.tensor([[8], [5], [7], [8], [4], [6]])).long()
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


class StandInNorm(torch.autograd.Function):
    """An RMS norm whose gradients are written into memory, out of autograd's sight, as by Triton."""

    __module__ = "stand_ins"

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Compute the norm."""
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """Compute gradients without a graph."""
        x, weight = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
        with torch.enable_grad():
            y = weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + ctx.epsilon)
        by_x, by_weight = torch.autograd.grad(y, [x, weight], gradient.detach())
        return by_x, by_weight, None


class StandInCrossEntropy(torch.autograd.Function):
    """A cross entropy that makes its gradients in the forward pass."""

    __module__ = "stand_ins"

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """Compute loss and gradients."""
        hidden, weight = (tensor.detach().requires_grad_() for tensor in (hidden, weight))
        with torch.enable_grad():
            loss = nn.functional.cross_entropy(hidden @ weight.T, labels)
        ctx.save_for_backward(*torch.autograd.grad(loss, [hidden, weight]))
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """Compute gradients without a graph."""
        by_hidden, by_weight = ctx.saved_tensors
        return by_hidden * gradient, by_weight * gradient, None


class StandInAttention(torch.autograd.Function):
    """Causal attention that takes half precision alone, as FlashAttention."""

    __module__ = "stand_ins"

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attends, in half precision."""
        if query.dtype == torch.float32:
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, None]:
        """Is never reached."""
        raise NotImplementedError


def attention(implementation: str) -> Callable[[LlamaForCausalLM], None]:
    """Return a function that sets the attention of a model."""
    return lambda made: made.set_attn_implementation(implementation)


def flash_attention(made: LlamaForCausalLM) -> None:
    """Register a stand-in for FlashAttention, and select it."""

    def forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        return StandInAttention.apply(query, key, value, options["scaling"]).transpose(1, 2), None

    AttentionInterface.register("stand_in_for_flash_attention", forward)
    AttentionMaskInterface.register("stand_in_for_flash_attention", flash_attention_mask)
    made.config._attn_implementation = "stand_in_for_flash_attention"


def kernel_norms(made: LlamaForCausalLM) -> None:
    """Replace each RMS norm by the kernel, as `use_liger_kernel` and `kernelize` do."""
    for module in made.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = MethodType(lambda self, x: StandInNorm.apply(x, self.weight, 1e-6), module)


def fused_cross_entropy(made: LlamaForCausalLM) -> Any:
    """Compute the loss from the hidden states and the weight of the head."""

    def loss_fn(measured: LlamaForCausalLM, inputs: dict[str, Tensor]) -> Tensor:
        labels = inputs["labels"][:, 1:]
        hidden = measured.model(inputs["input_ids"], inputs["attention_mask"], use_cache=False).last_hidden_state
        taken = labels != -100
        return StandInCrossEntropy.apply(hidden[:, :-1][taken], measured.lm_head.weight, labels[taken])

    return loss_fn


def other_linears(module_name: str) -> Callable[[LlamaForCausalLM], None]:
    """Return a function that replaces linear layers by those of a library that rounds inputs to 8 bits."""

    def forward(self: Any, x: Tensor) -> Tensor:
        rounded = x.to(torch.float8_e4m3fn).to(x)
        return nn.functional.linear(x + (rounded - x).detach(), self.weight, self.bias)

    def change(made: LlamaForCausalLM) -> None:
        kind = type("Linear8", (nn.Linear,), {"__module__": module_name, "forward": forward})
        for module in made.model.modules():
            if type(module) is nn.Linear:
                module.__class__ = kind

    return change


def bitsandbytes(made: LlamaForCausalLM) -> None:
    """Quantizes the linear layers of the backbone to 4 bits; the rest is trained."""
    library = importlib.import_module("bitsandbytes")
    for parent, name, child in _linears(made):
        layer = library.nn.Linear4bit(child.in_features, child.out_features, bias=False, quant_type="nf4")
        layer.weight = library.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
        setattr(parent, name, layer.to("cpu"))


def dequantized(made: LlamaForCausalLM) -> None:
    """Replace the linear layers by plain ones with the same weights, rounded to 4 bits."""
    functional = importlib.import_module("bitsandbytes").functional
    for _, _, child in _linears(made):
        child.weight = nn.Parameter(
            functional.dequantize_4bit(*functional.quantize_4bit(child.weight.data, quant_type="nf4")), False
        )


def _linears(made: LlamaForCausalLM) -> list[tuple[nn.Module, str, nn.Linear]]:
    """List the linear layers of the backbone, each with its parent and name."""
    pairs = [(module, *named) for module in made.model.modules() for named in module.named_children()]
    return [(parent, name, child) for parent, name, child in pairs if isinstance(child, nn.Linear)]


def trl(**options: Any) -> Callable[[LlamaForCausalLM], Any]:
    """Return the loss of TRL's SFTTrainer, with its fused head."""

    def change(made: LlamaForCausalLM) -> Any:
        library = importlib.import_module("trl")
        data = importlib.import_module("datasets").Dataset
        tokenizers = importlib.import_module("tokenizers")
        words = tokenizers.models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w2")
        fast = importlib.import_module("transformers").PreTrainedTokenizerFast
        tokenizer = fast(tokenizer_object=tokenizers.Tokenizer(words), eos_token="w1", pad_token="w2")
        rows = [{"input_ids": row[mask == 1].tolist()} for row, mask in zip(*list(batch().values())[:2], strict=True)]
        settings = {"use_cpu": True, "bf16": False, "max_length": 16, "per_device_train_batch_size": 6, **options}
        with tempfile.TemporaryDirectory() as folder:
            trainer = library.SFTTrainer(
                made, library.SFTConfig(folder, report_to="none", **settings), processing_class=tokenizer,
                train_dataset=data.from_list(rows),
            )  # fmt: skip
            loss_fn = trainer_loss(trainer)
            [collated] = [trainer.data_collator(list(trainer.train_dataset))]
        return lambda measured, inputs: loss_fn(measured, dict(collated))

    return change


CASES = [
    Case("PyTorch's SDPA (`attn_implementation='sdpa'`, the default)", "itself", attention("sdpa")),
    Case("eager attention", "itself", attention("eager")),
    Case("FlexAttention (`'flex_attention'`)", "itself, on a CPU", attention("flex_attention")),
    Case("FlashAttention 2, 3, 4, also from the Hub", "a stand-in with their dtypes", flash_attention),
    Case("Liger (`use_liger_kernel=True`): its layers", "a stand-in norm", kernel_norms),
    Case("Liger: its fused linear cross entropy", "a stand-in (in eval mode Liger does without)", fused_cross_entropy),
    Case("Hub kernels (`use_kernels=True`)", "a stand-in norm", kernel_norms),
    Case("Unsloth's layers and cross entropy", "a stand-in cross entropy", fused_cross_entropy),
    Case("TRL's fused head (`SFTTrainer`'s default)", "itself", trl()),
    Case("packed rows (`packing=True`)", "itself, in TRL", trl(packing=True)),
    Case("padding-free rows (`padding_free=True`)", "itself, in TRL", trl(padding_free=True, max_length=None)),
    Case("FP8 by torchao (accelerate's `AO`)", "a stand-in layer", other_linears("torchao.float8.linear")),
    Case("FP8 by Transformer Engine, MS-AMP", "a stand-in layer", other_linears("transformer_engine.pytorch")),
    Case("4-bit and 8-bit weights (bitsandbytes)", "itself, in 4 bits on a CPU", bitsandbytes, dequantized),
]


def outcome(case: Case) -> tuple[str, str]:
    """How a case is measured, and its relative difference to the plain model."""
    made = model()
    loss_fn = case.change(made)
    try:
        found = measure(made, [batch()], CONFIG, loss_fn=loss_fn)
    except MeasurementError as error:
        return f"refused: {first_sentence(error.reason)}", "—"
    way = {"double_backward": "exact", "central_difference": "central differences"}[found.engine]
    if found.engine == "double_backward":
        way += f", {found.attention} attention"
    if found.fallback:
        way += f", since: {first_sentence(str(found.fallback))}"
    off = abs(found.hessian.lambda_max.value / reference(case.plain) - 1)
    resolved = 1e-3 if found.engine == "double_backward" else 1e-2  # differences depend on the CPU's kernels
    return way, f"below {100 * resolved:g} %" if off < resolved else f"{100 * off:.1f} %"


@cache
def reference(plain: Callable[[LlamaForCausalLM], None]) -> float:
    """Return the largest eigenvalue of the plain model."""
    made = model()
    plain(made)
    return measure(made, [batch()], CONFIG).hessian.lambda_max.value


def first_sentence(text: str) -> str:
    """Return the text up to its first full stop that ends a sentence."""
    return f"{text.split('. ')[0].rstrip('.')}."


def table() -> Iterator[str]:
    """Yield the lines of the table."""
    yield f"| {' | '.join(HEADER)} |"
    yield "|:--|:--|:--|:--|"
    for case in CASES:
        yield row(case)


def row(case: Case) -> str:
    """Return the line of the table for a case."""
    return f"| {' | '.join((case.kernel, case.tried, *outcome(case)))} |"


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for line in table():
        print(line)


if __name__ == "__main__":
    main()
