# SPDX-License-Identifier: Apache-2.0
"""A sample of the architectures that `benchmarks/architectures.py` goes through, and what its check sees."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel


def load() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "architectures.py"
    spec = importlib.util.spec_from_file_location("architectures", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["architectures"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


architectures = load()
BERT = architectures.Case("masked LM", "bert", "BertForMaskedLM")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models are slower on many."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("task", "class_name"),
    [
        ("sequence classification", "MixtralForSequenceClassification"),  # experts, by a grouped kernel
        ("causal LM", "MambaForCausalLM"),
        ("token classification", "LayoutLMv3ForTokenClassification"),  # parameters used under `no_grad`
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("sequence classification", "BertForSequenceClassification"),
                ("image classification", "MobileNetV2ForImageClassification"),  # kinks in every layer
                ("seq2seq LM", "T5ForConditionalGeneration"),
                ("image classification", "SwinForImageClassification"),
                ("causal LM", "LlamaForCausalLM"),
                ("causal LM", "Qwen3NextForCausalLM"),  # linear and full attention
                ("question answering", "BertForQuestionAnswering"),  # looks at padding
            )
        ),
    ],
)
def test_product_is_the_derivative_of_the_gradient_and_leaves_no_trace(task: str, class_name: str):
    [case, *_] = [case for case in architectures.all_cases() if (case.task, case.class_name) == (task, class_name)]
    row = architectures.examine(case)
    assert row.outcome == "works", row.reason
    assert row.error < 1e-6 and row.float32_error < 1e-3 and 1000 < row.parameters < 500_000


OTHER_KINDS = [
    ("CTC", "Wav2Vec2ForCTC"),  # torch differentiates CTC only once, and weight normalization wrongly
    ("object detection", "YolosForObjectDetection"),  # labels are a list of dicts
    ("masked image modeling", "ViTMAEForPreTraining"),  # draws its masks in eval mode as well
    # Two that are measured elsewhere: outputs of a router that are tuples, and examples of a batch that are coupled.
    pytest.param("MoE with router loss", "MixtralForCausalLM", marks=pytest.mark.slow),
    pytest.param("image-text contrast", "CLIPModel", marks=pytest.mark.slow),
    pytest.param("object detection", "DabDetrForObjectDetection", marks=pytest.mark.slow),  # detaches its boxes
    pytest.param("instance segmentation", "MaskFormerForInstanceSegmentation", marks=pytest.mark.slow),
    pytest.param("speech seq2seq", "WhisperForConditionalGeneration", marks=pytest.mark.slow),
    pytest.param("image-text to text", "Qwen2VLForConditionalGeneration", marks=pytest.mark.slow),
    pytest.param("time series", "TimeSeriesTransformerForPrediction", marks=pytest.mark.slow),
    pytest.param("multiple choice", "BertForMultipleChoice", marks=pytest.mark.slow),
    pytest.param("semantic segmentation", "SegformerForSemanticSegmentation", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "class_name"), OTHER_KINDS)
def test_other_kinds_of_input_and_loss_are_measured(kind: str, class_name: str):
    [case] = [case for case in architectures.all_cases() if (case.task, case.class_name) == (kind, class_name)]
    row = architectures.examine(case)
    assert row.outcome == "works", row.reason
    assert row.error < 1e-6 and row.float32_error < 1e-3


@pytest.mark.slow  # of the benchmark's own script
def test_wrong_numbers_of_a_measurement_are_seen(monkeypatch: pytest.MonkeyPatch):
    right = architectures.measure_once
    spoilt = {"grad_norm": 2.0}
    monkeypatch.setattr(architectures, "measure_once", lambda *batch: replace(right(*batch), **spoilt))
    row = architectures.examine(BERT)
    assert row.outcome == "wrong" and "in a measurement" in row.reason


def test_list_is_that_of_the_auto_classes():
    cases = list(architectures.all_cases())
    assert len(cases) > 850 and len(set(cases)) == len(cases)
    for auto in ("AutoModelForSequenceClassification", "AutoModelForCausalLM", "AutoModelForImageClassification"):
        listed = {config.model_type for config in getattr(transformers, auto)._model_mapping}
        assert listed <= {case.model_type for case in cases}


def one_tensor_lost(model: PreTrainedModel, products: Tensor) -> Tensor:
    """The part of the smallest bias of a layer norm, a millionth of the whole."""
    sizes = [parameter.numel() for parameter in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    index = names.index("bert.encoder.layer.0.output.LayerNorm.bias")
    products = products.clone()
    products.split(sizes, dim=1)[index].zero_()
    return products


@pytest.mark.slow  # of the benchmark's own script
@pytest.mark.parametrize(
    "spoil",
    [
        lambda model, products: products * (1 + 1e-5),
        pytest.param(lambda model, products: products.flip(0), marks=pytest.mark.slow),
        pytest.param(
            lambda model, products: products + 1e-4 * products.norm() / products.numel() ** 0.5, marks=pytest.mark.slow
        ),
        one_tensor_lost,
    ],
)
def test_wrong_product_is_seen(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[PreTrainedModel, Tensor], Tensor]):
    right = architectures.our_products
    monkeypatch.setattr(architectures, "our_products", lambda model, *rest: spoil(model, right(model, *rest)))
    row = architectures.examine(BERT)
    assert row.outcome == "wrong", row


@pytest.mark.slow  # of the benchmark's own script
def test_wrong_product_in_float32_is_seen(monkeypatch: pytest.MonkeyPatch):
    right = architectures.our_products
    monkeypatch.setitem(architectures.LIBRARIES, architectures.OURS, lambda *all: 1.01 * right(*all))
    assert architectures.examine(BERT).reason == "deviates by 1e-02 in float32"


@pytest.mark.slow  # of the benchmark's own script
def test_wrong_matrix_for_the_trace_is_seen(monkeypatch: pytest.MonkeyPatch):
    class Spoilt(architectures.DecoupledHessian):  # type: ignore[name-defined, misc]
        def matmat(self, vectors: Tensor) -> Tensor:
            return super().matmat(vectors) * (1 + 1e-5)

    monkeypatch.setattr(architectures, "DecoupledHessian", Spoilt)
    assert architectures.examine(BERT).reason == "deviates by 1e-05 in float64"


@pytest.mark.slow  # of the benchmark's own script
def test_differences_are_not_counted_as_exact(monkeypatch: pytest.MonkeyPatch):
    right = architectures.measure_once
    fallen_back = {"engine": "central_difference", "fallback": "no second derivative"}
    monkeypatch.setattr(architectures, "measure_once", lambda *batch: replace(right(*batch), **fallen_back))
    row = architectures.examine(BERT)
    assert (row.outcome, row.reason) == ("differences", "no second derivative")


@pytest.mark.slow  # of the benchmark's own script
def test_wrong_differences_are_seen(monkeypatch: pytest.MonkeyPatch):
    right, products = architectures.measure_once, architectures.difference_products
    fallen_back = {"engine": "central_difference"}
    monkeypatch.setattr(architectures, "measure_once", lambda *batch: replace(right(*batch), **fallen_back))
    monkeypatch.setattr(architectures, "difference_products", lambda *all: 1.1 * products(*all))
    assert architectures.examine(BERT).reason == "by central differences, and off by 1e-01"


@pytest.mark.slow  # of the benchmark's own script
def test_wrong_eigenvalue_by_differences_is_seen(monkeypatch: pytest.MonkeyPatch):
    right = architectures.measure_once

    def spoilt(*batch: Any) -> Any:
        measured = right(*batch)
        lambda_max = replace(measured.hessian.lambda_max, value=1.2 * measured.hessian.lambda_max.value)
        hessian = replace(measured.hessian, lambda_max=lambda_max)
        return replace(measured, engine="central_difference", hessian=hessian)

    monkeypatch.setattr(architectures, "measure_once", spoilt)
    assert "λ_max is" in architectures.examine(BERT).reason


YOSO = architectures.Case("masked LM", "yoso", "YosoForMaskedLM")


@pytest.mark.slow  # of the benchmark's own script
def test_model_without_a_second_derivative_is_measured_by_differences():
    row = architectures.examine(YOSO)
    assert row.outcome == "differences" and "not symmetric" in row.reason


@pytest.mark.slow  # of the benchmark's own script
def test_model_without_a_hessian_is_told_apart(monkeypatch: pytest.MonkeyPatch):
    measured = architectures.measure_once(*_tiny(BERT))
    monkeypatch.setattr(architectures, "measure_once", lambda *batch: measured)
    row = architectures.examine(YOSO)
    assert row.outcome == "no Hessian" and "not that of its loss" in row.reason


def _tiny(case: architectures.Case) -> tuple[PreTrainedModel, architectures.Batch]:
    model = architectures.tiny_model(case)
    return model, architectures.make_batch(case, model)


def change_parameter(model: PreTrainedModel) -> None:
    parameter = next(model.parameters())
    with torch.no_grad():
        parameter[0, 0] = torch.nextafter(parameter[0, 0], torch.tensor(1.0))


def change_gradient(model: PreTrainedModel) -> None:
    gradient = next(model.parameters()).grad
    assert gradient is not None
    gradient.zero_()


def change_buffer(model: PreTrainedModel) -> None:
    model.register_buffer("count", torch.zeros(1), persistent=False)


def change_attention(model: PreTrainedModel) -> None:
    model.config._attn_implementation = "eager"


def change_mode(model: PreTrainedModel) -> None:
    model.get_submodule("bert.encoder.layer.0").eval()


def change_configuration(model: PreTrainedModel) -> None:
    model.config.problem_type = "regression"


def change_place(model: PreTrainedModel) -> None:
    parameter = next(model.parameters())
    parameter.data = parameter.data.clone()


def change_attribute(model: PreTrainedModel) -> None:
    vars(model)["cached"] = torch.ones(2)


CHANGES: dict[str, list[Callable[[PreTrainedModel], Any]]] = {
    "parameters": [change_parameter],
    "places": [change_place],
    "buffers": [change_buffer],
    "gradients": [change_gradient],
    "modes": [change_mode],
    "attributes": [change_attribute],
    "attention": [change_attention],
    "configurations": [change_configuration],
    "random numbers": [lambda model: torch.rand(1), lambda model: np.random.rand(), lambda model: random.random()],
}
OFTEN = [(change_parameter, False), (change_gradient, True), (change_attribute, False), (change_mode, False)]
"""The others are near enough to these to be left to `make test-slow`."""


@pytest.mark.parametrize(
    ("kind", "change", "fails"),
    [
        # What is compared is the same where a measurement fails.
        pytest.param(kind, change, fails, marks=[] if (change, fails) in OFTEN else pytest.mark.slow)
        for kind, changes in CHANGES.items()
        for change in changes
        for fails in (False, True)
    ],
)
def test_trace_is_seen(
    monkeypatch: pytest.MonkeyPatch, kind: str, change: Callable[[PreTrainedModel], Any], fails: bool
):
    right = architectures.measure_once

    def measure_once(model: PreTrainedModel, batch: Any) -> Any:
        change(model)
        if fails:
            raise architectures.MeasurementError("weights_changed")
        return right(model, batch)

    monkeypatch.setattr(architectures, "measure_once", measure_once)
    row = architectures.examine(BERT)
    assert row.outcome == ("raises" if fails else "traces")
    assert kind in row.reason.lower().split("changed: ")[1].split(", ")


@pytest.mark.slow  # of the benchmark's own script
@pytest.mark.parametrize(
    ("disaster", "outcome", "reason"),
    [
        (lambda: os._exit(3), "crashes", "measure: the process died with exit code 3"),
        (lambda: time.sleep(600), "crashes", "measure: took more than 2 s"),
        (lambda: 1 / 0, "crashes", "measure: ZeroDivisionError: division by zero"),
        (lambda: bytearray(12 << 30), "crashes", "measure: MemoryError:"),
    ],
)
def test_disaster_is_a_row(monkeypatch: pytest.MonkeyPatch, disaster: Callable[[], object], outcome: str, reason: str):
    def examine(case: object, library: str, say: Callable[[str], object]) -> None:
        say("measure")
        disaster()

    monkeypatch.setattr(architectures, "examine", examine)
    row = architectures.run(BERT, seconds=2 if "2 s" in reason else 60)
    assert (row.outcome, row.reason) == (outcome, reason)


def test_results_are_read_back_and_told(tmp_path: Path):
    case = ("masked LM", "bert", "BertForMaskedLM")
    rows = [
        architectures.Row(*case, "works", error=2e-9),
        architectures.Row("causal LM", "rwkv", "RwkvForCausalLM", "crashes", "measure: RuntimeError: a|b"),
        architectures.Row("causal LM", "dinat", "Dinat", "excluded", "build: ImportError: natten"),
    ]
    results = {architectures.OURS: rows, "pyhessian": [architectures.Row(*case, "raises", "no second derivative")]}
    other = ("CTC", "wav2vec2", "Wav2Vec2ForCTC")
    rows.append(architectures.Row(*other, "differences", "no second derivative", float32_error=2e-3))
    rows.append(architectures.Row("object detection", "owlvit", "Owl", "excluded", "train: no loss"))
    path = tmp_path / "architectures.json"
    architectures.save(results, path)
    assert architectures.load(path) == results
    text = path.with_suffix(".md").read_text()
    assert "| hf_optimizability | 0 of 0 | 0 of 0 | 0 of 1 | 1 of 1 |" in text and "| 1 of 2 = 50.0% |" in text
    assert "RwkvForCausalLM | **crashes** | measure: RuntimeError: a\\|b |" in text
    assert "| CTC | 1 | 1 | 1 | 0 | 0 | 0 |" in text and "| object detection | 0 | 0 | 0 | 0 | 0 | 1 |" in text
    assert "| all | 1 | 1 = 100.0% | 1 | 0 | 0 | 1 |" in text
    assert "| bert |  |  |  | ✓ |  |  |  |" in text and "2e-09" in text
