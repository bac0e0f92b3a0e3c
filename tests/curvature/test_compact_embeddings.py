# SPDX-License-Identifier: Apache-2.0
"""Embeddings without unused rows against full dense Hessians, what must be left alone, and that all comes back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_optimizability import OptimizabilityConfig, measure
from hf_optimizability.curvature.compact_embeddings import drop_unused_embedding_rows
from hf_optimizability.curvature.gradient import gradient
from hf_optimizability.curvature.hessian import HessianOperator
from hf_optimizability.model_state.measuring import math_attention, measuring
from hf_optimizability.objective.objective import Objective
from tests.support import tiny_models


def bert() -> tuple[Objective, dict[str, Tensor]]:
    """Two batches, and both in one; of 13 words few are used, of 8 positions 6, of 2 types 1."""
    rows = tiny_models.examples("bert", 3)
    for row in rows:
        row["input_ids"] = row["input_ids"] // 2
    model = tiny_models.make("bert").eval()
    return Objective(model, tiny_models.cut(rows, 2)), tiny_models.cut(rows, 3)[0]


def dense(operator: HessianOperator) -> Tensor:
    with math_attention():
        return operator.matmat(torch.eye(operator.size, dtype=torch.float64))


def test_the_hessian_is_the_full_one_without_zero_rows():
    objective, whole = bert()
    full = tiny_models.dense_hessian(objective.model, whole)
    named = dict(zip(objective.names, objective.parameters, strict=True))
    looked_up = {
        "bert.embeddings.word_embeddings.weight": whole["input_ids"].unique(),
        "bert.embeddings.position_embeddings.weight": torch.arange(6),
        "bert.embeddings.token_type_embeddings.weight": torch.arange(1),
    }
    kept = []
    for name, parameter in named.items():
        rows = torch.zeros(parameter.shape, dtype=torch.bool)
        rows[looked_up.get(name, slice(None))] = True
        kept.append(rows.flatten())
    keep = torch.cat(kept)
    with drop_unused_embedding_rows(objective) as used:
        assert used.left_out == int((~keep).sum()) > 4 * 8
        for name, parameter in zip(objective.names, objective.parameters, strict=True):
            assert len(parameter) == len(looked_up.get(name, named[name]))
        at_point = gradient(objective)
        compact = dense(HessianOperator(objective))
    assert (compact - full[keep][:, keep]).abs().max() <= 1e-10 * full.abs().max()
    assert torch.allclose(compact.trace(), full.trace(), rtol=1e-9)
    found, true = torch.linalg.eigvalsh(compact), torch.linalg.eigvalsh(full)
    assert torch.allclose(found[[0, -1]], true[[0, -1]], rtol=1e-9)
    expected = torch.cat([piece.flatten() for piece in gradient(objective).tensors])
    assert torch.equal(torch.cat([piece.flatten() for piece in at_point.tensors]), expected[keep])
    assert torch.equal(used.reduced(expected), expected[keep])
    assert torch.equal(used.expanded(expected[keep]), expected)  # 0 where nothing is looked up


def test_the_order_of_parameters_stays():
    objective, _ = bert()
    before = objective.parameters
    with drop_unused_embedding_rows(objective):
        inside = objective.parameters
        assert [id(p) for p in objective.model.parameters()] == [id(p) for p in inside]
    replaced = [a is not b for a, b in zip(before, inside, strict=True)]
    assert replaced == ["_embeddings" in name for name in objective.names]
    assert not any(a.requires_grad is False for a in inside)


def state(model: nn.Module) -> dict[str, dict]:
    return {
        name: {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_nothing_is_left_behind(error: type[BaseException] | None):
    objective, _ = bert()
    before, parameters = state(objective.model), objective.parameters
    values = [parameter.detach().clone() for parameter in parameters]
    try:
        with drop_unused_embedding_rows(objective):
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt) as raised:
        assert type(raised) is error
    after = state(objective.model)
    for name, attributes in before.items():
        assert list(attributes) == list(after[name])
        for key, value in attributes.items():
            if key == "_parameters":
                assert [(k, id(v)) for k, v in value.items()] == [(k, id(v)) for k, v in after[name][key].items()]
            else:
                assert value is after[name][key] or value == after[name][key]
    assert all(a is b for a, b in zip(objective.parameters, parameters, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(objective.parameters, values, strict=True))
    assert all(parameter.grad is None for parameter in parameters)


def test_nothing_is_left_behind_by_a_first_pass_that_raises():
    objective, _ = bert()
    objective.batches[1]["labels"] = torch.tensor([17])
    before = state(objective.model)
    with pytest.raises(IndexError), drop_unused_embedding_rows(objective):
        pass
    after = state(objective.model)
    assert all(before[name]["_forward_hooks"] == after[name]["_forward_hooks"] == {} for name in before)
    assert all(parameter.shape[0] for parameter in objective.parameters)


def test_frozen_embeddings_are_left_alone():
    objective, _ = bert()
    objective.model.bert.embeddings.requires_grad_(False)
    objective = Objective(objective.model, objective.batches)
    with drop_unused_embedding_rows(objective) as used:
        assert used.left_out == 0


def test_tied_weights_are_left_alone():
    model = tiny_models.make("gpt2").eval()
    objective = Objective(model, tiny_models.cut(tiny_models.examples("gpt2", 2), 2))
    with drop_unused_embedding_rows(objective) as used:
        assert used.left_out == 2 * 4  # two positions of eight
        assert model.get_input_embeddings().weight is model.lm_head.weight
        assert len(model.lm_head.weight) == tiny_models.VOCABULARY


class Words(nn.Module):
    """Two lookups a batch, on a vocabulary of nine."""

    def __init__(self, **options: object):
        super().__init__()
        self.words = nn.Embedding(9, 3, dtype=torch.float64, **options)
        self.head = nn.Linear(3, 1, dtype=torch.float64)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head((self.words(ids) * self.words(input=ids.flip(0))).tanh()).square().mean()


BATCHES = [(torch.tensor([1, 4]),), (torch.tensor([4, 7]),)]


def objective_of(model: nn.Module, penalty=lambda model: 0.0) -> Objective:
    return Objective(model, BATCHES, loss_fn=lambda model, batch: model(batch[0]) + penalty(model))


def test_lookups_in_several_batches_and_by_keyword():
    torch.manual_seed(0)
    objective = objective_of(Words())
    full = dense(HessianOperator(objective))
    with drop_unused_embedding_rows(objective) as used:
        assert used.left_out == 6 * 3 and objective.parameters[0].shape == (3, 3)
        assert torch.equal(objective.parameters[0], objective.model.words.weight)
        compact = dense(HessianOperator(objective))
    keep = torch.tensor([3, 4, 5, 12, 13, 14, 21, 22, 23, 27, 28, 29, 30])
    assert torch.allclose(compact, full[keep][:, keep], atol=1e-12)
    full[keep[:, None], keep] = 0
    assert not full.any()


PENALTIES = {
    "norm": lambda model: model.words.weight.square().sum(),
    "used rows only": lambda model: model.words.weight[1].square().sum(),
    "another lookup": lambda model: F.embedding(torch.tensor([5]), model.words.weight).square().sum(),
    "cast": lambda model: F.embedding(torch.tensor([5]), model.words.weight.float()).square().sum(),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_weights_that_the_loss_reads_otherwise_are_left_alone(name: str):
    torch.manual_seed(0)
    objective = objective_of(Words(), PENALTIES[name])
    full = dense(HessianOperator(objective))
    with drop_unused_embedding_rows(objective) as used:
        assert used.left_out == 0
        assert torch.equal(dense(HessianOperator(objective)), full)


def test_a_penalty_in_the_last_batch_only():
    batches = iter(range(2))
    objective = objective_of(Words(), lambda model: next(batches) and model.words.weight.square().sum())
    with drop_unused_embedding_rows(objective) as used:
        assert used.left_out == 0


class Shifted(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + 1)


class Sharded(nn.Parameter):
    pass


def test_modules_that_are_not_plain_are_left_alone():
    shifted, patched, twins, sharded = Words(), Words(), Words(), Words()
    sharded.words.weight = Sharded(sharded.words.weight.detach())
    shifted.words = Shifted(9, 3, dtype=torch.float64)
    patched.words.forward = lambda input: F.embedding(input, patched.words.weight)
    twins.other = nn.Embedding(9, 3, dtype=torch.float64)
    twins.other.weight = twins.words.weight
    parametrized = Words()
    nn.utils.parametrizations.weight_norm(parametrized.words)
    for model in (shifted, patched, twins, sharded, parametrized, Words(max_norm=1.0), Words(sparse=True)):
        with drop_unused_embedding_rows(objective_of(model)) as used:
            assert used.left_out == 0


def test_lookups_whose_graph_is_hidden_are_left_alone():
    model = Words()

    def loss_fn(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        return torch.utils.checkpoint.checkpoint(model, batch[0], use_reentrant=True) + model.head.bias.sum()

    with (
        pytest.warns(UserWarning, match="requires_grad"),
        drop_unused_embedding_rows(Objective(model, BATCHES, loss_fn=loss_fn)) as used,
    ):
        assert used.left_out == 0


def test_checkpointed_lookups():
    torch.manual_seed(0)

    def loss_fn(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        return torch.utils.checkpoint.checkpoint(model, batch[0], use_reentrant=False)

    objective = Objective(Words(), BATCHES, loss_fn=loss_fn)
    full = gradient(objective).tensors[0]
    with drop_unused_embedding_rows(objective) as used:
        assert used.left_out == 6 * 3
        assert torch.equal(gradient(objective).tensors[0], full[[1, 4, 7]])


@pytest.mark.parametrize("padding", [4, 8])
def test_the_padding_row_has_no_derivative(padding: int):
    """Of these, 4 is looked up and 8 is not."""
    torch.manual_seed(0)
    model = Words(padding_idx=padding)
    objective = objective_of(model)
    keep = torch.tensor([3, 4, 5, 12, 13, 14, 21, 22, 23, 27, 28, 29, 30])
    full = dense(HessianOperator(objective))[keep][:, keep]
    with (
        measuring(model, seed=0),
        drop_unused_embedding_rows(objective),
    ):  # each pass starts from the attributes that the model has
        compact = dense(HessianOperator(objective))
        assert model.words.padding_idx == (1 if padding == 4 else None)
    assert torch.allclose(compact, full, atol=1e-12)
    assert bool(full[3:6].any()) == (padding == 8)
    assert model.words.padding_idx == padding


def test_a_row_that_the_first_pass_did_not_see_is_refused():
    model = Words()
    with drop_unused_embedding_rows(objective_of(model)), pytest.raises(RuntimeError, match="looked up"):
        model(torch.tensor([1, 5]))


class Codebook(nn.Module):
    """Takes each input for the nearest row of a codebook, and learns the row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(6, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            nearest = torch.cdist(x, self.rows.weight).argmin(1)
        return (self.rows(nearest).sin() - x).square().mean()


def test_rows_that_are_compared_without_gradients_stay():
    torch.manual_seed(0)
    objective = Objective(Codebook(), [torch.randn(3, 2, dtype=torch.float64)], loss_fn=lambda model, x: model(x))
    full = dense(HessianOperator(objective))
    with drop_unused_embedding_rows(objective) as used:
        assert used.left_out == 0
        assert torch.equal(dense(HessianOperator(objective)), full)


def test_a_measurement_leaves_out_rows_that_no_token_looks_up():
    model = tiny_models.make("bert", vocab_size=100)
    found = measure(model, tiny_models.cut(tiny_models.examples("bert", 6), 3), OptimizabilityConfig(max_hvps=16))
    assert found.unused_embedding_parameters > 4 * 80  # 13 tokens at the most, of 4 numbers each
