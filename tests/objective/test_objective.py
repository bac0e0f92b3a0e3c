# SPDX-License-Identifier: Apache-2.0
"""What a batch's mean loss is over, smaller batches of the same, and probe sets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import BatchEncoding, T5Config, T5ForConditionalGeneration
from transformers import DataCollatorForLanguageModeling as MaskingCollator
from transformers.utils.quantization_config import QuantizationMethod

from hf_optimizability import OptimizabilityConfig, measure
from hf_optimizability.curvature.gradient import gradient
from hf_optimizability.objective.batches import batch_size, count_items, cut_batch
from hf_optimizability.objective.objective import Objective
from hf_optimizability.objective.probe_set import ProbeSpec, draw_probe_set, fingerprint, probe_indices
from tests.support import tiny_models


LABELS = torch.tensor([[-100, 5, 6, -100], [7, -100, 8, 9]])


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=2))


@pytest.mark.parametrize(
    ("make", "batch", "items"),
    [
        (tiny_models.gpt2, {"labels": LABELS}, 4),  # the first label of each row has no token before it
        (tiny_models.llama, {"labels": LABELS}, 4),
        (tiny_models.llama, {"labels": LABELS, "shift_labels": LABELS}, 5),
        (t5, {"labels": LABELS}, 5),
        (tiny_models.bert, {"labels": torch.tensor([0, 1, -100])}, 2),
        (tiny_models.bert, {"labels": torch.tensor([[0.0, 1.0], [1.0, 1.0]])}, 4),  # multi-label: a mean over all
        (tiny_models.bert, {"input_ids": torch.ones(3, 5), "start_positions": torch.tensor([0, 1, 2])}, 3),
    ],
)
def test_items(make, batch: dict[str, torch.Tensor], items: int):
    assert count_items(make(), batch) == items


def test_batch_encodings_are_batches():
    [batch] = tiny_models.cut(tiny_models.examples("bert", 4), 4)
    config = OptimizabilityConfig(max_hvps=16)
    encoded = measure(tiny_models.make("bert"), [BatchEncoding(batch)], config)
    assert encoded.loss == measure(tiny_models.make("bert"), [batch], config).loss


@pytest.mark.parametrize(
    ("model", "batch", "says"),
    [
        (tiny_models.bert(), {"input_ids": torch.ones(2, 3, dtype=torch.long)}, "has no labels"),
        (tiny_models.bert().bert, {"input_ids": torch.ones(2, 3, dtype=torch.long)}, "returned no loss"),
    ],
)
def test_a_batch_that_gives_no_loss(model: nn.Module, batch: dict[str, torch.Tensor], says: str):
    with pytest.raises(ValueError, match=says):
        Objective(model, [batch]).check()


class TestCut:
    @pytest.mark.parametrize("name", ["gpt2", "bert"])
    @pytest.mark.parametrize("size", [1, 2, 9])
    def test_mean_gradient_and_items_do_not_change(self, name: str, size: int):
        rows = tiny_models.examples(name, 7)  # of a language model, each with another number of ignored labels
        whole = Objective(tiny_models.make(name).eval(), tiny_models.cut(rows, 5))
        parts = whole.cut(size)
        assert [batch_size(batch) for batch in parts.batches] == {1: [1] * 7, 2: [2, 2, 1, 2], 9: [5, 2]}[size]
        expected, result = gradient(whole), gradient(parts)
        assert result.items == expected.items
        assert result.loss == pytest.approx(expected.loss, rel=1e-6)  # language models compute it in float32
        for a, b in zip(result.tensors, expected.tensors, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-8)

    def test_an_example_without_a_label_that_counts_is_left_out(self):
        [batch] = tiny_models.cut(tiny_models.examples("gpt2", 2), 2)
        batch["labels"][0] = -100
        parts = Objective(tiny_models.make("gpt2").eval(), [batch]).cut(1)
        assert len(parts.batches) == 2 and [items for _, items in parts.losses()] == [5]

    def test_the_loss_function_goes_along(self):
        def loss_fn(model: nn.Module, batch: tuple[torch.Tensor]) -> tuple[torch.Tensor, int]:
            return model(batch[0]).sum(), 2 * len(batch[0])

        parts = Objective(nn.Linear(2, 1), [(torch.ones(3, 2),)], loss_fn=loss_fn).cut(2)
        assert [items for _, items in parts.losses()] == [4, 2]

    @pytest.mark.parametrize(
        "batch",
        [
            {"x": torch.arange(3), "names": ["a", "b", "c"]},
            BatchEncoding({"x": torch.arange(3), "names": ["a", "b", "c"]}),
            (torch.arange(3), ["a", "b", "c"]),
            [torch.arange(3), ["a", "b", "c"]],
        ],
    )
    def test_pieces_are_of_the_type_of_the_batch(self, batch):
        pieces = cut_batch(batch, 2)
        assert [type(piece) for piece in pieces] == [type(batch)] * 2
        values = [list(piece.values()) if hasattr(piece, "values") else list(piece) for piece in pieces]
        assert [names for _, names in values] == [["a", "b"], ["c"]]
        assert [x.tolist() for x, _ in values] == [[0, 1], [2]]

    def test_what_is_not_of_an_example_stays(self):
        switches = {"use_cache": False, "past": None, "scale": torch.tensor(2.0), "task": "nli"}
        pieces = cut_batch({"x": torch.arange(2), **switches}, 1)
        assert [{name: piece[name] for name in switches} for piece in pieces] == [switches] * 2

    @pytest.mark.parametrize(
        "batch", [{"x": torch.ones(4, 2), "image": torch.ones(5, 2)}, (torch.ones(2), [1, 2, 3]), {"scale": 1.0}]
    )
    def test_batches_with_different_lengths_are_refused(self, batch):
        with pytest.raises(ValueError, match="can't be cut"):
            cut_batch(batch, 1)


def numbers(losses: Iterable[tuple[torch.Tensor, int]]) -> list[tuple[float, int]]:
    return [(float(loss.detach()), items) for loss, items in losses]


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_losses_as_functions_of_the_parameters_and_with_outputs_are_the_losses(name: str):
    objective = Objective(tiny_models.make(name).eval(), tiny_models.cut(tiny_models.examples(name, 5), 2))
    expected = numbers(objective.losses())
    doubled = [2 * parameter.detach() for parameter in objective.parameters]
    with_outputs = list(objective.outputs_and_losses())
    assert numbers(function(objective.parameters) for function in objective.functional_losses()) == expected
    assert numbers(function(doubled) for function in objective.functional_losses()) != expected
    assert numbers((loss, items) for _, loss, items in with_outputs) == expected
    for batch, ([logits], _, _) in zip(objective.batches, with_outputs, strict=True):
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        assert torch.equal(logits, objective.model(**inputs).logits)
    assert not objective.model._forward_hooks
    assert numbers(objective.losses()) == expected


def test_outputs_without_a_gradient_are_left_out():
    """As where a loss subtracts what the model said before, or a trainer wants logits for its metrics."""
    model, x = nn.Linear(2, 1), torch.ones(3, 2)

    def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            baseline = model(batch).mean()
        return (model(batch) - baseline).square().mean()

    [(outputs, _, _)] = Objective(model, [x], loss_fn=loss_fn).outputs_and_losses()
    assert [output.requires_grad for output in outputs] == [True]

    def detached(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            model(batch)
        return model.weight.square().sum()

    with pytest.raises(ValueError, match="not for outputs with a gradient"):
        next(Objective(model, [x], loss_fn=detached).outputs_and_losses())


def test_quantized_weights_are_told():
    model = tiny_models.make("bert")
    objective = Objective(model, tiny_models.cut(tiny_models.examples("bert", 2), 2))
    assert objective.second_derivative_blocker is None
    for dtype in (torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn):
        model.classifier.weight = nn.Parameter(torch.zeros(3, 4).to(dtype), requires_grad=False)
        assert f"({dtype})" in str(objective.second_derivative_blocker)
    model.is_quantized, model.quantization_method = True, QuantizationMethod.BITS_AND_BYTES
    assert "(bitsandbytes)" in str(objective.second_derivative_blocker)


def loader(rows: list[dict[str, torch.Tensor]], **options: object) -> DataLoader:
    return DataLoader(rows, shuffle=True, **options)


def test_a_batch_may_be_a_bare_tensor():
    rows = torch.arange(14.0).reshape(7, 2)
    assert (batch_size(rows), [len(piece) for piece in cut_batch(rows, 3)]) == (7, [3, 3, 1])
    objective = Objective(nn.Linear(2, 1), [rows[:5], rows[5:]], loss_fn=lambda model, batch: model(batch).mean())
    assert [items for _, items in objective.losses()] == [5, 2]
    assert [items for _, items in objective.cut(2).losses()] == [2, 2, 1, 2]


PROBE = ProbeSpec(5, batch_size=2, seed=0)


class TestProbeSet:
    def test_it_is_the_same_for_the_same_seed_and_does_not_touch_the_rng(self):
        rows = tiny_models.examples("bert", 30)
        before = torch.get_rng_state()
        first, again = (draw_probe_set(loader(rows), PROBE).batches for _ in range(2))
        other = draw_probe_set(loader(rows), replace(PROBE, seed=1)).batches
        assert [len(batch["labels"]) for batch in first] == [2, 2, 1]
        assert fingerprint(first) == fingerprint(again) != fingerprint(other)
        assert torch.equal(torch.get_rng_state(), before)

    def test_it_holds_different_examples_of_the_data_set(self):
        rows = [{"x": torch.tensor(index)} for index in range(30)]
        drawn = torch.cat([batch["x"] for batch in draw_probe_set(loader(rows), PROBE).batches]).tolist()
        assert len(set(drawn)) == 5 and set(drawn) <= set(range(30))

    def test_indices_depend_on_the_seed_alone(self):
        drawn = probe_indices(1000, 5, seed=0)
        torch.rand(3)
        assert probe_indices(1000, 5, seed=0) == drawn != probe_indices(1000, 5, seed=1)

    def test_a_data_set_sorted_by_class_gives_mixed_batches(self):
        rows = [{"labels": torch.tensor(index // 100)} for index in range(1000)]
        batches = draw_probe_set(loader(rows), replace(PROBE, examples=64, batch_size=16)).batches
        assert min(len(batch["labels"].unique()) for batch in batches) >= 5

    def test_random_collators_give_the_same_batches(self, tmp_path):
        from transformers import BertTokenizer

        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
        tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
        collator = MaskingCollator(tokenizer=tokenizer, mlm_probability=0.5)
        rows = [{"input_ids": [2, 5 + index % 8, 6, 7, 3]} for index in range(30)]
        first, again = (draw_probe_set(loader(rows, collate_fn=collator), PROBE).batches for _ in range(2))
        assert fingerprint(first) == fingerprint(again)
        assert any((batch["labels"] == -100).any() for batch in first)

    def test_streams_give_their_first_examples(self):
        class Stream(IterableDataset):
            def __iter__(self):
                return iter([{"x": torch.tensor(index)} for index in range(100)])

        batches = draw_probe_set(DataLoader(Stream()), PROBE).batches
        assert torch.cat([batch["x"] for batch in batches]).tolist() == [0, 1, 2, 3, 4]

    def test_fingerprint_sees_values_shapes_names_and_types(self):
        batches = [
            {"x": torch.zeros(2, 3)},
            {"x": torch.zeros(3, 2)},
            {"y": torch.zeros(2, 3)},
            {"x": torch.zeros(2, 3, dtype=torch.float64)},
            {"x": torch.full((2, 3), 1e-30)},
        ]
        assert len({fingerprint([batch]) for batch in batches}) == len(batches)


def test_examples_are_counted_by_what_most_values_say():
    """Class weights come first, and have a length of their own; there is nothing that is called labels."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    sizes = (4, 3, 1)
    batches = [(torch.ones(3), torch.randn(n, 4), torch.randint(3, (n,))) for n in sizes]

    def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[1]), batch[2], weight=batch[0])

    whole = (torch.ones(3), *(torch.cat([batch[i] for batch in batches]) for i in (1, 2)))
    found = measure(model, batches, OptimizabilityConfig(profile="light", max_hvps=16), loss_fn=loss_fn)
    assert found.loss == pytest.approx(float(loss_fn(model, whole)), rel=1e-6)


@pytest.mark.parametrize(
    ("batch", "examples"),
    [
        ([{"x": torch.ones(5)}] * 2, 2),
        ([(torch.ones(5), 0)] * 3, 3),
        ({"x": torch.ones(4, 2), "y": torch.ones(4), "a": [], "b": [], "c": []}, 4),
        ({"inputs": {"x": torch.ones(8, 2)}, "size": (32, 32)}, 8),
    ],
)
def test_examples_are_not_what_is_inside_one_or_empty(batch: object, examples: int):
    assert batch_size(batch) == examples


def test_complex_parameters_are_refused_by_name():
    model = nn.Module()
    model.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"`phase` are complex.*view_as_real"):
        Objective(model, [torch.ones(2)], loss_fn=lambda model, batch: (model.phase * batch).abs().sum())
