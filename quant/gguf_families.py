"""The architectures of GGUF files that can be converted: what each has in a layer, and its config.json.

Tensor names and metadata keys after llama.cpp's gguf-py; target names after the Hugging Face model classes, which
mlx-lm follows. Experts lie stacked in GGUF and stay so, under the names that mlx-lm's `sanitize` would give the stack.

llama.cpp rotates neighbouring elements in some architectures and stores the rows of their query and key projections
interleaved; mlx-lm rotates halves, so these rows are put back in their first order (`interleaved`). It also adds one to
the weights of gemma's norms, which is taken off again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edger1.errors import FormatError
from edger1.quant import gguf_layers as layers
from edger1.quant.gguf_outline import Outline

SOFTMAX, SIGMOID = 1, 2
"""Values of `expert_gating_func`."""


@dataclass(frozen=True)
class Family:
    """An architecture. `describe` says what a model has, and completes its config.json.

    `partial` ones may rotate a part of each head; `even` ones have heads that add up to the hidden size, because
    mlx-lm computes their size from it.
    """

    model_type: str
    class_name: str
    describe: Callable[[Outline], None]
    partial: bool = False
    even: bool = False
    own_sizes: bool = False
    """Keys and values have sizes of their own kind, which `describe` checks."""


def family(outline: Outline) -> Family:
    """Return the family of a model. Raises FormatError for an architecture that is not known."""
    name = outline.name
    if name == "llama" and outline.header.integer("llama.expert_count", 0):
        return MIXTRAL
    if name == "olmo2" and "olmo2.attention.sliding_window" in outline.header.metadata:
        return OLMO3
    if name == "deepseek2" and (
        outline.header.integer("deepseek2.expert_gating_func", SOFTMAX) == SIGMOID
        or any(tensor.endswith(".exp_probs_b.bias") for tensor in outline.header.tensors)
    ):
        return DEEPSEEK_V3
    return FAMILIES[name]


def _llama(outline: Outline) -> None:
    biased, mlp_biased = outline.has("blk.0.attn_q.bias"), outline.has("blk.0.ffn_gate.bias")
    width = outline.count("feed_forward_length")
    outline.config |= {"attention_bias": biased, "mlp_bias": mlp_biased}

    def layer(outline: Outline, here: str, there: str) -> None:
        layers.norms(outline, here, there)
        layers.attention(outline, here, there, biased, biased, interleaved=True)
        layers.mlp(outline, here, f"{there}.mlp", width, mlp_biased)

    outline.each_layer(layer)


def _smollm3(outline: Outline) -> None:
    _llama(outline)
    # The file does not say which layers rotate nothing; llama.cpp takes every fourth, too.
    outline.config["no_rope_layer_interval"] = 4


def _seed_oss(outline: Outline) -> None:
    width = outline.count("feed_forward_length")
    biased, out_biased = outline.has("blk.0.attn_q.bias"), outline.has("blk.0.attn_output.bias")
    outline.config |= {"attention_bias": biased, "attention_out_bias": out_biased, "mlp_bias": False}

    def layer(outline: Outline, here: str, there: str) -> None:
        layers.norms(outline, here, there, "post_attention_norm")
        layers.attention(outline, here, there, biased, out_biased)
        layers.mlp(outline, here, f"{there}.mlp", width)

    outline.each_layer(layer)


def _mixtral(outline: Outline) -> None:
    experts, width = layers.routing(outline, "num_local_experts", None)

    def layer(outline: Outline, here: str, there: str) -> None:
        layers.norms(outline, here, there)
        layers.attention(outline, here, there, interleaved=True)
        there = f"{there}.block_sparse_moe"
        outline.linear(f"{here}.ffn_gate_inp", f"{there}.gate", experts, outline.hidden)
        layers.expert_stack(outline, here, f"{there}.switch_mlp", experts, width)

    outline.each_layer(layer)


def _qwen2(outline: Outline) -> None:
    width = outline.count("feed_forward_length")

    def layer(outline: Outline, here: str, there: str) -> None:
        layers.norms(outline, here, there)
        layers.attention(outline, here, there, biased=True)
        layers.mlp(outline, here, f"{there}.mlp", width)

    outline.each_layer(layer)


def _qwen2moe(outline: Outline) -> None:
    experts, width = layers.routing(outline, "num_experts", "moe_intermediate_size")
    shared = outline.count("expert_shared_feed_forward_length")
    outline.config["shared_expert_intermediate_size"] = shared

    def layer(outline: Outline, here: str, there: str) -> None:
        layers.norms(outline, here, there)
        layers.attention(outline, here, there, biased=True)
        there = f"{there}.mlp"
        outline.linear(f"{here}.ffn_gate_inp", f"{there}.gate", experts, outline.hidden)
        layers.expert_stack(outline, here, f"{there}.switch_mlp", experts, width)
        layers.mlp(outline, here, f"{there}.shared_expert", shared, suffix="_shexp")
        gate, target = f"{here}.ffn_gate_inp_shexp.weight", f"{there}.shared_expert_gate.weight"
        # Converters before and after 2025 write it as a vector and as a matrix of one row.
        if outline.has(gate) and len(outline.header.tensors[gate].shape) == 2:
            outline.add(gate, target, 1, outline.hidden)
        else:
            outline.add(gate, target, outline.hidden, one_row=True)

    outline.each_layer(layer)


def _qwen3(outline: Outline) -> None:
    width = outline.count("feed_forward_length")
    biased = outline.has("blk.0.attn_q.bias")

    def layer(outline: Outline, here: str, there: str) -> None:
        layers.norms(outline, here, there)
        layers.attention(outline, here, there, biased, norms=(outline.head_dim, outline.head_dim))
        layers.mlp(outline, here, f"{there}.mlp", width)

    outline.each_layer(layer)


def _qwen3moe(outline: Outline) -> None:
    experts, width = layers.routing(outline, "num_experts", "moe_intermediate_size")
    outline.config |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}

    def layer(outline: Outline, here: str, there: str) -> None:
        layers.norms(outline, here, there)
        layers.attention(outline, here, there, norms=(outline.head_dim, outline.head_dim))
        outline.linear(f"{here}.ffn_gate_inp", f"{there}.mlp.gate", experts, outline.hidden)
        layers.expert_stack(outline, here, f"{there}.mlp.switch_mlp", experts, width)

    outline.each_layer(layer)


def _olmoe(outline: Outline) -> None:
    experts, width = layers.routing(outline, "num_experts", None)
    outline.config |= {"norm_topk_prob": False, "attention_bias": False}

    def layer(outline: Outline, here: str, there: str) -> None:
        layers.norms(outline, here, there)
        layers.attention(outline, here, there, norms=(outline.wide, outline.narrow))
        outline.linear(f"{here}.ffn_gate_inp", f"{there}.mlp.gate", experts, outline.hidden)
        layers.expert_stack(outline, here, f"{there}.mlp.switch_mlp", experts, width)

    outline.each_layer(layer)


def _olmo2(outline: Outline) -> None:
    width = outline.count("feed_forward_length")
    outline.config |= {"attention_bias": False}

    def layer(outline: Outline, here: str, there: str) -> None:
        layers.attention(outline, here, there, norms=(outline.wide, outline.narrow))
        layers.mlp(outline, here, f"{there}.mlp", width)
        for source, target in (("post_attention_norm", "post_attention"), ("post_ffw_norm", "post_feedforward")):
            outline.add(f"{here}.{source}.weight", f"{there}.{target}_layernorm.weight", outline.hidden)

    outline.each_layer(layer)


def _olmo3(outline: Outline) -> None:
    _olmo2(outline)
    period = layers.window_period(outline, 4)
    kinds = ["full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in range(outline.layers)]
    outline.config |= {"sliding_window": outline.count("attention.sliding_window"), "layer_types": kinds}


def _minimax(outline: Outline) -> None:
    experts, width = layers.routing(outline, "num_local_experts", None)
    normed = outline.has("blk.0.attn_q_norm.weight")
    outline.config |= {
        "intermediate_size": width,
        "shared_intermediate_size": 0,
        "scoring_func": "sigmoid",
        "rotary_dim": outline.count("rope.dimension_count", outline.head_dim),
        "use_qk_norm": normed,
    }

    def layer(outline: Outline, here: str, there: str) -> None:
        layers.norms(outline, here, there)
        layers.attention(outline, here, there, norms=(outline.wide, outline.narrow) if normed else None)
        there = f"{there}.block_sparse_moe"
        outline.linear(f"{here}.ffn_gate_inp", f"{there}.gate", experts, outline.hidden)
        outline.add(f"{here}.exp_probs_b.bias", f"{there}.e_score_correction_bias", experts)
        layers.expert_stack(outline, here, f"{there}.switch_mlp", experts, width)

    outline.each_layer(layer)


def _dots1(outline: Outline) -> None:
    routing = layers.grouped_routing(outline)
    outline.config |= {"attention_bias": False, "mlp_bias": False, "scoring_func": "noaux_tc"}
    for index in range(outline.layers):
        here, there = f"blk.{index}", f"model.layers.{index}"
        layers.norms(outline, here, there)
        layers.attention(outline, here, there, norms=(outline.head_dim, outline.head_dim))
        layers.mixed_mlp(outline, here, f"{there}.mlp", index, routing, stack="experts")


def _granite_scales(outline: Outline) -> None:
    outline.config |= {
        "logits_scaling": outline.number("logit_scale"),
        "attention_multiplier": outline.number("attention.scale", outline.head_dim**-0.5),
        "embedding_multiplier": outline.number("embedding_scale", 1.0),
        "residual_multiplier": outline.number("residual_scale", 1.0),
        "attention_bias": outline.has("blk.0.attn_q.bias"),
    }


def _granite(outline: Outline) -> None:
    width = outline.count("feed_forward_length")
    _granite_scales(outline)
    biased = outline.config["attention_bias"]
    outline.config["mlp_bias"] = mlp_biased = outline.has("blk.0.ffn_gate.bias")

    def layer(outline: Outline, here: str, there: str) -> None:
        layers.norms(outline, here, there)
        layers.attention(outline, here, there, biased, biased, interleaved=True)
        layers.mlp(outline, here, f"{there}.mlp", width, mlp_biased)

    outline.each_layer(layer)


def _granitemoe(outline: Outline) -> None:
    if outline.has("blk.0.ffn_gate_shexp.weight"):
        raise outline.refuse("a shared expert")
    _granite_scales(outline)
    biased = outline.config["attention_bias"]
    experts, width = layers.routing(outline, "num_local_experts", None)

    def layer(outline: Outline, here: str, there: str) -> None:
        layers.norms(outline, here, there)
        layers.attention(outline, here, there, biased, biased, interleaved=True)
        there = f"{there}.block_sparse_moe"
        outline.linear(f"{here}.ffn_gate_inp", f"{there}.router.layer", experts, outline.hidden)
        layers.expert_stack(outline, here, f"{there}.switch_mlp", experts, width)

    outline.each_layer(layer)


def _gpt_oss(outline: Outline) -> None:
    experts, width = layers.routing(outline, "num_local_experts", None)
    kinds = ["sliding_attention", "full_attention"]
    outline.config |= {
        "intermediate_size": width,
        "sliding_window": outline.count("attention.sliding_window"),
        "layer_types": [kinds[layer % 2] for layer in range(outline.layers)],
        "attention_bias": True,
    }
    if not outline.has("output.weight"):
        raise outline.refuse("tied embeddings")

    def layer(outline: Outline, here: str, there: str) -> None:
        after = "post_attention_norm" if outline.has(f"{here}.post_attention_norm.weight") else "ffn_norm"
        layers.norms(outline, here, there, after)
        layers.attention(outline, here, there, biased=True, out_biased=True)
        outline.add(f"{here}.attn_sinks.weight", f"{there}.self_attn.sinks", outline.heads)
        outline.linear(f"{here}.ffn_gate_inp", f"{there}.mlp.router", experts, outline.hidden, bias=True)
        layers.expert_stack(outline, here, f"{there}.mlp.experts", experts, width, biased=True)

    outline.each_layer(layer)


def _gemma_layer(outline: Outline, here: str, there: str, norms: bool, around: bool) -> None:
    width = outline.count("feed_forward_length")
    named = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    if around:
        named = {
            "attn_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        }
    for source, target in named.items():
        outline.add(f"{here}.{source}.weight", f"{there}.{target}.weight", outline.hidden, shift=-1.0)
    sizes = (outline.head_dim, outline.head_dim) if norms else None
    layers.attention(outline, here, there, norms=sizes, shift=-1.0)
    layers.mlp(outline, here, f"{there}.mlp", width)


def _gemma_config(outline: Outline, large: int | None) -> None:
    """Attention of the model with `large` layers is scaled by another size than that of its heads."""
    scale = outline.hidden // outline.heads if outline.layers == large else outline.head_dim
    outline.config |= {"hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": scale}
    if outline.has("output.weight"):
        raise outline.refuse("an output matrix of its own")


def _gemma(outline: Outline) -> None:
    _gemma_config(outline, None)
    del outline.config["query_pre_attn_scalar"]
    outline.each_layer(lambda outline, here, there: _gemma_layer(outline, here, there, norms=False, around=False))


def _gemma2(outline: Outline) -> None:
    _gemma_config(outline, 46)
    outline.config |= {
        "attn_logit_softcapping": outline.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": outline.number("final_logit_softcapping", 30.0),
        "sliding_window": outline.count("attention.sliding_window", 4096),
    }
    outline.each_layer(lambda outline, here, there: _gemma_layer(outline, here, there, norms=False, around=True))


def _gemma3(outline: Outline) -> None:
    _gemma_config(outline, 62)
    if outline.key("final_logit_softcapping") in outline.header.metadata:
        raise outline.refuse("capped logits")
    outline.config |= {
        "rope_local_base_freq": outline.number("rope.freq_base_swa", 10000.0),
        "sliding_window": outline.count("attention.sliding_window"),
        "sliding_window_pattern": layers.window_period(outline, 6),
    }
    outline.each_layer(lambda outline, here, there: _gemma_layer(outline, here, there, norms=True, around=True))


def _phi3(outline: Outline) -> None:
    width = outline.count("feed_forward_length")
    rows = outline.wide + 2 * outline.narrow

    def layer(outline: Outline, here: str, there: str) -> None:
        layers.norms(outline, here, there)
        outline.linear(f"{here}.attn_qkv", f"{there}.self_attn.qkv_proj", rows, outline.hidden)
        outline.linear(f"{here}.attn_output", f"{there}.self_attn.o_proj", outline.hidden, outline.wide)
        outline.linear(f"{here}.ffn_up", f"{there}.mlp.gate_up_proj", 2 * width, outline.hidden)
        outline.linear(f"{here}.ffn_down", f"{there}.mlp.down_proj", outline.hidden, width)

    outline.each_layer(layer)


def _deepseek(outline: Outline, absorbed: bool) -> None:
    """`absorbed` models keep the two halves of the latent's projection apart, as llama.cpp does."""
    if outline.extra_blocks:
        raise outline.refuse("layers that predict further tokens")
    if outline.key("attention.temperature_scale") in outline.header.metadata:
        raise outline.refuse("a temperature that follows the length")
    rank = outline.count("attention.kv_lora_rank")
    rotated = outline.count("rope.dimension_count")
    keys = outline.count("attention.key_length_mla", outline.head_dim) - rotated
    values = outline.count(
        "attention.value_length_mla", outline.header.integer(outline.key("attention.value_length"), keys)
    )
    if keys < 1:
        raise FormatError(
            f"{outline.header.name} claims keys of {keys + rotated} elements of which {rotated} are rotated; it is "
            "damaged."
        )
    low_rank = outline.count("attention.q_lora_rank") if outline.has("blk.0.attn_q_a.weight") else None
    hidden, heads = outline.hidden, outline.heads
    wide = heads * (keys + rotated)
    routing = layers.grouped_routing(outline)
    outline.config |= {
        "kv_lora_rank": rank,
        "q_lora_rank": low_rank,
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": keys,
        "v_head_dim": values,
        "attention_bias": False,
        # The file may count one, for the latent that all heads share.
        "num_key_value_heads": heads,
    }
    del outline.config["head_dim"]
    if absorbed:
        outline.config |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    else:
        grouped = outline.config["n_group"] > 1
        outline.config["topk_method"] = "group_limited_greedy" if grouped else "greedy"

    def layer(outline: Outline, here: str, there: str, index: int) -> None:
        layers.norms(outline, here, there)
        attention = f"{there}.self_attn"
        if low_rank is None:
            outline.linear(f"{here}.attn_q", f"{attention}.q_proj", wide, hidden)
        else:
            outline.linear(f"{here}.attn_q_a", f"{attention}.q_a_proj", low_rank, hidden)
            outline.add(f"{here}.attn_q_a_norm.weight", f"{attention}.q_a_layernorm.weight", low_rank)
            outline.linear(f"{here}.attn_q_b", f"{attention}.q_b_proj", wide, low_rank)
        outline.linear(f"{here}.attn_kv_a_mqa", f"{attention}.kv_a_proj_with_mqa", rank + rotated, hidden)
        outline.add(f"{here}.attn_kv_a_norm.weight", f"{attention}.kv_a_layernorm.weight", rank)
        if outline.has(f"{here}.attn_kv_b.weight"):
            outline.linear(f"{here}.attn_kv_b", f"{attention}.kv_b_proj", heads * (keys + values), rank)
        elif absorbed:
            outline.add(f"{here}.attn_k_b.weight", f"{attention}.embed_q.weight", heads, rank, keys)
            outline.add(f"{here}.attn_v_b.weight", f"{attention}.unembed_out.weight", heads, values, rank)
        else:
            joined = f"{here}.attn_k_b.weight", f"{here}.attn_v_b.weight", f"{attention}.kv_b_proj.weight"
            outline.add_joined(*joined, heads, keys, values, rank)
        outline.linear(f"{here}.attn_output", f"{attention}.o_proj", hidden, heads * values)
        layers.mixed_mlp(outline, here, f"{there}.mlp", index, routing)

    for index in range(outline.layers):
        layer(outline, f"blk.{index}", f"model.layers.{index}", index)


