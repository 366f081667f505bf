"""The forward pass that is differentiated: mlx-lm's modules, computed on rows of packed documents.

Against the modules' own `__call__` it differs in three things: attention stays within a document, latent attention
runs unabsorbed as plain attention with wider keys, and experts go through one operation. Rotary positions count from
the row's start and not the document's, which attention cannot tell apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.models import deepseek_v3, llama
from mlx_lm.models.activations import swiglu

from edger1.train.ops import Ops


@dataclass
class Routing:
    """What a MoE layer's router did: chosen experts uint32 [B, L, k] and every expert's affinity [B, L, E]."""

    indices: mx.array
    affinities: mx.array


@dataclass
class Passed:
    """Hidden states [B, L, D] ready for the head, the MTP layer's where there is one, and the routing layer by layer."""

    hidden: mx.array
    ahead: mx.array | None = None
    routing: list[Routing] = field(default_factory=list)


def run(model: Any, tokens: mx.array, starts: mx.array, ops: Ops, *, ahead: bool = True) -> Passed:
    """Pass tokens int32 [B, L], of which position i sees starts[b, i] .. i, through a model.

    With `ahead`, and where the model has an MTP layer, that layer's states are computed too: at position i for token
    i + 2. The last position of a document reads a token beyond it there, and so must not count.
    """
    passed = Passed(mx.array(0.0))
    inner = model.model
    embedded = inner.embed_tokens(tokens)
    hidden = embedded
    for layer in inner.layers:
        hidden = _block(layer, hidden, starts, ops, passed.routing)
    passed.hidden = inner.norm(hidden)
    if ahead and getattr(model, "mtp", None):
        (mtp,) = model.mtp
        following = mx.concatenate([embedded[:, 1:], embedded[:, -1:]], axis=1)
        joined = mx.concatenate([mtp.enorm(following), mtp.hnorm(passed.hidden)], axis=-1)
        state = _block(mtp, ops.linear(joined, mtp.eh_proj.weight), starts, ops, passed.routing)
        passed.ahead = mtp.shared_head.norm(state)
    return passed


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


def _block(layer: Any, x: mx.array, starts: mx.array, ops: Ops, routing: list[Routing]) -> mx.array:
    attend = _latent_attention if isinstance(layer, deepseek_v3.DeepseekV3DecoderLayer) else _attention
    x = x + attend(layer.self_attn, layer.input_layernorm(x), starts, ops)
    normed = layer.post_attention_layernorm(x)
    if isinstance(layer.mlp, deepseek_v3.DeepseekV3MoE):
        return x + _moe(layer.mlp, normed, ops, routing)
    return x + _mlp(layer.mlp, normed, ops)


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
    q, k = (attention.rope(a.swapaxes(1, 2)).swapaxes(1, 2) for a in (q, k))
    out = ops.attention(q, k, v, starts, attention.scale)
    return ops.linear(out.reshape(batch, length, -1), attention.o_proj.weight)


def _latent_attention(attention: deepseek_v3.DeepseekV3Attention, x: mx.array, starts: mx.array, ops: Ops) -> mx.array:
    batch, length, _ = x.shape
    heads, nope = attention.num_heads, attention.qk_nope_head_dim
    if attention.q_lora_rank is None:
        q = ops.linear(x, attention.q_proj.weight)
    else:
        q = attention.q_a_layernorm(ops.linear(x, attention.q_a_proj.weight))
        q = ops.linear(q, attention.q_b_proj.weight)
    q = q.reshape(batch, length, heads, -1)
    latent = ops.linear(x, attention.kv_a_proj_with_mqa.weight)
    latent, k_rope = mx.split(latent, [attention.kv_lora_rank], axis=-1)
    latent = attention.kv_a_layernorm(latent)

    def rotated(a: mx.array) -> mx.array:
        return attention.rope(a.swapaxes(1, 2)).swapaxes(1, 2)

    # embed_q [H, R, nope] and unembed_out [H, V, R] are the two halves of one matrix that widens the latent.
    wide_k = attention.embed_q.weight.swapaxes(-1, -2).reshape(-1, attention.kv_lora_rank)
    wide_v = attention.unembed_out.weight.reshape(-1, attention.kv_lora_rank)
    k = ops.linear(latent, wide_k).reshape(batch, length, heads, nope)
    v = ops.linear(latent, wide_v).reshape(batch, length, heads, -1)
    q = mx.concatenate([q[..., :nope], rotated(q[..., nope:])], axis=-1)
    k_rope = rotated(k_rope[:, :, None, :])
    k = mx.concatenate([k, mx.broadcast_to(k_rope, (batch, length, heads, k_rope.shape[-1]))], axis=-1)
    out = ops.attention(q, k, v, starts, attention.scale)
    return ops.linear(out.reshape(batch, length, -1), attention.o_proj.weight)


def _moe(moe: deepseek_v3.DeepseekV3MoE, x: mx.array, ops: Ops, routing: list[Routing]) -> mx.array:
    gate, experts = moe.gate, moe.switch_mlp
    # Routing stays in f32: rounding would change which experts are chosen.
    affinities = mx.sigmoid(x @ gate.weight.T)
    indices = chosen(affinities, gate)
    shares = mx.take_along_axis(affinities, indices, axis=-1)
    if gate.top_k > 1 and gate.norm_topk_prob:
        shares = shares / shares.sum(axis=-1, keepdims=True)
    shares = shares * gate.routed_scaling_factor
    routing.append(Routing(indices, affinities))
    weights = (experts.gate_proj.weight, experts.up_proj.weight, experts.down_proj.weight)
    flat = ops.experts(x.flatten(0, -2), indices.flatten(0, -2), shares.flatten(0, -2), *weights)
    out = flat.reshape(x.shape)
    return out + _mlp(moe.shared_experts, x, ops) if "shared_experts" in moe else out


def chosen(affinities: mx.array, gate: deepseek_v3.MoEGate) -> mx.array:
    """Return the experts uint32 [..., k] that a router takes by affinity plus correction bias, within its best groups."""
    scores = mx.stop_gradient(affinities) + mx.stop_gradient(gate.e_score_correction_bias)
    if gate.n_group > 1:
        grouped = mx.unflatten(scores, -1, (gate.n_group, -1))
        best = mx.topk(grouped, 2, axis=-1).sum(axis=-1, keepdims=True)
        dropped = gate.n_group - gate.topk_group
        if dropped:
            out = mx.argpartition(best, kth=dropped - 1, axis=-2)[..., :dropped, :]
            grouped = mx.put_along_axis(grouped, out, mx.array(0.0), axis=-2)
        scores = mx.flatten(grouped, -2, -1)
    return mx.stop_gradient(mx.argpartition(-scores, kth=gate.top_k - 1, axis=-1)[..., : gate.top_k])
