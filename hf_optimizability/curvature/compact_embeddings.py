# SPDX-License-Identifier: Apache-2.0
"""Leaves out the embedding rows that no token of the probe set looks up: their rows of the Hessian are zero."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..model_state.state import settle
from .autograd_graph import iter_leaf_uses
from .empirical_risk import ModelRisk


@dataclass(frozen=True, eq=False)
class UsedRows:
    """What is left of the parameters where unused embedding rows are left out.

    Attributes:
        left_out: The number of parameters left out.
        shapes: The shape of each parameter with all its rows.
        rows: The rows that are left of each; `None` where all are.
    """

    left_out: int
    shapes: tuple[torch.Size, ...]
    rows: tuple[Tensor | None, ...]

    def reduced(self, vector: Tensor) -> Tensor:
        """Return the entries of a vector over all parameters that are left."""
        pieces = vector.split([shape.numel() for shape in self.shapes])
        kept = zip(pieces, self.shapes, self.rows, strict=True)
        return torch.cat([piece if rows is None else piece.view(shape)[rows].flatten() for piece, shape, rows in kept])

    def expanded(self, vector: Tensor) -> Tensor:
        """Return a vector over all parameters, 0 where they are left out."""
        kept = list(zip(self.shapes, self.rows, strict=True))
        sizes = [shape.numel() if rows is None else len(rows) * shape[1:].numel() for shape, rows in kept]
        pieces = []
        for piece, (shape, rows) in zip(vector.split(sizes), kept, strict=True):
            if rows is not None:
                piece = piece.new_zeros(shape).index_copy(0, rows, piece.view(-1, *shape[1:])).flatten()
            pieces.append(piece)
        return torch.cat(pieces)


@contextmanager
def drop_unused_embedding_rows(objective: ModelRisk) -> Iterator[UsedRows]:
    """Replace embedding weights by compact ones of the rows that are looked up, and restore them at the end.

    Inside, the objective's loss is the same and its variables are fewer, in the same order: its Hessian is the one
    outside without rows and columns that are zero. So trace, Frobenius norm and nonzero eigenvalues stay; the
    multiplicity of the eigenvalue zero shrinks by what is yielded. One forward pass over all parts finds the rows.

    Compacted are weights of plain `nn.Embedding` modules on which the loss depends by the modules' lookups alone, as
    its graph shows: none that is tied, nor one that a penalty reads. Nothing else of the model changes. To be held
    with the mode and precision that the measurement has, around the construction of operators as well.

    Args:
        objective: The loss; its `parameters` must be read from the model each time.

    Yields:
        What is left.

    Raises:
        RuntimeError: From a forward pass inside that looks up a row which the first pass did not.

    Example:
        >>> from hf_optimizability.objective.objective import Objective
        >>> model = nn.Sequential(nn.Embedding(1000, 2), nn.Flatten(), nn.Linear(4, 1))
        >>> batch = (torch.tensor([[7, 900]]),)
        >>> objective = Objective(model, [batch], loss_fn=lambda model, batch: model(batch[0]).square().mean())
        >>> with drop_unused_embedding_rows(objective) as used:
        ...     print(used.left_out, [tuple(parameter.shape) for parameter in objective.parameters])
        1996 [(2, 2), (1, 4), (1,)]
        >>> tuple(model[0].weight.shape)
        (1000, 2)
    """
    with ExitStack() as stack:
        whole, rows_of = list(objective.parameters), {}
        for embedding, rows in _looked_up(objective).items():
            rows_of[embedding.weight] = rows
            stack.enter_context(_compact(embedding, rows))
        left_out = sum((len(weight) - len(rows)) * weight[0].numel() for weight, rows in rows_of.items())
        yield UsedRows(left_out, tuple(p.shape for p in whole), tuple(rows_of.get(p) for p in whole))


def _looked_up(objective: ModelRisk) -> dict[nn.Embedding, Tensor]:
    """Return the embeddings that can be compacted, and the rows that they look up, ascending."""
    lookups: dict[nn.Embedding, list[tuple[Tensor, Any]]] = {}
    used = {
        embedding: torch.zeros(embedding.num_embeddings, dtype=torch.int32, device=embedding.weight.device)
        for embedding in _candidates(objective)
    }
    if not used:
        return {}

    def record(module: nn.Embedding, args: Any, kwargs: Any, output: Tensor) -> None:
        lookups.setdefault(module, []).append((_ids(args, kwargs), output.grad_fn))

    reads = _Reads(embedding.weight for embedding in used)
    with ExitStack() as stack:
        for embedding in used:
            stack.enter_context(embedding.register_forward_hook(record, with_kwargs=True))
        stack.enter_context(reads)
        for loss, _ in objective.losses():
            users = _users(loss, [embedding.weight for embedding in used])
            for embedding, times in used.items():
                found = lookups.pop(embedding, [])
                nodes = {node for _, node in found}
                # Without a graph (`None`), as under reentrant checkpointing, other uses would be hidden as well.
                if None in nodes or not users[embedding.weight] <= nodes:
                    times += 1
                for ids, _ in found:
                    times[ids.unique()] += 1
    for embedding, times in used.items():
        if embedding.weight in reads.found:
            times += 1
    objective.group.all_reduce_many_(list(used.values()))
    return {embedding: times.nonzero()[:, 0] for embedding, times in used.items() if times.any() and not times.all()}


_METADATA = {
    getattr(Tensor, name).__get__
    for name in ("device", "dtype", "is_leaf", "layout", "ndim", "requires_grad", "shape")
} | {Tensor.dim, Tensor.is_floating_point, Tensor.numel, Tensor.size}
_LOOKUPS_AND_METADATA = {F.embedding, *_METADATA}


class _Reads(TorchFunctionMode):
    """Finds the weights that an operation other than a row lookup reads, even where the graph does not show it.

    A codebook's nearest row, found without gradients, is another one among fewer rows.

    Attributes:
        found: These weights.
    """

    def __init__(self, weights: Iterable[Tensor]):
        super().__init__()
        self.found: set[Tensor] = set()
        self._weights = set(weights)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in _LOOKUPS_AND_METADATA:
            values = [*args, *(kwargs or {}).values()]
            self.found |= {value for value in values if isinstance(value, nn.Parameter) and value in self._weights}
        return func(*args, **(kwargs or {}))


def _candidates(objective: ModelRisk) -> Iterator[nn.Embedding]:
    """Yield the plain embeddings whose weight is among the variables and belongs to no other module."""
    named = objective.model.named_parameters(remove_duplicate=False)
    owners = Counter(id(parameter) for _, parameter in named)
    for name in objective.names:
        module = objective.model.get_submodule(name.rpartition(".")[0])
        if (
            isinstance(module, nn.Embedding)
            and type(module).forward is nn.Embedding.forward
            and "forward" not in vars(module)
            and type(module.weight) is nn.Parameter
            and owners[id(module.weight)] == 1
            and module.max_norm is None
            and not module.sparse
        ):
            yield module


def _users(loss: Tensor, weights: Collection[Tensor]) -> dict[Tensor, set[Any]]:
    """Return the nodes of the loss's graph that take each weight."""
    users: dict[Tensor, set[Any]] = {weight: set() for weight in weights}
    for leaf, node in iter_leaf_uses(loss):
        if leaf in users:
            users[leaf].add(node)
    return users


@contextmanager
def _compact(embedding: nn.Embedding, rows: Tensor) -> Iterator[None]:
    """Hold only `rows` of an embedding's weight, and look them up by the same ids as before."""
    weight, padding = embedding.weight, embedding.padding_idx
    places = torch.full((len(weight),), -1, device=weight.device)
    places[rows] = torch.arange(len(rows), device=weight.device)

    def translate(module: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[Tensor], dict[str, Any]]:
        translated = places[_ids(args, kwargs)]
        if (translated < 0).any():
            raise RuntimeError(
                "A forward pass looked up an embedding row that the first pass over the batches did not."
            )
        return (translated,), {}

    settle()  # or the padding index would be put back before each pass
    hook = embedding.register_forward_pre_hook(translate, with_kwargs=True)
    try:
        embedding.weight = nn.Parameter(weight.detach()[rows])
        place = -1 if padding is None else int(places[padding])
        embedding.padding_idx = None if place < 0 else place
        yield
    finally:
        settle()
        embedding.weight, embedding.padding_idx = weight, padding
        hook.remove()


def _ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    ids: Tensor = args[0] if args else kwargs["input"]
    return ids
