"""MTP layers of every family against their papers' equations in NumPy, on tiny random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache

from edger1.architectures import mtp

HIDDEN, TOKENS, VOCABULARY = 64, 7, 96
_DENSE = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
_EXPERTS = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek_v3": _DENSE
    | _EXPERTS
    | {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "num_nextn_predict_layers": 1,
    },
    "glm4_moe": _DENSE
    | _EXPERTS
    | {
        "model_type": "glm4_moe",
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "use_qk_norm": True,
        "attention_bias": True,
        "rope_scaling": None,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    },
    "mimo": _DENSE | {"model_type": "mimo", "num_nextn_predict_layers": 1, "attention_bias": True},
    "qwen3_next": _DENSE
    | {
        "model_type": "qwen3_next",
        "num_hidden_layers": 4,
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "full_attention_interval": 4,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 32,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
}
CONFIGS["qwen3_5"] = CONFIGS["qwen3_next"] | {
    "model_type": "qwen3_5",
    "num_experts": 0,
    "rope_parameters": {"type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}

Arrays = dict[str, Any]


def rms(x: Any, weight: Any) -> Any:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight


def softmax(x: Any) -> Any:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def rotated(x: Any, interleaved: bool) -> Any:
    """Rotary embedding (arXiv 2104.09864) of x [heads, tokens, width]; pairs are neighbours, or the two halves."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * 10000.0 ** (-np.arange(half) / half)
    sin, cos = np.sin(angles), np.cos(angles)
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    out = np.empty_like(x)
    first, second = a * cos - b * sin, b * cos + a * sin
    if interleaved:
        out[..., 0::2], out[..., 1::2] = first, second
    else:
        out[..., :half], out[..., half:] = first, second
    return out


