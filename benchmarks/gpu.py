# SPDX-License-Identifier: Apache-2.0
"""The price of a measurement on one GPU, by model size: gradient, products, and a whole light measurement.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --sizes 124M 1.2B --dtypes bfloat16
    python benchmarks/gpu.py --sizes 6.7B --dtypes bfloat16 --examples 1 --repeats 2 --parts gradient product
    python benchmarks/gpu.py --device cpu --sizes tiny --dtypes float32

Decoders with random weights, built on the device; the sizes are those of GPT-2 and Llama. The gradient is taken as
training takes it, in the weights' own precision and with the attention kernel that torch picks (flash or
memory-efficient); products as `measure` takes them, in float32 and with an attention kernel that has a second
derivative. What does not fit into memory is recorded as that. Each model's rows replace those that
`benchmarks/results/gpu.json` has of it; `gpu.md` is drawn from all.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tables import table
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel

from hf_optimizability import MeasurementError, OptimizabilityConfig, measure
from hf_optimizability.curvature.compact_embeddings import drop_unused_embedding_rows
from hf_optimizability.curvature.hessian import HessianOperator
from hf_optimizability.curvature.twice_differentiable import CheapSecondDerivatives
from hf_optimizability.model_state.measuring import full_precision, math_attention, measuring
from hf_optimizability.objective.objective import Batch, Objective


RESULTS = Path(__file__).parent / "results"
PROBE_BLOCK_SIZE = 4
SEED = 0
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def gpt2(*, width: int, layers: int, heads: int, vocabulary: int = 50257) -> Callable[[], PreTrainedConfig]:
    """Return the configuration of a decoder of GPT-2's shape."""
    return partial(GPT2Config, n_embd=width, n_layer=layers, n_head=heads, vocab_size=vocabulary)


def llama(*, width: int, inner: int, layers: int, heads: int, groups: int, vocabulary: int, tied: bool) -> Any:
    """Return the configuration of a decoder of Llama's shape."""
    return partial(
        LlamaConfig,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


SIZES: dict[str, Callable[[], PreTrainedConfig]] = {
    "tiny": gpt2(width=32, layers=2, heads=2, vocabulary=100),
    "124M": gpt2(width=768, layers=12, heads=12),
    "355M": gpt2(width=1024, layers=24, heads=16),
    "774M": gpt2(width=1280, layers=36, heads=20),
    "1.2B": llama(width=2048, inner=8192, layers=16, heads=32, groups=8, vocabulary=128256, tied=True),
    "1.6B": gpt2(width=1600, layers=48, heads=25),
    "3.2B": llama(width=3072, inner=8192, layers=28, heads=24, groups=8, vocabulary=128256, tied=True),
    "6.7B": llama(width=4096, inner=11008, layers=32, heads=32, groups=32, vocabulary=32000, tied=False),
}


PARTS = ("gradient", "product", "lockstep", "card")


def measured(
    size: str,
    dtype: torch.dtype,
    parts: Sequence[str],
    *,
    device: torch.device,
    repeats: int,
    examples: int,
    tokens: int,
) -> Iterator[dict[str, Any]]:
    """Yield the results for one model after each part, so that a part that fails does not lose the others."""
    result: dict[str, Any] = {
        "size": size,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": version("torch"),
        "examples": examples,
        "tokens": tokens,
    }
    built = attempt(partial(build, size, dtype, device=device, examples=examples, tokens=tokens))
    if "failed" in built:
        yield result | built
        return
    model, batch = built["model"], built["batch"]
    objective = Objective(model, [batch])
    result["parameters"] = sum(parameter.numel() for parameter in objective.parameters)
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "gradient": partial(timed, partial(gradient, objective), device=device, repeats=repeats),
        "product": partial(products, objective, 1, device=device, repeats=repeats),
        "lockstep": partial(products, objective, PROBE_BLOCK_SIZE, device=device, repeats=repeats),
        "card": partial(card, model, batch, device=device),
    }
    for name in parts:
        result[name] = attempt(ways[name])
        print(f"{size}, {result['dtype']}, {name}: {result[name]}", flush=True)
        yield result


