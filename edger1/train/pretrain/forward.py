"""The forward pass that is differentiated: mlx-lm's modules, computed on rows of packed documents.

Against the modules' own `__call__` it differs in three things: attention stays within a document, latent attention
runs unabsorbed as plain attention with wider keys, and experts, the shared one among them, are one operation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models import deepseek_v3, llama
from mlx_lm.models.activations import swiglu

from edger1.train.ops import Ops, Turning


@dataclass
class Routing:
    """What a MoE layer's router did: chosen experts uint32 [B, L, k] and every expert's affinity [B, L, E]."""

    indices: mx.array
    affinities: mx.array


@dataclass
class Passed:
    """Hidden states [B, L, D] ready for the head, the MTP layer's where there is one, and each layer's routing."""

    hidden: mx.array
    ahead: mx.array | None
    routing: list[Routing]


def run(model: Any, tokens: mx.array, starts: mx.array, ops: Ops, *, ahead: bool = True) -> Passed:
    """Pass tokens int32 [B, L], of which position i sees starts[b, i] .. i, through a model.

    With `ahead`, and where the model has an MTP layer, that layer's states are computed too: at position i for token
    i + 2. The last position of a document reads a token beyond it there, and so must not count.
    """
    inner = model.model
    routing: list[Routing] = []
    embedded = inner.embed_tokens(tokens)
    norms = [layer.input_layernorm for layer in inner.layers[1:]] + [inner.norm]
    x, normed = embedded, inner.layers[0].input_layernorm(embedded)
    for layer, norm in zip(inner.layers, norms, strict=True):
        x, normed = _block(layer, x, normed, norm, starts, ops, routing)
    if not ahead or not getattr(model, "mtp", None):
        return Passed(normed, None, routing)
    (mtp,) = model.mtp
    following = mx.concatenate([embedded[:, 1:], embedded[:, -1:]], axis=1)
    joined = mx.concatenate([mtp.enorm(following), mtp.hnorm(normed)], axis=-1)
    state = ops.linear(joined, mtp.eh_proj.weight)
    _, state = _block(mtp, state, mtp.input_layernorm(state), mtp.shared_head.norm, starts, ops, routing)
    return Passed(normed, state, routing)


def head_weight(model: Any) -> mx.array:
    """Return the matrix [V, D] that logits come from."""
    return model.lm_head.weight if "lm_head" in model else model.model.embed_tokens.weight


def routers(model: Any) -> dict[str, Any]:
    """Return the MoE layers' routers in the order of `Passed.routing`, by the names of their bias."""
    found = {f"model.layers.{i}": layer for i, layer in enumerate(model.model.layers)}
    found |= {f"mtp.{i}": layer for i, layer in enumerate(getattr(model, "mtp", []))}
    return {
        f"{name}.mlp.gate.e_score_correction_bias": layer.mlp.gate
        for name, layer in found.items()
        if isinstance(layer.mlp, deepseek_v3.DeepseekV3MoE)
    }


def _block(
    layer: Any, x: mx.array, normed: mx.array, norm: Any, starts: mx.array, ops: Ops, routing: list[Routing]
) -> tuple[mx.array, mx.array]:
    """Pass x, and x normed for the layer, through it; return the result, and it normed by `norm` for what follows."""
    attend = _latent_attention if isinstance(layer, deepseek_v3.DeepseekV3DecoderLayer) else _attention
    x, normed = ops.add_norm(x, attend(layer.self_attn, normed, starts, ops), layer.post_attention_layernorm)
    if isinstance(layer.mlp, deepseek_v3.DeepseekV3MoE):
        out = _moe(layer.mlp, normed, ops, routing)
    else:
        out = _mlp(layer.mlp, normed, ops)
    return ops.add_norm(x, out, norm)


def _mlp(mlp: Any, x: mx.array, ops: Ops) -> mx.array:
    gate, up = ops.linear(x, mlp.gate_proj.weight), ops.linear(x, mlp.up_proj.weight)
    return ops.linear(swiglu(gate, up), mlp.down_proj.weight)