def attend(q: Any, k: Any, v: Any, scale: float) -> Any:
    """Causal attention, q [heads, tokens, width], k and v [kv heads, tokens, width]; gives [tokens, heads * width]."""
    k, v = (np.repeat(a, q.shape[0] // a.shape[0], axis=0) for a in (k, v))
    scores = q @ k.swapaxes(1, 2) * scale + np.triu(np.full((TOKENS, TOKENS), -1e9), 1)
    return (softmax(scores) @ v).transpose(1, 0, 2).reshape(TOKENS, -1)


def glu(x: Any, w: Arrays, prefix: str) -> Any:
    gate = x @ w[f"{prefix}gate_proj.weight"].T
    return (gate * sigmoid(gate) * (x @ w[f"{prefix}up_proj.weight"].T)) @ w[f"{prefix}down_proj.weight"].T


def heads(x: Any, count: int) -> Any:
    return x.reshape(TOKENS, count, -1).transpose(1, 0, 2)


def usual_attention(x: Any, w: Arrays, config: dict[str, Any]) -> Any:
    def projected(name: str) -> Any:
        return x @ w[f"self_attn.{name}.weight"].T + w.get(f"self_attn.{name}.bias", 0)

    count, kv = config["num_attention_heads"], config["num_key_value_heads"]
    gated = config["model_type"].startswith("qwen")
    q, k, v = heads(projected("q_proj"), count), heads(projected("k_proj"), kv), heads(projected("v_proj"), kv)
    gate = None
    if gated:
        q, gate = np.split(q, 2, axis=-1)
    if "self_attn.q_norm.weight" in w:
        q, k = rms(q, w["self_attn.q_norm.weight"]), rms(k, w["self_attn.k_norm.weight"])
    turned = int(q.shape[-1] * config.get("partial_rotary_factor", 1))
    q, k = (np.concatenate([rotated(a[..., :turned], False), a[..., turned:]], -1) for a in (q, k))
    out = attend(q, k, v, q.shape[-1] ** -0.5)
    if gate is not None:
        out = out * sigmoid(gate.transpose(1, 0, 2).reshape(TOKENS, -1))
    return out @ w["self_attn.o_proj.weight"].T


def latent_attention(x: Any, w: Arrays, config: dict[str, Any]) -> Any:
    """DeepSeek-V2's multi-head latent attention (arXiv 2405.04434, section 2.1), keys and values made in full."""
    count, nope, rope = config["num_attention_heads"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    low = rms(x @ w["self_attn.q_a_proj.weight"].T, w["self_attn.q_a_layernorm.weight"])
    q = heads(low @ w["self_attn.q_b_proj.weight"].T, count)
    c = x @ w["self_attn.kv_a_proj_with_mqa.weight"].T
    latent, k_rope = c[:, : config["kv_lora_rank"]], c[None, :, config["kv_lora_rank"] :]
    kv = heads(rms(latent, w["self_attn.kv_a_layernorm.weight"]) @ w["self_attn.kv_b_proj.weight"].T, count)
    q = np.concatenate([q[..., :nope], rotated(q[..., nope:], True)], -1)
    k = np.concatenate([kv[..., :nope], np.repeat(rotated(k_rope, True), count, axis=0)], -1)
    return attend(q, k, kv[..., nope:], (nope + rope) ** -0.5) @ w["self_attn.o_proj.weight"].T


def sigmoid_experts(x: Any, w: Arrays, config: dict[str, Any]) -> Any:
    """DeepSeek-V3's routing (arXiv 2412.19437, equations 12 to 16)."""
    affinity = sigmoid(x @ w["mlp.gate.weight"].T)
    out = glu(x, w, "mlp.shared_experts.")
    for i, row in enumerate(affinity):
        chosen = np.argsort(-(row + w["mlp.gate.e_score_correction_bias"]))[: config["num_experts_per_tok"]]
        for e in chosen:
            share = row[e] / row[chosen].sum() * config["routed_scaling_factor"]
            out[i] += share * glu(x[i : i + 1], w, f"mlp.experts.{e}.")[0]
    return out


def softmax_experts(x: Any, w: Arrays, config: dict[str, Any]) -> Any:
    shares = softmax(x @ w["mlp.gate.weight"].T)
    out = sigmoid(x @ w["mlp.shared_expert_gate.weight"].T) * glu(x, w, "mlp.shared_expert.")
    for i, row in enumerate(shares):
        chosen = np.argsort(-row)[: config["num_experts_per_tok"]]
        for e in chosen:
            out[i] += row[e] / row[chosen].sum() * glu(x[i : i + 1], w, f"mlp.experts.{e}.")[0]
    return out


def reference(names: dict[str, str], w: Arrays, hidden: Any, embedded: Any, config: dict[str, Any]) -> Any:
    """h' = M [RMSNorm(Emb); RMSNorm(h)] through one block, normed (arXiv 2412.19437, equations 21 to 23)."""
    kind = config["model_type"]
    halves = [rms(embedded, w[names["enorm"]]), rms(hidden, w[names["hnorm"]])]
    x = np.concatenate(halves[::-1] if kind == "mimo" else halves, -1) @ w[names["eh_proj"]].T
    attention = latent_attention if kind == "deepseek_v3" else usual_attention
    x = x + attention(rms(x, w["input_layernorm.weight"]), w, config)
    normed = rms(x, w["post_attention_layernorm.weight"])
    if "mlp.shared_expert_gate.weight" in w:
        x = x + softmax_experts(normed, w, config)
    elif "mlp.gate.weight" in w:
        x = x + sigmoid_experts(normed, w, config)
    else:
        x = x + glu(normed, w, "mlp.")
    return rms(x, w[names["norm"]])


def published(kind: str) -> tuple[Any, Arrays, Arrays]:
    """Return a tiny model, its MTP layer's weights as a checkpoint has them, and those by their names in the layer."""
    import importlib

    config, family = CONFIGS[kind], mtp.FAMILIES[kind]
    module: Any = importlib.import_module(f"mlx_lm.models.{family.module}")
    mx.random.seed(3)
    model = module.Model(module.ModelArgs.from_dict(config))
    text = model.language_model if "language_model" in model else model
    block = family.block(module, text.args)
    parts = dict(tree_flatten(block.parameters()))
    random = np.random.default_rng(1)
    inside: Arrays = {}

    def values(shape: tuple[int, ...]) -> Any:
        scale = 0.3 / np.sqrt(shape[-1]) if len(shape) > 1 else 0.2
        return (random.normal(size=shape) * scale * (3 if len(shape) > 1 else 1)).astype(np.float32)

    for name, array in parts.items():
        if ".switch_mlp." in name:
            rest = name.partition(".switch_mlp.")[2]
            for e in range(array.shape[0]):
                inside[f"mlp.experts.{e}.{rest}"] = values(array.shape[1:])
        elif name.endswith("embed_q.weight"):
            per_head = config["qk_nope_head_dim"] + config["v_head_dim"]
            rows = config["num_attention_heads"] * per_head
            inside["self_attn.kv_b_proj.weight"] = values((rows, config["kv_lora_rank"]))
        elif not name.endswith("unembed_out.weight"):
            offset = 1.0 if array.ndim == 1 and "norm" in name else 0.0
            inside[name] = values(array.shape) + np.float32(offset)
    for ours in ("enorm", "hnorm", "norm"):
        inside[_theirs(kind, ours)] = values((HIDDEN,)) + np.float32(1)
    inside[_theirs(kind, "eh_proj")] = values((HIDDEN, 2 * HIDDEN))
    prefix = mtp.prefix_of(family, config)
    own = set(family.names)
    checkpoint: Arrays = {}
    for name, array in inside.items():
        stored = array - 1 if family.norms_from_zero and array.ndim == 1 and "norm" in name else array
        where = prefix if name.removesuffix(".weight") in own else prefix + family.inner
        checkpoint[where + name] = mx.array(stored)
    return model, checkpoint, inside


def _theirs(kind: str, ours: str) -> str:
    return next(theirs for theirs, name in mtp.FAMILIES[kind].names.items() if name == ours) + ".weight"


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_a_layer_computes_what_the_paper_says(kind: str) -> None:
    model, checkpoint, inside = published(kind)
    predictor = mtp.build(mtp.FAMILIES[kind], model, checkpoint, CONFIGS[kind])
    random = np.random.default_rng(5)
    hidden, embedded = (random.normal(size=(TOKENS, HIDDEN)).astype(np.float32) for _ in range(2))
    names = {ours: _theirs(kind, ours) for ours in ("enorm", "hnorm", "eh_proj", "norm")}
    double = {name: array.astype(np.float64) for name, array in inside.items()}
    expected = reference(names, double, hidden.astype(np.float64), embedded.astype(np.float64), CONFIGS[kind])
    cache = KVCache()
    found = [
        np.array(predictor(mx.array(hidden)[None, a:b], mx.array(embedded)[None, a:b], cache))[0]
        for a, b in ((0, 4), (4, 6), (6, 7))
    ]
    error = np.sqrt(np.mean((np.concatenate(found) - expected) ** 2) / np.mean(expected**2))
    assert error <= 1e-4, f"relative RMS {error:.2g}"


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_the_parts_that_a_layer_shares_make_up_the_model(kind: str) -> None:
    model, _, _ = published(kind)
    base = mtp.base_of(model)
    tokens = mx.array([[1, 5, 9, 2]])
    assert mx.array_equal(base.head(base.inner(tokens)), model(tokens)).item()


def test_a_quantized_layer_is_read_with_the_settings_of_the_models_config(tmp_path: Path) -> None:
    model, checkpoint, _ = published("mimo")
    name = "model.mtp_layers.0.mlp.up_proj"
    weight, scales, biases = mx.quantize(checkpoint[f"{name}.weight"], group_size=32, bits=8)
    stored = checkpoint | {f"{name}.weight": weight, f"{name}.scales": scales, f"{name}.biases": biases}
    settings = {"group_size": 64, "bits": 4, name: {"group_size": 32, "bits": 8}}
    quantized = mtp.build(mtp.FAMILIES["mimo"], model, stored, CONFIGS["mimo"] | {"quantization": settings})
    plain = mtp.build(mtp.FAMILIES["mimo"], model, checkpoint, CONFIGS["mimo"])
    hidden = mx.random.normal((1, 3, HIDDEN))
    a, b = quantized(hidden, hidden), plain(hidden, hidden)
    assert quantized.block.mlp.up_proj.bits == 8
    assert mx.abs(a - b).max().item() < 0.02 * mx.abs(b).max().item()  # type: ignore[operator]
