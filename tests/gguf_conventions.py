"""Writes a model of mlx-lm's as the GGUF file that llama.cpp's converter would make of its checkpoint.

Tensor names come from the gguf package's own map of Hugging Face's names, the file from its writer; what the converter
does to numbers besides (interleaved rows, gemma's norms, the halves of DeepSeek's latent projection) is done here anew.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType, RopeScalingType
from gguf.quants import quantize
from model_files import interleave

Config = dict[str, Any]
Weights = dict[str, np.ndarray]

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
    "seed_oss": gguf.MODEL_ARCH.SEED_OSS,
    "minimax": gguf.MODEL_ARCH.MINIMAXM2,
    "dots1": gguf.MODEL_ARCH.DOTS1,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
    "olmo3": gguf.MODEL_ARCH.OLMO2,
    "olmoe": gguf.MODEL_ARCH.OLMOE,
    "granite": gguf.MODEL_ARCH.GRANITE,
    "granitemoe": gguf.MODEL_ARCH.GRANITE_MOE,
    "gemma": gguf.MODEL_ARCH.GEMMA,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "gpt_oss": gguf.MODEL_ARCH.GPT_OSS,
    "glm4_moe": gguf.MODEL_ARCH.GLM4_MOE,
    "deepseek_v2": gguf.MODEL_ARCH.DEEPSEEK2,
    "deepseek_v3": gguf.MODEL_ARCH.DEEPSEEK2,
}
INTERLEAVED = {"llama", "smollm3", "mixtral", "granite", "granitemoe"}
STACKED = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def checkpoint_name(model_type: str, name: str) -> str:
    """Return what a parameter of mlx-lm's model is called where the gguf package looks its name up."""
    if model_type in ("mixtral", "granitemoe", "minimax"):
        name = re.sub(r"switch_mlp\.(\w+)", lambda found: f"experts.{STACKED[found[1]]}", name)
    name = name.replace("switch_mlp", "experts").replace("e_score_correction_bias", "e_score_correction.bias")
    name = name.replace("self_attn.embed_q", "self_attn.k_b_proj").replace(
        "self_attn.unembed_out", "self_attn.v_b_proj"
    )
    return f"{name}.weight" if name.endswith("sinks") else name


