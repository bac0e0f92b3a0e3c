# SPDX-License-Identifier: Apache-2.0
"""What a batch's mean loss is over, and probe sets."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import BatchEncoding, T5Config, T5ForConditionalGeneration
from transformers import DataCollatorForLanguageModeling as MaskingCollator

from hf_optimizability import OptimizabilityConfig, measure
from hf_optimizability.objective import count_items
from hf_optimizability.probe import fingerprint, probe_batches, probe_indices


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
    config = OptimizabilityConfig(max_hvps=4)
    encoded = measure(tiny_models.make("bert"), [BatchEncoding(batch)], config)
    assert encoded.loss == measure(tiny_models.make("bert"), [batch], config).loss


def loader(rows: list[dict[str, torch.Tensor]], **options: object) -> DataLoader:
    return DataLoader(rows, shuffle=True, **options)


PROBE = {"examples": 5, "batch_size": 2, "seed": 0}


class TestProbeSet:
    def test_it_is_the_same_for_the_same_seed_and_does_not_touch_the_rng(self):
        rows = tiny_models.examples("bert", 30)
        before = torch.get_rng_state()
        first, again = (probe_batches(loader(rows), **PROBE) for _ in range(2))
        other = probe_batches(loader(rows), **{**PROBE, "seed": 1})
        assert [len(batch["labels"]) for batch in first] == [2, 2, 1]
        assert fingerprint(first) == fingerprint(again) != fingerprint(other)
        assert torch.equal(torch.get_rng_state(), before)

    def test_it_holds_different_examples_of_the_data_set(self):
        rows = [{"x": torch.tensor(index)} for index in range(30)]
        drawn = torch.cat([batch["x"] for batch in probe_batches(loader(rows), **PROBE)]).tolist()
        assert len(set(drawn)) == 5 and set(drawn) <= set(range(30))

    def test_indices_depend_on_the_seed_alone(self):
        drawn = probe_indices(1000, 5, seed=0)
        torch.rand(3)
        assert probe_indices(1000, 5, seed=0) == drawn == sorted(drawn) != probe_indices(1000, 5, seed=1)

    def test_random_collators_give_the_same_batches(self, tmp_path):
        from transformers import BertTokenizer

        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
        tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
        collator = MaskingCollator(tokenizer=tokenizer, mlm_probability=0.5)
        rows = [{"input_ids": [2, 5 + index % 8, 6, 7, 3]} for index in range(30)]
        first, again = (probe_batches(loader(rows, collate_fn=collator), **PROBE) for _ in range(2))
        assert fingerprint(first) == fingerprint(again)
        assert any((batch["labels"] == -100).any() for batch in first)

    def test_streams_give_their_first_examples(self):
        class Stream(IterableDataset):
            def __iter__(self):
                return iter([{"x": torch.tensor(index)} for index in range(100)])

        batches = probe_batches(DataLoader(Stream()), **PROBE)
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
