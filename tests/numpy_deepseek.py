"""DeepSeek-V3 written out in NumPy, in doubles, from its papers; it shares no line with what it checks.

arXiv 2412.19437: latent attention (section 2.1.1), experts by sigmoid with groups (2.1.2); arXiv 2309.00071: YaRN.
Weights go by the names of DeepSeek's checkpoints.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

Weights = dict[str, np.ndarray]

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 8.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 64,
    },
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "eos_token_id": 257,
    "num_nextn_predict_layers": 1,
}


def random_weights(config: dict[str, Any], seed: int = 0) -> Weights:
    """Random f32 weights by the names of a published checkpoint, MTP layers among them; corrections of both signs."""
    draw = np.random.default_rng(seed)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope, value = (config[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    rank, q_rank = config["kv_lora_rank"], config["q_lora_rank"]
    found: Weights = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        found[f"{name}.weight"] = (draw.standard_normal((rows, columns)) * 1.2 / columns**0.5).astype(np.float32)

    def norm(name: str, size: int) -> None:
        found[f"{name}.weight"] = (1 + 0.1 * draw.standard_normal(size)).astype(np.float32)

    def mlp(name: str, width: int) -> None:
        for part, rows, columns in (("gate", width, hidden), ("up", width, hidden), ("down", hidden, width)):
            matrix(f"{name}.{part}_proj", rows, columns)

    matrix("model.embed_tokens", config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"] + config["num_nextn_predict_layers"]):
        layer = f"model.layers.{i}"
        if q_rank is None:
            matrix(f"{layer}.self_attn.q_proj", heads * (nope + rope), hidden)
        else:
            matrix(f"{layer}.self_attn.q_a_proj", q_rank, hidden)
            norm(f"{layer}.self_attn.q_a_layernorm", q_rank)
            matrix(f"{layer}.self_attn.q_b_proj", heads * (nope + rope), q_rank)
        matrix(f"{layer}.self_attn.kv_a_proj_with_mqa", rank + rope, hidden)
        norm(f"{layer}.self_attn.kv_a_layernorm", rank)
        matrix(f"{layer}.self_attn.kv_b_proj", heads * (nope + value), rank)
        matrix(f"{layer}.self_attn.o_proj", hidden, heads * value)
        norm(f"{layer}.input_layernorm", hidden)
        norm(f"{layer}.post_attention_layernorm", hidden)
        if i < config["first_k_dense_replace"]:
            mlp(f"{layer}.mlp", config["intermediate_size"])
        else:
            width = config["moe_intermediate_size"]
            for e in range(config["n_routed_experts"]):
                mlp(f"{layer}.mlp.experts.{e}", width)
            mlp(f"{layer}.mlp.shared_experts", width * config["n_shared_experts"])
            matrix(f"{layer}.mlp.gate", config["n_routed_experts"], hidden)
            bias = 0.5 * draw.standard_normal(config["n_routed_experts"]) - 0.4
            found[f"{layer}.mlp.gate.e_score_correction_bias"] = bias.astype(np.float32)
        if i >= config["num_hidden_layers"]:
            for name in ("enorm", "hnorm", "shared_head.norm"):
                norm(f"{layer}.{name}", hidden)
            matrix(f"{layer}.eh_proj", hidden, 2 * hidden)
            # Published checkpoints repeat what an MTP layer shares with the model.
            found[f"{layer}.embed_tokens.weight"] = found["model.embed_tokens.weight"]
            matrix(f"{layer}.shared_head.head", config["vocab_size"], hidden)
    norm("model.norm", hidden)
    matrix("lm_head", config["vocab_size"], hidden)
    return found


def write(folder: Path, config: dict[str, Any], weights: Weights) -> Path:
    """Write a model folder as DeepSeek publishes it, in f32, with a tokenizer of bytes."""
    import mlx.core as mx
    from tiny import write_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: mx.array(value) for name, value in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_tokenizer(folder)
    return folder


def logits(config: dict[str, Any], weights: Weights, tokens: list[int], outside: float = -math.inf) -> np.ndarray:
    """Return [length, vocabulary]; `outside` is the score of experts that are in none of a token's groups."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    x = w["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        own = {name.removeprefix(layer): value for name, value in w.items() if name.startswith(layer)}
        x = x + _attention(_normed(x, own["input_layernorm.weight"]), own, config)
        normed = _normed(x, own["post_attention_layernorm.weight"])
        x = x + (_experts(normed, own, config, outside) if "mlp.gate.weight" in own else _mlp(normed, own, "mlp."))
    return _normed(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def _normed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight


def _magnitude(factor: float, share: float) -> float:
    return 0.1 * share * math.log(factor) + 1.0


def _rotated(x: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Turn neighbouring pairs of x [..., length, rope] by their positions' angles."""
    base, yarn, size = config["rope_theta"], config["rope_scaling"], x.shape[-1]
    frequencies, factor = base ** (-np.arange(0, size, 2) / size), 1.0
    if yarn is not None:
        period = yarn["original_max_position_embeddings"]

        def dimension(rotations: float) -> float:
            return size * math.log(period / (rotations * 2 * math.pi)) / (2 * math.log(base))

        low = max(math.floor(dimension(yarn["beta_fast"])), 0)
        high = min(math.ceil(dimension(yarn["beta_slow"])), size - 1)
        slow = np.clip((np.arange(size // 2) - low) / max(high - low, 0.001), 0, 1)
        frequencies = frequencies * (1 - slow) + frequencies / yarn["factor"] * slow
        factor = _magnitude(yarn["factor"], yarn["mscale"]) / _magnitude(yarn["factor"], yarn["mscale_all_dim"])
    angles = np.arange(x.shape[-2])[:, None] * frequencies
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles) * factor
    out = np.empty_like(x)
    out[..., 0::2], out[..., 1::2] = pairs.real, pairs.imag
    return out


def _attention(x: np.ndarray, w: Weights, config: dict[str, Any]) -> np.ndarray:
    heads, length = config["num_attention_heads"], len(x)
    nope, rank = config["qk_nope_head_dim"], config["kv_lora_rank"]
    if config["q_lora_rank"] is None:
        q = x @ w["self_attn.q_proj.weight"].T
    else:
        low = _normed(x @ w["self_attn.q_a_proj.weight"].T, w["self_attn.q_a_layernorm.weight"])
        q = low @ w["self_attn.q_b_proj.weight"].T
    q = q.reshape(length, heads, -1).transpose(1, 0, 2)
    joined = x @ w["self_attn.kv_a_proj_with_mqa.weight"].T
    latent = _normed(joined[:, :rank], w["self_attn.kv_a_layernorm.weight"])
    kv = (latent @ w["self_attn.kv_b_proj.weight"].T).reshape(length, heads, -1).transpose(1, 0, 2)
    scores = q[..., :nope] @ kv[..., :nope].swapaxes(1, 2)
    scores += _rotated(q[..., nope:], config) @ _rotated(joined[:, rank:], config).T
    scale = q.shape[-1] ** -0.5
    if config["rope_scaling"] is not None:
        yarn = config["rope_scaling"]
        scale *= _magnitude(yarn["factor"], yarn["mscale_all_dim"]) ** 2
    scores = np.where(np.tri(length, dtype=bool), scores * scale, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return (weights @ kv[..., nope:]).transpose(1, 0, 2).reshape(length, -1) @ w["self_attn.o_proj.weight"].T


def _mlp(x: np.ndarray, w: Weights, prefix: str) -> np.ndarray:
    gate = x @ w[f"{prefix}gate_proj.weight"].T
    return (gate / (1 + np.exp(-gate)) * (x @ w[f"{prefix}up_proj.weight"].T)) @ w[f"{prefix}down_proj.weight"].T


def _experts(x: np.ndarray, w: Weights, config: dict[str, Any], outside: float) -> np.ndarray:
    affinity = 1 / (1 + np.exp(-(x @ w["mlp.gate.weight"].T)))
    out = _mlp(x, w, "mlp.shared_experts.")
    groups, kept = config["n_group"], config["topk_group"]
    for i, row in enumerate(affinity):
        score = row + w["mlp.gate.e_score_correction_bias"]
        by_group = np.sort(score.reshape(groups, -1), axis=1)[:, -2:].sum(1)
        score.reshape(groups, -1)[np.argsort(-by_group)[kept:]] = outside
        chosen = np.argsort(-score)[: config["num_experts_per_tok"]]
        shares = row[chosen] / row[chosen].sum() if config["norm_topk_prob"] else row[chosen]
        for e, share in zip(chosen, shares, strict=True):
            out[i] += config["routed_scaling_factor"] * share * _mlp(x[i : i + 1], w, f"mlp.experts.{e}.")[0]
    return out
