"""What the layers of many architectures have in common, as GGUF names it and as mlx-lm does.

Tensor names and metadata keys after llama.cpp's gguf-py; target names after the Hugging Face model classes, which
mlx-lm follows. Experts lie stacked in GGUF and stay so, under the names that mlx-lm's `sanitize` would give the stack.
"""

from __future__ import annotations

import numpy as np

from edger1.errors import FormatError
from edger1.quant.gguf_outline import Outline

_GROUPS = {(61, 256): (8, 4), (60, 160): (8, 3)}
"""(layers, experts) -> (groups, groups used) of DeepSeek V3/R1 and V2, for files from before GGUF had keys for them."""


def attention(
    outline: Outline,
    here: str,
    there: str,
    biased: bool = False,
    out_biased: bool = False,
    interleaved: bool = False,
    norms: tuple[int, int] | None = None,
    shift: float = 0.0,
) -> None:
    """Self attention; `norms` are the sizes of the norms of queries and keys, to whose weights `shift` is added."""
    hidden, wide, narrow = outline.hidden, outline.wide, outline.narrow
    query_heads, key_heads = (outline.heads, outline.kv_heads) if interleaved else (None, None)
    there = f"{there}.self_attn"
    outline.linear(f"{here}.attn_q", f"{there}.q_proj", wide, hidden, biased, query_heads)
    outline.linear(f"{here}.attn_k", f"{there}.k_proj", narrow, hidden, biased, key_heads)
    outline.linear(f"{here}.attn_v", f"{there}.v_proj", narrow, hidden, biased)
    outline.linear(f"{here}.attn_output", f"{there}.o_proj", hidden, wide, out_biased)
    if norms is not None:
        outline.add(f"{here}.attn_q_norm.weight", f"{there}.q_norm.weight", norms[0], shift=shift)
        outline.add(f"{here}.attn_k_norm.weight", f"{there}.k_norm.weight", norms[1], shift=shift)


def mlp(outline: Outline, here: str, there: str, width: int, biased: bool = False, suffix: str = "") -> None:
    """A gated MLP of `width`; `suffix` stands behind its tensors' names in the file."""
    hidden = outline.hidden
    outline.linear(f"{here}.ffn_gate{suffix}", f"{there}.gate_proj", width, hidden, biased)
    outline.linear(f"{here}.ffn_up{suffix}", f"{there}.up_proj", width, hidden, biased)
    outline.linear(f"{here}.ffn_down{suffix}", f"{there}.down_proj", hidden, width, biased)


def expert_stack(outline: Outline, here: str, there: str, experts: int, width: int, biased: bool = False) -> None:
    """Routed experts, stacked: [experts, rows, columns], and with `biased` vectors of [experts, rows]."""
    if outline.has(f"{here}.ffn_gate.0.weight"):
        raise outline.refuse("one tensor for each expert, as files from before April 2024 have it")
    if outline.has(f"{here}.ffn_gate_up_exps.weight"):
        raise outline.refuse("gate and up projections of its experts in one tensor")
    hidden = outline.hidden
    for name, rows, columns in (("gate", width, hidden), ("up", width, hidden), ("down", hidden, width)):
        outline.add(f"{here}.ffn_{name}_exps.weight", f"{there}.{name}_proj.weight", experts, rows, columns)
        if biased:
            outline.add(f"{here}.ffn_{name}_exps.bias", f"{there}.{name}_proj.bias", experts, rows)


def norms(outline: Outline, here: str, there: str, after: str = "ffn_norm") -> None:
    """The norms before attention and before the MLP; `after` is the second's name in the file."""
    outline.add(f"{here}.attn_norm.weight", f"{there}.input_layernorm.weight", outline.hidden)
    outline.add(f"{here}.{after}.weight", f"{there}.post_attention_layernorm.weight", outline.hidden)


