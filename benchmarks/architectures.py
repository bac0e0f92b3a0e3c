# SPDX-License-Identifier: Apache-2.0
"""Exact Hessian-vector products on a tiny random model of every architecture that Transformers' auto classes list.

Each model is built as its class builds it by default (nothing switched by hand), trained on one batch, measured in
float32, and multiplied with in float64, where the product is compared with central differences of the gradient. Every
case runs in a process of its own, so that a crash or a time-out is a row of the table like any other.

    python benchmarks/architectures.py                           # all that the results lack
    python benchmarks/architectures.py --only bert,llama --redo  # some anew
    python benchmarks/architectures.py --library pyhessian       # the same list with another library's products
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import logging
import math
import multiprocessing
import random
import resource
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_optimizability import Measurement, MeasurementError, OptimizabilityConfig
from hf_optimizability.curvature.decoupled import DecoupledHessian
from hf_optimizability.curvature.operators import HessianOperator
from hf_optimizability.curvature.twice_differentiable import CheapSecondDerivatives
from hf_optimizability.measure import measure_objective
from hf_optimizability.objective import Objective
from hf_optimizability.safety import eager_attention, math_attention, measuring


TASKS: dict[str, dict[str, Any]] = {
    "sequence classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "image classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "causal LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked LM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "token classification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "question answering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "seq2seq LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
RESULTS = Path(__file__).parent / "results" / "architectures.json"
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One class that an auto class lists."""

    task: str
    model_type: str
    class_name: str

    def __str__(self) -> str:
        return f"{self.task}: {self.model_type}, {self.class_name}"


def all_cases() -> Iterator[Case]:
    """Every class of every list; a model type may stand for several."""
    for task, listed in TASKS.items():
        for model_type, names in listed.items():
            for name in [names] if isinstance(names, str) else names:
                yield Case(task, model_type, name)


# --- Tiny models ---------------------------------------------------------------------------------------------------

SIZE = {
    name: size
    for size, names in {
        1: """decoder_sparse_step encoder_sparse_step first_k_dense_replace n_group num_expert_group topk_group
            n_shared_experts num_shared_experts moe_num_shared_experts mamba_n_groups mamba_ngroups n_groups
            num_dense_layers num_adapter_layers interleave_moe_layer_step num_nextn_predict_layers num_mem_blocks""",
        2: """num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_encoder_layers
            num_decoder_layers speech_encoder_layers t2u_encoder_layers t2u_decoder_layers conf_num_hidden_layers
            l_layers r_layers x_layers depth num_self_attends_per_block n_mamba_heads linear_num_key_heads
            num_key_value_heads num_kv_heads kv_n_heads num_query_groups num_global_key_value_heads
            swa_num_key_value_heads num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k index_topk
            index_topk_blocks""",
        4: """num_attention_heads num_heads n_head n_heads attention_heads encoder_attention_heads
            decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads num_self_attention_heads
            num_cross_attention_heads speech_encoder_attention_heads t2u_encoder_attention_heads
            t2u_decoder_attention_heads conf_num_attention_heads swa_num_attention_heads index_n_heads
            linear_num_value_heads linear_num_heads num_experts n_routed_experts num_local_experts moe_num_experts
            num_sparse_encoder_layers zero_expert_num patch_size""",
        8: """head_dim d_kv d_head dim_head attention_head_dim attention_head_size global_head_dim swa_head_dim
            index_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim kv_channels linear_key_head_dim
            linear_value_head_dim linear_head_dim mamba_d_head mamba_headdim mamba_head_dim mamba_d_state
            ssm_state_size state_size time_step_rank mamba_dt_rank rotary_dim chunk_size mamba_chunk_size
            global_block_size laurel_rank adapter_rank gated_norm_rank d_rel sliding_window""",
        16: """moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size
            shared_experts_intermediate_size image_size q_lora_rank kv_lora_rank o_lora_rank
            hidden_size_per_layer_input""",
        32: """hidden_size d_model n_embd dim emb_dim embedding_size embedding_dim hidden_dim hidden_size_global
            attention_hidden_size true_hidden_size decoder_hidden_size encoder_hidden_size pooler_hidden_size
            out_hidden_size input_embedding_size output_embedding_size word_embed_proj_dim projection_dim
            projection_size intra_bottleneck_size entity_emb_size router_hidden_size lru_width dim_model_base d_latents
            num_latents max_source_positions max_target_positions num_mel_bins visual_feat_dim""",
        48: """intermediate_size intermediate_size_mlp dense_intermediate_size feed_forward_size ffn_dim d_ff dff
            dim_ff n_inner mlp_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size expert_ffn_hidden_size
            speech_encoder_intermediate_size t2u_encoder_ffn_dim t2u_decoder_ffn_dim""",
        64: """max_position_embeddings n_positions max_seq_len max_encoder_position_embeddings
            max_decoder_position_embeddings t2u_max_position_embeddings max_2d_position_embeddings
            left_max_position_embeddings""",
        80: """vocab_size src_vocab_size tgt_vocab_size decoder_vocab_size t2u_vocab_size entity_vocab_size
            pronunciation_vocab_size shape_vocab_size vocab_size_per_layer_input audio_vocab_size char_vocab_size
            encoder_hash_byte_group_vocab unit_hifi_gan_vocab_size num_hash_buckets""",
    }.items()
    for name in names.split()
}  # fmt: skip
"""Small values that fit each other for whatever options a configuration has."""

DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
FIRST_TOKEN, VOCABULARY, LENGTH, PADDING, LABELS = 24, SIZE["vocab_size"], 16, 4, 3
SEED = 0

OVERRIDES: dict[str, dict[str, Any]] = {
    # Image models: one narrow block for each stage.
    "bit": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_groups": 2},
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "convnextv2": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "cvt": {"embed_dim": [8, 16, 24], "depth": [1, 2, 3], "num_heads": [1, 2, 3]},
    "donut-swin": {"embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "window_size": 2},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.1, "image_size": 32, "hidden_dim": 320},
    "focalnet": {"embed_dim": 8, "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3]},
    "hgnet_v2": {
        "embedding_size": 8, "stem_channels": [3, 8, 8], "hidden_sizes": [16, 16, 24, 32], "depths": [1, 1, 1, 1],
        "stage_in_channels": [8, 16, 16, 24], "stage_mid_channels": [8, 8, 8, 8],
        "stage_out_channels": [16, 16, 24, 32], "stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [2, 2, 2, 2],
    },
    "hiera": {"embed_dim": 8, "image_size": [32, 32], "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
    "levit": {
        "image_size": 64, "patch_size": 16, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2],
        "depths": [1, 1, 1], "key_dim": [8, 8, 8],
    },
    "mobilenet_v1": {"depth_multiplier": 0.05, "image_size": 32},
    "mobilenet_v2": {"depth_multiplier": 0.1, "image_size": 32},
    "mobilevit": {
        "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 8, 16, 16, 24, 32], "image_size": 32,
        "patch_size": 1,
    },
    "mobilevitv2": {
        "base_attn_unit_dims": [16, 24, 32], "n_attn_blocks": [1, 1, 1], "width_multiplier": 0.25, "image_size": 32,
        "patch_size": 1,
    },
    "perceiver": {
        "num_latents": 8, "max_position_embeddings": 16, "num_self_attention_heads": 2,
        "num_cross_attention_heads": 1,
    },
    "poolformer": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "pp_lcnet": {"scale": 0.25, "class_expand": 32},
    "pvt": {
        "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2], "image_size": 32,
    },
    "pvt_v2": {
        "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2], "image_size": 32,
    },
    "regnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4},
    "resnet": {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1]},
    "segformer": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]},
    "swiftformer": {"embed_dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "image_size": 32},
    "swin": {"embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "window_size": 2},
    "swinv2": {
        "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "window_size": 2, "pretrained_window_sizes": [0, 0],
    },
    "textnet": {"stem_out_channels": 8, "hidden_sizes": [8, 8, 8, 16, 16], "image_size": [32, 32]},
    # Text models: both kinds of layer where they have two, heads that fit, what their own checks ask for.
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_size": [3, 4], "encoder_config": {"hidden_size_global": 32}, "use_cache": False,
    },
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        },
    },
    "bros": {"hidden_size": 64},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {
        "num_key_value_heads": 4, "head_dim": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4,
        "swa_head_dim": 16, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "esm": {"vocab_size": 80},
    "funnel": {"block_sizes": [1, 1, 1], "d_inner": 48},
    "gemma3n_text": {
        "num_kv_shared_layers": 2, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": 48, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "got_ocr2": {"vision_config": {"output_channels": 16}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "imagegpt": {"vocab_size": 80},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4, "input_size": 16},
    "led": {"attention_window": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 48},
    "longformer": {"attention_window": 8},
    "mamba2": {"num_heads": 8},
    "markuplm": {"max_depth": 4, "xpath_unit_hidden_size": 8},
    "minimax_m3_vl_text": {"shared_intermediate_size": 16},
    "ministral": {"head_dim": 8},
    "nemo_speechlm": {"audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 32}}}},
    "neomme": {"head_dim": 16},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "phi4_multimodal": {
        "audio_config": {"ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 32},
    },
    "qwen3_asr": {"audio_config": {"downsample_hidden_size": 8}},
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [4, 4], "attn_layers": ["local", "lsh"], "num_buckets": 4,
        "lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4,
    },
    "rwkv": {"rescale_every": 1},
    "vibevoice_asr": {
        f"{kind}_tokenizer_encoder_config": {"num_filters": 2, "depths": [1] * 7, "ffn_expansion": 1}
        for kind in ("acoustic", "semantic")
    },
    "xlnet": {"d_inner": 48},
    "xlstm": {"hidden_size": 128, "chunk_size": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""Options that the small values do not fit, by the model type of the configuration."""


def tiny_config(cls: type[PreTrainedConfig], overrides: dict[str, Any]) -> PreTrainedConfig:
    """A configuration with every size made small, and its lists by layer cut to one layer of each kind."""
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
        if isinstance(value, PreTrainedConfig):
            values[name] = tiny_config(type(value), overrides.get(name, OVERRIDES.get(value.model_type, {})))
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
    values |= {name: value for name, value in overrides.items() if not isinstance(values.get(name), PreTrainedConfig)}
    return cls(**values)


def tiny_model(case: Case) -> PreTrainedModel:
    """A small random model, the same each time, whose weights leave no path unused (zero gates, constant norms)."""
    cls = getattr(transformers, case.class_name)
    config_class = cls.config_class
    causal = case.task == "causal LM"
    overrides = {"num_labels": 2 if case.task == "question answering" else LABELS, "pad_token_id": 0}
    if causal and "is_decoder" in {field.name for field in dataclasses.fields(config_class)}:
        overrides["is_decoder"] = True
    if config_class.model_type == "reformer":  # a decoder by default, which its other heads refuse
        overrides["is_decoder"] = causal
    config = tiny_config(config_class, overrides | OVERRIDES.get(config_class.model_type, {}))
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


# --- Batches -------------------------------------------------------------------------------------------------------


def make_batch(case: Case, model: PreTrainedModel) -> Batch:
    """Two examples; of two texts, the second one is padded."""
    torch.manual_seed(SEED + 1)
    if case.task == "image classification":
        batch = {"pixel_values": torch.randn(2, 3, *image_size(model.config)), "labels": torch.tensor([0, 2])}
    else:
        mask = torch.ones(2, LENGTH, dtype=torch.long)
        mask[1, -PADDING:] = 0
        ids = tokens(2, LENGTH) * mask
        end = vars(model.config.get_text_config()).get("eos_token_id")
        if isinstance(end, int):  # encoder-decoders classify by it
            ids[0, -1] = ids[1, -PADDING - 1] = end
        batch = {"input_ids": ids, "attention_mask": mask} | labels(case, ids, mask)
        if "attention_mask" not in inspect.signature(model.forward).parameters:
            del batch["attention_mask"]
    extras = EXTRAS.get((case.task, case.model_type), EXTRAS.get(case.model_type, dict))()
    return {name: value for name, value in {**batch, **extras}.items() if value is not None}


def tokens(*shape: int) -> Tensor:
    """Tokens without a special meaning."""
    return torch.randint(FIRST_TOKEN, VOCABULARY, shape)


def image_size(config: PreTrainedConfig) -> tuple[int, int]:
    """Height and width that a model takes; any will do where the configuration names none."""
    size = vars(vars(config).get("vision_config", config)).get("image_size", 32)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return height, width


def labels(case: Case, ids: Tensor, mask: Tensor) -> Batch:
    """What each task is trained on; -100 for padding and, in a masked LM, for two tokens of three."""
    if case.task == "sequence classification":
        return {"labels": torch.tensor([0, 2])}
    if case.task == "question answering":
        return {"start_positions": torch.tensor([1, 3]), "end_positions": torch.tensor([4, 7])}
    target = {"token classification": torch.randint(LABELS, ids.shape), "seq2seq LM": tokens(*ids.shape)}
    kept = mask.bool()
    if case.task == "masked LM":
        kept = kept & (torch.arange(LENGTH) % 3 == 0)
    return {"labels": target.get(case.task, ids).masked_fill(~kept, -100)}


def musicgen_batch() -> dict[str, Tensor | None]:
    """Four books of codes for each example, stacked."""
    return {"input_ids": tokens(8, LENGTH), "attention_mask": None, "labels": tokens(2, LENGTH, 4)}


EXTRAS: dict[str | tuple[str, str], Callable[[], dict[str, Tensor | None]]] = {
    "bros": lambda: {"bbox": torch.rand(2, LENGTH, 4)},
    "git": lambda: {"pixel_values": torch.randn(2, 3, 16, 16)},
    "imagegpt": lambda: {"pixel_values": None, "input_ids": tokens(2, LENGTH)},
    ("question answering", "longformer"): lambda: {"global_attention_mask": torch.eye(1, LENGTH).long().repeat(2, 1)},
    "lxmert": lambda: {
        "visual_feats": torch.randn(2, 4, 32), "visual_pos": torch.rand(2, 4, 4), "labels": torch.tensor([0, 1]),
        "start_positions": None, "end_positions": None,
    },
    "voxtral_realtime": lambda: {"input_features": torch.randn(2, 32, 128)},
    "musicgen": musicgen_batch,
    "musicgen_melody": musicgen_batch,
    "siglip2": lambda: {
        "pixel_values": torch.randn(2, 16, 48), "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.full((2, 2), 4),
    },
}  # fmt: skip
"""What else a model must be given, or (`None`) what it can't take; by model type, or task and model type."""


# --- The truth -----------------------------------------------------------------------------------------------------

STEPS = (1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-4, 1e-3)
"""Distances to try along a vector with entries of size 1: most models agree at the first one, to 1e-9."""
TOLERANCE = 1e-6
"""Above the 1e-7 that differences in float64 are good for at the shortest steps."""
FLOOR = 1e-3
"""A parameter tensor with a smaller share of the product than this is judged by the whole product, times this."""


class DoublePrecision(TorchFunctionMode):
    """Takes every mention of float32 for float64, such as the casts in softmax, norms and losses."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function at the higher precision."""
        func = Tensor.double if func is Tensor.float else func
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)


@contextmanager
def double_precision() -> Iterator[None]:
    """Everything in float64, also where a model's code says float32: else rounding hides what is to be seen."""
    torch.set_default_dtype(torch.float64)
    try:
        with DoublePrecision():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


class Truth:
    """A model in float64 and eval mode, differentiated by torch and differences alone.

    Every pass starts from the same seed, as a measurement does: some models draw numbers in eval mode too.
    """

    def __init__(self, model: PreTrainedModel, batch: Batch):
        self.model = model.double().eval()
        model.config.get_text_config().use_cache = False  # as in training
        self.batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and module._can_set_experts_implementation():
                module.set_experts_implementation("eager")  # the default one has no float64
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.sizes = [parameter.numel() for parameter in self.parameters]
        self._point = nn.utils.parameters_to_vector(self.parameters).detach()

    def variables(self) -> Tensor:
        """1 for the entries that autograd reaches, 0 for those that it takes for constants.

        These are padding rows of embeddings, and parameters that the model only uses under `no_grad`.
        """
        gradients = torch.autograd.grad(self._loss(), self.parameters, allow_unused=True)
        masks = [torch.full_like(p, g is not None) for p, g in zip(self.parameters, gradients, strict=True)]
        by_id = {id(p): mask for p, mask in zip(self.parameters, masks, strict=True)}
        for module in self.model.modules():
            padding = vars(module).get("padding_idx")
            weight = id(vars(module)["_parameters"].get("weight"))
            if padding is not None and weight in by_id:
                by_id[weight][padding] = 0
        return nn.utils.parameters_to_vector(masks)

    def disagreement(self, vector: Tensor, product: Tensor) -> float:
        """How far a product is from the derivative of the gradient, at the best of several steps.

        A kink (ReLU, a token that changes its expert) between the two points spoils the differences, so steps get
        shorter until none is crossed. A wrong product agrees at no step: thousands of entries that are equal to six
        digits are no accident.
        """
        best = math.inf
        for step in STEPS:
            best = min(best, self._deviation(product, self._derivative(vector, step)))
            if best <= TOLERANCE:
                break
        return best

    def gradient_error(self, vector: Tensor) -> float:
        """`|∂L/∂v − gᵀv| / ‖g‖`: not small where a model's backward pass is not the derivative of its forward pass."""
        with torch.no_grad():
            step = 1e-6
            ahead, behind = (float(self._loss(distance * vector)) for distance in (step, -step))
        gradient = self._gradient()
        return float(abs((ahead - behind) / (2 * step) - gradient @ vector) / gradient.norm())

    def _loss(self, shift: Tensor | float = 0.0) -> Tensor:
        nn.utils.vector_to_parameters(self._point + shift, self.parameters)
        self.model.train().eval()  # LeViT drops what it cached with the graph of another pass
        random.seed(SEED)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        return self.model(**self.batch)["loss"]

    def _gradient(self, shift: Tensor | float = 0.0) -> Tensor:
        pieces = torch.autograd.grad(self._loss(shift), self.parameters, materialize_grads=True)
        return torch.cat([piece.flatten() for piece in pieces])

    def _derivative(self, vector: Tensor, step: float) -> Tensor:
        """Central differences of the gradient, extrapolated from two steps (Richardson)."""
        wide, narrow = ((self._gradient(h * vector) - self._gradient(-h * vector)) / (2 * h) for h in (step, step / 2))
        return (4 * narrow - wide) / 3

    def _deviation(self, product: Tensor, reference: Tensor) -> float:
        """Largest over the tensors of `‖p − r‖ / (‖r‖ + FLOOR ‖r of all‖)`; infinite where the reference is zero."""
        whole = float(reference.norm())
        if not whole > 0:
            return math.inf
        pieces = zip(product.split(self.sizes), reference.split(self.sizes), strict=True)
        return max(float((p - r).norm() / (r.norm() + FLOOR * whole)) for p, r in pieces)


def asymmetry(vectors: Tensor, products: Tensor) -> float:
    """`|uᵀHv − vᵀHu| / (‖u‖ ‖Hv‖)`."""
    (u, v), (Hu, Hv) = vectors.double(), products.double()
    return float((u @ Hv - v @ Hu).abs() / (u.norm() * Hv.norm()))


# --- The libraries -------------------------------------------------------------------------------------------------

OURS = "hf_optimizability"
EXACT = "double_backward"


def measure_once(model: PreTrainedModel, batch: Batch) -> Measurement:
    """A whole measurement, 8 products, as the callback makes it."""
    return measure_objective(Objective(model, [batch]), OptimizabilityConfig(profile="light", max_hvps=16))[0]


def our_products(
    model: PreTrainedModel,
    batch: Batch,
    vectors: Tensor,
    operator: type[HessianOperator | DecoupledHessian] = HessianOperator,
) -> Tensor:
    """`Hv` for each row v, as a measurement makes them."""
    objective = Objective(model, [batch])
    with measuring(model, seed=SEED), CheapSecondDerivatives():
        try:
            with math_attention():
                return operator(objective).matmat(vectors.T).T
        except RuntimeError:
            with eager_attention(model):
                return operator(objective).matmat(vectors.T).T


def block_deviation(truth: Truth, vector: Tensor) -> float:
    """How far the matrix that the trace is had from is from the Hessian on diagonal blocks, where they shall be equal.

    That is `(H w)_b`, for w zero outside the block b; 16 parameter tensors are tried.
    """
    blocks = random.Random(SEED).sample(range(len(truth.sizes)), min(16, len(truth.sizes)))
    within = torch.zeros(len(blocks), len(vector))
    for row, block in zip(within, blocks, strict=True):
        row.split(truth.sizes)[block].copy_(vector.split(truth.sizes)[block])
    exact = our_products(truth.model, truth.batch, within)
    decoupled = our_products(truth.model, truth.batch, within, DecoupledHessian)
    floor = TOLERANCE * exact.norm()  # the bias of attention's keys has no curvature: all that is there is rounding
    worst = 0.0
    for right, found, block in zip(exact, decoupled, blocks, strict=True):
        right, found = (row.split(truth.sizes)[block] for row in (right, found))
        worst = max(worst, float((found - right).norm() / (right.norm() + floor)))
    return worst


class Given(nn.Module):
    """The loss function for a model that gives its loss itself."""

    reduction = "mean"

    def forward(self, loss: Tensor, _: Tensor) -> Tensor:
        """The loss."""
        return loss


class Loss(nn.Module):
    """A model's own loss as its output, for libraries that call the model with one argument."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """The mean loss of a batch."""
        return self.model(**batch)["loss"]


def pyhessian_products(model: PreTrainedModel, batch: Batch, vectors: Tensor) -> Tensor:
    """PyHessian, given the batch as the input and a criterion that passes the loss through."""
    module = importlib.import_module("pyhessian.hessian")
    model.zero_grad()  # it takes gradients that are there for part of its own
    hessian = module.hessian(Loss(model), lambda loss, _: loss, data=(batch, None), cuda=False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sizes = [parameter.numel() for parameter in parameters]
    rows = []
    for vector in vectors:
        pieces = [piece.view_as(p) for piece, p in zip(vector.split(sizes), parameters, strict=True)]
        product = module.hessian_vector_product(hessian.gradsH, hessian.params, pieces)
        rows.append(torch.cat([piece.flatten() for piece in product]))
    return torch.stack(rows)


def hessian_eigenthings_products(model: PreTrainedModel, batch: Batch, vectors: Tensor) -> Tensor:
    """hessian-eigenthings with the loss it has for Transformers."""
    package = importlib.import_module("hessian_eigenthings")
    operator = package.HessianOperator(model.eval(), [batch], package.hf_lm_loss())
    return torch.stack([operator.matvec(vector) for vector in vectors])


def curvlinops_products(model: PreTrainedModel, batch: Batch, vectors: Tensor) -> Tensor:
    """Curvlinops, given the batch as the input and a loss function that passes the loss through."""
    package = importlib.import_module("curvlinops")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    data = [(batch, torch.zeros(2))]
    loss = Loss(model).eval()
    operator = package.HessianLinearOperator(loss, Given(), parameters, data, batch_size_fn=lambda _: 2)
    return (operator @ vectors.T).T


LIBRARIES: dict[str, Callable[[PreTrainedModel, Batch, Tensor], Tensor]] = {
    OURS: our_products,
    "pyhessian": pyhessian_products,
    "hessian_eigenthings": hessian_eigenthings_products,
    "curvlinops": curvlinops_products,
}


# --- The check -----------------------------------------------------------------------------------------------------

FLOAT32_TOLERANCE = 1e-3
GRADIENT_TOLERANCE = 1e-4
Outcome = Literal["works", "raises", "crashes", "wrong", "traces", "no Hessian", "excluded"]


@dataclass(frozen=True)
class Row:
    """What became of one case.

    Attributes:
        task: The list that it is on.
        model_type: The name in the list.
        class_name: The class in the list.
        outcome: `"works"`; `"raises"`: the library says that it can't; `"crashes"`: an error that is not the
            package's own, a time-out or a dead process; `"wrong"`: the product disagrees; `"traces"`: the measurement
            changed the model; `"no Hessian"`: the model's backward pass is not the derivative of its forward pass,
            and the library says nothing; `"excluded"`: the model can't be built, or not trained on one batch.
        reason: Why it does not work.
        parameters: Number of trainable parameters.
        attention: The attention implementation that the model came with.
        error: Largest deviation from the truth of a product of this package in float64, see `Truth.disagreement`,
            and of the matrix that it has the trace from, see `block_deviation`.
        float32_error: `‖H₃₂v − H₆₄v‖ / ‖H₆₄v‖` of the library's products in float32.
        asymmetry: `|uᵀHv − vᵀHu| / (‖u‖ ‖Hv‖)` of the library's products in float32.
        seconds: For two products in float32.
    """

    task: str
    model_type: str
    class_name: str
    outcome: Outcome
    reason: str = ""
    parameters: int = 0
    attention: str = ""
    error: float | None = None
    float32_error: float | None = None
    asymmetry: float | None = None
    seconds: float | None = None


def state(model: PreTrainedModel) -> dict[str, Any]:
    """All that a measurement must leave alone, by kind."""
    modules = dict(model.named_modules())
    configs = {id(m.config): m.config for m in modules.values() if isinstance(m, PreTrainedModel)}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    numpy_state: Any = np.random.get_state()
    others = {name: {k: v for k, v in vars(m).items() if not k.startswith("_")} for name, m in modules.items()}
    return {
        "parameters": {name: p.detach().clone() for name, p in parameters.items()},
        "places": [(name, p.data_ptr(), p.requires_grad) for name, p in parameters.items()],
        "buffers": {name: b.clone() for name, b in model.named_buffers(remove_duplicate=False)},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()},
        "modes": [module.training for module in modules.values()],
        "attributes": copied(others),
        "attention": [config._attn_implementation for config in configs.values()],
        "configurations": [config.to_json_string(use_diff=False) for config in configs.values()],
        "random numbers": (torch.get_rng_state(), numpy_state[1].tolist(), numpy_state[2], random.getstate()),
    }


def copied(value: Any) -> Any:
    """A copy of numbers, strings and tensors in plain containers; nothing of what else they hold."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [copied(item) for item in value]
    return value if isinstance(value, (bool, int, float, str)) else None


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


def examine(case: Case, library: str = OURS, say: Callable[[str], object] = id) -> Row:
    """Builds, trains, measures and checks one case; `say` gets the name of each stage as it starts."""
    say("build")
    model = tiny_model(case)
    batch = make_batch(case, model)
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    attention = model.config._attn_implementation
    say("train")
    train(model, batch)
    changed: list[str] = []
    engine = EXACT
    if library == OURS:
        say("measure")
        before, error = state(model), None
        try:
            engine = measure_once(model, batch).engine
        except Exception as raised:
            error = raised
        after = state(model)
        changed = [kind for kind in before if not same(before[kind], after[kind])]
        if error is not None:
            return failure(case, library, "measure", error, changed)

    say("check")
    twin = tiny_model(case)
    twin.load_state_dict(model.state_dict())  # training has moved running statistics
    truth = Truth(twin, batch)
    with double_precision():
        vectors = torch.randn(2, count, generator=torch.Generator().manual_seed(SEED)) * truth.variables()
        products = our_products(truth.model, truth.batch, vectors)
        deviation = block_deviation(truth, vectors[0]) if library == OURS else 0.0
        deviation = max(deviation, *(truth.disagreement(v, Hv) for v, Hv in zip(vectors, products, strict=True)))
        gradient_error = 0.0 if deviation <= TOLERANCE else truth.gradient_error(vectors[0])
    say("multiply")
    started = time.perf_counter()
    found = LIBRARIES[library](model, batch, vectors.float()).double()
    seconds = time.perf_counter() - started
    rounding = float((found - products).norm() / products.norm())
    outcome, reason = judge(deviation, rounding, gradient_error, changed)
    if outcome == "works" and engine != EXACT:
        outcome, reason = "raises", f"measured by {engine}, and says so"
    return Row(
        case.task,
        case.model_type,
        case.class_name,
        outcome,
        reason,
        parameters=count,
        attention=attention,
        error=deviation,
        float32_error=rounding,
        asymmetry=asymmetry(vectors, found),
        seconds=seconds,
    )


def train(model: PreTrainedModel, batch: Batch) -> None:
    """One backward pass, as a training step makes it.

    Raises:
        ValueError: If the model gives no finite loss.
    """
    loss = model(**batch).get("loss")
    if loss is None:
        raise ValueError("the model returns no loss")
    loss.backward()
    if not torch.isfinite(loss):
        raise ValueError(f"the loss is {float(loss)}")


def judge(deviation: float, rounding: float, gradient_error: float, changed: Sequence[str]) -> tuple[Outcome, str]:
    """Outcome and reason, the gravest first."""
    if gradient_error > GRADIENT_TOLERANCE:
        return "no Hessian", f"the model's gradient is not that of its loss: off by {gradient_error:.0e}"
    if not deviation <= TOLERANCE:
        return "wrong", f"deviates by {deviation:.0e} in float64"
    if not rounding <= FLOAT32_TOLERANCE:
        return "wrong", f"deviates by {rounding:.0e} in float32"
    if changed:
        return "traces", "changed: " + ", ".join(changed)
    return "works", ""


# --- One process for each case -------------------------------------------------------------------------------------


def run(case: Case, library: str = OURS, *, seconds: float = 180, memory: int = 8 << 30) -> Row:
    """Examines a case in a process of its own, which may take so long and so many bytes."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(case, library, sender, memory))
    process.start()
    sender.close()
    deadline, stage = time.monotonic() + seconds, ""
    try:
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            message = receiver.recv()
            if isinstance(message, Row):
                return message
            stage = message
        return failure(case, library, stage, f"took more than {seconds:.0f} s")
    except EOFError:
        process.join()
        return failure(case, library, stage, f"the process died with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def work(case: Case, library: str, pipe: Connection, memory: int) -> None:
    """The child process: sends the stages, then the row."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    stage = ""

    def say(name: str) -> None:
        nonlocal stage
        stage = name
        pipe.send(name)

    try:
        pipe.send(examine(case, library, say))
    except Exception as error:
        pipe.send(failure(case, library, stage, error))


def failure(case: Case, library: str, stage: str, error: Exception | str, changed: Sequence[str] = ()) -> Row:
    """The row for what went wrong at a stage, and what it left changed."""
    reason = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    reason = " ".join(reason.split())[:300] + (" Changed: " + ", ".join(changed) if changed else "")
    outcome: Outcome = "raises" if isinstance(error, MeasurementError) or library != OURS else "crashes"
    if stage in ("build", "train") or (stage == "check" and library != OURS):  # then there is no truth
        outcome = "excluded"
    return Row(case.task, case.model_type, case.class_name, outcome, f"{stage}: {reason}")


# --- Results -------------------------------------------------------------------------------------------------------

SIGNS: dict[Outcome, str] = {
    "works": "✓",
    "raises": "raises",
    "crashes": "**crashes**",
    "wrong": "**wrong**",
    "traces": "**traces**",
    "no Hessian": "no Hessian",
    "excluded": "–",
}


def load(path: Path) -> dict[str, list[Row]]:
    """The rows of each library; none where there is no file yet."""
    if not path.exists():
        return {}
    return {library: [Row(**row) for row in rows] for library, rows in json.loads(path.read_text()).items()}


def save(results: dict[str, list[Row]], path: Path) -> None:
    """Writes the results, and the tables beside them."""
    data = {library: [dataclasses.asdict(row) for row in rows] for library, rows in results.items()}
    path.write_text(json.dumps(data, indent=1) + "\n")
    path.with_suffix(".md").write_text(to_markdown(results))


def to_markdown(results: dict[str, list[Row]]) -> str:
    """All tables: totals, what does not work, what is excluded, and every architecture."""
    ours = results.get(OURS, [])
    trained = [row for row in ours if row.outcome != "excluded"]
    errors = [row.error for row in trained if row.outcome == "works" and row.error is not None]
    lines = [
        "# Architectures",
        "",
        "A tiny random model of every class that Transformers' auto classes list, built as it is by default, measured",
        f"in float32 and checked in float64 against central differences of the gradient (tolerance {TOLERANCE:.0e} of",
        f"each parameter tensor; largest error of those that work: {max(errors, default=0):.0e}). Written by",
        f"`benchmarks/architectures.py`; torch {torch.__version__}, transformers {transformers.__version__}.",
        "",
        "Of those that can be built and trained on one batch:",
        "",
        *totals(results),
        "",
        "## What does not work",
        "",
        "| library | task | model type | class | outcome | reason |",
        "|---|---|---|---|---|---|",
    ]
    for row in trained:
        if row.outcome != "works":
            lines.append(cells(OURS, row.task, row.model_type, row.class_name, SIGNS[row.outcome], row.reason))
    for library, rows in results.items():
        if library != OURS:
            lines += [cells(library, *reason, f"{number} ×") for reason, number in common_reasons(rows)]
    lines += ["", "## What can't be built or trained", ""]
    lines += ["| task | model type | class | reason |", "|---|---|---|---|"]
    excluded = (row for row in ours if row.outcome == "excluded")
    lines += [cells(row.task, row.model_type, row.class_name, row.reason) for row in excluded]
    lines += ["", "## Every architecture", "", *matrix(ours), ""]
    return "\n".join(lines)


def cells(*texts: str) -> str:
    """One row of a table."""
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def totals(results: dict[str, list[Row]]) -> list[str]:
    """A table of how many work, by library and task."""
    lines = [cells("library", *TASKS, "all"), "|---" * (len(TASKS) + 2) + "|"]
    for library, rows in results.items():
        counts = []
        for task in [*TASKS, None]:
            outcomes = [row.outcome for row in rows if task in (row.task, None) and row.outcome != "excluded"]
            works = outcomes.count("works")
            share = f" = {works / len(outcomes):.1%}" if task is None and outcomes else ""
            counts.append(f"{works} of {len(outcomes)}{share}")
        lines.append(cells(library, *counts))
    return lines


def common_reasons(rows: Sequence[Row]) -> list[tuple[tuple[str, str, str, str], int]]:
    """What goes wrong most, each with one example."""
    failed = [row for row in rows if row.outcome not in ("works", "excluded")]
    examples: dict[tuple[str, str], Row] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for row in failed:
        kind = (SIGNS[row.outcome], row.reason[:60])
        counts[kind] += 1
        examples.setdefault(kind, row)
    return [
        ((e.task, e.model_type, e.class_name, f"{sign}: {e.reason[:160]}"), number)
        for (sign, _), number, e in ((kind, number, examples[kind]) for kind, number in counts.most_common(8))
    ]


def matrix(rows: Sequence[Row]) -> list[str]:
    """A table with a row for each model type and a column for each task."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        found.setdefault(row.model_type, {}).setdefault(row.task, []).append(SIGNS[row.outcome])
    lines = [cells("model type", *TASKS), "|---" * (len(TASKS) + 1) + "|"]
    return lines + [cells(name, *(", ".join(found[name].get(task, [])) for task in TASKS)) for name in sorted(found)]


def main() -> None:
    """Runs what the results lack, and writes them after every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=LIBRARIES, default=OURS, help="whose products to check")
    parser.add_argument("--only", help="model types or class names, with commas between them")
    parser.add_argument("--redo", action="store_true", help="run again what the results have")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to read and write them")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    results = load(arguments.results)
    rows = {Case(row.task, row.model_type, row.class_name): row for row in results.get(arguments.library, [])}
    only = set((arguments.only or "").split(","))
    for case in all_cases():
        wanted = arguments.only is None or only & {case.model_type, case.class_name}
        if not wanted or (case in rows and not arguments.redo):
            continue
        row = rows[case] = run(case, arguments.library)
        print(f"{case}: {row.outcome} {row.reason}", flush=True)
        results[arguments.library] = [rows[case] for case in all_cases() if case in rows]
        save(results, arguments.results)


if __name__ == "__main__":
    main()
