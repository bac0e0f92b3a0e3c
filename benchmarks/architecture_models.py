# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of any architecture, from the defaults of its configuration."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from architecture_cases import TASKS, Case
from architecture_sizes import DEPTHS, FIRST_TOKEN, KIND_OVERRIDES, LABELS, OVERRIDES, SEED, SIZE
from transformers import PreTrainedConfig, PreTrainedModel


def tiny_config(
    cls: type[PreTrainedConfig], overrides: Mapping[str, Any], table: Mapping[str, dict[str, Any]]
) -> PreTrainedConfig:
    """Return a configuration with every size made small, and its lists by layer cut to one layer of each kind.

    Args:
        cls: The class of the configuration.
        overrides: Options for it.
        table: Options for the configurations inside, by model type.
    """
    default = vars(cls())
    depth = next((default[name] for name in DEPTHS if isinstance(default.get(name), int)), None)
    by_layer = {n: list(v) for n, v in default.items() if isinstance(v, (list, tuple)) and len(v) == depth}
    kinds = {n: list(dict.fromkeys(v)) if isinstance(v[0], str) else v for n, v in by_layer.items()}
    layers = max([2, *(len(kinds[n]) for n, v in by_layer.items() if isinstance(v[0], str))])
    layers = overrides.get("num_hidden_layers", layers)
    special_tokens = iter(range(1, FIRST_TOKEN))
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        name, value = field.name, default.get(cls.attribute_map.get(field.name, field.name))
        if isinstance(value, PreTrainedConfig) and not isinstance(overrides.get(name), PreTrainedConfig):
            values[name] = tiny_config(type(value), overrides.get(name, table.get(value.model_type, {})), table)
        elif name in kinds:
            values[name] = (kinds[name] + kinds[name][-1:] * layers)[:layers]
        elif isinstance(value, bool) or not isinstance(value, int) or field.default is None:
            continue  # what is `None` follows from the rest
        elif name.endswith(("_token_id", "_token_index")):
            values[name] = next(special_tokens)
        elif name in DEPTHS:
            values[name] = layers
        elif name in SIZE:
            values[name] = SIZE[name]
    if "kv_lora_rank" in values:  # heads of latent attention share no keys
        values["num_key_value_heads"] = SIZE["num_attention_heads"]
    given = {name: value for name, value in overrides.items() if not isinstance(values.get(name), PreTrainedConfig)}
    values |= copy.deepcopy(given)
    return cls(**values)


def tiny_model(case: Case) -> PreTrainedModel:
    """Build a small random model, the same each time; no zero gate or constant norm leaves a path unused."""
    cls = getattr(transformers, case.class_name)
    config_class = cls.config_class
    causal = case.task in ("causal LM", "MoE with router loss")
    overrides = {"num_labels": 2 if case.task == "question answering" else LABELS, "pad_token_id": 0}
    if causal and "is_decoder" in {field.name for field in dataclasses.fields(config_class)}:
        overrides["is_decoder"] = True
    if config_class.model_type == "reformer":  # a decoder by default, which its other heads refuse
        overrides["is_decoder"] = causal
    if case.task == "MoE with router loss":
        overrides["output_router_logits"] = True
    table = OVERRIDES if case.task in TASKS else OVERRIDES | KIND_OVERRIDES
    config = tiny_config(config_class, overrides | table.get(config_class.model_type, {}), table)
    config.get_text_config().pad_token_id = 0
    if config.is_encoder_decoder:
        config.decoder_start_token_id = 1
    torch.manual_seed(SEED)
    model = cls(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model.train()