def routing(outline: Outline, experts_key: str, width_key: str | None) -> tuple[int, int]:
    """Add the numbers of experts to the config; return how many there are and how wide."""
    experts = outline.count("expert_count")
    width = outline.count("expert_feed_forward_length", dense_width(outline))
    outline.config |= {experts_key: experts, "num_experts_per_tok": outline.count("expert_used_count")}
    outline.config.setdefault("intermediate_size", width)
    if width_key is not None:
        outline.config[width_key] = width
    return experts, width


def dense_width(outline: Outline) -> int | None:
    """Models whose layers all have experts may not name one."""
    return (
        outline.count("feed_forward_length") if outline.key("feed_forward_length") in outline.header.metadata else None
    )


def grouped_routing(outline: Outline) -> tuple[int, int, int]:
    """Add what DeepSeek's way of choosing experts needs; return experts, their width and how many are shared."""
    experts, width = routing(outline, "n_routed_experts", "moe_intermediate_size")
    shared = outline.count("expert_shared_count", 1)
    groups, used = _GROUPS.get((outline.layers, experts), (1, 1))
    outline.config |= {
        "n_shared_experts": shared,
        "routed_scaling_factor": outline.number("expert_weights_scale", 1.0),
        "norm_topk_prob": outline.header.flag(outline.key("expert_weights_norm"), False),
        "n_group": outline.count("expert_group_count", groups),
        "topk_group": outline.count("expert_group_used_count", used),
        "first_k_dense_replace": outline.header.integer(outline.key("leading_dense_block_count"), 0),
        "moe_layer_freq": 1,
    }
    if not 0 <= outline.config["first_k_dense_replace"] <= outline.layers:
        raise FormatError(f"{outline.header.name} claims more dense layers than it has layers; it is damaged.")
    return experts, width, shared


def mixed_mlp(
    outline: Outline, here: str, there: str, layer: int, routing: tuple[int, int, int], stack: str = "switch_mlp"
) -> None:
    """A dense MLP in the first layers; routed and shared experts, and the choice's bias, in the others."""
    experts, width, shared = routing
    if layer < outline.config["first_k_dense_replace"]:
        mlp(outline, here, there, outline.count("feed_forward_length"))
        return
    outline.linear(f"{here}.ffn_gate_inp", f"{there}.gate", experts, outline.hidden)
    if outline.has(f"{here}.exp_probs_b.bias"):
        outline.add(f"{here}.exp_probs_b.bias", f"{there}.gate.e_score_correction_bias", experts)
    expert_stack(outline, here, f"{there}.{stack}", experts, width)
    mlp(outline, here, f"{there}.shared_experts", shared * width, suffix="_shexp")


def further_tokens(outline: Outline, here: str, there: str) -> None:
    """What a layer that predicts further tokens (MTP) has besides; mlx-lm drops such layers, a converter may not."""
    hidden = outline.hidden
    outline.linear(f"{here}.eh_proj", f"{there}.eh_proj", hidden, 2 * hidden)
    for name in ("enorm", "hnorm"):
        outline.add(f"{here}.{name}.weight", f"{there}.{name}.weight", hidden)
    outline.add(f"{here}.shared_head_norm.weight", f"{there}.shared_head.norm.weight", hidden)
    # Some checkpoints share these two with the model.
    for source, target in (("embed_tokens", "embed_tokens"), ("shared_head_head", "shared_head.head")):
        if outline.has(f"{here}.{source}.weight"):
            outline.linear(f"{here}.{source}", f"{there}.{target}", outline.vocabulary, hidden)


def window_period(outline: Outline, default: int) -> int:
    """Return after how many layers one attends to everything; the others look through the window."""
    key = outline.key("attention.sliding_window_pattern")
    pattern = outline.header.metadata.get(key)
    if not isinstance(pattern, np.ndarray):
        return outline.count("attention.sliding_window_pattern", default)
    slides = [bool(value) for value in pattern]
    period = slides.index(False) + 1 if False in slides else len(slides) + 1
    if slides != [(layer + 1) % period != 0 for layer in range(outline.layers)]:
        raise outline.refuse("windows over layers that follow no period")
    return period
