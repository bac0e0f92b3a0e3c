# SPDX-License-Identifier: Apache-2.0
"""Small values for the options of any configuration."""

from __future__ import annotations

from typing import Any

from transformers import Gemma4UnifiedVisionConfig, Gemma4VisionConfig, ResNetConfig, SwinConfig


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


CONVOLUTIONS: dict[str, Any] = {
    "conv_dim": [8, 8], "conv_kernel": [8, 4], "conv_stride": [8, 2], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16,
    "mask_time_length": 2,
}  # fmt: skip
"""A frame for every 16 samples."""
STAGES: dict[str, Any] = {
    "num_labels": 3, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "embedding_size": 8,
    "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip
HIGH_PERFORMANCE_STAGES: dict[str, Any] = {
    **STAGES, "stem_channels": [3, 8, 8], "stage_in_channels": [8, 8, 8, 8], "stage_mid_channels": [8, 8, 8, 8],
    "stage_out_channels": [8, 8, 8, 8], "stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [2, 2, 2, 2],
}  # fmt: skip
RESNET = ResNetConfig(**STAGES)
WINDOWS: dict[str, Any] = {
    "image_size": 64, "patch_size": 4, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2],
    "window_size": 2,
}  # fmt: skip
SWIN = SwinConfig(**{**WINDOWS, "out_features": ["stage1", "stage2", "stage3", "stage4"]})
SWIN_TAIL = SwinConfig(**{**WINDOWS, "out_features": ["stage2", "stage3", "stage4"]})
QUERIES: dict[str, Any] = {
    "d_model": 32, "num_queries": 6, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "encoder_attention_heads": 8, "decoder_attention_heads": 8,
}  # fmt: skip
REAL_TIME: dict[str, Any] = {
    **QUERIES, "backbone_config": HIGH_PERFORMANCE_STAGES, "encoder_in_channels": [8, 8, 8], "encoder_hidden_dim": 32,
    "decoder_in_channels": [32, 32, 32], "num_denoising": 2, "hidden_expansion": 0.5, "image_size": 64,
    "mask_feature_channels": [8, 8], "num_prototypes": 4, "initializer_range": 0.15,
}  # fmt: skip
FORECAST: dict[str, Any] = {
    "prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 1, "d_model": 16,
    "moving_average": 3, "label_length": 4,
}  # fmt: skip
THREE_AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
KOSMOS = {
    "layers": 2, "embed_dim": 32, "vocab_size": 80, "ffn_dim": 48, "attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip

KIND_OVERRIDES: dict[str, dict[str, Any]] = {
    # Speech.
    "data2vec-audio": CONVOLUTIONS,
    "hubert": CONVOLUTIONS,
    "sew": CONVOLUTIONS,
    "sew-d": CONVOLUTIONS,
    "speecht5": CONVOLUTIONS,
    "unispeech": CONVOLUTIONS,
    "unispeech-sat": CONVOLUTIONS,
    "wav2vec2": CONVOLUTIONS,
    "wavlm": CONVOLUTIONS,
    "wav2vec2-conformer": {**CONVOLUTIONS, "vocab_size": 80},
    "wav2vec2-bert": {"vocab_size": 80, "feature_projection_input_dim": 32, "classifier_proj_size": 16},
    "granite_speech5_encoder": {"context_size": 8, "vocab_size": 80},
    "speech_to_text": {"conv_channels": 16, "input_feat_per_channel": 32},
    "parakeet_encoder": {"subsampling_conv_channels": 8},
    "nemotron_asr_streaming_encoder": {"subsampling_conv_channels": 8},
    "fun_asr_nano_adaptor": {"intermediate_size": 8, "projector_hidden_size": 16},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8, "projector_hidden_size": 16}},
    "moonshine_streaming_encoder": {"sliding_windows": [[16, 4], [16, 0]]},
    # Boxes.
    "conditional_detr": {**QUERIES, "backbone_config": RESNET},
    "dab-detr": {**QUERIES, "backbone_config": RESNET, "hidden_size": 32},
    "deformable_detr": {**QUERIES, "backbone_config": RESNET, "num_feature_levels": 3},
    "detr": {**QUERIES, "backbone_config": RESNET},
    "table-transformer": {**QUERIES, "backbone_config": RESNET},
    "rt_detr": {**REAL_TIME, "backbone_config": {**STAGES, "layer_type": "basic"}},
    "rt_detr_v2": {**REAL_TIME, "backbone_config": {**STAGES, "layer_type": "basic"}},
    "d_fine": REAL_TIME,
    "deimv2": REAL_TIME,
    "pp_doclayout_v2": REAL_TIME,
    "pp_doclayout_v3": {
        **REAL_TIME, "x4_feat_dim": 8,
        "backbone_config": {**HIGH_PERFORMANCE_STAGES, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
    },
    "pp_doclayout_v4": REAL_TIME,
    "lw_detr": {
        **QUERIES, "decoder_self_attention_heads": 2, "decoder_cross_attention_heads": 2, "group_detr": 2,
        "projector_scale_factors": [1.0],
        "backbone_config": {
            "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "num_windows": 4, "image_size": 64,
            "patch_size": 16, "window_block_indices": [0], "out_features": ["stage2"],
        },
    },
    "rf_detr": {
        **QUERIES, "decoder_self_attention_heads": 2, "decoder_cross_attention_heads": 2, "group_detr": 2,
        "projector_scale_factors": [1.0], "mask_downsample_ratio": 4,
        "backbone_config": {
            "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "num_windows": 2, "image_size": 64,
            "patch_size": 8, "window_block_indices": [0], "out_features": ["stage2"],
        },
    },
    "yolos": {"image_size": [32, 32], "patch_size": 8, "num_detection_tokens": 6},
    "grounding-dino": {
        **QUERIES, "backbone_config": SWIN_TAIL, "max_text_len": 16, "num_feature_levels": 3,
        "text_config": {"vocab_size": 1040},
    },
    "mm-grounding-dino": {
        **QUERIES, "backbone_config": SWIN_TAIL, "max_text_len": 16, "num_feature_levels": 3,
        "text_config": {"vocab_size": 1040},
    },
    # Masks.
    "beit": {
        "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "auxiliary_channels": 8, "pool_scales": [1, 2],
        "image_size": 32, "patch_size": 8,
    },
    "data2vec-vision": {
        "num_hidden_layers": 4, "out_indices": [0, 1, 2, 3], "auxiliary_channels": 8, "pool_scales": [1, 2],
        "image_size": 32, "patch_size": 8,
    },
    "dpt": {
        "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 8, 8],
        "fusion_hidden_size": 8, "image_size": 32, "patch_size": 8,
    },
    "tipsv2_dpt": {
        "backbone_config": {
            "num_hidden_layers": 4, "image_size": 28, "patch_size": 7, "reshape_hidden_states": False,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
        "neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8,
    },
    "mobilenet_v2": {"depth_multiplier": 0.1, "image_size": 64},
    "mobilevit": {
        "hidden_sizes": [8, 8, 8], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16], "image_size": 64, "patch_size": 1,
        "aspp_out_channels": 8, "num_attention_heads": 2,
    },
    "mobilevitv2": {
        "base_attn_unit_dims": [8, 8, 8], "n_attn_blocks": [1, 1, 1], "width_multiplier": 0.25, "image_size": 64,
        "patch_size": 1, "aspp_out_channels": 8,
    },
    "sapiens2": {
        "num_hidden_layers": 2, "num_key_value_heads_per_layer": [4, 2], "image_size": 32, "patch_size": 8,
        "head_config": {
            "upsample_out_channels": [8], "upsample_kernel_sizes": [4], "conv_out_channels": [8],
            "conv_kernel_sizes": [1],
        },
    },
    "upernet": {
        "backbone_config": ResNetConfig(**{**STAGES, "out_features": ["stage1", "stage2", "stage3", "stage4"]}),
        "hidden_size": 8, "auxiliary_channels": 8, "auxiliary_in_channels": 8, "pool_scales": [1, 2],
    },
    "maskformer": {
        "backbone_config": SWIN, "fpn_feature_size": 32, "mask_feature_size": 32, "decoder_config": QUERIES,
    },
    "mask2former": {
        "backbone_config": SWIN, "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_layers": 1,
        "decoder_layers": 2, "num_attention_heads": 2, "dim_feedforward": 24, "encoder_feedforward_dim": 24,
        "num_queries": 6, "train_num_points": 64,
    },
    "oneformer": {
        "backbone_config": SWIN, "conv_dim": 64, "mask_dim": 64, "hidden_dim": 64, "encoder_layers": 1,
        "decoder_layers": 2, "num_attention_heads": 2, "dim_feedforward": 24, "encoder_feedforward_dim": 24,
        "num_queries": 6, "train_num_points": 64, "task_seq_len": 8, "text_encoder_width": 64,
        "text_encoder_context_length": 8, "text_encoder_num_layers": 1, "text_encoder_vocab_size": 80,
        "text_encoder_n_ctx": 2, "is_training": True,
    },
    "eomt": {"image_size": 32, "patch_size": 8, "num_blocks": 1, "num_queries": 4, "train_num_points": 64},
    "eomt_dinov3": {"image_size": 32, "patch_size": 8, "num_blocks": 1, "num_queries": 4, "train_num_points": 64},
    "videomt": {"image_size": 32, "patch_size": 8, "num_blocks": 1, "num_queries": 4, "train_num_points": 64},
    # Masked images.
    "deit": {"image_size": 32, "patch_size": 8, "encoder_stride": 8},
    "swin": {
        "image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2,
        "encoder_stride": 8,
    },
    "swinv2": {
        "image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2,
        "encoder_stride": 8, "pretrained_window_sizes": [0, 0],
    },
    "focalnet": {
        "image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "focal_levels": [1, 1],
        "focal_windows": [3, 3], "encoder_stride": 8,
    },
    "hiera": {
        "embed_dim": 8, "image_size": [32, 32], "patch_stride": [4, 4], "depths": [1, 1, 1], "num_heads": [1, 1, 2],
        "num_query_pool": 2, "masked_unit_size": [4, 4], "masked_unit_attention": [True, True, False],
        "decoder_hidden_size": 16, "decoder_depth": 1, "decoder_num_heads": 2, "mask_ratio": 0.5,
    },
    "vit_mae": {
        "image_size": 32, "patch_size": 8, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2, "decoder_intermediate_size": 24,
    },
    "videomae": {
        "image_size": 16, "patch_size": 8, "num_frames": 2, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2, "decoder_intermediate_size": 24,
    },
    # Experts in one layer of two.
    "flint": {"mlp_only_layers": [0]},
    # Series.
    "autoformer": FORECAST,    "informer": FORECAST,
    "time_series_transformer": FORECAST,
    "patchtst": {
        "num_input_channels": 2, "context_length": 16, "patch_length": 4, "patch_stride": 4, "prediction_length": 4,
        "num_targets": 3, "do_mask_input": None,
    },
    "patchtsmixer": {
        "num_input_channels": 2, "context_length": 16, "patch_length": 4, "patch_stride": 4, "prediction_length": 4,
    },
    "timesfm": {"patch_length": 4, "context_length": 16, "horizon_length": 4},
    "timesfm2_5": {
        "patch_length": 4, "context_length": 16, "horizon_length": 4, "output_quantile_len": 8,
    },
    # Images with text.
    "align_vision_model": {"width_coefficient": 0.25, "depth_coefficient": 0.1, "image_size": 32, "hidden_dim": 320},
    "align": {"projection_dim": 80, "vision_config": {
        "width_coefficient": 0.25, "depth_coefficient": 0.1, "image_size": 64, "hidden_dim": 320,
    }},
    "videoprism_vision_model": {
        "image_size": 16, "num_frames": 2, "tubelet_size": [1, 8, 8], "num_spatial_layers": 1,
        "num_temporal_layers": 1, "num_auxiliary_layers": 1, "num_channels": 3,
    },
    "blip-2": {"image_token_index": 20, "num_query_tokens": 4, "qformer_config": {"use_qformer_text_input": True}},
    "instructblip": {"image_token_index": 20, "num_query_tokens": 4},
    "instructblipvideo": {"video_token_index": 20, "image_token_index": 20, "num_query_tokens": 4},
    "qwen3_asr": {"audio_config": {"downsample_hidden_size": 8, "output_dim": 32}},
    "voxtral": {"audio_token_id": 20},
    "minicpmv4_6": {"image_token_id": 20},
    "minicpmv4_7": {"image_token_id": 20},
    "minicpm_ocr": {"image_token_id": 20},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "paddleocr_vl_text": THREE_AXES,
    "gemma4_unified": {"vision_config": Gemma4UnifiedVisionConfig(
        patch_size=4, pooling_kernel_size=2, mm_embed_dim=32, mm_posemb_size=16, output_proj_dims=32,
    )},
    "deepseek_vl_hybrid": {"high_res_vision_config": {
        "global_attn_indexes": [0, 1], "output_channels": 16, "image_size": 64, "patch_size": 4, "window_size": 4,
        "mlp_dim": 48,
    }},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "deepseek_ocr2_sam_vision_model": {
        "global_attn_indexes": [0], "output_channels": 16, "downsample_channels": [16, 32], "mlp_dim": 48,
        "window_size": 4, "image_size": 64, "patch_size": 4,
    },
    "unlimited_ocr_sam_vision_model": {
        "global_attn_indexes": [0], "output_channels": 16, "downsample_channels": [16, 32], "mlp_dim": 48,
        "window_size": 4, "image_size": 64, "patch_size": 4,
    },
    "chameleon": {
        "vocabulary_map": {"<image>": 20} | {f"IMGIMG{letter}Z": 10 + i for i, letter in enumerate("ABCDEFGH")},
        "vq_config": {
            "embed_dim": 8, "num_embeddings": 8, "base_channels": 32, "channel_multiplier": [1, 1], "resolution": 16,
            "num_res_blocks": 1, "latent_channels": 8,
        },
    },
    "voxtral_encoder": {"intermediate_size": 128},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_in_dim": 32, "adapter_out_dim": 32},
    "qwen3_vl_vision": {"deepstack_visual_indexes": [0]},
    "qwen3_vl_moe_vision": {"deepstack_visual_indexes": [0]},
    "cohere_compass_vision": {"deepstack_visual_indexes": [0]},
    "cosmos3_omni_vision": {"deepstack_visual_indexes": [0]},
    "granite_docling_vision": {"deepstack_visual_indexes": [0, 1, 1]},
    "pi0": {"chunk_size": 4},
    "muse_glimmer": {"out_hidden_size": 128, "projector_hidden_size": 32},
    "muse_spark": {"out_hidden_size": 128, "projector_hidden_size": 32},
    "kimi_k25": {"projection_hidden_size": 32},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 21, "vision_end_token_id": 22},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 21, "vision_end_token_id": 22},
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "cosmos3_edge_text": THREE_AXES,
    "glm4v_text": THREE_AXES,
    "glm_ocr_text": THREE_AXES,
    "glm4v_moe_text": {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0],
        },
    },
    "qwen2_vl_text": THREE_AXES,
    "qwen2_5_vl_text": THREE_AXES,
    "qwen2_5_omni_text": THREE_AXES,
    "qwen2_vl_vision": {"embed_dim": 32, "hidden_size": 32},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [16, 16],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    },
    "gemma3": {"mm_tokens_per_image": 4},
    "t5gemma2_encoder": {"mm_tokens_per_image": 4},
    "gemma4": {"vision_config": Gemma4VisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, patch_size=4, pooling_kernel_size=2, position_embedding_size=64,
    )},
    "gemma4_vision": {"patch_size": 4, "pooling_kernel_size": 2, "position_embedding_size": 64},
    "glm5_next_text": {"index_kpool": 2, "qk_rope_head_dim": 0, "head_dim": 0},
    "granite4_vision": {
        "vision_config": {"hidden_size": 64, "image_size": 16, "patch_size": 4}, "text_config": {"hidden_size": 64},
        "downsample_rate": "1/2", "deepstack_layer_map": [[-2, 0]], "spatial_target_layers": [0, 0, 1, 1],
        "image_grid_pinpoints": [[16, 16]],
    },
    "llava_next": {"image_grid_pinpoints": [[16, 16]], "vision_feature_layer": -1},
    "llava_next_video": {"image_grid_pinpoints": [[16, 16]], "vision_feature_layer": -1},
    "llava_onevision": {"image_grid_pinpoints": [[16, 16]], "vision_feature_layer": -1},
    "vipllava": {"vision_feature_layer": [-2, -1]},
    "hunyuan_vl_text": {
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1, 1]},
    },
    "inkling2_vision": {"text_hidden_size": 32, "projection_hidden_dim": 32},
    "inkling_vision": {"text_hidden_size": 32},
    "inkling_audio": {"text_hidden_size": 32},
    "llama4_vision_model": {
        "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32, "intermediate_size": 128,
    },
    "muse_glimmer_vision": {"in_channels": 3},
    "florence_vision": {
        "depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1],
        "patch_prenorm": [False, True], "embed_dim": [8, 16], "num_heads": [2, 2], "num_groups": [2, 2],
        "window_size": 4, "max_temporal_embeddings": 4, "max_position_embeddings": 16,
    },
    "idefics_vision": {"embed_dim": 32},
    "idefics_perciever": {
        "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 8,
    },
    "idefics2_perceiver": {
        "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4, "resampler_head_dim": 8,
    },
    "janus_vqgan": {
        "base_channels": 32, "latent_channels": 8, "channel_multiplier": [1, 1], "num_res_blocks": 1,
        "num_embeddings": 16, "image_token_embed_dim": 8, "num_patches": 4,
    },
    "kosmos-2": {"latent_query_num": 4, "text_config": KOSMOS},
    "kosmos-2.5": {"latent_query_num": 4, "text_config": KOSMOS},
    "mllama_vision_model": {
        "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]], "intermediate_layers_indices": [0],
        "vision_output_dim": 64, "attention_heads": 4, "num_global_layers": 1,
    },
    "step3p5": {"sliding_window": 8},
    "udop": {"image_size": 16, "patch_size": 4},
    "vilt": {"image_size": 16, "patch_size": 4, "num_labels": 3},
    "vit": {"image_size": 32, "patch_size": 8, "encoder_stride": 8},
    "vibevoice": {
        "audio_config": {"num_filters": 2, "depths": [1] * 7, "ffn_expansion": 1},
        "semantic_model_config": {"num_filters": 2, "depths": [1] * 7, "ffn_expansion": 1},
        "diffusion_head_config": {"hidden_size": 32, "frequency_embedding_size": 16, "intermediate_size": 48},
    },
    "vibevoice_asr": OVERRIDES["vibevoice_asr"],
    "moonshine_streaming": {"num_key_value_heads": 4, "encoder_config": {"sliding_windows": [[16, 4], [16, 0]]}},
    "dia_decoder": {
        "cross_num_attention_heads": 4, "cross_head_dim": 8, "cross_num_key_value_heads": 4, "cross_hidden_size": 32,
        "vocab_size": 80,
    },
    "mimi": {"upsample_groups": 8, "num_filters": 4, "vector_quantization_hidden_dimension": 8, "codebook_dim": 8},
}  # fmt: skip
"""The same for what is not text and not one label for each image; these come before `OVERRIDES`."""