def _attention(attention: llama.Attention, x: mx.array, starts: mx.array, ops: Ops) -> mx.array:
    batch, length, _ = x.shape
    q, k, v = (
        ops.linear(x, projection.weight).reshape(batch, length, heads, -1)
        for projection, heads in (
            (attention.q_proj, attention.n_heads),
            (attention.k_proj, attention.n_kv_heads),
            (attention.v_proj, attention.n_kv_heads),
        )
    )
    out = ops.attention(q, v, k, starts, attention.scale, Turning(attention.rope.base, attention.rope.traditional))
    return ops.linear(out.reshape(batch, length, -1), attention.o_proj.weight)


def _latent_attention(attention: deepseek_v3.DeepseekV3Attention, x: mx.array, starts: mx.array, ops: Ops) -> mx.array:
    batch, length, _ = x.shape
    heads, latent_size = attention.num_heads, attention.kv_lora_rank
    # Projections that read the same rows are one product.
    down = attention.kv_a_proj_with_mqa.weight
    if attention.q_lora_rank is None:
        q, compressed = ops.linear(x, attention.q_proj.weight), ops.linear(x, down)
    else:
        both = ops.linear(x, mx.concatenate([attention.q_a_proj.weight, down]))
        q, compressed = mx.split(both, [attention.q_lora_rank], axis=-1)
        q = ops.linear(attention.q_a_layernorm(q), attention.q_b_proj.weight)
    latent, rope = mx.split(compressed, [latent_size], axis=-1)
    # embed_q [H, R, N] and unembed_out [H, V, R] are the two halves of one matrix that widens the latent.
    widen = mx.concatenate([attention.embed_q.weight.swapaxes(-1, -2), attention.unembed_out.weight], axis=1)
    kv = ops.linear(attention.kv_a_layernorm(latent), widen.reshape(-1, latent_size))
    out = ops.attention(
        q.reshape(batch, length, heads, -1),
        kv.reshape(batch, length, heads, -1),
        rope[:, :, None, :],
        starts,
        attention.scale,
        Turning(attention.rope_theta, True),
    )
    return ops.linear(out.reshape(batch, length, -1), attention.o_proj.weight)


def _moe(moe: deepseek_v3.DeepseekV3MoE, x: mx.array, ops: Ops, routing: list[Routing]) -> mx.array:
    gate = moe.gate
    # Routing stays in f32: rounding would change which experts are chosen.
    affinities = mx.sigmoid(x @ gate.weight.T)
    indices = _chosen(affinities, gate, ops)
    shares = mx.take_along_axis(affinities, indices, axis=-1)
    if gate.top_k > 1 and gate.norm_topk_prob:
        shares = shares / shares.sum(axis=-1, keepdims=True)
    shares = shares * gate.routed_scaling_factor
    routing.append(Routing(indices, affinities))
    weights = [w.weight for w in (moe.switch_mlp.gate_proj, moe.switch_mlp.up_proj, moe.switch_mlp.down_proj)]
    if "shared_experts" in moe:
        shared = moe.shared_experts
        weights += [w.weight for w in (shared.gate_proj, shared.up_proj, shared.down_proj)]
    out = ops.experts(x.flatten(0, -2), indices.flatten(0, -2), shares.flatten(0, -2), weights)
    return out.reshape(x.shape)


def _chosen(affinities: mx.array, gate: deepseek_v3.MoEGate, ops: Ops) -> mx.array:
    """Return the experts uint32 [..., k] that a router takes by affinity plus bias, within its best groups."""
    scores = mx.stop_gradient(affinities + gate.e_score_correction_bias)
    if gate.n_group > 1:
        grouped = mx.unflatten(scores, -1, (gate.n_group, -1))
        best = mx.topk(grouped, 2, axis=-1).sum(axis=-1, keepdims=True)
        dropped = gate.n_group - gate.topk_group
        if dropped:
            out = mx.argpartition(best, kth=dropped - 1, axis=-2)[..., :dropped, :]
            grouped = mx.put_along_axis(grouped, out, mx.array(0.0), axis=-2)
        scores = mx.flatten(grouped, -2, -1)
    return ops.best(scores, gate.top_k)
