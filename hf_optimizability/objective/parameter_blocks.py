# SPDX-License-Identifier: Apache-2.0
"""Group parameters into named blocks (embeddings, layer.0 … head) by their names, for any architecture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from ..config import OptimizabilityConfig


EMBEDDINGS, HEAD, OTHER, WHOLE = "embeddings", "head", "other", "model"

_WRAPPERS = ("_orig_mod.", "module.", "base_model.model.", "_functional.", "_torch_params.")
"""Prefixes that torch.compile, DDP, PEFT and Keras add to a model's own names."""

_LAYER_NAMES = {"layer", "layers", "h", "block", "blocks"}
"""Names of a stack of layers in Transformers models; all become `layer` in a block's name."""

_NESTED_STACKS = {"layers", "blocks"}
"""Stacks inside a stage (ResNet, Swin, ConvNext) whose children are layers; T5's inner `layer` is not."""

_HEAD_NAMES = {
    "classifier", "classification_head", "pre_classifier", "score", "lm_head", "cls", "qa_outputs", "vocab_projector",
    "head", "heads", "decode_head", "pooler", "fc",
}  # fmt: skip
"""Modules whose numbered children do not belong to the trunk."""


def name_blocks(names: Sequence[str]) -> dict[str, list[int]]:
    """Group parameters into blocks by their names.

    A *stack* is a module outside the head with numbered children that have parameters: at least two, or one if the
    module has the name of a stack of layers. Each child is a block, `layer.0`, `layer.1` and so on; several stacks are
    distinguished by the modules above (`encoder.layer.0`, `decoder.layer.0`), and stages with layers inside give
    `stage.0.layer.1`. Parameters before the first stack, or named so, are `embeddings`; those after the last one, or
    named so, are `head`; those between two stacks, or in a model without a stack, are named after their module.

    Args:
        names: Parameter names in the model's order.

    Returns:
        Indices into `names` by block name, in the model's order. Each index is in one block.

    Example:
        >>> name_blocks(["bert.embeddings.w", "bert.encoder.layer.0.w", "bert.encoder.layer.1.w", "classifier.w"])
        {'embeddings': [0], 'layer.0': [1], 'layer.1': [2], 'head': [3]}
    """
    paths = [_bare(name).split(".") for name in names]
    stacks = _stack_labels(paths)
    in_stacks = [index for index, path in enumerate(paths) if _container(path) in stacks]
    blocks: dict[str, list[int]] = {}
    for index, path in enumerate(paths):
        container = _container(path)
        if container in stacks:
            block = _layer(path, stacks[container])
        elif _HEAD_NAMES.intersection(path):
            block = HEAD
        elif any("embed" in part for part in path[:-1]) or (in_stacks and index < in_stacks[0]):
            block = EMBEDDINGS
        elif in_stacks and index > in_stacks[-1]:
            block = HEAD
        else:
            block = ".".join(path[:-1]) or WHOLE
        blocks.setdefault(block, []).append(index)
    return blocks


def match_blocks(names: Sequence[str], patterns: Sequence[str], *, strict: bool = True) -> dict[str, list[int]]:
    """Group parameters by glob patterns of their names; the first match counts, and the unmatched are `other`.

    Args:
        names: Parameter names.
        patterns: Patterns such as `"*.layer.0.*"`; each becomes the name of its block.
        strict: Whether each pattern must match a parameter; otherwise one without a match makes no block.

    Returns:
        Indices into `names` by pattern.

    Raises:
        ValueError: If, under `strict`, a pattern matches no parameter that is left by earlier ones.

    Example:
        >>> match_blocks(["a.weight", "a.bias", "b.weight"], ["a.*"])
        {'a.*': [0, 1], 'other': [2]}
    """
    blocks: dict[str, list[int]] = {block: [] for block in [*patterns, OTHER]}
    for index, name in enumerate(names):
        pattern = next((pattern for pattern in patterns if fnmatchcase(_bare(name), pattern)), OTHER)
        blocks[pattern].append(index)
    for pattern in patterns:
        if strict and not blocks[pattern]:
            examples = ", ".join(repr(_bare(name)) for name in names[:3])
            raise ValueError(
                f"The pattern {pattern!r} in `blocks` fits no trainable parameter that an earlier pattern has not "
                f"taken. Parameters are called {examples}…; use patterns such as "
                f"'*.{_bare(names[0]).split('.')[-2]}.*'."
            )
    return {block: indices for block, indices in blocks.items() if indices}


def _bare(name: str) -> str:
    """Return a parameter's name without the prefixes of wrappers, and with dots for the slashes of Keras.

    The slashes that begin a path stay, so that a report does not take it for a name.
    """
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return re.sub(r"(?<=\w)/(?=\w)", ".", name)


def _container(path: Sequence[str]) -> tuple[str, ...] | None:
    """Return the module path above the first number in a parameter's path, or `None`."""
    first = next((index for index, part in enumerate(path) if part.isdecimal()), None)
    return None if first is None else tuple(path[:first])


def _stack_labels(paths: Sequence[Sequence[str]]) -> dict[tuple[str, ...] | None, str]:
    """Return a short name for each stack, with as many modules above it as needed to be unique."""
    children: dict[tuple[str, ...], set[str]] = {}
    short_names: dict[tuple[str, ...], str] = {}
    for path in paths:
        container = _container(path)
        if container is None or _HEAD_NAMES.intersection(container):
            continue
        children.setdefault(container, set()).add(path[len(container)])
        short_names.setdefault(container, _stack_word(container))
        if _inner_layer(path, container):
            short_names[container] = "stage"
    stacks = [c for c, numbers in children.items() if len(numbers) > 1 or short_names[c] in ("layer", "stage")]

    def label(stack: tuple[str, ...], parents: int) -> str:
        return ".".join([*stack[:-1][len(stack) - 1 - parents :], short_names[stack]])

    labels: dict[tuple[str, ...] | None, str] = {}
    for stack in stacks:
        others = [other for other in stacks if other != stack]
        depths = range(len(stack) or 1)
        unique = (label(stack, n) for n in depths if label(stack, n) not in [label(o, n) for o in others])
        labels[stack] = next(unique, ".".join(stack))
    return labels


def _stack_word(container: Sequence[str]) -> str:
    name = container[-1] if container else "layer"
    if name in _LAYER_NAMES:
        return "layer"
    return "stage" if name == "stages" else name


def _inner_layer(path: Sequence[str], container: Sequence[str]) -> str | None:
    """Return the number of the layer inside a stage, or `None`."""
    inner = path[len(container) + 1 : len(container) + 3]
    return inner[1] if len(inner) == 2 and inner[0] in _NESTED_STACKS and inner[1].isdecimal() else None


def _layer(path: Sequence[str], label: str) -> str:
    """Return the name of the block of a parameter inside a stack."""
    container = _container(path) or ()
    number, inner = path[len(container)], _inner_layer(path, container)
    return f"{label}.{number}" if inner is None else f"{label}.{number}.layer.{inner}"


def block_indices(names: Sequence[str], config: OptimizabilityConfig, *, strict: bool = True) -> dict[str, list[int]]:
    """Return the blocks to report on: the configured patterns, or embeddings, layers and head.

    Args:
        names: Names of the trainable parameters.
        config: Its `blocks`.
        strict: Whether each pattern has to fit a parameter: one that did may not, once layers are frozen in mid-run.
    """
    return name_blocks(names) if config.blocks is None else match_blocks(names, config.blocks, strict=strict)
