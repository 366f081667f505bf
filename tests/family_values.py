"""Sizes for tiny models of every mlx-lm family: by field name, and per family where the name does not say enough.

Widths are multiples of 32, so that every matrix can be quantized; windows, chunks and top-k counts are smaller than a
prompt of 12 tokens, so that they cut something off.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

# Large enough to show when it is left out, and to keep what nearly cancels from blowing up rounding errors.
NORM_EPS = 1e-2

WIDTH, INNER, EXPERT, HEADS, KV_HEADS, HEAD_DIM, LAYERS, TOKENS = 128, 192, 64, 4, 2, 32, 2, 200

ATTENTION_LAYERS = ["sliding_attention", "full_attention"]
LINEAR_LAYERS = ["linear_attention", "full_attention"]
PLAIN_ROPE: Config = {"rope_theta": 10000.0, "rope_type": "default"}
YARN: Config = {
    "type": "yarn",
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
LLAMA3_ROPE: Config = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

VALUES: Config = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "model_dim", "hidden_dim", "dim_model_base"), WIDTH),
    **dict.fromkeys(
        ("intermediate_size", "ffn_hidden_size", "n_inner", "ff_intermediate_size", "intermediate_size_mlp"), INNER
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_transformer_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads"), KV_HEADS),
    **dict.fromkeys(("head_dim", "v_head_dim", "hidden_size_per_head", "kv_channels"), HEAD_DIM),
    **dict.fromkeys(("vocab_size", "num_vocab", "vocab_size_per_layer_input", "embedding_size"), TOKENS),
    **dict.fromkeys(
        (
            "rms_norm_eps",
            "layer_norm_eps",
            "layer_norm_epsilon",
            "norm_eps",
            "norm_epsilon",
            "layernorm_epsilon",
            "mixer_rms_eps",
            "post_norm_eps",
        ),
        NORM_EPS,
    ),
    **dict.fromkeys(("max_position_embeddings", "model_max_length", "n_positions", "n_ctx", "block_size"), 256),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq", "swa_rope_theta", "rotary_emb_base"), 10000.0),
    **dict.fromkeys(
        ("sliding_window", "attention_window_size", "window_size", "sliding_window_size", "attention_chunk_size"), 8
    ),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 8),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts"), 2
    ),
    **dict.fromkeys(
        ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts"),
        1,
    ),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "shared_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "expert_ffn_hidden_size",
            "share_expert_dim",
        ),
        EXPERT,
    ),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "decoder_sparse_step", "moe_layer_freq"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 64),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_bias", "use_qkv_bias", "bias"), False),
    **dict.fromkeys(
        ("use_conv_bias", "conv_bias", "mamba_conv_bias", "use_qk_norm", "qk_norm", "norm_topk_prob"), True
    ),
    **dict.fromkeys(("mamba_proj_bias", "post_norm"), False),
    **dict.fromkeys(("conv_kernel", "mamba_d_conv", "conv1d_width", "conv_L_cache", "linear_conv_kernel_dim"), 4),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 16),
    **dict.fromkeys(("mamba_num_heads", "mamba_n_heads"), 8),
    **dict.fromkeys(("mamba_head_dim", "mamba_d_head"), 32),
    **dict.fromkeys(("n_groups", "mamba_n_groups"), 2),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 32),
    **dict.fromkeys(("embedding_multiplier", "logits_scaling"), 2.0),
    **dict.fromkeys(("residual_multiplier", "partial_rotary_factor", "rotary_pct"), 0.5),
    **dict.fromkeys(("final_logit_softcapping", "logits_soft_cap"), 30.0),
    "attention_multiplier": 0.2,
    "query_pre_attn_scalar": 32.0,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "rotary_dim": 16,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "index_head_dim": 32,
    "index_n_heads": 4,
    "index_topk": 4,
    "layer_group_size": 2,
    "full_attention_interval": 2,
    "sliding_window_pattern": 2,
    "layer_types": ATTENTION_LAYERS,
    "mlp_only_layers": [],
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "hidden_size_per_layer_input": 32,
    "moe_router_enable_expert_bias": True,
}
"""Field name -> value, wherever a family has a field of that name."""

_GEMMA3N: Config = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ATTENTION_LAYERS * 2,
    "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    "altup_num_inputs": 4,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_active_idx": 0,
    "laurel_rank": 32,
}
_GEMMA4: Config = {
    "num_hidden_layers": 4,
    "layer_types": ATTENTION_LAYERS * 2,
    "num_kv_shared_layers": 2,
    "global_head_dim": 64,
    "partial_rotary_factor": 1.0,
    "enable_moe_block": True,
    "tie_word_embeddings": True,
}
_KIMI: Config = {
    "linear_attn_config": {
        "kda_layers": [1],
        "full_attn_layers": [2],
        "num_heads": 4,
        "head_dim": 32,
        "short_conv_kernel_size": 4,
    },
    "num_expert_group": 2,
    "moe_renormalize": True,
}
_QWEN3_5: Config = {"rope_parameters": {"type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
_LFM2: Config = {"layer_types": ["conv", "full_attention"], "full_attn_idxs": [1]}
_LFM2_DENSE: Config = {
    **_LFM2,
    "block_dim": WIDTH,
    "block_ff_dim": INNER,
    "block_multiple_of": 32,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
}
_LONGCAT: Config = {
    "zero_expert_type": "identity",
    "zero_expert_num": 2,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
}
_MLA_ROPE: Config = {"rope_scaling": YARN}

OVERRIDES: dict[str, Config] = {
    "afm7": {"num_kv_reuse_layers": 1, "hidden_dim_scale_factor": 1.5},
    "baichuan_m1": {"sliding_window_layers": [0], "conv_window": 2},
    "bailing_hybrid": {"group_norm_size": 2},
    "bailing_moe_linear": {"group_norm_size": 2},
    "bailing_moe": {"score_function": "sigmoid"},
    "bitnet": {"tie_word_embeddings": True},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": EXPERT, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": KV_HEADS, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"topk_method": "group_limited_greedy", **_MLA_ROPE},
    "deepseek_v3": _MLA_ROPE,
    "deepseek_v41": {
        "num_hidden_layers": 4,
        "o_groups": 2,
        "compress_ratios": [0, 2, 2, 2],
        "kv_source_layer_ids": [1, 3],
        "index_source_layer_ids": [1, 2, 3],
        "candidate_source_layer_id": 1,
        "candidate_topk_blocks": 1,
        "candidate_block_size": 2,
        "index_topk": 2,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 4,
        "scoring_func": "sqrtsoftplus",
    },
    "exaone4": {"sliding_window_pattern": "LG"},
    "exaone_moe": {"is_moe_layer": [False, True]},
    "falcon_h1": {"mamba_d_ssm": 256, "mamba_rms_norm": True, "mamba_chunk_size": 8},
    "gear": {"num_hidden_layers": 3, "layer_types": ["conv_mixer", *ATTENTION_LAYERS]},
    "gemma3n": {"text_config": _GEMMA3N},
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "glm_moe_dsa": {"rope_parameters": PLAIN_ROPE},
    "gpt_oss": {"rope_scaling": {**YARN, "truncate": False}},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan": {
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0},
    },
    "hunyuan_v1_dense": {"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0}},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 0,
        "expert_layer_period": 2,
        "mamba_expand": 2,
        "mamba_dt_rank": 32,
    },
    "kimi_k3": {"text_config": {**_KIMI, "attn_res_block_size": 1, "mla_use_output_gate": True}},
    "kimi_linear": _KIMI,
    "laguna": {"rope_parameters": {"sliding_attention": PLAIN_ROPE, "full_attention": PLAIN_ROPE}},
    "lfm2": _LFM2_DENSE,
    "lfm2-vl": {"text_config": _LFM2_DENSE},
    "lfm2_moe": {**_LFM2, "use_expert_bias": True},
    "llama": {"rope_scaling": LLAMA3_ROPE},
    "llama4": {
        "text_config": {
            "num_hidden_layers": 4,
            "interleave_moe_layer_step": 2,
            "attn_temperature_tuning": 4,
            "floor_scale": 4,
            "num_experts_per_tok": 1,
        }
    },
    "llama4_text": {"no_rope_layers": [1, 0]},
    "longcat_flash": {**_LONGCAT, "attention_method": "MLA"},
    "longcat_flash_ngram": {
        **_LONGCAT,
        "ngram_vocab_size_ratio": 2,
        "emb_neighbor_num": 3,
        "emb_split_num": 1,
    },
    "mamba": {"time_step_rank": 32},
    "mamba2": {"num_heads": 8, "intermediate_size": 256, "time_step_limit": [0.001, 100.0], "time_step_rank": 32},
    "mellum": {"rope_parameters": {"sliding_attention": PLAIN_ROPE, "full_attention": {**PLAIN_ROPE, **YARN}}},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [1, 0],
        "moe_layer_freq": [0, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 32,
        "swa_v_head_dim": 32,
        "head_dim": 64,
    },
    "minicpm": {"scale_depth": 1.4, "scale_emb": 4.0},
    "minicpm3": {
        "scale_depth": 1.4,
        "scale_emb": 4.0,
        "rope_scaling": {
            "type": "longrope",
            "original_max_position_embeddings": 8,
            "short_factor": [1.0] * 8,
            "long_factor": [1.5] * 8,
        },
    },
    "minimax_m3_vl": {
        "text_config": {
            "moe_layer_freq": [0, 1],
            "layer_types": ["full_attention", "sparse_attention"],
            "dense_intermediate_size": INNER,
            "intermediate_size": EXPERT,
            "index_block_size": 2,
            "index_topk_blocks": 2,
            "index_local_blocks": 1,
        }
    },
    "ministral3": {
        "rope_parameters": {**PLAIN_ROPE, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8}
    },
    "mistral4": {"rope_parameters": {**PLAIN_ROPE, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8}},
    "muse_spark": {
        "text_config": {
            "rope_parameters": PLAIN_ROPE,
            "layer_rope_theta": [10000.0, 0.0],
            "output_multiplier": 0.5,
            "moe_hidden_size": 64,
            "num_shared_experts": 0,
        }
    },
    "nanbeige": {"num_loops": 2},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "num_hidden_layers": 3,
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"replace_with_linear": True}, "ffn": {"replace_with_linear": True}},
        ],
        "rope_scaling": LLAMA3_ROPE,
    },
    "nemotron_h": {"hybrid_override_pattern": ["M", "*", "-", "E"], "moe_latent_size": 64, "layer_types": None},
    "olmo": {"mlp_hidden_size": 2 * INNER},
    "olmo_hybrid": {"layer_types": LINEAR_LAYERS, "linear_allow_neg_eigval": True, "linear_num_key_heads": 4},
    "openelm": {
        "ffn_dim_divisor": 32,
        "num_query_heads": [4, 4],
        "num_kv_heads": [2, 1],
        "ffn_multipliers": [1.0, 1.5],
    },
    "phi3": {
        "original_max_position_embeddings": 8,
        "partial_rotary_factor": 1.0,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [1.5] * 16},
    },
    "phi3small": {
        # It writes -inf to fixed tokens up to 100351, past the end of a smaller vocabulary.
        "vocab_size": 100352,
        "dense_attention_every_n_layers": 2,
        "gegelu_limit": 20.0,
        "blocksparse_block_size": 32,
    },
    "phimoe": {
        "original_max_position_embeddings": 8,
        "rope_scaling": {
            "short_factor": [1.0] * 16,
            "long_factor": [1.5] * 16,
            "short_mscale": 1.1,
            "long_mscale": 1.2,
        },
    },
    "plamo": {"n_shared_head": 2},
    "plamo2": {"full_attention_idx": [1], "mamba_d_state": 32, "mamba_chunk_size": 8},
    "prism_hadamard_qwen35": {
        # The narrowest width that its Hadamard rotation has a block for.
        "text_config": {**_QWEN3_5, "hidden_size": 512, "num_experts": 0},
        "schema_version": 1,
        "tensor_namespace": "mlx-lm-text",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {"path": path, "embedding": path == "model.embed_tokens", "dtype": "float16", "block": 512}
            for path in ("model.embed_tokens", "model.layers.0.mlp.gate_proj", "model.layers.1.self_attn.q_proj")
        ],
    },
    "qwen3": {"rope_scaling": YARN},
    "qwen3_5": {"text_config": {**_QWEN3_5, "num_experts": 0}},
    "qwen3_5_moe": {"text_config": _QWEN3_5},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "rwkv7": {"a_low_rank_dim": 32, "v_low_rank_dim": 32, "gate_low_rank_dim": 32, "decay_low_rank_dim": 32},
    "spark2_5": {"rope_parameters": {"sliding_attention": PLAIN_ROPE, "full_attention": PLAIN_ROPE}},
    "stablelm": {"use_qkv_bias": True},
    "step3p5": {"num_attention_groups": 2},
}
"""Family -> what its config says besides; `text_config` is merged into the nested one."""

NESTED: dict[str, tuple[str, str]] = {
    "gemma3": ("gemma3_text", "ModelArgs"),
    "gemma3n": ("gemma3n", "TextConfig"),
    "gemma4": ("gemma4_text", "ModelArgs"),
    "kimi_k25": ("deepseek_v3", "ModelArgs"),
    "kimi_k3": ("kimi_k3", "TextArgs"),
    "kimi_vl": ("kimi_vl", "TextArgs"),
    "lfm2-vl": ("lfm2", "ModelArgs"),
    "llama4": ("llama4", "TextArgs"),
    "minimax_m3_vl": ("minimax_m3_vl", "TextArgs"),
    "mistral3": ("ministral3", "ModelArgs"),
    "muse_spark": ("muse_spark", "TextArgs"),
    "pixtral": ("llama", "ModelArgs"),
    "prism_hadamard_qwen35": ("qwen3_5", "TextModelArgs"),
    "qwen2_vl": ("qwen2", "ModelArgs"),
    "qwen3_5": ("qwen3_5", "TextModelArgs"),
    "qwen3_5_moe": ("qwen3_5", "TextModelArgs"),
    "qwen3_vl": ("qwen3", "ModelArgs"),
    "qwen3_vl_moe": ("qwen3_moe", "ModelArgs"),
}
"""Families that wrap a text model -> module and dataclass of its arguments."""