def _glm4moe(outline: Outline) -> None:
    routing = layers.grouped_routing(outline)
    biased, normed = outline.has("blk.0.attn_q.bias"), outline.has("blk.0.attn_q_norm.weight")
    outline.config |= {
        "attention_bias": biased,
        "use_qk_norm": normed,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": outline.extra_blocks,
    }
    norms = (outline.head_dim, outline.head_dim) if normed else None
    for index in range(outline.blocks):
        here, there = f"blk.{index}", f"model.layers.{index}"
        if index >= outline.layers and not outline.has(f"{here}.nextn.eh_proj.weight"):
            break
        layers.norms(outline, here, there, "post_attention_norm")
        layers.attention(outline, here, there, biased, norms=norms)
        layers.mixed_mlp(outline, here, f"{there}.mlp", index, routing)
        if index >= outline.layers:
            layers.further_tokens(outline, f"{here}.nextn", there)


OLMO3 = Family("olmo3", "Olmo3ForCausalLM", _olmo3)
MIXTRAL = Family("mixtral", "MixtralForCausalLM", _mixtral, even=True)
DEEPSEEK_V3 = Family(
    "deepseek_v3", "DeepseekV3ForCausalLM", lambda outline: _deepseek(outline, absorbed=True), own_sizes=True
)
FAMILIES: dict[str, Family] = {
    "llama": Family("llama", "LlamaForCausalLM", _llama),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", _qwen2, even=True),
    "qwen2moe": Family("qwen2_moe", "Qwen2MoeForCausalLM", _qwen2moe, even=True),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", _qwen3),
    "qwen3moe": Family("qwen3_moe", "Qwen3MoeForCausalLM", _qwen3moe),
    "smollm3": Family("smollm3", "SmolLM3ForCausalLM", _smollm3),
    "seed_oss": Family("seed_oss", "SeedOssForCausalLM", _seed_oss),
    "minimax-m2": Family("minimax", "MiniMaxM2ForCausalLM", _minimax, partial=True),
    "dots1": Family("dots1", "Dots1ForCausalLM", _dots1),
    "olmo2": Family("olmo2", "Olmo2ForCausalLM", _olmo2),
    "olmoe": Family("olmoe", "OlmoeForCausalLM", _olmoe),
    "granite": Family("granite", "GraniteForCausalLM", _granite, even=True),
    "granitemoe": Family("granitemoe", "GraniteMoeForCausalLM", _granitemoe, even=True),
    "gemma": Family("gemma", "GemmaForCausalLM", _gemma),
    "gemma2": Family("gemma2", "Gemma2ForCausalLM", _gemma2),
    "gemma3": Family("gemma3_text", "Gemma3ForCausalLM", _gemma3),
    "phi3": Family("phi3", "Phi3ForCausalLM", _phi3, partial=True, even=True),
    "gpt-oss": Family("gpt_oss", "GptOssForCausalLM", _gpt_oss),
    "glm4moe": Family("glm4_moe", "Glm4MoeForCausalLM", _glm4moe, partial=True),
    "deepseek2": Family(
        "deepseek_v2", "DeepseekV2ForCausalLM", lambda outline: _deepseek(outline, absorbed=False), own_sizes=True
    ),
}
"""GGUF architecture -> family. Models of `llama` with experts, of `olmo2` with windows, and of `deepseek2` whose router
is a sigmoid are families of their own."""


def basics(outline: Outline, chosen: Family) -> dict[str, Any]:
    """Return what every family's config.json has."""
    return {
        "architectures": [chosen.class_name],
        "model_type": chosen.model_type,
        "hidden_act": "silu",
        "hidden_size": outline.hidden,
        **({"intermediate_size": width} if (width := layers.dense_width(outline)) else {}),
        "num_hidden_layers": outline.layers,
        "num_attention_heads": outline.heads,
        "num_key_value_heads": outline.kv_heads,
        "head_dim": outline.head_dim,
        "max_position_embeddings": outline.count("context_length"),
        "rms_norm_eps": outline.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": outline.number("rope.freq_base", 10000.0),
        "tie_word_embeddings": not outline.has("output.weight"),
        "vocab_size": outline.vocabulary,
    }