def converted(model_type: str, config: Config, name: str, weight: np.ndarray) -> Weights:
    """Return what llama.cpp's converter makes of one parameter, by checkpoint name."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config.get("num_key_value_heads", 1)}
    projection = name.split(".")[-2]
    if model_type in INTERLEAVED and projection in heads:
        weight = interleave(weight, heads[projection])
    if model_type.startswith("gemma") and name.endswith("norm.weight"):
        weight = weight + np.float32(1)
    if projection == "kv_b_proj":
        split = weight.reshape(config["num_attention_heads"], -1, weight.shape[1])
        keys, values = np.split(split, [config["qk_nope_head_dim"]], axis=1)
        return {
            name.replace("kv_b_proj", "k_b_proj"): np.ascontiguousarray(keys.swapaxes(1, 2)),
            name.replace("kv_b_proj", "v_b_proj"): np.ascontiguousarray(values),
        }
    return {checkpoint_name(model_type, name): weight}


def write_gguf(
    path: Path,
    config: Config,
    weights: Weights,
    kinds: dict[str, GGMLQuantizationType] | None = None,
    part_tensors: int = 0,
) -> dict[str, np.ndarray]:
    """Write the file, or where `part_tensors` is set parts of so many tensors.

    `kinds` gives a type to the tensors whose GGUF name ends in a key; the rest are F32.

    Returns the numbers of each GGUF tensor before it was quantized.
    """
    model_type = config["model_type"]
    architecture = ARCHITECTURES[model_type]
    writer = gguf.GGUFWriter(str(path), gguf.MODEL_ARCH_NAMES[architecture], split_max_tensors=part_tensors)
    _write_sizes(writer, config)
    _write_rope(writer, config)
    _write_experts(writer, config)
    _write_vocabulary(writer)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"] + 1)
    written: dict[str, np.ndarray] = {}
    for name, weight in weights.items():
        for checkpoint, array in converted(model_type, config, name, weight).items():
            target = names.get_name(checkpoint, try_suffixes=(".weight", ".bias"))
            assert target is not None, checkpoint
            written[target] = array
    for name, factors in (("long", "long_factor"), ("short", "short_factor")):
        if factors in (config.get("rope_scaling") or {}):
            written[f"rope_factors_{name}.weight"] = np.array(config["rope_scaling"][factors], np.float32)
    for target, array in written.items():
        kind = next((kind for end, kind in (kinds or {}).items() if target.endswith(end)), GGMLQuantizationType.F32)
        writer.add_tensor(target, quantize(array.astype(np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def _write_sizes(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_block_count(config["num_hidden_layers"] + config.get("num_nextn_predict_layers", 0))
    writer.add_context_length(config.get("max_position_embeddings") or 256)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    if config["model_type"] in ("deepseek_v2", "deepseek_v3"):
        writer.add_head_count_kv(1)
        writer.add_kv_lora_rank(config["kv_lora_rank"])
        if config["q_lora_rank"]:
            writer.add_q_lora_rank(config["q_lora_rank"])
        writer.add_key_length(config["kv_lora_rank"] + config["qk_rope_head_dim"])
        writer.add_value_length(config["kv_lora_rank"])
        writer.add_key_length_mla(config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
        writer.add_value_length_mla(config["v_head_dim"])
        writer.add_rope_dimension_count(config["qk_rope_head_dim"])
    else:
        writer.add_head_count_kv(config["num_key_value_heads"])
        if config.get("head_dim"):
            writer.add_key_length(config["head_dim"])
            writer.add_value_length(config["head_dim"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    if config["model_type"] == "olmo3":
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
    if "rotary_dim" in config:
        writer.add_rope_dimension_count(config["rotary_dim"])
    if config.get("sliding_window_pattern"):
        writer.add_sliding_window_pattern(config["sliding_window_pattern"])
    if config.get("rope_local_base_freq"):
        writer.add_float32("gemma3.rope.freq_base_swa", config["rope_local_base_freq"])
    for key, add in (
        ("logits_scaling", writer.add_logit_scale),
        ("attention_multiplier", writer.add_attention_scale),
        ("embedding_multiplier", writer.add_embedding_scale),
        ("residual_multiplier", writer.add_residual_scale),
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
        ("num_nextn_predict_layers", writer.add_nextn_predict_layers),
    ):
        if config.get(key):
            add(config[key])


def _write_rope(writer: gguf.GGUFWriter, config: Config) -> None:
    if "partial_rotary_factor" in config:
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        writer.add_rope_dimension_count(int(head_dim * config["partial_rotary_factor"]))
    scaling = config.get("rope_scaling")
    if not scaling:
        return
    kind = scaling.get("rope_type") or scaling["type"]
    writer.add_rope_scaling_type(RopeScalingType(kind))
    if kind == "longrope":
        writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
        return
    writer.add_rope_scaling_factor(scaling["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(scaling.get("beta_fast", 32.0))
        writer.add_rope_scaling_yarn_beta_slow(scaling.get("beta_slow", 1.0))
        if "mscale_all_dim" in scaling:
            writer.add_rope_scaling_yarn_log_mul(0.1 * scaling["mscale_all_dim"])


def _write_experts(writer: gguf.GGUFWriter, config: Config) -> None:
    counts = (config.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
    experts = next((count for count in counts if count), None)
    if experts is None:
        return
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if width := config.get("moe_intermediate_size"):
        writer.add_expert_feed_forward_length(width)
    if config["model_type"] in ("gpt_oss", "minimax"):
        writer.add_expert_feed_forward_length(config["intermediate_size"])
    if width := config.get("shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(width)
    if "n_routed_experts" in config:
        writer.add_leading_dense_block_count(config["first_k_dense_replace"])
        writer.add_expert_shared_count(config["n_shared_experts"])
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        writer.add_expert_weights_norm(config.get("norm_topk_prob", False))
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])
    if config.get("scoring_func") == "sigmoid":
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _write_vocabulary(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(["<|endoftext|>", "h", "e", "he"])
    writer.add_token_types([3, 1, 1, 1])
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(0)