def attempt(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the result of an action, or that memory did not suffice.

    Example:
        >>> def too_large():
        ...     raise torch.OutOfMemoryError
        >>> attempt(too_large)
        {'failed': 'out of memory'}
    """
    try:
        return action()
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    except MeasurementError as error:
        if not isinstance(error.__cause__, torch.OutOfMemoryError):
            raise
        return {"failed": "out of memory"}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def build(size: str, dtype: torch.dtype, *, device: torch.device, examples: int, tokens: int) -> dict[str, Any]:
    """Build a model with random weights and a batch of random tokens, on the device."""
    torch.manual_seed(SEED)
    config = SIZES[size]()
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        ids = torch.randint(config.vocab_size, (examples, tokens))
    return {"model": model, "batch": {"input_ids": ids, "labels": ids}}


def gradient(objective: Objective) -> None:
    """One gradient, thrown away."""
    for loss, _ in objective.losses():
        torch.autograd.grad(loss, objective.parameters)


def products(objective: Objective, columns: int, *, device: torch.device, repeats: int) -> dict[str, Any]:
    """Time a product with this many vectors at once, building its graph each time."""
    with as_measured(objective):
        vectors = torch.randn(columns, HessianOperator(objective).size, device=device).T
        found = timed(lambda: HessianOperator(objective).matmat(vectors), device=device, repeats=repeats)
    return found | {"seconds": found["seconds"] / columns}


@contextmanager
def as_measured(objective: Objective) -> Iterator[None]:
    """Set up the model state in which `measure` computes its products."""
    with (
        measuring(objective.model, seed=SEED),
        full_precision(objective.model),
        math_attention(),
        CheapSecondDerivatives(),
        drop_unused_embedding_rows(objective),
    ):
        yield


def card(model: PreTrainedModel, batch: Batch, *, device: torch.device) -> dict[str, Any]:
    """Take a whole measurement with the light profile."""
    forget_peak(device)
    found = measure(model, [batch], OptimizabilityConfig(profile="light"))
    assert found.hessian.lambda_min is not None
    return {
        "seconds": found.seconds,
        "peak_gib": peak_gib(device),
        "hvps": found.hvps,
        "converged": found.converged,
        "lambda_max": found.hessian.lambda_max.value,
        "lambda_min": found.hessian.lambda_min.value,
        "trace": found.hessian.trace.value,
        "trace_std_error": found.hessian.trace.std_error,
    }


def timed(action: Callable[[], object], *, device: torch.device, repeats: int) -> dict[str, Any]:
    """Median seconds of a call and the most memory it held, the model included, after one call to warm up."""
    forget_peak(device)
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        started = time.perf_counter()
        action()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return {"seconds": statistics.median(times[1:]), "peak_gib": peak_gib(device)}


def synchronize(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget_peak(device: torch.device) -> None:
    """Begins to watch for the most memory held."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    """Return the peak GPU memory since `forget_peak`; `None` on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def markdown(results: dict[str, Any]) -> str:
    """Return the results as one table."""
    columns = ["model", "weights", "texts", "gradient", "one product / gradient", f"{PROBE_BLOCK_SIZE} at once, each"]
    rows = []
    for model in results["models"]:
        gradient_seconds = model.get("gradient", {}).get("seconds")
        cells = [model["size"], model["dtype"], f"{model['examples']} of {model['tokens']} tokens"]
        cells += [_seconds(model.get("gradient", model))]
        cells += [_ratio(model.get(part, {}), gradient_seconds) for part in ("product", "lockstep")]
        rows.append([*cells, _seconds(model.get("card", {}))])
    machines = sorted({f"{model['device']}, torch {model['torch']}" for model in results["models"]})
    lines = [
        "# On a GPU", "",
        "Decoders with random weights, by `python benchmarks/gpu.py`: a gradient in the weights' own precision and "
        "with the attention kernel that torch picks; a product with the Hessian as `measure` makes it, in float32 "
        "without TF32, which is expensive relative to a gradient in bfloat16; a whole light measurement. Peak memory "
        f"includes the model. A dash: not tried, or not ended. {'; '.join(machines)}.", "",
    ]  # fmt: skip
    return "\n".join([*lines, *table([*columns, "light measurement"], rows), ""])


def _seconds(part: dict[str, Any]) -> str:
    if "seconds" not in part:
        return str(part.get("failed", "–"))
    hvps = f", {part['hvps']} HVPs" if "hvps" in part else ""
    return f"{part['seconds']:.3g} s{hvps}{_memory(part)}"


def _ratio(part: dict[str, Any], gradient_seconds: float | None) -> str:
    if "seconds" not in part or gradient_seconds is None:
        return _seconds(part)
    return f"{part['seconds'] / gradient_seconds:.1f}{_memory(part)}"


def _memory(part: dict[str, Any]) -> str:
    return "" if part["peak_gib"] is None else f", {part['peak_gib']:.1f} GiB"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures each size in each precision; writes the results after each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[size for size in SIZES if size != "tiny"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--out", type=Path, default=RESULTS, help="Folder of gpu.json and gpu.md.")
    options = parser.parse_args(arguments)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        print("There is no GPU here. Pass `--device cpu --sizes tiny` to try the benchmark without one.")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "gpu.json"
    models: dict[tuple[str, str], dict[str, Any]] = {}
    if file.exists():
        models = {(model["size"], model["dtype"]): model for model in json.loads(file.read_text())["models"]}
    for size in options.sizes:
        for dtype in options.dtypes:
            parts = measured(
                size,
                DTYPES[dtype],
                options.parts,
                device=options.device,
                repeats=options.repeats,
                examples=options.examples,
                tokens=options.tokens,
            )
            for models[size, dtype] in parts:
                found = sorted(models.values(), key=lambda model: (list(SIZES).index(model["size"]), model["dtype"]))
                results = {"models": found}
                file.write_text(json.dumps(results, indent=1) + "\n")
                (options.out / "gpu.md").write_text(markdown(results))
    print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
